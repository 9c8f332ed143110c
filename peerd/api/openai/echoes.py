"""Prompts with which answers begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from peerd.client.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as its answer repeats it. `ids` and `offsets`: its tokens and where in the text each begins, where their
    log-probabilities are asked for.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()


def scored_echo(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> Echo:
    """An echo with its tokens. A character of several tokens begins where each of them does."""
    stream = TextStream(decode)
    pieces = [stream.add(token, final=place == len(ids) - 1) for place, token in enumerate(ids)]
    offsets = accumulate(map(len, pieces[:-1]), initial=0)
    return Echo("".join(pieces), tuple(ids), tuple(offsets))
