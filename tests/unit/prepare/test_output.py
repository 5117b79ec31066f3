"""Runs that were ended, stopped or begun twice: what was whole is kept, nothing else is shown."""

import errno
import fcntl
import json
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.files import whole
from megatron_patch.prepare import output, own
from megatron_patch.prepare.output import LocalOutput, ShardRecord
from megatron_patch.prepare.tar import TarWriter
from tests.unit.data.samples import convert_folder, write_annotations, write_pretrain
from tests.unit.prepare.shards import read_shards, rejects, shards
from tests.unit.properties import examples, json_values


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_behind_its_last_whole_shard(workers, tmp_path):
    """kill -9 while the fifth image of a shard is written: the half shard is not there, the whole ones stay."""
    write_pretrain(tmp_path, 60)
    settings = {"no_prepare": True, "workers": workers}
    kill_in_a_fork(lambda: convert_folder(tmp_path, **settings), at="000028.jpg")
    assert not (tmp_path / "wds").exists()
    partial = tmp_path / "wds.partial"
    whole = {path.stem: (partial / path.stem).stat().st_ino for path in partial.glob(".records/*.tar.json")}
    assert len(whole) >= 3
    assert "00004.tar" not in whole
    # One of the whole ones is damaged meanwhile.
    damaged = partial / min(whole)
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    report = convert_folder(tmp_path, **settings)
    assert (report.given, report.written) == (60, 60)
    for name, inode in whole.items():
        assert ((tmp_path / "wds" / name).stat().st_ino == inode) == (name != damaged.name)
    resumed = shards(tmp_path)
    convert_folder(tmp_path, overwrite=True, **settings)
    assert shards(tmp_path) == resumed
    assert sorted(path.name for path in tmp_path.iterdir() if "wds" in path.name) == ["wds"]


def kill_in_a_fork(run, at):
    """Run it in a process of its own that gets SIGKILL when the member `at` is to be written."""
    process = os.fork()
    if not process:
        try:
            os.setpgid(0, 0)
            add = TarWriter.add

            def killed(writer, name, data):
                if name == at:
                    os.killpg(0, signal.SIGKILL)
                add(writer, name, data)

            TarWriter.add = killed
            run()
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def test_a_mended_sample_is_taken_when_a_stopped_run_goes_on(tmp_path):
    write_pretrain(tmp_path, 40)
    lost = tmp_path / "00000" / "000001.jpg"
    picture = lost.read_bytes()
    lost.unlink()
    for index in (30, 31):
        (tmp_path / "00000" / f"0000{index}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="3 samples rejected"):
        convert_folder(tmp_path, no_prepare=True, max_rejected_share=0.05)
    lost.write_bytes(picture)
    report = convert_folder(tmp_path, no_prepare=True, max_rejected_share=0.05)
    assert sorted(rejects(report)) == ['"000030"', '"000031"']
    assert "000001.jpg" in read_shards(tmp_path)


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, monkeypatch):
    write_pretrain(tmp_path, 40)

    def full(descriptor, pieces):
        if (tmp_path / "wds.partial" / "00002.tar").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return writev(descriptor, pieces)

    writev = os.writev
    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*wds\.partial/00003\.tar\.tmp'"):
        convert_folder(tmp_path, no_prepare=True)
    monkeypatch.undo()
    assert not list((tmp_path / "wds.partial").glob("*.tmp"))
    assert convert_folder(tmp_path, no_prepare=True).written == 40


def test_a_second_conversion_of_the_same_shards_is_refused(tmp_path):
    write_pretrain(tmp_path, 20)
    convert_folder(tmp_path, part="2/2")
    with (tmp_path / "wds.partial" / "00000.tar.tmp").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("hers")
        file.flush()
        with pytest.raises(ValueError, match=r"00000\.tar\.tmp: another conversion is writing it"):
            convert_folder(tmp_path, part="1/2")
        assert (tmp_path / "wds.partial" / "00000.tar.tmp").read_text() == "hers"


def test_parts_that_begin_at_once(tmp_path, monkeypatch):
    """Both find no folder yet; one makes it, with its plan, and both go on."""
    wait = output.write_whole

    def meanwhile(path, text):
        monkeypatch.undo()
        LocalOutput(str(tmp_path / "wds")).begin({"samples": 5}, overwrite=False, shared=True)
        wait(path, text)

    monkeypatch.setattr(output, "write_whole", meanwhile)
    LocalOutput(str(tmp_path / "wds")).begin({"samples": 5}, overwrite=False, shared=True)
    assert [path.name for path in tmp_path.iterdir()] == ["wds.partial"]
    with pytest.raises(ValueError, match="begun with another samples"):
        LocalOutput(str(tmp_path / "wds")).begin({"samples": 6}, overwrite=False, shared=True)


@pytest.mark.parametrize("damage", [b"{", b"{}", b"7", b"[1]", b'{"rejected": 5}', b'{"rejected": [], "given": "2"}'])
def test_a_damaged_record_is_none_and_a_damaged_plan_one_line(damage, tmp_path):
    write_pretrain(tmp_path, 20)
    convert_folder(tmp_path, part="1/2")
    records = tmp_path / "wds.partial" / ".records"
    (records / "00000.tar.json").write_bytes(damage)
    assert convert_folder(tmp_path, part="1/2").written == 10
    (records / "plan.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"begun with another annotations, .*; finish it with the same"):
        convert_folder(tmp_path, part="1/2")


@pytest.mark.parametrize("changed", [{"given": 3}, {"size": "7"}, {"crc32": True}, {"shard": "00001.tar"}])
def test_a_record_that_does_not_add_up_is_none(changed, tmp_path):
    write_pretrain(tmp_path, 20)
    convert_folder(tmp_path, part="1/2")
    output = LocalOutput(str(tmp_path / "wds"))
    path = tmp_path / "wds.partial" / ".records" / "00000.tar.json"
    content = json.loads(path.read_text())
    assert output.read_record("00000.tar") is not None
    path.write_text(json.dumps({**content, **changed}))
    assert output.read_record("00000.tar") is None


def test_where_the_output_may_be(tmp_path, monkeypatch):
    """A slash at its end changes nothing, the list of rejected samples beside it included."""
    entries = write_pretrain(tmp_path, 20)
    write_annotations(tmp_path, [*entries, "no object"])
    report = convert_folder(tmp_path, output=f"{tmp_path}/out/", no_prepare=True, max_rejected_share=0.1)
    assert report.quarantine == f"{tmp_path}/out.rejected.tsv"
    monkeypatch.chdir(tmp_path)
    for place, why in [
        (".", "--output .: lies in what is read, or holds it"),
        ("/", "--output /: expected a folder"),
        ("blip_laion_cc_sbu_558k.json/x", "no folder can be made in what is a file"),
    ]:
        with pytest.raises(ValueError, match=why):
            convert_folder(tmp_path, output=place, no_prepare=True)


def test_other_input_or_settings_do_not_go_on(tmp_path):
    entries = write_pretrain(tmp_path, 20)
    convert_folder(tmp_path, part="1/2")
    with pytest.raises(ValueError, match=r"wds\.partial: begun with another validate; finish it with the same"):
        convert_folder(tmp_path, validate="full")
    with pytest.raises(ValueError, match="begun with another images"):
        convert_folder(tmp_path, images=str(tmp_path))
    write_annotations(tmp_path, entries[1:])
    with pytest.raises(ValueError, match="begun with another samples, sha256 of the annotations"):
        convert_folder(tmp_path)
    assert convert_folder(tmp_path, overwrite=True, no_prepare=True).written == 19


def put_in(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")


def theirs(root):
    """Every file of a user's, as it was."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.read_bytes() == b"theirs")


def a_link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


MARK = "wds.partial/.records/plan.json"
IN_THE_WAY = {
    "a data set of another program": lambda data: put_in(data / "wds", "00000.tar", ".nv-meta/dataset.yaml"),
    "a file": lambda data: put_in(data, "wds"),
    "a link": lambda data: a_link(data / "wds", data.parent / "theirs"),
    "a link to nothing": lambda data: a_link(data / "wds", data / "nowhere"),
    "their file in a data set": lambda data: put_in(data / "wds", "manifest.json", "notes.txt"),
    "their file beside the index": lambda data: put_in(data / "wds", "manifest.json", ".nv-meta/sample_loader.py"),
    "their folder in a data set": lambda data: put_in(data / "wds", "manifest.json", "00000.tar/x"),
    "their manifest": lambda data: put_in(data / "wds", "manifest.json", "00000.tar"),
    "partial of another program": lambda data: put_in(data / "wds.partial", "00000.tar"),
    "partial is a file": lambda data: put_in(data, "wds.partial"),
    "partial is a link": lambda data: a_link(data / "wds.partial", data.parent / "theirs"),
    "a link in partial": lambda data: (put_in(data, MARK), a_link(data / "wds.partial/00000.tar.tmp", data / "x")),
    "records are a link": lambda data: a_link(data / "wds.partial/.records", data.parent / "theirs"),
    "the index is a link": lambda data: (
        put_in(data, MARK),
        a_link(data / "wds.partial/.nv-meta", data.parent / "theirs"),
    ),
    "their file in partial": lambda data: put_in(data, MARK, "wds.partial/notes.txt"),
    "their list": lambda data: put_in(data, "wds.rejected.tsv"),
    "a folder in place of the list": lambda data: (data / "wds.rejected.tsv").mkdir(),
    "a link in place of the list": lambda data: a_link(data / "wds.rejected.tsv", data.parent / "theirs/x"),
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_conversions_own_is_neither_removed_nor_followed(kind, overwrite, tmp_path):
    data = tmp_path / "data"
    write_pretrain(data, 20)
    put_in(tmp_path / "theirs", "x", "manifest.json", "plan.json", "index.sqlite")
    IN_THE_WAY[kind](data)
    before = theirs(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"wds[^ ]*: ") as caught:
        convert_folder(data, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert theirs(tmp_path) == before


@pytest.mark.parametrize("place", ["data", ".", "data/images/wds", "pictures/wds", "data/blip_laion_cc_sbu_558k.json"])
def test_an_output_among_the_sources_is_refused(place, tmp_path):
    write_pretrain(tmp_path / "data", 20)
    (tmp_path / "pictures").symlink_to("data/images")
    (tmp_path / "data" / "00000").rename(tmp_path / "data" / "images")
    (tmp_path / "data" / "images" / "00000").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"--output .*: lies in what is read, or holds it"):
        convert_folder(
            tmp_path / "data", output=str(tmp_path / place), overwrite=True, images=f"{tmp_path}/data/images"
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_whole_conversions_exclude_each_other_and_parts_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "PATIENCE", 0)
    write_pretrain(tmp_path, 20)
    place = str(tmp_path / "wds")
    convert_folder(tmp_path, part="1/2")
    plan = json.loads((tmp_path / MARK).read_bytes())
    for shared in (False, True):
        first = LocalOutput(place)
        first.begin(plan, overwrite=False, shared=shared)
        for settings in ({}, {"overwrite": True}, *([{"part": "2/2"}] if not shared else [])):
            with pytest.raises(ValueError, match=r"wds\.partial: another conversion is writing it; wait for it"):
                convert_folder(tmp_path, **settings)
        if shared:
            convert_folder(tmp_path, part="2/2")
        first.end()
    assert convert_folder(tmp_path, no_prepare=True).written == 20


def test_a_conversion_that_another_one_overtook_replaces_nothing(tmp_path, monkeypatch):
    """It saw no output, then the other one ended; its own folder is a new one."""
    write_pretrain(tmp_path, 20)
    make = LocalOutput._make_partial

    def meanwhile(self, plan):
        monkeypatch.undo()
        convert_folder(tmp_path, no_prepare=True)
        make(self, plan)

    monkeypatch.setattr(LocalOutput, "_make_partial", meanwhile)
    with pytest.raises(ValueError, match="wds: exists; remove it or give --overwrite"):
        convert_folder(tmp_path, no_prepare=True)


def test_what_a_killed_conversion_left_is_not_shown(tmp_path):
    write_pretrain(tmp_path, 20)
    convert_folder(tmp_path, part="1/2")
    put_in(tmp_path / "wds.partial", "00009.tar.tmp", ".00000.tar.idx.tmp.tmp", ".manifest.json.7.tmp", ".qi2m4trb")
    put_in(tmp_path / "wds.partial" / ".records", ".00000.tar.json.7.tmp")
    convert_folder(tmp_path)
    names = {path.name for path in (tmp_path / "wds").iterdir()}
    assert names - {f"{index:05d}.tar{end}" for index in range(10) for end in ("", ".idx")} == {
        ".nv-meta",
        "manifest.json",
    }
    assert convert_folder(tmp_path, overwrite=True).written == 20


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    write_pretrain(tmp_path, 20)
    monkeypatch.setattr(fcntl, "flock", none)
    convert_folder(tmp_path)
    assert "no locks on this file system; do not start a second conversion" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_last_moment_is_named(tmp_path, monkeypatch):
    def full(descriptor):  # a mock of a disk
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/manifest\.json'"):
        whole.write_whole(tmp_path / "manifest.json", "{}")
    assert not list(tmp_path.iterdir())


@examples
@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_plan_and_record_is_read_or_one_line(tmp_path, content):
    place = tmp_path / "wds"
    records = tmp_path / "wds.partial" / ".records"
    records.mkdir(parents=True, exist_ok=True)
    (records / "plan.json").write_bytes(content)
    (records / "00000.tar.json").write_bytes(content)
    output = LocalOutput(str(place))
    assert output.read_record("00000.tar") is None
    try:
        with pytest.raises(ValueError, match=r"wds\.partial: begun with another samples"):
            output.begin({"samples": 5}, overwrite=False)
    finally:
        output.end()


def test_a_plan_nested_deep_is_one_line(tmp_path):
    put_in(tmp_path, MARK)
    (tmp_path / MARK).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"wds\.partial: begun with another samples"):
        LocalOutput(str(tmp_path / "wds")).begin({"samples": 5}, overwrite=False)


def test_links_that_are_made_after_the_look_are_not_followed(tmp_path, monkeypatch):
    """A lock, a shard, a file that is written aside: nothing is made or emptied where they lead."""
    there = tmp_path / "theirs"
    there.write_text("theirs")
    for target in (there, tmp_path / "nowhere"):
        for name in ("lock", "00000.tar.tmp", "list.0.tmp"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(target)
        with pytest.raises(OSError, match="lock"):
            own.lock(tmp_path / "lock", shared=False)
        output = LocalOutput(str(tmp_path / "wds"))
        output.partial = tmp_path
        with (
            pytest.raises(OSError, match="tmp"),
            output.new_shard("00000.tar", ShardRecord(shard="00000.tar", given=1)),
        ):
            pass
        monkeypatch.setattr(whole.marks, "beside", lambda path: path.with_name("list.0.tmp"))
        with pytest.raises(FileExistsError):
            whole.write_whole(tmp_path / "list", "ours")
        assert (tmp_path / "list.0.tmp").is_symlink()
    assert there.read_text() == "theirs"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_to_a_list_is_not_one(tmp_path):
    (tmp_path / "list").write_text("3\tid\twhy\n")
    own.check_list(tmp_path / "list")
    (tmp_path / "link").symlink_to(tmp_path / "list")
    with pytest.raises(ValueError, match="not a list of rejected samples"):
        own.check_list(tmp_path / "link")
