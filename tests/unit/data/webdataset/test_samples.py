"""Which json is taken, as what, and what its samples are called."""

import json

import pytest

from megatron_patch.data.webdataset.samples import Samples, read_samples
from tests.unit.data.samples import entry


def read(entries):
    return Samples("a.json", "", entries)


def text(name):
    return {"id": name, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


def test_the_json_is_found_by_its_content(tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps([{"id": 1, "caption": "a"}]))
    (tmp_path / "notes.json").write_text('{"conversations": 1}')
    with pytest.raises(ValueError, match="no other json with conversations beside it; give --annotations"):
        read_samples(str(tmp_path), None)
    (tmp_path / "chat.json").write_text(json.dumps([entry(1)], indent=2), encoding="utf-8-sig")
    samples = read_samples(str(tmp_path), None)
    assert (samples.place, len(samples)) == (str(tmp_path / "chat.json"), 1)
    (tmp_path / "mix.json").write_text(json.dumps([entry(1)]))
    with pytest.raises(ValueError, match=r"chat\.json, mix\.json hold conversations; say which with --annotations"):
        read_samples(str(tmp_path), None)
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text("[")
    with pytest.raises(ValueError, match=r"blip_laion_cc_sbu_558k\.json: not json: .*; download it again"):
        read_samples(str(tmp_path), None)


def test_one_usable_sample_of_another_kind_makes_it_a_mix():
    pairs = [entry(index) for index in range(5)]
    broken = [{**text("t"), "image": 7}, {"conversations": []}, 7, {**entry(9), "image": None}]
    assert read([*pairs, *broken]).is_pairs
    assert not read([*pairs, text("t")]).is_pairs
    assert not read(
        [*pairs, {**entry(8), "conversations": entry(8)["conversations"] + text("")["conversations"]}]
    ).is_pairs


def test_ids_are_keys_where_all_are_good_and_unique():
    entries = [entry(index) for index in range(20)]
    assert read(entries).get(3).key == "000003"
    for other in ({**entry(7), "id": 7}, {**entry(7), "id": "a.b"}, entry(3), text("t")):
        samples = read([*entries[:7], other, *entries[8:]])
        has_good_id = other["id"] == 7
        assert samples.get(3).key == ("000003" if has_good_id else "000000003")
        assert samples.get(7).key == ("7" if has_good_id else "000000007")


def test_turns_are_paired_as_in_training():
    """An answer before the first question is left out, and so is a last question without answer."""
    given = [("gpt", "Hello"), ("human", "<image> Who?"), ("gpt", "A cat"), ("human", "And?")]
    odd = {**entry(1), "conversations": [{"from": role, "value": value} for role, value in given]}
    samples = read([entry(0), odd])
    assert samples.get(1).turns == [("<image> Who?", "A cat")]
    assert samples.is_pairs
