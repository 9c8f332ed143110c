"""Runs all looks at the same time, and puts their findings into one order.

Each look has a deadline of its own, and all together have one too: a look that has not ended by then is a finding.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from peerd import __version__
from peerd.cli.console import Working, working, write
from peerd.cli.doctor.facts import DaemonFact, SwarmFact
from peerd.cli.doctor.finding import Finding, Level, warning, worst
from peerd.cli.doctor.look_daemon import look_at_daemon
from peerd.cli.doctor.look_here import (
    look_at_folder,
    look_at_key,
    look_at_limits,
    look_at_packages,
    look_at_state,
    look_at_token,
)
from peerd.cli.doctor.look_hub import look_at_hub
from peerd.cli.doctor.look_swarm import look_at_swarm
from peerd.cli.doctor.machine_findings import (
    disk_findings,
    hub_findings,
    identity_findings,
    limits_findings,
    memory_findings,
    state_findings,
    token_findings,
    trial_findings,
    version_findings,
)
from peerd.cli.doctor.report import as_json, as_text
from peerd.cli.doctor.run_trials import run_trial
from peerd.cli.doctor.show_blocks import look_at_blocks
from peerd.cli.doctor.swarm_findings import clock_of_swarm, daemon_findings, swarm_findings
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.device.host_memory import free_host_memory
from peerd.compute.transformers_compat import NEWEST_TESTED
from peerd.discovery.kept_clock import is_clock_kept
from peerd.net.websockets.transport import WebSocketTransport
from peerd.protocol.addresses import Multiaddr

DEADLINE_S = 60.0
TRIALS = ("device", "triton", "bitsandbytes", "llamacpp")

Look = Callable[[], Awaitable[list[Finding]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to look at. Without `bootstrap` no peer is asked. `model`: one that is to be served here."""

    identity: Path
    socket_path: Path
    token_file: Path
    bootstrap: tuple[Multiaddr, ...] = ()
    listen: tuple[Multiaddr, ...] = ()
    swarm_key: bytes | None = None
    may_be_relayed: bool = True
    model: Path | str | None = None
    hub: HubSettings = field(default_factory=HubSettings)


class Doctor:
    """Looks at everything once. `found` has the findings after `run`."""

    def __init__(self, question: Question, *, as_json: bool) -> None:
        self._question = question
        self._as_json = as_json
        self.found: list[Finding] = []

    @property
    def exit_code(self) -> int:
        """1 if anything is an error."""
        return int(worst(self.found) is Level.ERROR)

    async def run(self) -> None:
        """Look, and print what was found."""
        with working("looking") as display:
            self.found = await look_at_all(_looks(self._question), display)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        write((as_json(self.found) if self._as_json else as_text(self.found, width)) + "\n")


async def look_at_all(looks: Sequence[tuple[str, Look]], display: Working) -> list[Finding]:
    """The findings of all looks, in their order; each look has a name for people."""
    found: dict[int, list[Finding]] = {}

    async def take(index: int, look: Look) -> None:
        found[index] = await look()
        pending = [name for number, (name, _) in enumerate(looks) if number not in found]
        display.update(f"looking at {', '.join(pending)}" if pending else "looking")

    with trio.move_on_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for index, (_, look) in enumerate(looks):
                nursery.start_soon(take, index, look)
    late = f"did not end within {DEADLINE_S:g} s"
    missing = {
        index: [warning(name, late, "run it again when the machine and the network have less to do")]
        for index, (name, _) in enumerate(looks)
        if index not in found
    }
    return [finding for _, findings in sorted({**found, **missing}.items()) for finding in findings]


def _looks(question: Question) -> list[tuple[str, Look]]:
    return [
        ("files", partial(_look_at_files, question)),
        ("limits", _look_at_limits),
        ("versions", _look_at_versions),
        *((name, partial(_look_at_trial, name)) for name in TRIALS),
        ("the hub", partial(_look_at_hub, question.hub)),
        *([("the model", partial(look_at_blocks, question.model))] if question.model is not None else []),
        ("the swarm", partial(_look_at_swarm, question)),
    ]


async def _look_at_files(question: Question) -> list[Finding]:
    def look() -> list[Finding]:
        state = look_at_folder(question.identity.parent, "this peer's key and state")
        cache = look_at_folder(question.hub.folder, "models from the hub")
        return [
            *identity_findings(look_at_key(question.identity)),
            *state_findings(look_at_state(question.identity)),
            *token_findings(look_at_token(question.token_file)),
            *disk_findings(state, cache),
        ]

    # A network file system may hang.
    return await trio.to_thread.run_sync(look, abandon_on_cancel=True)


async def _look_at_limits() -> list[Finding]:
    def look() -> list[Finding]:
        return [*memory_findings(free_host_memory()), *limits_findings(look_at_limits())]

    return await trio.to_thread.run_sync(look, abandon_on_cancel=True)


async def _look_at_versions() -> list[Finding]:
    packages = await trio.to_thread.run_sync(look_at_packages, abandon_on_cancel=True)
    return version_findings(packages, NEWEST_TESTED)


async def _look_at_trial(name: str) -> list[Finding]:
    return trial_findings(await run_trial(name))


async def _look_at_hub(settings: HubSettings) -> list[Finding]:
    return hub_findings(await trio.to_thread.run_sync(look_at_hub, settings, abandon_on_cancel=True))


async def _look_at_swarm(question: Question) -> list[Finding]:
    daemon: DaemonFact = await look_at_daemon(question.socket_path)
    swarm: SwarmFact | None = None
    if question.bootstrap:
        swarm = await look_at_swarm(
            WebSocketTransport(),
            question.bootstrap,
            question.listen,
            swarm_key=question.swarm_key,
            may_be_relayed=question.may_be_relayed,
        )
    kept = is_clock_kept()
    return [
        *clock_of_swarm(swarm, is_kept=kept),
        *swarm_findings(swarm, daemon),
        *daemon_findings(daemon, __version__),
    ]
