"""Shards of one cut made of shards of another: byte for byte what an import at that cut writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch.checkpoint import manifest
from toolkits.model_checkpoints_convertor.convert import main


def convert(source: Path, target: Path, tp_size: int, pp_size: int, clip: Path | None = None, **flags: object) -> Path:
    given = {
        "source_llm_ckpt_path": source,
        "source_clip_ckpt_path": clip or "none",
        "target_ckpt_path": target,
        "tensor_model_parallel_size": tp_size,
        "pipeline_model_parallel_size": pp_size,
        "precision": "fp32",
        **flags,
    }
    assert main([f"--{name.replace('_', '-')}={value}" for name, value in given.items()]) == 0
    return target


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.pt")}


@pytest.mark.parametrize("cut", [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_any_cut_to_any_other(tmp_path, mistral, clip, mcore, cut):
    """TP2 -> the cut -> TP2, both times equal to an import, manifest's digests included."""
    imported = convert(mistral, tmp_path / "imported", *cut, clip)
    there = convert(mcore, tmp_path / "there", *cut)
    back = convert(there, tmp_path / "back", 2, 1)
    assert shards(there) == shards(imported)
    assert shards(back) == shards(mcore)
    for ours, reference in ((there, imported), (back, mcore)):
        assert manifest.read(ours / "release") == manifest.read(reference / "release")
    beside = {path.name for path in mcore.iterdir()} - {"parity.json"}  # that is of the import
    assert {path.name for path in back.iterdir()} == beside


def test_another_type(tmp_path, mistral, clip, mcore):
    imported = convert(mistral, tmp_path / "imported", 1, 1, clip, precision="bf16")
    assert shards(convert(mcore, tmp_path / "ours", 1, 1, precision="bf16")) == shards(imported)


def test_a_cut_that_the_model_has_not(tmp_path, capsys, mcore):
    flags = {"source-llm-ckpt-path": mcore, "target-ckpt-path": tmp_path / "x", "tensor-model-parallel-size": 3}
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 1
    assert "3 does not divide" in capsys.readouterr().err
