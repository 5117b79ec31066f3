"""Whatever the files of a dataset hold: it is read, or the answer is one line that names the dataset."""

import json
import os
import shutil

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.autodecode import DecodingError

from megatron_patch.data.task_encoder import LlavaTaskEncoder
from tests.unit.data.loaders import build, take
from tests.unit.data.samples import jpeg, settings, write_dataset
from tests.unit.properties import changed, damaged, examples, json_values

CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
BLEND = {
    "__module__": "megatron.energon",
    "__class__": "MetadatasetV2",
    "splits": {"train": {"path": "wds"}, "val": {"blend": [{"weight": 1, "path": "wds"}]}},
}
FILES = [
    "wds/.nv-meta/dataset.yaml",
    "wds/.nv-meta/split.yaml",
    "wds/.nv-meta/.info.json",
    "wds/manifest.json",
    "wds/00000.tar.idx",
    "blend.yaml",
]


@pytest.fixture(scope="module")
def files(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(dataset, folder / "wds")
    (folder / "blend.yaml").write_text(json.dumps(BLEND))
    return folder, {name: (folder / name).read_bytes() for name in FILES}


def check(model, files, name, content):
    """Build a loader with another content of the file, which is put back."""
    folder, whole = files
    (folder / name).write_bytes(content)
    said = f"{folder}: read"
    try:
        build(model, folder / ("blend.yaml" if name == "blend.yaml" else "wds"))
    except ValueError as error:
        said = str(error)
    finally:
        (folder / name).write_bytes(whole[name])
    assert said.splitlines() == [said]
    assert str(folder) in said
    return said


def content(whole):
    """Any bytes, damaged ones, other yaml and json (which is yaml), or fields changed."""

    def of(name):
        kinds = [
            damaged(whole[name]),
            st.binary(max_size=30),
            json_values.map(lambda value: json.dumps(value).encode()),
        ]
        if name.endswith(".json") or name == "blend.yaml":
            kinds.append(changed(json.loads(whole[name])).map(lambda value: json.dumps(value).encode()))
        return st.tuples(st.just(name), st.one_of(kinds))

    return st.sampled_from(FILES).flatmap(of)


@hypothesis.settings(examples, max_examples=max(20, examples.max_examples // 4))  # each opens a dataset twice
@given(st.data())
def test_any_file_of_a_dataset_is_read_or_one_line(model, files, data):
    check(model, files, *data.draw(content(files[1])))


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".idx")])
@pytest.mark.parametrize("opening", ["[", '{"a":', "- "])
def test_a_deep_file_is_one_line(name, opening, model, files):
    said = check(model, files, name, opening.encode() * 20_000)
    assert ("read" in said) == (name == "wds/manifest.json") or "cannot be read" in said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("name", ["wds/.nv-meta/dataset.yaml", "blend.yaml", "wds/.nv-meta/.info.json"])
def test_other_encodings_are_read_or_one_line(name, encoding, model, files):
    check(model, files, name, files[1][name].decode().encode(encoding))


def test_a_shard_is_nothing_that_is_waited_for(model, files):
    folder, _ = files
    index = folder / "wds/00001.tar.idx"
    whole = index.read_bytes()
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(ValueError, match=r"00001\.tar\.idx: missing"):
        build(model, folder / "wds")
    index.unlink()
    index.write_bytes(whole)


SAID = {"from": "human", "value": "<image>a"}


@examples
@given(
    st.lists(changed(SAID) | json_values, max_size=3) | json_values | st.just("[" * 5000),
    damaged(jpeg((1, 2, 3), (9, 9))),
)
def test_any_sample_is_encoded_or_one_line(model, said, picture):
    from megatron.energon import CrudeSample

    from megatron_patch.data.conversation import cook

    encoder = encoder_of(model)
    raw = json.dumps(said) if said != "[" * 5000 else said
    found = "encoded"
    try:
        parts = encoder.decoder({"__key__": "k\x1b", "json": raw.encode(), "jpg": picture})
        sample = cook(CrudeSample({"__restore_key__": (), "__subflavors__": {}, "__sources__": (), **parts}))
        encoder.postencode_sample(encoder.preencode_sample(sample))
    except (ValueError, DecodingError) as error:  # energon hands either to the loader's handler
        found = str(error) or str(error.__cause__)
    assert found


made = []


def encoder_of(model):
    if not made:
        made.append(LlavaTaskEncoder(settings(model[0]), model[1]))
    return made[0]


def test_a_key_with_control_characters_is_shown_as_escapes(model, tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    write_dataset(tmp_path / "k\x1b[31mred", [{"json": json.dumps(turns).encode()}] * 20, CRUDE)
    batches = take(build(model, tmp_path / "k\x1b[31mred"), 2)
    assert all(key.startswith(r"k\x1b[31mred") and key.isprintable() for batch in batches for key in batch.keys)
