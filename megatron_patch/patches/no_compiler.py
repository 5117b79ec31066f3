"""What megatron.core 0.16.1 needs where there is a CUDA device and no C compiler. Line numbers are the wheel's."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

from megatron_patch.patches import Repair

logger = logging.getLogger(__name__)


def can_compile() -> bool:
    """Whether Triton can build what starts its kernels: with $CC, else gcc or clang, and Python's headers.

    Source: `_build` in triton/runtime/build.py, of Triton 3.
    """
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    scheme = sysconfig.get_default_scheme()
    # Debian's own names no folder that has headers.
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return any(shutil.which(compiler) for compiler in compilers) and Path(headers, "Python.h").is_file()


def no_compilation_without_a_compiler(jit: ModuleType) -> None:
    """Small functions are not compiled: the first step would end in Triton's "Failed to find C compiler".

    jit.py:26 hands them to torch.compile, among them the vision tower's quick GELU (activations.py:14). Needless where
    a compiler and Python's headers are installed.
    """
    jit.disable_jit_fuser()
    logger.info(
        "no C compiler ($CC, gcc, clang) or no Python.h on this machine: activation functions run unfused, each as "
        "several passes over memory; install gcc and python3-dev to have them compiled"
    )


REPAIRS = (Repair("megatron.core.jit", no_compilation_without_a_compiler),)
