"""What an import reads: a checkpoint of the LLaVA repository is Hugging Face's LLaVA with the same weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from megatron_patch.conversion import sources
from megatron_patch.conversion.sources import open_sources, open_unused
from megatron_patch.families.hf_config import describe, llava_config
from megatron_patch.stores.mm_projector import NAMES
from tests.tiny import TOWERS, save_clip, save_llama, save_siglip

SETTINGS = {
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "mine",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, a CLIP, and the LLaVA repository's checkpoint of both with a projector."""
    root = tmp_path_factory.mktemp("repository")
    llm, clip = save_llama(root / "llm"), save_clip(root / "clip")
    text, tower = (json.loads((folder / "config.json").read_text()) for folder in (llm, clip))
    config = llava_config(text, tower)
    tensors = load_file(llm / "model.safetensors")
    for name, hub in NAMES.items():
        inputs = tower["hidden_size"] if "linear_1" in hub else text["hidden_size"]
        tensors[name] = torch.randn(text["hidden_size"], *([inputs] if hub.endswith("weight") else []))
    folder = root / "llava"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**text, **SETTINGS}))
    return folder, clip, config


def opened(folder, clip, config):
    return open_sources(describe(config), folder, clip, None, 1).reader


def with_tower(folders, tmp_path, trained, changed):
    """The same checkpoint with the tower in it, as LLaVA 1.6 saves it."""
    folder, clip, _ = folders
    names = load_file(clip / "model.safetensors")
    prefix = "model.vision_tower.vision_tower." + (
        "" if next(iter(names)).startswith("vision_model.") else "vision_model."
    )
    tower = {prefix + name: tensor + changed for name, tensor in names.items()}
    tensors = load_file(folder / "model.safetensors") | tower
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "unfreeze_mm_vision_tower": trained}))
    return tmp_path


def test_logits_are_those_of_transformers_llava(folders, tmp_path):
    """With what is read put into LlavaForConditionalGeneration by hand, and by transformers' own loading."""
    folder, clip, config = folders
    reader = opened(folder, clip, config)
    config = {**config, "image_token_index": 299}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: reader[name] for name in reader}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()

    built = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval()
    language = {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in NAMES}
    head = {"lm_head.weight": language.pop("lm_head.weight")}
    parts = {
        "model.language_model.": {name.removeprefix("model."): tensor for name, tensor in language.items()},
        "": head,
        "model.multi_modal_projector.": {
            NAMES[name].split(".", 1)[1]: tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name in NAMES
        },
    }
    state = {prefix + name: tensor for prefix, some in parts.items() for name, tensor in some.items()}
    tower = {n.removeprefix("vision_model."): t for n, t in load_file(clip / "model.safetensors").items()}
    names = [name for name in built.state_dict() if name.startswith("model.vision_tower.")]
    state |= {name: tower[name.removeprefix("model.vision_tower.").removeprefix("vision_model.")] for name in names}
    built.load_state_dict(state)
    ids = torch.tensor([[1, *[299] * 16, 7, 8, 9]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        logits = [model(input_ids=ids, pixel_values=pixels).logits for model in (loaded, built)]
    assert torch.equal(*logits)


def test_a_tower_in_it_is_compared_with_the_clip(folders, tmp_path):
    _, clip, config = folders
    plain = opened(*folders)
    same = opened(with_tower(folders, tmp_path, False, 0.0), clip, config)
    assert set(same) == set(plain)
    assert all(torch.equal(same[name], plain[name]) for name in plain)
    other = with_tower(folders, tmp_path, False, 1.0)
    with pytest.raises(ValueError, match=r"its tower's vision_tower\..* is not that of .*clip; give the tower"):
        opened(other, clip, config)


def test_a_tower_that_was_trained_is_taken(folders, tmp_path):
    _, clip, config = folders
    plain, trained = opened(*folders), opened(with_tower(folders, tmp_path, True, 1.0), clip, config)
    assert set(trained) == set(plain)
    for name in plain:
        assert torch.equal(trained[name], plain[name] + 1.0 if name.startswith("vision_tower.") else plain[name])


def test_a_folder_with_an_adapter_is_not_read(folders, tmp_path):
    folder, clip, config = folders
    beside = shutil.copytree(folder, tmp_path / "llava")
    (beside / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: is of a LoRA adapter beside the model"):
        opened(beside, clip, config)


def test_no_projector_is_made_before_the_weights_have_the_sizes(tmp_path, monkeypatch):
    llm, clip = save_llama(tmp_path / "llm"), save_clip(tmp_path / "clip")
    text, tower = (json.loads((folder / "config.json").read_text()) for folder in (llm, clip))
    monkeypatch.setattr(sources, "new_projector", lambda rows, seed: pytest.fail("a projector was made"))
    llava = describe(llava_config({**text, "hidden_size": 60_000}, tower))
    with pytest.raises(ValueError, match=r"has shape .*96\], by config.json .*60000\] is expected"):
        open_sources(llava, llm, clip, None, 1)


@pytest.mark.parametrize("name", ["encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight", "head.probe"])
def test_unused_tensors_have_their_shapes(name, tmp_path):
    llm, tower = save_llama(tmp_path / "llm"), save_siglip(tmp_path / "tower")
    config = llava_config(*(json.loads((folder / "config.json").read_text()) for folder in (llm, tower)))
    open_sources(describe(config), llm, tower, None, 1)
    file = tower / "model.safetensors"
    tensors = load_file(file)
    (full,) = (key for key in tensors if key.endswith(name))
    save_file({**tensors, full: torch.zeros(5)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} has shape \[5\]"):
        open_sources(describe(config), llm, tower, None, 1)
    save_file({key: tensor for key, tensor in tensors.items() if key != full}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        open_sources(describe(config), llm, tower, None, 1)
    save_file({key: tensor for key, tensor in tensors.items() if "head." not in key}, file, metadata={"format": "pt"})
    open_sources(describe(config), llm, tower, None, 1)


def test_unused_tensors_are_those_of_the_same_tower(tmp_path):
    towers = {name: save(tmp_path / name, image_size=28) for name, save in TOWERS.items()}
    text = json.loads((save_llama(tmp_path / "llm") / "config.json").read_text())
    llava = describe(llava_config(text, json.loads((towers["clip"] / "config.json").read_text())))
    assert len(open_unused(llava, [tmp_path], towers["clip"])) == 18
    with pytest.raises(ValueError, match=r"siglip: family is siglip_vision_model, and clip_vision_model in the checkp"):
        open_unused(llava, [tmp_path], towers["siglip"])
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"another/config.json: vision tower: model_type 'vit' is not supported"):
        open_unused(llava, [tmp_path], tmp_path / "another")
    save_clip(tmp_path / "wider", intermediate_size=160)
    with pytest.raises(ValueError, match=r"wider: ffn_hidden_size is 160, and 128 in the checkpoint"):
        open_unused(llava, [tmp_path], tmp_path / "wider")
