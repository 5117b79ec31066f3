"""From a text to token ids and labels, and the tokenizer with its `<image>`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_patch.data.prompts import IMAGE, Piece, read_template
from megatron_patch.data.sentence_piece import add_pieces, remove_last_piece
from megatron_patch.files import TOKENIZER, TOKENIZER_CONFIG

IGNORE = -100
"""Label of a position from which nothing is learned."""


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

    Raises ValueError, one line that names the folder, where transformers cannot read it, for whatever reason.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of nearly any class: what a damaged file makes it stumble over
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{source or folder}: its tokenizer is not readable ({why}); copy it again") from None


def install_tokenizer(
    source: Path, target: Path, added_tokens: Sequence[str] = (), vocab_size: int | None = None
) -> dict[str, int]:
    """Copy a language model's tokenizer to `target`, add `<image>` and others as special tokens, and return their ids.

    An id is the one that a token has already, or the next free one. The copy adds no beginning- or end-of-sequence
    token by itself, since prompts bring theirs. Its chat template is left behind. `vocab_size`: rows of the model's
    embedding. Raises ValueError when transformers does not read the copy as meant, or when words have no row.
    """
    source, target = Path(source), Path(target)
    files = [name for name in TOKENIZER if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        raise ValueError(f"{source}: neither tokenizer.json nor tokenizer.model; expected a tokenizer of transformers")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the source itself; give another folder")
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        # What another tokenizer left there would be read together with this one.
        (target / name).unlink(missing_ok=True)
        if name in files:
            shutil.copyfile(source / name, target / name)
    # As its own files say. (In the source's folder, transformers 5 takes another class for some kinds of config.json.)
    original = open_tokenizer(target, source)
    known = original.get_vocab()
    if vocab_size is not None:
        _check_rows(source, original, vocab_size, (IMAGE, *added_tokens))
    tokens: dict[str, int] = {}
    for token in (IMAGE, *added_tokens):
        tokens[token] = known.setdefault(token, max(known.values()) + 1)
    _edit_json(target / TOKENIZER_CONFIG, lambda config: _configured(config, tokens, "tokenizer.json" in files))
    if "tokenizer.json" in files:
        _edit_json(target / "tokenizer.json", lambda tokenizer: _extended(tokenizer, tokens))
    if "added_tokens.json" in files:
        _edit_json(target / "added_tokens.json", lambda table: {**table, **tokens})
    if "tokenizer.model" in files:
        add_pieces(target / "tokenizer.model", known)
    copy = load_tokenizer(target)
    plain = original("a", add_special_tokens=False).input_ids
    if copy("a").input_ids != plain or any(copy(f"a{token}b").input_ids.count(id) != 1 for token, id in tokens.items()):
        raise ValueError(
            f"{target}: transformers reads the copy of {source} otherwise than meant; use a fast tokenizer"
        )
    return tokens


def _check_rows(source: Path, tokenizer: Any, vocab_size: int, without: Sequence[str]) -> None:
    """Raise ValueError for words past the embedding's rows. Added tokens there, as many models of the hub have a
    padding token, are only named; those in `without` may lack one."""
    beyond = {token for token, id in tokenizer.get_vocab().items() if id >= vocab_size} - set(without)
    words = sorted(beyond - tokenizer.get_added_vocab().keys())
    if words:
        raise ValueError(
            f"{source}: {len(words)} words of its tokenizer, {words[0]!r} among them, are past the {vocab_size} rows "
            "of its model's embedding (vocab_size in config.json); give the model's own tokenizer"
        )
    if beyond:
        names = ", ".join(sorted(beyond))
        print(
            f"warning: {source}: the embedding has no row for {names}; --add-tokens gives such a token one",
            file=sys.stderr,
        )


def source_chat_template(source: Path) -> str | None:
    """A LLaVA's own chat template, for the copy of its tokenizer that `install_tokenizer` makes; None: it has none.

    Where the source's tokenizer adds a beginning of sequence, the template does it in its place.
    """
    tokenizer = open_tokenizer(source)
    template = read_template(source, tokenizer)
    if template is None:
        return None
    begins = bool(tokenizer.bos_token) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return "{{- bos_token -}}" + template if begins and "bos_token" not in template else template


def remove_image_token(folder: Path) -> None:
    """Take `<image>` out of a tokenizer that `install_tokenizer` made, for a language model that stands alone."""
    for name in (TOKENIZER_CONFIG, "tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        if (Path(folder) / name).is_file():
            _edit_json(Path(folder) / name, _without_image)
    if (Path(folder) / "tokenizer.model").is_file():
        remove_last_piece(Path(folder) / "tokenizer.model", IMAGE)


class Encoded(NamedTuple):
    """A text as the model takes it."""

    input_ids: Tensor
    """int64 [s], each picture as its number of placeholder ids."""
    labels: Tensor
    """int64 [s], shifted: labels[i] is the id that follows input_ids[i], `IGNORE` where nothing is learned."""
    num_images: int
    """Pictures in the input."""
    num_cut: int
    """Positions left out at the end."""


def encode(
    pieces: Sequence[Piece], tokenizer: Any, *, image_token_id: int, num_image_tokens: int, max_length: int
) -> Encoded:
    """Tokens of a text with each `<image>` as `num_image_tokens` placeholders, at most `max_length` positions.

    `pieces` come from a `Prompt` or from `document_pieces`. A longer text is cut at its end, before a picture that does
    not fit whole. Raises ValueError when that leaves nothing to be learned.
    """
    ids: list[int] = []
    learned: list[bool] = []
    text = ""
    for piece, is_learned in pieces:
        text += piece
        whole = tokenizer(text, add_special_tokens=False).input_ids
        # What the model is given when it answers must be what it saw in training, token by token.
        if whole[: len(ids)] != ids:
            raise ValueError(f"the first characters of {piece[:20]!r} merge with the last token before them")
        learned += [is_learned] * (len(whole) - len(ids))
        ids = whole
    # In Python, not torch, whose threads cost more than this work where several processes share the cores.
    tokens: list[int] = []
    targets: list[int] = []
    length = 0
    for token, is_learned in zip(ids, learned, strict=True):
        count = num_image_tokens if token == image_token_id else 1
        tokens += [token] * count
        targets += [token if is_learned else IGNORE] * count
        if len(tokens) <= max_length:
            length = len(tokens)
    length = min(length, len(tokens) - 1)  # the last token is a label alone
    input_ids = torch.tensor(tokens[:length], dtype=torch.int64)  # [s]
    labels = torch.tensor(targets[1 : length + 1], dtype=torch.int64)  # [s]
    if (labels == IGNORE).all():
        raise ValueError(
            f"no answer within {max_length} positions; raise --decoder-seq-length (the sample has {len(tokens) - 1})"
        )
    num_images = int((input_ids == image_token_id).sum()) // num_image_tokens
    return Encoded(input_ids, labels, num_images, len(tokens) - 1 - length)


def _edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(change(content), indent=2, ensure_ascii=False) + "\n")


def _without_image(value: Any) -> Any:
    """A tokenizer's settings without any mention of `<image>`; the vocabulary itself stays."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key != IMAGE and not _is_image(part)}
        return {key: part if key == "model" else _without_image(part) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_image(part) for part in value if part != IMAGE and not _is_image(part)]
    return value


def _is_image(token: Any) -> bool:
    return isinstance(token, dict) and token.get("content") == IMAGE


def _added_token(content: str) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **plain, "special": True}


def _configured(config: dict[str, Any], tokens: dict[str, int], has_tokenizer_json: bool) -> dict[str, Any]:
    """tokenizer_config.json with `tokens`, without what would add others to a prompt, without the chat template."""
    config = {name: value for name, value in config.items() if name != "chat_template"}
    config |= {"add_bos_token": False, "add_eos_token": False}
    # Two words of transformers 5 that 4 does not know; 5 knows 4's for them.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if has_tokenizer_json and "added_tokens_decoder" not in config:
        # transformers 5 leaves the table to tokenizer.json; one with a single entry would only mislead.
        return config
    added = {str(token_id): _added_token(token) for token, token_id in tokens.items()}
    return {**config, "added_tokens_decoder": {**config.get("added_tokens_decoder", {}), **added}}


def _extended(tokenizer: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """tokenizer.json with `tokens`, and without the beginning of sequence that its post-processor adds."""
    table = [token for token in tokenizer.get("added_tokens", []) if token["content"] not in tokens]
    table += [{"id": token_id, **_added_token(token)} for token, token_id in tokens.items()]
    table.sort(key=lambda token: token["id"])
    return {**tokenizer, "added_tokens": table, "post_processor": _adds_nothing(tokenizer.get("post_processor"))}


def _adds_nothing(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if processor and processor["type"] == "Sequence":
        return {**processor, "processors": [_adds_nothing(part) for part in processor["processors"]]}
    if processor and processor["type"] == "TemplateProcessing":
        kept = {name: [part for part in processor[name] if "Sequence" in part] for name in ("single", "pair")}
        return {**processor, **kept, "special_tokens": {}}
    return processor
