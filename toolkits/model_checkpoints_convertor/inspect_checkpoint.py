"""Print what a checkpoint is, without loading it: `python inspect_checkpoint.py FOLDER`.

(Not called inspect.py: that would hide Python's own module from the programs beside it.)
"""

from megatron_patch.conversion.inspect_checkpoint import main
from megatron_patch.files.terminal import run

if __name__ == "__main__":
    run(main)
