"""`peerd generate`: its options."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.options.parsing import at_revision, parse_model
from peerd.cli.options.shared import (
    disk_option,
    draft_options,
    drafting,
    join_options,
    joining,
    json_option,
    remote_head_option,
    revision_option,
    sampling_options,
    speculate_option,
    verbose_option,
)


@click.command(epilog=EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@disk_option
@click.option(
    "--prompt", metavar="TEXT", help="The text to continue, or with --chat to answer. Default, and -: standard input."
)
@click.option("--prompt-file", type=click.File(encoding="utf-8"), metavar="FILE", help="Read the prompt from a file.")
@click.option("--chat", is_flag=True, help="Ask in the model's chat template, as a user would.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="The most tokens that the answer may have. Default: 256.",
)
@click.option(
    "--adapter",
    metavar="NAME|DIR",
    help="Use a LoRA adapter that the swarm serves, by name; or your own, by its directory (with a / in it) or org/name"
    " on the hub: it is sent to the peers for this answer.",
)
@click.option(
    "--any-base",
    is_flag=True,
    help="Use your own adapter although it was trained for another model, such as another quantization of this one.",
)
@click.option(
    "--wait",
    "waits",
    is_flag=True,
    help="If blocks of the model have no server, wait until they have, and say which ones these are.",
)
@sampling_options
@speculate_option
@draft_options
@remote_head_option
@json_option
@join_options
@verbose_option
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    model: Path | str,
    revision: str | None,
    disk_bytes: int | None,
    prompt: str | None,
    prompt_file: TextIO | None,
    chat: bool,
    adapter: str | None,
    any_base: bool,
    waits: bool,
    speculate: bool,
    remote_head: bool,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Generate text with MODEL, whose blocks a swarm runs.

    MODEL is a directory with config.json and safetensors, a .gguf file, or org/name on the model hub (a GGUF file there
    is org/name:Q4_K_M or org/name/file.gguf); only its embeddings and its head are fetched and read here. The text goes
    to standard output as it comes; all else to standard error.
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other: give one of them")
    if any_base and adapter is None:
        raise click.UsageError("--any-base is for an adapter: add --adapter")
    draft = drafting(options, speculate=speculate)
    swarm = joining(options)
    if not swarm.bootstrap:
        raise click.UsageError(
            "--bootstrap is missing: give an address that a peer of the swarm printed, or set PEERD_BOOTSTRAP"
        )
    try:
        if prompt_file is not None:
            prompt = prompt_file.read()
        elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.read()
    except (OSError, UnicodeError) as error:
        raise click.UsageError(f"cannot read the prompt: {error}") from error
    if not prompt:
        raise click.UsageError("there is no prompt: give --prompt TEXT, --prompt-file FILE, or text on standard input")
    from peerd.cli.generate import Request
    from peerd.cli.generate import generate as run_generate

    request = Request(prompt, chat, options, adapter, speculate, draft, waits, any_base, remote_head)
    work = partial(run_generate, at_revision(model, revision), swarm, request, as_json=as_json, disk_bytes=disk_bytes)
    run_once(ctx, work, verbose=verbose)
