"""What lies beside the weights."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPImageProcessor

from megatron_patch.conversion import companions
from megatron_patch.families import hf_config
from megatron_patch.families.hf_config import describe
from megatron_patch.files.names import model_folder
from tests.tiny import LANGUAGE_SIZES, VISION_SIZES
from tests.unit.properties import damaged, examples, in_one_line

TEXT = {"model_type": "mistral", **LANGUAGE_SIZES, "rope_theta": 1e6}
CLIP = {"model_type": "clip_vision_model", **VISION_SIZES}


def test_copying_is_whole_and_can_be_repeated(tmp_path, mcore):
    target = tmp_path / "run" / "checkpoint"
    for _ in range(2):
        companions.copy_companions(mcore, target)
        copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        there = {str(path.relative_to(mcore)) for path in mcore.rglob("*") if path.is_file()}
        weights = {name for name in there if name.startswith("release/")}
        assert copied == there - weights - {companions.TRACKER, companions.PARITY}
        for name in copied:
            assert (target / name).read_bytes() == (mcore / name).read_bytes()
    companions.copy_companions(target, target)


def test_weights_are_not_companions(tmp_path, hf):
    companions.copy_companions(hf, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_source_configs_are_kept_as_they_are():
    config = hf_config.llava_config(TEXT, CLIP, 300)
    assert config["text_config"] == TEXT
    assert config["vision_config"] == CLIP
    assert describe(config).image_token_id == 300


def test_exported_config_says_what_versions_would_default_differently():
    config = hf_config.llava_config(TEXT, CLIP, 300)
    exported = hf_config.exported_config(config, describe(config), 320, "bfloat16")
    text = exported["text_config"]
    assert text["vocab_size"] == 320
    assert text["sliding_window"] == 4096  # what Mistral means by leaving it out
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e6
    for part in (exported, text, exported["vision_config"]):
        assert part["dtype"] == part["torch_dtype"] == "bfloat16"
    assert exported["vision_config"]["num_hidden_layers"] == VISION_SIZES["num_hidden_layers"]
    assert exported["image_seq_length"] == 16
    without_window = hf_config.llava_config({**TEXT, "sliding_window": None}, CLIP, 300)
    exported = hf_config.exported_config(without_window, describe(without_window), 320, "bfloat16")
    assert exported["text_config"]["sliding_window"] is None


def test_no_code_is_handed_on(tmp_path):
    auto = {"auto_map": {"AutoModel": "mine.Model"}}
    config = {**auto, "a": 1, "text_config": {**auto, "layers": [{**auto, "b": 2}]}}
    assert companions.without_code(config) == {"a": 1, "text_config": {"layers": [{"b": 2}]}}
    for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
        companions.write_json(tmp_path, name, {**config, "chat_template": "x"})
    companions.remove_code(tmp_path)
    assert "auto_map" not in "".join(path.read_text() for path in tmp_path.iterdir())
    # A processor's own would be taken in place of chat_template.jinja.
    assert "chat_template" not in companions.read_json(tmp_path, "processor_config.json")


def test_a_clip_tower_without_an_image_transform_gets_clips_own():
    """transformers is the judge: a setting that is left out means its class's own."""
    made = hf_config.preprocessor_config(describe(hf_config.llava_config(TEXT, CLIP, 300)).vision)
    stock = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).to_dict()
    for name, value in made.items():
        if name != "image_processor_type":
            assert json.loads(json.dumps(stock[name])) == value, name


@pytest.mark.parametrize("place", ["own", "nested"])
def test_an_image_transform_stands_in_one_file_that_all_versions_read(place, tmp_path):
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    settings = {**kind, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    if place == "own":
        companions.write_json(source, companions.PREPROCESSOR, settings)
    else:
        companions.write_json(source, companions.PROCESSOR, {"image_processor": settings, "patch_size": 7})
    companions.write_preprocessor(source, target)
    assert settings.items() <= companions.read_json(target, companions.PREPROCESSOR).items()
    companions.complete_processor(source, describe(hf_config.llava_config(TEXT, CLIP, 300)).vision)
    assert settings.items() <= companions.read_json(source, companions.PREPROCESSOR).items()
    assert "image_processor" not in companions.read_json(source, companions.PROCESSOR)


def test_a_tokenizers_folder_of_templates_goes_along(tmp_path):
    path = tmp_path / "source" / "source_tokenizer" / "additional_chat_templates" / "rag.jinja"
    path.parent.mkdir(parents=True)
    path.write_text("x")
    companions.copy_companions(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / path.relative_to(tmp_path / "source")).read_text() == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "config.json: missing"), ("{", "config.json: not valid json"), ("[]", "holds a list; expected an object")],
)
def test_unfit_json(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        companions.read_json(tmp_path)


def test_a_folder_in_the_place_of_config_json(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError, match=r"^/.*config.json: is a folder; expected a file$"):
        companions.read_json(tmp_path)


def test_one_iteration_is_a_checkpoint(tmp_path):
    run, link, named = tmp_path / "checkpoint", tmp_path / "best", tmp_path / "links" / "to the run"
    for number in (1, 1000):
        (run / f"iter_{number:07d}").mkdir(parents=True)
        (run / f"iter_{number:07d}" / ".metadata").touch()
    (run / "config.json").write_text("{}")
    (run / companions.TRACKER).write_text("1000\n")
    one = run / "iter_0000001"
    link.symlink_to(one)
    named.parent.mkdir()
    named.symlink_to(run)
    for folder, iteration in ((run, run / "iter_0001000"), (named, named / "iter_0001000"), (one, one), (link, link)):
        assert companions.is_checkpoint(folder)
        assert companions.checkpoint_folder(folder) == iteration
        assert (model_folder(folder) / "config.json").exists()
        assert companions.checkpoint_folder(f"{folder}/") == iteration
    (run / companions.TRACKER).unlink()
    assert companions.checkpoint_folder(one) == one
    assert not companions.is_checkpoint(run)


def test_an_iteration_by_its_number(tmp_path):
    for number in (1, 1000):
        (tmp_path / f"iter_{number:07d}").mkdir()
    (tmp_path / companions.TRACKER).write_text("1000")
    assert companions.checkpoint_folder(tmp_path, 1) == tmp_path / "iter_0000001"
    with pytest.raises(FileNotFoundError, match=r"--ckpt-step 2: .*2 is missing; there are: iter_0000001, iter_"):
        companions.checkpoint_folder(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="there are: none"):
        companions.checkpoint_folder(tmp_path / "iter_0000001", 1)


TRACKED = b"1\n"


@examples
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode) | damaged(TRACKED))
def test_any_tracker_is_read_or_refused_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "tracked"
    (folder / "iter_0000001").mkdir(parents=True, exist_ok=True)
    (folder / companions.TRACKER).write_bytes(data)
    in_one_line(lambda: companions.checkpoint_folder(folder), folder)
