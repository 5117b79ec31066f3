"""Which json is taken, as what, and what its samples are called."""

import json

import pytest

from megatron_patch.data.webdataset.samples import Rejected, Samples, read_annotations
from tests.unit.data.samples import entry


def read(entries, share=0.01):
    return Samples("a.json", json.dumps(entries).encode(), share)


def text(name):
    return {"id": name, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


def test_the_json_is_found_by_its_content(tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps([{"id": 1, "caption": "a"}]))
    (tmp_path / "notes.json").write_text('{"conversations": 1}')
    with pytest.raises(ValueError, match="no other json with conversations beside it; give --annotations"):
        read_annotations(str(tmp_path), None)
    (tmp_path / "chat.json").write_text(json.dumps([entry(1)], indent=2))
    assert read_annotations(str(tmp_path), None)[0] == str(tmp_path / "chat.json")
    (tmp_path / "mix.json").write_text(json.dumps([entry(1)]))
    with pytest.raises(ValueError, match=r"chat\.json, mix\.json hold conversations; say which with --annotations"):
        read_annotations(str(tmp_path), None)
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text("[")
    assert read_annotations(str(tmp_path), None)[0].rpartition("/")[2] == "blip_laion_cc_sbu_558k.json"


def test_one_usable_sample_of_another_kind_makes_it_a_mix():
    pairs = [entry(index) for index in range(5)]
    broken = [{**text("t"), "image": 7}, {"conversations": []}, 7, {**entry(9), "image": None}]
    assert read([*pairs, *broken]).is_pairs
    assert not read([*pairs, text("t")]).is_pairs
    assert not read(
        [*pairs, {**entry(8), "conversations": entry(8)["conversations"] + text("")["conversations"]}]
    ).is_pairs


def test_ids_are_keys_where_they_are_unique():
    entries = [entry(index) for index in range(200)]
    assert read(entries).get(3).key == "000003"
    entries[7] = entry(3)
    samples = read(entries)
    assert samples.get(3).key == "000003"
    with pytest.raises(Rejected, match="there before"):
        samples.get(7)
    # More of them than may be rejected: then ids name no samples here.
    assert read(entries, share=0.001).get(7).key == "000000007"
    assert read([*entries, text("t")]).get(7).key == "000000007"
