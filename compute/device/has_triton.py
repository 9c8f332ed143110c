"""Whether Triton is installed."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def has_kernel() -> bool:
    """Whether Triton is installed: CUDA builds of torch for Linux include it."""
    return importlib.util.find_spec("triton") is not None
