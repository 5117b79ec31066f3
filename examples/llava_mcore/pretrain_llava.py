"""Pretrain LLaVA. `python pretrain_llava.py --help` lists the flags; run_mcore_llava.sh has them as 23 arguments."""

from pathlib import Path

from megatron_patch.cli.train import main
from megatron_patch.files.terminal import run

if __name__ == "__main__":
    run(lambda: main(Path(__file__)))
