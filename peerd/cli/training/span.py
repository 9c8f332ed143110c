"""`peerd train-span`: trains whole blocks on the servers that allow it, until a number of steps is taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from peerd.cli.console import say, working
from peerd.cli.keys.identity_file import load_or_create_identity
from peerd.cli.options.shared import JoinOptions
from peerd.client.training.span_training import SpanTraining, open_span_training
from peerd.compute.checkpoint.trained import Description, base_of
from peerd.compute.errors import CheckpointError
from peerd.peer import open_peer
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import PeerId
from peerd.protocol.span import Span

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel
    from peerd.compute.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What to train, on which text, and how; the fields are the command's options."""

    spans: tuple[Span, ...]
    text: str
    output: Path
    steps: int
    rate: float
    optimizer: str
    decay: float
    clip: float
    rows: int
    length: int
    save_every: int
    from_step: int | None
    publish: bool
    peer: PeerId | None
    seed: int
    identity: Path | None


async def train_span(model_path: Path | str, joining: JoinOptions, request: TrainRequest) -> None:
    """Join a swarm as a client, and train. Raises PeerdError, CheckpointError, KeyFileError."""
    async with AsyncExitStack() as stack:
        key_file = request.identity or platformdirs.user_state_path("peerd") / "training.key"
        identity = stack.enter_context(load_or_create_identity(key_file))
        say(f"training as {identity.peer_id}")
        with working("joining the swarm"):
            peer = await stack.enter_async_context(
                open_peer(
                    identity,
                    bootstrap=joining.bootstrap,
                    swarm_key=joining.swarm_key,
                    rules=joining.rules,
                    may_be_relayed=joining.may_be_relayed,
                    may_punch=joining.may_punch,
                )
            )
            checkpoint = await stack.enter_async_context(peer.checkpoints.open(model_path))
            model = await stack.enter_async_context(peer.model(model_path))
        with working("cutting the text into tokens"):
            pieces = await model.in_thread(cut_text, model, request.text, request.length)
        with working("opening copies of the blocks"):
            opening = open_span_training(
                model,
                request.spans,
                optimizer=request.optimizer,
                decay=request.decay,
                step=request.from_step,
                peer=request.peer,
            )
            training = await stack.enter_async_context(opening)
        say(f"at step {training.step}; allowed: {training.max_steps} steps, a rate of {training.max_rate:g}")
        digests = await run_steps(training, pieces, request)
        _finish(checkpoint, digests, request.output)
        if request.publish:
            with working("having the trained blocks served"):
                digest = await training.publish(digests)
            say(f"served as the model {digest.hex()[:8]}: peerd generate {request.output} --prompt ...")


def cut_text(model: SwarmModel, text: str, length: int) -> list[list[int]]:
    """Pieces of `length` tokens; the last one is shorter. Raises InvalidRequest for less than two tokens."""
    ids = model.encode(text)
    pieces = [ids[at : at + length] for at in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise InvalidRequest("the text has less than two tokens: there is nothing to predict")
    return pieces


def pieces_of(step: int, pieces: Sequence[list[int]], rows: int, seed: int) -> list[list[int]]:
    """The pieces of one step: the same whenever it is taken, so that a run that was interrupted goes on as it would
    have.
    """
    return random.Random(f"{seed} {step}").choices(pieces, k=rows)


async def run_steps(training: SpanTraining, pieces: Sequence[list[int]], request: TrainRequest) -> dict[int, bytes]:
    """Take the steps that are left, and save; returns the digests of the trained blocks."""
    while training.step < request.steps:
        number = training.step + 1
        loss = await training.accumulate(pieces_of(number, pieces, request.rows, request.seed))
        norm = await training.update(request.rate, request.clip)
        say(f"step {number}  loss {loss:.4f}  norm {norm:.3g}")
        if number % request.save_every == 0 and number < request.steps:
            await training.save()
    return await training.save()


def _finish(checkpoint: Checkpoint, digests: dict[int, bytes], output: Path) -> None:
    try:
        Description(base_of(checkpoint), checkpoint.model_digest, digests).write(output)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error.strerror}") from error
    say(f"saved on the servers; {output} describes the trained model")
