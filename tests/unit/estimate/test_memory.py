"""The plan against the objects that a run builds, and against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_patch.config.train import Config, Parallel
from megatron_patch.data.images import normalize
from megatron_patch.data.task_encoder import Batch
from megatron_patch.estimate.memory import chunk_weights, plan
from megatron_patch.families.llava import read_config
from megatron_patch.training.batch import place_images, place_labels, shard_sequence
from megatron_patch.training.launch import launch
from megatron_patch.training.loop import start_or_resume
from tests import tiny_runs
from tests.distributed.ranks import run_ranks


def longest_batch(config: Config, llava) -> Batch:
    """Two sequences of the greatest length: an image, then words that are all labels."""
    shape = (config.data.micro_batch_size, config.model.decoder_seq_length)
    input_ids, labels = torch.full(shape, 7), torch.full(shape, 7)
    tokens, size = llava.vision.num_image_tokens, llava.vision.img_size
    input_ids[:, :tokens], labels[:, :tokens] = llava.image_token_id, -100
    pixels = torch.zeros(shape[0], 3, size, size, dtype=torch.uint8)
    return Batch(keys=["a", "b"], input_ids=input_ids, labels=labels, pixels=pixels)


def kept_bytes(config: Config, llava, model) -> int:
    """Distinct storages that autograd keeps in the forward pass of one micro batch, weights left out."""
    batch = longest_batch(config, llava)
    text = shard_sequence(batch, llava.image_token_id, config.parallel)
    pixels = normalize(batch.pixels, (0.5,) * 3, (0.5,) * 3, torch.float32)
    if not model.pre_process:
        length = text["input_ids"].shape[1]
        model.set_input_tensor([torch.randn(length, len(batch.keys), llava.language.hidden_size, requires_grad=True)])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # the tensors too, so that no storage is used again

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        labels = place_labels(text) if model.post_process else {}
        output = model(pixel_values=pixels, **place_images(text, config.parallel), **labels)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure(config: Config) -> dict[str, int]:
    """Bytes that this rank has of everything."""
    llava = read_config(config.model.description)
    chunks, wrapped, optimizer, _ = start_or_resume(config, llava)
    storages = {weight.untyped_storage().data_ptr(): weight for chunk in chunks for weight in chunk.parameters()}
    gradients = [buffer.grad_data for chunk in wrapped for buffer in chunk.buffers]
    stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
    of_each = 8 if config.model.precision == "fp32" else 12  # two states; the fp32 copy that is stepped
    assert all(weight.dtype == torch.float32 for weight in stepped)
    activations = kept_bytes(config, llava, chunks[0]) if config.model.precision == "fp32" else 0
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(weight.untyped_storage().nbytes() for weight in storages.values()),
        "gradients": sum(gradient.nbytes for gradient in gradients),
        "optimizer": of_each * sum(weight.numel() for weight in stepped),
        "activations": activations,
    }


def check(mcore, tmp_path, world_size: int, sizes: dict, changed: dict) -> None:
    cut = Parallel(**sizes)
    config = tiny_runs.config(mcore, tmp_path, parallel=cut, **changed)
    measured = run_ranks(measure, cut, world_size, config)
    for stage, memory in enumerate(plan(config, read_config(mcore), world_size, fused_norm=False)):
        ranks = [rank for rank in measured if rank["stage"] == stage]
        for what in ("parameters", "gradients", "optimizer"):
            assert getattr(memory, what) == max(rank[what] for rank in ranks), what
        if config.model.precision == "fp32":
            on_their_way = cut.pipeline_model_parallel_size - stage
            kept = max(rank["activations"] for rank in ranks)
            assert memory.activations / on_their_way == pytest.approx(kept, rel=0.05)


FROZEN = {"freeze_lm": True, "freeze_vit": True}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        FROZEN,
        {"freeze_lm": True},
        {"use_flash_attn": False},
        {"recompute": "sel"},
        {"recompute": "sel", "use_flash_attn": False, **FROZEN},
        {"recompute": "full", "recompute_num_layers": 2},
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 3},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_one_process(mcore, tmp_path, changed):
    check(mcore, tmp_path, 1, {}, changed)


def test_another_tower(mcore_siglip, tmp_path):
    check(mcore_siglip, tmp_path, 1, {}, {})


@pytest.mark.parametrize(
    "sizes",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}, {}],
    ids=["TP2+SP", "PP2", "CP2", "DP2+DO"],
)
def test_two_processes(mcore, tmp_path, sizes):
    check(mcore, tmp_path, 2, sizes, {})


def test_plain_optimizer(mcore, tmp_path):
    check(mcore, tmp_path, 1, {"use_distributed_optimizer": False}, {"precision": "bf16"})


def test_what_is_offloaded_is_on_the_cpu(mcore, tmp_path):
    llava, config = read_config(mcore), tiny_runs.config(mcore, tmp_path)
    (usual,) = plan(config, llava, world_size=1)
    offloading = replace(
        config,
        optimizer=replace(config.optimizer, optimizer_offload="static"),
        training=replace(config.training, recompute="offload"),
    )
    (memory,) = plan(offloading, llava, world_size=1)
    assert (memory.optimizer, memory.activations) == (0, 0)
    assert memory.on_cpu == 2 * usual.optimizer + usual.activations
    assert memory.total == usual.parameters + usual.gradients + memory.working


@pytest.fixture
def transformer_engine(monkeypatch):
    """As if it were installed. A mock: its sources say what it keeps."""
    monkeypatch.setattr("megatron_patch.config.train.require_transformer_engine", lambda given, instead: None)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("freeze_vit", [False, True])
def test_fp8_keeps_weights_and_transposes_beside_the_16_bit_ones(mcore, tmp_path, freeze_vit):
    llava = read_config(mcore)
    bf16, fp8 = (
        tiny_runs.config(mcore, tmp_path, precision=precision, freeze_vit=freeze_vit) for precision in ("bf16", "fp8")
    )
    (usual,), (memory,) = plan(bf16, llava, world_size=1), plan(fp8, llava, world_size=1)
    language, vision = llava.language, llava.vision
    heads, groups = (n * language.kv_channels for n in (language.num_attention_heads, language.num_query_groups))
    layer = language.hidden_size * (2 * heads + 2 * groups + 3 * language.ffn_hidden_size)
    before = vision.hidden_size * (3 * vision.hidden_size + vision.ffn_hidden_size)  # qkv, fc1
    after = vision.hidden_size * (vision.hidden_size + vision.ffn_hidden_size)  # proj, fc2
    copies = language.num_layers * 2 * layer
    copies += vision.num_layers * (2 * before + (1 if freeze_vit else 2) * after)
    assert (usual.fp8_copies, memory.fp8_copies) == (0, copies)
    assert memory.total == usual.total + copies


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(
    ("precision", "moments", "expected"),
    [
        ("bf16", ("fp32", "fp32"), 2 + 8),  # the 16 bits that the weight lacks, and two moments
        ("bf16", ("bf16", "fp8"), 2 + 3),
        ("fp8", ("fp16", "fp16"), 2 + 4),
        ("fp16", ("fp32", "fp32"), 4 + 8),
        ("fp32", ("fp32", "fp32"), 4 + 8),
    ],
)
def test_the_precision_aware_optimizer_keeps_less(mcore, tmp_path, precision, moments, expected):
    llava = read_config(mcore)
    settings = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments[0], "exp_avg_sq_dtype": moments[1]}
    (usual,) = plan(tiny_runs.config(mcore, tmp_path, precision=precision), llava, world_size=1)
    (memory,) = plan(tiny_runs.config(mcore, tmp_path, precision=precision, **settings), llava, world_size=1)
    weights = usual.optimizer // (8 if precision == "fp32" else 12)
    assert memory.optimizer == expected * weights
    # The step takes fp32 copies of the smaller moments, where the activations were.
    taken = 4 * weights * sum(moment != "fp32" for moment in moments)
    assert memory.activations + memory.working == max(usual.activations + usual.working, taken)


def test_ranks_share_what_is_written_to_a_checkpoint(mcore, tmp_path):
    llava = read_config(mcore)
    config = tiny_runs.config(mcore, tmp_path, precision="bf16", freeze_lm=True)
    (one,), (two,) = (plan(config, llava, world_size) for world_size in (1, 2))
    trained, every = one.optimizer // 12, sum(numel for _, numel, _ in chunk_weights(config, llava, 0, 0))
    assert one.saving == 12 * trained + 2 * every
    assert two.saving == one.saving // 2


def test_the_plan_is_printed_and_nothing_started(mcore, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    config = tiny_runs.config(mcore, tmp_path / "output", parallel=Parallel(pipeline_model_parallel_size=2), plan=True)
    assert launch(config, Path("unused"), []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["stage", "parameters", "gradients"]
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    assert lines[5].startswith("predicted time on 4 GPUs")
    assert not (tmp_path / "output").exists()
