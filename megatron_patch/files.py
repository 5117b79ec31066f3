"""Files that more than one part of the package reads or writes, one variable, and what is wrong with a file."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import stat
import uuid
from pathlib import Path

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


def claim(folder: Path, is_locked: bool = True) -> None:
    """Have an empty `folder` to write aside into: a new one, or what a killed process of ours left, which is cleared.

    `release` it when it has its name. `is_locked`: no other process writes it; else the mark says whether one does.
    Raises ValueError, and touches nothing, for a link, a file, or a folder with anything that is not ours.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file, and a folder is to be written there; move it away")
    folder.mkdir(exist_ok=True)
    entries = os.listdir(folder)
    if entries and not is_ours(folder):
        raise ValueError(f"{folder}: holds {min(entries)!r}, which was not written here by this toolkit; move it away")
    if entries and not is_locked and _lives((folder / MARK).read_text(errors="replace")):
        raise ValueError(f"{folder}: another process is writing it; wait for that, or remove what it left")
    mark = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    os.write(mark, f"{platform.node()} {os.getpid()}\n".encode())
    os.close(mark)
    for entry in entries:
        if entry != MARK:
            remove(folder / entry)


def release(folder: Path) -> None:
    """Take the mark from a folder that is whole."""
    (folder / MARK).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process. False on a file system that has no locks, as Lustre may.

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
    if node != platform.node() or not pid.isdecimal():
        return True  # nobody here can tell
    return int(pid) != os.getpid() and Path(f"/proc/{pid}").exists()
