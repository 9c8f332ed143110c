"""Collects what a draft head learns from: texts with the hidden states that the swarm's blocks give out for them.

The texts are the user's, or the model's own: it asks itself questions, by going on where its chat template begins a
user's turn (Magpie, Xu et al., arXiv 2406.08464), and answers them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import torch
import trio

from peerd.client.decoding import Decoding
from peerd.compute.drafting.training import Piece
from peerd.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from peerd.client.model import SwarmModel

# A server's batch has answers of one client side by side, which costs far less than one after the other.
_ANSWERS_AT_ONCE = 16
_TEXTS_AT_ONCE = 4
_PIECE_TOKENS = 256
_QUESTION_TOKENS = 64
# Shorter answers teach little and cost a session.
_LEAST_TOKENS = 16
# Answers are drawn at these temperatures in turn: what is asked later is mostly asked in between.
_TEMPERATURES = (0.0, 0.6, 1.0)
_MARK = "\N{BULLET}peerd\N{BULLET}"


class Texts:
    """The collected pieces. `on_progress` is called with each; nothing is collected beyond `most` tokens."""

    def __init__(self, most: int, on_progress: Callable[[Texts], None] = lambda _: None) -> None:
        self.pieces: list[Piece] = []
        self.tokens = 0
        self.most = most
        self._on_progress = on_progress

    @property
    def is_full(self) -> bool:
        return self.tokens >= self.most

    def add(self, piece: Piece) -> None:
        """Keep a piece, unless it is too short to learn from."""
        if piece.length < _LEAST_TOKENS or self.is_full:
            return
        self.pieces.append(piece)
        self.tokens += piece.length
        self._on_progress(self)


async def read_text(model: SwarmModel, text: str, texts: Texts) -> None:
    """Have the swarm compute a text, in pieces. Raises NoChain, Overloaded."""
    ids = await model.in_thread(model.encode, text)
    length = min(_PIECE_TOKENS, model.facts.max_length)
    pieces = iter([ids[at : at + length] for at in range(0, len(ids), length)])
    async with trio.open_nursery() as nursery:
        for _ in range(_TEXTS_AT_ONCE):
            nursery.start_soon(_read_pieces, model, pieces, texts)


async def _read_pieces(model: SwarmModel, pieces: Iterator[list[int]], texts: Texts) -> None:
    for ids in pieces:
        if texts.is_full:
            return
        async with model.session(max_length=len(ids)) as session:
            hidden = await session.step(model.embed(ids), want="all")
        texts.add(await _piece(model, ids, hidden))


async def _piece(model: SwarmModel, ids: Sequence[int], hidden: torch.Tensor) -> Piece:
    last = await model.in_thread(model.head.last_hidden, hidden)
    return Piece(torch.tensor(ids, dtype=torch.long), last.to(torch.bfloat16))


async def ask_itself(model: SwarmModel, texts: Texts, seed: int, questions: Sequence[str] = ()) -> None:
    """Have the model answer questions, or its own ones for ever, until there are enough texts. Raises NoChain,
    Overloaded, and InvalidRequest for a model that has no way to begin a text.
    """
    start = partial(_answers, model, texts, _opening(model), iter(questions) if questions else None)
    async with trio.open_nursery() as nursery:
        for worker in range(_ANSWERS_AT_ONCE):
            nursery.start_soon(start, seed + worker * (1 << 20))


async def _answers(
    model: SwarmModel, texts: Texts, opening: list[int], questions: Iterator[str] | None, seed: int
) -> None:
    while not texts.is_full:
        seed += 1
        if questions is None:
            question = await _question(model, opening, seed)
        elif (given := next(questions, None)) is None:
            return
        else:
            question = model.encode(given, chat=bool(model.tokenizer.chat_template))
        await _answer(model, question, seed, texts)


def _opening(model: SwarmModel) -> list[int]:
    """The beginning of a user's turn; for a model without chats, of any text."""
    if model.tokenizer.chat_template:
        turn = [{"role": "user", "content": _MARK}]
        rendered = str(model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        return list(model.tokenizer.encode(rendered.partition(_MARK)[0], add_special_tokens=False))
    first = next((token for token in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id) if token), None)
    if first is None:
        raise InvalidRequest(f"{model.facts.name} has no token that begins a text: give it a text to learn from")
    return [int(first)]


async def _question(model: SwarmModel, opening: list[int], seed: int) -> list[int]:
    """A prompt: a question that the model thinks of; the mere beginning of a text for a model without chats."""
    if not model.tokenizer.chat_template:
        return opening
    generation = model.generate(
        opening, speculate=False, temperature=1.0, top_p=0.95, seed=seed, max_new_tokens=_QUESTION_TOKENS
    )
    async with aclosing(generation.tokens()) as tokens:
        async for _ in tokens:
            pass
    return model.encode(generation.text.strip() or "Tell me something.", chat=True)


async def _answer(model: SwarmModel, question: list[int], seed: int, texts: Texts) -> None:
    """Generate an answer, and keep it with its hidden states, from the question's last position on."""
    length = min(_PIECE_TOKENS, model.facts.max_length - len(question))
    if length < _LEAST_TOKENS:
        return
    parts: list[torch.Tensor] = []
    ids = [question[-1]]
    params = model.sampling_params(
        temperature=_TEMPERATURES[seed % len(_TEMPERATURES)], top_k=0, top_p=1.0, seed=seed, max_new_tokens=length
    )
    decoding = Decoding(model, question, params, on_hidden=lambda row, start, hidden: parts.append(hidden.clone()))
    async with aclosing(decoding.tokens()) as tokens:
        async for picked in tokens:
            ids.append(picked.id)
    # The last token was drawn, and never sent.
    hidden = torch.cat(parts)
    texts.add(await _piece(model, ids[: len(hidden)], hidden))


def held_out(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """The pieces to learn from, and one in twenty, at least one, to see what was learnt."""
    each = min(20, max(2, math.ceil(len(pieces) / 2)))
    return [piece for at, piece in enumerate(pieces) if at % each], list(pieces[::each])
