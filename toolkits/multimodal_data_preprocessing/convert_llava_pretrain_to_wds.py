"""Turn the LLaVA-Pretrain folder into an energon dataset: DIR/wds, tar shards with jpg and json, ready to train on.

DIR holds blip_laion_cc_sbu_558k.json and the images, unzipped or as images.zip. Samples that cannot be used are listed
in DIR/wds.rejected.tsv, one line each: id, why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megatron_patch.data.webdataset import convert


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        print(f"error: {message}; --help lists what is allowed", file=sys.stderr)
        sys.exit(2)


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError
    return value


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the LLaVA-Pretrain folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR/wds")
    parser.add_argument("--no-prepare", action="store_true", help="leave `energon prepare` to you")
    parser.add_argument(
        "--max-rejected-share",
        type=share,
        default=0.01,
        help="part of the samples, 0 to 1, that may be unusable before it is an error (default: %(default)s)",
    )
    given = parser.parse_args()
    try:
        report = convert(
            given.dir,
            overwrite=given.overwrite,
            prepare=not given.no_prepare,
            max_rejected_share=given.max_rejected_share,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    where = f" ({report.quarantine})" if report.rejected else ""
    print(f"{given.dir / 'wds'}: {report.given} given = {report.written} written + {report.rejected} rejected{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
