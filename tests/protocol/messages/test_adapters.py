"""The names of adapters and the messages that send them, against spec/vectors/sessions/adapters.json."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerd.compute.adapters.file import open_adapter
from peerd.compute.families.lookup import family_named
from peerd.protocol.encoding.packing import unpack
from peerd.protocol.encoding.schema import parse
from peerd.protocol.errors import PeerdError, RemoteProtocolError
from peerd.protocol.messages.adapters import (
    Granted,
    Loaded,
    MatrixA,
    MatrixB,
    Prompt,
    Upload,
    adapter_id,
    check_name,
    is_adapter_id,
    name_of,
)

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/sessions/adapters.json").read_text())
MESSAGES = VECTORS["messages"]
EVERYBODY = (Upload, Granted, MatrixA, MatrixB, Prompt, Loaded)


def header_of(vector):
    return unpack(bytes.fromhex(vector["header"]), max_depth=8)


@pytest.mark.parametrize("vector", [v for v in MESSAGES if "fields" in v], ids=lambda v: v["name"])
def test_valid_headers_decode_to_their_fields_and_encode_back(vector):
    message = parse(header_of(vector), EVERYBODY)
    said = {key: value.hex() if isinstance(value, bytes) else value for key, value in message.to_header().items()}
    assert said == vector["fields"]


@pytest.mark.parametrize("vector", [v for v in MESSAGES if "error" in v], ids=lambda v: v["name"])
def test_invalid_headers_are_refused_with_a_typed_error(vector):
    with pytest.raises(PeerdError) as caught:
        parse(header_of(vector), EVERYBODY)
    assert caught.value.code == vector["error"]


@pytest.mark.parametrize("vector", VECTORS["ids"], ids=lambda v: v["id"])
def test_an_adapters_id_follows_from_its_files(vector, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(vector["config"]))
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes.fromhex(vector["weights"]))
    with open_adapter(tmp_path, family_named("llama")) as file:
        assert file.digest.hex() == vector["digest"]
        assert adapter_id(vector["name"], file.digest) == vector["id"]


@pytest.mark.parametrize("vector", VECTORS["names"], ids=lambda v: v["text"][:20] or "empty")
def test_names_and_ids_are_told_from_each_other_and_from_anything_else(vector):
    assert is_adapter_id(vector["text"]) == (vector["is"] == "id")
    if vector["is"] == "name":
        assert check_name(vector["text"]) == vector["text"]
        assert name_of(adapter_id(vector["text"], bytes(32))) == vector["text"]
    else:
        with pytest.raises(ValueError, match="is not an adapter's name"):
            check_name(vector["text"])


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.floats() | st.text() | st.binary()))
def test_any_header_is_decoded_or_refused(fields):
    for message in EVERYBODY:
        try:
            parse(fields | {"type": message.TYPE}, EVERYBODY)
        except RemoteProtocolError:
            continue
