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

from peerd.compute.errors import UnusablePackageError

# A server loads its spans one after the other in one thread, so no other import runs while the name is hidden.
_HIDDEN = "kernels"
_COMPLAINS = "bitsandbytes.backends.cpu.ops"


@cache
def load_bitsandbytes() -> ModuleType:
    """The package. Raises UnusablePackageError where it is not installed, or its import fails."""
    logger = logging.getLogger(_COMPLAINS)
    was_disabled, was_there = logger.disabled, sys.modules.get(_HIDDEN)
    logger.disabled = True
    # None here makes an import of the package fail, whether it is installed or not.
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # It loads a library of the driver's: what fails there has no common class.
        raise _unusable(error) from error
    finally:
        logger.disabled = was_disabled
        del sys.modules[_HIDDEN]
        if was_there is not None:
            sys.modules[_HIDDEN] = was_there


@cache
def check_bitsandbytes(device: str) -> None:
    """Quantize a few values to nf4 on the device, and back. Raises UnusablePackageError where that cannot be done.

    A broken bitsandbytes may be imported without a word, and fail where it is first used.
    """
    import torch

    load_bitsandbytes()
    values = torch.linspace(-1, 1, 64, device=device)
    try:
        packed, largest = torch.ops.bitsandbytes.quantize_4bit(values, 64, "nf4", torch.uint8)
        again = torch.ops.bitsandbytes.dequantize_4bit(packed, largest, 64, "nf4", [64], torch.float32)
    except (RuntimeError, NotImplementedError, OSError, AttributeError) as error:
        raise _unusable(error) from error
    # The steps between nf4's levels are at most 0.304 (from -1 to -0.696).
    if not torch.allclose(again, values, rtol=0, atol=0.16):
        raise _unusable(RuntimeError("it returned other values than it was given"))


def _unusable(error: Exception) -> UnusablePackageError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UnusablePackageError(
        f"nf4 needs the package bitsandbytes, which does not work here: {reason}. Mend it with "
        "`pip install --force-reinstall --no-deps bitsandbytes`, or serve with --quantize int8, which does not need it"
    )
