"""Gets files of one commit onto this disk, several at a time. Of all processes only one fetches a given file.

The caller's thread waits and calls the watcher; an exception of the watcher stops the transfers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

from peerd.compute.checkpoint.hub.cache import HubCache
from peerd.compute.checkpoint.hub.disk_ledger import Claims, DiskLedger
from peerd.compute.checkpoint.hub.download import Download
from peerd.compute.checkpoint.hub.http import Fetchable, Hub, Listing
from peerd.compute.checkpoint.hub.settings import HubSettings, Transfer
from peerd.compute.errors import HubUnavailableError

# One connection seldom uses all of the bandwidth; many more than this only slow each other down.
PARALLEL = 4
_WATCH_EVERY_S = 0.1


class Fetcher:
    """Fetches files of one repository."""

    def __init__(self, hub: Hub, cache: HubCache, settings: HubSettings) -> None:
        self._hub = hub
        self._cache = cache
        self._settings = settings
        self._ledger = DiskLedger(settings.own_folder)

    def obtain(self, listing: Listing, files: Sequence[Fetchable]) -> dict[str, int]:
        """Get `files` onto this disk. Returns, by name, file descriptors; a file is not deleted until its descriptor is
        closed.

        Raises HubUnavailableError, DiskFullError, CheckpointError, and what the watcher raises.
        """
        held: dict[str, int] = {}
        try:
            while missing := [file for file in files if file.name not in held]:
                held |= self._obtain_some(listing, missing)
        except BaseException:
            for fd in held.values():
                os.close(fd)
            raise
        return held

    def _obtain_some(self, listing: Listing, files: Sequence[Fetchable]) -> dict[str, int]:
        settings = self._settings
        claims = self._ledger.claim(
            self._cache, listing.commit, files, disk_bytes=settings.disk_bytes, offline=settings.is_offline
        )
        if settings.is_offline and (missing := [file.name for file in files if file.name not in claims.held]):
            _close(claims)
            raise HubUnavailableError(
                f"{listing.repo}: {missing[0]} of commit {listing.commit[:8]} is not on this machine, and offline mode"
                " is on: unset HF_HUB_OFFLINE to fetch it"
            )
        if claims.mine:
            self._fetch(listing, [file for file in files if file.name in claims.mine], claims)
        elif claims.elsewhere:
            self._watch_others(listing, [file for file in files if file.name in claims.elsewhere], claims)
        return claims.held

    def _fetch(self, listing: Listing, files: Sequence[Fetchable], claims: Claims) -> None:
        stop = threading.Event()
        downloads = [
            Download(self._hub, listing, file, claims.mine[file.name], stop, self._settings.retry_delays_s)
            for file in files
        ]

        def fetch(download: Download) -> None:
            download.run()
            file = download.file
            self._ledger.publish(self._cache, listing.commit, file, claims.mine[file.name])

        def progress() -> Transfer:
            return Transfer(listing.repo, sum(d.done for d in downloads), sum(file.size for file in files))

        try:
            _run_all([partial(fetch, download) for download in downloads], stop, self._settings.watch, progress)
        except BaseException:
            _close(claims)
            raise
        claims.held |= claims.mine
        claims.mine.clear()

    def _watch_others(self, listing: Listing, files: Sequence[Fetchable], claims: Claims) -> None:
        """While another process fetches these files: report its progress to the watcher, wait a moment and return."""
        done = 0
        for file in files:
            try:
                done += self._cache.partial(file).stat().st_size
            except FileNotFoundError:
                done += file.size
        try:
            self._settings.watch(Transfer(listing.repo, done, sum(file.size for file in files)))
            time.sleep(_WATCH_EVERY_S)
        except BaseException:
            _close(claims)
            raise


def _run_all(
    jobs: Sequence[Callable[[], None]],
    stop: threading.Event,
    watch: Callable[[Transfer], None],
    progress: Callable[[], Transfer],
) -> None:
    """Run jobs in threads. The first failure of a job or of the watcher stops all. When this returns, none is
    running.
    """
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="peerd-fetch") as pool:
        try:
            # In here too: Ctrl-C while the threads start must stop those that run already.
            pending = {pool.submit(job) for job in jobs}
            while pending:
                done, pending = wait(pending, _WATCH_EVERY_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                watch(progress())
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _close(claims: Claims) -> None:
    for fd in [*claims.held.values(), *claims.mine.values()]:
        os.close(fd)
    claims.held.clear()
    claims.mine.clear()
