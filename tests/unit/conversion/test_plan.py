"""Hugging Face <-> the whole megatron.core state dict <-> one rank's part of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_patch.conversion import plan
from megatron_patch.conversion.commands import main
from megatron_patch.conversion.companions import checkpoint_folder
from megatron_patch.conversion.plan import load_rank, open_mcore, to_hf, to_mcore
from megatron_patch.conversion.summary import summarize
from megatron_patch.families.llava import parts, read_config, rows, unused_shapes
from megatron_patch.families.shapes import hf_shapes
from megatron_patch.families.stages import Stage, pipeline_stages, stage_lengths
from megatron_patch.stores import checksums
from megatron_patch.stores.reader import InMemory
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.stream import read
from megatron_patch.tensor_io.view import View

LAYER = "language_model.decoder.layers."


@pytest.fixture(scope="module")
def llava(mcore):
    return read_config(mcore)


@pytest.fixture(scope="module")
def weights(llava):
    """Random tensors of a whole LLaVA under the hub's names."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: shape for row in rows(llava) for name, shape in zip(row.hf, hf_shapes(row), strict=True)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def whole(llava, weights):
    return to_mcore(rows(llava), InMemory(weights, "made here"))


def write(folder, whole, llava, tp_size, pp_size):
    folder.mkdir()
    stages = pipeline_stages(stage_lengths(4, pp_size))
    plan.write_shards(folder, whole, llava, tp_size=tp_size, stages=stages, args={})


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_round_trip_through_shards_is_bit_exact(tmp_path, llava, weights, whole, tp_size, pp_size):
    write(tmp_path / "shards", whole, llava, tp_size, pp_size)
    back = to_hf(rows(llava), open_mcore(tmp_path / "shards", llava))
    assert set(back) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(back[name], tensor), name
        assert back.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize("saved", [(1, 1), (2, 2)])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2), (4, 4)])
def test_load_rank_gives_what_was_written_at_that_size(tmp_path, llava, whole, saved, tp_size, pp_size):
    """A rank loaded from any cut equals the file of that rank in a checkpoint of the wanted cut."""
    write(tmp_path / "saved", whole, llava, *saved)
    write(tmp_path / "wanted", whole, llava, tp_size, pp_size)
    for file in sorted((tmp_path / "wanted").rglob("*.pt")):
        tp_rank, pp_rank = (int(number) for number in (file.parent.name + "_0").split("_")[2:4])
        content = torch.load(file, weights_only=True, mmap=True)
        expected = {name: tensor for name, tensor in content["model"].items() if tensor is not None}
        (stage,) = pipeline_stages(stage_lengths(4, pp_size))[pp_rank]
        loaded = load_rank(tmp_path / "saved", llava, stage, tp_rank=tp_rank, tp_size=tp_size)
        assert set(loaded) == set(expected)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_stage_of_an_unequal_cut(llava, tmp_path, whole):
    write(tmp_path / "shards", whole, llava, 1, 1)
    stage = Stage(layers=range(1, 4), pre_process=False, post_process=True)
    part = load_rank(tmp_path / "shards", llava, stage, tp_rank=0, tp_size=1)
    layers = {name.removeprefix(LAYER).split(".")[0] for name in part if name.startswith(LAYER)}
    assert layers == {"0", "1", "2"}
    norm = "2.input_layernorm.weight"
    assert torch.equal(part[LAYER + norm], whole[LAYER + "3.input_layernorm.weight"])
    assert "language_model.output_layer.weight" in part
    assert not any(name.startswith(("vision", "language_model.embedding")) for name in part)


CUTS = {
    "unequal": [[Stage(range(1), True, False)], [Stage(range(1, 4), False, True)]],
    "virtual": pipeline_stages([2, 2], 2),
}


@pytest.mark.parametrize("cut", ["unequal", "virtual"])
@pytest.mark.parametrize("checked", [True, False])
def test_unequal_and_virtual_stages_come_back(tmp_path, llava, weights, whole, cut, checked):
    """Layers are counted where they are, not assumed to be the same number everywhere; virtual stages take turns."""
    plan.write_shards(tmp_path, whole, llava, tp_size=2, stages=CUTS[cut], args={})
    back = to_hf(rows(llava), open_mcore(tmp_path, llava, check=checked))
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_rank_file_of_virtual_stages(tmp_path, llava, whole):
    """As Megatron-LM saves them: a dict for each, layers counted from 0 in each."""
    plan.write_shards(tmp_path, whole, llava, tp_size=1, stages=pipeline_stages([2, 2], 2), args={})
    file = tmp_path / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=True, mmap=True)
    assert content["args"]["virtual_pipeline_model_parallel_size"] == 2
    norm = LAYER + "0.input_layernorm.weight"
    for key, layer in (("model0", 1), ("model1", 3)):
        assert torch.equal(content[key][norm], whole[f"{LAYER}{layer}.input_layernorm.weight"])
        assert not any(name.startswith(LAYER + "1.") for name in content[key])
    assert "language_model.output_layer.weight" in content["model1"].keys() - content["model0"].keys()


LINEAR = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LINEAR: None}, f"made here: {LINEAR} is missing"),
        ({LINEAR: None, "language_model.model.norm.weight": None}, r"\(and 1 more\) are missing"),
        ({"language_model.model.layers.0.new": torch.ones(1)}, "layers.0.new is not in the table"),
        ({"language_model.model.layers.4.mlp.up_proj.weight": torch.ones(1)}, "layers.4.mlp.up_proj.weight is not in"),
        ({LINEAR: torch.ones(160, 95)}, rf"{LINEAR} has shape \[160, 95\], by config.json \[160, 96\] is expected"),
    ],
)
def test_coverage_of_hugging_faces_side(llava, weights, changes, message):
    tensors = {name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        to_mcore(rows(llava), InMemory(tensors, "made here"))


def test_swapped_query_and_key_are_found_by_shape(llava, weights):
    name = "language_model.model.layers.0.self_attn.{}_proj.weight"
    swapped = {name.format("q"): weights[name.format("k")], name.format("k"): weights[name.format("q")]}
    with pytest.raises(ValueError, match=r"q_proj.weight has shape"):
        to_mcore(rows(llava), InMemory({**weights, **swapped}, "made here"))


def test_unused_tensors_must_be_there(llava, weights):
    with pytest.raises(ValueError, match=r"vision_tower.*missing"):
        to_mcore(rows(llava), InMemory(weights, "made here"), unused_shapes(llava, ()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language_model.decoder.final_layernorm.weight": None}, "final_layernorm.weight is missing"),
        ({"vision_model.decoder.final_layernorm.weight": torch.ones(1)}, "final_layernorm.weight is not in the table"),
        ({"vision_model.class_token": torch.ones(1, 1, 3)}, r"class_token has shape \[1, 1, 3\]"),
    ],
)
def test_coverage_of_megatron_cores_side(llava, whole, changes, message):
    tensors = {name: tensor for name, tensor in {**dict(whole), **changes}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        to_hf(rows(llava), InMemory(tensors, "made here"))


def test_types(llava, weights):
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert {tensor.dtype for tensor in to_mcore(rows(llava), InMemory(half, "")).values()} == {torch.bfloat16}
    single = to_mcore(rows(llava), InMemory(half, ""), dtype=torch.float32)
    back = to_hf(rows(llava), single, dtype=torch.bfloat16)
    assert all(torch.equal(back[name], tensor) for name, tensor in half.items())


def test_new_projector_is_drawn_as_linear_layers_are(llava):
    _, _, projector = parts(llava)
    tensors = plan.new_projector(projector.rows(), seed=1)
    again, other = (plan.new_projector(projector.rows(), seed=seed) for seed in (1, 2))
    for name, width in {"linear_1": llava.vision.hidden_size, "linear_2": llava.language.hidden_size}.items():
        for parameter in ("weight", "bias"):
            key = f"multi_modal_projector.{name}.{parameter}"
            bound = width**-0.5
            assert 0.8 * bound < tensors[key].abs().max() <= bound
            assert torch.equal(tensors[key], again[key])
            assert not torch.equal(tensors[key], other[key])


def test_rows_appended_to_a_table_are_its_mean():
    table = torch.randn(5, 3).bfloat16()
    longer = read({"it": plan.append_mean_rows(View.of_tensor(table, "table"), 8)})["it"]
    assert torch.equal(longer[:5], table)
    assert torch.equal(longer[7], table.float().mean(0).bfloat16())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing; expected the folder of a Megatron-Core checkpoint"),
        ("", "holds ''; expected an iteration's number"),
        ("garbage\n", "holds 'garbage'"),
        ("-3", "holds '-3'"),
        ("²", "holds"),
        ("7", "iter_0000007: missing, though latest_checkpointed_iteration.txt names 7"),
        ("../release", "holds '../release'"),
    ],
)
def test_unfit_tracker(tmp_path, mcore, llava, text, message):
    shutil.copytree(mcore, tmp_path / "copy")
    tracker = tmp_path / "copy" / plan.TRACKER
    tracker.unlink()
    if text is not None:
        tracker.write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as error:
        open_mcore(tmp_path / "copy", llava)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [plan.write_shards, plan.write_dist])
def test_a_vocabulary_of_another_length_that_pads_to_the_same(tmp_path, mcore, llava, write):
    cut = {"tp_size": 2, "stages": pipeline_stages([llava.language.num_layers])} if "shards" in write.__name__ else {}
    write(tmp_path, open_mcore(mcore, llava), llava, args={"vocab_size": llava.language.vocab_size}, **cut)
    other = replace(llava, language=replace(llava.language, vocab_size=llava.language.vocab_size + 20))
    assert other.language.padded_vocab_size(2) == llava.language.padded_vocab_size(2)
    with pytest.raises(ValueError, match=r"\.pt: the vocabulary has 300 tokens, and the model that was asked for 320;"):
        open_mcore(tmp_path, other)
    open_mcore(tmp_path, llava)


def test_tracker_names_the_folder(tmp_path):
    for text, name in (("release\n", "release"), ("30", "iter_0000030")):
        (tmp_path / name).mkdir()
        (tmp_path / plan.TRACKER).write_text(text)
        assert checkpoint_folder(tmp_path) == tmp_path / name


def test_one_iteration_is_converted_and_described(mcore, tmp_path):
    """By a link too; what lies beside the weights is beside the folder that it leads to."""
    link, target = tmp_path / "link", tmp_path / "cut"
    link.symlink_to(mcore / "release")
    assert main(["--source-llm-ckpt-path", f"{link}/", "--target-ckpt-path", str(target), "--precision", "fp32"]) == 0
    assert summarize(link)["language model"] == summarize(target)["language model"]


@pytest.mark.parametrize("mg2hf", ["false", "true"])
def test_an_iteration_is_converted_by_its_number(mg2hf, mcore, tmp_path):
    run, target = shutil.copytree(mcore, tmp_path / "run"), tmp_path / "target"
    (run / "release").rename(run / "iter_0000001")
    (run / "iter_0000002").mkdir()
    (run / plan.TRACKER).write_text("2")
    flags = ["--source-llm-ckpt-path", str(run), "--target-ckpt-path", str(target), "--mg2hf", mg2hf]
    assert main(flags) == 1
    assert main([*flags, "--ckpt-step", "1", "--precision", "fp32", "--verify", "false"]) == 0


def test_the_iteration_that_is_read_may_not_change(mcore, tmp_path, capsys, monkeypatch):
    """Not the one that the tracker names, which a run may write meanwhile."""
    run = shutil.copytree(mcore, tmp_path / "run")
    one = (run / "release").rename(run / "iter_0000001")
    (run / plan.TRACKER).write_text("2")
    path = next(one.rglob("*.pt"))
    monkeypatch.setattr(disk, "reached", lambda point: os.utime(path, (1, 1)) if point == "locked" else None)
    flags = ["--source-llm-ckpt-path", str(run), "--target-ckpt-path", str(tmp_path / "target"), "--ckpt-step", "1"]
    assert main(flags) == 1
    assert f"{path}: changed while it was read" in capsys.readouterr().err


def test_a_run_is_guarded_by_its_sums(mcore, tmp_path):
    dist = tmp_path / "dist"
    flags = ["--target-ckpt-path", str(dist), "--precision", "fp32", "--ckpt-format", "torch_dist"]
    assert main(["--source-llm-ckpt-path", str(mcore), *flags]) == 0
    (dist / "release" / "manifest.json").unlink()
    assert "damage would not be noticed" in summarize(dist)["manifest"]
    checksums.write(dist / "release", checksums.digests((dist / "release").iterdir()))
    assert summarize(dist)["manifest"].startswith("none: SHA256SUMS lists 4 files, which are compared")
