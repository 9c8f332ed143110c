"""How commands run: on Trio, until they are done or a signal ends them; and what their exit codes mean."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import click
import trio

from peerd.cli.watching.logs import set_up_logging

EXIT_CODES = """\b
Exit codes:
  0    done; a daemon: stopped by a signal
  1    peerd doctor found an error; peerd service status: it does not run
  2    a mistake in the command, or a model that cannot be used
  3    some blocks of the model have no server; the message says which
  4    peers failed, or all of them are busy
  5    standard output is closed or full
  70   a daemon hung, and ended itself; its log has the stacks
  130  interrupted by Ctrl-C (143: by SIGTERM; 129: the terminal was closed)
"""


def run_once(ctx: click.Context, work: Callable[[], Awaitable[None]], *, verbose: bool) -> None:
    """Run a one-shot command. It logs only warnings unless `verbose`, and the first signal ends it."""
    set_up_logging(logging.DEBUG if verbose else logging.WARNING)
    from peerd.cli.stopping import until_signalled

    run(ctx, partial(until_signalled, work))


def run(ctx: click.Context, work: Callable[[], Awaitable[None]]) -> None:
    """Run a command's work on Trio; a signal that ended it is the exit code."""
    from peerd.cli.stopping import Interrupted

    try:
        trio.run(work)
    except Interrupted as interrupted:
        ctx.exit(interrupted.exit_code)
