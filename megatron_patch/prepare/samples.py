"""LLaVA's json files: which samples they hold, which of them can be used, and what they are called in the shards."""

from __future__ import annotations

import codecs
import gc
import hashlib
import json
import operator
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_patch.data.image_headers import Rejected
from megatron_patch.data.prompts import IMAGE, Turn, pair_turns
from megatron_patch.prepare.objects import Objects, is_url

ANNOTATIONS = "blip_laion_cc_sbu_558k.json"
# A dot in a key breaks a sample without a word; 90 characters fit a plain tar header.
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
JSON_LINES = (".jsonl", ".ndjson")
"""Ends of names of files with an object on each line."""
PIECE = 1024**2
"""Bytes that are looked through at once for what tells that a json holds conversations."""
CONVERSATIONS = re.compile(rb'"(conversations|messages)"')


@dataclass(frozen=True)
class Sample:
    """A usable entry of the json."""

    key: str
    """Its name in the shards."""
    turns: list[Turn]
    """(question, answer) each."""
    images: list[str]
    """Names of its images, one for each `<image>`."""


class Samples:
    """The entries of one json, checked when they are asked for."""

    def __init__(self, place: str, digest: str, entries: list[Any]) -> None:
        """`entries`: what the json at `place` holds, whose bytes have the sha256 `digest`."""
        self.place = place
        self.digest = digest
        self._entries = entries
        self.num_pairs = sum(map(_looks_like_pair, self._entries))
        self.is_pairs = self.num_pairs == len(self) or not any(map(_is_usable_otherwise, self._entries))
        """Whether every usable sample is one question and one answer about one image: a VQASample."""
        self.has_id_keys = self.is_pairs and _have_good_ids(self._entries)
        """Whether ids are the keys in the shards, else it is the position in the json: mixes name several samples after
        one image."""

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, position: int) -> str:
        """An entry's id for the list of rejected samples, as in json, so that a line stays a line."""
        entry = self._entries[position]
        try:
            return json.dumps(entry.get("id") if isinstance(entry, dict) else entry)[:200]
        except RecursionError:
            return "nested too deeply"

    def get(self, position: int) -> Sample:
        """The sample at `position` of the json. Raises Rejected when it cannot be used."""
        entry = self._entries[position]
        try:
            turns, images = check(entry)
        except RecursionError:
            raise Rejected("nested too deeply") from None
        return Sample(str(entry["id"]) if self.has_id_keys else f"{position:09d}", turns, images)


def read_samples(folder: str, given: str | None) -> Samples:
    """What the json of conversations holds: the `given` one, else LLaVA-Pretrain's, else the only one.

    `folder` and `given` may be URLs. Raises ValueError when it is missing, is no list of samples, or when there are
    several.
    """
    if is_url(given or folder):
        place = given or f"{folder.rstrip('/')}/{ANNOTATIONS}"
        data = Objects(place).read("")
        if data is None:
            raise ValueError(f"{place}: missing; say which json holds the conversations with --annotations")
    else:
        path = Path(given) if given else _find_annotations(Path(folder))
        place, data = str(path), path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    text = _decode(place, data)
    del data  # a seventh of what there is while the objects are made
    return Samples(place, digest, _parse_list(place, text))


def _find_annotations(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected LLaVA's json and the images in it")
    if (folder / ANNOTATIONS).is_file():
        return folder / ANNOTATIONS
    given = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", *JSON_LINES) and path.is_file()]
    # Most tell it at their beginning; some have much else before it.
    found = [path for path in given if _holds_conversations(path, whole=False)]
    found = found or [path for path in given if _holds_conversations(path, whole=True)]
    if not found:
        raise ValueError(
            f"{folder / ANNOTATIONS}: missing, and no other json with conversations beside it; give --annotations"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: {names} hold conversations; say which with --annotations")
    return found[0]


def check(entry: Any) -> tuple[list[Turn], list[str]]:
    """The turns and the image names of an entry: `conversations` and `image`, or `messages` and `images`.

    Raises Rejected.
    """
    if not isinstance(entry, dict):
        raise Rejected("not a json object")
    try:
        turns = _turns(entry)
        "".join(chain.from_iterable(turns)).encode()
    except UnicodeEncodeError:
        raise Rejected("a turn is no text: it has half of a surrogate pair") from None
    except ValueError as error:
        raise Rejected(str(error)) from None
    if not turns:
        raise Rejected("conversations has no question (human) with an answer (gpt)")
    if not all(answer.strip() for _, answer in turns):
        raise Rejected("an answer is empty")
    if any(IMAGE in answer for _, answer in turns):
        raise Rejected(f"an answer has an {IMAGE}")
    given = entry.get("images") if entry.get("image") is None else entry["image"]
    images = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(image, str) for image in images):
        raise Rejected("image is not a name")
    asked = sum(question.count(IMAGE) for question, _ in turns)
    if asked != len(images):
        raise Rejected(f"the questions have {asked} {IMAGE} for {len(images)} images")
    return turns, images


def _turns(entry: dict[str, Any]) -> list[Turn]:
    """Raises ValueError. What the system says is put before the first question, as Mistral's and Llama 2's do."""
    given: Any = entry.get("messages") if entry.get("conversations") is None else entry["conversations"]
    first = given[0] if isinstance(given, list) and given else None
    if not isinstance(first, dict) or first.get("from", first.get("role")) != "system":
        return pair_turns(given)
    said = first.get("value", first.get("content"))
    turns = pair_turns(given[1:])
    if not isinstance(said, str) or IMAGE in said:
        raise ValueError(f"the system's turn is {first!r:.60}; expected a text without {IMAGE}")
    if turns and said.strip():
        turns[0] = (f"{said.strip()}\n\n{turns[0][0]}", turns[0][1])
    return turns


def _looks_like_pair(entry: Any) -> bool:
    """Quick: two turns, one image name."""
    turns = entry.get("conversations") if type(entry) is dict else None
    return type(turns) is list and len(turns) == 2 and type(entry.get("image")) is str


def _is_usable_otherwise(entry: Any) -> bool:
    if _looks_like_pair(entry):
        return False
    try:
        turns, images = check(entry)
    except Rejected:
        return False
    return len(turns) != 1 or len(images) != 1


def _have_good_ids(entries: list[Any]) -> bool:
    """Whether every entry has an id that can be a key, each another one."""
    ids = (entry.get("id") if type(entry) is dict else None for entry in entries)
    keys = sorted(str(id) for id in ids if type(id) in (str, int))  # a set would take five times the room
    return len(keys) == len(entries) and all(map(KEY.fullmatch, keys)) and all(map(operator.ne, keys, keys[1:]))


def _holds_conversations(path: Path, *, whole: bool) -> bool:
    """Whether it begins as a list of objects, or as objects on lines, and names conversations early on, or at all."""
    begin = rb"\s*(\[\s*)?\{" if path.suffix in JSON_LINES else rb"\s*\[\s*\{"
    with path.open("rb") as file:
        piece = file.read(PIECE).removeprefix(codecs.BOM_UTF8)
        if not re.match(begin, piece):
            return False
        while piece:
            if CONVERSATIONS.search(piece):
                return True
            if not whole:
                return False
            more = file.read(PIECE)
            piece = piece[-20:] + more if more else b""  # a name that lies across two
    return False


def _decode(place: str, data: bytes) -> str:
    try:
        return data.decode(json.detect_encoding(data), "surrogatepass")
    except UnicodeDecodeError as error:
        raise _not_json(place, error) from None


def _not_json(place: str, error: Exception) -> ValueError:
    return ValueError(f"{place}: not json: {error}; download it again")


def _parse_list(place: str, text: str) -> list[Any]:
    # A million small objects, none of them garbage: looking for some takes as long as the parsing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        entries = _parse_lines(place, text) if _has_lines(place, text) else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(place, error) from None
    finally:
        if was_enabled:
            gc.enable()
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{place}: expected a list of samples")
    return entries


def _has_lines(place: str, text: str) -> bool:
    """Whether it is JSON Lines: by its name, or by an object after the first one."""
    return bool(re.match(r"\s*\{", text) and (place.endswith(JSON_LINES) or re.search(r"\}\s*\{", text)))


def _parse_lines(place: str, text: str) -> list[Any]:
    """An object on each line; empty lines count for nothing."""
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}, as one of JSON Lines: {error}") from None
    return entries
