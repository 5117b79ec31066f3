"""What the property tests share: how many examples are tried, and files' contents that nobody wrote on purpose."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# PROPERTY_EXAMPLES=10000 for a search by hand. The same examples each time, so that CI does not fail by chance.
examples = settings(
    max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "100")),
    deadline=None,
    derandomize="PROPERTY_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

few = settings(examples, max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "20")))
"""Of what takes a tenth of a second each."""

MAX_SECONDS = 10
MAX_MEMORY = 700 * 2**20

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
"""Any value that json can hold, NaN and infinities as Python's json writes them."""


def changed(content: dict) -> st.SearchStrategy[dict]:
    """`content` with some of its keys, at any depth of objects, gone or replaced by any json value."""

    def field(value: object) -> st.SearchStrategy[object]:
        kept = changed(value) if isinstance(value, dict) else st.just(value)
        return st.one_of(kept, kept, kept, json_values)

    some = st.sets(st.sampled_from(sorted(content)), max_size=2) if content else st.just(set())
    whole = st.fixed_dictionaries({name: field(value) for name, value in content.items()})
    return st.tuples(whole, some).map(lambda pair: {name: v for name, v in pair[0].items() if name not in pair[1]})


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` cut off, or with a few bytes replaced."""
    places = st.lists(
        st.tuples(st.integers(0, max(len(content) - 1, 0)), st.binary(min_size=1, max_size=4)), max_size=4
    )

    def write(edits: list[tuple[int, bytes]], end: int) -> bytes:
        out = bytearray(content)
        for place, new in edits:
            out[place : place + len(new)] = new
        return bytes(out[:end])

    return st.builds(write, places, st.just(len(content)) | st.integers(0, len(content)))


@contextmanager
def one_line(path: object = "") -> Iterator[None]:
    """What a reader may raise: one line of ValueError or OSError that names the file, or its folder.

    Nor may it take more of the processor and of memory than any file is worth.
    """
    before, peak = time.process_time(), _peak_memory()
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        if str(path) not in text or "\n" in text or len(text) > 2000:
            raise AssertionError(f"not one line that names {path}: {text!r}") from error
    assert time.process_time() - before < MAX_SECONDS
    assert _peak_memory() - peak < MAX_MEMORY


def _peak_memory() -> int:
    """The most bytes that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_one_line(read: Callable[[], object], path: object = "") -> None:
    """`read` returns, or raises such a line and nothing else."""
    with one_line(path):
        read()
