"""Whether Triton is installed and can be imported."""

from __future__ import annotations

import importlib
import logging
from functools import cache

log = logging.getLogger(__name__)


@cache
def has_kernel() -> bool:
    """Whether kernels can be written in Triton here: CUDA builds of torch for Linux include it.

    Everything that kernels compute is computed without them where it is missing or broken, only slower.
    """
    try:
        importlib.import_module("triton")
        importlib.import_module("triton.language")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return False
        return _broken(error)
    except Exception as error:  # It loads compiled parts of its own: what fails there has no common class.
        return _broken(error)
    return True


def _broken(error: Exception) -> bool:
    log.warning("the package triton cannot be imported (%s): this GPU computes without its kernels, slower", error)
    return False
