"""What a code from the wire becomes: the error listed in spec/errors.md, with its blame, or else the peer's fault."""

import re
from pathlib import Path

import pytest

from peerd.protocol.errors import (
    CallerError,
    InternalError,
    LinkFailed,
    LocalProtocolError,
    NoChain,
    NoRoom,
    Overloaded,
    PeerdError,
    PeerFault,
    RelayLost,
    from_wire,
)

SPEC = (Path(__file__).parents[2] / "spec/errors.md").read_text()
# By the first word of the spec's column of blame.
GROUPS = {"the peer": PeerFault, "nobody": LinkFailed, "overload": Overloaded, "the caller": CallerError}


def _codes():
    """Each code of the spec's table with the group that it stands in, and whether it may travel."""
    group = ""
    for line in SPEC.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and "`" in cells[2]:
            group = cells[1] or group
            travels = "never travels" not in line and group in GROUPS
            for code in re.findall(r"`(\w+)`", cells[2]):
                yield code, group, travels


def _all_errors(cls=PeerdError):
    return [cls, *(found for sub in cls.__subclasses__() for found in _all_errors(sub))]


@pytest.mark.parametrize(("code", "group", "travels"), list(_codes()))
def test_every_code_of_the_spec_has_its_blame(code, group, travels):
    error = from_wire(code, "why")
    assert isinstance(error, GROUPS[group] if travels else PeerFault)
    assert (error.code == code) is travels
    assert str(error) == "why"


@pytest.mark.parametrize("cls", [LocalProtocolError, NoChain, RelayLost, PeerdError, PeerFault, CallerError])
def test_no_peer_can_say_what_only_we_can_know(cls):
    assert type(from_wire(cls.code, "boo")) is PeerFault


def test_whatever_a_peer_says_is_one_of_four_kinds():
    codes = {cls.code for cls in _all_errors()} | {"", "unheard_of", "Internal"}
    for code in codes:
        assert isinstance(from_wire(code, ""), PeerFault | LinkFailed | Overloaded | CallerError), code
    spoken = {code for code, _, travels in _codes() if travels}
    assert spoken == {code for code in codes if from_wire(code, "").code == code and code != PeerFault.code}


def test_figures_come_along():
    error = from_wire(NoRoom.code, "full", 7, 2.5)
    assert isinstance(error, NoRoom)
    assert (error.free_tokens, error.retry_after_s) == (7, 2.5)
    assert from_wire(InternalError.code, "", 7, 2.5).code == "internal"
