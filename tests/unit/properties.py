"""What the property tests share: how many examples are tried, and files' contents that nobody wrote on purpose."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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


def read_or_refused(read: Callable[[], object], named: Path) -> None:
    """Call `read`: it returns, or raises the house's error, one line that names the file or folder `named`."""
    try:
        read()
    except ValueError as error:
        message = str(error)
    else:
        return
    assert str(named) in message
    assert "\n" not in message
