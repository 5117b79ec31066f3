"""Every kind of model: in, trained, and out again, with transformers as the judge."""

from __future__ import annotations

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from megatron_patch.config.train import Config, Parallel
from megatron_patch.conversion.commands import main
from megatron_patch.data.images import normalize
from megatron_patch.data.preprocessor import read_image_settings
from megatron_patch.families.llava import hub_name, parts, read_config
from megatron_patch.model.llava import find_patches, language_config
from megatron_patch.stores.hf import HfReader
from megatron_patch.training import resume
from megatron_patch.training.loop import start_or_resume
from megatron_patch.training.optimizer import build_scheduler
from megatron_patch.training.resume import Progress
from megatron_patch.training.saving import Saver
from megatron_patch.training.step import batch_runner, train_step
from tests import tiny_runs
from tests.distributed.ranks import run_ranks
from tests.tiny import LANGUAGE_MODELS, TOWERS, save_clip, save_llama

CUTS = ((1, 1), (2, 2))
TEXT = torch.arange(5, 295).reshape(2, -1)


def convert(target: Path, **flags: object) -> Path:
    named = {"target_ckpt_path": target, "precision": "fp32", "verify": "false", **flags}
    assert main([f"--{name.replace('_', '-')}={value}" for name, value in named.items()]) == 0
    return target


# Each language model with CLIP, and each kind of them with every other tower.
MODELS = [(name, "clip") for name in LANGUAGE_MODELS]
MODELS += [(name, tower) for tower in TOWERS for name in ("mistral", "llama 2", "qwen 2") if tower != "clip"]


@pytest.fixture(scope="module", params=MODELS, ids=" and ".join)
def sources(request, tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a language model and of a tower."""
    language, tower = request.param
    folder = tmp_path_factory.mktemp(language)
    return LANGUAGE_MODELS[language](folder / "source"), TOWERS[tower](folder / "tower")


@pytest.fixture(scope="module")
def imported(sources) -> Path:
    """Verified while it was converted."""
    llm, tower = sources
    flags = {"source_llm_ckpt_path": llm, "source_clip_ckpt_path": tower}
    target = convert(llm.parent / "mcore", **flags, verify="true")
    parity = json.loads((target / "parity.json").read_text())
    assert parity["equal"]
    assert parity["logits_max_abs_difference"] <= 1e-5
    assert parity["top1_agreement"] == 1
    return target


@pytest.mark.parametrize(("tp", "pp"), CUTS)
def test_round_trip_is_bit_exact(sources, tmp_path, tp, pp):
    round_trip(*sources, tmp_path, tp, pp)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_round_trip_at_tp_8_is_bit_exact(tmp_path, kind):
    """With as many query groups, and heads of the tower, as ranks."""
    sizes = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 4}
    source = LANGUAGE_MODELS[kind](tmp_path / "source", **sizes)
    round_trip(source, save_clip(tmp_path / "clip", num_attention_heads=8), tmp_path, tp=8, pp=1)


def round_trip(source: Path, tower_folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
    cut = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    shards = convert(tmp_path / "shards", source_llm_ckpt_path=source, source_clip_ckpt_path=tower_folder, **cut)
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=shards)
    llava = read_config(shards)
    language, tower, _ = parts(llava)
    expected = {**HfReader(source, language.hub_name), **HfReader(tower_folder, tower.hub_name)}
    found = HfReader(back, partial(hub_name, llava))
    assert len(found) == len(expected) + 4  # the projector
    for name, tensor in expected.items():
        assert torch.equal(found[name][: len(tensor)], tensor), name


def train(config: Config, steps: int) -> list[float]:
    """Losses of some steps, everything trained; then a checkpoint is saved."""
    llava = read_config(config.model.description)
    chunks, wrapped, optimizer, _ = start_or_resume(config, llava)
    scheduler = build_scheduler(optimizer, config, 0)
    batches, run = itertools.cycle(tiny_runs.batches(llava, 2)), batch_runner(config, llava)
    losses = []
    for _ in range(steps):
        scheduler.step(1)
        losses.append(train_step(wrapped, optimizer, batches, run).totals.loss)
    Saver(config, chunks, optimizer).save(Progress(steps, steps * 4), None)
    return losses


def logits(config: Config, input_ids: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary] of the run's last checkpoint, or of the weights that it starts from."""
    llava = read_config(config.model.description)
    (model,), *_ = start_or_resume(config, llava, resume.find(config))
    is_image = input_ids == llava.image_token_id
    with torch.no_grad():
        return model.eval()(input_ids.masked_fill(is_image, 0), find_patches(is_image), pictures)[
            ..., : llava.language.vocab_size
        ]


def pixels(config: Config, batch) -> torch.Tensor:
    settings = read_image_settings(config.model.description)
    return normalize(batch.pixels, settings.mean, settings.std, torch.float32)


def test_logits_equal_transformers(sources, imported, tmp_path):
    config, size = tiny_runs.config(imported, tmp_path), read_config(imported).vision.img_size
    (found,) = run_ranks(logits, Parallel(), 1, config, TEXT, torch.zeros(0, 3, size, size))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(sources[0]).eval()(TEXT).logits
    assert (found - expected).abs().max() <= 1e-5


def test_stock_megatron_core_loads_the_shards(imported, tmp_path):
    """GPTModel with the local spec, every key of it and no other."""
    (keys,) = run_ranks(load_in_stock_model, Parallel(), 1, imported)
    assert "output_layer._extra_state" in keys


def load_in_stock_model(folder: Path) -> list[str]:
    llava = read_config(folder)
    sizes = llava.language
    model = GPTModel(
        language_config(tiny_runs.config(folder, folder), sizes),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=sizes.padded_vocab_size(1),
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=sizes.share_embeddings_and_output_weights,
    )
    shard = torch.load(folder / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)["model"]
    prefix = "language_model."
    ours = {name.removeprefix(prefix): value for name, value in shard.items() if name.startswith(prefix)}
    model.load_state_dict(ours, strict=True)
    return list(ours)


def test_trained_and_exported_logits_equal_transformers(imported, tmp_path):
    config = tiny_runs.config(imported, tmp_path / "run")
    (losses,) = run_ranks(train, Parallel(), 1, config, 5)
    assert losses[-1] < losses[0] - 0.3
    (batch,) = tiny_runs.batches(read_config(imported), 1)
    inputs = {"input_ids": batch.input_ids, "pixel_values": pixels(config, batch)}
    (found,) = run_ranks(logits, Parallel(), 1, config, *inputs.values())

    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=config.checkpoint.folder, verify="true")
    judge, info = LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected = judge.eval()(**inputs).logits[..., : found.shape[-1]]
    assert (found - expected).abs().max() <= 1e-5
    assert json.loads((back / "parity.json").read_text())["logits_max_abs_difference"] <= 1e-5


@pytest.mark.parametrize("frozen", [False, True])
def test_tied_tables_stay_equal_on_two_stages(clip, tmp_path, frozen):
    """The first stage's embedding and the last one's output layer get each other's gradients."""
    source = LANGUAGE_MODELS["qwen 2 tied"](tmp_path / "source")
    cut = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    mcore = convert(tmp_path / "mcore", source_llm_ckpt_path=source, source_clip_ckpt_path=clip, **cut)
    changed = {"freeze_lm": frozen, "freeze_vit": frozen}
    (expected,) = run_ranks(train, Parallel(), 1, tiny_runs.config(mcore, tmp_path / "one", **changed), 2)
    config = tiny_runs.config(mcore, tmp_path / "two", parallel=Parallel(**cut), **changed)
    for losses in run_ranks(train, config.parallel, 2, config, 2):
        assert losses == pytest.approx(expected, abs=1e-5)
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=config.checkpoint.folder, verify="true")
    assert "language_model.lm_head.weight" not in HfReader(back)


@pytest.mark.parametrize(("layer", "strategy"), [(-1, "full"), (2, "default"), (-3, "full")])
@pytest.mark.parametrize("tower", TOWERS)
def test_any_layer_of_a_tower_is_taken_as_transformers_takes_it(tmp_path, tower, layer, strategy):
    """A whole LLaVA of transformers, in (proven by logits) and out again, its config and processor included."""
    llm = LlamaForCausalLM.from_pretrained(save_llama(tmp_path / "llm"))
    vision = AutoModel.from_pretrained(TOWERS[tower](tmp_path / "tower"))
    taken = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    config = LlavaConfig(text_config=llm.config, vision_config=vision.config, image_token_index=299, **taken)
    torch.manual_seed(1)
    whole = LlavaForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(llm.model.state_dict())
    whole.model.vision_tower.load_state_dict(vision.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "llm" / name, tmp_path / "whole")
    shutil.copy(tmp_path / "tower" / "preprocessor_config.json", tmp_path / "whole")
    mcore = convert(tmp_path / "mcore", source_llm_ckpt_path=tmp_path / "whole", verify="true")
    back = convert(tmp_path / "back", mg2hf="true", source_llm_ckpt_path=mcore, verify="true")
    judge = LlavaForConditionalGeneration.from_pretrained(back)
    assert {name: getattr(judge.config, name) for name in taken} == taken
    for name, tensor in whole.state_dict().items():
        assert torch.equal(judge.state_dict()[name][: len(tensor)], tensor), name
    image = Image.new("RGB", (40, 30), "red")
    inputs = AutoProcessor.from_pretrained(back)(images=image, text="<image> a", return_tensors="pt")
    assert int((inputs.input_ids == judge.config.image_token_id).sum()) == read_config(back).vision.num_image_tokens
    judge(**inputs)  # which counts them, too
