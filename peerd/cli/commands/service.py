"""`peerd service`: has systemd run a daemon for this user."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import click
import platformdirs

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.config.applying import config_path, says_what_to_be
from peerd.cli.config.reading import Config, read_config
from peerd.cli.config.settings import settings_of
from peerd.cli.service.systemd import parse_limit, parse_name, parse_share
from peerd.cli.service.unit import Service
from peerd.local.profile import profile
from peerd.local.socket_path import default_socket_path
from peerd.protocol.errors import InvalidRequest

_name_option = click.option(
    "--name",
    type=parse_name,
    default=lambda: f"peerd-{profile()}" if profile() else "peerd",
    metavar="NAME",
    help="The name of the service. Default: peerd, or peerd-PROFILE with --profile.",
)


@click.group()
def service() -> None:
    """Run a daemon as a service of your own, by systemd.

    The service runs as you, in a hardened unit, starts again after a crash, and needs no root. What it does is in the
    configuration file: peerd config init. For one that belongs to the machine, see contrib/systemd.
    """


@service.command(epilog=EXIT_CODES)
@_name_option
@click.option(
    "--memory-max",
    type=parse_limit,
    default="90%",
    show_default=True,
    metavar="SIZE|SHARE",
    help="The most memory, such as 6G, or a share of the machine's.",
)
@click.option(
    "--cpu-quota",
    type=parse_share,
    metavar="SHARE",
    help="The most CPU time, such as 200% for two cores. Default: all.",
)
@click.option("--start/--no-start", default=True, show_default=True, help="Start it now.")
@click.pass_context
def install(ctx: click.Context, /, name: str, memory_max: str, cpu_quota: str | None, start: bool) -> None:
    """Write the unit, start it now, and have it started with the machine.

    It runs peerd with the configuration file; peerd --profile NAME service install takes that of another daemon. Run it
    again after you have moved peerd or changed identity, socket or token-file there.
    """
    from peerd.cli.service.systemd import install as install_unit

    made = _service(ctx, memory_max, cpu_quota)
    run_once(ctx, partial(install_unit, name, made, start=start), verbose=False)


@service.command(epilog=EXIT_CODES)
@_name_option
@click.pass_context
def uninstall(ctx: click.Context, /, name: str) -> None:
    """Stop the service, and remove its unit. The configuration, the key and the models stay."""
    from peerd.cli.service.systemd import uninstall as remove

    run_once(ctx, partial(remove, name), verbose=False)


@service.command(epilog=EXIT_CODES)
@_name_option
@click.pass_context
def status(ctx: click.Context, /, name: str) -> None:
    """Say whether the service runs. The exit code is 1 if it does not. What the daemon does: peerd status."""
    from peerd.cli.service.systemd import show

    runs: list[bool] = []

    async def look() -> None:
        runs.append(await show(name))

    run_once(ctx, look, verbose=False)
    ctx.exit(0 if runs[0] else 1)


def _service(ctx: click.Context, memory_max: str, cpu_quota: str | None) -> Service:
    """What the configuration file describes. Raises InvalidRequest, click.UsageError if it describes no daemon."""
    root = ctx.find_root()
    settings = settings_of(root.command)
    # What the environment says now is not there when systemd starts it.
    config = read_config(root, config_path(root), settings, settings, environ={})
    if not config.exists or not says_what_to_be(config):
        raise InvalidRequest(
            f"{config.path} does not say what the daemon is to be: set serve-blocks, client or listen in it;"
            " peerd config init writes one"
        )
    devices = config.given["devices"].value if "devices" in config.given else []
    return Service(
        command=(sys.executable, "-P", "-m", "peerd", *_profile(), "--config", str(config.path.absolute())),
        writable=tuple(_writable(config)),
        has_gpu=any(device.startswith("cuda") for device in devices),
        memory_max=memory_max,
        cpu_quota=cpu_quota or "",
    )


def _profile() -> tuple[str, ...]:
    return ("--profile", profile()) if profile() else ()


def _writable(config: Config) -> list[Path]:
    """The folders in which the daemon keeps its key, its socket and what it downloads; they are made here."""
    from peerd.compute.checkpoint.hub.settings import HubSettings

    folders = [
        platformdirs.user_state_path("peerd"),
        platformdirs.user_cache_path("peerd"),
        HubSettings().folder,
        default_socket_path().parent,
    ]
    folders += [
        Path(os.path.expanduser(config.given[name].value)).absolute().parent
        for name in ("identity", "socket_path", "token_file")
        if name in config.given
    ]
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"{folder} cannot be made: {error.strerror}") from None
    return folders
