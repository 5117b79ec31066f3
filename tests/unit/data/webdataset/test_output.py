"""Runs that were ended, stopped or begun twice: what was whole is kept, nothing else is shown."""

import errno
import fcntl
import os
import signal

import pytest

from megatron_patch.data.webdataset import output
from megatron_patch.data.webdataset.output import LocalOutput
from megatron_patch.data.webdataset.tar import TarWriter
from tests.unit.data.samples import convert_folder, write_annotations, write_pretrain
from tests.unit.data.webdataset.shards import read_shards, rejects, shards


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_behind_its_last_whole_shard(workers, tmp_path):
    """kill -9 while the fifth picture of a shard is written: the half shard is not there, the whole ones stay."""
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
            convert_folder(tmp_path)
        assert (tmp_path / "wds.partial" / "00000.tar.tmp").read_text() == "hers"


def test_parts_that_begin_at_once(tmp_path, monkeypatch):
    """Both find no folder yet; one makes it, with its plan, and both go on."""
    wait = output._write_whole

    def meanwhile(path, text):
        monkeypatch.undo()
        LocalOutput(str(tmp_path / "wds")).begin({"samples": 5}, overwrite=False)
        wait(path, text)

    monkeypatch.setattr(output, "_write_whole", meanwhile)
    LocalOutput(str(tmp_path / "wds")).begin({"samples": 5}, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["wds.partial"]
    with pytest.raises(ValueError, match="begun with another samples"):
        LocalOutput(str(tmp_path / "wds")).begin({"samples": 6}, overwrite=False)


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


def test_where_the_output_may_be(tmp_path, monkeypatch):
    """A slash at its end changes nothing, the list of rejected samples beside it included."""
    entries = write_pretrain(tmp_path, 20)
    write_annotations(tmp_path, [*entries, "no object"])
    report = convert_folder(tmp_path, output=f"{tmp_path}/out/", no_prepare=True, max_rejected_share=0.1)
    assert report.quarantine == f"{tmp_path}/out.rejected.tsv"
    monkeypatch.chdir(tmp_path)
    for place, why in [
        (".", f"{tmp_path}: exists; remove it"),
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


def test_overwrite_removes_nothing_but_shards(tmp_path):
    write_pretrain(tmp_path / "data", 20)
    with pytest.raises(ValueError, match="not made by a conversion, so --overwrite does not remove it"):
        convert_folder(tmp_path / "data", output=str(tmp_path / "data"), overwrite=True)
    assert (tmp_path / "data" / "00000" / "000000.jpg").exists()
