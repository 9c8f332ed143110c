"""What a client remembers: enough to start again on any hop, and nothing that was not answered."""

import pytest
import torch

from peerd.client.session.step_log import StepLog
from peerd.exchange.replay_log import AlreadyFolded, ReplayLog
from peerd.exchange.row_buffers import RowBuffers
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.errors import BadResult, ContextTooLong, InvalidRequest, RemoteProtocolError
from peerd.protocol.messages.session import Output, Step
from peerd.protocol.rows import Drop, Fork, RowSlice, SessionSize

WIDTH = 4


def positions(*values: int) -> torch.Tensor:
    return torch.tensor([[float(value)] * WIDTH for value in values])


def log(max_length: int = 100, max_rows: int = 4, max_rollback: int = 100) -> StepLog:
    return StepLog(SessionSize(max_length, max_rows, max_rollback))


def submit(log: StepLog, row: int, start: int, *values: int, ops=(), want="last"):
    return log.add(positions(*values), [RowSlice(row, start, len(values))], ops, want, 0)


def answer(log: StepLog, seq: int, rows: tuple[RowSlice, ...], *values: int) -> None:
    header, body = encode_tensor(positions(*values))
    output = Output(epoch=0, seq=seq, rows=rows, tensor=header.to_fields())
    log.answer(output, memoryview(b"".join(body)), WIDTH)


def rows_of(sent) -> dict[int, list[float]]:
    """The rows of a hop that runs these steps, one after the other."""
    rows = RowBuffers(100)
    for step, hidden in sent:
        rows.apply(step.ops)
        rows.add(step.rows, hidden)
    return {row: rows.copy(row, 0, length)[:, 0].tolist() for row, length in rows.lengths.items()}


def answered_rows(steps: StepLog) -> dict[int, list[float]]:
    kept = steps.kept.row_buffers
    return {row: kept.copy(row, 0, length)[:, 0].tolist() for row, length in kept.lengths.items()}


def test_only_what_was_answered_is_retained():
    steps = log()
    submit(steps, 0, 0, 1, 2)
    submit(steps, 0, 2, 3)
    answer(steps, 1, (RowSlice(0, 1, 1),), 9)
    assert answered_rows(steps) == {0: [1, 2]}
    assert steps.answered == 1
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
    assert answered_rows(steps) == {0: [1, 8]}


def test_forks_and_drops_are_retained_as_rows():
    steps = log()
    submit(steps, 0, 0, 1, 2, 3)
    answer(steps, 1, (RowSlice(0, 2, 1),), 0)
    submit(steps, 1, 2, 5, ops=(Fork(0, 1, 2),))
    answer(steps, 2, (RowSlice(1, 2, 1),), 0)
    submit(steps, 1, 3, 6, ops=(Drop(0),))
    answer(steps, 3, (RowSlice(1, 3, 1),), 0)
    assert answered_rows(steps) == {1: [1, 2, 5, 6]}
    assert steps.positions == 4


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


@pytest.mark.parametrize(
    ("ops", "start", "forked"),
    [((), 2, False), ((), 1, True), ((Fork(0, 1, 1),), 2, True)],
    ids=["one that adds", "a rollback", "a fork"],
)
def test_steps_given_up_that_hops_cannot_take_back_are_remembered(ops, start, forked):
    steps = log()
    submit(steps, 0, 0, 1, 2)
    answer(steps, 1, (RowSlice(0, 1, 1),), 0)
    submit(steps, 0, start, 3, ops=ops)
    steps.fail(BadResult("NaN"))
    assert steps.is_forked == forked
    assert steps.length(0) == 2
    assert rows_of(steps.kept.since(0, 0)) == {0: [1, 2]}


# What is kept for a hop that has none of it, or not all.


def kept_steps(kept: ReplayLog) -> dict[int, list[float]]:
    """Four steps that grow, fork, cut and drop rows; returns what the rows hold after them."""
    kept.add(Step(0, 1, (RowSlice(0, 0, 3),)), positions(1, 2, 3))
    kept.add(Step(0, 2, (RowSlice(1, 2, 1),), ops=(Fork(0, 1, 2),)), positions(4))
    kept.add(Step(0, 3, (RowSlice(0, 1, 2),)), positions(5, 6))
    kept.add(Step(0, 4, (RowSlice(2, 3, 1),), ops=(Fork(0, 2, 3), Drop(0))), positions(7))
    return {1: [1, 2, 4], 2: [1, 5, 6, 7]}


@pytest.mark.parametrize("folded", range(5))
def test_a_receiver_that_has_nothing_gets_all_of_the_senders_rows(folded):
    kept = ReplayLog(100)
    expected = kept_steps(kept)
    kept.fold(folded)
    assert rows_of(kept.since(0, 9)) == expected


@pytest.mark.parametrize("taken", range(1, 5))
def test_a_receiver_that_took_some_steps_gets_only_the_others(taken):
    kept = ReplayLog(100)
    kept_steps(kept)
    kept.fold(1)
    assert [step.seq for step, _ in kept.since(taken, 9)] == list(range(taken + 1, 5))


def test_a_receiver_that_lacks_steps_kept_only_as_rows_cannot_be_helped():
    kept = ReplayLog(100)
    kept_steps(kept)
    kept.fold(3)
    with pytest.raises(AlreadyFolded):
        list(kept.since(2, 9))


def test_a_replay_is_cut_in_pieces_that_nobody_answers_and_ends_with_the_last_number_it_holds():
    kept = ReplayLog(400)
    kept.add(Step(0, 5, (RowSlice(0, 0, 300),)), positions(*range(300)))
    kept.fold(5)
    *pieces, end = [step for step, _ in kept.since(0, epoch=3)]
    assert [(step.seq, step.want, step.epoch, step.positions) for step in pieces] == [
        (0, "none", 3, 128),
        (0, "none", 3, 128),
        (0, "none", 3, 44),
    ]
    assert (end.seq, end.rows, end.epoch) == (5, (), 3)


def test_rows_that_are_being_sent_stay_as_they_are():
    kept = ReplayLog(100)
    kept_steps(kept)
    kept.fold(1)
    with kept.pinned():
        sending = kept.since(0, 9)
        first = next(sending)
        kept.fold(4)
        assert rows_of([first, *sending]) == {1: [1, 2, 4], 2: [1, 5, 6, 7]}
    assert [step.seq for step, _ in kept.since(4, 9)] == []
    assert kept.row_buffers.lengths == {1: 3, 2: 4}


def test_a_sender_keeps_no_more_than_its_bound_beside_the_rows():
    kept = ReplayLog(100, max_positions=10)
    for seq in range(1, 20):
        kept.add(Step(0, seq, (RowSlice(0, 0, 4),)), positions(seq, 2, 3, 4))
    assert kept.folded == 17
    assert rows_of(kept.since(0, 9)) == {0: [19, 2, 3, 4]}
