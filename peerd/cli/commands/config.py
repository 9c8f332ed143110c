"""`peerd config`: shows what the file and the environment set, and writes a file to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from peerd.cli.config.applying import config_path
from peerd.cli.config.reading import read_config
from peerd.cli.config.settings import settings_of
from peerd.cli.config.writing import as_json, commented, in_force, write_new
from peerd.cli.console import say, write
from peerd.cli.help import HEADINGS, REST
from peerd.local.profile import default_config_file


@click.group(invoke_without_command=True)
@click.option("--json", "as_json_text", is_flag=True, help="Print one JSON object.")
@click.pass_context
def config(ctx: click.Context, /, as_json_text: bool) -> None:
    """Show every value of the configuration, and where it comes from.

    An option on the command line counts most, then the environment (PEERD_KV_TOKENS for --kv-tokens), then the file,
    then the default. The file is config.toml in the configuration directory; peerd --config FILE config shows another.
    """
    if ctx.invoked_subcommand is not None:
        return
    root = ctx.find_root()
    settings = settings_of(root.command)
    found = read_config(root, config_path(root), settings, settings)
    write((as_json if as_json_text else in_force)(settings, found) + "\n")


@config.command("init")
@click.argument("path", required=False, type=click.Path(dir_okay=False, path_type=Path), metavar="[FILE]")
@click.pass_context
def init(ctx: click.Context, /, path: Path | None) -> None:
    """Write a file in which every option is explained, and nothing is set.

    Default: where peerd reads it. Several daemons on one machine have a file each: peerd --profile NAME config init.
    """
    chosen = path or default_config_file()
    write_new(chosen, commented(settings_of(ctx.find_root().command), HEADINGS, REST))
    say(f"{chosen} explains every option: remove the # before what you want to set, then run peerd")
