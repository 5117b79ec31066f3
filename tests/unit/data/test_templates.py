"""A checkpoint's own chat template, wherever it is kept: transformers is the judge of which one counts."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from megatron_patch.data.prompts import find_format, prompt_format
from megatron_patch.data.templates import read_template
from megatron_patch.data.tokenize import open_tokenizer
from tests.unit.data.samples import but_in_transformers_4
from tests.unit.data.tokenizers import tiny
from tests.unit.properties import examples, in_one_line, json_values

ONE, OTHER = "{{ 'one' }}", "{{ 'other' }}"
FILES = {
    "a string": {"tokenizer_config.json": ONE},
    "a list of named ones": {
        "tokenizer_config.json": [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": ONE}]
    },
    "a file": {"chat_template.jinja": ONE, "tokenizer_config.json": OTHER},
    "a file beside a list": {
        "chat_template.jinja": ONE,
        "tokenizer_config.json": [{"name": "default", "template": OTHER}],
    },
    "a folder beside a file": {"chat_template.jinja": ONE, "additional_chat_templates/rag.jinja": OTHER},
}
FOR_LLAVA = {
    "a processor's file": {"chat_template.json": ONE, "tokenizer_config.json": OTHER},
    "a processor's file beside a newer one": {"chat_template.json": ONE, "chat_template.jinja": OTHER},
    "a processor's key": {"processor_config.json": ONE, "chat_template.jinja": OTHER},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("language model") / "llm")


def with_files(source, folder, files, model_type):
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, template in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".jinja"):
            path.write_text(template)
        else:
            content = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps({**content, "chat_template": template}))
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_a_language_models_is_the_one_that_its_tokenizer_takes(kind, source, tmp_path):
    folder = with_files(source, tmp_path / "llm", FILES[kind], "mistral")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert read_template(folder, open_tokenizer(folder)) == tokenizer.get_chat_template() == ONE


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_language_model_has_no_processor(name, source, tmp_path):
    folder = with_files(source, tmp_path / "llm", {name: OTHER, "tokenizer_config.json": ONE}, "mistral")
    assert read_template(folder, open_tokenizer(folder)) == AutoTokenizer.from_pretrained(folder).chat_template == ONE


@pytest.mark.parametrize("kind", but_in_transformers_4({**FILES, **FOR_LLAVA}, "a processor's key"))
def test_a_llavas_is_the_one_that_its_processor_takes(kind, source, tmp_path):
    folder = with_files(source, tmp_path / "llava", {**FILES, **FOR_LLAVA}[kind], "llava")
    settings, _ = ProcessorMixin.get_processor_dict(folder)
    found = settings.get("chat_template") or AutoTokenizer.from_pretrained(folder).chat_template
    found = found["default"] if isinstance(found, dict) else found
    assert read_template(folder, open_tokenizer(folder)) == found == ONE


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": [{"name": "tool_use", "template": ONE}, {"name": "rag", "template": OTHER}]},
        {"additional_chat_templates/rag.jinja": OTHER},
    ],
)
def test_several_without_a_default_are_refused(files, source, tmp_path):
    folder = with_files(source, tmp_path / "llm", files, "mistral")
    with pytest.raises(
        ValueError, match=r"llm: of its chat templates \('rag'.* none is named 'default'.*--prompt-format"
    ):
        find_format("auto", folder, "mistral")
    assert find_format("mistral", folder, "mistral") == "mistral"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 9000000 }}",
    ],
)
def test_a_template_without_bounds_ends_in_one_line(template, source, monkeypatch):
    monkeypatch.setattr("megatron_patch.data.templates.SECONDS", 1)
    tokenizer = open_tokenizer(source)
    tokenizer.chat_template = template
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"takes more than 1 seconds or 512 MB to write two messages") as caught:
        prompt_format("tokenizer", tokenizer)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30


def test_a_template_that_fills_memory_in_no_time_ends_in_one_line(source, monkeypatch):
    monkeypatch.setattr("megatron_patch.data.templates.SECONDS", 60)
    tokenizer = open_tokenizer(source)
    tokenizer.chat_template = "{% set x = messages[0]['content'] * 300000000 %}{{ x[0] }}"
    with pytest.raises(ValueError, match="takes more than 60 seconds or 512 MB to write two messages"):
        prompt_format("tokenizer", tokenizer)


@examples
@given(
    content=json_values | st.fixed_dictionaries({"chat_template": json_values}),
    name=st.sampled_from(["chat_template.json", "processor_config.json", "config.json"]),
)
def test_damage_is_one_line(content, name, source, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (folder / name).write_text(json.dumps(content))

    class Without:
        chat_template = None

    in_one_line(lambda: read_template(folder, Without()), folder)
