"""Servers that choose one of the models that the swarm serves, in one process, with tiny models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import trio

import peerd
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.checkpoint.opening import open_checkpoint
from peerd.compute.errors import CheckpointError, DiskFullError
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import PeerId
from peerd.routing.directory.catalogue import NamedModel
from peerd.spans import budget, model_choice
from peerd.spans.model_choice import MAX_KEYS, MAX_LOOKED_UP, ModelChoice, local_models
from peerd.testing.network import MemoryNetwork
from tests.fakes.hub.server import open_hub

if TYPE_CHECKING:
    from peerd.checkpoints import Checkpoints
    from peerd.discovery.discovery import Discovery

pytestmark = pytest.mark.real_time

SPEC = peerd.ServeSpec(kv_tokens=64, throughput=100.0, memory_bytes=2**30)


class Swarm:
    """Peers on a network in memory, the first of them a bootstrap peer."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.bootstrap: tuple[Any, ...] = ()
        self._next = 1

    @asynccontextmanager
    async def peer(self, *specs: peerd.ServeSpec, hub: HubSettings | None = None) -> AsyncIterator[peerd.Peer]:
        host, self._next = f"10.0.0.{self._next}", self._next + 1
        async with peerd.open_peer(
            transport=self.network.transport(host),
            listen=[f"/ip4/{host}/tcp/4000/ws"],
            bootstrap=self.bootstrap,
            serve=specs,
            hub=hub,
        ) as peer:
            self.bootstrap = self.bootstrap or peer.addresses
            yield peer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny models, of four and of six blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for blocks in (4, 6):
        torch.manual_seed(blocks)
        config = LlamaConfig(
            num_hidden_layers=blocks,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
        model: Any = LlamaForCausalLM(config)
        found.append(tmp_path_factory.mktemp("models") / f"tiny-{blocks}")
        model.save_pretrained(found[-1], max_shard_size="20KB")
    return found


def digest_of(path: Path) -> bytes:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.model_digest


async def test_of_models_on_this_machine_the_one_with_a_gap_is_served(models: list[Path]) -> None:
    swarm, (small, large) = Swarm(), models
    async with (
        swarm.peer(),
        swarm.peer(replace(SPEC, model=small, blocks=peerd.Span(0, 4))),
        swarm.peer(replace(SPEC, model=large, blocks=peerd.Span(0, 3))),
        swarm.peer(replace(SPEC, among=(str(small), str(large)), blocks=3)) as server,
    ):
        (served,) = server.served
        assert (served.model, str(served.span)) == (digest_of(large), "3:6")
        # Now the other, which has one server instead of two.
        async with swarm.peer(replace(SPEC, among=(f"{large.parent}/*", f"{small.parent}/*"), blocks=4)) as next_one:
            (served,) = next_one.served
            assert served.model == digest_of(small)


async def test_a_server_waits_for_a_model_that_it_may_serve_and_says_which_there_are(
    models: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(model_choice, "LOOK_S", 0.1)
    swarm, (small, large) = Swarm(), models
    async with (
        swarm.peer(),
        swarm.peer(replace(SPEC, model=large, blocks=peerd.Span(0, 3))),
        trio.open_nursery() as nursery,
    ):
        served = trio.Event()

        async def serve() -> None:
            async with swarm.peer(replace(SPEC, among=(str(small),), blocks=2)):
                served.set()
                await trio.sleep_forever()

        nursery.start_soon(serve)
        while "the swarm has tiny-6, --models allows" not in caplog.text:
            await trio.sleep(0.05)
        await trio.sleep(0.5)
        assert not served.is_set()
        assert caplog.text.count("waiting for a model to serve: the swarm has tiny-6") == 1, "it says so once"
        async with swarm.peer(replace(SPEC, model=small, blocks=peerd.Span(0, 1))):
            await served.wait()
        nursery.cancel_scope.cancel()


async def test_of_the_hub_only_what_a_pattern_allows_and_is_what_was_announced_is_fetched(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    swarm = Swarm()
    with open_hub() as hub:
        for name, path in zip(("good-org/small", "bad-org/large"), models, strict=True):
            hub.push(name, path)
        theirs, ours = (HubSettings(endpoint=hub.url, cache_dir=tmp_path / name) for name in ("theirs", "ours"))
        async with (
            swarm.peer(),
            swarm.peer(replace(SPEC, model="good-org/small", blocks=peerd.Span(0, 4)), hub=theirs),
            swarm.peer(replace(SPEC, model="bad-org/large", blocks=peerd.Span(0, 3)), hub=theirs) as liar,
        ):
            # It needs servers most; and it is called what another model is, of whose commit the hub has other weights.
            assert liar._spans is not None
            names = liar._spans._announcements._names
            (words,) = names.records()
            assert (words.hub_id, words.revision) == ("bad-org/large", hub.repos["bad-org/large"].refs["main"])
            names.add(replace(words, hub_id="good-org/small", revision=hub.repos["good-org/small"].refs["main"]))
            await liar.discovery.wait_announced()
            hub.requests.clear()
            async with swarm.peer(replace(SPEC, among=("good-org/*",), blocks=2), hub=ours) as server:
                (served,) = server.served
                assert served.model == digest_of(models[0])
            assert "the files under this name are not those that were announced" in caplog.text
            assert not [request for request, _ in hub.requests if "bad-org" in request]
            hub.requests.clear()
            # What no pattern allows is not even looked at.
            names.add(words)
            await liar.discovery.wait_announced()
            caplog.set_level("INFO")

            async def serve() -> None:
                async with swarm.peer(replace(SPEC, among=("other-org/*",), blocks=2), hub=ours):
                    raise AssertionError("it served something")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                while "--models allows other-org/*" not in caplog.text:
                    await trio.sleep(0.05)
                nursery.cancel_scope.cancel()
            assert hub.requests == []


def test_paths_among_the_patterns_name_models(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "no-model").mkdir()
    (tmp_path / "one.gguf").touch()
    assert local_models(f"{tmp_path}/*") == [tmp_path / "one.gguf"]
    assert local_models(str(models[0])) == [models[0]]
    assert local_models("org/*") == []


async def test_as_many_blocks_are_served_as_downloads_may_take(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    with open_hub() as hub:
        hub.push("org/large", models[1])
        everything = sum(len(data) for data in next(iter(hub.repos["org/large"].commits.values())).values())
        settings = HubSettings(endpoint=hub.url, cache_dir=tmp_path / "cache", disk_bytes=everything * 2 // 3)
        async with Swarm().peer(replace(SPEC, model="org/large"), hub=settings) as server:
            (served,) = server.served
            assert 1 <= len(served.span) < 6
            assert sum(hub.served.values()) <= everything * 2 // 3
            # What is asked for by number is asked for: it says what does not fit.
            with pytest.raises(DiskFullError):
                await server.serve(replace(SPEC, model="org/large", blocks=peerd.Span(0, 6)))


async def test_spans_of_one_peer_share_what_is_free_with_what_others_may_take_yet(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda *_: 250 * 2**20)
    # None of this KV is ever written: the system takes it for free.
    order = replace(SPEC, model=models[0], blocks=peerd.Span(0, 1), memory_bytes=None, kv_tokens=120_000)
    async with Swarm().peer(order) as server:
        (first,) = server.served
        with pytest.raises(InvalidRequest, match="are free"):
            await server.serve(order)
        assert server.served == (first,)


class Strangers:
    """A directory in which every model has one server, or none; and a hub without any model."""

    def __init__(self, *servers: str) -> None:
        self.looked_up: list[bytes] = []
        self.opened: list[str] = []
        self._servers = servers

    async def holdings(self, model: bytes, _block_count: int) -> tuple[str, ...]:
        self.looked_up.append(model)
        return self._servers

    @asynccontextmanager
    async def open(self, model: str, _revision: str) -> AsyncIterator[None]:
        self.opened.append(model)
        raise CheckpointError("no such model")
        yield

    def choice(self) -> ModelChoice:
        discovery = cast("Discovery", SimpleNamespace(directory=self))
        return ModelChoice(replace(SPEC, among=("org/*",)), discovery, cast("Checkpoints", self))


def named(number: int, *announcers: str) -> NamedModel:
    return NamedModel(number.to_bytes(32, "big"), "x", f"org/{number}", "a" * 40, 4, frozenset(map(PeerId, announcers)))


async def test_a_refused_model_stays_refused_when_other_peers_announce_it() -> None:
    strangers = Strangers("a server")
    choice = strangers.choice()
    for newcomer in range(20):
        assert not await choice._candidates([named(1, "first", f"newcomer {newcomer}")])
    assert strangers.opened == ["org/1"]


async def test_models_that_strangers_make_up_cost_few_lookups() -> None:
    strangers = Strangers()
    assert not await strangers.choice()._candidates([named(number, "one") for number in range(1000)])
    assert len(strangers.looked_up) == MAX_LOOKED_UP


async def test_names_without_servers_do_not_hide_those_behind_them() -> None:
    strangers = Strangers()
    choice = strangers.choice()
    made_up, real = [named(number, "one") for number in range(MAX_LOOKED_UP)], named(1000, "one")
    for _ in range(2):
        await choice._candidates([*made_up, real])
    assert real.digest in strangers.looked_up


async def test_huge_models_that_strangers_make_up_do_not_keep_a_server_from_a_real_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has 256 keys: at 64 of them a look asked for 16 384."""
    monkeypatch.setattr(model_choice, "LOOK_S", 0.01)
    strangers = Strangers()
    huge = [replace(named(number, "one", "two"), block_count=4096) for number in range(63)]
    choice, real = strangers.choice(), named(64, "one")
    for _ in range(40):
        strangers.looked_up.clear()
        assert not await choice._candidates([*huge, real])
        assert len([digest for digest in strangers.looked_up if digest != real.digest]) <= MAX_KEYS // 256
        await trio.sleep(model_choice.LOOK_S)
    # A model without servers is looked up ever more seldom.
    strangers.looked_up.clear()
    for _ in range(40):
        assert not await choice._candidates([real])
        await trio.sleep(model_choice.LOOK_S)
    assert len(strangers.looked_up) <= 2
