"""The messages of two peers that punch a hole, against spec/vectors/discovery/punching.json."""

import json
from pathlib import Path

import pytest

from peerd.protocol.encoding.packing import unpack
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.messages.punch import Now, Punch

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/discovery/punching.json").read_text())["vectors"]


def _header(vector):
    return unpack(bytes.fromhex(vector["header"]), max_depth=8)


@pytest.mark.parametrize("vector", [v for v in VECTORS if "fields" in v], ids=lambda v: v["name"])
def test_valid_headers_decode_to_their_fields_and_encode_back(vector):
    assert parse(_header(vector), (Punch, Now)).to_header() == vector["fields"]


@pytest.mark.parametrize("vector", [v for v in VECTORS if "error" in v], ids=lambda v: v["name"])
def test_invalid_headers_are_refused(vector):
    with pytest.raises(RemoteProtocolError):
        parse(_header(vector), (Punch, Now))


def test_vectors_cover_every_message():
    assert {v["fields"]["type"] for v in VECTORS if "fields" in v} == {"punch", "now"}
