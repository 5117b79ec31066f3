"""generation_config.json of an export, with transformers as judge of what can be saved."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from transformers import GenerationConfig

from megatron_patch.conversion.generation_config import write_generation
from tests.unit.properties import changed, examples


class Words(SimpleNamespace):
    """What is asked of a tokenizer."""

    def __len__(self):
        return 300


@pytest.fixture
def words():
    return Words(eos_token_id=2, bos_token_id=1, pad_token_id=0)


def written(folder, own, words, end, **text):
    if own is not None:
        (folder / "generation_config.json").write_text(json.dumps(own))
    config = write_generation(folder, {"text_config": text}, words, end)
    return json.loads((folder / "generation_config.json").read_text()), config


@pytest.mark.parametrize(
    ("own", "text", "end", "stops"),
    [
        (None, {}, 2, 2),
        ({"eos_token_id": 2}, {}, 7, [7, 2]),
        ({"eos_token_id": [5, 2]}, {"eos_token_id": 6}, 7, [7, 5, 2, 6]),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, 2, [2, 7]),
        # What is no token's id, and one that is past the vocabulary.
        ({"eos_token_id": [True, "x", -1, 400, 7]}, {"eos_token_id": 3.5}, None, [7, 2]),
    ],
)
def test_generate_stops_where_training_ended(own, text, end, stops, words, tmp_path):
    settings, config = written(tmp_path, own, words, end, **text)
    assert settings["eos_token_id"] == config["eos_token_id"] == config["text_config"]["eos_token_id"] == stops
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (1, 0)


@pytest.mark.parametrize(
    ("own", "kept", "said"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, {"max_length": 4096}, "without temperature, top_p,"),
        ({"do_sample": True, "temperature": 0.9}, {"do_sample": True, "temperature": 0.9}, ""),
        ({"do_sample": False, "top_k": 5}, {"do_sample": False}, "without top_k,"),
        ({"length_penalty": 2.0, "early_stopping": True}, {}, "without length_penalty, early_stopping,"),
        ({"num_beams": 2, "early_stopping": True}, {"num_beams": 2, "early_stopping": True}, ""),
        ({"max_new_tokens": -3}, {}, "without max_new_tokens,"),
        ({"_from_model_config": True, "transformers_version": "4.31.0"}, {}, ""),
    ],
)
def test_what_is_written_can_be_saved_again(own, kept, said, words, tmp_path, capsys):
    settings, _ = written(tmp_path, own, words, 2)
    assert {name: value for name, value in settings.items() if not name.endswith("token_id")} == kept
    GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert said in capsys.readouterr().err


OWN = {
    "eos_token_id": [2, 3],
    "do_sample": True,
    "temperature": 0.5,
    "max_length": 20,
    "num_beams": 2,
    "cache": {"a": 1},
}


@examples
@given(content=changed(OWN))
def test_any_object_is_read(content, tmp_path):
    settings, _ = written(tmp_path, content, Words(eos_token_id=2, bos_token_id=1, pad_token_id=0), 7)
    assert 7 in settings["eos_token_id"]
    GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
