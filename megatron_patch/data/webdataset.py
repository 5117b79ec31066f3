"""From LLaVA-Pretrain's json and pictures to tar shards that energon reads. Imports nothing heavy before it has to."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

T = TypeVar("T")

ANNOTATIONS = "blip_laion_cc_sbu_558k.json"
IMAGE = "<image>"
MIN_SHARDS = 10
"""Energon splits by shard, 9 to 1 here: with fewer, the val split would be larger, or the train split empty."""
SAMPLES_PER_SHARD = 10_000
# A dot in a key breaks a sample without a word; 90 characters fit a plain tar header.
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
# How a whole picture begins and ends. Few bytes may follow: of what a camera or a server appended.
MARKERS = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"))
TAIL = 1024

DATASET_YAML = """\
sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: jpg
  context: json[0][value]
  answers: json[1][value]
"""
SPLIT = (("train", 9.0), ("val", 1.0), ("test", 0.0))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the samples: given = written + rejected."""

    given: int
    written: int
    rejected: int
    quarantine: Path
    """File with one line per rejected sample: its id, a tab, why."""


class Rejected(ValueError):
    """A sample that cannot be used, and why."""


class Quarantine:
    """The list of rejected samples. Raises ValueError when there are more than allowed."""

    def __init__(self, path: Path, total: int, max_share: float) -> None:
        self.path = path
        self.count = 0
        self._total, self._max_share = total, max_share
        self._file = path.open("w")

    def add(self, entry: Any, why: Rejected) -> None:
        """One line: the sample's id, a tab, why."""
        name = entry.get("id") if isinstance(entry, dict) else entry
        # As in json, so that a line stays a line whatever the id is.
        self._file.write(f"{json.dumps(name)[:200]}\t{why}\n")
        self.count += 1
        if self.count > self._max_share * self._total:
            raise ValueError(
                f"{self.path}: {self.count} samples rejected, more than --max-rejected-share {self._max_share} of "
                f"{self._total} allows; the last one: {why}"
            )

    def close(self) -> None:
        """Finish the file; an empty one is removed."""
        self._file.close()
        if not self.count:
            self.path.unlink()


class Pictures:
    """Reads pictures by the names that the json gives them: from the folder, its images folder, or its images.zip."""

    def __init__(self, folder: Path) -> None:
        # Real paths: where a folder lies behind a link, its pictures still lie in it.
        self._roots = [root.resolve() for root in (folder, folder / "images") if root.is_dir()]
        self._zip_path = folder / "images.zip"
        self._zip: zipfile.ZipFile | None = None

    def read(self, name: str) -> bytes:
        """A whole JPEG or PNG. Raises Rejected when it is missing, cut off, or outside of the folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Rejected(f"image {name!r} leads out of the folder")
        try:
            data = self._read(name)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise Rejected(f"image {name!r}: {error}") from error
        if not any(data.startswith(begin) and data.rfind(end, -TAIL) >= 0 for begin, end in MARKERS):
            what = "cut off" if any(data.startswith(begin) for begin, _ in MARKERS) else "neither JPEG nor PNG"
            raise Rejected(f"image {name!r} is {what if data else 'empty'}")
        return data

    def _read(self, name: str) -> bytes:
        for root in self._roots:
            path = root / name
            if path.is_file():
                if not path.resolve().is_relative_to(root):
                    raise ValueError("a link that leads out of the folder")
                return path.read_bytes()
        if self._zip is None:
            if not self._zip_path.is_file():
                raise ValueError("missing")
            self._zip = zipfile.ZipFile(self._zip_path)
        try:
            return self._zip.read(name)
        except KeyError:
            raise ValueError(f"missing, in {self._zip_path.name} too") from None


def convert(folder: Path, *, overwrite: bool = False, prepare: bool = True, max_rejected_share: float = 0.01) -> Report:
    """Write `folder`/wds from `folder`/blip_laion_cc_sbu_558k.json and the pictures in `folder` or its images.zip.

    The shards' bytes depend on nothing but the input. They are built aside and renamed when they are whole. Samples
    that cannot be used are listed in `folder`/wds.rejected.tsv. Raises ValueError or OSError in one line: missing
    input, an existing wds (unless `overwrite`), more rejected than `max_rejected_share` of the samples.
    """
    folder = Path(folder)
    target, partial = folder / "wds", folder / "wds.partial"
    replaced = folder / f".wds.replaced.{os.getpid()}"
    entries = _read_annotations(folder)
    if target.exists() and not overwrite:
        raise ValueError(f"{target}: exists; remove it or give --overwrite")
    if partial.exists() and not overwrite:
        raise ValueError(f"{partial}: another conversion is running or was killed; remove it or give --overwrite")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    quarantine = Quarantine(folder / "wds.rejected.tsv", len(entries), max_rejected_share)
    try:
        counts = _write_shards(entries, folder, partial, quarantine)
        if prepare:
            prepare_energon(partial, counts)
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        quarantine.close()
        shutil.rmtree(partial, ignore_errors=True)
    return Report(
        given=len(entries), written=sum(counts.values()), rejected=quarantine.count, quarantine=quarantine.path
    )


def prepare_energon(folder: Path, counts: dict[str, int]) -> None:
    """What `energon prepare` does, without questions: index, split 9 to 1, dataset.yaml for VQASample.

    `counts`: shard name -> samples in it. Raises ValueError when energon finds other ones.
    """
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    # Its remarks name the folder that is renamed afterwards.
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            EPath(folder.resolve()),
            sorted(counts),
            split_parts_ratio=list(SPLIT),
            shuffle_seed=None,
            workers=min(len(counts), os.cpu_count() or 1),
        )
    meta = folder / ".nv-meta"
    found = json.loads((meta / ".info.json").read_text())["shard_counts"]
    if found != counts:
        # Energon logs a shard that it cannot read, and goes on without it.
        differing = sorted(name for name in counts if found.get(name) != counts[name])
        raise ValueError(f"{folder}: energon counts other samples than were written in {', '.join(differing)}")
    (meta / "dataset.yaml").write_text(DATASET_YAML)


def _read_annotations(folder: Path) -> list[Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected LLaVA-Pretrain's, with {ANNOTATIONS} and the images")
    path = folder / ANNOTATIONS
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected LLaVA-Pretrain's annotations beside the images")
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not json: {error}; download it again") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of samples")
    return entries


def _write_shards(entries: Sequence[Any], folder: Path, target: Path, quarantine: Quarantine) -> dict[str, int]:
    """Write every usable entry; returns shard name -> samples in it."""
    num_shards = max(MIN_SHARDS, math.ceil(len(entries) / SAMPLES_PER_SHARD))
    pictures = Pictures(folder)
    seen: set[str] = set()
    counts = {}
    progress = _report_progress(entries, len(entries), "samples")
    for shard in range(num_shards):
        # Cut by the position in the json: a rejected sample moves no other one.
        size = (shard + 1) * len(entries) // num_shards - shard * len(entries) // num_shards
        path = target / f"{shard:05d}.tar"
        written = _write_shard(path, islice(progress, size), pictures, seen, quarantine)
        if written:
            counts[path.name] = written
        else:
            path.unlink()
    if len(counts) < 2:
        raise ValueError(f"{folder}: {sum(counts.values())} usable samples; a train and a val split need at least 2")
    return counts


def _write_shard(path: Path, entries: Iterable[Any], pictures: Pictures, seen: set[str], quarantine: Quarantine) -> int:
    """Write the usable ones of `entries`; returns their number. `seen`: the ids written so far, in all shards."""
    written = 0
    # USTAR and no time: 512 bytes before each file, the same in every run.
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry in entries:
            try:
                key, conversations = _check(entry, seen)
                picture = pictures.read(entry["image"])
            except Rejected as why:
                quarantine.add(entry, why)
                continue
            seen.add(key)
            _add(tar, f"{key}.jpg", picture)
            _add(tar, f"{key}.json", json.dumps(conversations).encode())
            written += 1
    return written


def _check(entry: Any, seen: set[str]) -> tuple[str, list[dict[str, str]]]:
    """The key and the conversation of a usable sample; raises Rejected."""
    if not isinstance(entry, dict):
        raise Rejected("not a json object")
    key = str(entry.get("id", ""))
    if not KEY.fullmatch(key):
        raise Rejected("the id is not made of 1 to 90 letters, digits, - and _")
    if key in seen:
        raise Rejected("the id was there before")
    if not isinstance(entry.get("image"), str):
        raise Rejected("no image")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("conversations is not a list of turns")
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise Rejected("conversations is not one question (human) and one answer (gpt)")
    question, answer = (turn.get("value") for turn in turns)
    if not isinstance(question, str) or question.count(IMAGE) != 1:
        raise Rejected(f"the question does not have exactly one {IMAGE}")
    if not isinstance(answer, str) or not answer.strip():
        raise Rejected("the caption is empty")
    if IMAGE in answer:
        raise Rejected(f"the caption has an {IMAGE}")
    return key, turns


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _report_progress(items: Iterable[T], total: int, unit: str, seconds: float = 10.0) -> Iterator[T]:
    """The items, with count, rate and time left on stderr: a bar on a terminal, else a line now and then."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=f" {unit}")
        return
    layout = f"{{n_fmt}}/{{total_fmt}} {unit}, {{rate_noinv_fmt}}, {{remaining}} left"
    start = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            print(tqdm.format_meter(count, total, now - start, bar_format=layout), file=sys.stderr, flush=True)
