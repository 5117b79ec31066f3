"""Whatever the small files of a checkpoint hold, they are read, or refused in one line that names the file."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.files.names import COMMON, RUN_CONFIG
from megatron_patch.stores import manifest, mp_rank, torch_dist
from megatron_patch.stores.torch_dist import model_tensors, read_metadata
from megatron_patch.training import resume
from tests import tiny_runs
from tests.tiny_dist import metadata_bytes
from tests.unit.properties import changed, damaged, examples, in_one_line, json_values

DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


METADATA = metadata_bytes()


@examples
@given(damaged(METADATA) | st.binary(max_size=60).map(lambda data: b"\x80\x04" + data + b"."))
def test_metadata(folder, data):
    path = folder / ".metadata"
    path.write_bytes(data)

    def read() -> None:
        for stored in model_tensors(read_metadata(path)).values():
            assert isinstance(stored.properties.dtype, torch.dtype)

    in_one_line(read, path)


def test_metadata_with_parts_of_other_types(folder):
    """A pickle that is whole puts anything anywhere."""
    path = folder / ".metadata"
    for change in ("state_dict_metadata", "storage_data"):
        for value in (None, 5, [], {5: 5}, {"a": None}):
            metadata = pickle.loads(METADATA)
            setattr(metadata, change, value)
            path.write_bytes(pickle.dumps(metadata))
            in_one_line(lambda: torch_dist.TorchDistReader(folder, []), folder)
    key, _ = next(iter(pickle.loads(METADATA).state_dict_metadata.items()))
    for name, value in (("size", (5,)), ("size", 5), ("size", (-1, "x")), ("chunks", None), ("properties", None)):
        metadata = pickle.loads(METADATA)
        setattr(metadata.state_dict_metadata[key], name, value)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match="not the metadata of a torch_dist checkpoint"):
            read_metadata(path)


@pytest.fixture(scope="module")
def written(mcore) -> dict:
    """With two of its tensors: as large as a search needs."""
    content = json.loads((mcore / "release" / manifest.FILE).read_text())
    (name, rank), *_ = content["ranks"].items()
    return {**content, "ranks": {name: {**rank, "tensors": dict(list(rank["tensors"].items())[:2])}}}


@examples
@given(data=st.data())
def test_manifest(folder, written, data):
    """Its own sum fits: whoever changes it can write that too."""
    content = data.draw(changed({name: value for name, value in written.items() if name != "sha256"}))
    (folder / manifest.FILE).write_text(json.dumps({**content, "sha256": manifest._digest(content)}))

    def read() -> None:
        for record in (manifest.read(folder) or {}).values():
            assert isinstance(record.file, str)
            assert isinstance(record.size, int)

    in_one_line(read, folder)


@pytest.mark.parametrize("content", [DEEP, b"", b"\xff\xfe", b"[]", b"null", b'{"format": 1'])
def test_a_manifest_that_is_none(folder, content):
    (folder / manifest.FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged or changed"):
        manifest.read(folder)


@pytest.fixture(scope="module")
def settings(mcore, folder):
    return tiny_runs.config(mcore, folder)


@examples
@given(data=st.data())
def test_a_runs_settings(folder, settings, data):
    content = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    content = {part: content[part] for part in ("model", "parallel")}  # what is read of them
    (folder / RUN_CONFIG).write_text(json.dumps(data.draw(changed(content) | json_values)))
    in_one_line(lambda: resume._check_same_training(settings, folder), folder)


@pytest.mark.parametrize("content", [DEEP, b"", b"\xff\xfe", b"[]", b"5"])
def test_settings_that_are_none(folder, settings, content):
    (folder / RUN_CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=RUN_CONFIG):
        resume._check_same_training(settings, folder)


@examples
@given(data=st.data())
def test_common(folder, data):
    path = folder / COMMON
    torch.save({"args": {"vocab_size": 128}, "iteration": 0, "checkpoint_version": 3.0}, path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    in_one_line(lambda: mp_rank.saved_args(path), path)
