"""Which adapters of one engine new sessions may ask for, and which are to be unloaded.

An adapter that the operator withdraws stays until its last session ends; a client's own adapter leaves with its
session. Nothing is loaded or unloaded here: `engine_task.py` does that, between two batches.
"""

from __future__ import annotations

from itertools import count

from peerd.compute.engine.engine import PRIVATE, BaseEngine


class EngineAdapters:
    """The adapters of one engine, by name."""

    def __init__(self, engine: BaseEngine) -> None:
        self._engine = engine
        # Adapters that no new session gets, and those that no session uses any more.
        self._withdrawn: set[str] = set()
        self._unused: list[str] = []
        self._own_numbers = count()

    def __repr__(self) -> str:
        return f"<EngineAdapters {sorted(self.offered)} unused={self._unused}>"

    @property
    def offered(self) -> frozenset[str]:
        """The adapters that new sessions may ask for."""
        loaded = self._engine.adapters - self._withdrawn
        return frozenset(name for name in loaded if not name.startswith(PRIVATE))

    @property
    def are_unused(self) -> bool:
        """Whether there are adapters to unload."""
        return bool(self._unused)

    def new_private_name(self) -> str:
        """A name for one client's own adapter, which no other session may ask for."""
        return f"{PRIVATE}{next(self._own_numbers)}"

    def withdraw(self, name: str) -> None:
        """Offer the adapter to no new session. Raises KeyError if it is not offered."""
        if name not in self.offered:
            raise KeyError(name)
        self._withdrawn.add(name)
        self.released(name)

    def released(self, name: str) -> None:
        """Note that a session no longer uses the adapter, which may be its last use."""
        leaves = name.startswith(PRIVATE) or name in self._withdrawn
        if leaves and not self._engine.uses_adapter(name):
            self._unused.append(name)

    def take_unused(self) -> list[str]:
        """The adapters to unload now; the caller calls `unloaded` for each."""
        names, self._unused = self._unused, []
        return names

    def unloaded(self, name: str) -> None:
        """Note that the adapter is unloaded: one of the same name may be loaded and offered again."""
        self._withdrawn.discard(name)
