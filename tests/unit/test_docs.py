"""Pages agree with the code, and with each other: what is made from the code, links, names of files and functions."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest

from megatron_patch.config.train import PromptFormatName

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "examples", "toolkits", "benchmarks", "tests", "megatron_patch")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*\.(py|sh)")
NAMED = re.compile(r"`([\w/-]+\.py)` `([\w.]+)(?:\(\))?`")
"""A file and what is in it, as the pages write it: `training/loop.py` `train`."""


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeated = (f"{slug}-{count}" for count in range(1, 100) if f"{slug}-{count}" not in found)
        found.add(next(repeated) if slug in found else slug)
    return found


def broken(page: Path) -> list[str]:
    """Links of a page to files and headings that are not there."""
    wrong = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def find(file: str, page: Path) -> list[Path]:
    """Where a file may be that a page names: in the repository, in the package, or beside the page."""
    places = (ROOT, ROOT / "megatron_patch", page.parent)
    return [place / file for place in places if (place / file).exists()]


@pytest.mark.parametrize("path", generate.pages(), ids=name_of)
def test_what_is_made_from_the_code_is_as_the_code_says(path):
    assert path.read_text() == generate.pages()[path], f"{name_of(path)} is older than the code: run `make docs`"


@pytest.mark.parametrize(
    ("script", "numbers", "optional"), [(generate.TRAIN_SCRIPT, 23, 0), (generate.CONVERT_SCRIPT, 8, 1)]
)
def test_every_positional_argument_is_there(script, numbers, optional):
    found = list(generate.positionals((ROOT / script).read_text()))
    assert [position for position, *_ in found] == list(range(1, numbers + optional + 1))
    assert [may_be_left_out for *_, may_be_left_out in found] == [False] * numbers + [True] * optional


def test_an_argument_that_is_handed_on_at_another_place_is_found():
    with pytest.raises(AssertionError, match="TP is \\$2, and handed on as number 1"):
        list(generate.positionals('TP=$2\nPP=${1}\nexec convert \\\n    --tp="$TP" \\\n    --pp="$PP" \\\n'))


def test_every_prompt_format_has_its_row():
    (rows,) = re.findall(
        r"^### Prompt formats\n\n.*?\n\n", (ROOT / "docs/formats.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == set(get_args(PromptFormatName))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One\n\n## `--flag`: A & B\n\n## One\n\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#--flag-a--b) [c](other.md#one-1) [d](#top) [e](https://x.org/#y) `[f](g)`"
    page.write_text(f"# Top\n{good}\n[h](none.md) [i](other.md#no-heading) [j](#other)\n")
    assert broken(page) == ["none.md", "other.md#no-heading", "#other"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_a_page_names_are_there(page):
    text = prose(page)
    spans = re.findall(r"`([^`\n]+)`", text)
    assert [span for span in spans if "/" in span and FILE.fullmatch(span) and not find(span, page)] == []
    for file, names in NAMED.findall(text):
        source = "".join(path.read_text() for path in find(file, page))
        for name in names.split("."):
            assert re.search(rf"\b(def|class) {name}\b|^ *{name}\b", source, re.MULTILINE), f"{file} has no {name}"
