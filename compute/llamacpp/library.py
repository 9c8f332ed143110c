"""Finds llama.cpp in the package `xllamacpp`, and declares the functions of it that we call.

The package is not imported: its module is a shared library that also exports llama.cpp's C interface, which is all we
need, and importing it would start more than that. Whether the library is one that we know is checked before anything
of it is used (`structs.py`). What llama.cpp logs is kept from the terminal, but for its last errors, which a message
of ours may quote.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from ctypes import c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peerd.compute.errors import UnusablePackageError
from peerd.compute.llamacpp.structs import (
    CONTEXT_DEFAULTS,
    MODEL_DEFAULTS,
    Batch,
    ContextParams,
    LogCallback,
    ModelParams,
    differences,
)

PACKAGE = "xllamacpp"
log = logging.getLogger(__name__)
# `enum ggml_log_level`: an error, and the continuation of the line before.
_ERROR, _CONTINUES = 4, 5
_KEPT_LINES = 4
_SUFFIXES = (".so", ".dylib", ".pyd", ".dll")

_Declared = tuple[Any, Sequence[Any]]
_FUNCTIONS: dict[str, _Declared] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_n_embd": (c_int32, (c_void_p,)),
    "llama_model_n_layer": (c_int32, (c_void_p,)),
    "llama_context_default_params": (ContextParams, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_memory_seq_cp": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
}
# These are called hundreds of times in each batch, and return at once: they keep the interpreter's lock.
_QUICK_FUNCTIONS: dict[str, _Declared] = {
    "ggml_get_name": (c_char_p, (c_void_p,)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
}


class LlamaLibrary:
    """llama.cpp's functions, as attributes of `calls` and, for those that return at once, of `quick`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the library cannot be loaded, AttributeError if it lacks a function."""
        self.calls = _declare(ctypes.CDLL(str(path)), _FUNCTIONS)
        self.quick = _declare(ctypes.PyDLL(str(path)), _QUICK_FUNCTIONS)
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._last_level = 0
        # The library calls this as long as the process lives.
        self._log = LogCallback(self._note)
        self.calls.llama_log_set(self._log, None)

    def start(self) -> None:
        """Prepare the library for models."""
        self.calls.llama_backend_init()

    def unknown_fields(self) -> list[str]:
        """Names of parameters that are not where we would write them; empty if the library is one that we know."""
        model, context = self.calls.llama_model_default_params(), self.calls.llama_context_default_params()
        return differences(model, MODEL_DEFAULTS) + differences(context, CONTEXT_DEFAULTS)

    @property
    def instructions(self) -> str:
        """The instructions of the CPU that the library was built for, as it says, such as "AVX2 = 1 | FMA = 1"."""
        said: bytes = self.calls.llama_print_system_info()
        return said.decode(errors="replace").strip(" |")

    def last_errors(self) -> str:
        """What the library logged of its last failures, in one line; empty if nothing."""
        said = " ".join("".join(self._errors).split())
        self._errors.clear()
        return said

    def _note(self, level: int, text: bytes, _: object) -> None:
        if level != _CONTINUES:
            self._last_level = level
        if self._last_level == _ERROR:
            self._errors.append(text.decode(errors="replace"))


def _declare(library: Any, functions: dict[str, _Declared]) -> Any:
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
    return library


def is_installed() -> bool:
    """Whether the package is there, working or not."""
    return importlib.util.find_spec(PACKAGE) is not None


@cache
def load_library() -> LlamaLibrary:
    """The library, ready for models. Raises UnusablePackageError, with one line for the operator."""
    path = next(_candidates(), None)
    if path is None:
        raise UnusablePackageError(f"the package {PACKAGE} is not installed: run `pip install peerd[llamacpp]`")
    # If llama.cpp finds a bug of its own, it ends the process. Before that it would start a debugger, if there is one.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        library = LlamaLibrary(path)
    except (OSError, AttributeError) as error:
        raise _unusable(" ".join(str(error).split())) from error
    if unknown := library.unknown_fields():
        raise _unusable(f"its parameters are laid out in a way that peerd does not know ({', '.join(unknown[:3])})")
    library.start()
    return library


@cache
def is_usable() -> bool:
    """Whether llama.cpp can be used. If it is installed and cannot, the log says why, once."""
    if not is_installed():
        return False
    try:
        load_library()
    except UnusablePackageError as error:
        log.warning("%s. Until then torch computes", error)
        return False
    return True


def package_version() -> str:
    """The package's version; "unknown" if it does not say."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def _candidates() -> Iterator[Path]:
    """The package's shared libraries. A package without any is as good as not installed."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        yield from sorted(path for path in Path(folder).iterdir() if path.suffix in _SUFFIXES)


def _unusable(reason: str) -> UnusablePackageError:
    return UnusablePackageError(
        f"llama.cpp cannot be used: {PACKAGE} {package_version()} does not work here: {reason}. Install the release"
        " that peerd was tested with, `pip install --force-reinstall peerd[llamacpp]`, or serve with --engine torch"
    )
