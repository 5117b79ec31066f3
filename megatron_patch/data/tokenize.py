"""From a conversation to token ids and labels: prompt formats, the `<image>` token, the exported chat template.

Training and the exported chat template are made from the same `PromptFormat`, so what the model saw before an answer is
what transformers' processor gives it before it answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGE = "<image>"
IGNORE = -100
"""Label of a position from which nothing is learned."""


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


PROMPT_FORMATS = {
    "mistral": PromptFormat(question="[INST] ", answer="[/INST]"),
    # Llama-2-chat without a system message: every turn begins anew, and a space stands before the end.
    "llama_2": PromptFormat(begin="", question="{bos}[INST] ", answer=" [/INST]", end=" {eos}"),
    # Vicuna 1.1, as LLaVA-1.5 uses it.
    "v1": PromptFormat(
        begin="{bos}A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. ",
        question="USER: ",
        answer=" ASSISTANT:",
    ),
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
}
FAMILY_FORMATS = {"mistral": "mistral", "llama": "llama_2", "qwen2": "chatml"}
"""What `auto` means for a language model's family: the format of its published chat model."""

# Everything of a tokenizer that transformers may read, except its chat template, which is not LLaVA's.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def format_name(prompt_format: str, family: str) -> str:
    """The name in `PROMPT_FORMATS` that `--prompt-format` means: `auto` is mistral for mistral, llama_2 for llama."""
    if prompt_format == "auto" and family not in FAMILY_FORMATS:
        raise ValueError(f"--prompt-format auto: unknown for {family}; use one of {', '.join(PROMPT_FORMATS)}")
    return FAMILY_FORMATS[family] if prompt_format == "auto" else prompt_format


def prompt_format(name: str, tokenizer: Any) -> PromptFormat:
    """The format of that name in the tokenizer's words. Raises ValueError when its end is not one token there."""
    style = PROMPT_FORMATS[name]
    words = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token or ""}
    texts = {part.name: getattr(style, part.name) for part in fields(style) if part.type == "str"}
    for placeholder, token in words.items():
        texts = {part: text.replace(placeholder, token) for part, text in texts.items()}
    end = texts["end"].strip()
    if len(_ids(tokenizer, end)) != 1:
        raise ValueError(
            f"--prompt-format {name}: its end {end!r} is not a token of this tokenizer; use another format"
        )
    return replace(style, **texts)


def chat_template(name: str) -> str:
    """The Jinja chat template of a format, for the exported tokenizer and processor.

    A message's content is a string, which stands as it is, or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`: pictures first, each on a line of its own. The beginning-of-sequence token is part
    of the text, so the tokenizer must not add its own (see `install_tokenizer`). After the last question stands what
    precedes an answer, with or without add_generation_prompt.
    """
    style = PROMPT_FORMATS[name]
    part = {field.name: _jinja(getattr(style, field.name)) for field in fields(style) if field.type == "str"}
    if style.keeps_question:
        picture, words = IMAGE + "\n", "{{- text | trim -}}"
    else:
        picture, words = IMAGE, f"{{%- for _ in range(text.count('{IMAGE}')) -%}}{_jinja(IMAGE)}{{%- endfor -%}}"
    return (
        f"{part['begin']}{{%- for message in messages -%}}"
        "{%- if message['content'] is string -%}{%- set text, pictures = message['content'], 0 -%}{%- else -%}"
        "{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
        "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}"
        "{%- endif -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{%- if not loop.first -%}}{part['between']}{{%- endif -%}}{part['question']}"
        f"{{%- for _ in range(pictures) -%}}{_jinja(picture)}{{%- endfor -%}}{words}{part['answer']}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{part['lead']}{{{{- text | trim -}}}}{part['end']}"
        "{%- else -%}{{- raise_exception('only the roles user and assistant are supported') -}}{%- endif -%}"
        "{%- endfor -%}"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder that describes the model. Raises ValueError when it, or its `<image>`, is missing."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder}: neither tokenizer.json nor tokenizer.model; expected the model's tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer(IMAGE, add_special_tokens=False).input_ids != [tokenizer.convert_tokens_to_ids(IMAGE)]:
        raise ValueError(f"{folder}: {IMAGE} is not one token; expected a folder that the converter wrote")
    return tokenizer


def install_tokenizer(source: Path, target: Path, added_tokens: Sequence[str] = ()) -> dict[str, int]:
    """Copy a language model's tokenizer to `target`, add `<image>` and others as special tokens, and return their ids.

    An id is the one that a token has already, or the next free one. The copy adds no beginning- or end-of-sequence
    token by itself, since prompts bring theirs. Its chat template is left behind. Raises ValueError when transformers
    does not read the copy as meant.
    """
    from transformers import AutoTokenizer

    source, target = Path(source), Path(target)
    files = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & set(files):
        raise ValueError(f"{source}: neither tokenizer.json nor tokenizer.model; expected a tokenizer of transformers")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the source itself; give another folder")
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        # What another tokenizer left there would be read together with this one.
        (target / name).unlink(missing_ok=True)
        if name in files:
            shutil.copyfile(source / name, target / name)
    # As its own files say. (In the source's folder, transformers 5 takes another class for some kinds of config.json.)
    original = AutoTokenizer.from_pretrained(target)
    known = original.get_vocab()
    tokens: dict[str, int] = {}
    for token in (IMAGE, *added_tokens):
        tokens[token] = known.setdefault(token, max(known.values()) + 1)
    _edit_json(target / "tokenizer_config.json", lambda config: _configured(config, tokens, "tokenizer.json" in files))
    if "tokenizer.json" in files:
        _edit_json(target / "tokenizer.json", lambda tokenizer: _extended(tokenizer, tokens))
    if "added_tokens.json" in files:
        _edit_json(target / "added_tokens.json", lambda table: {**table, **tokens})
    copy = load_tokenizer(target)
    plain = original("a", add_special_tokens=False).input_ids
    if copy("a").input_ids != plain or any(copy(f"a{token}b").input_ids.count(id) != 1 for token, id in tokens.items()):
        raise ValueError(
            f"{target}: transformers reads the copy of {source} otherwise than meant; use a fast tokenizer"
        )
    return tokens


def source_chat_template(source: Path) -> str | None:
    """A LLaVA's own chat template, for the copy of its tokenizer that `install_tokenizer` makes; None: it has none.

    Where the source's tokenizer adds a beginning of sequence, the template does it in its place.
    """
    from transformers import AutoTokenizer

    source = Path(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    template = tokenizer.chat_template
    if (source / "chat_template.json").is_file():  # as processors kept it before transformers 4.52
        template = json.loads((source / "chat_template.json").read_text())["chat_template"]
    if not isinstance(template, str):
        return None
    begins = bool(tokenizer.bos_token) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return "{{- bos_token -}}" + template if begins and "bos_token" not in template else template


def remove_image_token(folder: Path) -> None:
    """Take `<image>` out of a tokenizer that `install_tokenizer` made, for a language model that stands alone."""
    for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        if (Path(folder) / name).is_file():
            _edit_json(Path(folder) / name, _without_image)


def encode(
    turns: Sequence[tuple[str, str]],
    tokenizer: Any,
    style: PromptFormat,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> tuple[Tensor, Tensor, int]:
    """Tokens of a conversation of (question, answer) turns, with each `<image>` as `num_image_tokens` placeholders.

    `style` comes from `prompt_format`. Returns input_ids int64 [s], labels int64 [s], and how many pictures the input
    holds. Labels are shifted: labels[i] is the id that follows input_ids[i], `IGNORE` where nothing is learned; the
    answers with their ends are learned. More than `max_length` positions are cut at the end. Raises ValueError when
    that would cut a picture in two or leave no answer.
    """
    ids: list[int] = []
    learned: list[bool] = []
    text = style.begin
    for index, (question, answer) in enumerate(turns):
        text += (style.between if index else "") + style.question + _question(question, style) + style.answer
        prompt = _ids(tokenizer, text)
        text += style.lead + answer.strip() + style.end
        whole = _ids(tokenizer, text)
        # What the model is given when it answers must be what it saw in training, token by token.
        if whole[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
            raise ValueError(f"the answer's first characters {answer[:20]!r} merge with the prompt's last token")
        learned += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids = whole
    # In Python, not torch, whose threads cost more than this work where several processes share the cores.
    tokens: list[int] = []
    targets: list[int] = []
    for token, is_learned in zip(ids, learned, strict=True):
        count = num_image_tokens if token == image_token_id else 1
        tokens += [token] * count
        targets += [token if is_learned else IGNORE] * count
    input_ids = torch.tensor(tokens[:-1][:max_length])  # [s]
    labels = torch.tensor(targets[1:][:max_length])  # [s]
    num_images, rest = divmod(int((input_ids == image_token_id).sum()), num_image_tokens)
    if rest:
        raise ValueError(
            f"{max_length} positions would cut a picture of {num_image_tokens} in two; raise --decoder-seq-length "
            f"(the sample has {len(tokens) - 1}) or shorten the text before the picture"
        )
    if (labels == IGNORE).all():
        raise ValueError(f"no answer within {max_length} positions; raise --decoder-seq-length")
    return input_ids, labels, num_images


def _question(text: str, style: PromptFormat) -> str:
    """A question as it is asked: its only picture goes first, on a line of its own; several stay where they are."""
    pictures = text.count(IMAGE)
    if not style.keeps_question:
        return IMAGE * pictures
    if pictures == 1:
        return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}"
    return text.strip()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _jinja(text: str) -> str:
    """A Jinja expression that prints `text` exactly, whatever blanks it has."""
    filled = json.dumps(text).replace("{bos}", '" + bos_token + "').replace("{eos}", '" + eos_token + "')
    return "{{- " + filled + " -}}"


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
