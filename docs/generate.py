"""Write the pages that say what the code says: `make docs`. tests/unit/test_docs.py compares them with the code.

Flags and their help come from the dataclasses, positional arguments from the scripts, names of tensors from the
families' tables. Imports no torch.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from megatron_patch.config.dataset import Settings
from megatron_patch.config.flags import default_text, flag, help_texts, values_text, walk
from megatron_patch.config.train import Config
from megatron_patch.conversion.settings import Conversion
from megatron_patch.data import inspect_samples
from megatron_patch.families.fused_names import FUSED_NORMS
from megatron_patch.families.hf_config import describe
from megatron_patch.families.llava import parts
from megatron_patch.families.projector import PROJECTOR
from megatron_patch.families.registry import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_patch.families.table import Family, Weight

ROOT = Path(__file__).resolve().parent.parent
MADE = "<!-- Made by `make docs` from the code. Change the code, not this page. -->\n"
TRAIN_SCRIPT = "examples/llava_mcore/run_mcore_llava.sh"
CONVERT_SCRIPT = "toolkits/model_checkpoints_convertor/llava/hf2mcore_convertor_llava.sh"
COMMANDS = (
    ("train", "examples/llava_mcore/pretrain_llava.py", Config, None),
    ("convert", "toolkits/model_checkpoints_convertor/convert.py", Conversion, None),
    ("prepare", "toolkits/multimodal_data_preprocessing/convert_llava_pretrain_to_wds.py", Settings, "dir"),
)
"""Command of the package, its script, the settings that its flags are made from, and the one given without a flag."""
LAYOUTS = {
    "same": "the same tensor on both sides",
    "qkv": "query, key and value, interleaved per query group: [g, (query heads of the group, k, v) x d, ...]",
    "gated": "[gate; up]; shard i holds [gate_i; up_i]",
    "vocab": "padded with zero rows to a multiple of 128 x TP",
    "class_token": "[h] in Hugging Face, [1, 1, h] in megatron.core",
}
TABLES = ("name", "weights", "settings", "required")
"""Fields of a Family that have tables of their own; all others are listed as facts."""


def pages() -> dict[Path, str]:
    """Path -> text of every page that is made from the code."""
    return {ROOT / "docs/arguments.md": arguments_page(), ROOT / "docs/mapping.md": mapping_page()}


def arguments_page() -> str:
    """Every argument and flag of every command."""
    sections = [
        "# Arguments",
        MADE,
        "A flag is given as `--flag value` or `--flag=value`; the last one wins. `none` leaves an optional setting "
        "unset. The scripts run from a clone; `pip install .` brings the same commands as `megatron-patch COMMAND`.",
        *positional_section(TRAIN_SCRIPT, Config),
        *positional_section(CONVERT_SCRIPT, Conversion),
    ]
    for command, script, settings, positional in COMMANDS:
        sections += [f"## Flags of `megatron-patch {command}`", f"The same as `python {script}`.", doc_of(settings)]
        for owner, rows in groupby(walk(settings), key=itemgetter(0)):
            if owner is not settings:
                sections += [f"### {owner.__name__}", doc_of(owner)]
            sections.append(
                table(
                    ("flag", "takes", "default", "what it says"),
                    [flag_row(owner, setting, kind, positional) for _, setting, kind in rows],
                )
            )
    sections += [
        "## `megatron-patch preview`",
        f"```text\n{inspect_samples.USAGE.format(name='inspect_samples.py')}\n```",
        "The same as `python toolkits/multimodal_data_preprocessing/inspect_samples.py`.",
        "## `megatron-patch inspect`",
        "```text\ninspect_checkpoint.py FOLDER\n```",
        "prints what a checkpoint is, without loading it. The same as "
        "`python toolkits/model_checkpoints_convertor/inspect_checkpoint.py`.",
    ]
    return page(sections)


def positional_section(script: str, settings: type) -> list[str]:
    """A script's positional arguments, each with the flag that it becomes."""
    kinds = {flag(setting.name): (owner, setting, kind) for owner, setting, kind in walk(settings)}
    rows = []
    for position, name, given, is_optional in positionals((ROOT / script).read_text()):
        owner, setting, kind = kinds[given]
        number = f"{position}, optional" if is_optional else str(position)
        rows.append((number, name, code(given), code(values_text(kind)), sentence(help_texts(owner)[setting.name])))
    return [
        f"## Positional arguments of `{Path(script).name}`",
        f"`{script}` turns each into a flag. Further flags may follow, and win.",
        table(("$", "name", "flag", "takes", "what it says"), rows),
    ]


def positionals(text: str) -> Iterator[tuple[int, str, str, bool]]:
    """(position, name, flag, whether it may be left out) of a script's arguments, as the script itself has them.

    Such as `TP=${10}` and, further down, `--tensor-model-parallel-size="$TP"`. One that is handed on and has no number
    of its own is an optional last one.
    """
    numbers = {name: int(number) for name, number in re.findall(r"^([A-Z0-9_]+)=\$\{?(\d+)\}?", text, re.MULTILINE)}
    handed_on = re.findall(r'^ +(--[a-z0-9-]+)="\$([A-Z0-9_]+)"', text, re.MULTILINE)
    for position, (given, name) in enumerate(handed_on, start=1):
        assert numbers.get(name, position) == position, (
            f"{name} is ${numbers[name]}, and handed on as number {position}"
        )
        yield position, name, given, name not in numbers


def flag_row(owner: type, setting: Field, kind: Any, positional: str | None) -> tuple[str, ...]:
    """A flag's row; `positional`: the setting that is given without one."""
    name, takes = code(flag(setting.name)), code(values_text(kind))
    if setting.name == positional:
        name = code(setting.name.upper())
    default = default_text(setting)
    default = default if default == "required" else code(default.removeprefix("default: "))
    return name, takes, default, sentence(help_texts(owner)[setting.name])


def mapping_page() -> str:
    """Every family's table."""
    # Prefixes belong to the kind of model, whatever its family and sizes: those of the default ones will do.
    language, vision, projector = parts(
        describe(
            {
                "model_type": "llava",
                "text_config": {"model_type": next(iter(LANGUAGE_FAMILIES))},
                "vision_config": {"model_type": next(iter(VISION_FAMILIES))},
            }
        )
    )
    sections = [
        "# Names and layouts of every model family",
        MADE,
        "A table for each family of `megatron_patch/families/`. The converter reads these rows in both directions and "
        "at every parallel size; a tensor without a row, on either side, is an error. `*` is a layer's index. "
        "Differences that are not a matter of names: [formats.md](formats.md#megatroncores-llava-and-hugging-faces).",
        "## Parts of a LLaVA",
        table(
            ("part", "families", "prefix in megatron.core", "prefix in Hugging Face"),
            [
                (what, ", ".join(names), code(part.mcore_prefix), code(part.hf_prefix))
                for what, names, part in (
                    ("language model", LANGUAGE_FAMILIES, language),
                    ("vision tower", VISION_FAMILIES, vision),
                    ("projector", (PROJECTOR.name,), projector),
                )
            ],
        ),
        "These are the hub's names. transformers 5 leaves some of them out when it saves; the converter reads both.",
        "## Layouts",
        table(("layout", "megatron.core's tensor"), [(code(name), text) for name, text in LAYOUTS.items()]),
        "The tensor-parallel axis is the one that is sharded over ranks: 0 is a column-parallel layer's output, 1 a "
        "row-parallel layer's input. A replicated tensor is whole on every rank.",
        "## Transformer Engine's names",
        "Its layers hold the norm before a linear layer. In torch_dist checkpoints these names stand for both kinds of "
        "layer.",
        table(("megatron.core's local layers", "Transformer Engine's"), [map(code, pair) for pair in FUSED_NORMS]),
    ]
    for family in (*LANGUAGE_FAMILIES.values(), *VISION_FAMILIES.values(), PROJECTOR):
        sections += family_sections(family)
    return page(sections)


def family_sections(family: Family) -> Iterator[str]:
    """One family: what its file says of it, its tensors, its config.json, and every other field of `Family`."""
    yield f"## {family.name}"
    yield sentence(file_doc(family))
    yield table(
        ("megatron.core", "Hugging Face", "layout", "tensor-parallel axis"),
        [weight_row(weight) for weight in family.weights],
    )
    if family.settings:
        yield table(
            ("setting", "in config.json", "when left out", "null"),
            [
                (
                    code(row.mcore),
                    code(row.hf),
                    fact(row.default),
                    "allowed" if row.optional or row.default is None else "",
                )
                for row in family.settings
            ],
        )
    if family.required:
        yield "Taken as given in config.json, the first value where it is left out; another value is refused:"
        yield table(("in config.json", "values"), [(code(name), fact(values)) for name, values in family.required])
    yield table(("field", "value", "what it says"), facts(family))


def facts(owner: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field of a table that is not shown elsewhere and says something, with the sentence under it."""
    texts = help_texts(type(owner))
    for field in fields(owner):
        value, name = getattr(owner, field.name), prefix + field.name
        if is_dataclass(value):
            yield from facts(value, f"{name}.")
        elif name not in TABLES and value not in ((), None):
            yield code(name), fact(value), sentence(texts.get(field.name, ""))


def weight_row(weight: Weight) -> tuple[str, ...]:
    """A tensor's row."""
    assert weight.layout in LAYOUTS, f"{weight.layout}: say in LAYOUTS what it is"
    axis = "replicated" if weight.axis is None else str(weight.axis)
    return code(weight.mcore), "<br>".join(map(code, weight.hf)), code(weight.layout), axis


def file_doc(family: Family) -> str:
    """What the file that defines a family says of it, in its first lines."""
    files = {path: path.read_text() for path in (ROOT / "megatron_patch/families").glob("*.py")}
    (text,) = (text for text in files.values() if re.search(rf'^ +name="{family.name}",$', text, re.MULTILINE))
    return ast.get_docstring(ast.parse(text)) or ""


def pair(item: tuple[Any, Any]) -> str:
    """A name, and what it becomes or its dimensions."""
    name, what = item
    return f"{code(name)}: {' x '.join(map(code, what)) if isinstance(what, tuple) else code(what)}"


def fact(value: Any) -> str:
    """A field's value, whatever it is."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "<br>".join(f"{code(name)}: {code(json.dumps(held))}" for name, held in value.items())
    if isinstance(value, tuple | list | frozenset):
        return "<br>".join(pair(item) if isinstance(item, tuple) else fact(item) for item in value)
    return code(str(value).lower() if isinstance(value, bool) else str(value))


def page(sections: Iterable[str]) -> str:
    """Paragraphs, a blank line between them."""
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a `|` within a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def doc_of(settings: type) -> str:
    """What the dataclass says of itself, its paragraphs in Markdown."""
    paragraphs = re.split(r"\n\s*\n", settings.__doc__ or "")
    return "\n\n".join(map(sentence, paragraphs))


def sentence(text: str) -> str:
    """A help text in Markdown: one line, flags as code, nothing that would be taken for HTML."""
    joined = " ".join(text.split()).replace("<", "&lt;")
    return re.sub(
        r"(?<![\w`-])--[a-z][a-z0-9-]*( (true|false|none|neva|projector)\b)?", lambda found: f"`{found[0]}`", joined
    )


def code(text: str) -> str:
    """As code."""
    return f"`{text}`"


def main() -> None:
    """Write every page."""
    for path, text in pages().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
