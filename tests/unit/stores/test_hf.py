"""Hugging Face folders: every way weights lie in them, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_patch.stores.hf import HfReader, HfWriter, load_safetensors, save_tensors
from megatron_patch.tensor_io import disk
from tests.canary import Canary
from tests.unit.properties import damaged, examples, one_line

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.ones(5, dtype=torch.float16),
}


def write_index(folder: Path, name: str, weight_map: dict[str, str]) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def one_safetensors(folder):
    save_file(TENSORS, folder / "model.safetensors")


def sharded_safetensors(folder):
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files["c"] = files["b"]
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in files if files[name] == file}, folder / file)
    write_index(folder, "model.safetensors.index.json", files)


def one_bin(folder):
    torch.save(TENSORS, folder / "pytorch_model.bin")


def old_bin(folder):
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded_bin(folder):
    for name in TENSORS:
        torch.save({name: TENSORS[name]}, folder / f"{name}.bin")
    write_index(folder, "pytorch_model.bin.index.json", {name: f"{name}.bin" for name in TENSORS})


@pytest.mark.parametrize("write", [one_safetensors, sharded_safetensors, one_bin, old_bin, sharded_bin])
def test_reads(tmp_path, write):
    write(tmp_path)
    reader = HfReader(tmp_path)
    assert set(reader) == set(TENSORS)
    assert len(reader) == 3
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader[name], tensor)
        assert reader[name].dtype == tensor.dtype


def test_names_are_renamed_and_left_out(tmp_path):
    one_safetensors(tmp_path)
    reader = HfReader(tmp_path, lambda name: None if name == "c" else f"x.{name}")
    assert set(reader) == {"x.a", "x.b"}
    assert torch.equal(reader["x.a"], TENSORS["a"])


def no_folder(folder):
    os.rmdir(folder)


def missing_shard(folder):
    sharded_safetensors(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def absent_tensor(folder):
    save_file(TENSORS, folder / "model-1.safetensors")
    write_index(folder, "model.safetensors.index.json", dict.fromkeys([*TENSORS, "d"], "model-1.safetensors"))


def unlisted_tensor(folder):
    save_file(TENSORS, folder / "model-1.safetensors")
    write_index(folder, "model.safetensors.index.json", dict.fromkeys("ab", "model-1.safetensors"))


def bad_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def empty_index(folder):
    write_index(folder, "model.safetensors.index.json", {})


def index_out_of_the_folder(folder):
    write_index(folder, "model.safetensors.index.json", {"a": "../secret.safetensors"})


def truncated(folder):
    one_safetensors(folder)
    os.truncate(folder / "model.safetensors", 40)


def lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def safetensors_of(folder, header, length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    start = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(start + text + bytes(16))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WHOLE = b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
LIES = {
    "a length beyond all": ({"a": ENTRY}, 2**63),
    "a length beyond the file": ({"a": ENTRY}, 90_000_000),
    "tensors that overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}},),
    "bytes after the file": ({"a": {**ENTRY, "data_offsets": [0, 2**40]}},),
    "a shape beyond its bytes": ({"a": {**ENTRY, "shape": [2**40, 2**40]}},),
    "a negative shape": ({"a": {**ENTRY, "shape": [-2]}},),
    "a tensor twice": (b'{"a":' + WHOLE + b',"a":' + WHOLE + b"}",),
    "deep": (b"[" * 20000 + b"]" * 20000,),
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_headers_that_lie(tmp_path, header):
    safetensors_of(tmp_path, *header)
    message = r"model\.safetensors: (not a readable safetensors file|its header names)"
    with pytest.raises(ValueError, match=message) as error:
        HfReader(tmp_path)
    assert "\n" not in str(error.value)


def deep_index(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 20000 + "]" * 20000)


def empty(folder):
    (folder / "model.safetensors").touch()


def truncated_bin(folder):
    one_bin(folder)
    os.truncate(folder / "pytorch_model.bin", 200)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "no such folder; expected a Hugging Face checkpoint"),
        (lambda folder: None, "holds no weights; expected one of model.safetensors, "),
        (missing_shard, "model-00002-of-00002.safetensors: missing; model.safetensors.index.json names it"),
        (absent_tensor, "has no tensor d, which model.safetensors.index.json says is in it"),
        (unlisted_tensor, "holds c, which model.safetensors.index.json does not say"),
        (bad_index, "model.safetensors.index.json: not an index of weights"),
        (lfs_pointer, "model.safetensors: is a pointer of Git LFS"),
        (deep_index, "model.safetensors.index.json: .*nested too deep"),
        (empty_index, "model.safetensors.index.json: not an index of weights .*names no tensor"),
        (index_out_of_the_folder, "leads out of the folder"),
        (truncated, "model.safetensors: not a readable safetensors file"),
        (empty, "model.safetensors: not a readable safetensors file"),
        (truncated_bin, "pytorch_model.bin: not a file of tensors"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, damage, message):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message) as error:
        HfReader(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_same_tensor_under_two_spellings(tmp_path):
    one_safetensors(tmp_path)
    with pytest.raises(ValueError, match="the same tensor twice"):
        HfReader(tmp_path, lambda name: "x")


def raw(folder: Path, header: bytes, length: int | None = None, data: bytes = b"") -> None:
    path = folder / "model.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def entry(start: int, end: int) -> str:
    return f'{{"dtype": "U8", "shape": [{end - start}], "data_offsets": [{start}, {end}]}}'


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: raw(folder, b"{}", length=1 << 62),
        lambda folder: raw(folder, b"{}", length=200_000_000, data=b" " * 100),
        lambda folder: raw(folder, f'{{"a": {entry(0, 8)}, "b": {entry(4, 12)}}}'.encode(), data=bytes(12)),
        lambda folder: raw(folder, f'{{"a": {entry(0, 4)}, "b": {entry(8, 12)}}}'.encode(), data=bytes(12)),
        lambda folder: raw(folder, f'{{"a": {entry(0, 12)}}}'.encode(), data=bytes(4)),
        lambda folder: raw(folder, f'{{"a": {entry(0, 4)}}}'.replace("[4]", "[5]").encode(), data=bytes(4)),
    ],
    ids=["header past the end", "huge header", "overlap", "hole", "past the end", "shape and bytes disagree"],
)
def test_hostile_headers_are_refused(tmp_path, write):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        HfReader(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "BOOL"])
def test_types_of_no_weights_are_refused_when_asked_for(tmp_path, dtype):
    text = f'{{"a": {{"dtype": "{dtype}", "shape": [4], "data_offsets": [0, 4]}}}}'
    raw(tmp_path, text.encode(), data=bytes(4))
    with pytest.raises(ValueError, match=f"a: is of type {dtype}; expected one of BF16, F16, F32"):
        HfReader(tmp_path).view("a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_types_of_no_weights_in_a_bin(tmp_path, dtype):
    torch.save({"a": torch.zeros(4, dtype=dtype)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: a: is of type {dtype}; expected one of BF16, F16, F32"):
        HfReader(tmp_path).view("a")


def test_a_header_of_odd_length(tmp_path):
    """safetensors allows it; the tensors then begin at odd bytes."""
    text = '{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'
    raw(tmp_path, text.encode() + b" " * (1 - len(text) % 2), data=torch.arange(4.0).numpy().tobytes())
    assert torch.equal(HfReader(tmp_path)["a"], torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_is_not_run(tmp_path, zipped):
    canary = tmp_path / "canary"
    torch.save({"a": Canary(canary)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"not a file of tensors and plain values \(it names .*, which could run code"):
        HfReader(tmp_path)
    assert not canary.exists()


def test_a_few_tensors_carry_their_digests(tmp_path):
    """The tower's unused layer lies beside the shards, out of the manifest's reach."""
    path = tmp_path / "file.safetensors"
    save_tensors(TENSORS, path)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_safetensors(path).items())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"file.safetensors: . is not what was written \(sha256 differs\)"):
        load_safetensors(path)
    assert load_safetensors(path, check=False).keys() == TENSORS.keys()
    save_file(TENSORS, path)
    assert load_safetensors(path).keys() == TENSORS.keys()


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": np.array([Canary(canary)], dtype=object)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of tensors and plain values"):
        HfReader(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(2), "b": "text"}, "b is a str; expected a tensor"),
        ([torch.ones(2)], "not a dict of tensors"),
        (torch.ones(2), "not a dict of tensors"),
        ({1: torch.ones(2)}, "not a dict of tensors by their names"),
    ],
)
def test_a_bin_with_something_else_in_it(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: {message}"):
        HfReader(tmp_path)


def test_an_unfinished_file_does_not_load(tmp_path, monkeypatch):
    """The header comes last."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "reached", lambda point: killed() if point == "weights written" else None)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, max_shard_size=1000)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        HfReader(tmp_path)


def test_writer_makes_one_file(tmp_path):
    write(tmp_path, max_shard_size=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    check_written(tmp_path)


def test_writer_makes_shards_with_an_index(tmp_path):
    """24, 8 and 10 bytes into files of at most 32."""
    write(tmp_path, max_shard_size=32)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 42}, "weight_map": {"a": shards[0], "b": shards[0], "c": shards[1]}}
    check_written(tmp_path)


def test_written_files_are_as_readable_as_their_folder(tmp_path):
    tmp_path.chmod(0o755)
    write(tmp_path, max_shard_size=1000)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def write(folder, max_shard_size):
    writer = HfWriter(folder, max_shard_size)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.close()


def check_written(folder):
    reader = HfReader(folder)
    assert set(reader) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader[name], tensor)


@examples
@given(damaged(b'{"a":' + WHOLE + b"}"), st.integers(0, 2**64 - 1) | st.none())
def test_whatever_a_header_says(tmp_path_factory, header, length):
    folder = tmp_path_factory.getbasetemp()
    safetensors_of(folder, header, length)
    with one_line(folder):
        reader = HfReader(folder)
        _ = {name: reader[name] for name in reader}
