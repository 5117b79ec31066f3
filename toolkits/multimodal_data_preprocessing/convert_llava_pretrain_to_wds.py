"""Turn LLaVA's json and images into an energon dataset: `python convert_llava_pretrain_to_wds.py --help`."""

from megatron_patch.files.terminal import run
from megatron_patch.prepare.commands import main

if __name__ == "__main__":
    run(main)
