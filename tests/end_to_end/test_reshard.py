"""Shards of one cut made of shards of another: byte for byte what an import at that cut writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch.conversion.commands import main
from megatron_patch.stores import manifest


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


def test_virtual_and_unequal_stages_as_target_and_source(tmp_path, mistral, clip, mcore):
    virtual = convert(mistral, tmp_path / "virtual", 1, 2, clip, virtual_pipeline_model_parallel_size=2)
    unequal = convert(virtual, tmp_path / "unequal", 2, 2, decoder_last_pipeline_num_layers=1)
    assert manifest.load(virtual / "release")["virtual_pipeline_model_parallel_size"] == 2
    assert shards(convert(unequal, tmp_path / "back", 2, 1)) == shards(mcore)
    assert manifest.read(tmp_path / "back" / "release") == manifest.read(mcore / "release")


def test_torch_dist_as_target_and_source(tmp_path, mistral, clip, mcore, hf):
    """From Hugging Face and from shards the same file; from it the same shards, the same export, and itself again."""
    imported = convert(mistral, tmp_path / "imported", 1, 1, clip, ckpt_format="torch_dist")
    resharded = convert(mcore, tmp_path / "resharded", 1, 1, ckpt_format="torch_dist")
    again = convert(resharded, tmp_path / "again", 1, 1, ckpt_format="torch_dist")
    data = [(folder / "release" / "__0_0.distcp").read_bytes() for folder in (imported, resharded, again)]
    assert data[0] == data[1] == data[2]
    assert shards(convert(resharded, tmp_path / "shards", 2, 1)) == shards(mcore)
    exported = convert(imported, tmp_path / "hf", 1, 1, mg2hf="true")
    assert (exported / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    beside = {path.name for path in mcore.iterdir()}
    assert {path.name for path in imported.iterdir()} == beside


def test_another_type(tmp_path, mistral, clip, mcore):
    imported = convert(mistral, tmp_path / "imported", 1, 1, clip, precision="bf16")
    assert shards(convert(mcore, tmp_path / "ours", 1, 1, precision="bf16")) == shards(imported)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({"tensor-model-parallel-size": 3}, "3 does not divide"),
        ({"tensor-model-parallel-size": 3, "decoder-first-pipeline-num-layers": 1}, "3 does not divide"),
        ({"pipeline-model-parallel-size": 3, "decoder-first-pipeline-num-layers": 3}, "1 are left for 2 of 3 pipeline"),
        ({"pipeline-model-parallel-size": 4, "virtual-pipeline-model-parallel-size": 2}, "a stage has 1 layers"),
    ],
)
def test_a_cut_that_the_model_has_not(tmp_path, capsys, mcore, cut, message):
    flags = {"source-llm-ckpt-path": mcore, "target-ckpt-path": tmp_path / "x", **cut}
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
