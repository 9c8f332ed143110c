"""A daemon asks for the descriptors that it may have, and lets its threads share heaps."""

from __future__ import annotations

import logging
import os
import platform
import resource
import subprocess
import sys

import pytest

from peerd.cli.process_limits import MAX_HEAPS, WANTED_FILES, raise_descriptor_limit


class FakeLimit:
    """Stands for the process's limit of open files; `refuse` fails as a container without the right to raise it."""

    def __init__(self, soft: int, hard: int, *, refuse: bool = False) -> None:
        self.now = (soft, hard)
        self.refuse = refuse

    def get(self, _: int) -> tuple[int, int]:
        return self.now

    def set(self, _: int, limits: tuple[int, int]) -> None:
        if self.refuse:
            raise OSError("Operation not permitted")
        self.now = limits


def limited(monkeypatch: pytest.MonkeyPatch, limit: FakeLimit) -> FakeLimit:
    monkeypatch.setattr(resource, "getrlimit", limit.get)
    monkeypatch.setattr(resource, "setrlimit", limit.set)
    return limit


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (1024, 2**20, WANTED_FILES),
        (1024, 4096, 4096),
        (1024, resource.RLIM_INFINITY, WANTED_FILES),
        (2**16, 2**20, 2**16),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_is_useful(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, soft: int, hard: int, raised: int
) -> None:
    limit = limited(monkeypatch, FakeLimit(soft, hard))
    raise_descriptor_limit()
    assert limit.now == (raised, hard)
    assert caplog.text == ""


def test_an_operator_hears_how_many_peers_a_low_hard_limit_allows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, FakeLimit(256, 512))
    raise_descriptor_limit()
    assert "may have 512 files open, so at most 320 peers" in caplog.text


def test_a_limit_that_cannot_be_raised_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    limit = limited(monkeypatch, FakeLimit(1024, 4096, refuse=True))
    raise_descriptor_limit()
    assert limit.now == (1024, 4096)
    assert "cannot raise the limit of open files from 1024 to 4096" in caplog.text


# Sixteen threads that hold memory at the same time, and then how many heaps there are.
THREADS_THAT_ALLOCATE = """
import ctypes, sys, tempfile, threading
from peerd.cli.process_limits import share_heaps

share_heaps()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(16)


def hold():
    libc.malloc(1000)
    together.wait()


threads = [threading.Thread(target=hold) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap "))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other heaps")
@pytest.mark.parametrize(("environ", "shared"), [({}, True), ({"MALLOC_ARENA_MAX": "16"}, False)], ids=["", "as asked"])
def test_the_threads_of_a_daemon_share_heaps_unless_its_owner_wants_others(
    environ: dict[str, str], shared: bool
) -> None:
    command = [sys.executable, "-c", THREADS_THAT_ALLOCATE]
    environ = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | environ
    heaps = int(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)
    assert (heaps <= MAX_HEAPS) is shared
