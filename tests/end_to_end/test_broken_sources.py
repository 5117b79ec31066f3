"""Source folders with a broken file: one line that names it, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.conversion.commands import main
from megatron_patch.tensor_io import disk
from tests.canary import Canary
from tests.end_to_end.scripts import CONVERT_MODEL, ROOT, call, environment


@pytest.fixture(scope="module")
def sources(tmp_path_factory, mistral, clip) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {"llm": shutil.copytree(mistral, folder / "llm"), "clip": shutil.copytree(clip, folder / "clip")}


def refused(capsys, target: Path, sources: dict[str, Path]) -> str:
    capsys.readouterr()
    flags = {"source-llm-ckpt-path": sources["llm"], "source-clip-ckpt-path": sources["clip"]}
    assert main([f"--{name}={value}" for name, value in {**flags, "target-ckpt-path": target}.items()]) == 1
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert list(target.parent.iterdir()) == []
    return lines[0]


@contextlib.contextmanager
def changed(path: Path, key: str, value: object) -> Iterator[None]:
    """A json file with one setting changed, for a while."""
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), key: value}))
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("source", "key", "value", "message"),
    [
        ("llm", "vocab_size", None, "vocab_size is None; expected a whole number above 0"),
        ("llm", "vocab_size", [], "vocab_size is []; expected a whole number above 0"),
        ("llm", "num_hidden_layers", "4", "num_hidden_layers is '4'; expected a whole number above 0"),
        ("llm", "hidden_size", 96.5, "hidden_size is 96.5; expected a whole number above 0"),
        ("llm", "num_attention_heads", 0, "num_attention_heads is 0; expected a whole number above 0"),
        ("llm", "num_key_value_heads", {}, "num_key_value_heads is {}; expected a whole number above 0"),
        ("llm", "head_dim", True, "head_dim is True; expected a whole number above 0"),
        ("llm", "rms_norm_eps", float("nan"), "rms_norm_eps is nan; expected a number above 0"),
        ("llm", "rope_theta", float("inf"), "rope_theta is inf; expected a number above 0"),
        ("llm", "rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'; expected a number above 0"),
        ("llm", "tie_word_embeddings", "no", "tie_word_embeddings is 'no'; expected true or false"),
        ("llm", "rope_theta", "x", "rope_theta is 'x'; expected a number above 0"),
        ("llm", "rope_parameters", "llama3", "rope_parameters is 'llama3'; expected an object"),
        ("llm", "quantization_config", {"bits": 4}, "quantization_config: quantized weights are not supported"),
        ("clip", "quantization_config", {"bits": 8}, "quantization_config: quantized weights are not supported"),
        ("llm", "model_type", ["mistral"], "model_type ['mistral'] is not supported"),
        ("clip", "image_size", None, "image_size is None; expected a whole number above 0"),
        ("clip", "num_hidden_layers", "3", "num_hidden_layers is '3'; expected a whole number above 0"),
    ],
)
def test_wrong_types_in_config_json(tmp_path, capsys, sources, source, key, value, message):
    path = sources[source] / "config.json"
    with changed(path, key, value):
        line = refused(capsys, tmp_path / "target", sources)
    assert str(path) in line
    assert message in line


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        ("llm", "config.json", "{", "not valid json"),
        ("llm", "tokenizer.json", '{"version"', "not valid json"),
        ("llm", "tokenizer_config.json", "[]", "holds a list; expected an object"),
        ("llm", "generation_config.json", "", "not valid json"),
        ("llm", "pytorch_model.bin.index.json", "{", "not valid json"),
        ("llm", "chat_template.json", "{{ messages }}", "not valid json"),
        ("clip", "preprocessor_config.json", "null", "holds a NoneType; expected an object"),
        ("clip", "preprocessor_config.json", "\ufffd", "not valid json"),
    ],
)
def test_broken_files(tmp_path, capsys, sources, source, name, content, message):
    path = sources[source] / name
    before = path.read_bytes() if path.exists() else None
    path.write_text(content)
    try:
        line = refused(capsys, tmp_path / "target", sources)
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert f"{path}: " in line
    assert message in line


@pytest.mark.parametrize("source", ["llm", "clip"])
def test_a_folder_of_an_adapter_alone(tmp_path, capsys, sources, source):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "out").mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    line = refused(capsys, tmp_path / "out" / "target", {**sources, source: adapter})
    assert "adapter_config.json: is of a LoRA adapter for 'org/base', and no whole model is here; merge it" in line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", "x", "size is 'x'; expected numbers of pixels"),
        ("crop_size", {"height": 56, "width": 56}, "crop_size is (56, 56), but the vision tower takes 28 x 28 pixels"),
    ],
)
def test_a_picture_transform_that_is_not_the_towers(tmp_path, capsys, sources, key, value, message):
    path = sources["clip"] / "preprocessor_config.json"
    with changed(path, key, value):
        line = refused(capsys, tmp_path / "target", sources)
    assert f"{path}: {message}" in line


@pytest.mark.parametrize("content", ['{"model": {"type": "BPE"}}', "{}"])
def test_a_tokenizer_that_transformers_cannot_read(tmp_path, capsys, sources, content):
    path = sources["llm"] / "tokenizer.json"
    before = path.read_text()
    path.write_text(content)
    try:
        line = refused(capsys, tmp_path / "target", sources)
    finally:
        path.write_text(before)
    assert f"{sources['llm']}: its tokenizer is not readable" in line


@pytest.mark.parametrize(
    ("tied", "name", "shape", "message"),
    [
        (False, "lm_head", None, "language_model.lm_head.weight is missing"),
        (True, "model.embed_tokens", None, "language_model.model.embed_tokens.weight is missing"),
        (
            False,
            "lm_head",
            (100, 96),
            "model.safetensors: language_model.lm_head.weight has shape [100, 96], by config.json [300, 96] is",
        ),
    ],
)
def test_an_embedding_or_output_layer_that_is_not_there(tmp_path, capsys, sources, tied, name, shape, message):
    config, weights = sources["llm"] / "config.json", sources["llm"] / "model.safetensors"
    before = config.read_text(), weights.read_bytes()
    config.write_text(json.dumps({**json.loads(before[0]), "tie_word_embeddings": tied}))
    tensors = {**load_file(weights), f"{name}.weight": None if shape is None else torch.zeros(shape)}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, weights)
    try:
        line = refused(capsys, tmp_path / "target", sources)
    finally:
        config.write_text(before[0])
        weights.write_bytes(before[1])
    assert str(sources["llm"]) in line
    assert message in line


def test_a_projector_with_code_in_it_is_not_run(tmp_path, capsys, sources):
    torch.save({"model.mm_projector.0.weight": Canary(tmp_path / "canary")}, tmp_path / "mm_projector.bin")
    flags = {"source-llm-ckpt-path": sources["llm"], "source-clip-ckpt-path": sources["clip"]}
    flags |= {"target-ckpt-path": tmp_path / "target", "projector": tmp_path / "mm_projector.bin"}
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 1
    assert "mm_projector.bin: not a file of tensors and plain values" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mm_projector.bin"]


def test_no_shell_reads_a_path(tmp_path):
    """Of the script: neither substitutions nor quotes nor separators in a name are more than a name."""
    hostile = "$(touch canary) `touch canary`; touch canary & ' \" *"
    result = call(CONVERT_MODEL, "auto", hostile, hostile, hostile, 1, 1, "false", "fp32", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: {hostile}/config.json: missing; expected the folder of a checkpoint\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_and_leaves_nothing(tmp_path, mistral, clip, number, code):
    """In the middle of the weights."""
    slow = (
        "import time, megatron_patch.conversion.commands as c\n"
        "from megatron_patch.tensor_io import disk\n"
        "disk.reached = lambda point: point == 'bytes written' and (print('there', flush=True), time.sleep(0.2))\n"
        "import sys; sys.exit(c.main())"
    )
    flags = {"source-llm-ckpt-path": mistral, "source-clip-ckpt-path": clip, "target-ckpt-path": tmp_path / "target"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *words],
        cwd=ROOT,
        env=environment(),
        # A shell's background job ignores SIGINT, and what it starts does so too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "there\n"
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"interrupted: {tmp_path / 'target'} was not written" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["llm", "clip"])
def test_a_source_that_changes_meanwhile(sources, tmp_path, capsys, monkeypatch, where):
    """After the last byte was read, as late as can be."""
    path = sources[where] / "config.json"
    before = path.read_bytes()

    def write_again(point: str) -> None:
        if point == "latest_checkpointed_iteration.txt written":
            path.write_bytes(before + b"\n")

    monkeypatch.setattr(disk, "reached", write_again)
    try:
        assert f"{path}: changed while it was read" in refused(capsys, tmp_path / "out" / "mcore", sources)
    finally:
        path.write_bytes(before)
