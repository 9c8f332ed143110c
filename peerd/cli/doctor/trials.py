"""Computes a real product with each package that may be broken, in a process of its own: `python -m` this file NAME.

A broken driver, library or kernel may crash the interpreter or hang it. So the doctor starts this file as a program,
with a deadline. It writes one JSON object as its last line: what worked (`said`), or what did not (`problem`) and what
to do (`fix`). `needed` is whether nothing can be served without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

# Large enough that a GPU runs its real kernels.
_SIZE = 256
_FIX_TORCH = "install torch again, in a build for this machine; see docs/operators.md"


class TrialFailed(Exception):
    """Something does not work; `fix` says what to do."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


def try_device() -> str:
    """Multiply matrices with torch on the CPU, and on each GPU."""
    import torch

    from peerd.compute.device.measurements import device_name
    from peerd.compute.device.sizes import format_size

    said = []
    for name in ("cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))):
        device = torch.device(name)
        try:
            left = torch.ones(_SIZE, _SIZE, device=device)
            good = bool(((left @ left) == _SIZE).all())
        except RuntimeError as error:
            raise TrialFailed(f"{name} does not compute: {error}", _fix_device(name)) from error
        if not good:
            raise TrialFailed(f"{name} computes wrong products", _fix_device(name))
        memory = ""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            memory = f", {format_size(free)} of {format_size(total)} free"
        said.append(f"{name} is {device_name(device)}{memory}")
    cuda = f" for CUDA {torch.version.cuda}, driver {_driver()}" if torch.cuda.device_count() else ""
    return f"torch {torch.__version__}{cuda}: {'; '.join(said)}"


def _fix_device(name: str) -> str:
    return _FIX_TORCH if name == "cpu" else "see what nvidia-smi says; install the driver again, or leave out --device"


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def try_triton() -> str:
    """Multiply by an int8 matrix with our own kernel on the first GPU, and compare with torch."""
    import torch

    from peerd.compute.device.has_triton import has_kernel

    if not torch.cuda.is_available():
        return "not needed: there is no GPU here"
    fix = "run: pip install --force-reinstall triton; without it a GPU computes slower"
    if not has_kernel():
        raise TrialFailed("triton is missing or broken", fix)
    try:
        is_right = kernel_is_right("cuda")
    except Exception as error:  # It compiles C and loads what it made: what fails there has no common class.
        raise TrialFailed(
            f"a kernel of triton cannot be run: {error}", f"install a C compiler (gcc), or {fix}"
        ) from error
    if not is_right:
        raise TrialFailed("a kernel of triton computes wrong products", fix)
    import triton

    return f"triton {triton.__version__} multiplies"


def kernel_is_right(device: str) -> bool:
    """Whether our kernel's product with an int8 matrix is torch's own."""
    import torch

    from peerd.compute.quantized.kernel import int8_product

    rows = torch.arange(_SIZE, device=device)
    values = ((rows[:, None] * 7 + rows) % 255 - 127).to(torch.int8)
    scales = torch.full((_SIZE,), 127.0, device=device)
    x = torch.linspace(-1, 1, 4 * _SIZE, device=device).reshape(4, _SIZE)
    return torch.allclose(int8_product(x, values, scales, _SIZE), x @ values.float().t(), rtol=1e-3, atol=0.5)


def try_bitsandbytes() -> str:
    """Quantize to nf4 and back, on the first GPU or on the CPU."""
    import torch

    from peerd.compute.errors import UnusablePackageError
    from peerd.compute.quantized.bitsandbytes_import import check_bitsandbytes, load_bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_bitsandbytes(device)
    except UnusablePackageError as error:
        problem, _, fix = str(error).partition(". Mend it with ")
        raise TrialFailed(problem, f"run: {fix}") from error
    return f"bitsandbytes {load_bitsandbytes().__version__} quantizes on {device}"


def try_llamacpp() -> str:
    """Compute a tiny block with llama.cpp, and compare with torch."""
    from peerd.compute.errors import CheckpointError
    from peerd.compute.llamacpp.library import PACKAGE, is_installed, package_version
    from peerd.compute.llamacpp.trial import check_llamacpp

    if not is_installed():
        return f"not installed: torch computes GGUF files too; pip install 'peerd[llamacpp]' adds {PACKAGE}"
    fix = "run: pip install --force-reinstall 'peerd[llamacpp]'; without it torch computes GGUF files"
    try:
        check_llamacpp()
    except (CheckpointError, MemoryError) as error:
        raise TrialFailed(f"llama.cpp does not compute right here: {error}", fix) from error
    return f"{PACKAGE} {package_version()} computes a block as torch does"


TRIALS: dict[str, Callable[[], str]] = {
    "device": try_device,
    "triton": try_triton,
    "bitsandbytes": try_bitsandbytes,
    "llamacpp": try_llamacpp,
}


def result_of(trial: Callable[[], str]) -> dict[str, Any]:
    """How a trial ended, as what this program writes."""
    try:
        return {"said": trial()}
    except TrialFailed as error:
        return {"problem": str(error), "fix": error.fix}
    except ImportError as error:
        return {"problem": f"cannot import {error.name or 'a package'}: {error}", "fix": _FIX_TORCH}
    except Exception as error:  # Compiled packages fail in ways that have no common class; the doctor names them all.
        return {"problem": f"{type(error).__name__}: {error}", "fix": _FIX_TORCH}


def main() -> None:
    """Run one trial, and write its result."""
    # What packages print belongs to their logs.
    with redirect_stdout(sys.stderr):
        result = result_of(TRIALS[sys.argv[1]])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
