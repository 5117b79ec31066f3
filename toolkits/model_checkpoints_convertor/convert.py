"""Convert LLaVA between Hugging Face and Megatron-Core: `python convert.py --help`."""

import sys

try:
    from megatron_patch.conversion.commands import main
    from megatron_patch.files.terminal import run
except KeyboardInterrupt:
    sys.exit(130)  # nothing has begun

if __name__ == "__main__":
    run(main)
