"""Files that more than one part of the package reads or writes: names, how json is read, what may be removed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

TOKENIZER_CONFIG = "tokenizer_config.json"
# Everything of a tokenizer that transformers may read, except its chat template, which is not LLaVA's.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
CHAT_TEMPLATE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"
OLD_CHAT_TEMPLATE = "chat_template.json"  # as processors kept it before transformers 4.52
RUN_CONFIG = "run_config.json"  # a run's settings, in each of its checkpoints
COMMON = "common.pt"  # what is no tensor, in a torch_dist checkpoint

TRAINING = "training"
"""Beside a rank's error file as long as it trains: found by a launcher that a signal ended, the run was not saved."""

STORE = "MEGATRON_PATCH_STORE"
"""Environment variable that the launcher gives its ranks, and nobody else: where they find each other. It is
`file://PATH` on one machine, in a folder of the launcher's alone, so that nothing listens; `env://`, torchrun's own
variables, on several."""


def is_iteration(folder: Path) -> bool:
    """Whether `folder` itself holds the weights of a Megatron-Core checkpoint: one iteration of a run, or a release."""
    return (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*"))


def model_folder(checkpoint: Path) -> Path:
    """The folder with config.json, tokenizer and processor of a checkpoint, which may be one iteration of a run."""
    if (checkpoint / "config.json").exists() or not is_iteration(checkpoint):
        return checkpoint
    return checkpoint.resolve().parent  # of a link, beside what it leads to


def why_not_loaded(error: BaseException) -> str:
    """What torch.load(weights_only=True) says of a file, on one line and without its advice to trust it."""
    named = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    if named:
        return f"it names {named[1]}, which could run code"
    text = str(error).rpartition("WeightsUnpickler error: ")[2]  # all of it, where that is not in it
    text = re.sub("\x1b\\[[0-9;]*m", "", text).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]


MARK = ".written_by_megatron_patch"
"""A file in a folder that is being written aside: only what has it is cleared after a run or conversion was killed."""


def beside(path: Path) -> Path:
    """A name in the same folder that nobody else has, for what is to be renamed to `path` when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def is_ours(folder: Path) -> bool:
    """Whether `folder` is one that `claim` made: no link, and with our mark."""
    try:
        return stat.S_ISDIR(folder.lstat().st_mode) and stat.S_ISREG((folder / MARK).lstat().st_mode)
    except OSError:
        return False


def claim(folder: Path, mark: int | None = None) -> None:
    """Have an empty `folder` to write aside into: a new one, or what a killed process of ours left, which is cleared.

    `release` it when it has its name, or `discard` it. `mark`: what `open_mark` gave, where it is not locked and says
    whether another process writes; None: nobody else does. Raises ValueError, and touches nothing, where another does,
    or as `open_mark`.
    """
    descriptor = open_mark(folder) if mark is None else mark
    try:
        if mark is not None and _lives(os.pread(mark, 200, 0).decode(errors="replace")):
            raise ValueError(f"{folder}: another process is writing it; wait for that, or remove what it left")
        _write_mark(descriptor, folder)
    finally:
        if mark is None:
            os.close(descriptor)
    _clear(folder)


def _write_mark(descriptor: int, folder: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{platform.node()} {os.getpid()}\n".encode(), 0)
    except OSError as error:  # which names no file
        discard(folder)
        raise OSError(error.errno, error.strerror, str(folder / MARK)) from None


def open_mark(folder: Path) -> int:
    """The mark of a folder to write aside into, open, which is made where there is none.

    Raises ValueError, and touches nothing, for a link, a file, or a folder with anything that is not ours.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file, and a folder is to be written there; move it away")
    folder.mkdir(exist_ok=True)
    entries = os.listdir(folder)
    if entries and not is_ours(folder):
        raise ValueError(
            f"{folder}: holds {min(entries)!r} and no mark of this toolkit, so that nothing is removed (an earlier "
            "version, killed while it wrote, left none); move it away"
        )
    # Open for writing, without which NFS locks nothing.
    return os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def release(folder: Path) -> None:
    """Take the mark from a folder that is whole."""
    (folder / MARK).unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder that `claim` made, as far as that is possible: its mark last, so that the rest can be cleared."""
    with contextlib.suppress(OSError):
        _clear(folder)
        release(folder)
        folder.rmdir()


def _clear(folder: Path) -> None:
    for entry in os.listdir(folder):
        if entry != MARK:
            remove(folder / entry)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock(descriptor: int) -> bool:
    """Lock an open file for this process. False on a file system that has no locks, as Lustre may.

    Raises BlockingIOError where another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def check_page(path: Path, beginning: str) -> None:
    """Raise ValueError where `path` is anything but a file that begins so, or nothing: only a former page is replaced.

    Raises OSError as opening a file does.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path}: is a link, a folder or a device; give the name of a new file")
    if path.is_file():
        with path.open("rb") as file:
            found = file.read(len(beginning.encode()))
        if found and found != beginning.encode():
            raise ValueError(f"{path}: is there, and not written by this command; give the name of a new file")


def _lives(mark: str) -> bool:
    """Whether the process that wrote a mark may still be there."""
    node, _, pid = mark.strip().partition(" ")
    if not node:
        return False  # just made
    if node != platform.node() or not pid.isdecimal():
        return True  # nobody here can tell
    return int(pid) != os.getpid() and Path(f"/proc/{pid}").exists()


MAX_DEPTH = 100
"""Nesting of a json file. What is deeper can be read and not be written, and no file of Hugging Face's comes near."""


def read_json(path: Path, expected: str = "the folder of a checkpoint") -> dict[str, Any]:
    """A json file that holds an object. Raises ValueError or OSError, one line that names the file.

    In UTF-8 without a byte order mark, as transformers reads it, whatever the locale. `expected`: said of a file that
    is missing.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; expected {expected}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: is a folder; expected a file") from None
    except NotADirectoryError:
        raise NotADirectoryError(f"{path.parent}: not a folder; expected {expected}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid json ({error}); expected text in UTF-8") from None
    return parse_json(text, path)


def parse_json(text: str, source: object) -> dict[str, Any]:
    """A json object. Raises ValueError, one line that names `source`."""
    try:
        content = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair is a string in Python, and cannot be written
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{source}: nested too deep; expected at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{source}: not valid json ({_one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds a {type(content).__name__}; expected an object")
    level, depth = [content], 0
    while level:
        depth += 1
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if depth > MAX_DEPTH:
            raise ValueError(f"{source}: nested too deep; expected at most {MAX_DEPTH} levels")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
