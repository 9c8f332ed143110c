"""What the doctor reads and measures, as plain values: what they mean is decided elsewhere, in `*_findings.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peerd.protocol.addresses import Multiaddr
    from peerd.protocol.messages.dialback import Dialled


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFact:
    """A file of ours as it lies on the disk. `problem`: why its content cannot be used; "" if it can, or is missing."""

    path: Path
    exists: bool = True
    mode: int = 0o600
    is_ours: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFact:
    """The file with the peer's key. `peer_id`: whose key it is, if it can be read; `in_use`: a daemon holds it now.

    can_be_made: whether the missing file could be created.
    """

    file: FileFact
    peer_id: str = ""
    in_use: bool = False
    can_be_made: bool = True


@dataclass(frozen=True, slots=True)
class FolderFact:
    """A folder, or the nearest one above it that exists; `holds` says in words what peerd keeps there."""

    path: Path
    holds: str
    free_bytes: int
    is_writable: bool


@dataclass(frozen=True, slots=True)
class PackageFact:
    """A package that peerd needs, by its wanted versions; `installed` is None if it is missing."""

    name: str
    wanted: str
    installed: str | None
    fits: bool


@dataclass(frozen=True, slots=True)
class LimitsFact:
    """The limits of open files: what the system allows this user, and how many peers can then be connected."""

    hard: int
    wanted: int
    peers: int
    most_peers: int


@dataclass(frozen=True, slots=True)
class HubFact:
    """What the hub said. `status`: of the HTTP answer, None if there was none, which `problem` explains.

    is_offline: the environment forbids asking it. has_token: a token was sent. is_proxied: the environment names a
    proxy for such requests.
    """

    endpoint: str
    is_offline: bool = False
    status: int | None = None
    problem: str = ""
    has_token: bool = False
    is_proxied: bool = False


@dataclass(frozen=True, slots=True)
class TrialFact:
    """How a trial in a process of its own ended. `said`: its result; `problem`: why it has none, and `fix` what to do.

    is_needed: whether peerd serves nothing without it.
    """

    name: str
    said: str = ""
    problem: str = ""
    fix: str = ""
    is_needed: bool = False


@dataclass(frozen=True, slots=True)
class BootstrapFact:
    """How a bootstrap peer answered; `problem` says why it did not.

    relay: the PeerId of the relay through which we speak. ahead_s: how far its clock is ahead of ours. network: the
    public network in which it lives, for peers of one network count as one witness.
    """

    address: Multiaddr
    problem: str = ""
    rtt_s: float | None = None
    relay: str = ""
    ahead_s: float = 0.0
    network: str = ""


@dataclass(frozen=True, slots=True)
class DialFact:
    """What peers said when they were asked to dial our ports: `answers`, and for the others why they did not."""

    ports: tuple[int, ...] = ()
    answers: tuple[Dialled, ...] = ()
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SwarmFact:
    """What the bootstrap peers showed. `problem`: why none could be asked."""

    bootstrap: tuple[BootstrapFact, ...] = ()
    dialled: DialFact = DialFact()
    may_be_relayed: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class DaemonFact:
    """The daemon on this machine, as it describes itself; `problem`: why it does not answer; neither: none runs."""

    socket_path: Path
    version: str = ""
    peer_id: str = ""
    reach: str = ""
    why: str = ""
    relays: tuple[str, ...] = ()
    peers: int = 0
    gaps: tuple[str, ...] = ()
    problem: str = ""
