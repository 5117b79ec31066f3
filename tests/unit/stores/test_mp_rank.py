"""Shards on disk: what is in a file, and everything that can be wrong with a folder of them."""

from __future__ import annotations

import os
import random
import shutil
from argparse import Namespace
from collections import defaultdict, deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_patch.conversion.plan import open_mcore, write_shards
from megatron_patch.families.fused_names import to_transformer_engine_name
from megatron_patch.families.llava import read_config
from megatron_patch.families.stages import pipeline_stages
from tests.canary import Canary


@pytest.fixture
def copy(mcore, tmp_path) -> Path:
    """As another program would write it, without a manifest."""
    folder = shutil.copytree(mcore, tmp_path / "copy")
    (folder / "release" / "manifest.json").unlink()
    return folder


def rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "release" / f"mp_rank_0{rank}" / "model_optim_rng.pt"


def edit(checkpoint: Path, rank: int, change) -> None:
    path = rank_file(checkpoint, rank)
    content = torch.load(path, weights_only=True)
    change(content["model"])
    torch.save(content, path)


def test_a_rank_file(mcore):
    content = torch.load(rank_file(mcore, 1), weights_only=True, mmap=True)
    assert content["checkpoint_version"] == 3.0
    assert content["iteration"] == 0
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "padded_vocab_size": 512}
    assert {name: content["args"][name] for name in sizes} == sizes
    without_tensor = {name for name, value in content["model"].items() if value is None}
    assert "language_model.output_layer._extra_state" in without_tensor
    assert "vision_model.decoder.layers.0.mlp.linear_fc1._extra_state" in without_tensor
    assert all(name.endswith("._extra_state") for name in without_tensor)
    assert not any("core_attention" in name for name in content["model"])
    assert content["model"]["language_model.embedding.word_embeddings.weight"].shape == (256, 96)
    tensors = [tensor for tensor in content["model"].values() if tensor is not None]
    # Only its own part is in it; a tensor's header fills up a block, and so does its end.
    assert rank_file(mcore, 1).stat().st_size < sum(tensor.nbytes for tensor in tensors) + 8192 * len(tensors)


def test_transformer_engine_names_are_read(mcore, copy):
    def rename(model):
        for name in list(model):
            model[to_transformer_engine_name(name)] = model.pop(name)

    for rank in range(2):
        edit(copy, rank, rename)
    assert any("layer_norm_weight" in name for name in torch.load(rank_file(copy, 0), weights_only=True)["model"])
    llava = read_config(mcore)
    expected, found = open_mcore(mcore, llava), open_mcore(copy, llava)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
NORM = "language_model.decoder.layers.1.input_layernorm.weight"


def missing_rank(copy):
    shutil.rmtree(rank_file(copy, 0).parent)


def missing_last_rank(copy):
    shutil.rmtree(rank_file(copy, 1).parent)


def no_rank(copy):
    missing_rank(copy)
    missing_last_rank(copy)


def empty_rank(copy):
    rank_file(copy, 1).unlink()


def truncated(copy):
    os.truncate(rank_file(copy, 1), rank_file(copy, 1).stat().st_size // 2)


def empty_file(copy):
    os.truncate(rank_file(copy, 1), 0)


def extra_key(copy):
    for rank in range(2):
        edit(copy, rank, lambda model: model.update({"language_model.new": torch.ones(1)}))


def extra_key_in_one_rank(copy):
    edit(copy, 1, lambda model: model.update({"language_model.new": torch.ones(1)}))


def missing_key_in_one_rank(copy):
    edit(copy, 1, lambda model: model.pop(NORM))


def missing_layer(copy):
    for rank in range(2):
        edit(copy, rank, lambda model: [model.pop(name) for name in list(model) if ".layers.3." in name])


def other_shape(copy):
    edit(copy, 1, lambda model: model.update({QKV: model[QKV][:-1].clone()}))


def object_among_tensors(copy):
    edit(copy, 1, lambda model: model.update({NORM: "text"}))


def rekeyed(copy, *keys):
    path = rank_file(copy, 1)
    content = torch.load(path, weights_only=True)
    model = content.pop("model")
    torch.save({**content, **dict.fromkeys(keys, model)}, path)


def other_iteration(copy):
    path = rank_file(copy, 1)
    torch.save({**torch.load(path, weights_only=True), "iteration": 7}, path)


def no_model(copy):
    rekeyed(copy, "weights")


def virtual_stages_with_a_gap(copy):
    rekeyed(copy, "model0", "model2")


def virtual_stages_in_one_rank(copy):
    rekeyed(copy, "model0", "model1")


def two_stages_with_an_embedding(copy):
    for rank in range(2):
        for number in (0, 1):
            target = rank_file(copy, rank).parent.with_name(f"mp_rank_0{rank}_00{number}")
            shutil.copytree(rank_file(copy, rank).parent, target)
            content = torch.load(target / "model_optim_rng.pt", weights_only=True)
            torch.save({**content, "args": None}, target / "model_optim_rng.pt")
        shutil.rmtree(rank_file(copy, rank).parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_rank, "mp_rank_00: missing; 2 x 1 ranks"),
        (missing_last_rank, "says tensor_model_parallel_size 2, but mp_rank folders for 1 are there"),
        (no_rank, "holds no mp_rank_. folder"),
        (empty_rank, "mp_rank_01/model_optim_rng.pt: missing; every rank has one"),
        (truncated, "mp_rank_01/model_optim_rng.pt: not a file of tensors"),
        (empty_file, "mp_rank_01/model_optim_rng.pt: not a file of tensors"),
        (extra_key, "language_model.new is not in the table"),
        (extra_key_in_one_rank, "mp_rank_01/model_optim_rng.pt: holds language_model.new, which .* rank 0 has not"),
        (missing_key_in_one_rank, f"mp_rank_01/model_optim_rng.pt: has no {NORM}"),
        (missing_layer, "layers.3.input_layernorm.weight .* missing"),
        (other_shape, rf"{QKV} has shape \[319, 96\], by config.json \[320, 96\] is expected"),
        (object_among_tensors, f"mp_rank_01/model_optim_rng.pt: {NORM} is a str; expected a tensor"),
        (other_iteration, "mp_rank_01/model_optim_rng.pt: says iteration 7, .*mp_rank_00.* says 0; copy the shards"),
        (no_model, "mp_rank_01/model_optim_rng.pt: has no 'model', nor 'model0', ...; expected a Megatron-Core shard"),
        (virtual_stages_with_a_gap, "mp_rank_01/model_optim_rng.pt: holds model0, model2; expected"),
        (
            virtual_stages_in_one_rank,
            "mp_rank_01/model_optim_rng.pt: holds 2 virtual stages, .*mp_rank_00.* 1; convert",
        ),
        (two_stages_with_an_embedding, "mp_rank_00_000/.*: holds .*layer.*, which only the last pipeline stage holds"),
    ],
)
def test_damage_is_one_line_that_names_it(mcore, copy, damage, message):
    damage(copy)
    with pytest.raises((ValueError, OSError), match=message) as error:
        open_mcore(copy, read_config(mcore))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_stages_in_another_order(tmp_path, mcore, num_chunks):
    llava = read_config(mcore)
    stages = pipeline_stages([2, 2], num_chunks)
    write_shards(tmp_path, open_mcore(mcore, llava), llava, tp_size=1, stages=stages, args={})
    (tmp_path / "release" / "manifest.json").unlink()
    assert len(open_mcore(tmp_path, llava)) == len(open_mcore(mcore, llava))
    first, last, aside = (tmp_path / "release" / name for name in ("mp_rank_00_000", "mp_rank_00_001", "aside"))
    for path, name in ((first, aside), (last, first), (aside, last)):
        path.rename(name)
    with pytest.raises(ValueError, match=r"mp_rank_00_00./.*: holds .*, which only the .* pipeline stage holds"):
        open_mcore(tmp_path, llava)


def test_ranks_that_disagree(mcore, copy):
    edit(copy, 1, lambda model: model[NORM].add_(1))
    reader = open_mcore(copy, read_config(mcore))
    with pytest.raises(ValueError, match=f"{NORM}: tensor-parallel ranks 0 and 1 hold different values"):
        reader[NORM]


@pytest.mark.parametrize("where", ["args", "_extra_state"])
def test_code_in_a_shard_is_not_run(mcore, copy, tmp_path, where):
    canary = tmp_path / "canary"
    content = torch.load(rank_file(copy, 1), weights_only=True)
    if where == "args":
        content["args"] = Canary(canary)
    else:
        content["model"]["language_model.output_layer._extra_state"] = Canary(canary)
    torch.save(content, rank_file(copy, 1))
    if where == "args":
        open_mcore(copy, read_config(mcore))
    else:
        with pytest.raises(ValueError, match=r"mp_rank_01/model_optim_rng.pt: .*_extra_state is an object"):
            open_mcore(copy, read_config(mcore))
    assert not canary.exists()


def test_megatron_lms_own_objects_beside_the_model(mcore, copy):
    """Its settings are an argparse.Namespace, of which the sizes are still compared; the rest is skipped."""
    for rank in range(2):
        content = torch.load(rank_file(copy, rank), weights_only=True)
        content["args"] = Namespace(**content["args"], started=timedelta(1))
        state = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
        content["rng_state"] = [{**state, "torch_rng_state": torch.get_rng_state()}]
        content["optimizer"] = {"state": defaultdict(dict, {0: {"exp_avg": torch.ones(3)}}), "last": deque([1])}
        torch.save(content, rank_file(copy, rank))
    llava = read_config(mcore)
    expected, found = open_mcore(mcore, llava), open_mcore(copy, llava)
    assert torch.equal(found[QKV], expected[QKV])
    missing_last_rank(copy)
    with pytest.raises(ValueError, match="says tensor_model_parallel_size 2"):
        open_mcore(copy, llava)
