"""Whole swarms of real processes: the demonstration, and a swarm that loses a server without a twin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from peerd.cli.demo import even_spans
from peerd.compute.checkpoint.demo_model import demo_model_path
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.errors import InvalidRequest

pytestmark = [pytest.mark.processes, pytest.mark.model, pytest.mark.real_time]

PEERD = [sys.executable, "-m", "peerd"]
LOOPBACK = ["--listen", "/ip4/127.0.0.1/tcp/0/ws"]
# Only what hangs takes as long; the second is half of what a daemon would give to sessions that do not end.
ANSWER_S = 120
STOP_S = 30


class Daemon:
    """A `peerd` daemon and what it printed."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        self.addresses: list[str] = []

    def wait_until_up(self, addresses: int = 1) -> None:
        assert self.process.stdout is not None
        for _ in range(addresses):
            line = self.process.stdout.readline().strip()
            assert line, self.log
            self.addresses.append(line)

    @property
    def log(self) -> str:
        return self._log.read_text()


@contextmanager
def daemon(directory: Path, name: str, *arguments: str) -> Iterator[Daemon]:
    log = directory / f"{name}.log"
    command = [*PEERD, "--identity", str(directory / f"{name}.key"), *arguments]
    with log.open("w") as log_file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log_file, text=True, env=_environment())
    with process:
        try:
            yield Daemon(process, log)
        finally:
            process.kill()


def _environment() -> dict[str, str]:
    # Every warning that Python has is shown, also those that it hides from users by default.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PEERD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )


def peerd(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*PEERD, *arguments], capture_output=True, text=True, timeout=ANSWER_S, check=False, env=_environment()
    )
    assert "Warning: " not in done.stderr
    return done


def children_of(pid: int) -> list[int]:
    """Each process belongs to the thread that started it."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in lists for child in children]


def still_there(pids: list[int]) -> list[int]:
    """Those of these processes that have not ended."""
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """A bootstrap peer, and two servers with half of the model each. The tests below use it in their order."""
    directory = tmp_path_factory.mktemp("swarm")
    serve = ["--model", str(demo_model_path()), *LOOPBACK, "--serve-blocks"]
    with ExitStack() as stack:
        # The others join on loopback: a peer that was told of nobody there dials nobody there.
        listen = [*LOOPBACK, "--listen", "/ip4/0.0.0.0/tcp/0/ws"]
        bootstrap = stack.enter_context(daemon(directory, "bootstrap", *listen))
        bootstrap.wait_until_up(addresses=2)
        join = ["--bootstrap", bootstrap.addresses[0]]
        first = stack.enter_context(daemon(directory, "first", *serve, "0:15", *join))
        second = stack.enter_context(daemon(directory, "second", *serve, "15:30", *join))
        for server in (first, second):
            server.wait_until_up()
        yield {"bootstrap": bootstrap, "first": first, "second": second}


def generate(swarm: dict[str, Daemon], *arguments: str) -> subprocess.CompletedProcess[str]:
    bootstrap = swarm["bootstrap"].addresses[0]
    return peerd("generate", str(demo_model_path()), "--bootstrap", bootstrap, *arguments)


def test_printed_addresses_can_be_dialled_and_name_their_peer(swarm: dict[str, Daemon]) -> None:
    for peer in swarm.values():
        for text in peer.addresses:
            address = Multiaddr.parse(text)
            assert address.is_dialable
            assert address.peer_id is not None


QUESTION = ["--prompt", "What is the capital of France?", "--chat", "--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def answer(swarm: dict[str, Daemon]) -> dict[str, Any]:
    """What `generate --json` printed for QUESTION."""
    result = generate(swarm, *QUESTION, "--json")
    assert result.returncode == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_json_holds_the_answer_its_speed_and_its_chain(swarm: dict[str, Daemon], answer: dict[str, Any]) -> None:
    assert "Paris" in answer["text"]
    assert len(answer["token_ids"]) <= 24
    assert answer["prompt_tokens"] > 8
    assert answer["tokens_per_second"] > 0
    assert answer["time_to_first_token_s"] > 0
    assert answer["failovers"] == 0
    ids = [Multiaddr.parse(swarm[name].addresses[0]).peer_id for name in ("first", "second")]
    assert answer["chain"] == [
        {"peer": ids[0], "start": 0, "end": 15},
        {"peer": ids[1], "start": 15, "end": 30},
    ]


def test_a_second_daemon_with_the_same_key_is_refused(swarm: dict[str, Daemon], tmp_path: Path) -> None:
    arguments = swarm["bootstrap"].process.args
    assert isinstance(arguments, list)
    key = Path(arguments[4])
    second = peerd(*LOOPBACK, "--identity", str(key))
    assert second.returncode == 2
    assert "--identity" in second.stderr
    assert second.stdout == ""


def test_a_server_that_is_told_to_stop_finishes_the_answer_that_it_is_part_of(
    swarm: dict[str, Daemon], answer: dict[str, Any]
) -> None:
    join = ["--bootstrap", swarm["bootstrap"].addresses[0]]
    with start("generate", str(demo_model_path()), *join, *QUESTION) as streaming:
        assert streaming.stdout is not None
        assert streaming.stderr is not None
        streamed = streaming.stdout.read(8)
        swarm["second"].process.terminate()
        streamed += streaming.stdout.read()
        assert streamed == answer["text"] + "\n"
        assert streaming.wait(ANSWER_S) == 0
        assert "tokens/s" in streaming.stderr.read()
    assert swarm["second"].process.wait(STOP_S) == 0
    assert "blocks 15:30 computed" in swarm["second"].log


def test_no_warning_of_python_is_in_the_logs_of_daemons(swarm: dict[str, Daemon], answer: dict[str, Any]) -> None:
    """That commands show none is checked wherever one is run."""
    for name, peer in swarm.items():
        assert peer.log, f"{name} has logged nothing: the test would prove nothing"
        assert "Warning: " not in peer.log


def test_generate_exits_3_and_names_the_blocks_of_a_server_that_has_gone_without_a_twin(
    swarm: dict[str, Daemon],
) -> None:
    result = generate(swarm, "--prompt", "Hello", "--max-new-tokens", "4")
    assert result.returncode == 3, result.stderr
    assert "15:30" in result.stderr
    assert result.stdout == ""


def test_the_demo_answers_in_json_and_leaves_no_process_behind() -> None:
    with start("demo", "--json", "--max-new-tokens", "16") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        table = [process.stderr.readline() for _ in range(6)]
        started = children_of(process.pid)
        answer = json.loads(process.stdout.read())
        assert process.wait(STOP_S) == 0, process.stderr.read()
    assert [line.split()[2] for line in table if "blocks" in line] == ["0:15", "15:30"]
    assert len(started) == 3
    assert still_there(started) == []
    assert answer["text"]
    assert [(hop["start"], hop["end"]) for hop in answer["chain"]] == [(0, 15), (15, 30)]


def test_ctrl_c_in_mid_answer_stops_the_demo_and_all_its_processes() -> None:
    with start("demo", "--max-new-tokens", "2000", "--prompt", "Count from one to a thousand.") as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("> Count"):
            pass
        assert process.stdout.read(20)
        started = children_of(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 130
    assert len(started) == 3
    assert still_there(started) == []


def test_spans_of_the_demo_cover_all_blocks_evenly() -> None:
    assert [str(span) for span in even_spans(30, 4)] == ["0:7", "7:15", "15:22", "22:30"]
    with pytest.raises(InvalidRequest, match="too few for 31 servers"):
        even_spans(30, 31)
