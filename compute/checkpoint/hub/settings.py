"""Settings for using the hub: its URL, the cache's folder, the limit on disk space, and the watcher.

Settings that are left out come from the environment, as in huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HOME and
HF_HUB_CACHE, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

# The waits between retries if no byte arrives: half a minute in all. In that time a hub restarts or a laptop changes
# networks.
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True)
class Transfer:
    """The progress of a transfer: bytes that are here, of all that are wanted. `name` is the model's."""

    name: str
    done_bytes: int
    total_bytes: int


#: Called about ten times a second while files are fetched or waited for, in the thread that wants them. An exception
#: of it stops the transfer; what arrived is kept for the next time.
Watch = Callable[[Transfer], None]


def _unwatched(transfer: Transfer) -> None:
    pass


@dataclass(frozen=True, slots=True)
class HubSettings:
    """How to use the hub. `disk_bytes` limits what all peerd processes of this user download, together."""

    disk_bytes: int | None = None
    endpoint: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    offline: bool | None = None
    retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S
    watch: Watch = _unwatched

    @property
    def folder(self) -> Path:
        """The folder of huggingface_hub's cache, which every program that uses huggingface_hub shares."""
        from huggingface_hub import constants

        return (self.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().absolute()

    @property
    def is_offline(self) -> bool:
        """Whether peerd may use only files that are on this machine."""
        from huggingface_hub import constants

        return constants.HF_HUB_OFFLINE if self.offline is None else self.offline

    @property
    def own_folder(self) -> Path:
        """The folder in which peerd keeps its records about those files."""
        return Path(platformdirs.user_cache_dir("peerd")) / "hub"
