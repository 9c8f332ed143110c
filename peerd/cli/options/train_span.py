"""The options of `peerd train-span`."""

from __future__ import annotations

from pathlib import Path

import click

from peerd.cli.options.parsing import parse_peer_id
from peerd.cli.options.shared import Command
from peerd.protocol.span import Span

POSITIVE = click.IntRange(min=1)


def _parse_span(value: str) -> Span:
    try:
        return Span.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_OPTIONS = (
    click.option(
        "--blocks",
        "spans",
        type=_parse_span,
        multiple=True,
        required=True,
        metavar="A:B",
        help="Train blocks A to B-1, which one server must hold. Repeat it for several servers.",
    ),
    click.option(
        "--text",
        "text_file",
        type=click.File(encoding="utf-8"),
        required=True,
        metavar="FILE",
        help="The text to train on.",
    ),
    click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        required=True,
        metavar="DIR",
        help="Write the trained model's description here. DIR can then be used like a model's directory.",
    ),
    click.option(
        "--steps",
        type=POSITIVE,
        default=100,
        show_default=True,
        metavar="N",
        help="Train until N steps are taken, those of earlier runs included.",
    ),
    click.option(
        "--rate",
        type=click.FloatRange(min=0),
        default=1e-4,
        show_default=True,
        metavar="RATE",
        help="The learning rate.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(("adamw", "sgd")),
        default="adamw",
        show_default=True,
        help="How the servers step: adamw takes 16 bytes of their memory for each parameter, sgd 8.",
    ),
    click.option(
        "--decay",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="DECAY",
        help="The weight decay.",
    ),
    click.option(
        "--clip",
        type=click.FloatRange(min=0),
        default=1.0,
        show_default=True,
        metavar="NORM",
        help="The largest norm of a step's gradient; 0 for any.",
    ),
    click.option("--rows", type=POSITIVE, default=4, show_default=True, metavar="N", help="Pieces of text in a step."),
    click.option(
        "--length",
        type=click.IntRange(min=2),
        default=128,
        show_default=True,
        metavar="N",
        help="Tokens in a piece.",
    ),
    click.option(
        "--save-every",
        type=POSITIVE,
        default=10,
        show_default=True,
        metavar="N",
        help="Have the servers write a snapshot after each N steps.",
    ),
    click.option(
        "--from-step",
        type=click.IntRange(min=0),
        metavar="N",
        help="Go back to the snapshot of step N; 0 begins anew. Default: the newest snapshot.",
    ),
    click.option("--publish", is_flag=True, help="Have the servers serve what was trained, as another model."),
    click.option("--peer", type=parse_peer_id, metavar="PEERID", help="Train on this server only."),
    click.option(
        "--seed", type=int, default=0, show_default=True, metavar="N", help="Decides which pieces a step gets."
    ),
    click.option(
        "--identity",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="The file with the key that servers know you by; created if it is missing. Default: training.key in the"
        " state directory.",
    ),
)


def train_span_options(command: Command) -> Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
