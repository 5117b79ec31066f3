"""`manifest.json` beside the shards: what was written, tensor by tensor, so that damage and mix-ups are found.

No format of weights notices a flipped bit, or two shards of equal shape that changed places. The manifest has the
sha256 of every tensor's bytes, run by run (`layout.runs`: the rows of a shard that come from one Hugging Face tensor),
and of all other bytes of the file. A checkpoint without a manifest is read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_patch.files.json_object import parse_json
from megatron_patch.tensor_io.digest import RunDigest
from megatron_patch.tensor_io.stream import Target
from megatron_patch.tensor_io.torch_zip import frame

FILE = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a rank's file."""

    dtype: str
    shape: list[int]
    whole: str
    """Its name in the whole model: the layer counted from the first stage's."""

    axis: int | None
    """Tensor-parallel axis; None: every rank holds all of it."""

    ranges: list[list[int]]
    """Which part of that axis of the whole (padded) tensor it is: [first, end), two of them for gate and up."""

    rows: list[int]
    sha256: list[str]
    """Of its runs of so many rows each."""


@dataclass(frozen=True)
class RankRecord:
    """One file: a rank's, or one of a torch_dist checkpoint."""

    file: str
    size: int
    frame_sha256: str
    """Of all bytes that are no tensor's."""

    tensors: dict[str, TensorRecord]


def tensor_record(
    target: Target, whole: str, axis: int | None = None, ranges: Sequence[list[int]] = ()
) -> TensorRecord:
    """What is said of a tensor that was written."""
    view = target.view
    return TensorRecord(
        dtype=dtype_name(view.dtype),
        shape=list(view.shape),
        whole=whole,
        axis=axis,
        ranges=list(ranges),
        rows=list(target.runs),
        sha256=target.digests,
    )


def file_record(
    folder: Path, name: str, targets: Sequence[Target] = (), tensors: Mapping[str, TensorRecord] | None = None
) -> RankRecord:
    """What is said of the file `folder`/`name`. `targets`: its tensors, whose records are `tensors`."""
    path = folder / name
    places = [(target.offset, target.view.nbytes) for target in targets]
    return RankRecord(name, path.stat().st_size, frame_digest(path, places), dict(tensors or {}))


def write(
    folder: Path, ranks: dict[str, RankRecord], sizes: Mapping[str, int | None], source: Sequence[dict[str, Any]]
) -> None:
    """Write `folder`/manifest.json. `sizes`: parallel sizes. `source`: what it was made of (`identity`)."""
    content = {
        "format": FORMAT,
        **sizes,
        "tools": {name: _version(name) for name in ("megatron-patch-llava", "torch", "safetensors")}
        | {"python": platform.python_version()},
        "source": list(source),
        "ranks": {name: asdict(record) for name, record in ranks.items()},
    }
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"
    (folder / FILE).write_text(text)


def read(folder: Path) -> dict[str, RankRecord] | None:
    """The ranks' records; None when there is no manifest. Raises ValueError, one line, for one that is damaged."""
    content = load(folder)
    if content is None:
        return None
    try:
        records = {
            name: RankRecord(**(rank | {"tensors": {n: TensorRecord(**of) for n, of in rank["tensors"].items()}}))
            for name, rank in content["ranks"].items()
        }
        for record in records.values():
            _check_record(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None
    return records


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest as it stands in the file; None when there is none. Raises as `read` does."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes().decode(), "it is")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version knows {FORMAT}")
        if content.pop("sha256") != _digest(content):
            raise ValueError("its own sha256 differs")
        named = [source["file"] for source in content["source"]]
        if not all(isinstance(value, str) for value in (*named, *content["tools"].values())):
            raise ValueError("it names sources or tools by something else than text")
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError, RecursionError) as error:
        raise _damaged(folder, error) from None
    return content


def _check_record(record: RankRecord) -> None:
    """Raise ValueError where a sum that was made again hides values that nobody wrote so."""
    parts = Path(str(record.file)).parts
    if not 1 <= len(parts) <= 2 or ".." in parts or Path(str(record.file)).is_absolute():
        raise ValueError(f"it names the file {record.file!r}")
    texts, numbers = [record.file, record.frame_sha256], [record.size]
    for name, tensor in record.tensors.items():
        texts += [name, tensor.dtype, tensor.whole, *tensor.sha256]
        numbers += [*tensor.shape, *tensor.rows, *(edge for part in tensor.ranges for edge in part)]
        if len(tensor.rows) != len(tensor.sha256) or tensor.axis not in (None, 0, 1):
            raise ValueError(f"{name[:200]}: its runs, their sums or its axis do not belong together")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name or a sum is no text")
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError("a size is no whole number of 0 or more")


def _damaged(folder: Path, error: Exception) -> ValueError:
    what = " ".join(str(error).split())[:300]
    return ValueError(
        f"{Path(folder) / FILE}: damaged or changed ({what}); copy the checkpoint again, or read it with "
        "--no-check true"
    )


def check_rank(path: Path, record: RankRecord, tensors: dict[str, tuple[str, list[int], int, int]]) -> None:
    """Compare a rank's file with its record, except for the tensors' values, which are checked as they are read.

    `tensors`: name -> (type, shape, offset, bytes). Raises ValueError, one line that names the file, and the tensor
    where it is about one.
    """
    again = f"by {FILE}; copy or convert the checkpoint again"
    for name in (*record.tensors, *tensors):
        if name not in tensors or name not in record.tensors:
            which = "is missing from the file" if name in record.tensors else "should not be in it"
            raise ValueError(f"{path}: {name} {which}, {again}")
        expected = record.tensors[name]
        dtype, shape, _, _ = tensors[name]
        if (dtype, list(shape)) != (expected.dtype, expected.shape):
            raise ValueError(f"{path}: {name} is {dtype} {shape}, expected {expected.dtype} {expected.shape} {again}")
    if frame_digest(path, [(offset, size) for _, _, offset, size in tensors.values()]) != record.frame_sha256:
        # The directory holds a CRC32 of each tensor, so it differs, too, in a file that took the place of another.
        for name, (_, _, offset, size) in tensors.items():
            if _run_digests(path, offset, size, record.tensors[name].rows) != record.tensors[name].sha256:
                raise ValueError(
                    f"{path}: {name} and the file's directory are not what was written: sha256 differs {again}"
                )
        raise ValueError(f"{path}: its headers or its directory are not what was written: sha256 differs {again}")


def check_size(path: Path, record: RankRecord) -> None:
    """Raise ValueError when a rank's file was cut short or grew."""
    size = path.stat().st_size
    if size != record.size:
        raise ValueError(
            f"{path}: not a file of tensors as it was written: {size} bytes, expected {record.size} by {FILE}; copy or "
            "convert the checkpoint again"
        )


def frame_digest(path: Path, tensors: Iterable[tuple[int, int]]) -> str:
    """sha256 of what lies around the tensors, each (offset, bytes), of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        for offset, length in frame(path.stat().st_size, list(tensors)):
            file.seek(offset)
            hasher.update(file.read(length))
    return hasher.hexdigest()


def _run_digests(path: Path, offset: int, size: int, rows: Sequence[int]) -> list[str]:
    """sha256 of the runs of one tensor. For a message alone: nothing is done to save memory."""
    digest = RunDigest(rows)
    with path.open("rb") as file:
        file.seek(offset)
        digest.update(size // sum(rows), memoryview(file.read(size)))
    return digest.digests


def identity(files: Iterable[Path]) -> list[dict[str, Any]]:
    """What a source was: its files with size and time of change, and the sha256 of their first 64 KiB.

    These hold a safetensors file's names and offsets. To hash all of a source takes as long as to convert it.
    """
    found = []
    for path in sorted(files):
        status = path.stat()
        with path.open("rb") as file:
            start = hashlib.sha256(file.read(64 * 1024)).hexdigest()
        name = "/".join(path.parts[-3:])
        found.append({"file": name, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "start_sha256": start})
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
