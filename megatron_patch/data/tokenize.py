"""From a text to token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_patch.data.prompt_formats import IMAGE, Piece
from megatron_patch.files.json_object import read_json
from megatron_patch.files.names import CONFIG, TOKENIZER_CONFIG

INSTALLED = "PreTrainedTokenizerFast"
"""The class of tokenizers that `install_tokenizer` writes."""
IGNORE = -100
"""At a position without a label."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder that describes the model. Raises ValueError when it, or its `<image>`, is missing."""
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder}: neither tokenizer.json nor tokenizer.model; expected the model's tokenizer")
    tokenizer = open_tokenizer(folder)
    if tokenizer(IMAGE, add_special_tokens=False).input_ids != [tokenizer.convert_tokens_to_ids(IMAGE)]:
        raise ValueError(f"{folder}: {IMAGE} is not one token; expected a folder that the converter wrote")
    return tokenizer


def open_tokenizer(folder: Path, source: Path | None = None) -> Any:
    """transformers' tokenizer of a folder. `source`: where its files come from, for the message.

    No code of the folder runs, and nobody is asked whether it may. Raises ValueError, one line that names the folder,
    where transformers cannot read it, for whatever reason.
    """
    try:
        if _is_of_known_class(Path(folder)):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except KeyboardInterrupt:
        raise
    except (
        BaseException
    ) as error:  # of nearly any class: what a damaged file makes it, or a library in Rust, stumble over
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{source or folder}: its tokenizer is not readable ({why}); copy it again") from None


def _is_of_known_class(folder: Path) -> bool:
    """Whether AutoTokenizer would take `INSTALLED`. For its answer it imports two seconds of models."""
    if not all((folder / name).is_file() for name in ("tokenizer.json", TOKENIZER_CONFIG)):
        return False
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") != "llava":
        return False  # transformers 5 takes another class for some models, whatever the tokenizer says
    return read_json(folder / TOKENIZER_CONFIG).get("tokenizer_class") == INSTALLED


class Encoded(NamedTuple):
    """A text as the model takes it."""

    input_ids: Tensor
    """int64 [s], each image as its number of placeholder ids."""
    labels: Tensor
    """int64 [s], shifted: labels[i] is the id that follows input_ids[i], `IGNORE` where there is no label."""
    num_images: int
    """Images in the input."""
    num_truncated: int
    """Positions left out at the end, as far as the text was read: 0 only where it is whole."""


def encode(
    pieces: Iterable[Piece], tokenizer: Any, *, image_token_id: int, num_image_tokens: int, max_length: int
) -> Encoded:
    """Tokens of a text with each `<image>` as `num_image_tokens` placeholders, at most `max_length` positions.

    `pieces` come from a `Prompt` or from `document_pieces`; no more of them are taken than the positions need. A longer
    text is truncated, before an image that does not fit whole. Raises ValueError when that leaves nothing to be
    labelled.
    """
    ids: list[int] = []
    labelled: list[bool] = []
    kept, text = 0, ""  # `text` begins with token `kept`: what is before it stays as it is
    num_positions = 0
    apart = _tokens_apart(tokenizer)
    for piece, is_labelled in pieces:
        text += piece
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        new = whole.input_ids
        # What the model is given when it answers must be what it saw in training, token by token.
        if new[: len(ids) - kept] != ids[kept:]:
            raise ValueError(f"the first characters of {piece[:20]!r} merge with the last token before them")
        added = new[len(ids) - kept :]
        num_positions += len(added) + added.count(image_token_id) * (num_image_tokens - 1)
        labelled += [is_labelled] * len(added)
        ids += added
        if num_positions > max_length + 1:
            break
        last = next((place for place in range(len(new) - 1, 0, -1) if new[place] in apart), 0)
        kept, text = kept + last, text[whole.offset_mapping[last][0] :] if last else text
    # In Python, not torch, whose threads cost more than this work where several processes share the cores.
    tokens: list[int] = []
    targets: list[int] = []
    length = 0
    for token, is_labelled in zip(ids, labelled, strict=True):
        count = num_image_tokens if token == image_token_id else 1
        tokens += [token] * count
        targets += [token if is_labelled else IGNORE] * count
        if len(tokens) <= max_length:
            length = len(tokens)
    length = min(length, len(tokens) - 1)  # the last token is a label alone
    input_ids = torch.tensor(tokens[:length], dtype=torch.int64)  # [s]
    labels = torch.tensor(targets[1 : length + 1], dtype=torch.int64)  # [s]
    if (labels == IGNORE).all():
        raise ValueError(
            f"no answer within {max_length} positions; raise --decoder-seq-length (the sample has {len(tokens) - 1}"
            f"{' or more' if len(tokens) - 1 > max_length else ''})"
        )
    num_images = int((input_ids == image_token_id).sum()) // num_image_tokens
    return Encoded(input_ids, labels, num_images, len(tokens) - 1 - length)


def _tokens_apart(tokenizer: Any) -> set[int]:
    """Ids of tokens at which a text may be split: what stands before one has no say in the tokens from there on."""
    return {
        id
        for id, token in tokenizer.added_tokens_decoder.items()
        if not (token.normalized or token.single_word or token.lstrip or token.rstrip)
    }
