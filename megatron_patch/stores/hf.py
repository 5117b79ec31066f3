"""Hugging Face folders: safetensors or .bin, one file or shards with an index. Read lazily, written as a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_patch.files.json_object import read_json
from megatron_patch.stores.hf_files import is_lfs_pointer, weight_file
from megatron_patch.stores.reader import Reader, existing_file, open_torch_file, reason, stored_view
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.archives import Stored
from megatron_patch.tensor_io.disk import BLOCK, OutputFile
from megatron_patch.tensor_io.stream import Target, as_bytes, copy, read
from megatron_patch.tensor_io.view import Source, View, as_rows

# Weights. Whole numbers are codes of a quantized model, which a cast would take for values.
SAFETENSORS_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
SHA256 = "sha256 of "  # and a tensor's name: a key of a header's metadata

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}


class HfReader(Reader):
    """The tensors of a Hugging Face folder.

    `rename` turns the files' spelling of a name into the families' (`Part.hub_name`), or into None for a tensor that
    is left out on purpose. Raises FileNotFoundError or ValueError, one line that names the file, for weights that are
    missing, damaged, or contradict their index.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        folder = Path(folder)
        self.source = str(folder)
        self.place: dict[str, tuple[_SafetensorsFile | _BinFile, str]] = {}
        for file, names in _open_files(folder):
            for name in names:
                renamed = rename(name)
                if renamed is None:
                    continue
                if renamed in self.place:
                    other, other_name = self.place[renamed]
                    raise ValueError(
                        f"{file.path}: holds {name}, and {other.path} holds {other_name}: the same tensor twice; "
                        "expected each tensor once"
                    )
                self.place[renamed] = (file, name)

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        file, stored_name = self.place[name]
        return file.view(stored_name)

    def source_of(self, name: str) -> str:
        """The file that holds one tensor."""
        return str(self.place[name][0].path)

    def files(self) -> list[Path]:
        """The files of weights."""
        return list(dict.fromkeys(file.path for file, _ in self.place.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


class HfWriter:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with an index, from views."""

    def __init__(self, folder: Path, max_shard_size: int = 5 * 1000**3) -> None:
        self.folder = Path(folder)
        self.max_shard_size = max_shard_size
        self.shards: list[dict[str, View]] = [{}]
        self.pending_size = 0

    def add(self, name: str, tensor: View | Tensor) -> None:
        """Append a tensor. It is read when `close` is called."""
        view = View.of_tensor(tensor, name) if isinstance(tensor, Tensor) else tensor
        if self.shards[-1] and self.pending_size + view.nbytes > self.max_shard_size:
            self.shards.append({})
            self.pending_size = 0
        self.shards[-1][name] = view
        self.pending_size += view.nbytes

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(view.nbytes for shard in self.shards for view in shard.values())

    def close(self, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Write all files, weights before the index. `progress` gets the number of bytes of each piece that is written.

        Raises ValueError and OSError as `stream.copy` does.
        """
        count = len(self.shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        write_files({self.folder / name: shard for name, shard in zip(names, self.shards, strict=True)}, progress)
        if count > 1:
            weight_map = {name: file for file, shard in zip(names, self.shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_files(
    files: Mapping[Path, Mapping[str, View]],
    progress: Callable[[int], object] = lambda num_bytes: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write safetensors files. Their headers come last: an unfinished file does not load."""
    opened, targets, headers = [], [], []
    try:
        for path, views in files.items():
            header, offsets = _header(views, {"format": "pt", **(metadata or {})})
            opened.append(OutputFile(path))
            headers.append(header)
            opened[-1].resize(len(header) + sum(view.nbytes for view in views.values()))
            targets += [
                Target(name, view, opened[-1], len(header) + offsets[name])
                for name, view in views.items()
                if view.nbytes
            ]
        copy(targets, progress)
        for file, header in zip(opened, headers, strict=True):
            disk.reached("weights written")
            file.sync()
            file.write(0, header)
            file.sync()
    finally:
        for file in opened:
            file.close()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a few tensors as a safetensors file that carries their sha256."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {SHA256 + name: _digest(tensor) for name, tensor in whole.items()}
    write_files({path: {name: View.of_tensor(tensor, name) for name, tensor in whole.items()}}, metadata=metadata)


def load_safetensors(path: Path, check: bool = True) -> dict[str, Tensor]:
    """All tensors of a small safetensors file.

    `check`: compare them with the sha256 that `save_tensors` put in. Raises ValueError, one line, for a damaged file.
    """
    file = _SafetensorsFile(path)
    tensors = read({name: file.view(name) for name in file.names()})
    for name, tensor in tensors.items():
        if check and file.metadata.get(SHA256 + name, _digest(tensor)) != _digest(tensor):
            raise ValueError(f"{path}: {name} is not what was written (sha256 differs); convert or copy it again")
    return tensors


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest()


def _header(views: Mapping[str, View], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """What precedes the tensors, and where each begins after it. Most tensors begin at a block, for direct I/O."""
    offsets, end = {}, 0
    for name in sorted(views, key=lambda name: views[name].nbytes % BLOCK != 0):
        offsets[name] = end
        end += views[name].nbytes
    entries = {
        name: {
            "dtype": DTYPE_NAMES[views[name].dtype],
            "shape": list(views[name].shape),
            "data_offsets": [offset, offset + views[name].nbytes],
        }
        for name, offset in offsets.items()
    }
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text, offsets


class _SafetensorsFile:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks the header: sizes, overlaps, holes
                pass
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({reason(error)}); download it again") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            pairs = json.loads(file.read(length), object_pairs_hook=list)
        self.entries = {name: dict(entry) for name, entry in pairs}
        if len(self.entries) < len(pairs):
            raise ValueError(f"{path}: its header names a tensor twice; expected each once")
        self.metadata = self.entries.pop("__metadata__", {})
        self.start = 8 + length

    def names(self) -> Iterable[str]:
        return self.entries.keys()

    def view(self, name: str) -> View:
        """Where one tensor's values lie."""
        entry = self.entries[name]
        label = f"{self.path}: {name}"
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise ValueError(f"{label}: is of type {entry['dtype']}; expected one of {', '.join(SAFETENSORS_TYPES)}")
        rows, columns = as_rows(entry["shape"])
        offset = self.start + entry["data_offsets"][0]
        return View.of(
            Source(label, SAFETENSORS_TYPES[entry["dtype"]], rows, columns, self.path, offset), entry["shape"]
        )


class _BinFile:
    """One file of torch.save. Nothing in it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = open_torch_file(path)
        if not isinstance(self.tensors, dict) or not all(isinstance(name, str) for name in self.tensors):
            raise ValueError(f"{path}: not a dict of tensors by their names; expected one")
        for name, value in self.tensors.items():
            if not isinstance(value, Stored | Tensor):
                raise ValueError(f"{path}: {name} is a {type(value).__name__}; expected a tensor")

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def view(self, name: str) -> View:
        value = self.tensors[name]
        if value.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{self.path}: {name}: is of type {value.dtype}; expected one of {', '.join(SAFETENSORS_TYPES)}"
            )
        return stored_view(self.path, name, value)


def _open_files(folder: Path) -> Iterator[tuple[_SafetensorsFile | _BinFile, Iterable[str]]]:
    """Every weight file of a folder and the tensors to take from it."""
    first = weight_file(folder)
    if first.suffix != ".json":
        file = _open_file(first)
        yield file, file.names()
        return
    for file_name, names in _read_index(first).items():
        file = _open_file(existing_file(folder, file_name, f"{first.name} names it; download it again"))
        held = set(file.names())
        for name in names:
            if name not in held:
                raise ValueError(f"{file.path}: has no tensor {name}, which {first.name} says is in it")
        listed = set(names)
        for name in held:
            if name not in listed:
                raise ValueError(f"{file.path}: holds {name}, which {first.name} does not say; expected it there")
        yield file, names


def _open_file(path: Path) -> _SafetensorsFile | _BinFile:
    if is_lfs_pointer(path):
        raise ValueError(f"{path}: is a pointer of Git LFS, not the weights; run git lfs pull in that clone")
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _BinFile(path)


def _read_index(path: Path) -> dict[str, list[str]]:
    """An index's files, each with its tensors."""
    try:
        weight_map = read_json(path)["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name:
                raise ValueError(f"file name {file_name!r} of {name} leads out of the folder")
            files.setdefault(file_name, []).append(name)
        if not files:
            raise ValueError("its weight_map names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of weights ({error!r})") from None
    return files
