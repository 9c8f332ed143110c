"""Multicast DNS by the package `zeroconf`, whose own thread it hands sightings from."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

import trio

from peerd.discovery.lan import SERVICE, Multicast, Sighting

if TYPE_CHECKING:
    from zeroconf import Zeroconf

log = logging.getLogger(__name__)

# Sightings that nobody has taken yet; a network that announces more loses them, and announces again.
_WAITING = 64
_ASK_MS = 2000
# Of a text that is no longer than what we announce ourselves.
_MAX_WORD_CHARS = 128


class _Zeroconf:
    def __init__(self, zeroconf: Zeroconf, sightings: trio.MemoryReceiveChannel[Sighting]) -> None:
        self.sightings = sightings
        self._zeroconf = zeroconf
        self._announced: Any = None

    async def announce(self, sighting: Sighting | None) -> None:
        from zeroconf import Error

        try:
            await trio.to_thread.run_sync(self._announce, sighting)
        except (Error, OSError) as error:
            # Of a machine that is too busy for it, or whose interfaces have changed. The next change is announced anew.
            log.info("this peer is not announced by multicast DNS: %r", error)

    def _announce(self, sighting: Sighting | None) -> None:
        from zeroconf import ServiceInfo

        if self._announced is not None:
            self._zeroconf.unregister_service(self._announced)
            self._announced = None
        if sighting is not None:
            info = ServiceInfo(
                SERVICE,
                f"{sighting.label}.{SERVICE}",
                port=sighting.port,
                properties=dict(sighting.words),
                server=f"{sighting.label}.local.",
                addresses=[ipaddress.ip_address(host).packed for host in sighting.hosts],
            )
            self._zeroconf.register_service(info)
            self._announced = info


@asynccontextmanager
async def open_zeroconf() -> AsyncIterator[Multicast]:
    """Multicast on this machine's interfaces until the block ends. Without the package, or without a network that
    takes multicasts, nothing is found.
    """
    send, receive = trio.open_memory_channel[Sighting](_WAITING)
    async with send, receive:
        try:
            zeroconf = await trio.to_thread.run_sync(_start)
        # The package raises RuntimeError if no interface has an IPv4 address.
        except (ImportError, OSError, RuntimeError) as error:
            log.info("peers in this network do not find each other by multicast DNS: %s", error)
            yield _Nothing(receive)
            return
        token = trio.lowlevel.current_trio_token()
        try:
            stopping = Event()
            browser = await trio.to_thread.run_sync(partial(_browse, zeroconf, send, token, stopping))
            try:
                yield _Zeroconf(zeroconf, receive)
            finally:
                stopping.set()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(browser.cancel)
        finally:
            # Takes back what was announced.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_close, zeroconf)


class _Nothing:
    def __init__(self, sightings: trio.MemoryReceiveChannel[Sighting]) -> None:
        self.sightings = sightings

    async def announce(self, sighting: Sighting | None) -> None:
        await trio.lowlevel.checkpoint()


def _start() -> Zeroconf:
    from zeroconf import Zeroconf

    return Zeroconf()


def _close(zeroconf: Zeroconf) -> None:
    from zeroconf import Error

    try:
        zeroconf.close()
    except Error as error:
        # Of a machine that is too busy for it: the others' caches forget us in time.
        log.info("this peer's announcement by multicast DNS was not taken back: %r", error)


def _browse(
    zeroconf: Zeroconf, send: trio.MemorySendChannel[Sighting], token: trio.lowlevel.TrioToken, stopping: Event
) -> Any:
    """Look for our service. stopping: is set before the browser is cancelled, which waits for the names that it has not
    looked up yet.
    """
    from zeroconf import Error, ServiceBrowser, ServiceStateChange

    def hand_over(sighting: Sighting) -> None:
        try:
            send.send_nowait(sighting)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            return

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        if state_change is ServiceStateChange.Removed or stopping.is_set():
            return
        try:
            info = zeroconf.get_service_info(service_type, name, timeout=_ASK_MS)
        except Error as error:
            # Anybody can announce a name that the package refuses. An exception would end the browser's thread.
            log.debug("passed over what a neighbour in this network announces: %r", error)
            return
        if info is None or info.port is None:
            return
        words = {
            key.decode(errors="replace"): (value or b"").decode(errors="replace")[:_MAX_WORD_CHARS]
            for key, value in info.properties.items()
        }
        label = name.removesuffix(f".{SERVICE}")
        sighting = Sighting(label, tuple(info.parsed_addresses()), info.port, words)
        try:
            token.run_sync_soon(hand_over, sighting)
        except trio.RunFinishedError:
            return

    return ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
