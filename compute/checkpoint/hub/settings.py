"""How the hub is used: where it is, where its files are kept, how much they may take, who watches.

What is left out is what huggingface_hub takes from the environment: HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_CACHE,
HF_HUB_OFFLINE. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

# Without a byte in between: about half a minute, in which a hub restarts or a laptop changes networks.
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far a transfer is: bytes that are there, of all that are wanted. `name` is the model's."""

    name: str
    done_bytes: int
    total_bytes: int


#: Called about ten times a second while files are fetched or waited for, in the thread that wants them. Whatever it
#: raises stops the transfer; what arrived is kept for the next time.
Watch = Callable[[Transfer], None]


def _unwatched(transfer: Transfer) -> None:
    pass


@dataclass(frozen=True, slots=True)
class HubSettings:
    """How to use the hub. `disk_bytes` bounds what peerd's own downloads take together, of all its processes."""

    disk_bytes: int | None = None
    endpoint: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    offline: bool | None = None
    retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S
    watch: Watch = _unwatched

    @property
    def folder(self) -> Path:
        """Where huggingface_hub, and so every program that uses it, keeps files."""
        from huggingface_hub import constants

        return (self.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().absolute()

    @property
    def is_offline(self) -> bool:
        """Whether only what is on this machine may be used."""
        from huggingface_hub import constants

        return constants.HF_HUB_OFFLINE if self.offline is None else self.offline

    @property
    def own_folder(self) -> Path:
        """Where peerd keeps what it knows about those files."""
        return Path(platformdirs.user_cache_dir("peerd")) / "hub"
