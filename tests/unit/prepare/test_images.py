"""Where images may come from, and that nothing comes from anywhere else."""

import io
import os
import zipfile
from contextlib import suppress

import pytest
from hypothesis import example, given

from megatron_patch.data.image_headers import Rejected
from megatron_patch.prepare.images import Images, open_roots
from tests.unit.data.samples import jpeg
from tests.unit.properties import damaged, examples, one_line

PICTURE = jpeg((1, 2, 3))


def test_several_roots_are_asked_in_their_order(tmp_path):
    for folder in ("coco", "gqa/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "coco" / "a.jpg").write_bytes(PICTURE + b"1")
    (tmp_path / "gqa" / "images" / "a.jpg").write_bytes(PICTURE + b"2")
    (tmp_path / "gqa" / "images" / "b.jpg").write_bytes(PICTURE + b"3")
    with zipfile.ZipFile(tmp_path / "more.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", PICTURE + b"4")
        archive.writestr("deep/c.jpg", PICTURE + b"5")
    roots = [tmp_path / "coco", tmp_path / "gqa" / "images", tmp_path / "more.zip"]
    pictures = Images(open_roots(list(map(str, roots))), "header")
    assert [pictures.read(name)[-1:] for name in ("a.jpg", "b.jpg", "./b.jpg", "deep/c.jpg")] == [
        b"1",
        b"3",
        b"3",
        b"5",
    ]
    with pytest.raises(Rejected, match=r"image 'c\.jpg': missing"):
        pictures.read("c.jpg")
    with pytest.raises(ValueError, match="nowhere: neither a folder nor a zip archive"):
        open_roots([str(tmp_path / "nowhere")])


def test_links_lead_only_into_the_given_folders(tmp_path):
    for folder in ("data/coco", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.jpg").write_bytes(PICTURE)
    (tmp_path / "data" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "deep" / "a.jpg")
    (tmp_path / "data" / "inside.jpg").symlink_to("coco/b.jpg")
    (tmp_path / "data" / "coco" / "b.jpg").write_bytes(PICTURE)
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop.jpg").symlink_to("loop.jpg")
    # Begins as the allowed one does.
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "a.jpg").write_bytes(PICTURE)
    (tmp_path / "data" / "near.jpg").symlink_to(tmp_path / "data2" / "a.jpg")
    alone = Images(open_roots([str(tmp_path / "data")]), "header")
    assert alone.read("inside.jpg") == PICTURE
    for name in ("a.jpg", "folder/deep/a.jpg", "near.jpg"):
        with pytest.raises(Rejected, match="a link that leads out of the folder; name its target with --images"):
            alone.read(name)
    with pytest.raises(Rejected, match=r"image 'loop\.jpg'"):
        alone.read("loop.jpg")
    both = Images(open_roots([str(tmp_path / "data"), str(tmp_path / "elsewhere")]), "header")
    assert both.read("a.jpg") == both.read("folder/deep/a.jpg") == PICTURE


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_file_system_that_gives_few_bytes_at_a_time(kind, tmp_path, monkeypatch):
    """FUSE and NFS may. The system's calls are mocks."""
    read, pread = os.read, os.pread
    place = tmp_path if kind == "folder" else tmp_path / "images.zip"
    if kind == "folder":
        (tmp_path / "a.jpg").write_bytes(PICTURE)
    else:
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("a.jpg", PICTURE)
    pictures = Images(open_roots([str(place)]), "none")
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 100)))
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 100), offset))
    assert pictures.read("a.jpg") == PICTURE


@pytest.mark.parametrize("left", [0, 100])
def test_a_picture_that_is_cut_while_it_is_read(left, tmp_path, monkeypatch):
    """The moment between the two calls is a mock."""
    path, fstat = tmp_path / "a.jpg", os.fstat
    path.write_bytes(PICTURE)

    def fstat_and_cut(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(path, left)
        return status

    monkeypatch.setattr(os, "fstat", fstat_and_cut)
    with pytest.raises(Rejected, match=rf"image 'a\.jpg': {left} bytes of {len(PICTURE)} could be read"):
        Images(open_roots([str(tmp_path)]), "none").read("a.jpg")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_damage_in_an_archive(method, tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.jpg", PICTURE)
        archive.writestr("b.jpg", PICTURE)
    whole = path.read_bytes()
    middle = zipfile.ZipFile(path).getinfo("b.jpg").header_offset // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    pictures = Images(open_roots([str(path)]), "none")
    if method == zipfile.ZIP_BZIP2:
        with pytest.raises(Rejected, match="packed in a way other than stored and deflated"):
            pictures.read("b.jpg")
        return
    assert pictures.read("b.jpg") == PICTURE
    with pytest.raises(Rejected, match="damaged in the archive"):
        pictures.read("a.jpg")
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"images\.zip: not a whole zip archive: .*; download it again"):
        open_roots([str(path)])


def an_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.jpg", "ä/b.jpg"):
            archive.writestr(name, PICTURE)
    return file.getvalue()


@examples
@given(damaged(an_archive()))
@example(an_archive().replace("ä/b.jpg".encode(), b"\xff\xfe/b.jpg"))
def test_a_damaged_archive_is_one_line(tmp_path, content):
    path = tmp_path / "images.zip"
    path.write_bytes(content)
    with one_line(path):
        pictures = Images(open_roots([str(path)]), "none")
        for name in ("a.jpg", "ä/b.jpg"):
            with suppress(Rejected):
                assert pictures.read(name) == PICTURE


NAMES = ["00000/a.jpg", "./00000/a.jpg", ".//00000/./a.jpg", "00000//a.jpg"]


def zipped(path, prefix="", *, others=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name in (f"{prefix}00000/a.jpg", f"{prefix}00001/b.jpg", *others):
            archive.writestr(name, PICTURE)
    return Images(open_roots([str(path)]), "header")


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_lead_nowhere_are_left_out(name, tmp_path):
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "a.jpg").write_bytes(PICTURE)
    assert Images(open_roots([str(tmp_path)]), "header").read(name) == PICTURE
    assert zipped(tmp_path / "images.zip").read(name) == PICTURE
    assert zipped(tmp_path / "dotted.zip", "./", others=("c.jpg",)).read(name) == PICTURE


@pytest.mark.parametrize("prefix", ["LLaVA-Pretrain/", "data/LLaVA/", "./images/"])
@pytest.mark.parametrize("others", [(), ("__MACOSX/._a.jpg",)])
def test_an_archive_of_the_folder_itself(prefix, others, tmp_path):
    pictures = zipped(tmp_path / "images.zip", prefix, others=others)
    for name in (*NAMES, f"{prefix}00000/a.jpg", f"{tmp_path}/00000/a.jpg", f"{tmp_path}/{prefix}00000/a.jpg"):
        assert pictures.read(name) == PICTURE
    with pytest.raises(Rejected, match="missing"):
        pictures.read("a.jpg")


def test_absolute_names_within_the_folder(tmp_path):
    for folder in ("data/00000", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(PICTURE)
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "data" / "out.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    for root in ("data", "link"):
        pictures = Images(open_roots([str(tmp_path / root)]), "header")
        for name in ("data/00000/a.jpg", "link/00000/a.jpg", "./data/00000//a.jpg"):
            assert pictures.read(f"{tmp_path}/{name}") == PICTURE
        for name in ("elsewhere/a.jpg", "data/../elsewhere/a.jpg", "data/out.jpg", "data2/a.jpg"):
            with pytest.raises(Rejected, match="leads out of the folder"):
                pictures.read(f"{tmp_path}/{name}")
        with pytest.raises(Rejected, match="missing"):
            pictures.read(f"{tmp_path}/data/00000/none.jpg")
        for name in ("/", "/etc/passwd", "/passwd", "//etc/passwd"):
            with pytest.raises(Rejected):
                pictures.read(name)
