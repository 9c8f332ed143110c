"""The looks themselves: at files in a folder, at processes that crash, at peers in memory, at a hub on loopback."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from peerd.cli.commands import running
from peerd.cli.console import Working
from peerd.cli.doctor import doctor as doctor_module
from peerd.cli.doctor.doctor import DEADLINE_S, look_at_all
from peerd.cli.doctor.facts import HubFact, TrialFact
from peerd.cli.doctor.finding import Finding, Level, ok
from peerd.cli.doctor.look_daemon import look_at_daemon
from peerd.cli.doctor.look_here import (
    look_at_folder,
    look_at_key,
    look_at_limits,
    look_at_packages,
    look_at_state,
    look_at_token,
)
from peerd.cli.doctor.look_hub import look_at_hub
from peerd.cli.doctor.look_swarm import look_at_swarm
from peerd.cli.doctor.run_trials import run_trial
from peerd.cli.doctor.trials import TRIALS, TrialFailed, result_of
from peerd.cli.keys.identity_file import load_or_create_identity
from peerd.cli.main import cli
from peerd.compute.checkpoint.hub.settings import HubSettings
from peerd.compute.llamacpp import library
from peerd.compute.llamacpp.span_model import LlamaSpan
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import Identity
from tests.compute.llamacpp.conftest import needs_llamacpp
from tests.fakes.hub.server import open_hub
from tests.fakes.reach_fixture import EPOCH, HOME, PUBLIC, ROUTER, World, world

QUIET = Working(None, "")


# Files.


def test_looking_at_a_key_names_its_peer_and_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    assert not look_at_key(path).file.exists
    assert list(tmp_path.iterdir()) == []
    with load_or_create_identity(path) as identity:
        fact = look_at_key(path)
        assert fact.in_use
        assert fact.peer_id == str(identity.peer_id)
    assert not look_at_key(path).in_use
    assert fact.file.problem == ""


@pytest.mark.parametrize("content", [b"", b"no key", b"\xff" * 100])
def test_a_file_without_a_key_is_a_problem(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o640)
    fact = look_at_key(path)
    assert "holds no unencrypted Ed25519 key" in fact.file.problem
    assert fact.file.mode == 0o640
    assert fact.peer_id == ""


def test_looking_at_a_key_leaves_its_lock_free(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"x")
    look_at_key(path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_state_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    state = tmp_path / "identity.state"
    state.mkdir(mode=0o700)
    (state / "seq").write_text("12\n")
    (state / "contacts.json").write_text("[" * 100_000)
    (state / "convictions.json").mkdir()
    found = {fact.path.name: fact for fact in look_at_state(tmp_path / "identity.key")}
    assert found["identity.state"].problem == found["seq"].problem == ""
    assert found["contacts.json"].problem == "is damaged"
    assert found["convictions.json"].problem == "is not a file"
    assert not found["contributions.json"].exists


def test_a_short_token_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "api.token"
    path.write_text("short")
    assert look_at_token(path).problem == "is damaged"
    path.write_text("t" * 32)
    assert look_at_token(path).problem == ""


def test_a_folder_that_is_not_there_has_the_space_of_the_one_above(tmp_path: Path) -> None:
    fact = look_at_folder(tmp_path / "a" / "b", "models")
    assert fact.free_bytes > 0
    assert fact.is_writable


def test_the_own_packages_fit_the_own_ranges() -> None:
    packages = look_at_packages()
    assert {"trio", "torch", "transformers"} <= {package.name for package in packages}
    assert [package for package in packages if not package.fits] == []
    assert look_at_limits().peers >= 1


# Trials, in processes of their own.


@pytest.mark.real_time
@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed (SIGSEGV)"),
        ("raise SystemExit('no libcuda')", "ended with 1: no libcuda"),
        ("print('loading'); print('no JSON')", "ended with 0"),
        ("print('[1]')", "ended with 0"),
        ('print(\'{"problem": "a\\\\nb", "fix": "c"}\')', "a b"),
    ],
)
async def test_a_trial_that_crashes_is_a_finding(program: str, problem: str) -> None:
    fact = await run_trial("triton", (sys.executable, "-c", program))
    assert problem in fact.problem
    assert fact.fix
    assert not fact.is_needed


@pytest.mark.real_time
async def test_a_trial_writes_its_result_in_the_last_line() -> None:
    program = "print('noise'); print('{\"said\": \"cpu computes\"}')"
    assert await run_trial("device", (sys.executable, "-c", program)) == TrialFact(
        "device", "cpu computes", is_needed=True
    )


async def test_a_trial_that_hangs_is_ended() -> None:
    fact = await run_trial("device", (sys.executable, "-c", "import time; time.sleep(600)"))
    assert "hung" in fact.problem
    assert fact.is_needed


async def test_a_trial_that_cannot_start_is_a_finding() -> None:
    assert "cannot be tried" in (await run_trial("device", ("/no/such/program",))).problem


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_the_trials_compute_here(name: str) -> None:
    assert "said" in result_of(TRIALS[name])


def test_llamacpp_is_no_problem_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_installed", bool)
    assert "pip install 'peerd[llamacpp]'" in result_of(TRIALS["llamacpp"])["said"]


@needs_llamacpp
def test_a_llamacpp_that_computes_something_else_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    run = LlamaSpan.trace
    monkeypatch.setattr(LlamaSpan, "trace", lambda self, *given: [2 * output for output in run(self, *given)])
    result = result_of(TRIALS["llamacpp"])
    assert "differs by" in result["problem"]
    assert "pip install --force-reinstall" in result["fix"]


def test_a_trial_says_why_it_failed() -> None:
    def missing() -> str:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    def wrong() -> str:
        raise TrialFailed("computes wrong products", "install the driver again")

    def odd() -> str:
        raise OSError("libcuda.so.1")

    assert result_of(missing)["problem"].startswith("cannot import torch")
    assert result_of(wrong) == {"problem": "computes wrong products", "fix": "install the driver again"}
    assert result_of(odd)["problem"] == "OSError: libcuda.so.1"


# The swarm.


async def look(around: World, host: str, *, behind_s: float = 0.0, **options: Any) -> Any:
    return await look_at_swarm(
        around.transport(host),
        around.bootstrap,
        [Multiaddr.parse(f"/ip4/{host}/tcp/31330/ws")],
        now=lambda: EPOCH + trio.current_time() - behind_s,
        **options,
    )


async def test_bootstrap_peers_say_the_time_the_delay_and_dial_back() -> None:
    async with world() as around:
        await around.internet(3)
        fact = await look(around, PUBLIC[4], behind_s=100.0)
        assert [peer.problem for peer in fact.bootstrap] == ["", "", ""]
        assert all(abs(peer.ahead_s - 100.0) < 0.1 for peer in fact.bootstrap)
        assert all(peer.rtt_s == pytest.approx(0.02) for peer in fact.bootstrap)
        assert len({peer.network for peer in fact.bootstrap}) == 3
        assert {answer.outcomes for answer in fact.dialled.answers} == {("reached",)}


async def test_a_machine_behind_a_router_is_not_reached() -> None:
    async with world() as around:
        await around.internet(2)
        around.network.put_behind_nat(HOME, ROUTER)
        fact = await look(around, HOME)
        assert fact.dialled.answers
        assert all(outcome != "reached" for answer in fact.dialled.answers for outcome in answer.outcomes)


async def test_a_bootstrap_peer_that_is_gone_is_named_once() -> None:
    async with world() as around:
        await around.internet(1)
        gone = Multiaddr.parse(f"/ip4/{PUBLIC[3]}/tcp/31330/ws").with_peer(Identity.generate().peer_id)
        around.bootstrap = (gone, *around.bootstrap)
        fact = await look(around, PUBLIC[4])
        assert fact.bootstrap[0].problem
        assert str(gone) not in fact.bootstrap[0].problem
        assert fact.bootstrap[1].problem == ""


async def test_each_address_of_a_peer_is_tried() -> None:
    async with world() as around:
        (peer,) = await around.internet(1)
        gone = Multiaddr.parse(f"/ip4/{PUBLIC[3]}/tcp/31330/ws").with_peer(peer.peer_id)
        around.bootstrap = (*around.bootstrap, gone)
        fact = await look(around, PUBLIC[4])
        assert [one.problem for one in fact.bootstrap] == ["", "this peer is not there"]


async def test_another_swarms_key_is_a_problem() -> None:
    async with world() as around:
        await around.internet(1)
        fact = await look(around, PUBLIC[4], swarm_key=bytes(32))
        assert fact.bootstrap[0].problem
        assert fact.dialled.answers == ()


# The hub, the daemon, and all together.


@pytest.mark.real_time
def test_a_hub_is_asked_and_a_silent_one_is_a_problem() -> None:
    with open_hub() as hub:
        assert look_at_hub(HubSettings(endpoint=hub.url, token="hf_bad")).status is not None
    fact = look_at_hub(HubSettings(endpoint="http://127.0.0.1:9"))
    assert fact.status is None
    assert fact.problem
    assert look_at_hub(HubSettings(offline=True)).is_offline


@pytest.mark.real_time
async def test_a_socket_that_no_daemon_holds_is_none(tmp_path: Path) -> None:
    path = tmp_path / "peerd.sock"
    assert (await look_at_daemon(path)).peer_id == ""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.close()
    fact = await look_at_daemon(path)
    assert (fact.peer_id, fact.problem) == ("", "")


@pytest.mark.real_time
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n{", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 500 x"])
async def test_a_daemon_that_answers_nonsense_is_a_problem(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "peerd.sock"

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)
        await stream.aclose()

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        fact = await look_at_daemon(path)
        nursery.cancel_scope.cancel()
    assert fact.problem


async def test_a_look_that_does_not_end_is_a_finding() -> None:
    async def good() -> list[Finding]:
        return [ok("disk", "free")]

    async def endless() -> list[Finding]:
        await trio.sleep_forever()
        raise AssertionError

    started = trio.current_time()
    found = await look_at_all([("the hub", endless), ("files", good)], QUIET)
    assert trio.current_time() - started == DEADLINE_S
    assert [finding.what for finding in found] == ["the hub", "disk"]
    assert found[0].level is Level.WARNING


@pytest.mark.real_time
def test_the_command_prints_findings_and_exits_with_1_on_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "TRIALS", ())
    monkeypatch.setattr(doctor_module, "look_at_hub", lambda _settings: HubFact("http://hub", status=200))
    monkeypatch.setattr(running, "set_up_logging", lambda _level: None)
    key = tmp_path / "identity.key"
    arguments = ["doctor", "--json", "--identity", str(key), "--socket", str(tmp_path / "no.sock")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)["findings"]
    assert {"identity", "state", "disk", "memory", "open files", "versions", "hub", "clock", "swarm", "daemon"} == {
        finding["what"] for finding in findings
    } - {"token"}
    key.write_bytes(b"no key")
    key.chmod(0o600)
    result = CliRunner().invoke(cli, arguments[:1] + arguments[2:])
    assert result.exit_code == 1
    assert f"error: identity: {key} holds no unencrypted Ed25519 key" in result.stdout


def test_a_bootstrap_address_without_a_peer_is_refused() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--bootstrap", "/ip4/127.0.0.1/tcp/1/ws"])
    assert result.exit_code == 2
    assert "add /p2p/" in result.stderr
