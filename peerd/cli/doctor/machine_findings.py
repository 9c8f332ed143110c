"""What the facts about this machine mean for a daemon: pure functions from facts to findings."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from packaging.version import Version

from peerd.cli.doctor.facts import (
    FileFact,
    FolderFact,
    HubFact,
    KeyFact,
    LimitsFact,
    PackageFact,
    TrialFact,
)
from peerd.cli.doctor.finding import Finding, error, ok, warning
from peerd.compute.device.sizes import format_size

# The files that a peer keeps have 3 MB at most, and are written anew beside the old ones.
LEAST_STATE_BYTES = 16 * 2**20
# One shard of a checkpoint in the usual size; blocks of most models are smaller.
LEAST_CACHE_BYTES = 5 * 10**9
# A peer that serves nothing takes some 60 MB, torch and the Python packages some 500 MB more.
LEAST_MEMORY_BYTES = 128 * 2**20
MODEST_MEMORY_BYTES = 2 * 2**30
_FOR_OTHERS = 0o077


def identity_findings(key: KeyFact) -> list[Finding]:
    """Whether a daemon can use the key."""
    what, path = "identity", key.file.path
    if not key.file.exists:
        if key.can_be_made:
            return [ok(what, f"{path} is not there yet: the first daemon makes it")]
        return [error(what, f"{path} cannot be created", "make its folder writable, or give --identity FILE")]
    if not key.file.is_ours:
        return [error(what, f"{path} belongs to another user", "run peerd as that user, or give --identity FILE")]
    if key.file.mode & _FOR_OTHERS:
        said = f"others may read {path} (mode {key.file.mode:04o}), and could pose as this peer"
        return [error(what, said, f"run: chmod 600 {path}; delete it if others may have read it")]
    if key.file.problem:
        fix = "restore the file, or delete it: the next daemon makes a new key, and is another peer"
        return [error(what, f"{path} {key.file.problem}", fix)]
    return [ok(what, f"{path} is {key.peer_id}{', and a daemon uses it now' if key.in_use else ''}")]


def state_findings(files: Sequence[FileFact]) -> list[Finding]:
    """Whether a daemon can use the files that it keeps across restarts."""
    found = []
    for file in files:
        if not file.exists:
            continue
        if not file.is_ours:
            said, fix = f"{file.path} belongs to another user", "run peerd as that user, or give --identity FILE"
            found.append(error("state", said, fix))
        elif file.problem:
            fix = f"delete it: {file.path.name} is made again, and only the next start is slower"
            found.append(warning("state", f"{file.path} {file.problem}", fix))
        elif file.mode & _FOR_OTHERS:
            found.append(
                warning("state", f"others may read {file.path} (mode {file.mode:04o})", f"run: chmod go= {file.path}")
            )
    return found or [ok("state", f"{sum(file.exists for file in files)} files, all readable")]


def token_findings(file: FileFact) -> list[Finding]:
    """Whether the token of the local API is one, and secret."""
    if not file.exists:
        return []
    if not file.is_ours or file.problem:
        return [error("token", f"{file.path} {file.problem or 'belongs to another user'}", "give --token-file FILE")]
    if file.mode & _FOR_OTHERS:
        said = f"others may read {file.path} (mode {file.mode:04o}), and use the local API"
        return [error("token", said, f"delete {file.path} and start the daemon again, which makes a new one")]
    return [ok("token", f"{file.path} is only yours")]


def disk_findings(state: FolderFact, cache: FolderFact) -> list[Finding]:
    """Whether there is room for a peer's files, and for models."""
    found = []
    for folder, least in ((state, LEAST_STATE_BYTES), (cache, LEAST_CACHE_BYTES)):
        said = f"{format_size(folder.free_bytes)} free at {folder.path}, for {folder.holds}"
        if not folder.is_writable:
            fix = "make it writable, or choose another: " + ("--identity FILE" if folder is state else "HF_HOME")
            found.append(error("disk", f"{folder.path}, for {folder.holds}, cannot be written", fix))
        elif folder.free_bytes >= least:
            found.append(ok("disk", said))
        elif folder is state:
            found.append(error("disk", said, "free some space, or give --identity FILE on another disk"))
        else:
            fix = "free some space, give --disk SIZE, which deletes what was not used lately, or set HF_HOME"
            found.append(warning("disk", said, fix))
    return found


def memory_findings(free_bytes: int) -> list[Finding]:
    """Whether there is memory to serve or to use a model; limits of control groups are taken off already."""
    said = f"{format_size(free_bytes)} free, by the machine and the limits of control groups"
    if free_bytes < LEAST_MEMORY_BYTES:
        return [error("memory", said, "end other programs, or raise the limit (MemoryMax= in systemd)")]
    if free_bytes < MODEST_MEMORY_BYTES:
        fix = "enough for a bootstrap peer; to serve, end other programs or raise the limit (MemoryMax= in systemd)"
        return [warning("memory", said, fix)]
    return [ok("memory", said)]


def limits_findings(limits: LimitsFact) -> list[Finding]:
    """Whether enough files may be open for all the peers that want a connection."""
    said = f"{limits.hard} may be open, so {limits.peers} peers can be connected"
    if limits.peers >= limits.most_peers:
        return [ok("open files", said)]
    fix = f"raise the hard limit to {limits.wanted}: ulimit -Hn, or LimitNOFILE= in systemd"
    return [warning("open files", said, fix)]


def version_findings(packages: Sequence[PackageFact], newest_tested: str) -> list[Finding]:
    """Whether the packages that peerd stands on are those that it was tested with."""
    found = []
    for package in packages:
        wanted = f"{package.name}{package.wanted}"
        if package.installed is None:
            found.append(error("versions", f"{package.name} is not installed", f"run: pip install '{wanted}'"))
        elif not package.fits:
            said = f"{package.name} {package.installed} is installed, and peerd needs {wanted}"
            found.append(error("versions", said, f"run: pip install '{wanted}'"))
        elif package.name == "transformers" and _release(package.installed) > _release(newest_tested):
            said = f"transformers {package.installed} is newer than {newest_tested}, the newest that was tested"
            found.append(warning("versions", said, f"if a model fails: pip install 'transformers=={newest_tested}.*'"))
    return found or [ok("versions", f"{len(packages)} packages, all in the tested range")]


def _release(version: str) -> tuple[int, ...]:
    """A version's first two numbers: a patch release changes nothing that was tested."""
    return Version(version).release[:2]


def hub_findings(hub: HubFact) -> list[Finding]:
    """Whether models can be fetched from the hub. Without it everything works with models on this machine."""
    what = "hub"
    if hub.is_offline:
        return [warning(what, "HF_HUB_OFFLINE forbids asking it", "unset it to fetch models; those here can be used")]
    if hub.status is None:
        way = "check the proxy that HTTPS_PROXY names" if hub.is_proxied else "check the network"
        fix = f"{way}, or HF_ENDPOINT; models on this machine can be used, with HF_HUB_OFFLINE=1 at once"
        return [warning(what, f"{hub.endpoint} does not answer: {hub.problem}", fix)]
    if hub.status == 401 and hub.has_token:
        return [warning(what, f"{hub.endpoint} refuses the token", "check HF_TOKEN, or run: hf auth login")]
    if hub.status >= 400 and hub.status != 401:
        said = f"{hub.endpoint} answers {hub.status}"
        return [warning(what, said, "check HF_ENDPOINT, or try again later")]
    return [ok(what, f"{hub.endpoint} answers{', and takes the token' if hub.has_token else ''}")]


def trial_findings(trial: TrialFact) -> list[Finding]:
    """Whether a package or device computes what it should."""
    if not trial.problem:
        return [ok(trial.name, trial.said)]
    make = error if trial.is_needed else warning
    return [make(trial.name, trial.problem, trial.fix)]


def clock_findings(ahead_s: Sequence[float], *, is_kept: bool, limit_s: float, warn_s: float) -> list[Finding]:
    """Whether this machine's clock is the swarm's. `ahead_s`: how far the clocks of others are ahead of ours, one for
    each network. `limit_s`: how far a daemon may correct its clock.
    """
    what, fix = "clock", "set the clock, and keep it right by NTP: timedatectl set-ntp true"
    if not ahead_s:
        if is_kept:
            return [ok(what, "the system keeps it right; no peer was asked")]
        return [warning(what, "no program keeps it right, and no peer was asked", f"{fix}; or give --bootstrap")]
    offset_s = median(ahead_s)
    said = f"{abs(offset_s):.1f} s {'behind' if offset_s > 0 else 'ahead of'} {_peers(len(ahead_s))}"
    if abs(offset_s) <= warn_s:
        return [ok(what, said)]
    if len(ahead_s) == 1:
        return [warning(what, f"{said}: one of the two is wrong", fix)]
    if abs(offset_s) <= limit_s:
        return [warning(what, f"{said}, which a daemon makes up for", fix)]
    return [error(what, f"{said}: others do not see what this peer announces, nor it what they do", fix)]


def _peers(count: int) -> str:
    return "one peer" if count == 1 else f"the median of {count} peers"
