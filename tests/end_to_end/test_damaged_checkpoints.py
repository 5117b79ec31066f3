"""Damaged and mixed up checkpoints: one line that names what is not what was written, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion.commands import main
from megatron_patch.conversion.plan import load_rank, open_mcore
from megatron_patch.families.llava import read_config
from megatron_patch.families.stages import Stage
from megatron_patch.stores import manifest
from megatron_patch.stores.hf import HfReader
from megatron_patch.tensor_io.archives import open_archive
from megatron_patch.tensor_io.torch_zip import describe
from tests.end_to_end.conversions import exporting, files, importing, refused

WHOLE = Stage(range(4), pre_process=True, post_process=True)
QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
NORM = "language_model.decoder.layers.2.pre_mlp_layernorm.weight"
EMBEDDING = "language_model.embedding.word_embeddings.weight"
FC2 = "language_model.decoder.layers.3.mlp.linear_fc2.weight"
CLASS = "vision_model.class_token"


@pytest.fixture
def copy(mcore, tmp_path) -> Path:
    return shutil.copytree(mcore, tmp_path / "copy")


def rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "release" / f"mp_rank_0{rank}" / "model_optim_rng.pt"


def place(checkpoint: Path, rank: int, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie in a rank's file: offset, bytes."""
    with rank_file(checkpoint, rank).open("rb") as file:
        stored = describe(open_archive(file))["model"][name]
    return stored.offset, torch.Size(stored.shape).numel() * stored.dtype.itemsize


def change(path: Path, offset: int, new: Callable[[bytes], bytes], length: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(length)
        assert new(old) != old
        file.seek(offset)
        file.write(new(old))


def load_all(checkpoint: Path, tp_size: int) -> None:
    """What the ranks of a training would do."""
    for tp_rank in range(tp_size):
        load_rank(checkpoint, read_config(checkpoint), WHOLE, tp_rank=tp_rank, tp_size=tp_size)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    change(path, offset, lambda data: bytes([data[0] ^ 1 << bit]))


@pytest.mark.parametrize(("rank", "where"), [(0, "first"), (1, "last")])
@pytest.mark.parametrize("name", [QKV, NORM, EMBEDDING, FC2, CLASS])
def test_a_flipped_bit_in_a_tensor(tmp_path, capsys, copy, rank, name, where):
    offset, size = place(copy, rank, name)
    flip(rank_file(copy, rank), offset + (0 if where == "first" else size - 1), bit=7 if where == "last" else 0)
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, rank), name, "sha256 differs")
    assert not (tmp_path / "hf").exists()
    for tp_size in (1, 4):
        with pytest.raises(ValueError, match=f"mp_rank_0{rank}/.*{name}.*sha256 differs"):
            load_all(copy, tp_size)


def test_a_flipped_bit_anywhere_in_a_file(mcore, copy):
    """One bit of every 1,000 bytes or so of a rank's file, whatever lies there."""
    path = rank_file(copy, 1)
    llava = read_config(mcore)
    step = path.stat().st_size // 40
    for number, offset in enumerate(range(0, path.stat().st_size, step)):
        flip(path, offset, number % 8)
        with pytest.raises(ValueError, match="mp_rank_01") as error:
            load_rank(copy, llava, WHOLE, tp_rank=0, tp_size=1)
        assert "\n" not in str(error.value)
        flip(path, offset, number % 8)
    load_rank(copy, llava, WHOLE, tp_rank=0, tp_size=1)


def test_a_changed_manifest(mcore, copy):
    path = copy / "release" / manifest.FILE
    size = path.stat().st_size
    for offset in range(10, size, size // 20):
        flip(path, offset)
        with pytest.raises(ValueError, match=r"manifest.json: damaged or changed"):
            open_mcore(copy, read_config(mcore))
        flip(path, offset)
    open_mcore(copy, read_config(mcore))


def test_it_can_be_read_unchecked(tmp_path, mcore, copy, hf):
    offset, _ = place(copy, 1, QKV)
    flip(rank_file(copy, 1), offset)
    assert main(exporting(copy, tmp_path / "hf", no_check="true")) == 0
    found, before = HfReader(tmp_path / "hf"), HfReader(hf)
    differing = [name for name in before if not torch.equal(found[name], before[name])]
    assert differing == ["language_model.model.layers.1.self_attn.q_proj.weight"]


def test_a_manifest_that_lacks_a_field_or_is_a_folder(mcore, copy):
    path = copy / "release" / manifest.FILE
    content = manifest.load(mcore / "release")
    del content["ranks"]["mp_rank_00"]["size"]
    path.write_text(json.dumps({**content, "sha256": manifest._digest(content)}))
    with pytest.raises(ValueError, match=r"manifest.json: damaged or changed .*'size'"):
        open_mcore(copy, read_config(mcore))
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"manifest.json: damaged or changed .*Is a directory"):
        open_mcore(copy, read_config(mcore))


def test_without_a_manifest_it_is_read_unchecked(tmp_path, copy, hf):
    (copy / "release" / manifest.FILE).unlink()
    assert main(exporting(copy, tmp_path / "hf")) == 0
    assert files(tmp_path / "hf") == files(hf)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("length", ["0", "1", "half", "all but one byte"])
def test_a_truncated_shard(tmp_path, capsys, copy, length, with_manifest):
    path = rank_file(copy, 1)
    size = path.stat().st_size
    os.truncate(path, {"0": 0, "1": 1, "half": size // 2, "all but one byte": size - 1}[length])
    if not with_manifest:
        (copy / "release" / manifest.FILE).unlink()
    refused(capsys, exporting(copy, tmp_path / "hf"), path, "not a file of tensors")


@pytest.mark.parametrize("name", [QKV, EMBEDDING])
def test_a_zeroed_page(tmp_path, capsys, copy, name):
    offset, _ = place(copy, 0, name)
    change(rank_file(copy, 0), offset + 4096, lambda data: bytes(len(data)), 4096)
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 0), name, "sha256 differs")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_shard(tmp_path, capsys, copy, rank):
    shutil.rmtree(rank_file(copy, rank).parent)
    refused(capsys, exporting(copy, tmp_path / "hf"), f"mp_rank_0{rank}: missing")


def test_swapped_shards(tmp_path, capsys, copy):
    """Equal shapes: nothing but the manifest tells them apart."""
    first, second = rank_file(copy, 0), rank_file(copy, 1)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    refused(capsys, exporting(copy, tmp_path / "hf"), "mp_rank_0", ": language_model.", "sha256 differs")


def test_a_shard_of_another_checkpoint(tmp_path, capsys, mistral, clip, copy):
    """Same model, same sizes, other weights in the projector alone."""
    assert main(importing(mistral, clip, tmp_path / "other", seed=5)) == 0
    shutil.copyfile(rank_file(tmp_path / "other", 1), rank_file(copy, 1))
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 1), "vision_projection.", "sha256 differs")


def test_a_shard_of_another_type(tmp_path, capsys, mistral, clip, copy):
    assert main(importing(mistral, clip, tmp_path / "other", precision="bf16")) == 0
    shutil.copyfile(rank_file(tmp_path / "other", 1), rank_file(copy, 1))
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 1), "not a file of tensors as it was written")
    (copy / "release" / manifest.FILE).unlink()
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 1), "bfloat16", "rank 0's is float32")


def test_the_manifest_says_what_is_where(mcore, mistral):
    content = manifest.load(mcore / "release")
    assert content["tensor_model_parallel_size"] == 2
    # A CUDA build's name ends with "+cu130" in torch itself and not in what pip knows of it.
    assert content["tools"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert [source["file"].split("/")[-1] for source in content["source"]] == ["model.safetensors"] * 2
    assert (mistral / "model.safetensors").stat().st_size in [source["size"] for source in content["source"]]
    tensor = content["ranks"]["mp_rank_01"]["tensors"]["language_model.decoder.layers.3.mlp.linear_fc1.weight"]
    assert tensor["whole"] == "language_model.decoder.layers.3.mlp.linear_fc1.weight"
    assert (tensor["axis"], tensor["ranges"], tensor["rows"]) == (0, [[80, 160], [240, 320]], [80, 80])
    assert json.loads((mcore / "release" / manifest.FILE).read_text())["sha256"]
