from __future__ import annotations

import torch

from peerd.client.audits.transcript import MAX_RESULTS, Transcript
from peerd.protocol.messages.session import Step, Want
from peerd.protocol.rows import Drop, Fork, Op, RowSlice


def step(*rows: tuple[int, int, int], want: Want = "last", ops: tuple[Op, ...] = ()) -> Step:
    return Step(epoch=0, seq=1, rows=tuple(RowSlice(*row) for row in rows), want=want, ops=ops)


def values(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def test_it_keeps_the_results_of_one_row_by_position() -> None:
    transcript = Transcript()
    transcript.note(step((0, 0, 5)), values(4))
    transcript.note(step((0, 5, 1), (1, 5, 1)), values(5, 500))
    transcript.note(step((1, 6, 1), (0, 6, 2), want="all"), values(600, 6, 7))
    transcript.note(step((0, 8, 1), want="none"), values())
    assert transcript.positions == [4, 5, 6, 7]
    assert transcript.results.flatten().tolist() == [4, 5, 6, 7]


def test_the_first_position_is_left_out() -> None:
    transcript = Transcript()
    transcript.note(step((0, 0, 3), want="all"), values(0, 1, 2))
    assert transcript.positions == [1, 2]


def test_a_row_that_is_cut_loses_what_comes_later() -> None:
    transcript = Transcript()
    transcript.note(step((0, 0, 6), want="all"), values(0, 1, 2, 3, 4, 5))
    transcript.note(step((0, 3, 1)), values(30))
    assert transcript.positions == [1, 2, 3]
    assert transcript.results.flatten().tolist() == [1, 2, 30]


def test_a_row_that_another_takes_the_place_of_begins_anew_and_a_fork_of_it_changes_nothing() -> None:
    transcript = Transcript()
    transcript.note(step((0, 0, 4), want="all"), values(0, 1, 2, 3))
    transcript.note(step((0, 4, 1), ops=(Fork(0, 1, 4), Drop(2))), values(4))
    assert transcript.positions == [1, 2, 3, 4]
    transcript.note(step((0, 5, 1), ops=(Fork(1, 0, 5),)), values(5))
    assert transcript.positions == [5]


def test_long_answers_take_bounded_memory() -> None:
    transcript = Transcript()
    transcript.note(step((0, 0, 2000), want="all"), torch.zeros(2000, 1))
    assert len(transcript) == MAX_RESULTS
