"""Fixtures that several folders of tests share, and which tests see a GPU. Imports no torch: see pytest_configure."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from megatron_patch.config.train import Parallel

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from tests and their processes, unless it is asked for: by `-m gpu`, or by a path in tests/gpu.

    The other tests compare what the CPU computes, on every machine. torch must not be there yet, which may ask once.
    """
    paths = (config.invocation_params.dir / argument.split("::")[0] for argument in config.args)
    if config.option.markexpr != "gpu" and not any(path.resolve().is_relative_to(GPU_TESTS) for path in paths):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection() -> None:
    """Import what the tests import with the collector off, as `files.terminal.loading` does."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What was imported stays."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/gpu, before marks are looked at."""
    for item in items:
        if item.path.is_relative_to(GPU_TESTS):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def mistral(tmp_path_factory) -> Path:
    """A tiny Mistral, fp32."""
    from tests.tiny import save_mistral

    return save_mistral(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP tower, fp32."""
    from tests.tiny import save_clip

    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def mcore(tmp_path_factory, mistral, clip) -> Path:
    """Both as one Megatron-Core checkpoint: TP2, fp32."""
    from tests.tiny import save_mcore

    return save_mcore(tmp_path_factory.mktemp("mcore"), mistral, clip)


@pytest.fixture(scope="session")
def mcore_siglip(tmp_path_factory, mistral) -> Path:
    """The same language model with a tiny SigLIP."""
    from tests.tiny import save_mcore, save_siglip

    folder = tmp_path_factory.mktemp("siglip")
    return save_mcore(folder, mistral, save_siglip(folder / "tower"))


@pytest.fixture(scope="session")
def hf(tmp_path_factory, mcore) -> Path:
    """The same model as a LlavaForConditionalGeneration, fp32."""
    from megatron_patch.conversion.commands import main as convert

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

    ranks.groups.start(Parallel(), seed=1, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    ranks.stop()
