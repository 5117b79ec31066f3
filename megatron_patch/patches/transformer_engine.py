"""A Transformer Engine that is installed and cannot be imported is hidden from megatron.core 0.16.1.

Some 30 of its modules try `import transformer_engine` and take an ImportError for none. But one that was installed
without its part for torch raises FileNotFoundError (transformer_engine/common/__init__.py, 2.9 to 2.18), one whose
parts are of two versions AssertionError, one without its CUDA libraries OSError: megatron.core itself cannot be
imported then. Needless when it expects these too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys

logger = logging.getLogger(__name__)

NAME = "transformer_engine"


@functools.cache
def transformer_engine_fault() -> str | None:
    """Why Transformer Engine cannot be used; None: it can. Hides one that cannot be imported, with one log line."""
    if importlib.util.find_spec(NAME) is None:
        return "transformer-engine[pytorch] is not installed"
    try:
        importlib.import_module(f"{NAME}.pytorch")
    except Exception as error:  # of a library that loads others: whatever it is
        sys.modules[NAME] = None  # type: ignore[assignment]  # import's own word for a package that is not there
        reason = (str(error).splitlines() or [""])[0]
        fault = f"transformer-engine is installed and cannot be imported ({type(error).__name__}: {reason})"
        logger.warning(f"{fault}: as if it were not installed")
        return fault
    return None
