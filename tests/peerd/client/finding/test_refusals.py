"""Which refusals are believed and which peers are left out, depending on the peers that refused and their upstream
hops.
"""

from __future__ import annotations

import pytest

from peerd.client.finding.refusals import FORGOTTEN_S, Refusals
from peerd.protocol.errors import InvalidRequest
from peerd.protocol.identity import PeerId

A, B, C, D = map(PeerId, "abcd")
NO = InvalidRequest("no")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refusals(clock: Clock, *said: tuple[PeerId, list[PeerId]], tolerated: int = 0, net: str = "") -> Refusals:
    """`net`: peers of one network."""
    made = Refusals(tolerated=tolerated, voice=lambda peer: "net" if peer in net else peer, now=clock)
    for speaker, beside in said:
        made.note(NO, speaker, beside)
    return made


@pytest.mark.parametrize(
    ("said", "are_believed", "left_out"),
    [
        ([(A, [])], False, {A}),
        ([(A, [B])], False, {A}),
        ([(A, []), (C, [])], True, {A, C}),
        # B is the upstream hop of both, so it may be the liar.
        ([(A, [B]), (C, [B])], False, {B}),
        ([(A, [B]), (C, [D])], True, {A, C}),
        ([(A, [B]), (C, [B]), (A, [D])], True, {A}),
        # The same pair again: the peer that refused is left out.
        ([(A, [B]), (A, [B])], False, {A}),
        ([(A, [B, D]), (C, [B, D])], False, {B, D}),
    ],
)
def test_a_refusal_is_believed_once_no_single_peer_can_be_behind_it(clock, said, are_believed, left_out):
    made = refusals(clock, *said)
    assert made.are_believed is are_believed
    assert made.left_out() == left_out


def test_peers_of_one_network_are_one_voice(clock):
    assert not refusals(clock, (A, []), (C, []), net="ac").are_believed
    assert refusals(clock, (A, []), (C, []), net="ab").are_believed


def test_what_happens_once_to_the_honest_is_tolerated_once(clock):
    made = refusals(clock, (A, [B]), tolerated=1)
    assert made.left_out() == set()
    made.note(NO, A, [B])
    assert made.left_out() == {A}


def test_a_peer_that_refused_what_others_answer_is_blamed_once(clock):
    made = refusals(clock, (A, [B]))
    assert made.settle([B, C]) == {A}
    assert made.settle([B, C]) == set()
    assert not made


def test_of_two_that_said_nothing_neither_is_blamed(clock):
    assert refusals(clock, (A, [B, D]), (C, [B, D])).settle([A]) == set()
    assert refusals(clock, (A, [B]), (C, [B])).settle([A, D]) == {B}


def test_an_answer_does_not_clear_a_tolerated_peer(clock):
    made = refusals(clock, (A, [B]), tolerated=1)
    assert made.settle([A, B]) == set()
    made.note(NO, A, [B])
    assert made.left_out() == {A}


def test_what_was_said_long_ago_is_forgotten(clock):
    made = refusals(clock, (A, []), tolerated=1)
    clock.now = FORGOTTEN_S + 1
    made.note(NO, A)
    assert made.left_out() == set()
