"""`peerd generate --wait`: it says what a model lacks, and begins by itself when it is there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from peerd.cli.generate import LOOK_S, Request, answer, until_served
from peerd.protocol.errors import NoChain
from peerd.protocol.span import Span

BLOCKS = 43
ASKED = Request("Hello", False, {}, waits=True)


class Swarm:
    """Peers that announce spans of one model. `gone`: those that we found dead."""

    def __init__(self, *spans: Span) -> None:
        self.spans = list(spans)
        self.gone: set[str] = set()
        self.discovery = SimpleNamespace(directory=self)

    async def servers(self, _digest: bytes, _block_count: int, *, max_age_s: float) -> list[Any]:
        await trio.lowlevel.checkpoint()
        online = SimpleNamespace(state="online")
        return [SimpleNamespace(peer_id=str(span), span=span, record=online) for span in self.spans]


class Generation:
    """An answer of these words. A word that is an error is raised in its place."""

    def __init__(self, *words: str | Exception) -> None:
        self._words = words
        self.token_ids: list[int] = []

    async def tokens(self) -> AsyncIterator[Any]:
        for number, word in enumerate(self._words):
            await trio.lowlevel.checkpoint()
            if isinstance(word, Exception):
                raise word
            self.token_ids.append(number)
            yield SimpleNamespace(text=word)


def model_of(swarm: Swarm, *generations: Generation) -> Any:
    given = iter(generations)
    return SimpleNamespace(
        facts=SimpleNamespace(name="smol", digest=b"", block_count=BLOCKS),
        unreachable=lambda: frozenset(swarm.gone),
        generate=lambda *_arguments, **_options: next(given),
    )


def waiting(swarm: Swarm, model: Any) -> Callable[[], Any]:
    return partial(until_served, cast(Any, swarm), model)


async def test_it_says_which_blocks_are_missing_and_begins_when_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    swarm = Swarm(Span(0, 40))
    model = model_of(swarm, Generation("Hi", " you"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(answer, model, ASKED, quiet=False, until_served=waiting(swarm, model)))
        await trio.sleep(5 * LOOK_S)
        assert capsys.readouterr() == ("", "smol needs 3 more blocks: 40-42; waiting for servers\n")
        swarm.spans.append(Span(40, 42))
        await trio.sleep(2 * LOOK_S)
        assert capsys.readouterr() == ("", "smol needs 1 more block: 42; waiting for servers\n")
        swarm.spans.append(Span(30, 43))
    assert capsys.readouterr() == ("Hi you\n", "")


async def test_peers_that_announce_blocks_and_cannot_be_reached_are_waited_for_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    swarm = Swarm(Span(0, BLOCKS))
    model = model_of(swarm, Generation(NoChain("gone", ((0, BLOCKS),))), Generation("Hi"))
    await answer(model, ASKED, quiet=False, until_served=waiting(swarm, model))
    assert capsys.readouterr().out == "Hi\n"
    assert trio.current_time() == pytest.approx(LOOK_S)


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    swarm = Swarm(Span(0, BLOCKS))
    model = model_of(swarm, Generation("Hi", NoChain("gone")), Generation("Hello"))
    with pytest.raises(NoChain):
        await answer(model, ASKED, quiet=True, until_served=waiting(swarm, model))


async def test_without_waiting_the_first_failure_ends_it() -> None:
    with pytest.raises(NoChain):
        await answer(model_of(Swarm(), Generation(NoChain("nobody"))), Request("Hello", False, {}), quiet=True)


async def test_an_adapter_of_another_model_is_read_as_the_user_allows_it() -> None:
    read: list[tuple[str, bool]] = []
    given: list[Any] = []

    async def read_adapter(path: str, *, any_base: bool) -> str:
        await trio.lowlevel.checkpoint()
        read.append((path, any_base))
        return "what was read"

    def generate(*_arguments: Any, adapter: Any, **_options: Any) -> Generation:
        given.append(adapter)
        return Generation("Hi")

    model: Any = SimpleNamespace(read_adapter=read_adapter, generate=generate)
    await answer(model, replace(ASKED, adapter="./own", any_base=True), quiet=True)
    await answer(model, replace(ASKED, adapter="./own"), quiet=True)
    assert read == [("./own", True)]
    assert given == ["what was read", "./own"]
