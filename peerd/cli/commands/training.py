"""Commands that train: whole blocks on the servers that allow it, and a head that guesses tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from peerd.cli.commands.running import EXIT_CODES, run_once
from peerd.cli.console import working
from peerd.cli.options.parsing import at_revision, parse_model
from peerd.cli.options.shared import JoinOptions, join_options, joining, revision_option, verbose_option
from peerd.cli.options.train_draft import train_draft_options
from peerd.cli.options.train_span import train_span_options


def _swarm(options: dict[str, Any]) -> JoinOptions:
    swarm = joining(options)
    if not swarm.bootstrap:
        raise click.UsageError(
            "--bootstrap is missing: give an address that a peer of the swarm printed, or set PEERD_BOOTSTRAP"
        )
    return swarm


def _read(file: TextIO) -> str:
    try:
        return file.read()
    except (OSError, UnicodeError) as error:
        raise click.UsageError(f"cannot read the text: {error}") from error


@click.command("train-span", epilog=EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@train_span_options
@join_options
@verbose_option
@click.pass_context
def train_span(
    ctx: click.Context, /, model: Path | str, revision: str | None, text_file: TextIO, verbose: bool, **options: Any
) -> None:
    """Train whole blocks of MODEL on the servers that hold them.

    A server allows that only to clients that its operator has named with --trainable, and trains a copy: what it
    serves to others stays as it is. Run the command again to go on from the last snapshot.
    """
    swarm = _swarm(options)
    text = _read(text_file)
    with working("starting"):
        from peerd.cli.training.span import TrainRequest
        from peerd.cli.training.span import train_span as run_training

    request = TrainRequest(text=text, **options)
    run_once(ctx, partial(run_training, at_revision(model, revision), swarm, request), verbose=verbose)


@click.command("train-draft", epilog=EXIT_CODES)
@click.argument("model", type=parse_model, metavar="MODEL")
@revision_option
@train_draft_options
@join_options
@verbose_option
@click.pass_context
def train_draft(
    ctx: click.Context,
    /,
    model: Path | str,
    revision: str | None,
    text_file: TextIO | None,
    questions_file: TextIO | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Train a small head that guesses MODEL's tokens, for --draft.

    The swarm computes the hidden states of texts: of a file, and of answers to questions that the model asks itself.
    The head is trained on this machine. The answers that it speeds up stay the same.
    """
    swarm = _swarm(options)
    if text_file is None and not options["answers"]:
        raise click.UsageError("there is nothing to learn from: give --text FILE, or leave out --no-answers")
    if questions_file is not None and not options["answers"]:
        raise click.UsageError("--questions are for the model's answers: leave out --no-answers")
    text = None if text_file is None else _read(text_file)
    lines = () if questions_file is None else _read(questions_file).splitlines()
    questions = tuple(line.strip() for line in lines if line.strip())
    with working("starting"):
        from peerd.cli.training.draft import DraftRequest
        from peerd.cli.training.draft import train_draft as run_training

    request = DraftRequest(text=text, questions=questions, **options)
    run_once(ctx, partial(run_training, at_revision(model, revision), swarm, request), verbose=verbose)
