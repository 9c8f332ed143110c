"""Rows that are kept to be sent again: correct after any forks, drops and cuts, and cheap with many forks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.exchange.row_buffers import CHUNK_POSITIONS, RowBuffers
from peerd.protocol.rows import Drop, Fork, RowSlice

WIDTH = 2
MAX_LENGTH = 5 * CHUNK_POSITIONS // 2


def _held_bytes(row_buffers):
    """Memory under all rows; what several share counts once."""
    chunks = {chunk.untyped_storage().data_ptr(): chunk for row in row_buffers._rows.values() for chunk in row.chunks}
    return sum(chunk.untyped_storage().nbytes() for chunk in chunks.values())


_rows = st.integers(0, 3)
_actions = st.one_of(
    st.tuples(st.just("fork"), _rows, _rows, st.integers(0, MAX_LENGTH)),
    st.tuples(st.just("drop"), _rows),
    # A row, how far back of its end it is cut, and how many positions come.
    st.tuples(st.just("add"), _rows, st.integers(0, MAX_LENGTH), st.integers(1, MAX_LENGTH)),
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(_actions, max_size=25))
def test_rows_are_what_was_put_into_them(actions):
    row_buffers = RowBuffers(MAX_LENGTH)
    expected: dict[int, list[float]] = {}
    for number, action in enumerate(actions):
        match action:
            case "fork", source, target, length:
                row_buffers.apply([Fork(source, target, length)])
                kept = expected.get(source, [])[:length]
                expected.pop(target, None)
                if kept:
                    expected[target] = list(kept)
            case "drop", row:
                row_buffers.apply([Drop(row)])
                expected.pop(row, None)
            case "add", row, back, count:
                known = expected.get(row, [])
                start = max(0, len(known) - back)
                count = min(count, MAX_LENGTH - start)
                if count:
                    values = [float(1000 * number + position) for position in range(count)]
                    hidden = torch.tensor(values)[:, None].repeat(1, WIDTH)
                    row_buffers.add([RowSlice(row, start, count)], hidden)
                    expected[row] = known[:start] + values
        assert row_buffers.lengths == {row: len(values) for row, values in expected.items()}
        for row, values in expected.items():
            assert row_buffers.copy(row, 0, len(values))[:, 0].tolist() == values
            middle = len(values) // 2
            assert row_buffers.copy(row, middle, len(values))[:, 0].tolist() == values[middle:]


def test_a_row_is_kept_in_no_more_memory_than_its_length():
    row_buffers = RowBuffers(100)
    for start in range(0, 100, 10):
        row_buffers.add((RowSlice(0, start, 10),), torch.ones(10, 2))
    assert row_buffers.copy(0, 0, 100).shape == (100, 2)
    assert _held_bytes(row_buffers) == 100 * 2 * 4


def test_forks_share_what_nobody_has_written_since():
    length = 100 * CHUNK_POSITIONS + 1
    row_buffers = RowBuffers(2 * length)
    row_buffers.add([RowSlice(0, 0, length)], torch.ones(length, WIDTH))
    whole = _held_bytes(row_buffers)
    row_buffers.apply([Fork(0, 1 + number % 255, length) for number in range(512)])
    assert _held_bytes(row_buffers) == whole
    row_buffers.add([RowSlice(row, length, 1) for row in range(256)], torch.zeros(256, WIDTH))
    # The chunk in which each row goes on, and no more.
    assert _held_bytes(row_buffers) <= whole + 256 * CHUNK_POSITIONS * WIDTH * 4


def test_a_copy_is_nobody_elses():
    row_buffers = RowBuffers(10)
    row_buffers.add([RowSlice(0, 0, 2)], torch.ones(2, WIDTH))
    copy = row_buffers.copy(0, 0, 2)
    row_buffers.add([RowSlice(0, 0, 2)], torch.zeros(2, WIDTH))
    assert copy.tolist() == [[1.0, 1.0]] * 2
