"""One commit of a repository on the hub, as the folder of a checkpoint.

A revision is resolved once, so that all files are of one commit whatever is pushed meanwhile. Files that were read or
fetched stay on this disk until the folder is closed. The difficulty is doing without the hub: what it said before, or
what other programs left in the cache, is enough as long as the files are there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from peerd.compute.checkpoint.digests import file_digest
from peerd.compute.checkpoint.hub.cache import HubCache
from peerd.compute.checkpoint.hub.fetch import Fetcher
from peerd.compute.checkpoint.hub.http import Hub, HubFile, Listing, Transient
from peerd.compute.checkpoint.hub.id import HubId, is_commit
from peerd.compute.checkpoint.hub.settings import HubSettings, Transfer
from peerd.compute.checkpoint.safetensors_file import StoredTensor, header_length, parse_header
from peerd.compute.errors import CheckpointError, HubUnavailable

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A header of 100 KB holds a thousand tensors: most files need one request.
_HEADER_GUESS_BYTES = 100_000
_WATCH_EVERY_S = 0.1


class HubFolder:
    """Implements `Folder`. Raises HubUnavailable, CheckpointError if the revision cannot be resolved."""

    def __init__(self, hub_id: HubId, settings: HubSettings) -> None:
        self._settings = settings
        self._hub = Hub(settings)
        self._cache = HubCache(settings, hub_id.repo)
        self._held: dict[str, int] = {}
        self._closed = False
        self._listing = self._resolve(hub_id)
        log.info("%s is commit %s", hub_id, self._listing.commit)
        self._fetcher = Fetcher(self._hub, self._cache, settings)

    @property
    def where(self) -> Path:
        return self._cache.snapshot(self._listing.commit)

    @property
    def commit(self) -> str:
        """What the revision was resolved to."""
        return self._listing.commit

    def __contains__(self, name: str) -> bool:
        return name in self._listing.files

    def names(self) -> Collection[str]:
        """The files that there are, here or not."""
        return self._listing.files.keys()

    def on_disk(self, name: str) -> bool:
        file = self._listing.files.get(name)
        return (self.where / name).exists() or (file is not None and self._cache.blob(file).is_file())

    def download_bytes(self, name: str) -> int:
        return self._file(name).size

    def fetch(self, names: Collection[str]) -> None:
        files = [self._file(name) for name in sorted(set(names)) if name not in self._held]
        if files:
            self._held |= self._fetcher.obtain(self._listing, files)
            if self._closed:
                # While this thread fetched, its caller went away.
                self.close()

    def path(self, name: str) -> Path:
        self.fetch([name])
        return self.where / name

    def tensors(self, name: str) -> Mapping[str, StoredTensor]:
        file = self._file(name)
        if self._settings.is_offline:
            self.fetch([name])  # says that it is not here
        where = self.where / name

        def read(start: int, end: int) -> bytes:
            return self._patiently(lambda: self._hub.read_range(self._listing, file, start, min(end, file.size)))

        data = read(0, _HEADER_GUESS_BYTES)
        end = 8 + header_length(data[:8], file.size, where)
        if end > len(data):
            data += read(len(data), end)
        return parse_header(data[8:end], file.size, where)

    def sha256(self, name: str) -> bytes:
        file = self._file(name)
        # What is not in LFS is small, and listed by another hash.
        return bytes.fromhex(file.sha256) if file.sha256 else file_digest(self.path(name))

    def close(self) -> None:
        self._closed = True
        while self._held:
            os.close(self._held.popitem()[1])

    def _file(self, name: str) -> HubFile:
        try:
            return self._listing.files[name]
        except KeyError:
            reason = f"; offline mode is on, and it may only be missing here: {self.where}"
            raise CheckpointError(
                f"{self._cache.repo} has no file {name} in commit {self._listing.commit[:8]}"
                f"{reason if self._settings.is_offline else ''}"
            ) from None

    def _resolve(self, hub_id: HubId) -> Listing:
        """What the revision holds: as the hub says, or said when it could last be asked."""
        known = self._known(hub_id)
        if known is not None and (self._settings.is_offline or is_commit(hub_id.revision or "")):
            return known
        if self._settings.is_offline:
            raise HubUnavailable(
                f"{hub_id} is not on this machine, and offline mode is on: unset HF_HUB_OFFLINE to fetch it, or name a"
                f" revision that is in {self._settings.folder}"
            )
        try:
            listing = self._patiently(lambda: self._hub.listing(hub_id))
        except HubUnavailable as error:
            if known is None:
                raise
            log.warning("%s; going on with commit %s, the last that it named", error, known.commit[:8])
            return known
        self._cache.remember(hub_id.revision, listing)
        return listing

    def _known(self, hub_id: HubId) -> Listing | None:
        commit = self._cache.known_commit(hub_id.revision)
        return self._cache.known_listing(commit) if commit else None

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Ask again while it may help. Raises HubUnavailable."""
        delays_s = self._settings.retry_delays_s
        for delay_s in (*delays_s, None):
            self._settings.watch(Transfer(self._cache.repo, 0, 0))
            try:
                return ask()
            except Transient as error:
                if delay_s is None:
                    raise HubUnavailable(
                        f"{self._hub.endpoint} cannot be asked about {self._cache.repo}: {error}; check the network and"
                        " HF_ENDPOINT, or try again later"
                    ) from error
                log.info("%s: %s; asking again in %.1f s", self._cache.repo, error, max(delay_s, error.after_s))
                self._wait(max(delay_s, error.after_s))
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, delay_s: float) -> None:
        """Sleep, but stop when the watcher says so."""
        end = time.monotonic() + delay_s
        while (left := end - time.monotonic()) > 0:
            self._settings.watch(Transfer(self._cache.repo, 0, 0))
            time.sleep(min(left, _WATCH_EVERY_S))
