"""Invitations, by the vectors of spec/discovery/invitation.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.identity import peer_id_of
from peerd.protocol.invitation import MAX_LINK_CHARS, MAX_MODEL_CHARS, Invitation, swarm_digest

VECTORS = json.loads((Path(__file__).parents[2] / "spec/vectors/discovery/invitation.json").read_text())["invitations"]
VALID = [case for case in VECTORS if "error" not in case]
INVALID = [case for case in VECTORS if "error" in case]
ADDRESS = Multiaddr.parse(f"/ip4/203.0.113.7/tcp/31330/ws/p2p/{peer_id_of(bytes(32))}")
KEY = bytes(range(32))


def name_of(case: dict[str, Any]) -> str:
    return str(case["name"])


@pytest.mark.parametrize("case", VALID, ids=name_of)
def test_a_link_says_who_and_what_and_is_written_back(case: dict[str, Any]) -> None:
    found = Invitation.parse(case["text"])
    assert [str(address) for address in found.peers] == case["peers"]
    assert found.model == case["model"]
    assert (found.swarm.hex() if found.swarm else None) == case["swarm"]
    assert (found.key.hex() if found.key else None) == case["key"]
    assert str(found) == case.get("written", case["text"])


@pytest.mark.parametrize("case", INVALID, ids=name_of)
def test_what_is_no_whole_link_of_ours_is_refused_in_one_line(case: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=case["error"]) as refused:
        Invitation.parse(case["text"])
    assert "\n" not in str(refused.value)


def test_a_link_that_a_mail_broke_into_lines_is_whole() -> None:
    text = str(Invitation((ADDRESS,), "org/name"))
    assert Invitation.parse(f"  {text[:70]}\n  {text[70:]}\n") == Invitation((ADDRESS,), "org/name")


def test_a_shell_takes_a_link_as_one_word_without_quotes() -> None:
    link = str(Invitation((ADDRESS,), "a & b; $(c) 'd'", swarm_digest(KEY), KEY))
    assert not set(link) & set(" \t\n&;|<>()$`\\\"'*?[]#~!{}")


def test_no_key_is_shown_but_in_the_link_itself() -> None:
    secret = Invitation((ADDRESS,), "", swarm_digest(KEY), KEY)
    encoded = str(secret).partition("key=")[2].partition(",")[0]
    assert "key=" in str(secret)
    assert "key" not in repr(secret)
    with pytest.raises(ValueError, match="cut off") as refused:
        Invitation.parse(str(secret)[:-3])
    assert encoded not in str(refused.value)
    assert encoded not in str(Invitation((ADDRESS,), "", swarm_digest(KEY)))


def test_a_key_of_another_swarm_cannot_be_put_into_a_link() -> None:
    with pytest.raises(ValueError, match="not that of the swarm"):
        Invitation((ADDRESS,), "", swarm_digest(KEY), bytes(32))


def test_no_link_is_written_that_would_be_too_long_to_be_read() -> None:
    longest = Invitation((ADDRESS,), "x" * MAX_MODEL_CHARS)
    assert Invitation.parse(str(longest)) == longest
    with pytest.raises(ValueError, match="shorter name"):
        Invitation((ADDRESS,), "模" * MAX_MODEL_CHARS)


@given(st.text(max_size=200))
def test_any_text_is_a_link_or_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"link"):
        Invitation.parse(f"peerd://join/1,{text}")


@given(st.integers(min_value=0, max_value=len(str(Invitation((ADDRESS,), "org/name"))) - 1))
def test_no_beginning_of_a_link_is_taken_for_the_whole(length: int) -> None:
    with pytest.raises(ValueError, match="link"):
        Invitation.parse(str(Invitation((ADDRESS,), "org/name"))[:length])


def test_a_link_of_any_size_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="cut off"):
        Invitation.parse("peerd://join/1," + "x" * 100 * MAX_LINK_CHARS)
