"""Starts a daemon in this process, for the commands that are one."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import click

from peerd.cli.commands.running import run
from peerd.cli.options.daemon import daemon_of
from peerd.cli.options.shared import JoinOptions
from peerd.cli.watching.logs import set_up_logging


def log_as_asked(options: dict[str, Any]) -> None:
    """Set up a daemon's log. Takes the options that say how out of the others."""
    level = logging.DEBUG if options.pop("verbose") else logging.INFO
    set_up_logging(level, log_format=options.pop("log_format"))


def start_daemon(ctx: click.Context, swarm: JoinOptions, options: dict[str, Any]) -> None:
    """Be the daemon that the options describe, until it is stopped. Raises click.UsageError, PeerdError."""
    daemon = daemon_of(swarm, options)
    from peerd.cli.daemon import run_daemon
    from peerd.cli.process_limits import raise_descriptor_limit, share_heaps

    share_heaps()
    raise_descriptor_limit()
    run(ctx, partial(run_daemon, daemon))
