"""The copy of a tokenizer that training and the export read: nothing in it changes a prompt, batches can be padded."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing
from transformers import AutoTokenizer

from megatron_patch.data import tokenizer_files
from megatron_patch.data.prompts import blank_after_bos, document_pieces, prompt_format
from megatron_patch.data.tokenize import load_tokenizer, open_tokenizer
from megatron_patch.data.tokenizer_files import complete_tokenizer, install_tokenizer
from tests.unit.data.samples import but_in_transformers_4
from tests.unit.data.tokenizers import mistral_v3, tiny
from tests.unit.properties import changed, damaged, examples, few, in_one_line

LONG = "What is it that you see in this picture of mine, please, and what else is there besides? " * 3
TEXTS = (
    *("one blank between words", "And  what else?", "1.  First\n2.  Second", "a      b", "x ", "日本語 テスト 😀👩‍💻"),
    *("def f(x):\n    if x:\n        return  {1: [2]}\n", "| a | b |\n|---|---|\n", "\t\tx\r\n", "naïve Ünï ﬁ ½"),
)


def edit(path, **new):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **new}))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with tokenizer.model alone, and its copy."""
    folder = tmp_path_factory.mktemp("pieces")
    mistral_v3(folder / "source")
    install_tokenizer(folder / "source", folder / "copy")
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_model_alone_is_cut_as_sentencepiece_does(text, pieces):
    judge = SentencePieceProcessor(model_file=str(pieces / "source" / "tokenizer.model"))
    tokenizer = load_tokenizer(pieces / "copy")
    wanted = judge.encode(text)
    assert tokenizer(text).input_ids == wanted
    # After a token, where a prompt's texts stand; SentencePiece's own blank is the one that the prompt has there.
    assert tokenizer(f"[/INST] {text}").input_ids == [4, *wanted]
    # After a beginning of sequence, which a tokenizer adds to what it has cut.
    blank = blank_after_bos(tokenizer, text)
    assert (blank, tokenizer(f"<s>{blank}{text}").input_ids) == (" ", [1, *wanted])


@pytest.mark.parametrize(
    ("name", "words"), [("v1", ["<s>", "▁A", "▁chat"]), ("llama_2", ["<s>", "[INST]"]), ("mistral", ["<s>", "[INST]"])]
)
def test_the_first_word_of_a_prompt(name, words, pieces):
    tokenizer = load_tokenizer(pieces / "copy")
    (first, _), *_ = prompt_format(name, tokenizer).pieces([("What?", "That.")])
    assert tokenizer.convert_ids_to_tokens(tokenizer(first).input_ids)[: len(words)] == words


def test_a_caption_without_a_picture_begins_as_a_text_does(pieces):
    tokenizer = load_tokenizer(pieces / "copy")
    text = "".join(piece for piece, _ in prompt_format("plain", tokenizer).pieces([("", "Red.")]))
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<s>", "▁Red", ".", "</s>"]


def test_a_document_begins_as_a_text_does(pieces):
    tokenizer = load_tokenizer(pieces / "copy")
    text = "".join(piece for piece, _ in document_pieces(["Red.", b"picture"], tokenizer))
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == ["<s>", "▁Red", ".", "<image>", "</s>"]


@pytest.mark.parametrize("legacy", [False, True])
def test_words_behind_a_token_have_a_blank_in_old_tokenizers_alone(legacy, tmp_path):
    source = mistral_v3(tmp_path / "source")
    edit(source / "tokenizer_config.json", legacy=legacy)
    install_tokenizer(source, tmp_path / "copy")
    tokenizer = load_tokenizer(tmp_path / "copy")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Red[/INST]Red").input_ids)
    assert tokens == ["▁Red", "[/INST]", "▁Red" if legacy else "Red"]


BERT = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}
STATES = {
    "truncation": (
        {"truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}},
        {},
    ),
    "padding": (
        {
            "padding": {
                "strategy": {"Fixed": 400},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            }
        },
        {},
    ),
    "a post-processor BertProcessing": ({"post_processor": BERT}, {}),
    "split_special_tokens": ({}, {"split_special_tokens": True}),
    "": (
        {},
        {
            "model_max_length": None,
            "add_eos_token": True,
            "max_length": 9,
            "truncation": True,
            "from_slow": True,
            "stride": 2,
        },
    ),
}


@pytest.mark.parametrize("said", but_in_transformers_4(STATES, ""))
def test_state_that_would_change_a_prompt_is_left_out(said, tmp_path, capsys):
    plain, source = tiny(tmp_path / "plain"), tiny(tmp_path / "source")
    backend, config = STATES[said]
    edit(source / "tokenizer.json", **backend)
    edit(source / "tokenizer_config.json", **config)
    install_tokenizer(plain, tmp_path / "right")
    assert capsys.readouterr().err == ""
    install_tokenizer(source, tmp_path / "copy")
    warning = capsys.readouterr().err
    assert warning.count("\n") == bool(said)
    assert f"its tokenizer has {said} switched on" in warning or not said
    text = f"<s>{LONG}<image></s>"
    assert load_tokenizer(tmp_path / "copy")(text).input_ids == load_tokenizer(tmp_path / "right")(text).input_ids
    # Without transformers, which switches some of it off itself.
    plain, copy = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("right", "copy"))
    assert copy.encode(text).ids == plain.encode(text).ids


def test_dropout_is_left_out(tmp_path, capsys):
    source = tiny(tmp_path / "source")
    content = json.loads((source / "tokenizer.json").read_text())
    edit(source / "tokenizer.json", model={**content["model"], "dropout": 0.9})
    install_tokenizer(source, tmp_path / "copy")
    assert "dropout" in capsys.readouterr().err
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert len({tuple(tokenizer(LONG).input_ids) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("named", "pad"),
    [({}, "</s>"), ({"unk_token": "<unk>"}, "<unk>"), ({"pad_token": "<|eot_id|>"}, "<|eot_id|>")],
)
def test_a_batch_is_padded_on_the_left(named, pad, tmp_path):
    source = tiny(tmp_path / "source")
    edit(source / "tokenizer_config.json", **{"unk_token": None, "pad_token": None, **named}, padding_side="right")
    install_tokenizer(source, tmp_path / "copy")
    tokenizer = load_tokenizer(tmp_path / "copy")
    batch = tokenizer(["a", "bcd"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    # What transformers 4 would make besides, generate() refuses.
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == list(batch)
    assert batch.attention_mask == [[0, 0, 1], [1, 1, 1]]
    assert (tokenizer.pad_token, batch.input_ids[0][0]) == (pad, tokenizer.convert_tokens_to_ids(pad))


def test_a_padding_token_without_a_row_is_not_used(tmp_path, capsys):
    source = tiny(tmp_path / "source")
    edit(source / "tokenizer_config.json", pad_token="[PAD]", unk_token="<unk>")
    ids = install_tokenizer(source, tmp_path / "copy", vocab_size=300)
    assert "no row for [PAD]" in capsys.readouterr().err
    tokenizer = load_tokenizer(tmp_path / "copy")
    assert tokenizer.pad_token == "<unk>"
    # The tokens keep their ids, though tokenizer.json alone did not say the first.
    assert (tokenizer.convert_tokens_to_ids("[PAD]"), ids["<image>"]) == (300, 301)


@pytest.mark.transformers_5
def test_nothing_of_a_folder_is_run_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    source = tiny(tmp_path / "source")
    (source / "mine.py").write_text("raise SystemExit('code of the folder has run')")
    edit(
        source / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    )
    edit(source / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    install_tokenizer(source, tmp_path / "copy")
    assert "auto_map" not in (tmp_path / "copy" / "tokenizer_config.json").read_text()


def test_a_folder_that_is_opened_as_it_is_runs_nothing_either(tmp_path, monkeypatch):
    source, ran, asked = tiny(tmp_path / "source"), tmp_path / "ran", []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("whether it may") or "n")
    (source / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit(source / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "mine.Mine"]})
    with contextlib.suppress(ValueError):
        open_tokenizer(source)
    assert not ran.exists()
    assert asked == []


def test_a_copy_that_an_earlier_version_made_keeps_its_ids(pieces, tmp_path):
    """It has no tokenizer.json, so transformers 5 made one of its own."""
    old = tmp_path / "old"
    old.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(pieces / "source" / name, old / name)
    token = {"content": "<image>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    edit(old / "tokenizer_config.json", added_tokens_decoder={"32768": token}, chat_template=None)
    edit(old / "tokenizer_config.json", add_bos_token=False, padding_side="right")
    before = load_tokenizer(old)("And  what else?").input_ids
    complete_tokenizer(old, 32832)
    tokenizer = AutoTokenizer.from_pretrained(old)
    assert tokenizer("And  what else?").input_ids == before
    assert tokenizer.padding_side == "left"


def _damage(folder, name, content, source):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder / "source")
    (folder / "source" / name).write_bytes(content)
    in_one_line(lambda: install_tokenizer(folder / "source", folder / "copy"), folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("small") / "source")


CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "pad_token": {"content": "</s>"},
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
    "model_max_length": 9,
    "legacy": True,
    "additional_special_tokens": ["<s>"],
    "extra_special_tokens": {"image_token": "<s>"},
    "padding_side": "left",
    "chat_template": [{"name": "default", "template": "x"}],
}


@examples
@given(content=changed(CONFIG), name=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json"]))
def test_any_settings_are_in_one_line_in_one_line(content, name, small, tmp_path):
    _damage(tmp_path / "damaged", name, json.dumps(content).encode(), small)


@few
@given(data=st.data())
def test_any_tokenizer_json_is_in_one_line_in_one_line(data, small, tmp_path):
    whole = json.loads((small / "tokenizer.json").read_text())
    content = data.draw(
        changed(whole).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(whole).encode())
    )
    _damage(tmp_path / "damaged", "tokenizer.json", content, small)


@pytest.mark.parametrize("otherwise", ["ids", "a beginning", "a token in pieces"])
def test_a_copy_that_is_read_otherwise_than_meant_is_refused(otherwise, small, tmp_path, monkeypatch):
    """As a transformers to come may do, which takes another class for a folder or reads settings that are none now."""
    load = tokenizer_files.load_tokenizer

    def read(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        if otherwise == "ids":
            vocab = content["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        elif otherwise == "a token in pieces":
            content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<new>"]
        edit(folder / "tokenizer.json", **content)
        tokenizer = load(folder)
        if otherwise == "a beginning":
            tokenizer.backend_tokenizer.post_processor = BertProcessing(("</s>", 2), ("<s>", 1))
        return tokenizer

    monkeypatch.setattr(tokenizer_files, "load_tokenizer", read)
    with pytest.raises(ValueError, match=r"copy: transformers reads the copy of .*source otherwise than meant"):
        install_tokenizer(small, tmp_path / "copy", ["<new>"])


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_blank_before_the_first_token_stays(in_sequence, tmp_path):
    """transformers 4 writes its setting over the pre-tokenizer's own."""
    source = tiny(tmp_path / "source")
    splitter = {**json.loads((source / "tokenizer.json").read_text())["pre_tokenizer"], "add_prefix_space": True}
    together = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, splitter]}
    edit(source / "tokenizer.json", pre_tokenizer=together if in_sequence else splitter)
    install_tokenizer(source, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["add_prefix_space"] is True
    expected = Tokenizer.from_file(str(source / "tokenizer.json")).encode("a cat").ids
    assert load_tokenizer(tmp_path / "copy")("a cat").input_ids == expected


@pytest.mark.parametrize("name", ["model_max_length", "clean_up_tokenization_spaces"])
def test_a_setting_of_another_type_is_refused(name, small, tmp_path):
    source = shutil.copytree(small, tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, name: "long"}))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {name} is \"long\"; expected "):
        install_tokenizer(source, tmp_path / "copy")
