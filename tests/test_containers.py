"""The container files in contrib/docker: they name what there is, and start the peerd that there is.

Where a builder runs they are built; elsewhere they are only read.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner

from peerd.cli import daemon as cli_daemon
from peerd.cli.commands import starting
from peerd.cli.daemon import Daemon
from peerd.cli.main import cli

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "contrib/docker"
ADDRESS = "/ip4/127.0.0.1/tcp/31330/ws/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, each as one line."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = [[]]
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found[1:]


def copied() -> set[str]:
    """What is copied from the repository."""
    return {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }


def test_all_that_is_copied_exists_and_no_room_of_the_package_is_left_out() -> None:
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert set(rooms.values()) <= copied()
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in copied()} <= set(ignored)


def test_the_image_is_pinned_as_the_lock_file_says_and_keeps_no_downloads() -> None:
    installs = [
        step for word, rest in instructions() if word == "RUN" for step in rest.split("&&") if "pip install" in step
    ]
    assert len(installs) == 3
    assert all("--no-cache-dir" in step for step in installs)
    assert any("-r requirements/run.txt" in step for step in installs)
    names = [line.split("==")[0] for line in (ROOT / "requirements/run.txt").read_text().splitlines()]
    assert "torch" in names


def test_each_argument_is_declared_before_it_is_used_and_bases_name_a_version() -> None:
    declared: set[str] = set()
    for word, rest in instructions():
        if word == "ARG":
            declared.add(rest.split("=")[0])
            assert "=" in rest
        elif word == "FROM":
            assert set(re.findall(r"\$\{(\w+)\}", rest)) <= declared
            assert ":" in rest.split()[0]
            assert not rest.split()[0].endswith(":latest")


def test_the_last_stage_is_no_root_takes_the_built_folder_and_starts_peerd() -> None:
    last = stages()[-1]
    of = dict(last)
    assert of["USER"] not in ("root", "0")
    # Whoever it runs as owns the folders that it writes to.
    assert of["USER"] in next(rest for word, rest in last if word == "RUN" and "install -d" in rest)
    assert of["ENTRYPOINT"] == '["peerd"]'
    built = next(rest.split()[-1] for word, rest in last if word == "COPY" and rest.startswith("--from=build"))
    assert f"PATH={built}/bin:$PATH" in of["ENV"]
    assert of["ENV"].split("XDG_STATE_HOME=")[1].split()[0] + "/peerd" in of["VOLUME"]


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return found


def command_of(service: dict[str, Any], environment: dict[str, str]) -> list[str]:
    """What a service's shell runs, with compose's variables filled in and the address that the bootstrap wrote."""
    (text,) = service["command"]
    text = re.sub(r"(?<!\$)\$\{(\w+):-([^}]*)\}", lambda found: environment.get(found[1], found[2]), text)
    text = text.replace("$$", "$").replace('"$(head -n 1 /var/cache/peerd/addresses)"', ADDRESS)
    words = shlex.split(text)
    assert words[:2] == ["exec", "peerd"]
    return words[2:]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Daemon]:
    found: list[Daemon] = []

    async def run_daemon(daemon: Daemon) -> None:
        found.append(daemon)

    monkeypatch.setattr(cli_daemon, "run_daemon", run_daemon)
    monkeypatch.setattr(starting, "set_up_logging", lambda *_arguments, **_options: None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return found


def start(arguments: list[str]) -> None:
    # The shell takes what stands behind the sign for itself.
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    result = CliRunner().invoke(cli, arguments, prog_name="peerd")
    assert result.exit_code == 0, result.stderr


def test_the_swarm_has_three_peers_of_one_model_and_one_of_them_is_the_bootstrap(started: list[Daemon]) -> None:
    for service in services().values():
        start(command_of(service, {}))
    assert len(started) == 3
    bootstraps = [daemon for daemon in started if not daemon.config.bootstrap]
    servers = [daemon for daemon in started if daemon.config.serve]
    assert (len(bootstraps), len(servers)) == (1, 2)
    assert bootstraps[0].offer is not None
    assert {spec.model for daemon in servers for spec in daemon.config.serve} == {bootstraps[0].offer.models[0][1]}


def test_the_model_and_the_number_of_blocks_are_variables(started: list[Daemon]) -> None:
    start(command_of(services()["server-1"], {"MODEL": "org/name", "BLOCKS": "8"}))
    (spec,) = started[0].config.serve
    assert (spec.model, spec.blocks) == ("org/name", 8)


def test_services_wait_for_the_addresses_and_share_only_the_models() -> None:
    found = services()
    whole = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    assert found["bootstrap"]["healthcheck"]["test"][-1] == "/var/cache/peerd/addresses"
    assert found["bootstrap"]["command"][0].endswith("> /var/cache/peerd/addresses")
    states = []
    for name, service in found.items():
        if name != "bootstrap":
            assert service["depends_on"] == {"bootstrap": {"condition": "service_healthy"}}
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        mounts = dict(volume.split(":", 1) for volume in service["volumes"])
        assert mounts.keys() <= whole["volumes"].keys()
        states += [volume for volume, path in mounts.items() if path == "/var/lib/peerd"]
        assert mounts["models"] == "/var/cache/peerd"
    assert len(set(states)) == len(found)
    assert all(port.startswith("127.0.0.1:") for service in found.values() for port in service.get("ports", ()))


def builder_runs() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not builder_runs(), reason="no docker daemon runs here")
def test_the_image_builds_and_answers() -> None:
    build = ["docker", "build", "-q", "-f", str(FOLDER / "Dockerfile"), str(ROOT)]
    image = subprocess.run(build, capture_output=True, text=True, check=True).stdout.strip()
    shown = subprocess.run(["docker", "run", "--rm", image, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("peerd")
