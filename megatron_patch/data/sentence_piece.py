"""SentencePiece's `tokenizer.model`: as a tokenizer.json that cuts text as it does, and with tokens added to it.

It is a protobuf of pieces, whose ids are their places (sentencepiece_model.proto in google/sentencepiece).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import normalizers as normal

UNIGRAM, BPE = 1, 2
KINDS = ModelProto.SentencePiece
BLANK = "▁"
"""What SentencePiece writes for a blank."""
MOST_SPLITS = 200_000_000
"""Sum of the squares of the pieces' lengths: 32,768 of Mistral's have 2 million."""
MOST_UNUSED = 100_000
"""Ids without a token between a model's pieces and those that were added."""
PROBES = (
    "The quick brown fox, 3.14 and 2024!",
    "if x:\n    return  {'a': [1, 2]}\n\n\tpass  # ok",
    "1.  First\n2.  Second\n- a      b\n| a | b |\n|---|---|\n",
    "日本語と中文 한국어 naïve Ünï 😀👩‍💻 ",
)
"""Code, lists, tables, other scripts: what a copy must cut as SentencePiece does."""


def tokenizer_json(path: Path, *, legacy: bool) -> dict[str, Any] | None:
    """A tokenizer.json that cuts text as SentencePiece does with the model at `path`; None: that is no such model.

    As the converter of transformers 4.57 makes it: merges in the order of the pieces' scores (that of transformers 5
    has them in the order of ids, which cuts runs of blanks otherwise). `legacy`: text after any special token gets
    SentencePiece's blank as at the beginning. Without it, a text that begins with blanks gets no further one, as in
    transformers' fast tokenizers. Raises ValueError, one line, for a model that it cannot tell.
    """
    model = _read(path)
    if model is None:
        return None
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if sum(len(piece) ** 2 for piece, _ in pieces) > MOST_SPLITS:
        raise ValueError(f"{path}: its pieces are longer than any model's; copy it again")
    trainer, rules = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise ValueError(f"{path}: a SentencePiece model of words or characters; give a tokenizer.json")
    try:
        if trainer.model_type == UNIGRAM:
            kind = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
        else:
            ids = {piece: id for id, (piece, _) in enumerate(pieces)}
            unknown = trainer.unk_piece if trainer.unk_piece in ids else None
            kind = models.BPE(
                ids, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
            )
        tokenizer = Tokenizer(kind)
        prefix = rules.add_dummy_prefix
        steps = [normal.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    except Exception as error:  # of tokenizers: plain ones
        raise ValueError(
            f"{path}: SentencePiece's model cannot be used ({_line(error)}); give a tokenizer.json"
        ) from None
    if rules.remove_extra_whitespaces:
        steps += [normal.Strip(left=True, right=True), normal.Replace(Regex(" {2,}"), " ")]
    if legacy:
        steps += [normal.Prepend(BLANK)] if prefix else []
        steps += [normal.Replace(" ", BLANK)]
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme=scheme, split=False)
    tokenizer.normalizer = normal.Sequence(steps) if steps else None
    last = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    own = [piece for piece in model.pieces if piece.type in (KINDS.CONTROL, KINDS.USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(piece.piece, normalized=False, special=piece.type == KINDS.CONTROL) for piece in own]
    )
    _compare(path, tokenizer)
    return json.loads(tokenizer.to_str())


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best-scored result first, as SentencePiece joins them."""
    scores = {piece.piece: piece.score for piece in model.pieces}
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    merges: list[tuple[str, str, float]] = []
    for piece, score in scores.items():
        pairs = [(piece[:place], piece[place:]) for place in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += [(*pair, score) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]


def _compare(path: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the copy cuts one of `PROBES` otherwise than SentencePiece does."""
    try:
        judge = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: SentencePiece does not read it ({_line(error)}); copy it again") from None
    for text in PROBES:
        if tokenizer.encode(text, add_special_tokens=False).ids != judge.encode(text):
            raise ValueError(
                f"{path}: {text[:30]!r} would be cut otherwise than by SentencePiece; give the model's tokenizer.json"
            )


def add_pieces(path: Path, vocab: Mapping[str, int]) -> bool:
    """Append the tokens of `vocab` (token -> id) that lie after the last piece, each found whole in a text.

    Ids between that are no token's become pieces that are never used. Returns False, and changes nothing, where the
    file is no SentencePiece model (tiktoken's has the same name) or `vocab` has other tokens for its ids. Raises
    ValueError for an id that is far beyond all tokens.
    """
    model = _read(path)
    if model is None:
        return False
    tokens = {id: token for token, id in vocab.items()}
    if any(tokens.get(id, piece.piece) != piece.piece for id, piece in enumerate(model.pieces)):
        return False
    last = max(tokens, default=0)
    if last > (most := 2 * (len(model.pieces) + len(tokens)) + MOST_UNUSED):
        raise ValueError(f"{path}: {tokens[last][:100]!r} has id {last}; expected at most {most}")
    for id in range(len(model.pieces), last + 1):
        kind = KINDS.USER_DEFINED if id in tokens else KINDS.UNUSED
        model.pieces.add(piece=tokens.get(id, f"<unused {id}>"), score=0.0, type=kind)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())
    return True


def remove_last_piece(path: Path, token: str) -> None:
    """Take out a token that `add_pieces` appended, unless others follow it."""
    model = _read(path)
    if model is not None and model.pieces and model.pieces[-1].piece == token:
        del model.pieces[-1]
        model.trainer_spec.vocab_size = len(model.pieces)
        path.write_bytes(model.SerializeToString())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]


def _read(path: Path) -> ModelProto | None:
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces else None
