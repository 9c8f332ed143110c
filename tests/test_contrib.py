"""What lies in contrib/ is as hardened as it says, and starts the peerd that there is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from peerd.cli.main import cli

UNIT = Path(__file__).parents[1] / "contrib/systemd/peerd.service"
HARDENING = {
    "NoNewPrivileges": "yes",
    "DynamicUser": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "PrivateUsers": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "ProtectProc": "invisible",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
}


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


def test_the_unit_is_hardened_and_leaves_what_peerd_needs() -> None:
    found = directives()
    assert {name: found[name] for name in HARDENING} == {name: [value] for name, value in HARDENING.items()}
    # How much memory is free stands in /proc/meminfo; compilers write what they execute.
    assert not {"ProcSubset", "MemoryDenyWriteExecute"} & found.keys()
    assert set(found["RestrictAddressFamilies"][0].split()) >= {"AF_INET", "AF_INET6", "AF_UNIX"}


def test_the_unit_waits_for_what_peerd_does() -> None:
    found = directives()
    assert found["Type"] == ["notify"]
    # Twice as long as our own watchdog takes, which says more.
    assert int(found["WatchdogSec"][0]) >= 60
    # More than the minute that open sessions get.
    assert int(found["TimeoutStopSec"][0]) > 60
    assert found["Restart"] == ["on-failure"]


def test_the_unit_gives_peerd_options_that_it_has() -> None:
    program, *arguments = shlex.split(directives()["ExecStart"][0])
    assert program.endswith("/bin/peerd")
    known = {option for parameter in cli.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    # It wants the program to be there.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/peerd/bin/peerd", "/bin/true"))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in ran.stderr.splitlines() if UNIT.name in line]
    assert complaints == []
