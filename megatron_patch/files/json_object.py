"""Json files that hold an object, as Hugging Face's do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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
