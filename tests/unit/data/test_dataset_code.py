"""What yaml files of a dataset name is not run, wherever it stands, unless it is allowed."""

import shutil
import sys

import braceexpand
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.energon.flavors.webdataset import metadata

from megatron_patch.data.dataset_code import DatasetCodeError, guarded
from tests.unit.data.loaders import build
from tests.unit.properties import examples

V2 = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
OWN = "sample_type:\n  __module__: megatron_patch.data.conversation\n  __class__: Conversation\n"
PAIRS = """\
sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: jpg
  context: json[0][value]
  answers: json[1][value]
"""
# A module whose import leaves a mark, and what calls, makes or names something of it.
CODE = "import sys\nsys.was_run = True\ndef call(*_, **__):\n    pass\nclass Kind:\n    pass\n"
CALL = "{__module__: canary_of_a_dataset, __function__: call}"
DATASETS = {
    "a function in subflavors": CRUDE + f"subflavors:\n  x: {CALL}\n",
    "a class": CRUDE.replace("megatron.energon", "canary_of_a_dataset").replace("CrudeWebdataset", "Kind"),
    "a type of samples": "sample_type: {__module__: canary_of_a_dataset, __class__: Kind}\n",
    "the worker's settings": CRUDE + f"worker_config: {CALL}\n",
    "a sample_loader by name": OWN + f"sample_loader: {CALL}\npart_filter: [png]\n",
    "a sample_loader's file": OWN + "sample_loader: canary_of_a_dataset.py:call\npart_filter: [png]\n",
    "a part_filter's file": OWN
    + "sample_loader: canary_of_a_dataset.py:call\npart_filter: canary_of_a_dataset.py:call\n",
    "a file elsewhere": OWN + "sample_loader: ../../canary_of_a_dataset.py:call\npart_filter: [png]\n",
    "a decoder": CRUDE + "decoder: {__module__: megatron.energon, __class__: SampleDecoder}\n",
    "another class of energon": "__module__: megatron.energon\n__class__: FileStoreCachePool\n",
    "a function of energon": "__module__: megatron.energon\n__function__: get_loader\n",
    "a name that is a list": "__module__: [os]\n__class__: system\n",
}
METADATASETS = {
    "itself": "__module__: canary_of_a_dataset\n__function__: call\n",
    "subflavors": V2 + f"splits:\n  train:\n    path: good\n    subflavors: {{x: {CALL}}}\n",
    "a blend": V2 + "splits:\n  train:\n    blend:\n      - {weight: 1, path: good}\n      - {weight: 1, path: bad}\n",
    "a nested one": V2 + "splits:\n  train:\n    path: nested.yaml\n",
    "a joiner": V2 + "splits:\n  train:\n    join:\n      - {path: good}\n      - {path: good}\n"
    "    joiner: {__module__: canary_of_a_dataset, __class__: Kind}\n",
    "another dataset.yaml": V2 + "splits:\n  train:\n    path: good\n    dataset_config: other.yaml\n",
    "the first version": "__module__: megatron.energon\n__class__: Metadataset\nsplits:\n  train:\n    datasets:\n"
    f"      - path: good\n        subflavors: {{x: {CALL}}}\n",
}


@pytest.fixture
def folder(dataset, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "good")
    shutil.copytree(dataset, tmp_path / "bad")
    for place in ("canary_of_a_dataset.py", "bad/.nv-meta/canary_of_a_dataset.py"):
        (tmp_path / place).write_text(CODE)
    bad = DATASETS["a function in subflavors"]
    (tmp_path / "bad/.nv-meta/dataset.yaml").write_text(bad)
    (tmp_path / "good/.nv-meta/other.yaml").write_text(bad)
    (tmp_path / "nested.yaml").write_text(METADATASETS["subflavors"])
    # It could be imported: a dataset may name whatever is installed.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary_of_a_dataset", raising=False)
    monkeypatch.delattr(sys, "was_run", raising=False)
    return tmp_path


def check_refused(model, path, yaml):
    with pytest.raises(ValueError, match=rf"{yaml}: names .*give --allow-dataset-code true if you trust it") as caught:
        build(model, path)
    assert "\n" not in str(caught.value)
    assert not hasattr(sys, "was_run")


@pytest.mark.parametrize("kind", DATASETS)
def test_what_a_dataset_names_is_not_run(kind, folder, model):
    (folder / "bad/.nv-meta/dataset.yaml").write_text(DATASETS[kind])
    check_refused(model, folder / "bad", r"bad/\.nv-meta/dataset\.yaml")


@pytest.mark.parametrize("kind", METADATASETS)
def test_what_a_metadataset_leads_to_is_not_run(kind, folder, model):
    (folder / "blend.yaml").write_text(METADATASETS[kind])
    check_refused(model, folder / "blend.yaml", r"(blend|nested|dataset|other)\.yaml")


def test_what_energon_does_not_look_up_is_no_code(folder, model):
    (folder / "bad/.nv-meta/dataset.yaml").write_text(CRUDE + f"subflavors:\n  x: {{y: [1, {CALL}]}}\n")
    build(model, folder / "bad")
    assert not hasattr(sys, "was_run")


def test_what_is_allowed_is_run(folder, model):
    (folder / "bad/.nv-meta/dataset.yaml").write_text(DATASETS["a sample_loader's file"])
    build(model, folder / "bad", allow_dataset_code=True)
    assert sys.was_run
    # Not for another one, even of what this process has read by then.
    del sys.was_run
    check_refused(model, folder / "bad", r"dataset\.yaml")


@pytest.mark.parametrize("module", ["megatron.energon", "megatron.energon.flavors.vqa", "megatron.energon.long_gone"])
def test_energons_own_are_allowed_under_any_of_its_modules(module, folder, model):
    (folder / "good/.nv-meta/dataset.yaml").write_text(PAIRS.replace("megatron.energon", module))
    build(model, folder / "good")


@pytest.mark.parametrize(
    "pattern",
    ["a{0..999999999}.tar", "{a,b}" * 40 + ".tar", "{{0..2000},{0..2000}}{0..2000}.tar", "{9..-9999999..-1}.tar"],
)
def test_a_pattern_may_not_fill_memory_with_names(pattern, folder, model):
    split = folder / "good/.nv-meta/split.yaml"
    split.write_text(f"split_parts:\n  train: ['{pattern}']\n  val: []\n  test: []\nexclude: []\n")
    with pytest.raises(ValueError, match=r"split train cannot be read: .* names more than 1,000,000 shards; "):
        build(model, folder / "good")


@pytest.mark.parametrize(
    "pattern",
    ["{00000..00557}.tar", "{a,b{1..3}}-{0..8..2}.tar", "{0..10000000..100000}.tar", "plain.tar", "{}{a}.tar"],
)
def test_other_patterns_are_expanded_as_energon_does(pattern):
    with guarded(allow_code=False):
        assert list(metadata.braceexpand.braceexpand(pattern)) == list(braceexpand.braceexpand(pattern))
    assert metadata.braceexpand is braceexpand


def test_energon_is_as_before_afterwards():
    from megatron.energon.typed_converter import JsonParser

    before = JsonParser._resolve_object
    with pytest.raises(ZeroDivisionError), guarded(allow_code=False):
        raise ZeroDivisionError
    assert JsonParser._resolve_object is before


@examples
@given(st.text(max_size=12) | st.sampled_from(["os", "builtins", "megatron.energon", "subprocess"]), st.data())
def test_no_name_leads_to_anything_but_energons_kinds(module, data):
    from megatron.energon.typed_converter import JsonParser

    known = ["system", "eval", "Popen", "VQASample", "load_dataset", "__builtins__", "__loader__", "EPath"]
    name = data.draw(st.sampled_from(known) | st.text(max_size=12))
    with guarded(allow_code=False):
        try:
            found = JsonParser()._resolve_object(module, name, object, False, False, True, False)
        except DatasetCodeError:
            return
    assert (module, name) == ("megatron.energon", "VQASample")
    assert found.__name__ == name
