"""The log on standard error: coloured lines on a terminal, plain lines elsewhere, or a JSON object a line for programs.

Records hold text of strangers. In a plain log only a record's first line begins at the margin; in JSON everything that
is not ASCII is escaped, so that no text in a record can be a command to a terminal or look like a record of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, get_args

from rich.logging import RichHandler

from peerd.cli.console import printable, screen

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_PLAIN_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(level: int, *, libraries: int = logging.WARNING, log_format: LogFormat = "text") -> None:
    """Log our own messages from `level` and other libraries' from `libraries`, on standard error."""
    handler = _json_handler() if log_format == "json" else _text_handler()
    logging.basicConfig(level=libraries, handlers=[handler], force=True)
    logging.captureWarnings(log_format == "json")
    logging.getLogger("peerd").setLevel(level)


def _text_handler() -> logging.Handler:
    console = screen()
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S", markup=False
        )
        handler.setFormatter(_Printable("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable(_PLAIN_FORMAT))
    return handler


def _json_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    return handler


class _Printable(logging.Formatter):
    """Writes a record so that no text of a stranger's in it is a command to the terminal, or looks like a record of its
    own: only its first line begins at the margin.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object: `time` (UTC, ISO 8601), `level`, `logger`, `message`, and `exception` with
    its stack where there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields)
