"""Gives the values of the file and the environment to the command that runs, as defaults of its options.

What is for a daemon must not fail another command: a model's folder that is not there now does not concern
`peerd status`. So a command gets only the settings that it has itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from peerd.cli.config.reading import Config, read_config
from peerd.cli.config.settings import settings_of, shared_with
from peerd.local.profile import VARIABLE as PROFILE_VARIABLE
from peerd.local.profile import default_config_file, parse_profile

# The options that say what a daemon is to be: one of them has to be set before `peerd` alone starts one.
_ROLES = ("serve_blocks", "client", "listen")
# What single commands share with the daemon beside what all do.
_MORE = {"doctor": ("listen", "identity")}
_KEY = "peerd.config"
_VARIABLE = "PEERD_CONFIG"

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    envvar=_VARIABLE,
    help="Read options from this file too; peerd config init writes one. Default: PEERD_CONFIG, else config.toml in the"
    " configuration directory, if it is there.",
)

profile_option = click.option(
    "--profile",
    metavar="NAME",
    envvar=PROFILE_VARIABLE,
    help="Be another daemon of this user, with a configuration file, a key, a token and a socket of its own; before a"
    " command: speak to that daemon.",
)


def choose_profile(name: str | None) -> None:
    """Let this process have the profile of `--profile`, else of the environment. Raises click.UsageError."""
    if name is not None:
        # The command line counts more than the environment, whose file may be another daemon's.
        os.environ.pop(_VARIABLE, None)
    chosen = name if name is not None else os.environ.get(PROFILE_VARIABLE, "")
    try:
        os.environ[PROFILE_VARIABLE] = parse_profile(chosen) if chosen or name is not None else ""
    except ValueError as error:
        raise click.UsageError(f"--profile: {error}") from None


def configure(group: click.Group, ctx: click.Context, path: str | None, command: str | None) -> None:
    """Read the configuration before the options of `group` are parsed. path: as given with --config.

    command: the name of the command that is to run, None for the daemon. Raises click.UsageError.
    """
    known = settings_of(group)
    wanted = known if command is None else []
    # The command `config` reads it itself, with all settings; a wrong name of a command is refused later.
    other = group.commands.get(command) if command is not None else None
    if other is not None and not isinstance(other, click.Group):
        wanted = shared_with(other, known, _MORE.get(other.name or "", ()))
    if other is not None and not wanted:
        return
    found = read_config(ctx, _chosen(path), known, wanted)
    ctx.meta[_KEY] = found
    if command is None:
        ctx.default_map = found.values


def config_path(ctx: click.Context) -> Path | None:
    """The file that the user named, from the context of the daemon's command; None for the default one."""
    return _chosen(ctx.params["config"])


def _chosen(path: str | Path | None) -> Path | None:
    named = path or os.environ.get(_VARIABLE)
    return Path(named).expanduser() if named else None


def configure_command(ctx: click.Context) -> None:
    """Give the values to the command that was invoked."""
    found = ctx.meta.get(_KEY)
    if found is not None and ctx.invoked_subcommand is not None:
        ctx.default_map = {ctx.invoked_subcommand: found.values}


def is_configured(ctx: click.Context) -> bool:
    """Whether the file says what a daemon is to be, so that `peerd` alone starts one."""
    found: Config = ctx.meta.get(_KEY) or Config(default_config_file())
    return found.exists and says_what_to_be(found)


def says_what_to_be(config: Config) -> bool:
    """Whether a configuration describes a daemon."""
    return any(name in config.given for name in _ROLES)
