"""A whole run on one GPU, by its script, and again from its checkpoint."""

from __future__ import annotations

import pytest
import torch

from tests.end_to_end.scripts import TRAIN, call, scalars, train_arguments
from tests.unit.data.samples import convert_folder, write_pretrain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m gpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_train_and_resume(mcore, tmp_path, monkeypatch, precision):
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    write_pretrain(tmp_path / "raw", 60)
    convert_folder(tmp_path / "raw")
    arguments = train_arguments(
        tmp_path / "out",
        PR=precision,
        DATASET_PATH=tmp_path / "raw/wds",
        VALID_DATASET_PATH=tmp_path / "raw/wds",
        PRETRAIN_CHECKPOINT_PATH=mcore,
    )
    first = call("sh", TRAIN, *arguments, cwd="/")
    assert first.returncode == 0, first.stdout + first.stderr
    again = call("sh", TRAIN, *arguments, "--train-iters", 6, cwd="/")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "at iteration 4" in again.stdout
    curve = scalars(tmp_path / "out", "lm loss")
    assert sorted(curve) == [1, 2, 3, 4, 5, 6]
    assert curve[6] < curve[1]
    assert scalars(tmp_path / "out", "mem-max-allocated-bytes")[6] > 0
