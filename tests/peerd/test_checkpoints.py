"""Opening a model says, once, that the installed Transformers was not tested with this peerd."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from peerd.checkpoints import Checkpoints
from peerd.compute import transformers_compat
from peerd.compute.checkpoint.hub.settings import HubSettings


@pytest.mark.real_time
async def test_an_untested_release_is_said_once_a_peer(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers_compat, "version", lambda _: "5.99.0")
    checkpoints = Checkpoints(HubSettings())
    with caplog.at_level(logging.WARNING, "peerd.checkpoints"):
        for _ in range(2):
            async with checkpoints.open(tiny_llama):
                pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "5.99.0 was not tested" in caplog.text
