"""What `make bench` runs. `python benchmarks/run.py --help`."""

from __future__ import annotations

import sys

from converter import main

if __name__ == "__main__":
    sys.exit(main())
