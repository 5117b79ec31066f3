"""How conversations become text: prompt formats, declared as data, and the chat templates that say the same in Jinja.

Training and the exported chat template are made from the same format, so what the model saw before an answer is what
transformers' processor gives it before it answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from megatron_patch.data.prompt_formats import (
    IMAGE,
    PROMPT_FORMATS,
    Piece,
    PromptFormat,
    Turn,
    question_text,
)
from megatron_patch.data.templates import read_template, writer
from megatron_patch.families.registry import LANGUAGE_FAMILIES

MARKED_IMAGE = "<im_start><image><im_end>"
"""`<image>` between NeVA's tokens, as `use_im_start_end` writes it."""
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
"""Who speaks, in LLaVA's words and in those of chat templates."""
OWN_TEMPLATE = "tokenizer"
"""The prompt format that is the tokenizer's own chat template."""


class Prompt(Protocol):
    """What turns a conversation into text."""

    def pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """The conversation's text, split where labels begin and end."""


class ChatTemplate:
    """The tokenizer's own chat template as a prompt format."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError when the tokenizer has none, or one whose answers have no end to put a label on."""
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("--prompt-format tokenizer: the tokenizer has no chat template; name a format")
        self._write = writer(tokenizer, tokenizer.chat_template)
        _, (answer, _) = self.pieces([("Q1Q", "A1A")])
        last = tokenizer(answer, add_special_tokens=False).input_ids[-1]
        if last not in tokenizer.added_tokens_decoder and last not in tokenizer.all_special_ids:
            raise ValueError(
                f"--prompt-format tokenizer: the chat template ends an answer with {answer[-20:]!r}, which is no token "
                f"of its own, so that a model would not learn to stop; name a format"
            )

    def pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """Raises ValueError when the template does not write a conversation from left to right.

        Each turn is written with all before it, so whoever needs only the first turns asks for no more.
        """
        messages: list[tuple[str, str]] = []
        written = ""
        for question, answer in turns:
            messages.append(("user", question_text(question)))
            prompt = self._write(messages)
            messages.append(("assistant", answer.strip()))
            whole = self._write(messages)
            if not (prompt.startswith(written) and whole.startswith(prompt)):
                raise ValueError("the chat template rewrites earlier turns when others follow; name a prompt format")
            # A line that ends after the answer's end is not part of it.
            answer = whole[len(prompt) :].rstrip()
            yield prompt[len(written) :], False
            yield answer, True
            written = prompt + answer


def pair_turns(messages: Any) -> list[Turn]:
    """LLaVA's list of {"from": "human" or "gpt", "value": text}, or of {"role", "content"}, as (question, answer).

    As in LLaVA's training, an answer before the first question is left out, and so is a last question without answer.
    Raises ValueError for anything else that does not alternate.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"conversation is {messages!r:.60}, expected a list of turns")
    said = []
    for message in messages:
        role, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise ValueError(f"a turn is {message!r:.60}; expected from human or gpt, and a value that is a text")
        said.append((ROLES[role], text))
    if said and said[0][0] == "assistant":
        said = said[1:]
    for index, (role, _) in enumerate(said):
        if role != ("user", "assistant")[index % 2]:
            raise ValueError(f"turn {index + 1} is the {role}'s again; expected question and answer in turn")
    texts = [text for _, text in said]
    return list(zip(texts[::2], texts[1::2], strict=False))


def document_pieces(sequence: Sequence[str | bytes], tokenizer: Any) -> list[Piece]:
    """Text and images in turn, without questions: all text is labelled, as in VILA's stage 2 (arXiv:2312.07533)."""
    parts = [(IMAGE, False) if isinstance(part, bytes) else (part, True) for part in sequence]
    bos, first = tokenizer.bos_token or "", sequence[0] if sequence else b""
    if isinstance(first, str) and blank_after_bos(tokenizer, first):
        parts[0] = (" " + first, True)
    parts = [(bos, False), *parts, (tokenizer.eos_token or "", True)]
    # Texts that follow one another are one, so that tokens may reach over where they meet.
    return [("".join(text for text, _ in run), is_labelled) for is_labelled, run in groupby(parts, key=itemgetter(1))]


def prompt_format(name: str, tokenizer: Any) -> Prompt:
    """The format of that name in the tokenizer's words. Raises ValueError when its end is not one token there."""
    if name == OWN_TEMPLATE:
        return ChatTemplate(tokenizer)
    style = _begun(name, tokenizer).bound(tokenizer.bos_token or "", tokenizer.eos_token or "")
    end = style.end.strip()
    if len(tokenizer(end, add_special_tokens=False).input_ids) != 1:
        raise ValueError(
            f"--prompt-format {name}: its end {end!r} is not a token of this tokenizer; use another format"
        )
    return style


def blank_after_bos(tokenizer: Any, text: str) -> str:
    """The blank that stands between a beginning of sequence and `text`, as where the tokenizer itself adds the former.

    SentencePiece puts a blank before a text's first word, and `<s>` comes before that: so were Llama and Vicuna
    trained. After a `<s>` that is part of the text, transformers puts none. Empty where nothing changes.
    """
    bos = tokenizer.bos_token
    if not bos or not text:
        return ""
    word = "A" if text.startswith(("{system}", "{answer}")) else text[:100]  # any words may stand there
    alone, plain, spaced = tokenizer([word, bos + word, f"{bos} {word}"], add_special_tokens=False).input_ids
    wanted = [tokenizer.convert_tokens_to_ids(bos), *alone]
    return " " if plain != wanted and spaced == wanted else ""


def _begun(name: str, tokenizer: Any | None) -> PromptFormat:
    style = PROMPT_FORMATS[name]
    return style if tokenizer is None else style.begun(lambda text: blank_after_bos(tokenizer, text))


def find_end(name: str, tokenizer: Any) -> int | None:
    """Id of the token that ends an answer in the format of that name; None where it has none."""
    try:
        _, (answer, _) = prompt_format(name, tokenizer).pieces([("Q1Q", "A1A")])
    except ValueError:
        return tokenizer.eos_token_id
    return tokenizer(answer, add_special_tokens=False).input_ids[-1]


def find_format(given: str, folder: Path, family: str, tokenizer: Any | None = None) -> str:
    """The name in `PROMPT_FORMATS`, or tokenizer, that `--prompt-format` means for the model in `folder`.

    `auto` is, in this order: the format that the folder's chat template writes (blanks apart; one that none of them
    writes is taken as it is: tokenizer); v1 where config.json names Vicuna, which has no template; llama_3 where the
    tokenizer has its tokens; the family's. `tokenizer`: the folder's, where it is open already. Raises ValueError
    when nothing is known.
    """
    if given != "auto":
        return given
    from megatron_patch.data.tokenize import open_tokenizer

    folder = Path(folder)
    tokenizer = open_tokenizer(folder) if tokenizer is None else tokenizer
    template = read_template(folder, tokenizer)
    usual = LANGUAGE_FAMILIES[family].prompt_format if family in LANGUAGE_FAMILIES else None
    if template is not None:
        return _format_of(template, tokenizer, usual) or OWN_TEMPLATE
    if "vicuna" in _model_names(folder).lower():
        return "v1"
    if {"<|eot_id|>", "<|start_header_id|>"} <= set(_added_tokens(tokenizer)):
        return "llama_3"
    if usual is None:
        raise ValueError(f"--prompt-format auto: unknown for {family}; use one of {', '.join(PROMPT_FORMATS)}")
    return usual


def chat_template(
    name: str, folder: Path | None = None, tokenizer: Any | None = None, *, use_im_start_end: bool = False
) -> str:
    """The Jinja chat template of a format, for the exported tokenizer and processor; `folder`'s own for tokenizer.

    A message's content is a string, which stands as it is, or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`: images first, each on a line of its own. The beginning-of-sequence token is part
    of the text, so the tokenizer must not add its own (see `install_tokenizer`); `tokenizer`: the one that reads it.
    After the last question stands what precedes an answer, with or without add_generation_prompt. A system message may
    come first where the format has a place for it.
    """
    image = MARKED_IMAGE if use_im_start_end else IMAGE
    if name == OWN_TEMPLATE:
        from megatron_patch.data.tokenize import open_tokenizer

        assert folder is not None, "whose own it is"
        own = read_template(folder, open_tokenizer(folder))
        if own is None:
            raise ValueError(f"--prompt-format tokenizer: {folder} has no chat template; name a format")
        return _with_images(own, image)
    style = _begun(name, tokenizer)
    part = {field.name: _jinja(getattr(style, field.name)) for field in fields(style) if field.type == "str"}
    if style.keeps_question:
        written, text = image + "\n", f"{{{{- text | trim | replace({json.dumps(IMAGE)}, {json.dumps(image)}) -}}}}"
    else:
        written, text = image, f"{{%- for _ in range(text.count('{IMAGE}')) -%}}{_jinja(image)}{{%- endfor -%}}"
    begin, within = _system(style, part)
    return (
        f"{begin}{{%- for message in messages -%}}"
        f"{CONTENT}"
        "{%- if message['role'] == 'user' -%}"
        f"{{%- if not loop.first -%}}{part['between']}{{%- endif -%}}{part['question']}{within}"
        f"{{%- for _ in range(pictures) -%}}{_jinja(written)}{{%- endfor -%}}{text}{part['answer']}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{part['lead']}{{{{- text | trim -}}}}{part['end']}"
        "{%- else -%}{{- raise_exception('only the roles user and assistant are supported') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


def _system(style: PromptFormat, part: dict[str, str]) -> tuple[str, str]:
    """What a template begins with, and what it writes before a question's text: a system message's places."""
    if not style.system:
        return part["begin"], ""
    starts = style.system_place == "begin"
    written, plain = (part["system"], part["begin"]) if starts else ("", "{%- set system = none -%}")
    begin = (
        "{%- if messages and messages[0]['role'] == 'system' -%}{%- set message = messages[0] -%}"
        f"{CONTENT}{{%- set system, messages = text | trim, messages[1:] -%}}{written}"
        f"{{%- else -%}}{plain}{{%- endif -%}}"
    )
    if starts:
        return begin, ""
    place = "loop.first" if style.system_place == "first question" else "loop.last"
    return begin + part["begin"], f"{{%- if system is not none and {place} -%}}{part['system']}{{%- endif -%}}"


# A message's text and how many images it has besides.
CONTENT = (
    "{%- if message['content'] is string -%}{%- set text, pictures = message['content'], 0 -%}{%- else -%}"
    "{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- endif -%}"
)
FLATTENED = "{#- pictures have become text #}"


def _with_images(template: str, image: str) -> str:
    """A language model's template, preceded by one that writes each message's images into its text."""
    template = template.rpartition(FLATTENED)[2]  # which may have been put before it already, with another `image`
    return (
        f"{{%- set flat = namespace(messages=[]) -%}}{{%- for message in messages -%}}{CONTENT}"
        f"{{%- set text = text | replace({json.dumps(IMAGE)}, {json.dumps(image)}) -%}}"
        f"{{%- if pictures -%}}{{%- set text = {json.dumps(image + chr(10))} * pictures + text | trim -%}}"
        "{%- endif -%}"
        "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text}] -%}"
        f"{{%- endfor -%}}{{%- set messages = flat.messages -%}}{FLATTENED}{template}"
    )


def _format_of(template: str, tokenizer: Any, likely: str | None) -> str | None:
    """The format that writes a conversation as the template does, from its first question on, blanks apart."""
    names = sorted(PROMPT_FORMATS, key=lambda name: name != likely)
    for name in names:
        for reader in (None, tokenizer):
            if template in (chat_template(name, None, reader, use_im_start_end=marked) for marked in (False, True)):
                return name
    try:
        written = writer(tokenizer, template)([("user", "Q1Q"), ("assistant", "A1A"), ("user", "Q2Q")])
    except ValueError:
        return None
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    # A LLaVA's template may leave the end of an answer to whoever generates it.
    for ignored in ((), (bos, eos)):
        for name in names:
            (first, _), (answer, _), (second, _), _ = (
                PROMPT_FORMATS[name].bound(bos, eos).pieces([("Q1Q", "A1A"), ("Q2Q", "")])
            )
            if _tail(first + answer + second, ignored) == _tail(written, ignored):
                return name
    return None


def _tail(text: str, ignored: Sequence[str]) -> str:
    text = text[text.find("Q1Q") :]
    for token in filter(None, ignored):
        text = text.replace(token, "")
    return "".join(text.split())


def _model_names(folder: Path) -> str:
    """What config.json calls the language model; Vicuna is a Llama by every other mark."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = config.get("text_config") or {}
    return f"{config.get('_name_or_path', '')} {text.get('_name_or_path', '')} {folder.name}"


def _added_tokens(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values()]


def _jinja(text: str) -> str:
    """A Jinja expression that prints `text` exactly, whatever blanks it has."""
    filled = json.dumps(text)
    for name, variable in (("{bos}", "bos_token"), ("{eos}", "eos_token"), ("{system}", "system")):
        filled = filled.replace(name, f'" + {variable} + "')
    return "{{- " + filled + " -}}"
