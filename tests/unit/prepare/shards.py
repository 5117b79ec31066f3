"""Reads back what a conversion wrote."""

from __future__ import annotations

import tarfile
from pathlib import Path

from megatron_patch.prepare import Report


def read_shards(folder: Path) -> dict[str, bytes]:
    """Every member of every shard: name -> bytes, in order."""
    members = {}
    for path in sorted((folder / "wds").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in members
                members[member.name] = tar.extractfile(member).read()
    return members


def rejects(report: Report) -> dict[str, str]:
    """id -> why, from the list, which says the same as the report."""
    lines = [line.split("\t") for line in Path(report.quarantine).read_text().splitlines()]
    assert [(int(position), *line) for position, *line in lines] == report.rejected
    assert report.given == report.written + len(lines)
    return {name: why for _, name, why in lines}


def shards(folder: Path) -> dict[str, bytes]:
    """Name -> bytes."""
    return {path.name: path.read_bytes() for path in (folder / "wds").glob("*.tar")}
