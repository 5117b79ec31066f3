"""Dataclass fields <-> `--flags`, by reflection: the one list of arguments for parser, help text and documents."""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import itertools
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def parse(config_class: type[T], argv: Sequence[str], *, positional: str | None = None) -> T:
    """Build `config_class` from `--flag value` pairs. A mistake is one line on stderr and exit code 2.

    `positional`: a setting that is given without its flag. Beside it, a bool's flag without a value means true.
    """
    parser = _Parser(description=inspect.getdoc(config_class), allow_abbrev=False, formatter_class=_Formatter)
    for owner, setting, kind in walk(config_class):
        group = next((g for g in parser._action_groups if g.title == owner.__name__), None)
        group = group or parser.add_argument_group(owner.__name__, inspect.getdoc(owner))
        help_text = f"{help_texts(owner)[setting.name]} ({default_text(setting)})"
        if setting.name == positional:
            group.add_argument(setting.name, metavar=setting.name.upper(), type=_reader(kind), help=help_text)
        else:
            group.add_argument(
                flag(setting.name),
                dest=setting.name,
                type=_reader(kind),
                required=_required(setting),
                default=argparse.SUPPRESS,
                metavar=values_text(kind),
                help=help_text,
            )
    if positional:
        switches = {flag(setting.name) for _, setting, kind in walk(config_class) if kind is bool}
        argv = list(_with_values(argv, switches))
    given = vars(parser.parse_args(argv))
    try:
        return _build(config_class, given)
    except ValueError as error:
        parser.error(str(error))


def _with_values(argv: Sequence[str], switches: set[str]) -> Iterator[str]:
    """Each of `switches` that has no value gets one."""
    for word, following in itertools.zip_longest(argv, argv[1:]):
        yield f"{word}=true" if word in switches and following not in ("true", "false") else word


def flag(field_name: str) -> str:
    """`micro_batch_size` -> `--micro-batch-size`."""
    return "--" + field_name.replace("_", "-")


def walk(config_class: type) -> Iterator[tuple[type, Field, Any]]:
    """Every setting in order: the dataclass that owns it, its field, its type."""
    kinds = typing.get_type_hints(config_class)
    for setting in fields(config_class):
        kind = kinds[setting.name]
        if is_dataclass(kind):
            yield from walk(kind)
        else:
            yield config_class, setting, kind


def _build(config_class: type[T], given: dict[str, Any]) -> T:
    values = {}
    kinds = typing.get_type_hints(config_class)
    for setting in fields(config_class):
        if is_dataclass(kinds[setting.name]):
            values[setting.name] = _build(kinds[setting.name], given)
        elif setting.name in given:
            values[setting.name] = given[setting.name]
    return config_class(**values)


def _reader(kind: Any) -> Any:
    """The function that turns a flag's text into a value of `kind`; its ValueError says what is allowed."""

    def read(text: str) -> Any:
        """A value of `kind`; ArgumentTypeError says what is allowed."""
        optional = _is_optional(kind)
        if optional and text == "none":
            return None
        plain = _without_none(kind)
        if plain is bool:
            if text not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{text!r}: expected true or false")
            return text == "true"
        if typing.get_origin(plain) is Literal:
            if text not in typing.get_args(plain):
                raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(typing.get_args(plain))}")
            return text
        if plain is Path and not text:
            raise argparse.ArgumentTypeError("an empty path: expected a folder")
        try:
            return plain(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {values_text(kind)}") from None

    return read


def values_text(kind: Any) -> str:
    """What a flag takes, in words: a type's name or its choices."""
    plain = _without_none(kind)
    if plain is bool:
        text = "true|false"
    elif typing.get_origin(plain) is Literal:
        text = "|".join(typing.get_args(plain))
    else:
        text = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}[plain]
    return text + ("|none" if _is_optional(kind) else "")


def _is_optional(kind: Any) -> bool:
    # `Literal[...] | None` is a typing.Union, `int | None` a types.UnionType.
    return typing.get_origin(kind) in (types.UnionType, typing.Union) and type(None) in typing.get_args(kind)


def _without_none(kind: Any) -> Any:
    if not _is_optional(kind):
        return kind
    (plain,) = (k for k in typing.get_args(kind) if k is not type(None))
    return plain


def _required(setting: Field) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING


def default_text(setting: Field) -> str:
    """What a flag means when it is left out, in words: "required" or "default: VALUE"."""
    if _required(setting):
        return "required"
    default = setting.default
    return f"default: {str(default).lower() if isinstance(default, bool) or default is None else default}"


@functools.cache  # each call would parse the whole file
def help_texts(owner: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, read from the class's source."""
    (class_node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(class_node, ast.ClassDef)
    texts = {}
    for node, following in zip(class_node.body, class_node.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            texts[node.target.id] = inspect.cleandoc(ast.literal_eval(following.value))
    return texts


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8, width=120)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Print one line and end with exit code 2."""
        if message.startswith("unrecognized arguments: "):
            unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            message = f"{unknown or repr(unknown)}: no such flag; {hint}"
        elif message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
