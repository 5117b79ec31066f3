"""Checks that settings have in common; each error is one line that names the flag. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import math
import sysconfig
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require_finite(settings: DataclassInstance) -> None:
    """Raise ValueError for the first field that is infinite or NaN."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{setting.name.replace('_', '-')} {value}: expected a finite number")


def require_positive(settings: object, *names: str) -> None:
    """Raise ValueError for the first of these fields that is less than 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 1 or more")


def require_not_negative(settings: object, *names: str) -> None:
    """Raise ValueError for the first of these fields that is less than 0."""
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected 0 or more")


def require_transformer_engine(given: str, instead: str) -> None:
    """Raise ValueError where Transformer Engine is not installed, or without its extension for torch.

    Whether it can be imported is seen when it is: by patches/transformer_engine.py.
    """
    package = importlib.util.find_spec("transformer_engine")
    if package is None:
        raise ValueError(f"{given}: needs transformer-engine[pytorch], which is not installed; use {instead}")
    if not _has_torch_extension(package.origin):
        raise ValueError(
            f"{given}: needs transformer-engine[pytorch], which is installed without its part for torch "
            f"(transformer_engine_torch); install that as README.md says under Installation, or use {instead}"
        )


def _has_torch_extension(package: str | None) -> bool:
    """Whether the library lies where Transformer Engine looks for it; `package`: path of its __init__.py."""
    roots = [Path(package).parents[1]] if package is not None else []
    roots.append(Path(sysconfig.get_path("purelib")))
    places = [root / place for root in roots for place in (".", "transformer_engine", "transformer_engine/wheel_lib")]
    return any(True for place in places for _ in place.glob("transformer_engine_torch*.so"))
