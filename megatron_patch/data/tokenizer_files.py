"""A model's tokenizer copied for training and export: one that gives the same ids wherever it is read.

What transformers 4.57 and 5 (and vLLM through them) both take as it stands is a tokenizer.json with the class
PreTrainedTokenizerFast; other classes are made again by one of them from a vocabulary, by rules of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_patch.data.prompt_formats import IMAGE
from megatron_patch.data.prompts import blank_after_bos, chat_template, find_format
from megatron_patch.data.sentence_piece import add_pieces, remove_last_piece, tokenizer_json
from megatron_patch.data.templates import read_template
from megatron_patch.data.tokenize import INSTALLED, load_tokenizer, open_tokenizer
from megatron_patch.files.names import TOKENIZER, TOKENIZER_CONFIG

BACKEND = "tokenizer.json"
PIECES = "tokenizer.model"
KEPT = {"model_max_length": (int | float, "a number"), "clean_up_tokenization_spaces": (bool, "true or false")}
"""Of tokenizer_config.json: what neither names a token nor a class, and changes no prompt; and its types."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
PADDING = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")
"""What models call it, where the tokenizer does not say which it is."""


def install_tokenizer(
    source: Path, target: Path, added_tokens: Sequence[str] = (), vocab_size: int | None = None
) -> dict[str, int]:
    """Copy a language model's tokenizer to `target`, add `<image>` and others as special tokens, and return their ids.

    An id is the one that a token has already, or the next free one. The copy adds no beginning- or end-of-sequence
    token by itself, since prompts bring theirs; it cuts nothing off and pads on the left, with a token that it names.
    What it leaves out that would change a prompt is said in a line. Its chat template is left behind. `vocab_size`:
    rows of the model's embedding. Raises ValueError when transformers does not read the copy as meant, or when tokens
    have no row.
    """
    return _install(Path(source), Path(target), added_tokens, vocab_size, None)


def _install(
    source: Path, target: Path, added_tokens: Sequence[str], vocab_size: int | None, rows: int | None
) -> dict[str, int]:
    """`rows`: as `vocab_size`, for a tokenizer whose tokens were compared with it before."""
    files = [name for name in TOKENIZER if (source / name).is_file()]
    if not {BACKEND, PIECES} & set(files):
        raise ValueError(f"{source}: neither tokenizer.json nor tokenizer.model; expected a tokenizer of transformers")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the source itself; give another folder")
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        # What another tokenizer left there would be read together with this one.
        (target / name).unlink(missing_ok=True)
        if name in files:
            shutil.copyfile(source / name, target / name)
    config = _object(source, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in files else {}
    for name, (kind, expected) in KEPT.items():
        if not isinstance(config.get(name), kind | None):
            given = json.dumps(config[name])[:60]
            raise ValueError(f"{source / TOKENIZER_CONFIG}: {name} is {given}; expected {expected}")
    config = {name: value for name, value in config.items() if name not in ("auto_map", "chat_template")}
    _write(target / TOKENIZER_CONFIG, config)
    if BACKEND not in files:
        backend = tokenizer_json(source / PIECES, legacy=config.get("legacy") is True)
        if backend is not None:  # else tiktoken's, which has the same name
            _write(target / BACKEND, backend)
    # As its own files say. (In the source's folder, transformers 5 takes another class for some kinds of config.json.)
    original = open_tokenizer(target, source) if "tokenizer_class" in config else open_tokenizer(source)
    if not (target / BACKEND).is_file():
        original.backend_tokenizer.save(str(target / BACKEND))
    known = original.get_vocab()
    if vocab_size is not None:
        _check_rows(source, original, vocab_size, (IMAGE, *added_tokens))
    tokens: dict[str, int] = {}
    for token in (IMAGE, *added_tokens):
        tokens[token] = known.setdefault(token, max(known.values()) + 1)
    backend, left_out = _backend(_object(target, BACKEND, source), original, tokens)
    if config.get("split_special_tokens"):
        left_out.append("split_special_tokens")
    if left_out:
        print(
            f"warning: {source}: its tokenizer has {', '.join(left_out)} switched on, which would change prompts; the "
            "copy has not",
            file=sys.stderr,
        )
    rows = max([rows or vocab_size or len(known), *(id + 1 for id in tokens.values() if id != tokens[IMAGE])])
    _write(target / BACKEND, backend)
    _write(target / TOKENIZER_CONFIG, _configured(config, original, backend, rows))
    for name in set(TOKENIZER) - {BACKEND, PIECES, TOKENIZER_CONFIG}:
        (target / name).unlink(missing_ok=True)  # said in the two files
    if PIECES in files:
        add_pieces(target / PIECES, known)
    _check_copy(source, target, original, tokens)
    return tokens


def _check_copy(source: Path, target: Path, original: Any, tokens: dict[str, int]) -> None:
    """Raise ValueError where the copy has other ids than meant."""
    copy = load_tokenizer(target)
    names = [name for name in original.get_vocab() if name not in tokens]
    same = copy.convert_tokens_to_ids(names) == original.convert_tokens_to_ids(names)
    plain = copy.backend_tokenizer.encode("a", add_special_tokens=False).ids
    if (
        not same
        or copy("a").input_ids != plain
        or any(copy(f"a{token}b").input_ids.count(id) != 1 for token, id in tokens.items())
    ):
        raise ValueError(
            f"{target}: transformers reads the copy of {source} otherwise than meant; use a fast tokenizer"
        )


def _check_rows(source: Path, tokenizer: Any, vocab_size: int, without: Sequence[str]) -> None:
    """Raise ValueError for tokens past the embedding's rows. Added tokens there, as many models of the hub have a
    padding token, are only named; those in `without` may lack one."""
    beyond = {token for token, id in tokenizer.get_vocab().items() if id >= vocab_size} - set(without)
    missing = sorted(beyond - tokenizer.get_added_vocab().keys())
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} tokens of its tokenizer, {missing[0]!r} among them, are past the "
            f"{vocab_size} rows of its model's embedding (vocab_size in config.json); give the model's own tokenizer"
        )
    if beyond:
        names = ", ".join(sorted(beyond))
        print(
            f"warning: {source}: the embedding has no row for {names}; --add-tokens gives such a token one",
            file=sys.stderr,
        )


def source_chat_template(source: Path, copy: Any) -> str | None:
    """A LLaVA's own chat template, for the copy of its tokenizer that `install_tokenizer` made; None: it has none.

    Where the source's tokenizer adds a beginning of sequence, the template does it in its place.
    """
    tokenizer = open_tokenizer(source)
    template = read_template(source, tokenizer)
    if template is None:
        return None
    begins = bool(tokenizer.bos_token) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    if not begins or "bos_token" in template:
        return template
    begin = f"bos_token + {json.dumps(' ')}" if blank_after_bos(copy, "A") else "bos_token"
    return f"{{{{- {begin} -}}}}{template}"


def template_for(name: str, source: Path, folder: Path, family: str, *, own: bool = False) -> str:
    """The chat template that goes with the tokenizer in `folder`, for the prompt format `name`.

    `source`: what says which format auto is. `own`: that has a whole LLaVA's, which stays.
    """
    copy = load_tokenizer(folder)
    template = source_chat_template(source, copy) if own else None
    if template is not None:
        return template
    return chat_template(find_format(name, source, family), source, copy)


def complete_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bring a tokenizer that an earlier version of `install_tokenizer` wrote into a folder to what this one writes.

    Its ids stay those that training had. `vocab_size`: rows of the exported embedding.
    """
    if not (Path(folder) / BACKEND).is_file():
        load_tokenizer(folder).backend_tokenizer.save(str(Path(folder) / BACKEND))
    with TemporaryDirectory() as copy:
        _install(Path(folder), Path(copy) / "tokenizer", (), None, vocab_size)
        for name in TOKENIZER:
            (Path(folder) / name).unlink(missing_ok=True)
            if (Path(copy) / "tokenizer" / name).is_file():
                shutil.copyfile(Path(copy) / "tokenizer" / name, Path(folder) / name)


def remove_image_token(folder: Path) -> None:
    """Take `<image>` out of a tokenizer that `install_tokenizer` made, for a language model that stands alone."""
    for name in (TOKENIZER_CONFIG, BACKEND):
        if (Path(folder) / name).is_file():
            _write(Path(folder) / name, _without_image(_object(folder, name)))
    if (Path(folder) / PIECES).is_file():
        remove_last_piece(Path(folder) / PIECES, IMAGE)


def _object(folder: Path, name: str, source: Path | None = None) -> dict[str, Any]:
    """A json file that holds an object. `source`: where it comes from, for the message. Raises ValueError, one line."""
    try:
        content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{(source or folder) / name}: not valid json ({error!s:.100}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{(source or folder) / name}: holds a {type(content).__name__}; expected an object")
    return content


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _added_token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **plain, "special": True, **flags}


def _backend(backend: dict[str, Any], original: Any, tokens: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.json with `tokens` and all that `original` adds to it; and what was taken out that changes a prompt."""
    table = {token["content"]: token for token in backend.get("added_tokens") or []}
    for id, token in original.added_tokens_decoder.items():
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        own = {flag: getattr(token, flag) for flag in flags}
        table.setdefault(token.content, {"id": id, **_added_token(token.content, **own)})
    for token, id in tokens.items():
        table[token] = {"id": id, **_added_token(token)}
    left_out = [name for name in ("truncation", "padding") if backend.get(name) is not None]
    model = dict(backend["model"])
    if model.get("dropout"):
        left_out.append("dropout")
    if "dropout" in model:
        model["dropout"] = None
    processor, strange = _adds_nothing(backend.get("post_processor"))
    return {
        **backend,
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(table.values(), key=lambda token: token["id"]),
        "post_processor": processor,
        "model": model,
    }, [*left_out, *strange]


def _adds_nothing(processor: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """A post-processor without what adds tokens, and the names of those that do more than begin and end a sequence."""
    if not processor:
        return processor, []
    kind = processor["type"]
    if kind == "Sequence":
        parts = [_adds_nothing(part) for part in processor["processors"]]
        left = [part for part, _ in parts if part is not None]
        return {**processor, "processors": left} if left else None, [name for _, names in parts for name in names]
    if kind == "TemplateProcessing":
        kept = {name: [part for part in processor[name] if "Sequence" in part] for name in ("single", "pair")}
        return {**processor, **kept, "special_tokens": {}}, []
    return (processor, []) if kind == "ByteLevel" else (None, [f"a post-processor {kind}"])


def _configured(config: dict[str, Any], original: Any, backend: dict[str, Any], rows: int) -> dict[str, Any]:
    """tokenizer_config.json that makes transformers take tokenizer.json as it is, and pads for generation."""
    table = {token["content"] for token in backend["added_tokens"]}
    named = {name: str(token) for name in NAMED if (token := getattr(original, name, None)) is not None}
    ids = original.get_vocab()
    candidates = (named.get("pad_token"), *PADDING, named.get("unk_token"), named.get("eos_token"))
    padding = next((name for name in candidates if name in ids and ids[name] < rows), None)
    others = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    others = (
        [one.get("content") if isinstance(one, dict) else one for one in others] if isinstance(others, list) else []
    )
    return {
        **{name: config[name] for name, (kind, _) in KEPT.items() if isinstance(config.get(name), kind)},
        **named,
        **({"pad_token": padding} if padding else {}),
        "additional_special_tokens": [one for one in others if isinstance(one, str) and one in table],
        "tokenizer_class": INSTALLED,
        # Otherwise transformers 4 makes token_type_ids, which generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "add_bos_token": False,
        "add_eos_token": False,
        # transformers 4 writes this over the pre-tokenizer's own.
        "add_prefix_space": _find(backend.get("pre_tokenizer"), "add_prefix_space", default=False),
    }


def _find(value: Any, name: str, *, default: Any) -> Any:
    """A key of a pre-tokenizer, which may be a sequence of several."""
    parts: Sequence[Any] = [value, *(value.get("pretokenizers") or [])] if isinstance(value, dict) else []
    return next((part[name] for part in parts if isinstance(part, dict) and name in part), default)
