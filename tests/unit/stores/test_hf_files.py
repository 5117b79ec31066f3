"""Which files of a folder are the model, for every mixture of them: transformers is the judge."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from megatron_patch.conversion.summary import summarize
from megatron_patch.stores.hf import HfReader
from megatron_patch.stores.hf_files import ORDER, passed_over, refuse_adapter, weight_file
from tests.unit.properties import changed, damaged, examples, one_line

OTHERS = ("model.fp16.safetensors", "consolidated.safetensors", "model-9.safetensors")
MIXTURES = [names for count in range(1, 5) for names in combinations(ORDER, count)]


def write(folder, names):
    """A model of one value in each of these files, the place of the file in `names`; an index has a shard."""
    for value, name in enumerate(names):
        tensors, target = {"a": torch.full((3,), float(value))}, name
        if name.endswith(".json"):
            target = f"shard{value}.{'bin' if 'pytorch' in name else 'safetensors'}"
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": target}}))
        if target.endswith(".bin"):
            torch.save(tensors, folder / target)
        else:
            save_file(tensors, folder / target)


@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
def test_the_model_is_the_file_that_transformers_loads(names, tmp_path):
    write(tmp_path, [*OTHERS, *names])
    (tmp_path / "model.safetensors.index.fp16.json").write_text("{}")
    files, _ = _get_resolved_checkpoint_files(tmp_path, None, None, None, None, False)
    reader = HfReader(tmp_path)
    assert [str(path) for path in reader.files()] == files
    chosen = weight_file(tmp_path).name
    assert reader["a"][0] == 3 + names.index(chosen)
    assert passed_over(tmp_path) == [name for name in ORDER if name in names and name != chosen]
    assert (len(names) > 1) == ("not the model" in summarize(tmp_path))


def test_a_folder_of_that_name_is_no_file(tmp_path):
    write(tmp_path, ["pytorch_model.bin"])
    (tmp_path / "model.safetensors").mkdir()
    assert weight_file(tmp_path).name == "pytorch_model.bin"


def test_config_json_may_name_another_file(tmp_path):
    write(tmp_path, ["model.safetensors", "other.safetensors"])
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert HfReader(tmp_path)["a"][0] == 1
    for name in ("gone.safetensors", "../model.safetensors", "model.bin", 5, ["model.safetensors"]):
        (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(ValueError, match="transformers_weights is"):
            weight_file(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.fp16.safetensors"], "model.fp16.safetensors is no name that transformers loads, as of a variant"),
        (["pytorch_model.fp16.bin"], "pytorch_model.fp16.bin is no name .* variant"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json, .* as of a variant"),
        (["consolidated.safetensors"], "consolidated.safetensors is no name that transformers loads$"),
    ],
)
def test_what_lies_there_instead_is_named(names, message, tmp_path):
    write(tmp_path, names)
    with pytest.raises(FileNotFoundError, match=message):
        weight_file(tmp_path)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write(tmp_path, ["pytorch_model.bin"])
    (tmp_path / "model.safetensors").symlink_to("blob")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: leads to blob, which is missing"):
        weight_file(tmp_path)


CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_an_adapter_is_refused(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=f"{name}: is of a LoRA adapter.* no whole model is here; merge it") as error:
        refuse_adapter(tmp_path)
    assert ("'org/base'" in str(error.value)) == (name == "adapter_config.json")
    with pytest.raises(ValueError, match="LoRA"):
        summarize(tmp_path)
    write(tmp_path, ["model.safetensors"])
    with pytest.raises(ValueError, match=f"{name}: is of a LoRA adapter beside the model, .*; merge it"):
        refuse_adapter(tmp_path)
    assert name in summarize(tmp_path)["adapter"]


def test_an_adapter_below_is_none_of_the_models(tmp_path):
    write(tmp_path, ["model.safetensors"])
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100/adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_notes.txt").touch()
    refuse_adapter(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write(folder, ["model.safetensors.index.json"])
    return folder


def read_all(folder):
    with one_line(folder):
        reader = HfReader(folder)
        _ = {name: reader[name] for name in reader}


@examples
@given(changed({"metadata": {"total_size": 12}, "weight_map": {"a": "shard0.safetensors"}}))
def test_whatever_an_index_says(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    read_all(folder)


@examples
@given(changed({"transformers_weights": "shard0.safetensors", **CONFIG}))
def test_whatever_else_the_folder_says(folder, content):
    for name in ("config.json", "adapter_config.json"):
        (folder / name).write_text(json.dumps(content))
    read_all(folder)
    (folder / "config.json").unlink()
    with one_line(folder):
        refuse_adapter(folder)


SHARD = json.dumps({"metadata": {}, "weight_map": {"a": "shard0.safetensors"}}).encode()


@examples
@given(damaged(SHARD))
def test_whatever_bytes_an_index_holds(folder, content):
    (folder / "model.safetensors.index.json").write_bytes(content)
    read_all(folder)
