import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.errors import TicketRefused
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.tickets import TICKET_BYTES, Ticket, open_ticket, sign_ticket

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/sessions/tickets.json").read_text())["tickets"]
ALICE, BOB, OWNER = (Identity.from_seed(bytes([seed]) * 32) for seed in (1, 2, 3))
NOW = 1_700_000_000.0
TICKET = Ticket(
    session=bytes(range(16)), hop=1, epoch=3, sender=ALICE.peer_id, receiver=BOB.peer_id, expires=1_700_000_100
)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_a_ticket_is_read_field_by_field_or_refused(case):
    data = bytes.fromhex(case["ticket"])
    if "error" in case:
        with pytest.raises(TicketRefused) as caught:
            open_ticket(data, owner=case["owner"], now=case["now"])
        assert caught.value.code == case["error"]
        return
    assert open_ticket(data, owner=case["owner"], now=case["now"]) == Ticket(
        session=bytes.fromhex(case["session"]),
        hop=case["hop"],
        epoch=case["epoch"],
        sender=case["from"],
        receiver=case["to"],
        expires=case["expires"],
    )


def test_the_owner_alone_can_sign_one():
    assert open_ticket(sign_ticket(OWNER, TICKET), owner=OWNER.peer_id, now=NOW) == TICKET
    with pytest.raises(TicketRefused, match="owner"):
        open_ticket(sign_ticket(ALICE, TICKET), owner=OWNER.peer_id, now=NOW)


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": bytes(15)},
        {"session": bytes(17)},
        {"hop": -1},
        {"hop": 2**16},
        {"epoch": 2**32},
        {"expires": -1},
        {"expires": 2**64},
        {"sender": PeerId("me")},
        {"receiver": PeerId("")},
    ],
    ids=str,
)
def test_a_ticket_that_does_not_fit_is_not_signed(wrong):
    with pytest.raises(ValueError, match=r"session|range|PeerId"):
        sign_ticket(OWNER, replace(TICKET, **wrong))


@settings(derandomize=True, max_examples=300)
@given(st.binary(max_size=200) | st.binary(min_size=TICKET_BYTES, max_size=TICKET_BYTES))
def test_random_bytes_are_refused(data):
    with pytest.raises(TicketRefused):
        open_ticket(data, owner=OWNER.peer_id, now=NOW)


@settings(derandomize=True, max_examples=300)
@given(st.integers(0, TICKET_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_anywhere_is_refused(at, change):
    data = bytearray(sign_ticket(OWNER, TICKET))
    data[at] ^= change
    with pytest.raises(TicketRefused):
        open_ticket(bytes(data), owner=OWNER.peer_id, now=NOW)
