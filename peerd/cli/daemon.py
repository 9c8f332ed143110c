"""The daemon: runs a peer until it is stopped.

Stopping has two stages. The first signal announces that the peer leaves, refuses new sessions and answers, and gives
the others time to end (a minute after SIGTERM, or SIGHUP from a closed terminal; only a second after Ctrl-C, because a
user waits). The second signal stops at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.cli.console import working, write
from peerd.cli.keys.identity_file import load_or_create_identity
from peerd.cli.owner.yielding import yielding_to_owner
from peerd.cli.page_link import page_link, show_page
from peerd.cli.standard_files import OutputFailed
from peerd.cli.stopping import Interrupted, stop_signals
from peerd.cli.watching.traces import open_traces
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.peer import open_configured
from peerd.peer_parts import PeerConfig
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest
from peerd.trio_tools import open_tasks
from peerd.watchdog import tell_systemd, watching_the_loop

if TYPE_CHECKING:
    from peerd.api.serve import LocalApi
    from peerd.client.model import SwarmModel
    from peerd.peer import Peer
    from peerd.spans.spec import ServeSpec

log = logging.getLogger(__name__)

# How long sessions may go on after the signal. It is less than the 90 s after which systemd kills.
DRAIN_S = {signal.SIGTERM: 60.0, signal.SIGHUP: 60.0, signal.SIGINT: 1.0}


@dataclass(frozen=True, slots=True)
class Offered:
    """What the local API offers, and where. If `token_file` is None, TCP needs no token. `traces`: whether answers are
    traced. `open_page`: whether to show the page to whoever starts the daemon. `names`, `origins`: as in `Endpoint`.
    `keep_positions`: how many positions the sessions of ended answers may hold, for each model. `drafts`: the small
    models that guess tokens, by the name of the model for which they do (None: the only one), on `draft_device`.
    `remote_head`: whether last servers draw tokens, where they offer that.
    """

    models: tuple[tuple[str | None, Path | str], ...]
    socket_path: Path
    http: tuple[str, int] | None
    token_file: Path | None
    open_page: bool = False
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    keep_positions: int = 0
    drafts: tuple[tuple[str | None, Path | str], ...] = ()
    draft_device: str = "cpu"
    traces: bool = False
    remote_head: bool = False


@dataclass(frozen=True, slots=True)
class Daemon:
    """The configuration of a daemon. Its identity is read from a file when it starts.

    stop_on_eof: it stops when its standard input ends. disk_bytes: the limit of its downloads from the hub.
    idle_only: it serves while nobody else uses the machine. nice: by how much other programs go first.
    """

    identity_file: Path
    config: PeerConfig
    stop_on_eof: bool = False
    offer: Offered | None = None
    disk_bytes: int | None = None
    idle_only: bool = False
    nice: int = 0


async def run_daemon(daemon: Daemon) -> None:
    """Run a peer until a signal. Raises PeerdError, CheckpointError; Interrupted if it was stopped before it served."""
    # Before there are other threads, which begin with what this one has. Only root may go back.
    os.nice(max(0, daemon.nice - os.getpriority(os.PRIO_PROCESS, 0)))
    stopping = _Stopping()
    async with watching_the_loop(), open_tasks() as tasks:
        stopping.at_once = tasks.cancel_scope
        await tasks.start(stopping.watch_signals)
        if daemon.stop_on_eof:
            tasks.start_soon(stopping.watch_input)
        await _be_a_peer(daemon, stopping)
    if not stopping.serving:
        raise Interrupted(stopping.number)


async def _be_a_peer(daemon: Daemon, stopping: _Stopping) -> None:
    async with AsyncExitStack() as stack:
        with working(_starting(daemon.config.serve)) as display:
            peer = await _open(stack, daemon, HubSettings(daemon.disk_bytes, watch=display.transferred))
            if daemon.offer is not None and daemon.offer.traces:
                peer.connections.meters.traces = await stack.enter_async_context(open_traces())
            api = await _offer(stack, peer, daemon.offer) if daemon.offer is not None else None
        stopping.serving = True
        if api is not None and daemon.offer is not None:
            await _say_where(api, daemon.offer)
        _say_what_is_missing(daemon, peer)
        _print_addresses(peer.addresses)
        log.info("%s is up%s", peer.peer_id, _roles(peer))
        tell_systemd("READY=1")
        try:
            async with yielding_to_owner(peer, devices_of(daemon.config.serve) if daemon.idle_only else None):
                await stopping.asked.wait()
            tell_systemd("STOPPING=1")
            has_work = peer.served or (api is not None and api.answering.count)
            log.info("leaving%s", f"; what is under way gets {stopping.drain_s:g} s to end" if has_work else "")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.drain, stopping.drain_s)
                if api is not None:
                    nursery.start_soon(api.answering.drain, stopping.drain_s)
        finally:
            _log_positions(peer)


def _print_addresses(addresses: Sequence[Multiaddr]) -> None:
    """Print the addresses at which others reach us, for the program that started us. If it does not read them, serve
    anyway.
    """
    try:
        for address in addresses:
            write(f"{address}\n")
    except OutputFailed as error:
        log.warning("%s; others reach us at %s", error, " ".join(map(str, addresses)))


async def _open(stack: AsyncExitStack, daemon: Daemon, hub: HubSettings) -> Peer:
    identity = stack.enter_context(load_or_create_identity(daemon.identity_file))
    opening = open_configured(
        replace(daemon.config, identity=identity, state_dir=state_dir(daemon.identity_file), hub=hub)
    )
    try:
        return await stack.enter_async_context(opening)
    except OSError as error:
        wanted = ", ".join(map(str, daemon.config.listen))
        raise InvalidRequest(f"cannot listen on {wanted}: {error.strerror}; choose another --listen") from error


async def _say_where(api: LocalApi, offered: Offered) -> None:
    for url in api.urls:
        needs = f", with the token in {offered.token_file}" if url.startswith("http") and offered.token_file else ""
        log.info("local API at %s%s; try: %s", url, needs, _curl(url, offered))
    if offered.open_page:
        http = next(url for url in api.urls if url.startswith("http"))
        await show_page(page_link(http, api.token))


def _curl(url: str, offered: Offered) -> str:
    """A command that asks the API for its models."""
    if not url.startswith("http"):
        return f"curl --unix-socket {shlex.quote(str(offered.socket_path))} http://localhost/v1/models"
    token = offered.token_file
    needs = f'-H "Authorization: Bearer $(cat {shlex.quote(str(token))})" ' if token is not None else ""
    return f"curl {needs}{url}/v1/models"


def _say_what_is_missing(daemon: Daemon, peer: Peer) -> None:
    """Warn of what makes a daemon useless, though it runs: a newcomer would wait for it."""
    if daemon.offer is not None and not daemon.offer.models:
        log.warning("the local API has no model to offer: add --model MODEL")
    if not daemon.config.bootstrap and not daemon.config.listen and not peer.discovery.contacts():
        log.warning(
            "this peer knows no other, and no other can reach it: give --bootstrap ADDRESS, which a peer of the swarm"
            " printed, or set PEERD_BOOTSTRAP"
        )


async def _offer(stack: AsyncExitStack, peer: Peer, offered: Offered) -> LocalApi:
    """Open the local API over the named models. Raises CheckpointError, InvalidRequest."""
    # The import loads torch, which takes seconds. In a thread, so that peers do not think us dead meanwhile.
    await trio.to_thread.run_sync(import_module, "peerd.api.serve")
    from peerd.api.serve import Endpoint, load_or_create_token, open_local_api

    models: dict[str, SwarmModel] = {}
    drafts = dict(offered.drafts)
    for name, path in offered.models:
        model = await stack.enter_async_context(peer.model(path, remote_head=offered.remote_head))
        await model.prepare_grammars()  # The event loop stops meanwhile, but nobody is answered yet.
        if (name := name or model.facts.name) in models:
            raise InvalidRequest(f"two models are called {name}: name one of them, --model NAME={path}")
        if offered.keep_positions:
            model.keep_sessions(offered.keep_positions)
        if draft := drafts.pop(name, None) or drafts.pop(None, None):
            await stack.enter_async_context(peer.drafting(model, draft, device=offered.draft_device))
        models[name] = model
    for name, draft in drafts.items():
        raise InvalidRequest(f"--draft {name}={draft}: there is no model {name}; there is {', '.join(models)}")
    token = load_or_create_token(offered.token_file) if offered.token_file and offered.http else None
    host, port = offered.http or (None, 0)
    endpoint = Endpoint(offered.socket_path, host, port, token, offered.token_file, offered.names, offered.origins)
    return await stack.enter_async_context(open_local_api(peer, models, endpoint))


class _Stopping:
    """Turns a first signal, or the end of standard input, into a request to stop, and a second one into an order."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.serving = False
        self.number = signal.SIGTERM
        self.at_once = trio.CancelScope()

    @property
    def drain_s(self) -> float:
        return DRAIN_S[self.number]

    async def watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*stop_signals()) as signals:
            task_status.started()
            async for number in signals:
                # A closed terminal may send SIGHUP twice, from the shell and the system; that is no request to hurry.
                if number == signal.SIGHUP and self.asked.is_set():
                    continue
                self._stop(signal.Signals(number))
                if self.at_once.cancel_called:
                    # From here on, signals have their default effect.
                    return

    async def watch_input(self) -> None:
        """Stop when standard input ends, which means that the process which started us has gone."""
        async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stream:
            async for _ in stream:
                pass
        self._stop(signal.SIGINT)

    def _stop(self, number: signal.Signals) -> None:
        if self.asked.is_set() or not self.serving:
            self.at_once.cancel()
        self.number = number
        self.asked.set()


def state_dir(identity: Path) -> Path:
    """The peer's files belong to its identity: beside `identity.key` is `identity.state`."""
    return identity.with_suffix(".state")


def devices_of(specs: Sequence[ServeSpec]) -> list[str]:
    """The devices on which blocks run."""
    return [name for spec in specs for name in spec.device.split(",")]


def _starting(specs: Sequence[ServeSpec]) -> str:
    named = [f"reading blocks of {Path(spec.model).name}" for spec in specs if not spec.among]
    chosen = ["choosing a model" for spec in specs if spec.among]
    return ", ".join([*named, *chosen]) or "joining the swarm"


def _roles(peer: Peer) -> str:
    spans = ", ".join(str(served.span) for served in peer.served)
    return f", serving blocks {spans}" if spans else ""


def _log_positions(peer: Peer) -> None:
    for served in peer.served:
        log.info("blocks %s computed %d positions", served.span, served.task.engine.positions_computed)
