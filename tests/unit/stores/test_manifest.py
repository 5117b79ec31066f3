"""A manifest whatever it says: also one whose own sum was made again."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from megatron_patch.conversion.settings import read_record
from megatron_patch.stores import manifest
from tests.unit.properties import changed, damaged, examples, one_line

TENSOR = {
    "dtype": "float32",
    "shape": [2, 3],
    "whole": "a.weight",
    "axis": 0,
    "ranges": [[0, 2]],
    "rows": [2],
    "sha256": ["0" * 64],
}
CONTENT = {
    "format": 1,
    "tools": {"torch": "2"},
    "source": [{"file": "model.safetensors", "size": 1}],
    "ranks": {"mp_rank_00": {"file": "mp_rank_00/a.pt", "size": 9, "frame_sha256": "1", "tensors": {"a": TENSOR}}},
}
RECORD = {"language_model": "a", "vision_tower": "b", "precision": "bf16", "added_tokens": ["<a>"], "versions": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


def signed(folder, content):
    (folder / manifest.FILE).write_text(json.dumps({**content, "sha256": manifest._digest(content)}))


def test_what_was_written_is_read(folder):
    signed(folder, CONTENT)
    assert manifest.read(folder)["mp_rank_00"].tensors["a"] == manifest.TensorRecord(**TENSOR)


@pytest.mark.parametrize(
    ("rank", "tensor", "why"),
    [
        ({"file": "../../theirs"}, {}, r"it names the file '\.\./\.\./theirs'"),
        ({"file": "/etc/passwd"}, {}, "it names the file '/etc/passwd'"),
        ({"file": "a/b/c"}, {}, "it names the file 'a/b/c'"),
        ({"size": -1}, {}, "a size is no whole number"),
        ({"size": True}, {}, "a size is no whole number"),
        ({"frame_sha256": None}, {}, "a name or a sum is no text"),
        ({}, {"rows": [1, 1]}, "its runs, their sums or its axis do not belong together"),
        ({}, {"axis": 2}, "its runs, their sums or its axis do not belong together"),
        ({}, {"shape": [2, 3.0]}, "a size is no whole number"),
        ({}, {"ranges": [[0, 2**63]]}, "a size is no whole number"),
        ({}, {"whole": 7}, "a name or a sum is no text"),
    ],
)
def test_values_that_nobody_wrote_are_refused(folder, rank, tensor, why):
    """Their sum was made again."""
    whole = {**CONTENT["ranks"]["mp_rank_00"], "tensors": {"a": {**TENSOR, **tensor}}, **rank}
    signed(folder, {**CONTENT, "ranks": {"mp_rank_00": whole}})
    with pytest.raises(ValueError, match=rf"manifest\.json: damaged or changed \(.*{why}"):
        manifest.read(folder)


@pytest.mark.parametrize("changed", [{"tools": {"torch": 2}}, {"source": [{"file": ["a"], "size": 1}]}])
def test_sources_and_tools_are_named_by_text(folder, changed):
    """They are shown."""
    signed(folder, {**CONTENT, **changed})
    with pytest.raises(ValueError, match="it names sources or tools by something else than text"):
        manifest.load(folder)


@examples
@given(changed(CONTENT))
def test_whatever_it_says(folder, content):
    signed(folder, {name: value for name, value in content.items() if name != "sha256"})
    with one_line(folder):
        manifest.read(folder)


@examples
@given(damaged(json.dumps({**CONTENT, "sha256": manifest._digest(CONTENT)}).encode()))
def test_whatever_bytes_it_holds(folder, content):
    (folder / manifest.FILE).write_bytes(content)
    with one_line(folder):
        manifest.read(folder)


@pytest.mark.parametrize("content", ["[" * 20000 + "]" * 20000, "[]", "\ufeff{}"])
def test_other_text(folder, content):
    (folder / manifest.FILE).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged or changed"):
        manifest.read(folder)


@examples
@given(changed(RECORD))
def test_whatever_an_import_says_of_itself(folder, content):
    (folder / "conversion.json").write_text(json.dumps(content))
    with one_line(folder):
        record = read_record(folder)
        assert all(isinstance(token, str) for token in record.get("added_tokens", []))
