"""A dataset is data: what its yaml files name is not run, unless the user says so.

Energon imports and calls whatever a metadataset or a dataset.yaml names (`__module__` with `__class__` or
`__function__`, at any depth), and runs Python files that lie in the dataset (`sample_loader`, `part_filter`). All of
it goes through two methods of energon's, which are guarded here, so that no yaml is overlooked, however it is reached.
Nor may a pattern of shards' names (`{00000..00557}.tar`) ask for more of them than fit in memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import braceexpand
import megatron.energon
from megatron.energon import BaseCoreDatasetFactory, DatasetLoaderInterface, Sample
from megatron.energon.epathlib import EPath

from megatron_patch.data.conversation import Conversation
from megatron_patch.data.private_api import replaced_in_energon

ENERGON = "megatron.energon"
KINDS = (Sample, BaseCoreDatasetFactory, DatasetLoaderInterface)
"""Energon's classes of these kinds may be named: types of samples, datasets, metadatasets."""
MOST_NAMES = 1_000_000
"""Shards that a pattern in a split.yaml may name."""
GROUP = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


class DatasetCodeError(ValueError):
    """A dataset would run code that the user did not allow."""


@contextlib.contextmanager
def guarded(*, allow_code: bool) -> Iterator[None]:
    """While datasets are opened: raises DatasetCodeError for whatever one names that is not energon's own kind."""
    if allow_code:
        yield
        return
    read: list[str] = []  # the yaml files, the last being the one whose names are looked up
    plainly_opened = EPath.open

    def resolve(parser: object, module_name: str, object_name: str, *_: Any, **__: Any) -> type:
        found = _allowed(module_name, object_name)
        if found is None:
            raise _refused(read, f"{module_name}.{object_name}")
        return found

    def load_module(loader: object, path: EPath | str) -> None:
        raise _refused(read, str(path))

    def opened(path: EPath, *args: Any, **kwargs: Any) -> Any:
        if path.name.endswith((".yaml", ".yml")):
            read.append(str(path))
        return plainly_opened(path, *args, **kwargs)

    # Nor are modules known that an earlier dataset of this process was allowed.
    with replaced_in_energon(resolve, load_module, opened, _expand):
        yield


def _expand(pattern: str, escape: bool = True) -> Iterator[str]:
    """`braceexpand.braceexpand`, which raises ValueError before it names more than `MOST_NAMES`."""
    count, rest = 1, pattern
    while group := GROUP.search(rest):
        ends = RANGE.fullmatch(group[1])
        step = int(ends[3] or 1) if ends else 1
        count *= abs(int(ends[1]) - int(ends[2])) // (abs(step) or 1) + 1 if ends else group[1].count(",") + 1
        if count > MOST_NAMES:
            raise ValueError(f"{pattern[:100]!r} names more than {MOST_NAMES:,} shards")
        rest = rest[: group.start()] + rest[group.end() :]
    return braceexpand.braceexpand(pattern, escape)


def _allowed(module_name: Any, object_name: Any) -> type | None:
    if (module_name, object_name) == (Conversation.__module__, Conversation.__name__):
        return Conversation
    if not isinstance(module_name, str) or not isinstance(object_name, str):
        return None
    if module_name != ENERGON and not module_name.startswith(f"{ENERGON}."):
        return None
    # Older releases had them in other modules: the name counts, and no module is imported for it.
    found = getattr(megatron.energon, object_name, None)
    return found if isinstance(found, type) and issubclass(found, KINDS) else None


def _refused(read: list[str], what: str) -> DatasetCodeError:
    where = f"{read[-1]}: " if read else ""
    return DatasetCodeError(
        f"{where}names {' '.join(what.split())[:200]!r}, which would run code that the dataset brings or names; look "
        f"at it, and give --allow-dataset-code true if you trust it"
    )
