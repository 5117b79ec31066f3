"""What is shown of others' texts does nothing to a terminal and stays on its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.files.text import printable
from tests.unit.properties import examples


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("a cat, une église, 猫", "a cat, une église, 猫"),
        ("two\nlines\tand \r\n more", "two lines and more"),
        ("\x1b[2Jred\x07", r"\x1b[2Jred\x07"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
        ("\x9b31m", r"\x9b31m"),
        (OSError(2, "No such file", "a\x1b"), r"[Errno 2] No such file: 'a\x1b'"),
    ],
)
def test_control_characters_are_escapes(given_text, shown):
    assert printable(given_text) == shown


@examples
@given(st.text(), st.integers(3, 40))
def test_any_text_is_one_printable_line(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
