"""A span whose device fails is loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
import torch
import trio

from peerd.net.containment import Containment
from peerd.protocol.span import Span
from peerd.spans.swap import STEADY_S, Reloader, SpanSwap
from tests.fakes.moving_fixture import Peer, Swarm, open_swarm, until


@dataclass
class Reloading:
    """A peer whose span is loaded again when its device fails."""

    peer: Peer
    reloader: Reloader

    @classmethod
    async def of(cls, swarm: Swarm, span: str) -> Reloading:
        peer = await swarm.serve(span)
        swap = SpanSwap(peer.slot, peer.loader, peer.server, peer.discovery, Random(1), Containment(is_strict=False))
        reloader = Reloader(peer.slot, swap, peer.server, Random(1))
        peer.tasks.start_soon(reloader.run)
        return cls(peer, reloader)

    def break_down(self) -> None:
        [served] = self.peer.server.spans
        served.task.break_down("its device is lost")


async def test_a_span_whose_device_fails_is_withdrawn_and_loaded_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        connections = dict(own.peer.discovery._connections.live)
        async with swarm.session():
            own.break_down()
            await until(lambda: own.peer.states() == {"4:8": "joining"}, 5)
            assert own.peer.spans == []
        await until(lambda: own.peer.states() == {"4:8": "online"}, 60)
        assert own.peer.loader.loads == [Span(4, 8)]
        assert "blocks 4:8 are out of service: its device is lost" in caplog.text
        # Neither the identity nor the connections went with the span.
        assert own.peer.discovery._connections.live.items() >= connections.items()
        async with swarm.session() as session:
            assert session is not None


async def test_a_span_that_fails_again_soon_is_loaded_ever_later() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        loads: list[float] = []
        own.peer.loader.watch = lambda: loads.append(trio.current_time())

        async def pause_s() -> float:
            began, count = trio.current_time(), len(loads)
            own.break_down()
            await until(lambda: len(loads) > count and own.peer.states() == {"4:8": "online"}, 1000)
            return loads[-1] - began

        pauses = [await pause_s() for _ in range(3)]
        assert pauses[0] < 10
        assert 45 < pauses[1] < 80
        assert 90 < pauses[2] < 160
        await trio.sleep(STEADY_S)
        assert await pause_s() < 10


async def test_a_device_on_which_nothing_loads_any_more_costs_the_span_and_nothing_else() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        # No error that anybody has a name for.
        own.peer.loader.failing[Span(4, 8)] = torch.AcceleratorError("CUDA error: device-side assert triggered")
        own.break_down()
        await until(lambda: len(own.peer.loader.loads) >= 3, 1000)
        await until(lambda: own.peer.states() == {}, 60)
        own.peer.loader.failing.clear()
        await until(lambda: own.peer.states() == {"4:8": "online"}, 1000)


async def test_a_peer_that_leaves_loads_nothing_again() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        own.reloader.stop()
        own.break_down()
        await trio.sleep(100)
        assert own.peer.loader.loads == []


async def test_a_span_whose_device_fails_after_a_move_is_loaded_again() -> None:
    async with open_swarm("0:4") as swarm:
        own = await Reloading.of(swarm, "4:8")
        [served] = own.peer.server.spans
        async with own.reloader.swap.lock:
            await own.peer.server.withdraw(served)
            del served
            await own.reloader.swap.vacate()
            assert await own.reloader.swap.load(Span(2, 8)) is None
        await trio.sleep(1)
        own.break_down()
        await until(lambda: own.peer.states() == {"2:8": "joining"}, 5)
        await until(lambda: own.peer.states() == {"2:8": "online"}, 60)
        assert own.peer.loader.loads == [Span(2, 8), Span(2, 8)]
