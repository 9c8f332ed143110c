"""If Triton or bitsandbytes is missing or broken, peerd starts anyway, and names what it cannot do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peerd.compute.device import has_triton
from peerd.compute.errors import UnusablePackageError
from peerd.compute.families.lookup import FAMILIES
from peerd.compute.quantized import bitsandbytes_import
from tests.compute.tiny_families import tiny_model

REASON = "libcudart.so.99: cannot open shared object file"
BROKEN = f"raise ImportError({REASON!r})\n"

# Python runs a `sitecustomize.py` on its path before anything else, in child processes too.
MISSING = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in NAMES else found(name, path, target)

PathFinder.find_spec = find_spec
"""

SERVE = """
import sys
import trio
import peerd

async def main():
    spec = peerd.ServeSpec(sys.argv[1], peerd.Span(2, 4), kv_tokens=256, throughput=1.0)
    async with peerd.open_peer(serve=[spec]) as peer:
        print("serves", *[served.span for served in peer.served])

trio.run(main)
assert "bitsandbytes" not in sys.modules
from peerd.cli.main import cli
cli(["--serve-blocks", "2:4", "--model", sys.argv[1], "--quantize", "nf4", "--identity", sys.argv[2]])
"""


def environment(folder: Path, *, missing: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> dict[str, str]:
    """For a process in which some packages are missing and others cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"NAMES = {missing}\n{MISSING}")
    for package in broken:
        (folder / f"{package}.py").write_text(BROKEN)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_the_command_says_its_help_without_any_optional_package(how: str, tmp_path: Path) -> None:
    away = environment(tmp_path, **{how: ("bitsandbytes", "torch", "transformers", "triton")})
    for package in ("bitsandbytes", "torch"):
        assert python(away, "-c", f"import {package}").returncode == 1, "the test would prove nothing"
    done = python(away, "-m", "peerd", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: peerd" in done.stdout


@pytest.mark.slow
@pytest.mark.processes
def test_blocks_are_served_without_and_only_nf4_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny_model(FAMILIES["llama"]).save_pretrained(tmp_path / "model")
    away = environment(tmp_path, missing=("triton",), broken=("bitsandbytes",))
    done = python(away, "-c", SERVE, str(tmp_path / "model"), str(tmp_path / "identity.key"))
    assert done.stdout == "serves 2:4\n", done.stderr
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"Error: nf4 needs the package bitsandbytes, which does not work here: {REASON}. ")
    assert "serve with --quantize int8" in line


def test_nf4_without_bitsandbytes_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnusablePackageError, match=r"pip install .* bitsandbytes"):
        bitsandbytes_import.load_bitsandbytes.__wrapped__()


def test_a_bitsandbytes_that_imports_and_fails_at_its_first_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def quantize_4bit(self, *_: object) -> None:
            raise RuntimeError("no kernel image is available\nTraceback of the driver")

    bitsandbytes_import.load_bitsandbytes()
    monkeypatch.setattr(torch.ops, "bitsandbytes", Broken())
    with pytest.raises(UnusablePackageError, match=r"does not work here: no kernel image is available\. Mend"):
        bitsandbytes_import.check_bitsandbytes.__wrapped__("cpu")


def test_a_sound_bitsandbytes_passes() -> None:
    bitsandbytes_import.check_bitsandbytes.__wrapped__("cpu")


def test_a_gpu_computes_without_kernels_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not has_triton.has_kernel.__wrapped__()


def test_a_broken_triton_is_reported_and_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "triton.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    with caplog.at_level(logging.WARNING):
        assert not has_triton.has_kernel.__wrapped__()
    assert f"triton cannot be imported ({REASON})" in caplog.text
