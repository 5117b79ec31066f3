"""Tokens added to a real tokenizer.model, with sentencepiece and transformers as judges."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from megatron_patch.data.sentence_piece import add_pieces, remove_last_piece, tokenizer_json
from megatron_patch.data.tokenizer_files import install_tokenizer, remove_image_token
from tests.unit.properties import damaged, examples, in_one_line

MODEL = "data/mistral_instruct_tokenizer_240323.model.v3"  # Mistral-7B-Instruct-v0.3's, 32,768 pieces
NAMES = ["<image>", "<im_start>", "<im_end>"]


@pytest.fixture
def source(tmp_path) -> Path:
    """What knows nothing but tokenizer.model."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((files("mistral_common") / MODEL).read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pieces(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_sentencepiece_knows_added_tokens_by_their_ids(source, tmp_path):
    ids = install_tokenizer(source, tmp_path / "copy", NAMES[1:])
    before, after = pieces(source), pieces(tmp_path / "copy")
    assert list(ids.values()) == list(range(32768, 32771)) == [after.piece_to_id(name) for name in NAMES]
    assert after.encode("a<im_start><image>b").count(32768) == 1
    assert before.piece_to_id("<image>") == before.unk_id()
    text = "A photograph of 3 dogs, [INST] 漢字 and more."
    assert after.encode(text) == before.encode(text)
    assert after.decode(after.encode(text + "<im_end>")) == text + "<im_end>"


def test_transformers_reads_them_where_nothing_else_says_them(source, tmp_path):
    """Without tokenizer_config.json's table of added tokens."""
    install_tokenizer(source, tmp_path / "copy", NAMES[1:])
    (tmp_path / "copy" / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer.convert_tokens_to_ids(NAMES) == list(range(32768, 32771))
    assert len(tokenizer) == 32771


def test_ids_that_other_files_gave_away_are_kept(source, tmp_path):
    """As in Vicuna's: a token after the pieces, known to added_tokens.json alone. A gap becomes an unused piece."""
    path = source / "tokenizer.model"
    known = {"<pad>": 32768, "<image>": 32770}
    assert add_pieces(path, known)
    model = pieces(source)
    assert {name: model.piece_to_id(name) for name in known} == known
    assert model.is_unused(32769)
    assert not model.is_unused(32768)


@pytest.mark.parametrize("id", [2_000_000, 4_000_000_000])
def test_an_id_far_beyond_all_tokens_is_refused(source, id):
    before = (source / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match=rf"tokenizer.model: '<image>' has id {id}; expected at most \d+"):
        add_pieces(source / "tokenizer.model", {"<image>": id})
    assert (source / "tokenizer.model").read_bytes() == before


def test_it_can_be_taken_out_again(source, tmp_path):
    install_tokenizer(source, tmp_path / "copy")
    remove_image_token(tmp_path / "copy")
    assert pieces(tmp_path / "copy").vocab_size() == 32768
    remove_last_piece(source / "tokenizer.model", "<image>")
    assert pieces(source).vocab_size() == 32768


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\xff\xff\xff"])
def test_a_file_that_is_no_model_stays(tmp_path, content):
    """tiktoken's files have the same name."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert not add_pieces(path, {"<image>": 3})
    assert path.read_bytes() == content


def test_a_model_of_other_ids_stays(source):
    before = (source / "tokenizer.model").read_bytes()
    assert not add_pieces(source / "tokenizer.model", {"other": 5, "<image>": 32768})
    assert (source / "tokenizer.model").read_bytes() == before


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> bytes:
    """A model of few pieces."""
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words, and a few more of them", "for x in y: return {1: 2}"] * 5),
        model_writer=made,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return made.getvalue()


@examples
@given(data=st.data())
def test_any_tokenizer_model_is_in_one_line_in_one_line(data, few, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.draw(damaged(few) | st.binary(max_size=40)))
    in_one_line(lambda: tokenizer_json(path, legacy=False), path)


def test_a_model_that_cuts_otherwise_than_its_copy_is_refused(few, tmp_path):
    model = ModelProto()
    model.ParseFromString(few)
    model.trainer_spec.treat_whitespace_as_suffix = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"would be cut otherwise than by SentencePiece; give the model's tokenizer"):
        tokenizer_json(tmp_path / "tokenizer.model", legacy=False)


def test_pieces_too_long_to_be_anyones_are_refused(few, tmp_path):
    model = ModelProto()
    model.ParseFromString(few)
    model.pieces.add(piece="x" * 20_000, score=-1.0)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"its pieces are longer than any model's"):
        tokenizer_json(tmp_path / "tokenizer.model", legacy=False)
