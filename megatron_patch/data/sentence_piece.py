"""SentencePiece's `tokenizer.model` with tokens added, for whatever reads no other file of a tokenizer.

It is a protobuf of pieces, whose ids are their places (sentencepiece_model.proto in google/sentencepiece).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto


def add_pieces(path: Path, vocab: Mapping[str, int]) -> bool:
    """Append the tokens of `vocab` (token -> id) that lie behind the last piece, each found whole in a text.

    Ids between that are no token's become pieces that are never used. Returns False, and changes nothing, where the
    file is no SentencePiece model (tiktoken's has the same name) or `vocab` has other tokens for its ids.
    """
    model = _read(path)
    if model is None:
        return False
    tokens = {id: token for token, id in vocab.items()}
    if any(tokens.get(id, piece.piece) != piece.piece for id, piece in enumerate(model.pieces)):
        return False
    kinds = ModelProto.SentencePiece
    for id in range(len(model.pieces), max(tokens) + 1):
        kind = kinds.USER_DEFINED if id in tokens else kinds.UNUSED
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


def _read(path: Path) -> ModelProto | None:
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return model if model.pieces else None
