"""LLaVA's json files: which samples they hold, which of them can be used, and what they are called in the shards."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.data.prompts import IMAGE
from megatron_patch.data.webdataset.objects import Objects, is_url

ANNOTATIONS = "blip_laion_cc_sbu_558k.json"
# A dot in a key breaks a sample without a word; 90 characters fit a plain tar header.
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
HEAD = 64 * 1024
"""Bytes at the beginning of a json that tell whether it is a list of conversations."""


class Rejected(ValueError):
    """A sample that cannot be used, and why."""


@dataclass(frozen=True)
class Sample:
    """A usable entry of the json."""

    key: str
    """Its name in the shards."""
    turns: list[dict[str, str]]
    """The conversation as the json has it: {"from": "human" or "gpt", "value": text}, in turn."""
    images: list[str]
    """Names of its pictures, one for each `<image>`."""


class Samples:
    """The entries of one json, checked when they are asked for."""

    def __init__(self, place: str, data: bytes, max_rejected_share: float) -> None:
        """`data`: the bytes of the json at `place`. Raises ValueError when it is no list of samples."""
        self.digest = hashlib.sha256(data).hexdigest()
        self._entries = _parse_list(place, data)
        self.num_pairs = sum(map(_looks_like_pair, self._entries))
        self.is_pairs = self.num_pairs == len(self) or not any(map(_is_usable_otherwise, self._entries))
        """Whether every usable sample is one question and one answer about one picture: a VQASample."""
        self._bad_ids = _find_bad_ids(self._entries)
        self.has_id_keys = self.is_pairs and len(self._bad_ids) <= max_rejected_share * len(self)
        """Whether ids are the keys in the shards. Mixes name several samples after one picture: there it is the
        position in the json."""

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, position: int) -> str:
        """An entry's id for the list of rejected samples, as in json, so that a line stays a line."""
        entry = self._entries[position]
        return json.dumps(entry.get("id") if isinstance(entry, dict) else entry)[:200]

    def get(self, position: int) -> Sample:
        """The sample at `position` of the json. Raises Rejected when it cannot be used."""
        entry = self._entries[position]
        turns, images = check(entry)
        if not self.has_id_keys:
            return Sample(f"{position:09d}", turns, images)
        if position in self._bad_ids:
            raise Rejected(self._bad_ids[position])
        return Sample(str(entry["id"]), turns, images)


def read_annotations(folder: str, given: str | None) -> tuple[str, bytes]:
    """Where the json of conversations is, and its bytes: the `given` one, else LLaVA-Pretrain's, else the only one.

    `folder` and `given` may be URLs. Raises ValueError when it is missing, or when there are several.
    """
    if is_url(given or folder):
        place = given or f"{folder.rstrip('/')}/{ANNOTATIONS}"
        data = Objects(place).read("")
        if data is None:
            raise ValueError(f"{place}: missing; say which json holds the conversations with --annotations")
        return place, data
    path = Path(given) if given else _find_annotations(Path(folder))
    return str(path), path.read_bytes()


def _find_annotations(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected LLaVA's json and the images in it")
    if (folder / ANNOTATIONS).is_file():
        return folder / ANNOTATIONS
    found = [path for path in sorted(folder.glob("*.json")) if path.is_file() and _holds_conversations(path)]
    if not found:
        raise ValueError(
            f"{folder / ANNOTATIONS}: missing, and no other json with conversations beside it; give --annotations"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: {names} hold conversations; say which with --annotations")
    return found[0]


def check(entry: Any) -> tuple[list[dict[str, str]], list[str]]:
    """The turns and the picture names of an entry. Raises Rejected."""
    if not isinstance(entry, dict):
        raise Rejected("not a json object")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("conversations is not a list of turns")
    speakers = [turn.get("from") for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise Rejected("conversations is not questions (human) and answers (gpt) in turn")
    if not all(isinstance(turn.get("value"), str) for turn in turns):
        raise Rejected("a turn's value is not text")
    answers = [turn["value"] for turn in turns[1::2]]
    if not all(map(str.strip, answers)):
        raise Rejected("an answer is empty")
    if any(IMAGE in answer for answer in answers):
        raise Rejected(f"an answer has an {IMAGE}")
    given = entry.get("image")
    images = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(image, str) for image in images):
        raise Rejected("image is not a name")
    asked = sum(turn["value"].count(IMAGE) for turn in turns[::2])
    if asked != len(images):
        raise Rejected(f"the questions have {asked} {IMAGE} for {len(images)} pictures")
    return turns, images


def _looks_like_pair(entry: Any) -> bool:
    """Quick: two turns, one picture name."""
    turns = entry.get("conversations") if type(entry) is dict else None
    return type(turns) is list and len(turns) == 2 and type(entry.get("image")) is str


def _is_usable_otherwise(entry: Any) -> bool:
    if _looks_like_pair(entry):
        return False
    try:
        turns, images = check(entry)
    except Rejected:
        return False
    return len(turns) != 2 or len(images) != 1


def _find_bad_ids(entries: list[Any]) -> dict[int, str]:
    """Position -> why its id is no key."""
    bad: dict[int, str] = {}
    seen: set[str] = set()
    for position, entry in enumerate(entries):
        name = entry.get("id") if type(entry) is dict else None
        key = str(name) if type(name) in (str, int) else ""
        if not KEY.fullmatch(key):
            bad[position] = "the id is not made of 1 to 90 letters, digits, - and _"
        elif key in seen:
            bad[position] = "the id was there before"
        seen.add(key)
    return bad


def _holds_conversations(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(HEAD)
    return bool(re.match(rb"\s*\[\s*\{", head)) and b'"conversations"' in head


def _parse_list(place: str, data: bytes) -> list[Any]:
    # A million small objects, none of them garbage: looking for some takes as long as the parsing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not json: {error}; download it again") from None
    finally:
        if was_enabled:
            gc.enable()
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place}: expected a list of samples")
    return entries
