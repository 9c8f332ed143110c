"""A daemon gives each of its models the draft model that is meant for it."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from peerd.api import serve
from peerd.cli.daemon import Offered, _offer
from peerd.protocol.errors import InvalidRequest

pytestmark = pytest.mark.real_time
MODELS = ((None, "org/large"), ("other", "org/larger"))


class Peer:
    """Notes which draft model it is asked to run for which model."""

    def __init__(self) -> None:
        self.drafting_for: list[tuple[str, str, str]] = []

    @asynccontextmanager
    async def model(self, path: str, *, remote_head: bool = False) -> Any:
        facts = SimpleNamespace(name=path.partition("/")[2])
        yield SimpleNamespace(facts=facts, prepare_grammars=trio.lowlevel.checkpoint)

    @asynccontextmanager
    async def drafting(self, model: Any, draft: str, *, device: str) -> Any:
        self.drafting_for.append((model.facts.name, draft, device))
        yield


async def offer(monkeypatch: pytest.MonkeyPatch, models: Any, drafts: Any) -> list[tuple[str, str, str]]:
    @asynccontextmanager
    async def open_nothing(*_: object) -> Any:
        yield

    monkeypatch.setattr(serve, "open_local_api", open_nothing)
    peer = Peer()
    offered = Offered(models, Path("p.sock"), None, None, drafts=drafts, draft_device="cuda:1")
    async with AsyncExitStack() as stack:
        await _offer(stack, cast(Any, peer), offered)
    return peer.drafting_for


async def test_a_draft_without_a_name_is_for_the_only_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await offer(monkeypatch, MODELS[:1], ((None, "org/small"),)) == [("large", "org/small", "cuda:1")]


async def test_drafts_find_models_by_given_names_and_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = (("other", "org/small"), ("large", "org/smaller"))
    assert await offer(monkeypatch, MODELS, drafts) == [
        ("large", "org/smaller", "cuda:1"),
        ("larger", "org/small", "cuda:1"),
    ]
    assert await offer(monkeypatch, MODELS, drafts[:1]) == [("larger", "org/small", "cuda:1")]


async def test_a_draft_for_a_model_that_is_not_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"--draft larger=org/small: there is no model larger; there is large, ot"):
        await offer(monkeypatch, MODELS, (("larger", "org/small"),))
