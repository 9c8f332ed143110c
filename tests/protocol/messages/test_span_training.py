"""Messages that train a peer's blocks, against spec/vectors/training/span-training.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peerd.compute.checkpoint.trained import Description
from peerd.protocol.encoding.packing import unpack
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import PeerdError
from peerd.protocol.messages.span_training import SPAN_FROM_CLIENT, SPAN_FROM_PEER

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/training/span-training.json").read_text())
EVERYBODY = tuple(dict.fromkeys((*SPAN_FROM_CLIENT, *SPAN_FROM_PEER)))


def _readable(value: Any) -> Any:
    """What the vectors hold: byte strings in hex, tuples as lists."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    if isinstance(value, dict):
        return {key: _readable(one) for key, one in value.items()}
    return value


def _header(vector: dict[str, Any]) -> Any:
    return unpack(bytes.fromhex(vector["header"]), max_depth=8)


@pytest.mark.parametrize("vector", [v for v in VECTORS["vectors"] if "fields" in v], ids=lambda v: v["name"])
def test_valid_headers_decode_to_their_fields_and_encode_back(vector: dict[str, Any]) -> None:
    message = parse(_header(vector), EVERYBODY)
    assert _readable(message.to_header()) == vector["fields"]


@pytest.mark.parametrize("vector", [v for v in VECTORS["vectors"] if "error" in v], ids=lambda v: v["name"])
def test_invalid_headers_are_refused_with_a_typed_error(vector: dict[str, Any]) -> None:
    with pytest.raises(PeerdError) as caught:
        parse(_header(vector), EVERYBODY)
    assert caught.value.code == vector["error"]


def test_vectors_cover_every_message() -> None:
    assert {v["fields"]["type"] for v in VECTORS["vectors"] if "fields" in v} == {cls.TYPE for cls in EVERYBODY}


def test_a_trained_models_digest_is_the_vectors() -> None:
    vector = VECTORS["digest"]
    blocks = {int(block): bytes.fromhex(digest) for block, digest in vector["blocks"].items()}
    assert Description("x", bytes.fromhex(vector["base"]), blocks).model_digest.hex() == vector["model"]
