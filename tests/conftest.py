"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch.config import Parallel
from tests.tiny import save_clip, save_mcore, save_mistral
from toolkits.model_checkpoints_convertor.convert import main as convert


@pytest.fixture(scope="session")
def mistral(tmp_path_factory) -> Path:
    """A tiny Mistral, fp32."""
    return save_mistral(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP tower, fp32."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def mcore(tmp_path_factory, mistral, clip) -> Path:
    """Both as one Megatron-Core checkpoint: TP2, fp32."""
    return save_mcore(tmp_path_factory.mktemp("mcore"), mistral, clip)


@pytest.fixture(scope="session")
def hf(tmp_path_factory, mcore) -> Path:
    """The same model as a LlavaForConditionalGeneration, fp32."""
    target = tmp_path_factory.mktemp("hf") / "llava"
    flags = {
        "--mg2hf": "true",
        "--source-llm-ckpt-path": mcore,
        "--target-ckpt-path": target,
        "--precision": "fp32",
    }
    assert convert([str(word) for pair in flags.items() for word in pair]) == 0
    return target


@pytest.fixture
def one_process(tmp_path):
    """megatron.core's groups, for this process alone."""
    from tests.distributed import ranks

    ranks.parallel.start(Parallel(), seed=1, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    ranks.stop()
