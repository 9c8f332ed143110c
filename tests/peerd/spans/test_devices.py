"""Several devices in one peer: which there are, and how they divide blocks. tests/e2e tests that they compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.errors import InvalidRequest
from peerd.protocol.span import Span
from peerd.spans.devices import check_devices, rooms, share_span, specs_by_device
from peerd.spans.spec import ServeSpec

GIB = 1 << 30


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("cpu", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:2,cuda:0", "cuda:2,cuda:0"),
        ("cuda:all", "cuda:0,cuda:1,cuda:2"),
        ("cpu,cpu", "cpu,cpu"),
    ],
)
def test_devices_are_those_that_were_named(names: str, found: str):
    assert check_devices(names) == found


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ("cuda:3", "no cuda:3 here.*sees 3 CUDA devices"),
        ("cuda:0,cuda:7", "no cuda:7 here"),
        ("cuda:1,cuda:1", "twice: cuda:1,cuda:1"),
        ("cuda,cuda:0", "twice"),
        ("cuda:all,cuda:2", "twice"),
    ],
)
def test_devices_that_are_not_there_or_there_twice_are_refused(names: str, complaint: str):
    with pytest.raises(InvalidRequest, match=complaint):
        check_devices(names)


def test_all_gpus_of_a_machine_without_any_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InvalidRequest, match="sees 0 CUDA devices; leave out --device"):
        check_devices("cuda:all")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.data())
def test_a_span_is_divided_in_order_and_nobody_gets_more_than_fits(room: list[int], data: st.DataObject):
    blocks = data.draw(st.integers(1, sum(room)))
    shares = share_span(Span(5, 5 + blocks), room)
    assert len(shares) == len(room)
    covered = [block for share in shares if share for block in range(share.start, share.end)]
    assert covered == list(range(5, 5 + blocks))
    assert all((len(share) if share else 0) <= own for share, own in zip(shares, room, strict=True))


@pytest.mark.parametrize(
    ("room", "shares"),
    [
        ([10, 10], [Span(0, 5), Span(5, 10)]),
        ([30, 10], [Span(0, 8), Span(8, 10)]),
        ([0, 20], [None, Span(0, 10)]),
        ([1, 100], [None, Span(0, 10)]),
    ],
)
def test_shares_follow_the_room_that_devices_have(room: list[int], shares: list[Span | None]):
    assert share_span(Span(0, 10), room) == shares


def test_a_device_that_is_named_twice_divides_its_memory():
    one, two = specs_by_device(ServeSpec("m", device="cpu,cpu", memory_bytes=6 * GIB))
    assert (one.device, one.memory_bytes) == (two.device, two.memory_bytes) == ("cpu", 3 * GIB)
    (alone,) = specs_by_device(ServeSpec("m"))
    assert alone == ServeSpec("m")


def test_a_device_too_small_for_a_block_is_left_out_unless_all_are(monkeypatch: pytest.MonkeyPatch):
    def how_many(spec: ServeSpec, _checkpoint: object) -> int:
        if spec.memory_bytes < GIB:
            raise InvalidRequest("one block takes 1 GiB")
        return spec.memory_bytes // GIB

    monkeypatch.setattr("peerd.spans.budget.how_many_blocks", how_many)
    small, large = ServeSpec("m", memory_bytes=5), ServeSpec("m", blocks=3, memory_bytes=4 * GIB)
    assert rooms([small, large], None) == [0, 4]
    with pytest.raises(InvalidRequest, match="takes 1 GiB"):
        rooms([small, small], None)
