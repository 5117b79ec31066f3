"""The command that turns LLaVA's json and images into an energon dataset."""

from __future__ import annotations

import contextlib
import signal
import sys

from megatron_patch.config.flags import parse
from megatron_patch.files.text import printable
from megatron_patch.prepare import Report, Settings, convert

MAX_SHOWN = 10
"""Rejected samples that a dry run prints."""


def main() -> int:
    """Exit code 0, or 1 with one line on stderr."""
    settings = parse(Settings, sys.argv[1:], positional="dir")
    # As Ctrl-C does: what was begun is left in order, and the processes end.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    try:
        report = convert(settings)
    except (ValueError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"error: {printable(settings.dir)}: out of memory; give more, or fewer --workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    with contextlib.suppress(BrokenPipeError):  # nobody reads it, and the work is done
        print(_describe(settings, report), flush=True)
    return 0


def _describe(settings: Settings, report: Report) -> str:
    """Last the line that counts: given = written + rejected."""
    output = settings.output or f"{settings.dir}/wds"
    if settings.dry_run:
        where = "".join(
            f"\n  position {line[0]}, id {printable(line[1])}: {printable(line[2])}"
            for line in report.rejected[:MAX_SHOWN]
        )
        output = f"{output} (dry run)"
    else:
        where = f" ({report.quarantine})" if report.rejected and settings.part is None else ""
    size = sum(record.size for record in report.records)
    images = sum(record.pictures for record in report.records)
    mean = sum(record.picture_bytes for record in report.records) / max(1, images)
    largest = max((record.largest_picture for record in report.records), default=0)
    part = f" (part {settings.part} of {report.num_shards})" if settings.part else ""
    lengths = f"{report.lengths}\n" if report.lengths else ""
    return (
        f"{len(report.records)} shards{part} of {'VQASample' if report.is_pairs else 'conversations'}, "
        f"{size / 1e6:,.1f} MB; {images} images of {mean / 1e3:.1f} kB, the largest {largest / 1e3:.1f} kB\n"
        f"{lengths}"
        f"{output}: {report.given} given = {report.written} written + {len(report.rejected)} rejected{where}"
    )
