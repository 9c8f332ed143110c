"""A peer pauses while its owner uses the machine, and serves again; sessions go on elsewhere."""

from __future__ import annotations

import pytest
import trio

from peerd.cli.owner.decision import LOOK_S, LOOKS_IN_USE, QUIET_S, Signs
from peerd.cli.owner.yielding import DRAIN_S, yield_to_owner, yielding_to_owner


class Peer:
    """Notes when it was paused and resumed, and takes `drain_s` to pause."""

    def __init__(self, drain_s: float) -> None:
        self.events: list[tuple[str, float]] = []
        self._drain_s = drain_s

    async def pause(self, timeout_s: float) -> None:
        self.events.append(("pause", trio.current_time()))
        assert timeout_s == DRAIN_S
        try:
            await trio.sleep(self._drain_s)
            self.events.append(("paused", trio.current_time()))
        except trio.Cancelled:
            self.events.append(("cut", trio.current_time()))
            raise

    def resume(self) -> None:
        self.events.append(("resume", trio.current_time()))


@pytest.fixture(autouse=True)
def threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(work, *arguments, **_options):
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


@pytest.mark.parametrize(("drain_s", "ending"), [(5.0, "paused"), (10 * QUIET_S, "cut")])
async def test_it_pauses_once_and_serves_again_after_the_quiet(drain_s: float, ending: str) -> None:
    peer = Peer(drain_s)
    began = trio.current_time()

    def look() -> Signs:
        return Signs(cores=1.0 if trio.current_time() - began < 100.0 else 0.0)

    with trio.move_on_after(100.0 + 2 * QUIET_S):
        await yield_to_owner(peer, look)
    names = [name for name, _ in peer.events]
    assert names.count("pause") == names.count("resume") == 1
    assert set(names) == {"pause", "resume", ending}
    times = dict(peer.events)
    assert times["pause"] - began == pytest.approx(LOOKS_IN_USE * LOOK_S)
    assert QUIET_S <= times["resume"] - began - 100.0 <= QUIET_S + LOOK_S


async def test_who_does_not_ask_for_it_is_never_paused() -> None:
    peer = Peer(0.0)
    async with yielding_to_owner(peer, None):
        await trio.sleep(1000.0)
    assert peer.events == []


async def test_it_ends_with_its_block() -> None:
    async with yielding_to_owner(Peer(0.0), ["cpu"]):
        await trio.sleep(3 * LOOK_S)
