"""The folder of a checkpoint that is one commit of a repository on the hub.

A revision is resolved to a commit once, so that all files are of one commit even if the publisher pushes meanwhile.
Files that were read or fetched stay on this disk until the folder is closed. A peer must also start while the hub is
unreachable: the hub's last answers, or the files that other programs left in the shared cache, are then enough.
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
from peerd.compute.checkpoint.hub.http import Fetchable, Hub, HubPiece, Listing, Transient
from peerd.compute.checkpoint.hub.id import HubId, is_commit
from peerd.compute.checkpoint.hub.settings import HubSettings, Transfer
from peerd.compute.checkpoint.safetensors_file import StoredTensor, header_length, parse_header
from peerd.compute.errors import CheckpointError, HubUnavailableError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A header of 100 KB holds a thousand tensors: most files need one request.
_HEADER_GUESS_BYTES = 100_000
_WATCH_EVERY_S = 0.1


class HubFolder:
    """Implements `Folder`. Raises HubUnavailableError, or CheckpointError if the revision cannot be resolved."""

    def __init__(self, hub_id: HubId, settings: HubSettings) -> None:
        self._settings = settings
        self._hub = Hub(settings)
        self._cache = HubCache(settings, hub_id.repo)
        self._held: dict[str, int] = {}
        self._pieces: dict[str, HubPiece] = {}
        self._closed = False
        self._listing = self._resolve(hub_id)
        log.info("%s is commit %s", hub_id, self._listing.commit)
        self._fetcher = Fetcher(self._hub, self._cache, settings)

    @property
    def where(self) -> Path:
        return self._cache.snapshot(self._listing.commit)

    @property
    def commit(self) -> str:
        """The commit to which the revision was resolved."""
        return self._listing.commit

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def names(self) -> Collection[str]:
        """The names of all files of the commit, on this machine or on the hub."""
        return self._listing.files.keys()

    def on_disk(self, name: str) -> bool:
        file = self._find(name)
        return (self.where / name).exists() or (file is not None and self._cache.blob(file).is_file())

    def download_bytes(self, name: str) -> int:
        return self._file(name).size

    def fetch(self, names: Collection[str]) -> None:
        files = [self._file(name) for name in sorted(set(names)) if name not in self._held]
        if files:
            self._held |= self._fetcher.obtain(self._listing, files)
            if self._closed:
                # The caller closed the folder while this thread was still fetching.
                self.close()

    def cut(self, name: str, start: int, end: int) -> str:
        """The name, in this folder, of the bytes of a file from `start` up to `end`, a file of its own."""
        piece = HubPiece(self._listing.files[name], start, end)
        return self._pieces.setdefault(piece.name, piece).name

    def room_bytes(self) -> int | None:
        """What the limit of disk space leaves beside the pieces that are held now; None if there is no limit."""
        limit = self._settings.disk_bytes
        return None if limit is None else limit - sum(map(self.download_bytes, self._held.keys() & self._pieces.keys()))

    def path(self, name: str) -> Path:
        self.fetch([name])
        return self.where / name

    def tensors(self, name: str) -> Mapping[str, StoredTensor]:
        file = self._file(name)
        if self._settings.is_offline:
            self.fetch([name])  # # raises if the file is not on this machine
        where = self.where / name

        def read(start: int, end: int) -> bytes:
            return self._patiently(lambda: self._hub.read_range(self._listing, file, start, min(end, file.size)))

        data = read(0, _HEADER_GUESS_BYTES)
        end = 8 + header_length(data[:8], file.size, where)
        if end > len(data):
            data += read(len(data), end)
        return parse_header(data[8:end], file.size, where)

    def sha256(self, name: str) -> bytes:
        file = self._file(name).whole
        # A file that is not in LFS is small, and the hub lists a hash of another kind for it.
        return bytes.fromhex(file.sha256) if file.sha256 else file_digest(self.path(name))

    def close(self) -> None:
        self._closed = True
        while self._held:
            os.close(self._held.popitem()[1])

    def _find(self, name: str) -> Fetchable | None:
        return self._pieces.get(name) or self._listing.files.get(name)

    def _file(self, name: str) -> Fetchable:
        if (file := self._find(name)) is not None:
            return file
        reason = f"; offline mode is on, and it may only be missing here: {self.where}"
        raise CheckpointError(
            f"{self._cache.repo} has no file {name} in commit {self._listing.commit[:8]}"
            f"{reason if self._settings.is_offline else ''}"
        )

    def _resolve(self, hub_id: HubId) -> Listing:
        """The files of the revision: from the hub, or from its last answer if the hub cannot be reached."""
        known = self._known(hub_id)
        if known is not None and (self._settings.is_offline or is_commit(hub_id.revision or "")):
            return known
        if self._settings.is_offline:
            raise HubUnavailableError(
                f"{hub_id} is not on this machine, and offline mode is on: unset HF_HUB_OFFLINE to fetch it, or name a"
                f" revision that is in {self._settings.folder}"
            )
        try:
            listing = self._patiently(lambda: self._hub.listing(hub_id))
        except HubUnavailableError as error:
            if known is None:
                raise
            log.warning("%s; using commit %s, from the hub's last answer", error, known.commit[:8])
            return known
        self._cache.remember(hub_id.revision, listing)
        return listing

    def _known(self, hub_id: HubId) -> Listing | None:
        commit = self._cache.known_commit(hub_id.revision)
        return self._cache.known_listing(commit) if commit else None

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Ask, and ask again after failures that may pass. Raises HubUnavailableError."""
        delays_s = self._settings.retry_delays_s
        for delay_s in (*delays_s, None):
            self._settings.watch(Transfer(self._cache.repo, 0, 0))
            try:
                return ask()
            except Transient as error:
                if delay_s is None:
                    raise HubUnavailableError(
                        f"{self._hub.endpoint} cannot be asked about {self._cache.repo}: {error}; check the network and"
                        " HF_ENDPOINT, or try again later"
                    ) from error
                log.info("%s: %s; asking again in %.1f s", self._cache.repo, error, max(delay_s, error.after_s))
                self._wait(max(delay_s, error.after_s))
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, delay_s: float) -> None:
        """Sleep, but let the watcher end the sleep by raising."""
        end = time.monotonic() + delay_s
        while (left := end - time.monotonic()) > 0:
            self._settings.watch(Transfer(self._cache.repo, 0, 0))
            time.sleep(min(left, _WATCH_EVERY_S))
