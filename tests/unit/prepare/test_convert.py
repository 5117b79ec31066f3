"""Whole conversions: nothing is lost in silence, and the same input gives the same bytes however it is cut."""

import json
import os
import shutil
import tarfile
import zipfile

import pytest
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
from PIL import Image

from tests.unit.data.samples import QUESTION, convert_folder, entry, jpeg, write_annotations, write_pretrain
from tests.unit.prepare.shards import read_shards, rejects, shards


def turns(question=QUESTION, answer="a cat", **others):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **others}


def test_every_sample_once_in_plain_tars(tmp_path):
    entries = write_pretrain(tmp_path, 25)
    report = convert_folder(tmp_path, no_prepare=True)
    assert (report.given, report.written, report.rejected) == (25, 25, [])
    members = read_shards(tmp_path)
    assert list(members) == [f"{sample['id']}.{kind}" for sample in entries for kind in ("jpg", "json")]
    for sample in entries:
        assert members[f"{sample['id']}.jpg"] == (tmp_path / sample["image"]).read_bytes()
        assert json.loads(members[f"{sample['id']}.json"]) == sample["conversations"]
    names = sorted(path.name for path in (tmp_path / "wds").iterdir())
    assert names == [*(f"{index:05d}.tar" for index in range(10)), "manifest.json"]
    with tarfile.open(tmp_path / "wds" / "00000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.pax_headers) == (0, 0, {})
    assert not (tmp_path / "wds.rejected.tsv").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("wds")) == ["wds"]


def test_bytes_are_the_same_in_a_second_run_and_from_a_zip(tmp_path):
    write_pretrain(tmp_path, 12)
    convert_folder(tmp_path, no_prepare=True)
    first = shards(tmp_path)
    with pytest.raises(ValueError, match=r"wds: exists; remove it or give --overwrite"):
        convert_folder(tmp_path, no_prepare=True)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "00000").iterdir()):
            archive.write(path, f"00000/{path.name}")
            os.utime(path)
    # Half of them only in the archive now.
    for path in sorted((tmp_path / "00000").iterdir())[::2]:
        path.unlink()
    convert_folder(tmp_path, no_prepare=True, overwrite=True)
    assert shards(tmp_path) == first


def test_what_cannot_be_used_is_listed_with_the_reason(tmp_path):
    entries = write_pretrain(tmp_path, 40)
    pictures = tmp_path / "00000"
    secret = tmp_path.parent / "secret.jpg"
    secret.write_bytes(jpeg((0, 0, 0)))
    (pictures / "link.jpg").symlink_to(secret)
    (pictures / "cut.jpg").write_bytes(jpeg((1, 1, 1), (300, 300))[:-30])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "text.jpg").write_bytes(b"<html>not found</html>")
    os.mkfifo(pictures / "pipe.jpg")
    two = [*turns()["conversations"], *turns()["conversations"]]
    bad = {
        "missing": ({"image": "00000/nowhere.jpg"}, "missing"),
        "cut": ({"image": "00000/cut.jpg"}, "cut off"),
        "empty": ({"image": "00000/empty.jpg"}, "empty"),
        "html": ({"image": "00000/text.jpg"}, "neither JPEG nor PNG, GIF, WebP"),
        "above": ({"image": "../secret.jpg"}, "leads out of the folder"),
        "absolute": ({"image": str(secret)}, "leads out of the folder"),
        "linked": ({"image": "00000/link.jpg"}, "leads out of the folder"),
        "dots": ({"image": "00000/../../secret.jpg"}, "leads out of the folder"),
        "nul": ({"image": "00000/a\0.jpg"}, "null byte"),
        "folder": ({"image": "00000"}, "not a file"),
        "pipe": ({"image": "00000/pipe.jpg"}, "not a file"),
        "imageless": ({"image": None}, "1 <image> for 0 images"),
        "number": ({"image": 7}, "image is not a name"),
        "long": ({"image": "0" * 300}, "File name too long"),
        "caption": (turns(answer="  "), "an answer is empty"),
        "tokens": (turns(answer="an <image>"), "an answer has an <image>"),
        "unasked": (turns(question="What?"), "0 <image> for 1 images"),
        "twice": (turns(question="<image> or <image>?"), "2 <image> for 1 images"),
        "turns": ({"conversations": two}, "2 <image> for 1 images"),
        "shape": ({"conversations": "hello\nall"}, r"conversation is 'hello\nall', expected a list of turns"),
        "turned": ({"conversations": turns()["conversations"][::-1]}, "no question (human) with an answer (gpt)"),
        "again": ({"conversations": turns()["conversations"][:1] * 2}, "turn 2 is the user's again"),
        "value": (turns(answer=None), "and a value that is a text"),
        "surrogate": (turns(answer="half \ud800"), "half of a surrogate pair"),
    }
    given = [*entries[:20]]
    for key, (changed, _) in bad.items():
        given.append({**entry(3), **changed, "id": key})
    given += ["no object", {"image": "x"}, {"id": ["x"], **turns()}]
    # Ids that cannot be keys, or are there twice, are no reason: then all keys are positions.
    usable = [*range(20), *range(len(given), len(given) + 26)]
    given += [{**entry(4), "id": name} for name in ("tab\tline\n", "a.dot", "a/slash", "k" * 91, "000005", 7)]
    write_annotations(tmp_path, given + entries[20:])
    report = convert_folder(tmp_path, no_prepare=True, max_rejected_share=0.5)
    found = rejects(report)
    assert len(found) == len(bad) + 3
    for key, (_, why) in bad.items():
        assert why in found[json.dumps(key)], key
    assert list(read_shards(tmp_path))[::2] == [f"{position:09d}.jpg" for position in usable]


def test_too_many_rejects_stop_it_and_leave_only_the_list(tmp_path):
    entries = write_pretrain(tmp_path, 20)
    for sample in entries[5:9]:
        sample["image"] = "nowhere.jpg"
    write_annotations(tmp_path, entries)
    with pytest.raises(
        ValueError, match=r"wds\.rejected\.tsv: 3 samples rejected, more than --max-rejected-share 0\.1"
    ):
        convert_folder(tmp_path, no_prepare=True, max_rejected_share=0.1)
    assert not (tmp_path / "wds").exists()
    assert len((tmp_path / "wds.rejected.tsv").read_text().splitlines()) == 3


def test_names_of_rejected_samples_are_shown_without_control_characters(tmp_path):
    """Each is one line of three fields, and the error is one line."""
    entries = write_pretrain(tmp_path, 4)
    for sample in entries[1:]:
        sample |= {"id": f"{sample['id']}\t\x1b[2J\n", "image": "no\x1b[31m\x85where.jpg"}
    write_annotations(tmp_path, entries)
    for share, why in ((0.1, "more than --max-rejected-share"), (1, "1 usable samples; a train and a val split")):
        with pytest.raises(ValueError, match=why) as caught:
            convert_folder(tmp_path, no_prepare=True, max_rejected_share=share)
        assert str(caught.value).isprintable()
        lines = (tmp_path / "wds.rejected.tsv").read_text().split("\n")[:-1]
        assert len(lines) == 3 or share < 1
        assert all(line.count("\t") == 2 and line.replace("\t", "").isprintable() for line in lines)


def test_a_failed_run_leaves_the_old_result(tmp_path):
    entries = write_pretrain(tmp_path, 20)
    convert_folder(tmp_path, no_prepare=True)
    before = read_shards(tmp_path)
    write_annotations(tmp_path, [{**sample, "image": "nowhere.jpg"} for sample in entries])
    with pytest.raises(ValueError, match="rejected"):
        convert_folder(tmp_path, no_prepare=True, overwrite=True)
    assert read_shards(tmp_path) == before


def test_pictures_behind_a_linked_images_folder(tmp_path):
    entries = write_pretrain(tmp_path / "data", 12)
    (tmp_path / "data" / "00000").rename(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "images" / "00000")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "images")
    report = convert_folder(tmp_path / "data", no_prepare=True)
    assert report.written == len(entries)


def test_a_damaged_archive_member_is_rejected(tmp_path):
    write_pretrain(tmp_path, 20)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.write(tmp_path / "00000" / "000007.jpg", "00000/000007.jpg")
    (tmp_path / "00000" / "000007.jpg").unlink()
    data = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(data.replace(b"\xff\xda", b"\xff\xdb", 1))
    report = convert_folder(tmp_path, no_prepare=True, max_rejected_share=0.1)
    assert "wrong CRC-32" in rejects(report)['"000007"']


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[", "not json"),
        (b"[" * 100_000, "not json"),
        (b"{}", "expected a list of samples"),
        (b"[]", "expected a list"),
        (None, r"blip_laion_cc_sbu_558k\.json: missing"),
    ],
)
def test_annotations_that_are_none(content, why, tmp_path):
    write_pretrain(tmp_path, 1)
    path = tmp_path / "blip_laion_cc_sbu_558k.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=why):
        convert_folder(tmp_path)


def test_too_few_samples_to_split(tmp_path):
    write_pretrain(tmp_path, 1)
    with pytest.raises(ValueError, match="1 usable samples; a train and a val split need at least 2"):
        convert_folder(tmp_path)
    assert not (tmp_path / "wds").exists()


def test_where_nothing_is_usable_the_reasons_are_listed(tmp_path):
    samples = write_pretrain(tmp_path, 10)
    for sample in samples:
        Image.new("I;16", (6, 6), 700).save(tmp_path / sample["image"], "PNG")
    with pytest.raises(ValueError, match=r"0 usable samples; .*wds\.rejected\.tsv says why of 10, .*: gray of 16 bits"):
        convert_folder(tmp_path, max_rejected_share=1)
    assert len((tmp_path / "wds.rejected.tsv").read_text().splitlines()) == 10


@pytest.mark.parametrize("cut", [{"workers": 2}, {"parts": 3}, {"parts": 20}])
def test_bytes_do_not_depend_on_processes_and_parts(cut, tmp_path):
    """The list of rejected samples included."""
    entries = write_pretrain(tmp_path, 35)
    for index in (3, 30):
        entries[index]["image"] = "nowhere.jpg"
    write_annotations(tmp_path, entries)
    settings = {"no_prepare": True, "max_rejected_share": 0.5}
    convert_folder(tmp_path, **settings)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "wds").iterdir()}
    rejected = (tmp_path / "wds.rejected.tsv").read_bytes()
    (tmp_path / "wds.rejected.tsv").unlink()
    shutil.rmtree(tmp_path / "wds")
    given = 0
    for part in range(1, cut.get("parts", 0) + 1):
        given += convert_folder(tmp_path, part=f"{part}/{cut['parts']}", **settings).given
        assert not (tmp_path / "wds").exists()
    assert given == (35 if "parts" in cut else 0)
    report = convert_folder(tmp_path, workers=cut.get("workers", 1), **settings)
    assert (report.given, report.written) == (35, 33)
    assert {path.name: path.read_bytes() for path in (tmp_path / "wds").iterdir()} == expected
    assert (tmp_path / "wds.rejected.tsv").read_bytes() == rejected


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    entries = write_pretrain(tmp_path, 20)
    entries[4]["image"] = "nowhere.jpg"
    write_annotations(tmp_path, entries)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    report = convert_folder(tmp_path, dry_run=True, max_rejected_share=0.1)
    assert report.rejected == [(4, '"000004"', "image 'nowhere.jpg': missing")]
    with pytest.raises(ValueError, match="1 samples rejected, more than"):
        convert_folder(tmp_path, dry_run=True, workers=2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert convert_folder(tmp_path, no_prepare=True, max_rejected_share=0.1).records == report.records


def test_a_mix_of_conversations(tmp_path):
    """Several turns, text alone, several images, ids that repeat: energon gives what the json has."""
    write_pretrain(tmp_path, 12)
    two = [*turns()["conversations"], {"from": "human", "value": "And?"}, {"from": "gpt", "value": "so on"}]
    entries = [
        {"id": "000000033471", "image": "00000/000001.jpg", "conversations": two},
        {"id": "000000033471", "image": "00000/000002.jpg", **turns()},
        {"id": "VG_100K/2.x", **turns(question="Who?")},
        {"id": 5, "image": ["00000/000003.jpg", "00000/000004.jpg"], **turns(question="<image> or <image>?")},
        {"image": [], "id": "x", "conversations": two[2:] * 3},
    ] * 4
    write_annotations(tmp_path, [*entries, {"id": "y", **turns()}])
    report = convert_folder(tmp_path, max_rejected_share=0.1)
    assert rejects(report) == {'"y"': "the questions have 1 <image> for 0 images"}
    assert (report.written, report.is_pairs) == (20, False)
    dataset = get_train_dataset(
        tmp_path / "wds",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Raw(),
    )
    found = {sample["__key__"].split("/")[-1]: sample for sample in get_loader(dataset)}
    assert sorted(found) == [f"{position:09d}" for position in range(18)]  # 9 of 10 shards
    for position in range(18):
        sample, given = found[f"{position:09d}"], entries[position]
        images = [given["image"]] if isinstance(given.get("image"), str) else given.get("image", [])
        fields = {f"{number}.jpg" if number else "jpg": image for number, image in enumerate(images)}
        assert {name for name in sample if not name.startswith("__")} == {*fields, "json"}
        for name, image in fields.items():
            assert sample[name] == (tmp_path / image).read_bytes()
        assert json.loads(sample["json"]) == given["conversations"]


class Raw(DefaultTaskEncoder):
    """Hands on the fields as they lie in the shards."""

    decoder = None
    cookers = (Cooker(stateless(lambda sample: sample)),)

    @stateless
    def encode_sample(self, sample):
        return sample
