"""A package that is missing, broken or of another release costs one line, never a crash."""

from __future__ import annotations

import ctypes.util
import importlib.util
import re
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from peerd.compute.errors import UnusablePackageError
from peerd.compute.llamacpp import library
from peerd.compute.llamacpp.library import PACKAGE, load_library
from peerd.compute.llamacpp.structs import CONTEXT_DEFAULTS
from tests.compute.llamacpp.conftest import needs_llamacpp

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Let the package be a folder with one file: `content`, or a link to another library."""

    def put(name: str, content: bytes | Path) -> None:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / name).symlink_to(content)
        found = ModuleSpec(PACKAGE, None)
        found.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)

    load_library.cache_clear()
    yield put
    load_library.cache_clear()


def refusal() -> str:
    with pytest.raises(UnusablePackageError) as refused:
        load_library()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_missing_package_is_named_with_the_way_to_install_it(install: Install, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert refusal() == "the package xllamacpp is not installed: run `pip install peerd[llamacpp]`"


@pytest.mark.parametrize("name", ["xllamacpp.abi3.so", "xllamacpp.dylib", "xllamacpp.pyd", "llama.dll"])
def test_a_file_that_is_no_library_of_this_machine_is_refused(install: Install, name: str):
    install(name, b"not a library")
    assert re.search(r"does not work here: .*--engine torch", refusal())


def test_a_library_without_llama_cpps_functions_is_refused(install: Install):
    """As on Windows, where a module exports nothing but itself."""
    other = ctypes.CDLL(ctypes.util.find_library("m"))._name
    paths = [Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if other in line]
    install("xllamacpp.abi3.so", paths[0])
    assert "undefined symbol: llama_" in refusal()


def test_a_package_without_a_library_is_as_good_as_missing(install: Install):
    install("__init__.py", b"")
    assert "is not installed" in refusal()


@needs_llamacpp
def test_a_library_whose_parameters_lie_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch):
    load_library.cache_clear()
    monkeypatch.setattr(library, "CONTEXT_DEFAULTS", {**CONTEXT_DEFAULTS, "n_batch": 512})
    assert "laid out in a way that peerd does not know (n_batch)" in refusal()
    load_library.cache_clear()


@needs_llamacpp
def test_the_installed_library_is_one_that_is_known():
    found = load_library()
    assert found.unknown_fields() == []
    assert " = 1" in found.instructions
