"""Pretrain LLaVA. `python pretrain_llava.py --help` lists the flags; run_mcore_llava.sh has them as 23 arguments."""

import os
import sys
from pathlib import Path

from megatron_patch.config.flags import parse
from megatron_patch.config.train import Config
from megatron_patch.files.terminal import outlive_readers
from megatron_patch.training.launch import is_worker, launch

if __name__ == "__main__":
    outlive_readers()
    config = parse(Config, sys.argv[1:])
    if is_worker():
        from megatron_patch.training.worker import run

        # Not sys.exit: after an error, other ranks may wait for this one, and threads that wait for them with it.
        code = run(config)
        sys.stdout.flush()
        os._exit(code)
    try:
        sys.exit(launch(config, Path(__file__), sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
