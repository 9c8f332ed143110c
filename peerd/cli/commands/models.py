"""Commands about models: which ones can be served, and what their weights are."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.options.parsing import at_revision, parse_device, parse_memory, parse_model
from peerd.cli.options.shared import DTYPES, revision_option


@click.command(epilog=EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@click.pass_context
def manifest(ctx: click.Context, /, model: Path | str, revision: str | None) -> None:
    """Print the digests of the weights of MODEL's blocks as JSON, for --manifest.

    Reads all weights once. Make it where you trust the files, and pin it where you generate.
    """
    from peerd.cli.manifest import print_manifest

    run_once(ctx, partial(print_manifest, at_revision(model, revision)), verbose=False)


@click.command(epilog=EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="TEXT")
@revision_option
@click.pass_context
def calibrate(ctx: click.Context, /, model: Path | str, text: Path, revision: str | None) -> None:
    """Print how far apart honest servers of MODEL are, as JSON, for --audit-limits.

    Runs TEXT, a file of some 600 tokens, through all blocks in every dtype and quantization, on the CPU.
    """
    from peerd.cli.calibrate import print_thresholds

    run_once(ctx, partial(print_thresholds, at_revision(model, revision), text), verbose=False)


@click.command(epilog=EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@click.option(
    "--device",
    "devices",
    type=parse_device,
    multiple=True,
    metavar="DEVICE",
    help="As of a server; repeat it for several. Default: cpu.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="As of a server. Default: the checkpoint's.")
@click.option(
    "--kv-tokens", type=click.IntRange(min=1), metavar="N", help="As of a server: positions, of all sessions."
)
@click.option(
    "--memory",
    "memory_bytes",
    type=parse_memory,
    metavar="SIZE",
    help="As of a server, such as 6GiB. Default: what is free.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list, with an object for each device.")
@click.pass_context
def blocks(
    ctx: click.Context,
    /,
    model: Path | str,
    revision: str | None,
    devices: tuple[str, ...],
    dtype: str | None,
    kv_tokens: int | None,
    memory_bytes: int | None,
    as_json: bool,
) -> None:
    """Say how many blocks of MODEL a server on this machine would hold, for each --quantize.

    Computes what peerd --serve-blocks auto computes, and loads nothing: of a model on the hub only its small files are
    fetched.
    """
    from peerd.cli.doctor.show_blocks import Wanted, show_blocks

    wanted = Wanted(
        model=at_revision(model, revision), devices=devices, dtype=dtype, kv_tokens=kv_tokens, memory_bytes=memory_bytes
    )
    run_once(ctx, partial(show_blocks, wanted, as_json=as_json), verbose=False)


@click.command()
@click.option("--families", is_flag=True, required=True, help="List the architectures: served, refused, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def models(families: bool, as_json: bool) -> None:
    """Say which models peerd can serve."""
    from peerd.cli.families import print_families

    print_families(as_json=as_json)
