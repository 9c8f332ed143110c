"""A swarm whose servers cannot be dialled: whole peers with a real model, on a network in memory."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import trio

import peerd
from peerd.client.finding.finder import SwarmFinder
from peerd.client.session.session import Patience
from peerd.peer import Peer
from peerd.protocol.identity import PeerId
from peerd.reach.relay_ledger import RelayLimits
from peerd.testing.nats import NatKind
from peerd.testing.network import MemoryNetwork

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.real_time

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
# Three networks behind NATs: nothing that was not asked for comes in.
CLIENT, FIRST, SECOND = "10.1.0.1", "10.2.0.1", "10.3.0.1"
RELAYS = ("9.9.9.1", "9.9.9.2")


@pytest.fixture(scope="module")
def tiny_model(
    tiny_llama: Path, byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama with a tokenizer beside it, which a client asks for."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_llama, folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local_answer(tiny_model: Path) -> list[int]:
    """What the whole model says after PROMPT, greedily."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[0, len(PROMPT) :].tolist()


async def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.02)


class RelayedSwarm:
    """Two relays that can be dialled, and two servers that cannot, of four blocks each."""

    def __init__(self, network: MemoryNetwork, swarm_key: bytes | None) -> None:
        self.network = network
        self.relays: list[Peer] = []
        self.servers: list[Peer] = []
        self.swarm_key = swarm_key

    @asynccontextmanager
    async def client(self, path: Path, **more: Any) -> AsyncIterator[tuple[Peer, peerd.SwarmModel]]:
        transport = self.network.transport(CLIENT)
        async with (
            peerd.open_peer(transport=transport, bootstrap=self.bootstrap, swarm_key=self.swarm_key, **more) as peer,
            peer.model(path) as model,
        ):
            yield peer, model

    @property
    def bootstrap(self) -> list[peerd.Multiaddr]:
        return [address for relay in self.relays for address in relay.addresses]


@asynccontextmanager
async def open_relayed_swarm(
    path: Path, *, nats: NatKind = "symmetric", swarm_key: bytes | None = None, limits: RelayLimits | None = None
) -> AsyncIterator[RelayedSwarm]:
    """`nats`: the kind of NAT in front of each server and of the client."""
    async with AsyncExitStack() as stack:
        network = MemoryNetwork(latency_s=0.002)
        swarm = RelayedSwarm(network, swarm_key)
        for ip in (CLIENT, FIRST, SECOND):
            network.put_behind_nat(ip, ip.replace("10", "7", 1), nats)

        async def start(ip: str, **more: object) -> Peer:
            opening = peerd.open_peer(
                transport=network.transport(ip), bootstrap=swarm.bootstrap, swarm_key=swarm_key, **more
            )
            return await stack.enter_async_context(opening)

        for ip in RELAYS:
            swarm.relays.append(await start(ip, listen=[f"/ip4/{ip}/tcp/4000/ws"], relay=limits or RelayLimits()))
        for ip, blocks in ((FIRST, peerd.Span(0, 4)), (SECOND, peerd.Span(4, 8))):
            spec = peerd.ServeSpec(path, blocks, kv_tokens=512, throughput=100.0, memory_bytes=2**30)
            swarm.servers.append(await start(ip, serve=[spec]))
        await until(lambda: all(len(server.reservations.held) == 2 for server in swarm.servers))
        yield swarm


async def test_a_model_answers_through_relays_alone_and_servers_push_to_each_other(
    tiny_model: Path, local_answer: list[int]
) -> None:
    async with open_relayed_swarm(tiny_model) as swarm, swarm.client(tiny_model) as (client, model):
        generation = model.generate(PROMPT, temperature=0, max_new_tokens=20, eos_token_ids=())
        tokens = [token.id async for token in generation.tokens()]
        assert tokens == local_answer[:20]
        first, second = swarm.servers
        for server in swarm.servers:
            assert client.connections.live[server.peer_id].relay is not None
        # The first pushed to the second itself, though neither can be dialled.
        assert first.connections.live[second.peer_id].relay is not None
        # The servers are in no peer's routing table.
        for peer in (*swarm.relays, client):
            assert not {first.peer_id, second.peer_id} & {c.peer_id for c in peer.discovery.dht.contacts}


async def test_where_nats_allow_it_all_peers_meet_in_the_middle_of_an_answer_which_loses_nothing(
    tiny_model: Path, local_answer: list[int]
) -> None:
    async with (
        open_relayed_swarm(tiny_model, nats="port_preserving", swarm_key=b"k" * 32) as swarm,
        swarm.client(tiny_model) as (client, model),
    ):
        first, second = swarm.servers

        def ways() -> set[str]:
            pairs = [(client, first), (client, second), (first, second)]
            return {peer.connections.live[other.peer_id].way for peer, other in pairs}

        generation = model.generate(PROMPT, temperature=0, max_new_tokens=40, eos_token_ids=())
        tokens = []
        async for token in generation.tokens():
            tokens.append(token.id)
            if len(tokens) == 5:
                assert "relayed" in ways()
                await until(lambda: ways() == {"punched"})
        assert tokens == local_answer
        assert generation.failovers == 0
        again = model.generate(PROMPT, temperature=0, max_new_tokens=5, eos_token_ids=())
        assert [token.id async for token in again.tokens()] == local_answer[:5]
        assert ways() == {"punched"}


async def test_a_private_swarm_answers_through_its_relays(tiny_model: Path, local_answer: list[int]) -> None:
    async with (
        open_relayed_swarm(tiny_model, swarm_key=b"k" * 32) as swarm,
        swarm.client(tiny_model) as (_, model),
    ):
        generation = model.generate(PROMPT, temperature=0, max_new_tokens=5, eos_token_ids=())
        assert [token.id async for token in generation.tokens()] == local_answer[:5]


async def test_a_client_that_uses_no_relays_is_told_why_it_gets_no_answer(tiny_model: Path) -> None:
    async with (
        open_relayed_swarm(tiny_model) as swarm,
        swarm.client(tiny_model, may_be_relayed=False) as (_, model),
    ):
        with pytest.raises(peerd.PeerdError, match="we use no relays"):
            async with model.session(max_length=16, patience=Patience(missing_s=0)):
                pass


async def test_a_relay_that_dies_in_the_middle_of_an_answer_costs_no_token_and_is_no_server_s_fault(
    tiny_model: Path, local_answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blamed: list[PeerId] = []
    failed = SwarmFinder.failed

    def note(finder: SwarmFinder, peer: PeerId) -> None:
        blamed.append(peer)
        failed(finder, peer)

    monkeypatch.setattr(SwarmFinder, "failed", note)
    async with open_relayed_swarm(tiny_model) as swarm, swarm.client(tiny_model) as (client, model):
        generation = model.generate(PROMPT, temperature=0, max_new_tokens=40, eos_token_ids=())
        tokens = []
        async for token in generation.tokens():
            tokens.append(token.id)
            if len(tokens) == 10:
                used = client.connections.live[swarm.servers[0].peer_id].relay
                assert used is not None
                dead = next(ip for ip, relay in zip(RELAYS, swarm.relays, strict=True) if relay.peer_id == used.peer_id)
                swarm.network.kill(dead)
        assert tokens == local_answer
        assert generation.failovers >= 1
        assert not blamed
