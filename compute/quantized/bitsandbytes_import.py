"""bitsandbytes, imported when it is first needed, and without what it would fetch.

Importing it takes two seconds and some 150 MiB. On CPUs with AVX-512 it also asks the package `kernels`, where that
is installed, to download a compiled kernel and load it: a peer runs no code that came from a model hub, so the
import is kept from seeing that package, and from complaining that it did not.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from types import ModuleType

# Whoever serves loads spans one after the other in a single thread, so nobody else imports while a name is hidden.
_HIDDEN = "kernels"
_COMPLAINS = "bitsandbytes.backends.cpu.ops"


@cache
def load_bitsandbytes() -> ModuleType:
    """The package. Raises ImportError where it is not installed."""
    logger = logging.getLogger(_COMPLAINS)
    was_disabled, was_there = logger.disabled, sys.modules.get(_HIDDEN)
    logger.disabled = True
    # None in its place makes an import of it fail, whether it is installed or not.
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.disabled = was_disabled
        del sys.modules[_HIDDEN]
        if was_there is not None:
            sys.modules[_HIDDEN] = was_there
