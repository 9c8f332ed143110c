"""The files in which a peer remembers its sequence number and its contacts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from peerd.routing.dht.dht import Dht
from peerd.routing.dht.table import Contact, load_contacts

log = logging.getLogger(__name__)

_SEQ_FILE = "seq"


_CONTACTS_FILE = "contacts.json"


class _State:
    """What outlives a restart: the routing table and the last `seq`, in a directory; or nothing, without one."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def load(self) -> int:
        """The last `seq`; 0 if none was kept, or the file is damaged: then the clock alone must not go back."""
        text = self._read(_SEQ_FILE)
        if text and not text.strip().isdecimal():
            log.warning("cannot use %s: it holds no number", _SEQ_FILE)
            return 0
        return int(text or "0")

    async def save(self, seq: int) -> None:
        self._write(_SEQ_FILE, f"{seq}\n")

    def load_contacts(self) -> list[Contact]:
        """The peers known before; none if the file is missing or damaged, which costs only a slower start."""
        text = self._read(_CONTACTS_FILE)
        try:
            return load_contacts(text) if text else []
        except ValueError as error:
            log.warning("cannot use %s: %s", _CONTACTS_FILE, error)
            return []

    def save_contacts(self, dht: Dht) -> None:
        # An empty table is no reason to forget whom we knew.
        if dht.contacts:
            self._write(_CONTACTS_FILE, dht.dump())

    def _read(self, name: str) -> str:
        if self._directory is None or not (self._directory / name).exists():
            return ""
        return (self._directory / name).read_text()

    def _write(self, name: str, text: str) -> None:
        # Small, and renamed whole: done here, faster than a thread would start.
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            path = self._directory / name
            new = path.with_suffix(".new")
            new.write_text(text)
            os.replace(new, path)
