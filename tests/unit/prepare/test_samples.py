"""Which json is taken, as what, and what its samples are called."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.image_headers import Rejected
from megatron_patch.prepare.samples import Samples, read_samples
from tests.unit.data.samples import entry
from tests.unit.properties import changed, damaged, examples, json_values


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


def write_lines(path, entries, end="\n", **options):
    path.write_text(end.join(json.dumps(sample) for sample in entries) + end, **options)


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.ndjson"])
@pytest.mark.parametrize("options", [{}, {"end": "\r\n"}, {"end": "\n\n"}, {"encoding": "utf-8-sig"}])
def test_json_lines_are_found_and_read(name, options, tmp_path):
    entries = [entry(0), text("line\u2028separator"), entry(2)]
    write_lines(tmp_path / name, entries, **options)
    samples = read_samples(str(tmp_path), None)
    assert [samples.name(position) for position in range(3)] == [json.dumps(sample["id"]) for sample in entries]


def test_json_lines_under_another_name_and_a_list_under_theirs(tmp_path):
    write_lines(tmp_path / "chat.json", [entry(0), entry(1)])
    assert len(read_samples(str(tmp_path), str(tmp_path / "chat.json"))) == 2
    (tmp_path / "list.jsonl").write_text(json.dumps([entry(0), entry(1), entry(2)]))
    assert len(read_samples(str(tmp_path), None)) == 3
    write_lines(tmp_path / "one.jsonl", [entry(0)])
    assert len(read_samples(str(tmp_path), str(tmp_path / "one.jsonl"))) == 1


def test_a_broken_line_is_named(tmp_path):
    write_lines(tmp_path / "chat.jsonl", [entry(0), entry(1)])
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write('{"id": "cut", "conv')
    with pytest.raises(ValueError, match=r"chat\.jsonl: not json: line 3, as one of JSON Lines: Unterminated"):
        read_samples(str(tmp_path), None)


def test_conversations_behind_much_else_are_found(tmp_path):
    for kilobytes in (70, 2_000):
        path = tmp_path / f"{kilobytes}.json"
        path.write_text(json.dumps([{"id": 1, "caption": "x" * 1024 * kilobytes, **text("late")}]))
        assert read_samples(str(tmp_path), None).place == str(path)
        path.unlink()


def test_a_word_across_two_pieces_is_found(tmp_path):
    for shift in range(0, 20, 3):
        head = '[{"id": "", "more": "", '
        size = 1024**2 + shift - len(head) - 10
        (tmp_path / "a.json").write_text(head.replace('""', '"' + "x" * size + '"', 1) + '"conversations": []}]')
        assert len(read_samples(str(tmp_path), None)) == 1


def test_messages_and_images_in_place_of_conversations_and_image(tmp_path):
    def said(*turns, **more):
        return {"id": "m", "messages": [{"role": role, "content": content} for role, content in turns], **more}

    entries = [
        said(("user", "<image>Who?"), ("assistant", "A cat"), images=["a.jpg"]),
        said(("user", "<image>Who?"), ("assistant", "A cat"), images="a.jpg"),
        said(("system", "Be brief."), ("user", "Who?"), ("assistant", "A cat")),
        said(("system", " "), ("user", "Who?"), ("assistant", "A cat"), images=[]),
        {**entry(0), "messages": None, "images": None},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(entries))
    samples = read_samples(str(tmp_path), None)
    found = [samples.get(position) for position in range(5)]
    assert [sample.turns for sample in found[:4]] == [
        [("<image>Who?", "A cat")],
        [("<image>Who?", "A cat")],
        [("Be brief.\n\nWho?", "A cat")],
        [("Who?", "A cat")],
    ]
    assert [sample.images for sample in found] == [["a.jpg"], ["a.jpg"], [], [], [entry(0)["image"]]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "a turn is"),
        ({"conversations": None, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn is"),
        ({"conversations": [{"from": "system", "value": 3}, *text("")["conversations"]]}, "the system's turn is"),
        ({"conversations": [{"from": "system", "value": "<image>"}]}, "the system's turn is"),
        ({"image": None, "images": [{"path": "a.jpg"}]}, "image is not a name"),
    ],
)
def test_what_is_no_conversation_is_rejected(changes, why):
    with pytest.raises(Rejected, match=why):
        read([{**entry(0), **changes}]).get(0)


def test_thousands_of_turns_take_no_time():
    turns = [{"from": ("human", "gpt")[index % 2], "value": "word " * 9} for index in range(100_000)]
    assert len(read([{"id": 1, "conversations": turns}]).get(0).turns) == 50_000


GOOD = {**entry(0), "messages": [{"role": "user", "content": "a"}], "images": ["b.jpg"]}


@examples
@given(st.lists(changed(GOOD) | json_values, min_size=1, max_size=3))
def test_any_entries_are_samples_or_rejected(entries):
    samples = read(entries)
    for position in range(len(entries)):
        assert samples.name(position).isprintable()
        said, sample = "usable", None
        try:
            sample = samples.get(position)
        except Rejected as why:
            said = str(why)
        assert said.splitlines() == [said]
        if sample is not None:
            assert len(sample.images) == sum(question.count("<image>") for question, _ in sample.turns)


LIST, LINES = (json.dumps([entry(0), entry(1)]).encode(), b'{"conversations": []}\n{"id": 1}\n')


@examples
@given(st.sampled_from(["a.json", "a.jsonl"]), damaged(LIST) | damaged(LINES) | st.binary(max_size=40))
def test_any_file_is_samples_or_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    said = f"{name}: read"
    try:
        read_samples(str(tmp_path), str(path))
    except ValueError as error:
        said = str(error)
    assert said.splitlines() == [said]
    assert name in said


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"id": ' + "[" * 5000 + "]" * 5000 + "}]", "9" * 5000])
def test_deep_and_long_json_is_one_line(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: (not json|expected a list)"):
        read_samples(str(tmp_path), str(tmp_path / "a.json"))
