"""Chat templates that others wrote: where a checkpoint keeps its own, and what it writes, within bounds."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.files.names import OLD_CHAT_TEMPLATE, PROCESSOR

SECONDS = 5
"""A template that takes longer to write two messages is refused: real ones take a thousandth of a second."""
MEGABYTES = 512
"""Likewise for the memory."""
LONGEST = 1_000_000
"""Characters of a template."""

Messages = Sequence[tuple[str, str]]
"""(role, text) each."""


def read_template(folder: Path, tokenizer: Any) -> str | None:
    """The chat template that transformers takes for the checkpoint in `folder`; None: it has none.

    Of a whole LLaVA that is what AutoProcessor takes: a key of processor_config.json, chat_template.json,
    chat_template.jinja, its tokenizer's. Of a language model it is what AutoTokenizer takes (`tokenizer` is its own):
    chat_template.jinja, or tokenizer_config.json's, which may be a list of named ones. Of several, in a list or in
    additional_chat_templates/, it is the one named default. Raises ValueError, one line, for damage, and for several of
    which none has that name.
    """
    folder = Path(folder)
    found = None
    if _is_llava(folder):
        found = _key(folder / PROCESSOR, needed=False)
        if found is None and (folder / OLD_CHAT_TEMPLATE).is_file():
            found = _key(folder / OLD_CHAT_TEMPLATE, needed=True)
    if found is None:
        found = tokenizer.chat_template
    if isinstance(found, list):
        found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(sorted(map(repr, found)))
            raise ValueError(
                f"{folder}: of its chat templates ({names:.100}) none is named 'default', and transformers takes none; "
                "name a format with --prompt-format"
            )
        found = found["default"]
    if found is not None and (not isinstance(found, str) or len(found) > LONGEST):
        what = f"of {len(found):,} characters" if isinstance(found, str) else f"a {type(found).__name__}"
        raise ValueError(f"{folder}: its chat template is {what}; expected a text; name a format with --prompt-format")
    return found


def _is_llava(folder: Path) -> bool:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid json ({error!s:.100}); copy it again") from None
    return isinstance(config, dict) and config.get("model_type") == "llava"


def _key(path: Path, *, needed: bool) -> Any:
    """`chat_template` of a json file. Raises ValueError where the file is damaged, or lacks what is `needed`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content["chat_template"] if needed else content.get("chat_template")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: holds no chat_template ({error!r:.100}); copy it again, or remove it") from None


def writer(tokenizer: Any, template: str) -> Callable[[Messages], str]:
    """A function from messages to the template's text, which goes up to where an answer begins.

    Raises ValueError for a template that does not write what it is given, or that takes too long. Some take a content
    as a string, some as a list.
    """
    _try_out(template, json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}))

    def write(messages: Messages, wrap: Callable[[str], Any]) -> str:
        """The text of `messages`, each content as `wrap` gives it."""
        try:
            return tokenizer.apply_chat_template(
                [{"role": role, "content": wrap(text)} for role, text in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=messages[-1][0] == "user",
            )
        except Exception as error:  # Jinja's own kinds, and whatever a template raises
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"the chat template refuses a conversation: {why}; name a prompt format") from error

    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            if all(text in write([("user", "Q1Q"), ("assistant", "A1A")], wrap) for text in ("Q1Q", "A1A")):
                return functools.partial(write, wrap=wrap)
        except ValueError:
            continue
    raise ValueError("the chat template leaves out what is said; name a prompt format")


TRIAL = """
import importlib.util, json, pathlib, resource, sys, types
template, tokens, sys.path, seconds, megabytes = json.load(sys.stdin)
root = pathlib.Path(importlib.util.find_spec("transformers").origin).parent
try:  # that file alone: the whole of transformers takes seconds
    for name, path in (("transformers", root), ("transformers.utils", root / "utils")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    from transformers.utils.chat_template_utils import render_jinja_template
except Exception:
    del sys.modules["transformers"], sys.modules["transformers.utils"]
    from transformers.utils.chat_template_utils import render_jinja_template
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (size + (megabytes << 20),))
resource.setrlimit(resource.RLIMIT_CPU, 2 * (int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + seconds,))
for wrap in (str, lambda text: [{"type": "text", "text": text}]):
    messages = [{"role": "user", "content": wrap("Q1Q")}, {"role": "assistant", "content": wrap("A1A")}]
    for count in (1, 2):
        try:
            (text,), _ = render_jinja_template(
                [messages[:count]], chat_template=template, add_generation_prompt=count == 1, **tokens
            )
            if len(text) > 1 << 20:
                sys.exit(3)
        except MemoryError:
            sys.exit(3)
        except Exception:
            pass  # the run that follows says what it is
"""


@functools.lru_cache
def _try_out(template: str, tokens: str) -> None:
    """Raise ValueError for a template that loops without end or fills memory: nothing else would stop it here.

    It runs in a process of its own that has bounds, and from there nothing comes back but whether it ended. `tokens`:
    the tokenizer's special ones, as json.
    """
    said = json.dumps([template, json.loads(tokens), sys.path, SECONDS, MEGABYTES])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", TRIAL],
            input=said.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=6 * SECONDS,  # by the clock; a busy machine gives it less of a processor
            check=False,
        )
        ended, why = done.returncode, done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        ended, why = 3, ""
    if ended == 1:
        raise ValueError(f"the chat template could not be tried out ({why[:200]}); name a prompt format")
    if ended != 0:
        raise ValueError(
            f"the chat template takes more than {SECONDS} seconds or {MEGABYTES} MB to write two messages; "
            "name a prompt format"
        )
