"""How conversations become text: prompt formats, declared as data, and the chat templates that say the same in Jinja.

Training and the exported chat template are made from the same format, so what the model saw before an answer is what
transformers' processor gives it before it answers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from megatron_patch.files import OLD_CHAT_TEMPLATE

IMAGE = "<image>"
MARKED_IMAGE = "<im_start><image><im_end>"
"""`<image>` between NeVA's tokens, as `use_im_start_end` writes it."""
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}
"""Who speaks, in LLaVA's words and in those of chat templates."""
TOKENIZER = "tokenizer"
"""The prompt format that is the tokenizer's own chat template."""

Turn = tuple[str, str]
"""A question and its answer."""
Piece = tuple[str, bool]
"""Part of a text, and whether it is learned."""


class Prompt(Protocol):
    """What turns a conversation into text."""

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """The conversation's text, cut where learned and given text meet."""


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """What stands around questions and answers. `{bos}` and `{eos}` are the tokenizer's own."""

    begin: str = "{bos}"
    """Once, before everything."""
    question: str
    """Before each question."""
    answer: str
    """After each question; the model goes on from here."""
    lead: str = " "
    """Before each answer, learned with it."""
    end: str = "{eos}"
    """After each answer, learned with it."""
    between: str = ""
    """After an answer that another question follows."""
    keeps_question: bool = True
    """False: of a question only its pictures stay, without a line of their own."""

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Of a format that `bound` filled in."""
        pieces: list[Piece] = []
        given = self.begin
        for question, answer in turns:
            asked = question_text(question) if self.keeps_question else IMAGE * question.count(IMAGE)
            pieces.append((given + self.question + asked + self.answer, False))
            pieces.append((self.lead + answer.strip() + self.end, True))
            given = self.between
        return pieces

    def bound(self, bos: str, eos: str) -> PromptFormat:
        """The format in a tokenizer's words."""
        texts = {field.name: getattr(self, field.name) for field in fields(self) if field.type == "str"}
        words = {name: text.replace("{bos}", bos).replace("{eos}", eos) for name, text in texts.items()}
        return replace(self, **words)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPT_FORMATS = {
    "mistral": PromptFormat(question="[INST] ", answer="[/INST]"),
    # Llama-2-chat without a system message: every turn begins anew, and a space stands before the end.
    "llama_2": PromptFormat(begin="", question="{bos}[INST] ", answer=" [/INST]", end=" {eos}"),
    # Vicuna 1.1, as LLaVA-1.5 uses it.
    "v1": PromptFormat(begin="{bos}" + VICUNA_SYSTEM + " ", question="USER: ", answer=" ASSISTANT:"),
    # LLaVA-1.5's pretraining: picture, caption. Its newline at the end is our end-of-sequence, so that a caption ends.
    "plain": PromptFormat(question="", answer="", lead="", keeps_question=False),
    "chatml": PromptFormat(
        begin="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        question="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        lead="",
        end="<|im_end|>",
        between="\n",
    ),
    # NeMo's NeVA (conv_nvgpt): an answer ends with what the next question begins with.
    "nvgpt": PromptFormat(
        begin="{bos}<extra_id_0>System\n" + VICUNA_SYSTEM + "\n\n<extra_id_1>",
        question="User\n",
        answer="\n<extra_id_1>Assistant\n",
        lead="",
        end="\n<extra_id_1>",
    ),
    # Llama-3-Instruct without a system message.
    "llama_3": PromptFormat(
        question="<|start_header_id|>user<|end_header_id|>\n\n",
        answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        lead="",
        end="<|eot_id|>",
    ),
}
FAMILY_FORMATS = {"mistral": "mistral", "llama": "llama_2", "qwen2": "chatml"}
"""What `auto` means where the checkpoint has no chat template and no mark of another kind."""


class ChatTemplate:
    """The tokenizer's own chat template as a prompt format."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises ValueError when the tokenizer has none, or one whose answers have no end that can be learned."""
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("--prompt-format tokenizer: the tokenizer has no chat template; name a format")
        self._write = _writer(tokenizer, tokenizer.chat_template)
        _, (answer, _) = self.pieces([("Q1Q", "A1A")])
        last = tokenizer(answer, add_special_tokens=False).input_ids[-1]
        if last not in tokenizer.added_tokens_decoder and last not in tokenizer.all_special_ids:
            raise ValueError(
                f"--prompt-format tokenizer: the chat template ends an answer with {answer[-20:]!r}, which is no token "
                f"of its own, so that a model would not learn to stop; name a format"
            )

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Raises ValueError when the template does not write a conversation from left to right."""
        messages: list[tuple[str, str]] = []
        pieces: list[Piece] = []
        written = ""
        for question, answer in turns:
            messages.append(("user", question_text(question)))
            prompt = self._write(messages)
            messages.append(("assistant", answer.strip()))
            whole = self._write(messages)
            if not (prompt.startswith(written) and whole.startswith(prompt)):
                raise ValueError("the chat template writes earlier turns anew when others follow; name a prompt format")
            # A line that ends behind the answer's end is not part of it.
            learned = whole[len(prompt) :].rstrip()
            pieces += [(prompt[len(written) :], False), (learned, True)]
            written = prompt + learned
        return pieces


def _writer(tokenizer: Any, template: str) -> Callable[[Sequence[tuple[str, str]]], str]:
    """A function from (role, text) messages to the template's text, which goes up to where an answer begins.

    Raises ValueError for a template that does not write what it is given. Some take a content as a string, some as a
    list.
    """

    def write(messages: Sequence[tuple[str, str]], wrap: Callable[[str], Any]) -> str:
        try:
            return tokenizer.apply_chat_template(
                [{"role": role, "content": wrap(text)} for role, text in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=messages[-1][0] == "user",
            )
        except Exception as error:  # Jinja's own kinds, and whatever a template raises
            raise ValueError(f"the chat template refuses a conversation: {error}; name a prompt format") from error

    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            if all(text in write([("user", "Q1Q"), ("assistant", "A1A")], wrap) for text in ("Q1Q", "A1A")):
                return functools.partial(write, wrap=wrap)
        except ValueError:
            continue
    raise ValueError("the chat template leaves out what is said; name a prompt format")


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


def question_text(text: str) -> str:
    """A question as it is asked: its only picture goes first, on a line of its own; several stay where they are."""
    if text.count(IMAGE) == 1:
        return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"
    return text.strip()


def document_pieces(sequence: Sequence[str | bytes], tokenizer: Any) -> list[Piece]:
    """Text and pictures in turn, without questions: all text is learned, as in VILA's stage 2 (arXiv:2312.07533)."""
    parts = [(IMAGE, False) if isinstance(part, bytes) else (part, True) for part in sequence]
    parts = [(tokenizer.bos_token or "", False), *parts, (tokenizer.eos_token or "", True)]
    # Texts that follow one another are one, so that tokens may reach over where they meet.
    return [("".join(text for text, _ in run), is_learned) for is_learned, run in groupby(parts, key=itemgetter(1))]


def prompt_format(name: str, tokenizer: Any) -> Prompt:
    """The format of that name in the tokenizer's words. Raises ValueError when its end is not one token there."""
    if name == TOKENIZER:
        return ChatTemplate(tokenizer)
    style = PROMPT_FORMATS[name].bound(tokenizer.bos_token or "", tokenizer.eos_token or "")
    end = style.end.strip()
    if len(tokenizer(end, add_special_tokens=False).input_ids) != 1:
        raise ValueError(
            f"--prompt-format {name}: its end {end!r} is not a token of this tokenizer; use another format"
        )
    return style


def find_format(given: str, folder: Path, family: str) -> str:
    """The name in `PROMPT_FORMATS`, or tokenizer, that `--prompt-format` means for the model in `folder`.

    `auto` is, in this order: the format that the folder's chat template writes (blanks apart; one that none of them
    writes is taken as it is: tokenizer); v1 where config.json names Vicuna, which has no template; llama_3 where the
    tokenizer has its tokens; `FAMILY_FORMATS`. Raises ValueError when nothing is known.
    """
    if given != "auto":
        return given
    from megatron_patch.data.tokenize import open_tokenizer

    folder = Path(folder)
    tokenizer = open_tokenizer(folder)
    template = read_template(folder, tokenizer)
    if template is not None:
        return _format_of(template, tokenizer, FAMILY_FORMATS.get(family)) or TOKENIZER
    if "vicuna" in _model_names(folder).lower():
        return "v1"
    if {"<|eot_id|>", "<|start_header_id|>"} <= set(_added_tokens(tokenizer)):
        return "llama_3"
    if family not in FAMILY_FORMATS:
        raise ValueError(f"--prompt-format auto: unknown for {family}; use one of {', '.join(PROMPT_FORMATS)}")
    return FAMILY_FORMATS[family]


def read_template(folder: Path, tokenizer: Any) -> str | None:
    """A checkpoint's own chat template, wherever it is kept; None: it has none. Raises ValueError for damage."""
    path = Path(folder) / OLD_CHAT_TEMPLATE
    try:
        template = json.loads(path.read_text())["chat_template"] if path.is_file() else tokenizer.chat_template
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: holds no chat_template ({error!r:.100}); copy it again, or remove it") from None
    return template if isinstance(template, str) else None


def chat_template(name: str, folder: Path | None = None, *, use_im_start_end: bool = False) -> str:
    """The Jinja chat template of a format, for the exported tokenizer and processor; `folder`'s own for tokenizer.

    A message's content is a string, which stands as it is, or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`: pictures first, each on a line of its own. The beginning-of-sequence token is part
    of the text, so the tokenizer must not add its own (see `install_tokenizer`). After the last question stands what
    precedes an answer, with or without add_generation_prompt.
    """
    image = MARKED_IMAGE if use_im_start_end else IMAGE
    if name == TOKENIZER:
        from megatron_patch.data.tokenize import open_tokenizer

        own = read_template(folder, open_tokenizer(folder))
        if own is None:
            raise ValueError(f"--prompt-format tokenizer: {folder} has no chat template; name a format")
        return _with_pictures(own, image)
    style = PROMPT_FORMATS[name]
    part = {field.name: _jinja(getattr(style, field.name)) for field in fields(style) if field.type == "str"}
    if style.keeps_question:
        picture, words = image + "\n", f"{{{{- text | trim | replace({json.dumps(IMAGE)}, {json.dumps(image)}) -}}}}"
    else:
        picture, words = image, f"{{%- for _ in range(text.count('{IMAGE}')) -%}}{_jinja(image)}{{%- endfor -%}}"
    return (
        f"{part['begin']}{{%- for message in messages -%}}"
        f"{CONTENT}"
        "{%- if message['role'] == 'user' -%}"
        f"{{%- if not loop.first -%}}{part['between']}{{%- endif -%}}{part['question']}"
        f"{{%- for _ in range(pictures) -%}}{_jinja(picture)}{{%- endfor -%}}{words}{part['answer']}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{part['lead']}{{{{- text | trim -}}}}{part['end']}"
        "{%- else -%}{{- raise_exception('only the roles user and assistant are supported') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


# A message's text and how many pictures it has besides.
CONTENT = (
    "{%- if message['content'] is string -%}{%- set text, pictures = message['content'], 0 -%}{%- else -%}"
    "{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- endif -%}"
)
FLATTENED = "{#- pictures have become text #}"


def _with_pictures(template: str, image: str) -> str:
    """A language model's template behind one that writes each message's pictures into its text."""
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
        if template in (chat_template(name), chat_template(name, use_im_start_end=True)):
            return name
    try:
        written = _writer(tokenizer, template)([("user", "Q1Q"), ("assistant", "A1A"), ("user", "Q2Q")])
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
    config = json.loads(path.read_text()) if path.is_file() else {}
    text = config.get("text_config") or {}
    return f"{config.get('_name_or_path', '')} {text.get('_name_or_path', '')} {folder.name}"


def _added_tokens(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values()]


def _jinja(text: str) -> str:
    """A Jinja expression that prints `text` exactly, whatever blanks it has."""
    filled = json.dumps(text).replace("{bos}", '" + bos_token + "').replace("{eos}", '" + eos_token + "')
    return "{{- " + filled + " -}}"
