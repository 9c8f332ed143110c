"""The log: what programs read of it, and that no text in a record can look like another record."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from peerd.cli.watching.logs import JsonFormatter, _Printable

FORGED = "2026-11-30 09:00:00,000 INFO peerd: all is well"


def test_no_line_of_a_message_can_be_taken_for_a_record_of_its_own() -> None:
    formatter = _Printable("%(levelname)s %(message)s")
    for message, error in ((f"bad name\n{FORGED}\x1b[31m", None), ("bad", ValueError(f"x\n{FORGED}"))):
        info = None if error is None else (type(error), error, None)
        record = logging.LogRecord("peerd", logging.WARNING, "", 1, message, (), info)
        first, *others = formatter.format(record).splitlines()
        assert first.startswith("WARNING bad")
        assert others
        assert all(line.startswith("    ") for line in others)


def record(message: object, *arguments: object, error: Exception | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("peerd.net", logging.WARNING, "", 1, message, arguments, info)


@pytest.mark.parametrize("message", ["plain", f"bad name\n{FORGED}\x1b[31m", "\ud800 half a character", "Zürich", ""])
def test_a_record_is_one_line_of_json(message: str) -> None:
    line = JsonFormatter().format(record("it said %r", message))
    assert line.isascii()
    assert line.isprintable()
    fields = json.loads(line)
    assert fields["message"] == f"it said {message!r}"
    assert (fields["level"], fields["logger"]) == ("warning", "peerd.net")
    assert "exception" not in fields


def test_the_time_is_that_of_the_record_in_utc() -> None:
    made = record("x")
    made.created = 1_800_000_000.25
    assert datetime.fromisoformat(json.loads(JsonFormatter().format(made))["time"]) == datetime(
        2027, 1, 15, 8, 0, 0, 250_000, UTC
    )


def test_the_stack_of_an_exception_is_a_field() -> None:
    try:
        raise ValueError(f"x\n{FORGED}")
    except ValueError as error:
        fields = json.loads(JsonFormatter().format(record("bad", error=error)))
    assert fields["message"] == "bad"
    assert fields["exception"].startswith("Traceback")
    assert FORGED in fields["exception"]


@pytest.mark.processes
def test_a_daemon_writes_nothing_but_json(tmp_path: Path) -> None:
    command = ["-m", "peerd", "--listen", "/ip4/127.0.0.1/tcp/0/ws", "--log-format", "json", "-v", "--stop-on-eof"]
    with subprocess.Popen(
        [sys.executable, *command, "--identity", str(tmp_path / "identity.key")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline().startswith("/ip4/127.0.0.1/tcp/")
        _, log = daemon.communicate(timeout=60)
    records = [json.loads(line) for line in log.splitlines()]
    assert daemon.returncode == 0, log
    assert any(record["message"].endswith(" is up") for record in records)
    assert all(set(record) == {"time", "level", "logger", "message"} for record in records)
