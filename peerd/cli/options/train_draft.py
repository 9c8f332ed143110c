"""The options of `peerd train-draft`."""

from __future__ import annotations

from pathlib import Path

import click

from peerd.cli.options.parsing import parse_one_device
from peerd.cli.options.shared import Command

_OPTIONS = (
    click.option(
        "--output",
        type=click.Path(file_okay=False, path_type=Path),
        required=True,
        metavar="DIR",
        help="Save the head here. DIR is what --draft takes, and can be pushed to a hub as it is.",
    ),
    click.option(
        "--text",
        "text_file",
        type=click.File(encoding="utf-8"),
        metavar="FILE",
        help="A text to learn from, such as you will ask the model for.",
    ),
    click.option(
        "--questions",
        "questions_file",
        type=click.File(encoding="utf-8"),
        metavar="FILE",
        help="Learn from the model's answers to these, one a line. Default: questions that it asks itself.",
    ),
    click.option(
        "--answers/--no-answers",
        default=True,
        help="Learn from the model's own answers too; --no-answers needs --text. Default: on.",
    ),
    click.option(
        "--minutes",
        type=click.FloatRange(min=0, min_open=True),
        default=25.0,
        show_default=True,
        metavar="N",
        help="How long it may take: somewhat less than half for the swarm, the rest for training.",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(min=64),
        default=200_000,
        show_default=True,
        metavar="N",
        help="The most tokens to learn from. Each takes two bytes of memory for each unit of the model's width.",
    ),
    click.option(
        "--guessable",
        type=click.IntRange(min=1),
        default=8192,
        show_default=True,
        metavar="N",
        help="Guess only the N commonest tokens of what it learns from: fewer are guessed faster.",
    ),
    click.option(
        "--device",
        type=parse_one_device,
        default="cpu",
        show_default=True,
        metavar="DEVICE",
        help="Where it is trained: cpu, cuda (the first GPU) or cuda:N.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, metavar="N", help="Decides what is asked, and in which order."
    ),
)


def train_draft_options(command: Command) -> Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
