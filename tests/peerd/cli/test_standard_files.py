"""Commands whose standard output, error or terminal is full, closed or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio

from peerd.cli.standard_files import OutputFailed, _Messages, _Output, _wrapped
from peerd.cli.stopping import stop_signals

PEERD = f"{sys.executable} -m peerd"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("redirection", "cause"),
    [("> /dev/full", "No space left on device"), (">&-", "it is closed"), ("", "it is closed")],
    ids=["full", "closed at the start", "a pipe that nobody reads"],
)
def test_a_command_whose_output_goes_nowhere_ends_with_one_line(redirection: str, cause: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        ran = subprocess.run(
            ["sh", "-c", f"{PEERD} --help {redirection}"], stdout=output, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (ran.returncode, ran.stderr) == (5, f"Error: cannot write to standard output: {cause}\n")


@pytest.mark.processes
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"], ids=["full", "closed"])
def test_what_cannot_be_said_on_standard_error_ends_nothing_and_goes_nowhere_else(redirection: str) -> None:
    command = f"{PEERD} keys new-swarm /dev/null {redirection}"
    ran = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "")


@pytest.mark.processes
@pytest.mark.real_time
@pytest.mark.usefixtures("closed_terminals_are_heard")
async def test_a_daemon_outlives_its_output_and_leaves_in_order_when_its_terminal_is_closed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"{PEERD} --listen /ip4/127.0.0.1/tcp/0/ws --identity {tmp_path / 'key'} >/dev/full 2>{log}"
    log.touch()
    process = await trio.lowlevel.open_process(["sh", "-c", f"exec {command}"], start_new_session=True)
    try:
        while " is up" not in log.read_text():
            await trio.sleep(0.05)
        # The shell and the system may both send it.
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert await process.wait() == 0
    finally:
        process.kill()
    assert "cannot write to standard output: No space left on device; others reach us at /ip4/127" in log.read_text()
    assert "leaving" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_output_that_failed_fails_once() -> None:
    with open("/dev/full", "wb") as full:
        output = _wrapped(_Output, full.fileno(), None, "strict")
        output.write("text")
        with pytest.raises(OutputFailed, match="No space left"):
            output.flush()
        output.write("more")
        output.flush()
        output.close()


def test_messages_that_cannot_be_written_are_lost() -> None:
    with open("/dev/full", "wb") as full:
        messages = _wrapped(_Messages, full.fileno(), None, "strict")
        messages.write("line\n")
        messages.close()


def test_a_pipe_that_its_other_users_made_non_blocking_is_waited_for() -> None:
    text = "x" * 1_000_000
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as reading_end, os.fdopen(writer, "wb") as writing_end:
        os.set_blocking(writer, False)
        output = _wrapped(_Output, writing_end.fileno(), None, "strict")
        received: list[bytes] = []
        thread = threading.Thread(target=lambda: received.append(reading_end.read(len(text))))
        thread.start()
        output.write(text)
        output.flush()
        thread.join(10)
        assert received == [text.encode()]


def test_a_command_that_was_told_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
