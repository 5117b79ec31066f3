"""The text of an export's README.md: names come from folders and files that others made."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.conversion.card import model_card
from tests.unit.config.test_train import LLAVA
from tests.unit.properties import few, json_values

FIELDS = ("language_model", "vision_tower", "projector", "added_tokens")


def rows(record):
    text = model_card(LLAVA, record, "bf16", None)
    lines = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return dict(line for line in lines if len(line) == 2)


def test_folders_of_the_machine_stay_out_of_it():
    record = {
        "language_model": "/home/me/models/Vicuna_7B-v1.5",
        "vision_tower": "clip/",
        "projector": "new, seed 1234",
    }
    found = rows({**record, "added_tokens": ["<im_start>", "<|x|>"]})
    assert found["Language model"] == "Vicuna_7B-v1.5"
    assert found["Vision tower"] == "clip"
    assert found["Projector at the start"] == "new, seed 1234"
    assert found["Tokens added"] == r"`<im_start>`, `<\|x\|>`"
    assert "home" not in model_card(LLAVA, record, "bf16", None)


def test_names_are_no_markup():
    name = "a\x1b[2Jb\n## c | d <script> [x](http://e) `f` <img>"
    found = rows({"language_model": name, "added_tokens": ["`<b>\n"]})
    assert found["Language model"] == "e) ?f? ?img?"
    assert found["Tokens added"] == "`?<b>?`"
    assert len(rows({})) == len(found)


@few
@given(record=st.fixed_dictionaries(dict.fromkeys(FIELDS, json_values)))
def test_any_record_gives_the_same_lines(record):
    text, plain = model_card(LLAVA, record, "bf16", None), model_card(LLAVA, {}, "bf16", None)
    assert len(text.splitlines()) == len(plain.splitlines())
    assert all(character.isprintable() or character == "\n" for character in text)
