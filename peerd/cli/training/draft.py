"""`peerd train-draft`: trains a head that guesses a model's tokens, from hidden states that a swarm computes."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from peerd.cli.console import Bar, bar, say, working
from peerd.cli.options.shared import JoinOptions
from peerd.client.draft_texts import Texts, ask_itself, held_out, read_text
from peerd.compute.drafting.files import DraftHeadFacts, write_head
from peerd.compute.drafting.training import HeadTrainer, Piece, batches, new_network
from peerd.peer import open_peer
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

log = logging.getLogger(__name__)

# The share of the time for hidden states; training takes the rest.
_COLLECTING = 0.45
# Of that, for the user's text; the rest is for the model's own answers, if both are wanted.
_READING = 0.3
_RATE = 1e-3
# Small batches learn most from the few texts that there is time for: eight pieces a step took four times as long to
# learn as much as two.
_ROWS = 2
_LENGTH = 128
# Fewer pieces cannot be divided into those to learn from and those to test with.
_LEAST_PIECES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """What to train a draft head on, and for how long; the fields are the command's options."""

    output: Path
    text: str | None
    questions: tuple[str, ...]
    answers: bool
    minutes: float
    tokens: int
    guessable: int
    device: str
    seed: int


async def train_draft(model_path: Path | str, joining: JoinOptions, request: DraftRequest) -> None:
    """Join a swarm as a client, and train. Raises PeerdError, CheckpointError."""
    async with AsyncExitStack() as stack:
        with working("joining the swarm"):
            opening = open_peer(
                bootstrap=joining.bootstrap,
                swarm_key=joining.swarm_key,
                rules=joining.rules,
                may_be_relayed=joining.may_be_relayed,
                may_punch=joining.may_punch,
            )
            peer = await stack.enter_async_context(opening)
            checkpoint = await stack.enter_async_context(peer.checkpoints.open(model_path))
            model = await stack.enter_async_context(peer.model(model_path))
        name = checkpoint.hub_id or checkpoint.name
        pieces = await collect(model, request)
        await learn(model, pieces, request, DraftHeadFacts(name, model.facts.digest.hex()))
        say(f"saved; use it with: peerd generate {model_path} --draft {request.output} ...")


async def collect(model: SwarmModel, request: DraftRequest) -> list[Piece]:
    """Texts with their hidden states, as many as there is time for. Raises PeerdError."""
    seconds = 60 * request.minutes * _COLLECTING
    sources: list[Callable[[Texts], Awaitable[None]]] = []
    if request.text is not None:
        sources.append(partial(read_text, model, request.text))
    if request.answers:
        sources.append(partial(ask_itself, model, seed=request.seed, questions=request.questions))
    with bar("collecting hidden states") as display:
        began = trio.current_time()
        texts = Texts(request.tokens, lambda texts: _show(display, texts, trio.current_time() - began, seconds))
        for number, source in enumerate(sources):
            last = number + 1 == len(sources)
            with trio.move_on_after(seconds * (1 - (0 if last else 1 - _READING)) - (trio.current_time() - began)):
                await source(texts)
    if len(texts.pieces) < _LEAST_PIECES:
        raise InvalidRequest(
            f"only {texts.tokens} tokens could be computed in {seconds:.0f} s: give a longer text, or --minutes"
        )
    say(f"collected {texts.tokens} tokens in {len(texts.pieces)} texts")
    return texts.pieces


def _show(display: Bar, texts: Texts, elapsed_s: float, seconds: float) -> None:
    display.update(max(elapsed_s / seconds, texts.tokens / texts.most), f"collected {texts.tokens} tokens")


async def learn(model: SwarmModel, pieces: list[Piece], request: DraftRequest, facts: DraftHeadFacts) -> None:
    """Train, and save after each pass over the pieces. Raises CheckpointError."""
    train, test = held_out(pieces)
    network = new_network(model.head, train, request.guessable)
    trainer = HeadTrainer(network, model.head, rate=_RATE, device=request.device)
    seconds = 60 * request.minutes * (1 - _COLLECTING)
    began, rng, passes = trio.current_time(), random.Random(request.seed), 0
    with bar("training") as display:
        while (progress := (trio.current_time() - began) / seconds) < 1:
            for batch in batches(train, _ROWS, _LENGTH, rng):
                progress = (trio.current_time() - began) / seconds
                if progress >= 1:
                    break
                loss = await trio.to_thread.run_sync(trainer.step, batch, progress)
                display.update(progress, f"training, pass {passes + 1}, loss {loss:.2f}")
            passes += 1
            shares = await trio.to_thread.run_sync(trainer.accepted, test)
            await trio.to_thread.run_sync(
                write_head, request.output, network, DraftHeadFacts(facts.model, facts.digest, shares)
            )
            say(f"pass {passes}: held-out guesses right: {', '.join(f'{share:.0%}' for share in shares)}")
