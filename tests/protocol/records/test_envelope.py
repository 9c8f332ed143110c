import json
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerd.protocol.errors import RemoteProtocolError
from peerd.protocol.identity import Identity, node_id_of, peer_id_of
from peerd.protocol.records.bodies import MAX_PAYLOAD_BYTES
from peerd.protocol.records.envelope import (
    MAX_RECORD_BYTES,
    MAX_TTL_S,
    SKEW_S,
    ModelRecord,
    PeerRecord,
    ServerRecord,
    SignedRecord,
    block_roots,
    next_seq,
    open_record,
    replaces,
    shards_of,
    sign_record,
)
from peerd.protocol.records.keys import keys_of, model_key, peer_key, server_key, split_keys_of
from peerd.protocol.span import Span

VECTORS = json.loads((Path(__file__).parents[3] / "spec/vectors/discovery/records.json").read_text())
VALID = [case for case in VECTORS["records"] if "error" not in case]
INVALID = [case for case in VECTORS["records"] if "error" in case]
ALICE, BOB = Identity.from_seed(b"\x01" * 32), Identity.from_seed(b"\x02" * 32)
NOW = 1_700_000_000.0
PARTS = [(), *((nibble,) for nibble in range(16))]
MODEL = bytes(range(32))
SERVER = ServerRecord(
    seq=7,
    expires=NOW + 60,
    model=MODEL,
    span=Span(8, 40),
    state="online",
    dtype="bfloat16",
    quantization="nf4",
    codecs=("fp16", "int8"),
    throughput=1079.5,
    free_tokens=65536,
    max_length=8192,
    adapters=("poet",),
    rtts=((BOB.peer_id, 0.0125),),
    block_roots=(bytes(32), b"\x01" * 32, b"\x02" * 32),
    slot=2,
    queue_s=0.25,
    uplink=2.5e6,
)
PEER = PeerRecord(seq=1, expires=NOW + 60, addresses=("/ip4/192.0.2.1/tcp/31330/ws",))
WORDS = ModelRecord(seq=1, expires=NOW + 600, model=MODEL, name="SmolLM2", hub_id="", revision="", block_count=30)
BODIES = pytest.mark.parametrize("body", [SERVER, PEER, WORDS], ids=lambda body: body.TYPE)


def opened(body, identity=ALICE, now=NOW, key=None):
    return open_record(SignedRecord.decode(sign_record(identity, body).encode()), now=now, key=key)


def jsonable(value):
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Span):
        return [value.start, value.end]
    return [jsonable(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", VALID, ids=lambda case: case["name"])
def test_a_valid_record_is_read_field_by_field(case):
    key = bytes.fromhex(case["key"]) if case["key"] else None
    record = open_record(SignedRecord.decode(bytes.fromhex(case["record"])), now=case["now"], key=key)
    assert (record.peer_id, record.kind, record.slot.name.hex()) == (case["peer_id"], case["kind"], case["slot"])
    assert {name: jsonable(getattr(record.body, name)) for name in case["body"]} == case["body"]
    assert [key.hex() for key in keys_of(record.body, record.peer_id)] == case["keys"]
    assert [key.hex() for key in split_keys_of(record.body, record.peer_id)] == case["split_keys"]


@pytest.mark.parametrize("case", INVALID, ids=lambda case: case["name"])
def test_an_invalid_record_is_refused(case):
    key = bytes.fromhex(case["key"]) if case["key"] else None
    with pytest.raises(RemoteProtocolError) as caught:
        open_record(SignedRecord.decode(bytes.fromhex(case["record"])), now=case["now"], key=key)
    assert caught.value.code == case["error"]


@pytest.mark.parametrize("case", VECTORS["replacement"], ids=lambda case: case["name"])
def test_which_record_replaces_which(case):
    new, old = (open_record(SignedRecord.decode(bytes.fromhex(case[name])), now=case["now"]) for name in ("new", "old"))
    assert replaces(new, old) is case["replaces"]


@BODIES
def test_what_is_signed_comes_back(body):
    record = opened(body)
    assert (record.peer_id, record.kind, record.body) == (ALICE.peer_id, body.TYPE, body)
    assert SignedRecord.decode(record.signed.encode()) == record.signed


@BODIES
def test_a_record_belongs_under_its_own_keys_alone(body):
    for key in (*keys_of(body, ALICE.peer_id), *split_keys_of(body, ALICE.peer_id)):
        assert opened(body, key=key).body == body
    for key in (server_key(bytes(32), 1), peer_key(BOB.peer_id), model_key(bytes(32))):
        with pytest.raises(RemoteProtocolError, match="under this key"):
            opened(body, key=key)


def test_a_payload_is_verified_as_it_came_and_never_encoded_again():
    fields = msgpack.unpackb(SERVER.to_payload())
    shuffled = msgpack.packb(dict(sorted(fields.items(), reverse=True)) | {"color": "blue"})
    genuine = sign_record(ALICE, SERVER)
    assert shuffled != genuine.payload
    with pytest.raises(RemoteProtocolError, match="signature"):
        open_record(replace(genuine, payload=shuffled), now=NOW)


def test_times_are_judged_by_the_clock_that_is_given():
    signed = sign_record(ALICE, replace(SERVER, expires=NOW + 60))
    assert open_record(signed, now=NOW + 59.9)
    with pytest.raises(RemoteProtocolError, match="expired"):
        open_record(signed, now=NOW + 60)
    longest = sign_record(ALICE, replace(SERVER, expires=NOW + MAX_TTL_S + SKEW_S))
    assert open_record(longest, now=NOW)
    with pytest.raises(RemoteProtocolError, match="more than 600"):
        open_record(longest, now=NOW - 1)


def test_a_body_that_others_would_refuse_is_not_signed():
    for wrong in (
        replace(SERVER, free_tokens=-1),
        replace(SERVER, dtype="x" * 17),
        replace(SERVER, adapters=tuple("a" * 32 for _ in range(8)), codecs=tuple("c" * 32 for _ in range(9))),
        replace(PEER, addresses=tuple(f"/dns4/{'a' * 240}/{n}" for n in range(8))),
    ):
        with pytest.raises(ValueError, match=wrong.TYPE):
            sign_record(ALICE, wrong)


def test_the_largest_record_that_is_signed_fits_the_limit():
    filler = replace(PEER, addresses=("x" * 400, "y" * 400, ""))
    room = MAX_PAYLOAD_BYTES - len(filler.to_payload())
    signed = sign_record(ALICE, replace(filler, addresses=("x" * 400, "y" * 400, "z" * (room - 1))))
    assert len(signed.payload) == MAX_PAYLOAD_BYTES
    assert len(signed.encode()) <= MAX_RECORD_BYTES
    assert open_record(SignedRecord.decode(signed.encode()), now=NOW)


def test_a_span_of_126_blocks_fits_with_all_its_roots_and_rtts():
    rtts = tuple((peer_id_of(bytes([n]) * 32), 0.01 * n) for n in range(8))
    body = replace(SERVER, span=Span(0, 126), block_roots=tuple(bytes([n]) * 32 for n in range(8)), rtts=rtts)
    assert body.fitted() == body
    assert opened(body).body == body


def test_a_record_gives_up_rtts_rather_than_anything_else_to_fit():
    rtts = tuple((peer_id_of(bytes([n]) * 32), 0.01 * n) for n in range(8))
    roots = tuple(bytes([n]) * 32 for n in range(16))
    crowded = replace(SERVER, span=Span(0, 256), block_roots=roots, rtts=rtts)
    with pytest.raises(ValueError, match="payload"):
        sign_record(ALICE, crowded)
    fitted = crowded.fitted()
    assert 0 < len(fitted.rtts) < 8
    assert fitted.rtts == rtts[: len(fitted.rtts)]
    assert opened(fitted).body == replace(crowded, rtts=fitted.rtts)


def test_seq_follows_the_clock_but_never_goes_back():
    assert next_seq(1.5, 0) == 1_500_000
    assert next_seq(1.5, 1_500_000) == 1_500_001
    assert next_seq(1.0, 2_000_000) == 2_000_001


def test_an_offline_record_outlives_what_it_withdraws():
    gone = SERVER.offline(seq=8, expires=NOW + 60)
    assert gone.state == "offline"
    assert replaces(opened(gone), opened(SERVER))
    assert not replaces(opened(SERVER), opened(gone))
    for seq, expires in ((7, NOW + 60), (8, NOW + 59)):
        with pytest.raises(ValueError, match="newer"):
            SERVER.offline(seq=seq, expires=expires)


def test_a_span_that_moved_leaves_no_ghost():
    # The old record is still valid at shard 0; a reader of both knows that they are one span.
    before = opened(replace(SERVER, span=Span(0, 16), block_roots=()))
    after = opened(replace(SERVER, span=Span(32, 48), block_roots=(), seq=8))
    assert before.slot == after.slot
    assert replaces(after, before)


def test_two_spans_of_a_peer_and_one_span_of_two_peers_stand_side_by_side():
    first, second = opened(SERVER), opened(replace(SERVER, slot=3))
    other = opened(SERVER, identity=BOB)
    assert len({first.slot, second.slot, other.slot, opened(PEER).slot, opened(WORDS).slot}) == 5
    with pytest.raises(ValueError, match="slots"):
        replaces(second, first)


def test_shards_and_keys_follow_the_blocks():
    assert list(shards_of(Span(0, 16))) == [0]
    assert list(shards_of(Span(15, 17))) == [0, 1]
    body = replace(SERVER, span=Span(15, 33), block_roots=())
    assert keys_of(body, ALICE.peer_id) == tuple(server_key(MODEL, shard) for shard in (0, 1, 2))
    nibble = node_id_of(ALICE.peer_id)[0] >> 4
    assert split_keys_of(body, ALICE.peer_id) == tuple(server_key(MODEL, shard, nibble) for shard in (0, 1, 2))
    everything = {server_key(MODEL, shard, *path) for shard in range(4) for path in PARTS}
    assert len(everything) == 4 * 17
    assert all(len(key) == 20 for key in everything)


def test_a_root_covers_the_spans_blocks_of_one_shard():
    digests = [bytes([block]) * 32 for block in range(64)]
    whole = block_roots(Span(0, 64), digests)
    assert block_roots(Span(16, 48), digests[16:48]) == whole[1:3]
    shifted = block_roots(Span(15, 48), digests[15:48])
    assert shifted[1:] == whole[1:3]
    assert shifted[0] != whole[0]
    with pytest.raises(ValueError, match="32 blocks"):
        block_roots(Span(16, 48), digests)


def test_the_ways_to_a_peer_are_direct_first_and_unknown_transports_are_left_out():
    relay = BOB.peer_id
    body = PeerRecord(
        seq=1,
        expires=NOW + 60,
        addresses=(
            "/quic-of-the-future/x",
            "/ip4/0.0.0.0/tcp/31330/ws",
            "/ip4/192.0.2.1/tcp/0/ws",
            f"/ip4/192.0.2.2/tcp/1/ws/p2p/{relay}",
            "/ip4/192.0.2.1/tcp/31330/ws",
        ),
        relays=("/ip4/198.51.100.1/tcp/1/ws", f"/ip4/198.51.100.2/tcp/443/wss/p2p/{relay}"),
    )
    assert [str(way) for way in body.ways_to(ALICE.peer_id)] == [
        f"/ip4/192.0.2.1/tcp/31330/ws/p2p/{ALICE.peer_id}",
        f"/ip4/198.51.100.2/tcp/443/wss/p2p/{relay}/p2p-circuit/p2p/{ALICE.peer_id}",
    ]


@pytest.mark.parametrize("addresses", [0, 1, 2, 8])
@pytest.mark.parametrize("relays", [0, 1, 2, 4])
@pytest.mark.parametrize("chars", [40, 128, 390])
def test_a_peer_record_loses_ways_until_it_fits_and_its_best_ones_last(addresses, relays, chars):
    direct = tuple(f"/{n}{'a' * (chars - 2)}" for n in range(addresses))
    relayed = tuple(f"/{n}{'r' * (chars - 2)}" for n in range(relays))
    body = PeerRecord(seq=2**62, expires=NOW + 60, addresses=direct, relays=relayed)
    fitted = body.fitted()
    assert PeerRecord.from_payload(fitted.to_payload()) == fitted
    assert fitted.addresses == direct[: len(fitted.addresses)]
    assert fitted.relays == relayed[: len(fitted.relays)]
    if chars == 40:
        assert fitted == body
    for kept, before in ((fitted.addresses, direct), (fitted.relays, relayed)):
        assert len(kept) >= min(len(before), 1)
        assert len(kept) >= min(len(before), 2) or chars == 390


# Fuzzing: a record is right, or wrong in the one typed way.


def judge(data):
    try:
        record = open_record(SignedRecord.decode(data), now=NOW)
    except RemoteProtocolError:
        return None
    return record.body


@settings(derandomize=True, max_examples=300)
@given(st.binary(max_size=1100))
def test_random_bytes_are_a_typed_error(data):
    assert judge(data) is None


@settings(derandomize=True, max_examples=400)
@given(st.sampled_from([SERVER, PEER, WORDS]), st.data())
def test_a_changed_removed_or_added_byte_is_a_typed_error(body, data):
    encoded = bytearray(sign_record(ALICE, body).encode())
    at = data.draw(st.integers(0, len(encoded) - 1))
    match data.draw(st.sampled_from(["change", "remove", "add", "cut"])):
        case "change":
            encoded[at] ^= data.draw(st.integers(1, 255))
        case "remove":
            del encoded[at]
        case "add":
            encoded.insert(at, data.draw(st.integers(0, 255).filter(lambda byte: byte != encoded[at])))
        case "cut":
            del encoded[at:]
    assert judge(bytes(encoded)) is None


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=500)
@given(st.sampled_from([SERVER, PEER, WORDS]), st.data(), VALUES)
def test_a_signed_body_with_any_field_replaced_is_valid_or_a_typed_error(body, data, value):
    fields = msgpack.unpackb(body.to_payload())
    name = data.draw(st.sampled_from(sorted(fields)))
    payload = msgpack.packb(fields | {name: value})
    try:
        found = type(body).from_payload(payload)
    except RemoteProtocolError:
        return
    assert type(body).from_payload(found.to_payload()) == found


@settings(derandomize=True, max_examples=300)
@given(st.sampled_from([SERVER, PEER, WORDS]), st.binary(max_size=900) | VALUES.map(msgpack.packb))
def test_any_payload_is_valid_or_a_typed_error(body, payload):
    with pytest.raises(RemoteProtocolError):
        type(body).from_payload(payload)
