import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.identity import (
    PEER_ID_CHARS,
    Identity,
    decode_public_key,
    encode_public_key,
    node_id_of,
    peer_id_of,
    public_key_of,
    verify,
)

VECTORS = json.loads((Path(__file__).parents[2] / "spec/vectors/connection/identity.json").read_text())
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@pytest.mark.parametrize("case", VECTORS["keys"], ids=lambda case: case["name"])
def test_a_seed_gives_the_published_keys_names_and_signatures(case):
    identity = Identity.from_seed(bytes.fromhex(case["seed"]))
    assert identity.public_key.hex() == case["public_key"]
    assert encode_public_key(identity.public_key).hex() == case["protobuf"]
    assert identity.peer_id == case["peer_id"]
    assert node_id_of(identity.peer_id).hex() == case["node_id"]
    assert identity.sign(bytes.fromhex(case["message"])).hex() == case["signature"]


@pytest.mark.parametrize("case", VECTORS["peer_ids"], ids=lambda case: case["name"])
def test_a_peer_id_has_one_spelling(case):
    if "error" in case:
        with pytest.raises(ValueError, match="PeerId"):
            public_key_of(case["peer_id"])
    else:
        assert public_key_of(case["peer_id"]).hex() == case["public_key"]
        assert peer_id_of(bytes.fromhex(case["public_key"])) == case["peer_id"]


@pytest.mark.parametrize("case", VECTORS["signatures"], ids=lambda case: case["name"])
def test_only_the_keys_own_signature_verifies(case):
    key, message, signature = (bytes.fromhex(case[name]) for name in ("public_key", "message", "signature"))
    assert verify(key, message, signature) is case["valid"]


def test_an_identity_survives_its_seed_and_never_shows_it():
    identity = Identity.generate()
    again = Identity.from_seed(identity.seed)
    assert again.peer_id == identity.peer_id
    assert verify(identity.public_key, b"data", again.sign(b"data"))
    shown = repr(identity) + str(identity)
    assert identity.peer_id in shown
    assert identity.seed.hex() not in shown
    assert repr(identity.seed) not in shown


def test_generated_identities_differ():
    assert Identity.generate().peer_id != Identity.generate().peer_id


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_keys_and_seeds_of_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match="32 bytes"):
        Identity.from_seed(bytes(length))
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_of(bytes(length))
    with pytest.raises(ValueError, match="canonical"):
        decode_public_key(bytes.fromhex("08011220") + bytes(length))


@settings(derandomize=True)
@given(st.binary(min_size=32, max_size=32))
def test_every_key_has_a_name_that_leads_back_to_it(key):
    peer_id = peer_id_of(key)
    assert len(peer_id) == PEER_ID_CHARS
    assert peer_id.startswith("12D3KooW")
    assert public_key_of(peer_id) == key
    assert decode_public_key(encode_public_key(key)) == key
    assert len(node_id_of(peer_id)) == 20


@settings(derandomize=True, max_examples=300)
@given(
    st.text(max_size=60)
    | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", min_size=44, max_size=44)
)
def test_any_text_is_a_peer_id_in_canonical_form_or_a_value_error(text):
    for candidate in (text, "12D3KooW" + text):
        try:
            key = public_key_of(candidate)
        except ValueError:
            continue
        assert peer_id_of(key) == candidate
