"""Writes the text of a hardened systemd unit for a user's daemon, from what its configuration says.

A user's own systemd makes most protections from user namespaces. The service sees the file system read-only but for
the folders in which the daemon keeps things, so these are named one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# By this line we know a unit that we may overwrite or remove.
MARK = "# Written by peerd service install, which overwrites it."

_UNIT = """\
{mark}
[Unit]
Description=peerd, a peer that runs language models with others
# A mistake that ends it at once shall not be repeated for ever.
StartLimitIntervalSec=10min
StartLimitBurst=10

[Service]
# It says when it serves, and every second that its event loop turns.
Type=notify
ExecStart={command}
# Downloading and loading a model takes as long as it takes.
TimeoutStartSec=infinity
WatchdogSec=60
# SIGTERM gives open sessions a minute to end.
TimeoutStopSec=90
KillMode=mixed
Restart=on-failure
RestartSec=5
# 2: a mistake in the configuration, or a model that cannot be used.
RestartPreventExitStatus=2
Environment=PYTHONUNBUFFERED=1
UMask=0077

# It writes to its own folders alone.
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
{writable}
PrivateTmp=yes
{devices}ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes

# What the system does for it. MemoryDenyWriteExecute is left out: torch and Triton compile at run time.
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

# peerd takes these for the machine's own limits, and plans within them.
LimitNOFILE=8192
TasksMax=512
OOMPolicy=stop
{limits}
[Install]
WantedBy=default.target
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the unit is to run. writable: folders that the daemon writes to. memory_max, cpu_quota: as systemd has them;
    "" for no limit.
    """

    command: tuple[str, ...]
    writable: tuple[Path, ...]
    has_gpu: bool = False
    memory_max: str = ""
    cpu_quota: str = ""


def unit_text(service: Service) -> str:
    """The unit. Raises ValueError for a path that a unit cannot hold."""
    limits = [("MemoryMax", service.memory_max), ("CPUQuota", service.cpu_quota)]
    return _UNIT.format(
        mark=MARK,
        command=" ".join(map(_quoted, service.command)),
        # A folder that is not there is no reason not to start.
        writable="\n".join(f"ReadWritePaths={_quoted(f'-{path}')}" for path in _outermost(service.writable)),
        devices="" if service.has_gpu else "PrivateDevices=yes\n",
        limits="".join(f"{name}={value}\n" for name, value in limits if value),
    )


def _quoted(text: str) -> str:
    """A word of a unit, in which % and $ mean nothing."""
    if any(not char.isprintable() for char in text):
        raise ValueError(f"{text!r} holds a character that a unit cannot hold")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _outermost(folders: Sequence[Path]) -> list[Path]:
    """The folders without those that lie in another of them."""
    return [one for one in dict.fromkeys(folders) if not any(other in one.parents for other in folders)]
