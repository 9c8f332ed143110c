"""What a client remembers: enough to start again anywhere, and nothing that was not answered."""

from dataclasses import replace

import pytest
import torch

from peerd.protocol.errors import BadResult, ContextTooLong, InvalidRequest, RemoteProtocolError
from peerd.protocol.messages import Output
from peerd.protocol.rows import Drop, Fork, RowSlice
from peerd.protocol.tensors import encode_tensor
from peerd.retained import Retained
from peerd.step_log import StepLog
from peerd.step_tensors import pushed_part, replay_steps

WIDTH = 4


def positions(*values: int) -> torch.Tensor:
    return torch.tensor([[float(value)] * WIDTH for value in values])


def log(max_length: int = 100, max_rows: int = 4, max_rollback: int = 100) -> StepLog:
    return StepLog(max_length=max_length, max_rows=max_rows, max_rollback=max_rollback)


def submit(log: StepLog, row: int, start: int, *values: int, ops=(), want="last"):
    return log.add(positions(*values), [RowSlice(row, start, len(values))], ops, want, 0)


def answer(log: StepLog, seq: int, rows: tuple[RowSlice, ...], *values: int) -> None:
    header, body = encode_tensor(positions(*values))
    output = Output(epoch=0, seq=seq, rows=rows, tensor=header.to_fields())
    log.answer(output, memoryview(b"".join(body)), WIDTH)


def kept(retained: Retained, row: int) -> list[float]:
    return retained.since(row, 0)[:, 0].tolist()


def test_only_what_was_answered_is_retained():
    steps = log()
    submit(steps, 0, 0, 1, 2)
    submit(steps, 0, 2, 3)
    answer(steps, 1, (RowSlice(0, 1, 1),), 9)
    assert kept(steps.retained, 0) == [1, 2]
    assert list(steps.pending) == [2]
    assert steps.length(0) == 3


def test_an_answer_reaches_its_step():
    steps = log()
    pending = submit(steps, 0, 0, 1, 2, want="all")
    answer(steps, 1, (RowSlice(0, 0, 2),), 7, 8)
    assert pending.done.is_set()
    assert pending.result[:, 0].tolist() == [7, 8]


def test_a_rollback_cuts_what_is_retained():
    steps = log()
    submit(steps, 0, 0, 1, 2, 3)
    answer(steps, 1, (RowSlice(0, 2, 1),), 0)
    submit(steps, 0, 1, 8)
    answer(steps, 2, (RowSlice(0, 1, 1),), 0)
    assert kept(steps.retained, 0) == [1, 8]


def test_forks_and_drops_are_retained_as_rows():
    steps = log()
    submit(steps, 0, 0, 1, 2, 3)
    answer(steps, 1, (RowSlice(0, 2, 1),), 0)
    submit(steps, 1, 2, 5, ops=(Fork(0, 1, 2),))
    answer(steps, 2, (RowSlice(1, 2, 1),), 0)
    submit(steps, 1, 3, 6, ops=(Drop(0),))
    answer(steps, 3, (RowSlice(1, 3, 1),), 0)
    assert steps.retained.lengths == {1: 4}
    assert kept(steps.retained, 1) == [1, 2, 5, 6]


def test_a_failure_gives_back_the_lengths_of_the_last_answer():
    steps = log()
    submit(steps, 0, 0, 1, 2)
    answer(steps, 1, (RowSlice(0, 1, 1),), 0)
    pending = submit(steps, 0, 2, 3)
    error = BadResult("NaN")
    steps.fail(error)
    assert pending.error is error
    assert steps.length(0) == 2


@pytest.mark.parametrize(
    ("slices", "count"),
    [
        ([RowSlice(0, 1, 1)], 1),
        ([RowSlice(4, 0, 1)], 1),
        ([RowSlice(0, 0, 2)], 1),
        ([RowSlice(0, 0, 1), RowSlice(0, 0, 1)], 2),
    ],
    ids=["a gap", "a row too many", "positions missing", "a row twice"],
)
def test_impossible_steps_are_refused_and_change_nothing(slices, count):
    steps = log()
    with pytest.raises(InvalidRequest):
        steps.add(positions(*range(count)), slices, (), "last", 0)
    assert not steps.pending
    assert steps.length(0) == 0


def test_positions_past_max_length_are_refused():
    with pytest.raises(ContextTooLong, match="4 positions in a session of max_length 3"):
        submit(log(max_length=3), 0, 0, 1, 2, 3, 4)


def test_a_rollback_further_than_granted_is_refused():
    steps = log(max_rollback=1)
    submit(steps, 0, 0, 1, 2, 3)
    with pytest.raises(InvalidRequest, match="max_rollback is 1"):
        submit(steps, 0, 1, 9)


@pytest.mark.parametrize("rows", [(), (RowSlice(0, 0, 1),), (RowSlice(1, 1, 1),)])
def test_an_answer_for_other_positions_blames_the_peer(rows):
    steps = log()
    submit(steps, 0, 0, 1, 2)
    with pytest.raises(BadResult):
        answer(steps, 1, rows, 0)


def test_an_answer_of_another_width_blames_the_peer():
    steps = log()
    submit(steps, 0, 0, 1)
    header, body = encode_tensor(torch.zeros(1, WIDTH + 1))
    with pytest.raises((BadResult, RemoteProtocolError)):
        steps.answer(
            Output(epoch=0, seq=1, rows=(RowSlice(0, 0, 1),), tensor=header.to_fields()),
            memoryview(b"".join(body)),
            WIDTH,
        )


def test_steps_with_later_forks_or_rollbacks_are_not_repeatable_on_survivors():
    steps = log()
    submit(steps, 0, 0, 1, 2)
    assert steps.repeatable
    submit(steps, 0, 2, 3)
    assert steps.repeatable
    submit(steps, 0, 1, 4)
    assert not steps.repeatable


def test_a_replay_brings_every_row_to_where_it_stood():
    steps = log()
    submit(steps, 0, 0, *range(90))
    answer(steps, 1, (RowSlice(0, 89, 1),), 0)
    retained = Retained(64)
    for step, hidden in replay_steps(steps.retained, {0: 30}, {0: 70}, epoch=3):
        assert (step.seq, step.want, step.epoch, step.push_from) == (0, "none", 3, (70,))
        retained.add([RowSlice(0, step.rows[0].start - 30, step.rows[0].count)], hidden)
    assert kept(retained, 0) == list(range(30, 90))


def test_only_positions_from_push_from_travel_on():
    steps = log()
    step = submit(steps, 0, 0, 1, 2, 3, 4).step
    pushed, hidden = pushed_part(replace(step, push_from=(2,)), positions(1, 2, 3, 4))
    assert pushed.rows == (RowSlice(0, 2, 2),)
    assert hidden[:, 0].tolist() == [3, 4]
    nothing, hidden = pushed_part(replace(step, push_from=(4,)), positions(1, 2, 3, 4))
    assert nothing.rows == ()
    assert len(hidden) == 0


def test_a_row_is_kept_in_no_more_memory_than_its_length():
    retained = Retained(100)
    for start in range(0, 100, 10):
        retained.add((RowSlice(0, start, 10),), torch.ones(10, 2))
    assert retained.since(0, 0).shape == (100, 2)
    assert retained._buffers[0].shape == (100, 2)
