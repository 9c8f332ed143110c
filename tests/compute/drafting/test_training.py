"""A tiny draft head: what it learns in training is what it does in use."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from peerd.compute.drafting.guessing import DraftHead, HeadText
from peerd.compute.drafting.training import HeadTrainer, Piece, _Batch, _unrolled, batches, new_network
from peerd.compute.model.head import Head


def pieces_of(head: Head, count: int, length: int) -> list[Piece]:
    """Texts that count upwards in steps of one; what the decoder gives out at a token is the token's embedding."""
    rng = random.Random(1)
    found = []
    for _ in range(count):
        first = rng.randrange(head.vocab_size)
        tokens = (torch.arange(length) + first) % head.vocab_size
        found.append(Piece(tokens, head.last_hidden(head.embed(tokens))))
    return found


def no_pause() -> None:
    """The caller of a test is never cancelled."""


def test_a_draft_is_what_training_unrolls(head: Head) -> None:
    torch.manual_seed(2)
    [piece] = pieces_of(head, 1, 12)
    network = new_network(head, [piece], head.vocab_size).requires_grad_(False).eval()
    drafting = DraftHead(network, head)
    certain = 6
    text = HeadText(drafting)
    # In parts, as steps bring them, one of them twice.
    for start, end in ((0, 2), (1, 4), (4, certain)):
        text.add(start, head.embed(piece.tokens[start:end]))
    tokens = piece.tokens[: certain + 1].tolist()
    guesses = text.guesses(tokens, no_pause)
    drafted = [next(guesses).token for _ in range(3)]
    # The same tokens as a text: at index `certain - 1 + place` of each place's outputs stands that place's prediction.
    whole = torch.tensor([*tokens, *drafted, 0])
    given = torch.cat((piece.hidden[:certain], torch.randn(5, head.hidden_size)))
    batch = _Batch.of([Piece(whole, given)], head, torch.device("cpu"))
    weight, _ = head.output_rows(network.tokens)
    outs = list(_unrolled(network, batch, 3))
    unrolled = [
        int(network.tokens[(out[0, certain - 1 + place] @ weight.T).argmax()]) for place, out in enumerate(outs)
    ]
    assert unrolled == drafted


def test_guesses_go_on_behind_guesses_that_are_not_certain_yet(head: Head) -> None:
    torch.manual_seed(3)
    [piece] = pieces_of(head, 1, 8)
    network = new_network(head, [piece], head.vocab_size).requires_grad_(False).eval()
    text = HeadText(DraftHead(network, head))
    text.add(2, head.embed(piece.tokens[2:7]))
    tokens = piece.tokens.tolist()
    guesses = text.guesses(tokens, no_pause)
    drafted = [next(guesses).token for _ in range(5)]
    behind = text.guesses([*tokens, *drafted[:2]], no_pause)
    assert [next(behind).token for _ in range(3)] == drafted[2:]
    assert list(HeadText(DraftHead(network, head)).guesses(tokens, no_pause)) == []


def test_it_learns_what_follows(head: Head) -> None:
    torch.manual_seed(4)
    pieces = pieces_of(head, 24, 24)
    # The model itself goes on upwards: its decoder's output is the next token's embedding.
    pieces = [
        replace(piece, hidden=head.last_hidden(head.embed((piece.tokens + 1) % head.vocab_size))) for piece in pieces
    ]
    trainer = HeadTrainer(new_network(head, pieces, head.vocab_size), head, rate=3e-3)
    before = trainer.accepted(pieces[:4], 2)
    rng = random.Random(5)
    losses = [trainer.step(batch, at / 12) for at in range(12) for batch in batches(pieces, 8, 16, rng)]
    after = trainer.accepted(pieces[:4], 2)
    assert losses[-1] < losses[0] / 2
    assert min(after) > max(before) + 0.3


def test_parts_hold_each_token_of_the_pieces_once_but_for_scraps(head: Head) -> None:
    pieces = pieces_of(head, 3, 50)
    parts = [part for batch in batches(pieces, 2, 16, random.Random(6)) for part in batch]
    assert all(2 < part.length <= 16 for part in parts)
    assert 3 * 50 - 3 * 2 * 2 <= sum(part.length for part in parts) <= 150
