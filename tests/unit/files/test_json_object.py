"""Json that is no object, in another encoding, or too deep: one line that names the file."""

from __future__ import annotations

import json

import pytest

from megatron_patch.files.json_object import MAX_DEPTH, read_json


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b'{"a": "\\ud800"}', "not valid json .*surrogates not allowed", id="half of a pair"),
        pytest.param('{"a": "é"}'.encode("latin1"), "not valid json .*expected text in UTF-8", id="another encoding"),
        pytest.param('{"a": "é"}'.encode("utf-16"), "not valid json .*expected text in UTF-8", id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf{}", "not valid json", id="a byte order mark, which transformers refuses"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, "nested too deep", id="deep"),
        pytest.param(
            b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested too deep", id="not quite as deep"
        ),
        pytest.param(b"[{}]", "holds a list; expected an object", id="a list"),
        pytest.param(b"null", "holds a NoneType; expected an object", id="nothing"),
        pytest.param(b"9" * 5000, "not valid json", id="a number of thousands of digits"),
    ],
)
def test_json_that_is_not_an_object_in_utf_8_is_one_line(content, why, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: {why}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_is_utf_8_whatever_the_locale(tmp_path):
    path, content = tmp_path / "config.json", {"a": "日本語 é 😀", "pair": "\U0001f600"}
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False)):
        path.write_bytes(text.encode())
        assert read_json(path) == content
