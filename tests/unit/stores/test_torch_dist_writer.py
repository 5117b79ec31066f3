"""torch_dist checkpoints that the converter writes: megatron.core loads them at any cut, and damage is found."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion.plan import open_mcore, write_dist
from megatron_patch.families.llava import read_config
from megatron_patch.files.names import COMMON
from megatron_patch.model.llava import LlavaModel
from megatron_patch.stores import manifest
from megatron_patch.stores.torch_dist import read_metadata
from megatron_patch.stores.torch_dist_writer import DATA, FORMAT, METADATA
from megatron_patch.training.loop import load_pretrained
from tests import tiny_runs
from tests.canary import Canary
from tests.distributed.ranks import run_ranks
from tests.unit.stores.test_torch_dist import ONE, TP2, cut_by_us, rank, reshard, save_whole, tensors

QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
FC1 = "language_model.decoder.layers.2.mlp.linear_fc1.weight"
NORM = "language_model.decoder.layers.3.input_layernorm.weight"
EMBEDDING = "language_model.embedding.word_embeddings.weight"
CLASS = "vision_model.class_token"


@pytest.fixture(scope="module")
def written(mcore, tmp_path_factory) -> Path:
    """The imported weights as torch_dist."""
    folder = shutil.copytree(mcore, tmp_path_factory.mktemp("dist") / "dist", ignore=shutil.ignore_patterns("release"))
    (folder / "latest_checkpointed_iteration.txt").unlink()
    llava = read_config(mcore)
    write_dist(folder, open_mcore(mcore, llava), llava, args={"num_layers": 4})
    return folder


@pytest.mark.parametrize("parallel", [ONE, TP2], ids=["TP1", "TP2"])
def test_megatron_core_loads_it_as_we_cut_the_shards(mcore, written, tmp_path, parallel):
    """dist_checkpointing.load, bit for bit; the padding of the vocabulary differs between the two."""
    size = parallel.tensor_model_parallel_size
    config = tiny_runs.config(mcore, tmp_path, parallel=parallel)
    for cut, held in run_ranks(reshard, parallel, size, written / "release", config):
        expected = cut_by_us(mcore, read_config(mcore), **cut, tp_size=size)
        assert set(held) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(held[name], tensor), name


def test_keys_shapes_and_blocks_are_megatron_cores(mcore, written, tmp_path):
    """As it saves them itself, `_extra_state` included; of these there are more, for Transformer Engine's layers."""
    (tmp_path / "theirs").mkdir()
    run_ranks(save_whole, ONE, 1, tmp_path / "theirs", tiny_runs.config(mcore, tmp_path))
    theirs, ours = (
        read_metadata(folder / METADATA).state_dict_metadata for folder in (tmp_path / "theirs", written / "release")
    )
    assert theirs.keys() <= ours.keys()
    assert all("_extra_state" in key for key in ours.keys() - theirs.keys())
    for key, stored in theirs.items():
        if "_extra_state" not in key:
            assert (ours[key].size, ours[key].properties) == (stored.size, stored.properties), key
    assert (tmp_path / "theirs" / FORMAT).read_bytes() == (written / "release" / FORMAT).read_bytes()
    common = torch.load(written / "release" / COMMON, weights_only=True)
    assert common == {"args": {"num_layers": 4}, "checkpoint_version": 3.0, "iteration": 0}


def load_for_training(config):
    llava = read_config(config.model.description)
    model = LlavaModel(config, llava)
    load_pretrained(config, llava, model)
    return rank(), tensors(model)


def test_training_starts_from_it(mcore, written, tmp_path):
    ((cut, held),) = run_ranks(load_for_training, ONE, 1, tiny_runs.config(written, tmp_path))
    expected = cut_by_us(mcore, read_config(mcore), **cut, tp_size=1)
    assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def place(checkpoint: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie: offset, bytes."""
    (source,) = open_mcore(checkpoint, read_config(checkpoint)).view(name).sources
    return source.offset, source.nbytes


@pytest.mark.parametrize("name", [QKV, FC1, NORM, EMBEDDING, CLASS])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_in_a_tensor(copy, name, where):
    offset, size = place(copy, name)
    flip(copy / "release" / DATA, offset + (0 if where == "first" else size - 1))
    llava = read_config(copy)
    with pytest.raises(ValueError, match=rf"{DATA}: .* at \[.*\]: rows .* are not what was written") as error:
        open_mcore(copy, llava)[name]
    assert "\n" not in str(error.value)
    assert open_mcore(copy, llava, check=False)[name].shape


def test_a_flipped_bit_anywhere(copy):
    """Some in each file, whatever lies there."""
    llava = read_config(copy)
    for name in (DATA, METADATA, COMMON, FORMAT, manifest.FILE):
        path = copy / "release" / name
        size = path.stat().st_size
        for offset in range(5, size, size // (20 if name == DATA else 4)):
            flip(path, offset)
            with pytest.raises(ValueError, match=name) as error:
                cut_by_us(copy, llava, tp_rank=0, pp_rank=0, tp_size=1)
            assert "\n" not in str(error.value)
            flip(path, offset)
    cut_by_us(copy, llava, tp_rank=0, pp_rank=0, tp_size=1)


@pytest.mark.parametrize("name", [DATA, METADATA, COMMON])
@pytest.mark.parametrize("length", ["0", "1", "half", "all but one byte"])
def test_a_truncated_file(copy, name, length):
    path = copy / "release" / name
    size = path.stat().st_size
    os.truncate(path, {"0": 0, "1": 1, "half": size // 2, "all but one byte": size - 1}[length])
    with pytest.raises(ValueError, match=f"{name}: .* bytes, expected {size} by manifest.json"):
        open_mcore(copy, read_config(copy))


@pytest.mark.parametrize("name", [DATA, METADATA, COMMON])
def test_a_missing_file(copy, name):
    (copy / "release" / name).unlink()
    # Without .metadata it is no torch_dist checkpoint any more.
    what = f"{name}: missing" if name != METADATA else "holds no mp_rank_"
    with pytest.raises(FileNotFoundError, match=what):
        open_mcore(copy, read_config(copy))


def test_code_in_a_block_is_not_run(copy, tmp_path):
    """In the place of a tensor, in a checkpoint without a manifest."""
    release = copy / "release"
    (release / manifest.FILE).unlink()
    metadata = read_metadata(release / METADATA)
    index = next(index for index in metadata.storage_data if index.fqn == "vision_model.class_token")
    torch.save(Canary(tmp_path / "canary"), release / "__0_1.distcp")
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "__0_1.distcp", 0, (release / "__0_1.distcp").stat().st_size
    (release / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        ValueError, match=r"__0_1.distcp: vision_model.class_token at .* is not readable .*could run code"
    ):
        open_mcore(copy, read_config(copy))[CLASS]
    assert not (tmp_path / "canary").exists()


def test_blocks_that_changed_places(copy):
    """Two layers of equal shape: their bytes are exchanged, directories and all."""
    path = copy / "release" / DATA
    one, other = (place(copy, f"language_model.decoder.layers.{layer}.mlp.linear_fc2.weight") for layer in (0, 3))
    data = bytearray(path.read_bytes())
    start, end = (slice(offset, offset + size) for offset, size in (one, other))
    data[start], data[end] = data[end], data[start]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"linear_fc2.weight at \[0, 0, 0\]: rows 0 to 95 are not what was written"):
        open_mcore(copy, read_config(copy))["language_model.decoder.layers.0.mlp.linear_fc2.weight"]
