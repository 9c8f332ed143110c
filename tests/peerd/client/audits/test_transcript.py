"""A transcript keeps what came back of the row that will be audited, whatever becomes of the rows."""

from __future__ import annotations

from collections import Counter
from random import Random

import torch

from peerd.client.audits.transcript import MAX_RESULTS, MAX_RESULTS_OF_ALL, RowText, Transcript
from peerd.protocol.messages.session import Step, Want
from peerd.protocol.rows import Drop, Fork, Op, RowSlice


def step(*rows: tuple[int, int, int], want: Want = "last", ops: tuple[Op, ...] = ()) -> Step:
    return Step(epoch=0, seq=1, rows=tuple(RowSlice(*row) for row in rows), want=want, ops=ops)


def values(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def sent(row: int, end: int) -> torch.Tensor:
    return torch.full((end, 1), float(row))


def of(row: int) -> Transcript:
    transcript = Transcript(sent, max_bytes=10**6)
    transcript._row = row
    return transcript


def found(transcript: Transcript) -> RowText:
    text = transcript.text()
    assert text is not None
    return text


def test_it_keeps_the_results_of_one_row_by_position() -> None:
    transcript = of(0)
    transcript.note(step((0, 0, 5)), values(4))
    transcript.note(step((0, 5, 1), (1, 5, 1)), values(5, 500))
    transcript.note(step((1, 6, 1), (0, 6, 2), want="all"), values(600, 6, 7))
    transcript.note(step((0, 8, 1), want="none"), values())
    assert transcript.positions == [4, 5, 6, 7]
    assert found(transcript).results.flatten().tolist() == [4, 5, 6, 7]


def test_the_first_position_is_left_out() -> None:
    transcript = of(0)
    transcript.note(step((0, 0, 3), want="all"), values(0, 1, 2))
    assert transcript.positions == [1, 2]


def test_a_row_that_is_cut_loses_what_comes_later() -> None:
    transcript = of(0)
    transcript.note(step((0, 0, 6), want="all"), values(0, 1, 2, 3, 4, 5))
    transcript.note(step((0, 3, 1)), values(30))
    assert transcript.positions == [1, 2, 3]
    assert found(transcript).results.flatten().tolist() == [1, 2, 30]


def test_a_row_that_becomes_a_copy_of_another_has_that_rows_results() -> None:
    transcript = of(0)
    transcript.note(step((0, 0, 4), want="all"), values(0, 1, 2, 3))
    transcript.note(step((0, 4, 1), (1, 4, 1), ops=(Fork(0, 1, 4), Drop(2))), values(4, 40))
    assert found(transcript).results.flatten().tolist() == [1, 2, 3, 4]
    transcript.note(step((0, 5, 1), ops=(Fork(1, 0, 5),)), values(50))
    assert found(transcript).results.flatten().tolist() == [1, 2, 3, 40, 50]


def test_a_row_that_ends_before_the_others_is_kept_as_it_was() -> None:
    transcript = of(1)
    transcript.note(step((0, 0, 4), want="all"), values(0, 1, 2, 3))
    transcript.note(step((0, 4, 1), (1, 4, 1), ops=(Fork(0, 1, 4),)), values(4, 40))
    transcript.note(step((0, 5, 1), ops=(Drop(1),)), values(5))
    transcript.note(step((0, 6, 1)), values(6))
    text = found(transcript)
    assert text.positions == (1, 2, 3, 4)
    assert text.results.flatten().tolist() == [1, 2, 3, 40]
    assert text.inputs.flatten().tolist() == [1.0] * 5


def test_nothing_is_kept_of_a_row_that_gave_nothing_back() -> None:
    transcript = of(0)
    transcript.note(step((0, 0, 4), want="none"), values())
    assert transcript.text() is None


def test_long_answers_take_bounded_memory() -> None:
    transcript = of(0)
    transcript.note(step((0, 0, 2000), want="all"), torch.zeros(2000, 1))
    assert len(found(transcript).positions) == MAX_RESULTS


def test_many_rows_take_bounded_memory() -> None:
    rows = 2 * MAX_RESULTS_OF_ALL // MAX_RESULTS
    last = of(rows - 1)
    last.note(step(*((row, 0, MAX_RESULTS) for row in range(rows)), want="all"), torch.zeros(rows * MAX_RESULTS, 1))
    assert last.text() is None


def test_what_was_sent_of_a_row_that_is_too_long_is_not_copied() -> None:
    copied: list[int] = []

    def note_copy(row: int, end: int) -> torch.Tensor:
        copied.append(end)
        return sent(row, end)

    # A position takes 4 bytes of inputs, and one of results.
    for max_bytes, length in ((44, 10), (43, 0)):
        transcript = Transcript(note_copy, max_bytes)
        transcript.note(step((0, 0, 10)), values(9))
        assert len(found(transcript).inputs) == length
        assert copied.pop() == length


def test_chance_draws_among_the_rows_that_there_are() -> None:
    rng = Random(1)
    drawn: Counter[int] = Counter()
    for _ in range(3000):
        transcript = Transcript(sent, 10**6, rng)
        transcript.note(step((0, 0, 5)), values(4))
        transcript.note(step((0, 5, 1), (1, 5, 1), (2, 5, 1), ops=(Fork(0, 1, 5), Fork(0, 2, 5))), values(5, 50, 500))
        transcript.note(step((1, 6, 1), ops=(Drop(0), Drop(2))), values(60))
        drawn[int(found(transcript).inputs[0, 0])] += 1
    assert set(drawn) == {0, 1, 2}
    assert all(900 < count < 1100 for count in drawn.values())
