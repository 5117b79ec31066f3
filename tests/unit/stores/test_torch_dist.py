"""torch_dist checkpoints that megatron.core itself wrote, and megatron.core as the judge of our cuts."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
from enum import Enum
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import get_pipeline_model_parallel_rank, get_tensor_model_parallel_rank

from megatron_patch.config.train import Parallel
from megatron_patch.conversion import companions
from megatron_patch.conversion.commands import main as convert
from megatron_patch.conversion.plan import load_rank, open_mcore, write_shards
from megatron_patch.families.llava import read_config, rows
from megatron_patch.families.stages import pipeline_stages, stage_lengths
from megatron_patch.model.llava import LlavaModel, language_config
from megatron_patch.stores.hf import HfReader
from megatron_patch.stores.torch_dist import TorchDistReader, read_metadata, stored_key
from megatron_patch.training.loop import load_pretrained, start_or_resume
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.canary import Canary
from tests.distributed.ranks import run_ranks

ONE = Parallel()
TP2 = Parallel(tensor_model_parallel_size=2)
TP2_PP2 = Parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def save_trained(config):
    """One step on all ranks, then a save. Returns this rank's cut and its weights."""
    llava = read_config(config.model.description)
    chunks, wrapped, optimizer, _ = start_or_resume(config, llava)
    train_step(wrapped, optimizer, itertools.cycle(tiny_runs.batches(llava, 2)), batch_runner(config, llava))
    Saver(config, chunks, optimizer).save(Progress(1, 4), None)
    return rank(), tensors(chunks[0])


def rank() -> dict[str, int]:
    return {"tp_rank": get_tensor_model_parallel_rank(), "pp_rank": get_pipeline_model_parallel_rank()}


def cut_by_us(folder: Path, llava, *, tp_rank: int, pp_rank: int, tp_size: int, pp_size: int = 1):
    (stage,) = pipeline_stages(stage_lengths(4, pp_size))[pp_rank]
    return load_rank(folder, llava, stage, tp_rank=tp_rank, tp_size=tp_size)


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if value is not None}


@pytest.fixture(scope="module")
def trained(mcore, tmp_path_factory):
    """A run's checkpoint folder at TP2 x PP2, and what each rank held when it was saved."""
    output = tmp_path_factory.mktemp("run")
    return output / "checkpoint", run_ranks(save_trained, TP2_PP2, 4, tiny_runs.config(mcore, output, parallel=TP2_PP2))


def test_what_training_saved_is_read_at_its_own_cut(mcore, trained):
    folder, ranks = trained
    llava = read_config(mcore)
    for cut, held in ranks:
        loaded = cut_by_us(folder, llava, **cut, tp_size=2, pp_size=2)
        assert set(loaded) == set(held)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, held[name]), name


def test_optimizer_states_are_left_out_and_weights_are_new(mcore, trained):
    llava = read_config(mcore)
    before, after = open_mcore(mcore, llava), open_mcore(trained[0], llava)
    keys = after.metadata.state_dict_metadata
    assert any(key.startswith("optimizer.") for key in keys)
    assert not any(name.startswith("optimizer.") for name in after)
    assert not torch.equal(*(reader["language_model.output_layer.weight"] for reader in (before, after)))


def test_rows_give_the_keys_of_the_models_own_sharded_state_dict(mcore, trained):
    keys = open_mcore(trained[0], read_config(mcore)).metadata.state_dict_metadata
    stored = {key for key in keys if not key.startswith("optimizer.") and "_extra_state" not in key}
    assert {stored_key(row.mcore)[0] for row in rows(read_config(mcore))} == stored


def reshard(checkpoint: Path, config):
    """Let megatron.core load a checkpoint at this run's cut, whatever it was saved at."""
    model = LlavaModel(config, read_config(config.model.description))
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(state["model"])
    return rank(), tensors(model)


def test_megatron_core_cuts_as_we_do(mcore, trained, tmp_path):
    """Saved at TP2 x PP2, resharded to TP2 by dist_checkpointing: equal to our cut of it."""
    folder, _ = trained
    for cut, expected in run_ranks(
        reshard, TP2, 2, folder / "iter_0000001", tiny_runs.config(mcore, tmp_path, parallel=TP2)
    ):
        loaded = cut_by_us(folder, read_config(mcore), **cut, tp_size=2)
        assert set(loaded) == set(expected)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected[name]), name


def test_megatron_core_cuts_the_imported_weights_as_we_do(mcore, tmp_path):
    """Saved by dist_checkpointing at TP1, loaded by it at TP2: equal to our shards of the imported weights."""
    run_ranks(save_whole, ONE, 1, tmp_path, tiny_runs.config(mcore, tmp_path))
    for cut, expected in run_ranks(reshard, TP2, 2, tmp_path, tiny_runs.config(mcore, tmp_path, parallel=TP2)):
        loaded = cut_by_us(mcore, read_config(mcore), **cut, tp_size=2)
        assert set(loaded) == set(expected)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected[name]), name


def save_whole(folder: Path, config):
    """The imported weights, saved by megatron.core."""
    model = LlavaModel(config, read_config(config.model.description))
    load_pretrained(config, read_config(config.model.description), model)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))


def load_strictly(path: Path, config):
    """megatron.core's own GPTModel and our whole model take a shard's dict as it is, with strict=True."""
    llava = read_config(config.model.description)
    content = torch.load(path, weights_only=True, mmap=True)["model"]
    LlavaModel(config, llava).load_state_dict(content, strict=True)
    stock = GPTModel(
        language_config(config, llava.language),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=llava.language.padded_vocab_size(1),
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    prefix = "language_model."
    language = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    return repr(stock.load_state_dict(language, strict=True))


def test_stock_megatron_core_loads_a_shard_strictly(mcore, tmp_path):
    llava = read_config(mcore)
    write_shards(tmp_path, open_mcore(mcore, llava), llava, tp_size=1, stages=pipeline_stages([4]), args={})
    path = tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt"
    (result,) = run_ranks(load_strictly, ONE, 1, path, tiny_runs.config(mcore, tmp_path))
    assert result == "<All keys matched successfully>"


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained[0], tmp_path / "copy")


def folder_of(copy) -> Path:
    return copy / "iter_0000001"


def missing_data(copy):
    for path in folder_of(copy).glob("*.distcp"):
        path.unlink()


def truncated_data(copy):
    for path in folder_of(copy).glob("*.distcp"):
        os.truncate(path, 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(missing_data, r"distcp: missing; it holds .*; copy"), (truncated_data, r"distcp: .* is not readable")],
)
def test_damaged_data(mcore, copy, damage, message):
    damage(copy)
    reader = open_mcore(copy, read_config(mcore), check=False)
    with pytest.raises((ValueError, OSError), match=message) as error:
        dict(reader)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["__0_0.distcp", "__3_1.distcp", ".metadata"])
def test_a_flipped_bit_is_found(mcore, copy, file):
    path = folder_of(copy) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: not what was written"):
        open_mcore(copy, read_config(mcore))


@pytest.mark.parametrize("content", ["code", b"", b"garbage", pickle.dumps({"a": 1}), "half"])
def test_unfit_metadata_is_refused_and_not_run(mcore, copy, tmp_path, content):
    path, canary = folder_of(copy) / ".metadata", tmp_path / "canary"
    made = {"code": pickle.dumps(Canary(canary)), "half": path.read_bytes()[:200]}
    path.write_bytes(made.get(content, content))
    with pytest.raises(ValueError, match=r"\.metadata: (not|holds a)") as error:
        open_mcore(copy, read_config(mcore), check=False)
    assert not canary.exists()
    assert "\n" not in str(error.value)


class _AsPython3112(pickle.Pickler):
    """Pickles members of enums as Python 3.11.2 does, and anything else's attribute just so."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_any_python_is_read(trained, tmp_path):
    metadata = read_metadata(folder_of(trained[0]) / ".metadata")
    with (tmp_path / ".metadata").open("wb") as file:
        _AsPython3112(file, protocol=4).dump(metadata)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert read_metadata(tmp_path / ".metadata").state_dict_metadata == metadata.state_dict_metadata


def test_attributes_of_other_classes_than_enums_are_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(
        b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nV__init__\ntR."
    )
    with pytest.raises(ValueError, match="asks for __init__ of something else than an enum"):
        read_metadata(tmp_path / ".metadata")


def test_metadata_that_leads_out_of_the_folder(mcore, trained):
    reader = open_mcore(trained[0], read_config(mcore))
    name = "language_model.decoder.final_layernorm.weight"
    for index, where in reader.metadata.storage_data.items():
        if index.fqn == name:
            where.relative_path = "../" + where.relative_path
    with pytest.raises(ValueError, match="out of the folder"):
        reader[name]


def test_metadata_without_a_block(mcore, trained):
    reader = TorchDistReader(trained[0] / "iter_0000001", rows(read_config(mcore)))
    name = "language_model.decoder.layers.2.mlp.linear_fc2.weight"
    chunks = reader.metadata.state_dict_metadata[stored_key(name)[0]].chunks
    chunks[:] = [chunk for chunk in chunks if chunk.offsets[0] != 2]
    with pytest.raises(ValueError, match=r"the blocks of language_model.decoder.layers.mlp.linear_fc2.weight hold 0"):
        reader[name]


def test_a_runs_checkpoint_is_exported(mcore, trained, hf, tmp_path):
    """The folder that training saves into carries all that the way back needs."""
    folder, _ = trained
    assert companions.checkpoint_folder(folder) == folder / "iter_0000001"
    flags = {"mg2hf": "true", "source-llm-ckpt-path": folder, "target-ckpt-path": tmp_path / "hf", "precision": "fp32"}
    assert convert([f"--{name}={value}" for name, value in flags.items()]) == 0
    exported, before, weights = HfReader(tmp_path / "hf"), HfReader(hf), open_mcore(folder, read_config(mcore))
    assert set(exported) == set(before)
    norm = "language_model.model.layers.3.input_layernorm.weight"
    assert torch.equal(exported[norm], weights["language_model.decoder.layers.3.input_layernorm.weight"])
    assert not torch.equal(exported[norm], before[norm])
    unused = "vision_tower.vision_model.post_layernorm.weight"
    assert torch.equal(exported[unused], before[unused])
    for path in hf.iterdir():
        if path.name not in ("model.safetensors", "parity.json", "README.md"):
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
