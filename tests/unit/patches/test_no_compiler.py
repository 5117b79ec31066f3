"""Where Triton can build what starts its kernels."""

from __future__ import annotations

import sys
import sysconfig

import pytest
import torch

from megatron_patch import patches
from megatron_patch.patches import no_compiler
from megatron_patch.patches.no_compiler import can_compile


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Its folders of programs and of headers: empty."""
    for name in ("bin", "include"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    return tmp_path


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_with_a_compiler_and_pythons_headers(machine, compiler):
    (machine / "include/Python.h").touch()
    assert not can_compile()
    (machine / "bin" / compiler).symlink_to(sys.executable)
    assert can_compile()
    (machine / "include/Python.h").unlink()
    assert not can_compile()


def test_with_the_compiler_that_is_named_alone(machine, monkeypatch):
    (machine / "include/Python.h").touch()
    (machine / "bin/gcc").symlink_to(sys.executable)
    monkeypatch.setenv("CC", "/no/such/compiler")
    assert not can_compile()
    monkeypatch.setenv("CC", sys.executable)
    assert can_compile()


@pytest.mark.parametrize(
    ("gpu", "compiler", "needed"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_needed_with_a_gpu_and_without_a_compiler(monkeypatch, gpu, compiler, needed):
    """The GPU is a mock."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(no_compiler, "can_compile", lambda: compiler)
    assert set(no_compiler.REPAIRS).issubset(patches.needed()) == needed
