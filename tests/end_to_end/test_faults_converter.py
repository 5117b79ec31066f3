"""Faults that must do no harm, in the converter: killed, no space, broken disks, damaged and mixed up checkpoints.

Each asserts how it ends, what the one line on stderr names, and that what was good before still is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.conversion.commands import main
from megatron_patch.conversion.plan import load_rank, open_mcore
from megatron_patch.families.llava import read_config
from megatron_patch.families.stages import Stage
from megatron_patch.files.whole import written_aside
from megatron_patch.stores import manifest
from megatron_patch.stores.hf import HfReader
from megatron_patch.tensor_io import disk
from megatron_patch.tensor_io.archives import open_archive
from megatron_patch.tensor_io.torch_zip import describe
from tests.forked import PROCESSES

IMPORT_POINTS = (
    "locked",
    "bytes written",
    "weights written",
    "file finished",
    "manifest written",
    "shards synced",
    "tracker written",
    "synced",
    "renamed",
)
EXPORT_POINTS = ("locked", "bytes written", "weights written", "synced", "renamed")


def importing(mistral: Path, clip: Path, target: Path, **changed: object) -> list[str]:
    """Arguments for Hugging Face -> TP2 shards."""
    return _words(
        source_llm_ckpt_path=mistral,
        source_clip_ckpt_path=clip,
        target_ckpt_path=target,
        **{"tensor_model_parallel_size": 2, "precision": "fp32", **changed},
    )


def exporting(checkpoint: Path, target: Path, **changed: object) -> list[str]:
    """Arguments for shards -> Hugging Face."""
    return _words(source_llm_ckpt_path=checkpoint, target_ckpt_path=target, precision="fp32", mg2hf="true", **changed)


def _words(**flags: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, arguments: list[str], *words: object) -> str:
    """Run it here: it must fail with one line that has these words."""
    capsys.readouterr()
    assert main(arguments) == 1
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    for word in words:
        assert str(word) in lines[0]
    return lines[0]


def _die_at(point: str, arguments: list[str]) -> None:
    left = {"bytes written": 40}.get(point, 1)  # in the middle

    def reached(name: str) -> None:
        nonlocal left
        left -= name == point
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    disk.reached = reached
    main(arguments)
    os._exit(3)  # the point was never reached


def killed(point: str, arguments: list[str]) -> None:
    process = PROCESSES.Process(target=_die_at, args=(point, arguments))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", IMPORT_POINTS)
def test_killed_while_importing(tmp_path, mistral, clip, mcore, point):
    """Nothing is there, or all of it; the next run clears up and succeeds."""
    target = tmp_path / "target"
    killed(point, importing(mistral, clip, target))
    if point != "renamed":
        assert not target.exists()
        assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
        assert main(importing(mistral, clip, target)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    reference = files(mcore)
    found = files(target)
    assert found.keys() == reference.keys()
    assert all(found[name] == reference[name] for name in reference)


@pytest.mark.parametrize("point", ["bytes written", "weights written", "file finished", "tracker written"])
def test_killed_while_writing_torch_dist(tmp_path, mcore, point):
    target = tmp_path / "target"
    arguments = _words(source_llm_ckpt_path=mcore, target_ckpt_path=target, precision="fp32", ckpt_format="torch_dist")
    killed(point, arguments)
    partial = tmp_path / ".target.partial"
    assert list(tmp_path.iterdir()) == [partial]
    if point != "tracker written":
        (partial / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises((ValueError, OSError)):
        open_mcore(partial, read_config(mcore))
    assert main(arguments) == 0
    found, expected = (open_mcore(folder, read_config(mcore)) for folder in (target, mcore))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("point", EXPORT_POINTS)
def test_killed_while_exporting(tmp_path, mcore, hf, point):
    target = tmp_path / "target"
    killed(point, exporting(mcore, target))
    if point != "renamed":
        assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]
        assert main(exporting(mcore, target)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert files(target) == files(hf)


@pytest.mark.parametrize("point", ["bytes written", "weights written", "file finished", "tracker written"])
def test_what_a_killed_one_leaves_is_no_checkpoint(tmp_path, mistral, clip, mcore, point):
    """Even if somebody takes the hidden folder for one: no tracker, and no file without its directory loads."""
    killed(point, importing(mistral, clip, tmp_path / "target"))
    partial = tmp_path / ".target.partial"
    with pytest.raises((ValueError, OSError)):
        open_mcore(partial, read_config(mcore))
    if point != "tracker written":
        (partial / "latest_checkpointed_iteration.txt").write_text("release")
        with pytest.raises((ValueError, OSError)):
            open_mcore(partial, read_config(mcore))


def fails(number: int, call: Callable, count: int) -> Callable:
    """`call`, which raises this error at the count-th time, and ever after."""
    calls = iter(range(1, 1 << 30))

    def failing(*arguments: object) -> object:
        if next(calls) >= count:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return failing


@pytest.mark.parametrize(
    ("function", "number", "count"),
    [
        ("pwrite", errno.ENOSPC, 1),
        ("pwrite", errno.ENOSPC, 300),
        ("pwrite", errno.EIO, 100),
        ("preadv", errno.EIO, 1),
        ("preadv", errno.EIO, 40),
        ("fsync", errno.EIO, 1),
        ("ftruncate", errno.EFBIG, 1),
    ],
)
def test_a_disk_that_fails(tmp_path, monkeypatch, capsys, mistral, clip, function, number, count):
    """Full, or broken, at any moment: one line with the file, and nothing is left."""
    monkeypatch.setattr(os, function, fails(number, getattr(os, function), count))
    where = ".safetensors" if function == "preadv" else ".target.partial/"
    line = refused(capsys, importing(mistral, clip, tmp_path / "target"), os.strerror(number))
    assert where in line
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_known_before(tmp_path, monkeypatch, capsys, mistral, clip, mcore):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    for arguments in (importing(mistral, clip, tmp_path / "target"), exporting(mcore, tmp_path / "target")):
        refused(capsys, arguments, tmp_path / "target", "needs 0.07 GB, and 0.00 GB are free")
        assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path, capsys, mistral, clip):
    target = tmp_path / "target"
    with written_aside(target) as folder:
        (folder / "file").write_text("first")
        refused(capsys, importing(mistral, clip, target), target, "another process is writing it")
        assert (folder / "file").read_text() == "first"
    assert files(target) == {"file": b"first"}


def test_order_on_the_disk(tmp_path, monkeypatch, mistral, clip):
    """Files, then the folders that name them, then the tracker, then the rename, then the folder above."""
    events: list[tuple[str, Path]] = []
    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name), events))
    target = tmp_path / "target"
    assert main(importing(mistral, clip, target)) == 0
    partial = tmp_path / ".target.partial"
    renames = [event for event in events if event[0] == "rename"]
    tracker = "latest_checkpointed_iteration.txt"
    assert renames == [("rename", partial / f"{tracker}.partial"), ("rename", partial)]
    first, second = (events.index(event) for event in renames)
    # What the proof found is written after the tracker, which is within the folder that is renamed last.
    names = sorted(path.relative_to(target) for path in target.rglob("*") if path.name.endswith((".pt", ".json")))
    shards = [path for path in names if path.name != "parity.json"]
    assert len(shards) > 3
    for path in shards:
        folder = last(events, partial / path.parent, first)
        assert last(events, partial / path, first) < folder
    assert last(events, partial / f"{tracker}.partial", first) > last(events, partial / "release", first)
    for path in target.rglob("*"):
        assert (
            last(events, partial / path.relative_to(target), second) < last(events, partial, second) or path.is_file()
        )
    assert events[second + 1] == ("fsync", tmp_path)


def recorded(name: str, call: Callable, events: list[tuple[str, Path]]) -> Callable:
    def recording(first: object, *others: object) -> object:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first
        events.append((name, Path(path)))
        return call(first, *others)

    return recording


def last(events: list[tuple[str, Path]], path: Path, before: int) -> int:
    """When a path was last brought to the disk before that event."""
    return max(number for number, event in enumerate(events[:before]) if event == ("fsync", path))


WHOLE = Stage(range(4), pre_process=True, post_process=True)
QKV = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
NORM = "language_model.decoder.layers.2.pre_mlp_layernorm.weight"
EMBEDDING = "language_model.embedding.word_embeddings.weight"
FC2 = "language_model.decoder.layers.3.mlp.linear_fc2.weight"
CLASS = "vision_model.class_token"


@pytest.fixture
def copy(mcore, tmp_path) -> Path:
    return shutil.copytree(mcore, tmp_path / "copy")


def rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "release" / f"mp_rank_0{rank}" / "model_optim_rng.pt"


def place(checkpoint: Path, rank: int, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie in a rank's file: offset, bytes."""
    with rank_file(checkpoint, rank).open("rb") as file:
        stored = describe(open_archive(file))["model"][name]
    return stored.offset, torch.Size(stored.shape).numel() * stored.dtype.itemsize


def change(path: Path, offset: int, new: Callable[[bytes], bytes], length: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(length)
        assert new(old) != old
        file.seek(offset)
        file.write(new(old))


def load_all(checkpoint: Path, tp_size: int) -> None:
    """What the ranks of a training would do."""
    for tp_rank in range(tp_size):
        load_rank(checkpoint, read_config(checkpoint), WHOLE, tp_rank=tp_rank, tp_size=tp_size)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    change(path, offset, lambda data: bytes([data[0] ^ 1 << bit]))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [QKV, NORM, EMBEDDING, FC2, CLASS])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_in_a_tensor(tmp_path, capsys, copy, rank, name, where):
    offset, size = place(copy, rank, name)
    flip(rank_file(copy, rank), offset + (0 if where == "first" else size - 1), bit=7 if where == "last" else 0)
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, rank), name, "sha256 differs")
    assert not (tmp_path / "hf").exists()
    for tp_size in (1, 4):
        with pytest.raises(ValueError, match=f"mp_rank_0{rank}/.*{name}.*sha256 differs"):
            load_all(copy, tp_size)


def test_a_flipped_bit_anywhere_in_a_file(mcore, copy):
    """One bit of every 1,000 bytes or so of a rank's file, whatever lies there."""
    path = rank_file(copy, 1)
    llava = read_config(mcore)
    step = path.stat().st_size // 40
    for number, offset in enumerate(range(0, path.stat().st_size, step)):
        flip(path, offset, number % 8)
        with pytest.raises(ValueError, match="mp_rank_01") as error:
            load_rank(copy, llava, WHOLE, tp_rank=0, tp_size=1)
        assert "\n" not in str(error.value)
        flip(path, offset, number % 8)
    load_rank(copy, llava, WHOLE, tp_rank=0, tp_size=1)


def test_a_changed_manifest(mcore, copy):
    path = copy / "release" / manifest.FILE
    size = path.stat().st_size
    for offset in range(10, size, size // 20):
        flip(path, offset)
        with pytest.raises(ValueError, match=r"manifest.json: damaged or changed"):
            open_mcore(copy, read_config(mcore))
        flip(path, offset)
    open_mcore(copy, read_config(mcore))


def test_it_can_be_read_unchecked(tmp_path, mcore, copy, hf):
    offset, _ = place(copy, 1, QKV)
    flip(rank_file(copy, 1), offset)
    assert main(exporting(copy, tmp_path / "hf", no_check="true")) == 0
    found, before = HfReader(tmp_path / "hf"), HfReader(hf)
    differing = [name for name in before if not torch.equal(found[name], before[name])]
    assert differing == ["language_model.model.layers.1.self_attn.q_proj.weight"]


def test_a_manifest_that_lacks_a_field_or_is_a_folder(mcore, copy):
    path = copy / "release" / manifest.FILE
    content = manifest.load(mcore / "release")
    del content["ranks"]["mp_rank_00"]["size"]
    path.write_text(json.dumps({**content, "sha256": manifest._digest(content)}))
    with pytest.raises(ValueError, match=r"manifest.json: damaged or changed .*'size'"):
        open_mcore(copy, read_config(mcore))
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"manifest.json: damaged or changed .*Is a directory"):
        open_mcore(copy, read_config(mcore))


def test_without_a_manifest_it_is_read_unchecked(tmp_path, copy, hf):
    (copy / "release" / manifest.FILE).unlink()
    assert main(exporting(copy, tmp_path / "hf")) == 0
    assert files(tmp_path / "hf") == files(hf)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("length", ["0", "1", "half", "all but one byte"])
def test_a_truncated_shard(tmp_path, capsys, copy, length, with_manifest):
    path = rank_file(copy, 1)
    size = path.stat().st_size
    os.truncate(path, {"0": 0, "1": 1, "half": size // 2, "all but one byte": size - 1}[length])
    if not with_manifest:
        (copy / "release" / manifest.FILE).unlink()
    refused(capsys, exporting(copy, tmp_path / "hf"), path, "not a file of tensors")


@pytest.mark.parametrize("name", [QKV, EMBEDDING])
def test_a_zeroed_page(tmp_path, capsys, copy, name):
    offset, _ = place(copy, 0, name)
    change(rank_file(copy, 0), offset + 4096, lambda data: bytes(len(data)), 4096)
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 0), name, "sha256 differs")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_shard(tmp_path, capsys, copy, rank):
    shutil.rmtree(rank_file(copy, rank).parent)
    refused(capsys, exporting(copy, tmp_path / "hf"), f"mp_rank_0{rank}: missing")


def test_swapped_shards(tmp_path, capsys, copy):
    """Equal shapes: nothing but the manifest tells them apart."""
    first, second = rank_file(copy, 0), rank_file(copy, 1)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    refused(capsys, exporting(copy, tmp_path / "hf"), "mp_rank_0", ": language_model.", "sha256 differs")


def test_a_shard_of_another_checkpoint(tmp_path, capsys, mistral, clip, copy):
    """Same model, same sizes, other weights in the projector alone."""
    assert main(importing(mistral, clip, tmp_path / "other", seed=5)) == 0
    shutil.copyfile(rank_file(tmp_path / "other", 1), rank_file(copy, 1))
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 1), "vision_projection.", "sha256 differs")


def test_a_shard_of_another_type(tmp_path, capsys, mistral, clip, copy):
    assert main(importing(mistral, clip, tmp_path / "other", precision="bf16")) == 0
    shutil.copyfile(rank_file(tmp_path / "other", 1), rank_file(copy, 1))
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 1), "not a file of tensors as it was written")
    (copy / "release" / manifest.FILE).unlink()
    refused(capsys, exporting(copy, tmp_path / "hf"), rank_file(copy, 1), "bfloat16", "rank 0's is float32")


def test_the_manifest_says_what_is_where(mcore, mistral):
    content = manifest.load(mcore / "release")
    assert content["tensor_model_parallel_size"] == 2
    # A CUDA build's name ends with "+cu130" in torch itself and not in what pip knows of it.
    assert content["tools"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert [source["file"].split("/")[-1] for source in content["source"]] == ["model.safetensors"] * 2
    assert (mistral / "model.safetensors").stat().st_size in [source["size"] for source in content["source"]]
    tensor = content["ranks"]["mp_rank_01"]["tensors"]["language_model.decoder.layers.3.mlp.linear_fc1.weight"]
    assert tensor["whole"] == "language_model.decoder.layers.3.mlp.linear_fc1.weight"
    assert (tensor["axis"], tensor["ranges"], tensor["rows"]) == (0, [[80, 160], [240, 320]], [80, 80])
    assert json.loads((mcore / "release" / manifest.FILE).read_text())["sha256"]
