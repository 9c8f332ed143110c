"""A daemon asks for the descriptors that it may have."""

from __future__ import annotations

import logging
import resource

import pytest

from peerd.cli.daemon import WANTED_FILES, raise_descriptor_limit


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
