"""Imports bitsandbytes when it is first needed, and prevents the download that this could start.

The import takes two seconds and some 150 MiB. On CPUs with AVX-512 bitsandbytes also asks the package `kernels`, if
that is installed, to download a compiled kernel and load it. A peer runs no code that came from a model hub, so that
package is hidden during the import, and the warning about its absence is suppressed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from types import ModuleType

# A server loads its spans one after the other in one thread, so no other import runs while the name is hidden.
_HIDDEN = "kernels"
_COMPLAINS = "bitsandbytes.backends.cpu.ops"


@cache
def load_bitsandbytes() -> ModuleType:
    """The package. Raises ImportError if it is not installed."""
    logger = logging.getLogger(_COMPLAINS)
    was_disabled, was_there = logger.disabled, sys.modules.get(_HIDDEN)
    logger.disabled = True
    # None here makes an import of the package fail, whether it is installed or not.
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.disabled = was_disabled
        del sys.modules[_HIDDEN]
        if was_there is not None:
            sys.modules[_HIDDEN] = was_there
