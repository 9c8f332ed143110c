"""Installs, removes and looks at a unit of this user's systemd, by `systemctl --user`."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import click
import trio

from peerd.cli.console import say, write
from peerd.cli.service.unit import MARK, Service, unit_text
from peerd.protocol.errors import InvalidRequest

# systemd answers at once, unless it hangs; none of our calls waits for the daemon.
_DEADLINE_S = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def parse_name(value: str) -> str:
    """Parse the name of a unit, without `.service`."""
    name = value.removesuffix(".service")
    if _NAME.fullmatch(name) is None:
        raise click.BadParameter(f"{value!r} is not a name of letters, digits, '.', '_' and '-'")
    return name


def parse_limit(value: str) -> str:
    """Parse a limit as systemd takes it: `90%`, `6G`."""
    if re.fullmatch(r"[1-9][0-9]{0,15}[KMGT%]?", value) is None:
        raise click.BadParameter(f"{value!r} is neither a share such as 90% nor a size such as 6G")
    return value


def parse_share(value: str) -> str:
    """Parse a share of a core: `50%`, `200%`."""
    if re.fullmatch(r"[1-9][0-9]{0,6}%", value) is None:
        raise click.BadParameter(f"{value!r} is not a share such as 200%, which is two cores")
    return value


def unit_path(name: str) -> Path:
    """Where a user's units lie."""
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "systemd/user" / f"{name}.service"


async def install(name: str, service: Service, *, start: bool) -> None:
    """Write the unit, and have systemd start it, now and at each start of the machine. Raises InvalidRequest."""
    path = unit_path(name)
    try:
        await trio.to_thread.run_sync(_write, path, unit_text(service))
    except ValueError as error:
        raise InvalidRequest(f"no unit can be written: {error}") from None
    say(f"{path} runs {' '.join(service.command)}")
    await _systemctl("daemon-reload")
    await _systemctl("enable", name)
    if start:
        await _systemctl("restart", "--no-block", name)
    say(f"{'it starts now; ' if start else ''}its log: journalctl --user -u {name} -f")
    say("so that it runs while you are not logged in: loginctl enable-linger")


async def uninstall(name: str) -> None:
    """Stop the service and remove its unit. The configuration and the key stay. Raises InvalidRequest."""
    path = unit_path(name)
    await trio.to_thread.run_sync(_refuse_foreign, path)
    await _systemctl("disable", "--now", "--no-block", name)
    await trio.Path(path).unlink(missing_ok=True)
    await _systemctl("daemon-reload")
    say(f"{path} is removed; the configuration, the key and the models stay")


async def show(name: str) -> bool:
    """Print what systemd says of the service. Returns whether it runs. Raises InvalidRequest."""
    fields = "LoadState,ActiveState,SubState,UnitFileState,MainPID,NRestarts,StatusText,Result"
    output = await _systemctl("show", "--property", fields, name)
    found = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    if found.get("LoadState") != "loaded":
        raise InvalidRequest(f"there is no service {name}: peerd service install makes one")
    lines = [
        f"service   {name}, {found.get('UnitFileState') or 'unknown'}",
        f"state     {found.get('ActiveState')} ({found.get('SubState')}), process {found.get('MainPID')}",
        f"restarts  {found.get('NRestarts')}, last result: {found.get('Result')}",
        f"unit      {unit_path(name)}",
        f"log       journalctl --user -u {name}",
    ]
    write("\n".join(lines) + "\n")
    return found.get("ActiveState") == "active"


def _write(path: Path, text: str) -> None:
    if path.exists():
        _refuse_foreign(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from None


def _refuse_foreign(path: Path) -> None:
    try:
        is_ours = path.read_text(errors="replace").startswith(MARK)
    except FileNotFoundError:
        raise InvalidRequest(f"there is no {path}, so nothing is removed") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    if not is_ours:
        raise InvalidRequest(f"{path} was not written by peerd, and is left alone: choose another --name")


async def _systemctl(*arguments: str) -> str:
    """What `systemctl --user` prints. Raises InvalidRequest with what it says, if it fails."""
    try:
        with trio.fail_after(_DEADLINE_S):
            done = await trio.run_process(
                ["systemctl", "--user", *arguments],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    except FileNotFoundError:
        raise InvalidRequest(
            "there is no systemctl here: start peerd with what this system has instead of systemd"
        ) from None
    except trio.TooSlowError:
        raise InvalidRequest(f"systemctl --user {arguments[0]} did not end within {_DEADLINE_S:g} s") from None
    if done.returncode:
        problem = " ".join(done.stderr.decode(errors="replace").split()) or f"it ended with {done.returncode}"
        raise InvalidRequest(f"systemctl --user {' '.join(arguments)} failed: {problem}")
    return done.stdout.decode(errors="replace")
