"""Conversion of LLaVA-Pretrain: nothing is lost in silence, and a second run gives the same bytes."""

import json
import os
import tarfile
import zipfile

import pytest

from megatron_patch.data.webdataset import convert
from tests.unit.data.samples import QUESTION, entry, jpeg, write_annotations, write_pretrain


def read_shards(folder):
    """Every member of every shard: name -> bytes, in order."""
    members = {}
    for path in sorted((folder / "wds").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in members
                members[member.name] = tar.extractfile(member).read()
    return members


def rejects(report):
    lines = report.quarantine.read_text().splitlines()
    assert len(lines) == report.rejected == report.given - report.written
    return dict(line.split("\t") for line in lines)


def turns(question=QUESTION, answer="a cat", **others):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **others}


def test_every_sample_once_in_plain_tars(tmp_path):
    entries = write_pretrain(tmp_path, 25)
    report = convert(tmp_path, prepare=False)
    assert (report.given, report.written, report.rejected) == (25, 25, 0)
    members = read_shards(tmp_path)
    assert list(members) == [f"{sample['id']}.{kind}" for sample in entries for kind in ("jpg", "json")]
    for sample in entries:
        assert members[f"{sample['id']}.jpg"] == (tmp_path / sample["image"]).read_bytes()
        assert json.loads(members[f"{sample['id']}.json"]) == sample["conversations"]
    shards = sorted(path.name for path in (tmp_path / "wds").iterdir())
    assert shards == [f"{index:05d}.tar" for index in range(10)]
    with tarfile.open(tmp_path / "wds" / "00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.pax_headers) == (0, 0, {})
    assert not report.quarantine.exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("wds")) == ["wds"]


def test_bytes_are_the_same_in_a_second_run_and_from_a_zip(tmp_path):
    write_pretrain(tmp_path, 12)
    convert(tmp_path, prepare=False)
    first = {path.name: path.read_bytes() for path in (tmp_path / "wds").iterdir()}
    with pytest.raises(ValueError, match=r"wds: exists; remove it or give --overwrite"):
        convert(tmp_path, prepare=False)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "00000").iterdir()):
            archive.write(path, f"00000/{path.name}")
            os.utime(path)
    # Half of them only in the archive now.
    for path in sorted((tmp_path / "00000").iterdir())[::2]:
        path.unlink()
    convert(tmp_path, prepare=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "wds").iterdir()} == first


def test_what_cannot_be_used_is_listed_with_the_reason(tmp_path):
    entries = write_pretrain(tmp_path, 40)
    pictures = tmp_path / "00000"
    secret = tmp_path.parent / "secret.jpg"
    secret.write_bytes(jpeg((0, 0, 0)))
    (pictures / "link.jpg").symlink_to(secret)
    (pictures / "cut.jpg").write_bytes(jpeg((1, 1, 1), (300, 300))[:-30])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "text.jpg").write_bytes(b"<html>not found</html>")
    two = [*turns()["conversations"], *turns()["conversations"]]
    bad = {
        "missing": ({"image": "00000/nowhere.jpg"}, "missing"),
        "cut": ({"image": "00000/cut.jpg"}, "cut off"),
        "empty": ({"image": "00000/empty.jpg"}, "empty"),
        "html": ({"image": "00000/text.jpg"}, "neither JPEG nor PNG"),
        "above": ({"image": "../secret.jpg"}, "leads out of the folder"),
        "absolute": ({"image": str(secret)}, "leads out of the folder"),
        "linked": ({"image": "00000/link.jpg"}, "leads out of the folder"),
        "folder": ({"image": "00000"}, "missing"),
        "imageless": ({"image": None}, "no image"),
        "long": ({"image": "0" * 300}, "image"),
        "caption": (turns(answer="  "), "caption is empty"),
        "tokens": (turns(answer="an <image>"), "caption has an <image>"),
        "unasked": (turns(question="What?"), "exactly one <image>"),
        "turns": ({"conversations": two}, "not one question"),
        "shape": ({"conversations": "hello"}, "not a list of turns"),
        "turned": ({"conversations": turns()["conversations"][::-1]}, "not one question"),
        "a.dot": ({}, "the id is not made of"),
        "a/slash": ({}, "the id is not made of"),
        "k" * 91: ({}, "the id is not made of"),
        "000005": ({}, "there before"),
    }
    given = [*entries[:20]]
    for key, (changed, _) in bad.items():
        given.append({**entry(3), **changed, "id": key})
    given += [
        {**entry(4), "id": "tab\tline\n"},
        "no object",
        {"image": "x"},
        {**entry(6), "id": 1234567},
        *entries[20:],
    ]
    write_annotations(tmp_path, given)
    report = convert(tmp_path, prepare=False, max_rejected_share=0.5)
    found = rejects(report)
    assert len(found) == len(bad) + 3
    for key, (_, why) in bad.items():
        assert why in found[json.dumps(key)], key
    # A number as id is no reason: it is written as text.
    assert list(read_shards(tmp_path))[::2] == [f"{index:06d}.jpg" for index in range(20)] + ["1234567.jpg"] + [
        f"{index:06d}.jpg" for index in range(20, 40)
    ]


def test_too_many_rejects_stop_it_and_leave_only_the_list(tmp_path):
    entries = write_pretrain(tmp_path, 20)
    for sample in entries[5:9]:
        sample["image"] = "nowhere.jpg"
    write_annotations(tmp_path, entries)
    with pytest.raises(
        ValueError, match=r"wds\.rejected\.tsv: 3 samples rejected, more than --max-rejected-share 0\.1"
    ):
        convert(tmp_path, prepare=False, max_rejected_share=0.1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("wds")) == ["wds.rejected.tsv"]
    assert len((tmp_path / "wds.rejected.tsv").read_text().splitlines()) == 3


def test_a_failed_run_leaves_the_old_result(tmp_path):
    entries = write_pretrain(tmp_path, 20)
    convert(tmp_path, prepare=False)
    before = read_shards(tmp_path)
    write_annotations(tmp_path, [{**sample, "image": "nowhere.jpg"} for sample in entries])
    with pytest.raises(ValueError, match="rejected"):
        convert(tmp_path, prepare=False, overwrite=True)
    assert read_shards(tmp_path) == before


def test_pictures_behind_a_linked_images_folder_and_png(tmp_path):
    entries = write_pretrain(tmp_path / "data", 12)
    (tmp_path / "data" / "00000").rename(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "images" / "00000")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "images")
    report = convert(tmp_path / "data", prepare=False)
    assert report.written == len(entries)


def test_a_damaged_archive_member_is_rejected(tmp_path):
    write_pretrain(tmp_path, 20)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.write(tmp_path / "00000" / "000007.jpg", "00000/000007.jpg")
    (tmp_path / "00000" / "000007.jpg").unlink()
    data = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(data.replace(b"\xff\xda", b"\xff\xdb", 1))
    report = convert(tmp_path, prepare=False, max_rejected_share=0.1)
    assert "Bad CRC-32" in rejects(report)['"000007"']


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"[", "not json"), (b"{}", "expected a list of samples"), (b"[]", "expected a list"), (None, "missing")],
)
def test_annotations_that_are_none(content, why, tmp_path):
    write_pretrain(tmp_path, 1)
    path = tmp_path / "blip_laion_cc_sbu_558k.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=why):
        convert(tmp_path)


def test_too_few_samples_to_split(tmp_path):
    write_pretrain(tmp_path, 1)
    with pytest.raises(ValueError, match="1 usable samples; a train and a val split need at least 2"):
        convert(tmp_path)
    assert not (tmp_path / "wds").exists()


def test_another_running_conversion_is_not_disturbed(tmp_path):
    write_pretrain(tmp_path, 10)
    (tmp_path / "wds.partial").mkdir()
    with pytest.raises(ValueError, match=r"wds\.partial: another conversion is running or was killed"):
        convert(tmp_path)
    assert (tmp_path / "wds.partial").exists()
