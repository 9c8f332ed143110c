"""Receipts against spec/vectors/sessions/receipts.json, and every change of one that is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import Identity, PeerId
from peerd.protocol.messages.receipts import RECEIPT_BYTES, Receipt, open_receipt, sign_receipt

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/sessions/receipts.json").read_text())["receipts"]
CLIENT, SERVER = (Identity.from_seed(bytes([seed]) * 32) for seed in (3, 2))
RECEIPT = Receipt(bytes(range(16)), 1, SERVER.peer_id, bytes(range(32)), 8, 16, 1024)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_a_receipt_is_read_field_by_field_or_refused(case):
    data = bytes.fromhex(case["receipt"])
    if "error" in case:
        with pytest.raises(RemoteProtocolError) as caught:
            open_receipt(data, client=case["client"])
        assert caught.value.code == case["error"]
        return
    read = open_receipt(data, client=case["client"])
    numbers = case["start"], case["end"], case["positions"]
    session, model = bytes.fromhex(case["session"]), bytes.fromhex(case["model"])
    assert read == Receipt(session, case["hop"], case["server"], model, *numbers)
    if case["client"] == CLIENT.peer_id:
        assert sign_receipt(CLIENT, read) == data


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": bytes(15)},
        {"model": bytes(33)},
        {"hop": 2**16},
        {"start": -1},
        {"end": 2**16},
        {"positions": 2**64},
        {"server": PeerId("me")},
    ],
    ids=str,
)
def test_a_receipt_that_does_not_fit_is_not_signed(wrong):
    with pytest.raises(ValueError, match=r"session|model|range|PeerId"):
        sign_receipt(CLIENT, replace(RECEIPT, **wrong))


@settings(derandomize=True, max_examples=200)
@given(st.integers(0, RECEIPT_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_anywhere_is_refused(at, change):
    data = bytearray(sign_receipt(CLIENT, RECEIPT))
    data[at] ^= change
    with pytest.raises(RemoteProtocolError):
        open_receipt(bytes(data), client=CLIENT.peer_id)
