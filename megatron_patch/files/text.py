"""Texts that others wrote, as they may be shown on a terminal, in a log, in a list. Imports nothing heavy."""

from __future__ import annotations


def printable(text: object, limit: int = 2000) -> str:
    """On one line: blanks as one, control characters and those that turn the direction of writing as escapes."""
    said = " ".join(str(text).split())
    if not said.isprintable():
        said = "".join(character if character.isprintable() else repr(character)[1:-1] for character in said)
    return said if len(said) <= limit else f"{said[: limit - 3]}..."
