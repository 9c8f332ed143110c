"""`peerd service` with a systemctl that only notes what it is asked, and systemd's own check of the unit."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from peerd.cli.main import cli
from peerd.cli.service.systemd import unit_path
from peerd.cli.service.unit import MARK, Service, unit_text

pytestmark = pytest.mark.real_time

SHOWN = """\
LoadState={load}
ActiveState={active}
SubState=running
UnitFileState=enabled
MainPID=123
NRestarts=2
StatusText=
Result=success
"""


class Systemctl:
    """A program on the path in place of systemctl."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "asked"
        self._program = folder / "systemctl"
        self.answer("")

    def answer(self, text: str, status: int = 0) -> None:
        said = shlex.quote(text)
        where = "" if status == 0 else " >&2"
        self._program.write_text(f'#!/bin/sh\necho "$@" >> {self._log}\nprintf %s {said}{where}\nexit {status}\n')
        self._program.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemctl:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for variable, name in (("XDG_CONFIG_HOME", "config"), ("XDG_STATE_HOME", "state"), ("XDG_CACHE_HOME", "cache")):
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return Systemctl(folder)


@pytest.fixture
def config(systemctl: Systemctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "a $daemon 100%.toml"
    path.write_text('listen = "/ip4/0.0.0.0/tcp/31330/ws"\n')
    monkeypatch.setenv("PEERD_CONFIG", str(path))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["service", *arguments], prog_name="peerd")


def directives(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in text.splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


def test_install_writes_a_unit_and_starts_it_without_waiting(config: Path, systemctl: Systemctl) -> None:
    result = run("install", "--cpu-quota", "150%")
    assert result.exit_code == 0, result.output
    assert systemctl.asked == [
        "--user daemon-reload",
        "--user enable peerd",
        "--user restart --no-block peerd",
    ]
    assert "journalctl --user -u peerd" in result.stderr
    assert "enable-linger" in result.stderr
    found = directives(unit_path("peerd").read_text())
    assert (found["MemoryMax"], found["CPUQuota"]) == (["90%"], ["150%"])
    # As systemd reads it: without quotes, and with %% and $$ for % and $.
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(found["ExecStart"][0])]
    assert words == [sys.executable, "-P", "-m", "peerd", "--config", str(config)]


def test_the_unit_is_hardened_but_for_what_the_daemon_needs(config: Path, tmp_path: Path) -> None:
    config.write_text(f'client = true\nsocket = "{tmp_path}/api/s.sock"\nidentity = "{tmp_path}/keys/a.key"\n')
    assert run("install", "--no-start").exit_code == 0
    found = directives(unit_path("peerd").read_text())
    for name in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "RestrictNamespaces", "LockPersonality"):
        assert found[name] == ["yes"]
    assert (found["ProtectSystem"], found["ProtectHome"]) == (["strict"], ["read-only"])
    assert not {"ProcSubset", "MemoryDenyWriteExecute"} & found.keys()
    writable = {shlex.split(each)[0].removeprefix("-") for each in found["ReadWritePaths"]}
    wanted = {f"{tmp_path}/{name}" for name in ("state/peerd", "cache/peerd", "run", "api", "keys")}
    assert wanted <= writable
    assert all(Path(folder).is_dir() for folder in wanted)
    assert str(tmp_path) not in writable
    assert found["Type"] == ["notify"]
    assert int(found["TimeoutStopSec"][0]) > 60


def test_a_gpu_can_be_seen_by_the_service_that_uses_it(config: Path) -> None:
    config.write_text('serve-blocks = "auto"\nmodel = "org/name"\ndevice = "cpu"\n')
    run("install")
    assert "PrivateDevices" in directives(unit_path("peerd").read_text())


def test_no_private_devices_where_there_is_a_gpu() -> None:
    assert "PrivateDevices" not in unit_text(Service(command=("peerd",), writable=(), has_gpu=True))


@pytest.mark.parametrize("text", ['log-format = "json"\n', None])
def test_a_configuration_that_describes_no_daemon_is_refused(
    config: Path, systemctl: Systemctl, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is None:
        monkeypatch.delenv("PEERD_CONFIG")
    else:
        config.write_text(text)
    # What only this shell knows does not count.
    monkeypatch.setenv("PEERD_CLIENT", "true")
    result = run("install")
    assert result.exit_code == 2
    assert "does not say what the daemon is to be" in result.stderr
    assert "peerd config init" in result.stderr
    assert not systemctl.asked
    assert not unit_path("peerd").exists()


def test_a_mistake_in_the_configuration_is_found_before_anything_is_written(config: Path) -> None:
    config.write_text("client = 1\n")
    assert "neither true nor false" in run("install").stderr
    assert not unit_path("peerd").exists()


def test_uninstall_removes_the_unit_and_nothing_else(config: Path, systemctl: Systemctl, tmp_path: Path) -> None:
    run("install", "--name", "peerd-b", "--no-start")
    before = {path for path in tmp_path.rglob("*") if path.name != "asked"}
    result = run("uninstall", "--name", "peerd-b.service")
    assert result.exit_code == 0
    assert systemctl.asked[-2:] == ["--user disable --now --no-block peerd-b", "--user daemon-reload"]
    assert before - {path for path in tmp_path.rglob("*")} == {unit_path("peerd-b")}
    again = run("uninstall", "--name", "peerd-b")
    assert again.exit_code == 2
    assert "nothing is removed" in again.stderr


def test_a_unit_of_the_user_s_own_is_left_alone(config: Path, systemctl: Systemctl) -> None:
    path = unit_path("peerd")
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/bin/true\n")
    for command in ("install", "uninstall"):
        result = run(command)
        assert result.exit_code == 2
        assert "left alone" in result.stderr
    assert path.read_text().startswith("[Service]")
    assert not systemctl.asked


def test_status_says_whether_it_runs_also_by_its_exit_code(config: Path, systemctl: Systemctl) -> None:
    for active, code in (("active", 0), ("failed", 1)):
        systemctl.answer(SHOWN.format(load="loaded", active=active))
        result = run("status")
        assert result.exit_code == code
        assert f"state     {active} (running), process 123" in result.stdout
    systemctl.answer(SHOWN.format(load="not-found", active="inactive"))
    result = run("status")
    assert result.exit_code == 2
    assert "peerd service install makes one" in result.stderr


def test_what_systemctl_says_is_passed_on(config: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl.answer("Failed to connect to bus:\nNo medium found\n", 1)
    result = run("install")
    assert result.exit_code == 2
    assert "daemon-reload failed: Failed to connect to bus: No medium found" in result.stderr
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no systemctl here" in run("status").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "a/b"), "is not a name"),
        (("--name", "-x"), "is not a name"),
        (("--memory-max", "much"), "neither a share"),
        (("--memory-max", "6G\nExecStart=/bin/sh"), "neither a share"),
        (("--cpu-quota", "2"), "such as 200%"),
    ],
)
def test_a_wrong_option_is_refused(config: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("install", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_path_that_a_unit_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        unit_text(Service(command=("peerd", "--config", "a\nExecStartPre=/bin/sh"), writable=()))


def test_a_folder_in_another_one_is_not_named_twice() -> None:
    paths = tuple(map(Path, ("/a/b", "/a", "/a/b/c", "/d", "/d")))
    found = directives(unit_text(Service(command=("peerd",), writable=paths)))["ReadWritePaths"]
    assert found == ['"-/a"', '"-/d"']


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "peerd.service"
    service = Service(
        command=("/bin/true", "a b", 'c"d', "100%", "$HOME"),
        writable=(tmp_path / "with space",),
        memory_max="6G",
        cpu_quota="150%",
    )
    unit.write_text(unit_text(service))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--user", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert [line for line in ran.stderr.splitlines() if unit.name in line] == []
    assert unit.read_text().startswith(MARK)
