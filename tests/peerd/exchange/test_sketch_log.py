"""What a hop says of the positions that came to it: kept from the first one on, and refused if it has another form."""

import pytest
import torch

from peerd.exchange.sketch_log import MAX_KEPT, SketchLog
from peerd.protocol.encoding.tensors import encode_tensor
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages.audits import SKETCH_SIZE, Sketch
from peerd.protocol.rows import RowSlice

ONE, TWO = (b"a" * 16,), (b"a" * 16, b"b" * 16)


def said(*rows, value=1.0, width=SKETCH_SIZE, of="input", positions=None, dtype=torch.float32, codec="exact"):
    count = sum(piece.count for piece in rows) if positions is None else positions
    header, body = encode_tensor(torch.full((count, width), value, dtype=dtype), codec=codec)
    message = Sketch(of=of, rows=rows, tensor=header.to_fields())
    return message, memoryview(b"".join(body))


def test_positions_are_kept_in_order_and_a_cut_row_is_written_anew():
    log = SketchLog(ONE)
    log.take(*said(RowSlice(0, 0, 4), RowSlice(0, 4, 2), value=1.0))
    assert log.inputs[:, 0].tolist() == [1.0] * 6
    log.take(*said(RowSlice(0, 3, 2), value=2.0))
    assert log.inputs[:, 0].tolist() == [1.0] * 3 + [2.0] * 2


def test_what_follows_a_gap_and_other_rows_are_left_out():
    log = SketchLog(ONE)
    log.take(*said(RowSlice(0, 0, 2), RowSlice(0, 3, 2), RowSlice(1, 2, 2)))
    assert len(log.inputs) == 2


def test_of_a_long_row_the_beginning_is_kept():
    log = SketchLog(ONE)
    log.take(*said(RowSlice(0, 0, MAX_KEPT - 1)))
    log.take(*said(RowSlice(0, MAX_KEPT - 1, 5)))
    log.take(*said(RowSlice(0, MAX_KEPT + 4, 5)))
    assert len(log.inputs) == MAX_KEPT


def test_a_hop_with_two_seeds_tells_of_inputs_under_both_and_of_outputs_under_one():
    log = SketchLog(TWO)
    log.take(*said(RowSlice(0, 0, 2), width=2 * SKETCH_SIZE))
    log.take(*said(RowSlice(0, 0, 1), of="output"))
    assert (log.inputs.shape, log.outputs.shape) == ((2, 2 * SKETCH_SIZE), (1, SKETCH_SIZE))


@pytest.mark.parametrize(
    ("seeds", "changes"),
    [
        ((), {}),
        (ONE, {"of": "output"}),
        (ONE, {"width": 2 * SKETCH_SIZE}),
        (ONE, {"width": SKETCH_SIZE - 1}),
        (ONE, {"positions": 3}),
        (ONE, {"positions": 1}),
        (ONE, {"dtype": torch.bfloat16}),
        (ONE, {"codec": "int8"}),
        (TWO, {}),
    ],
    ids=["not asked for", "of outputs", "too wide", "too narrow", "too many", "too few", "bf16", "int8", "of one seed"],
)
def test_sketches_of_another_form_are_the_peers_fault(seeds, changes):
    with pytest.raises(RemoteProtocolError):
        SketchLog(seeds).take(*said(RowSlice(0, 0, 2), **changes))


@pytest.mark.parametrize("body", [b"", b"\0" * (2 * SKETCH_SIZE * 4 - 1), b"\xff" * (2 * SKETCH_SIZE * 4)])
def test_bodies_that_are_cut_or_hold_no_numbers_are_the_peers_fault(body):
    message, _ = said(RowSlice(0, 0, 2))
    with pytest.raises(RemoteProtocolError):
        SketchLog(ONE).take(message, memoryview(body))
