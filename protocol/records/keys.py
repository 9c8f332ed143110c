"""The DHT keys under which records are stored, also once a full key was split (spec/discovery/records.md)."""

from __future__ import annotations

import hashlib

from peerd.protocol.identity import NODE_ID_BYTES, PeerId, encode_public_key, node_id_of, public_key_of
from peerd.protocol.records.bodies import Announcement, ModelRecord, PeerRecord, ServerRecord, shards_of

# A key that is full is split in 16, and a part in 16 again, up to so often: room for a million records.
MAX_SPLITS = 3


def server_key(model: bytes, shard: int, *nibbles: int) -> bytes:
    """The DHT key of a shard's servers; with `nibbles`, of those whose node ids begin so (used when a key is full)."""
    return _dht_key(b"/peerd/servers/1", model + shard.to_bytes(2, "big") + bytes(nibbles))


def peer_key(peer_id: PeerId) -> bytes:
    """The DHT key of a peer's addresses."""
    return _dht_key(b"/peerd/peers/1", encode_public_key(public_key_of(peer_id)))


def model_key(model: bytes, *nibbles: int) -> bytes:
    """The DHT key of the names of one model; with `nibbles`, of the names from announcers whose node ids begin so."""
    return _dht_key(b"/peerd/models/1", model + bytes(nibbles))


def catalogue_key(*nibbles: int) -> bytes:
    """The DHT key of the names of all models; with `nibbles`, of the names from announcers whose node ids begin so."""
    return _dht_key(b"/peerd/catalogue/1", bytes(nibbles))


def keys_of(body: Announcement, peer_id: PeerId) -> tuple[bytes, ...]:
    """The DHT keys under which `peer_id` announces `body`: for a server, one for each shard that it touches."""
    match body:
        case PeerRecord():
            return (peer_key(peer_id),)
        case ModelRecord():
            return model_key(body.model), catalogue_key()
        case ServerRecord():
            return tuple(server_key(body.model, shard) for shard in shards_of(body.span))
    raise TypeError(f"unknown kind of record: {type(body).__name__}")


def split_keys_of(body: Announcement, peer_id: PeerId, depth: int = 1) -> tuple[bytes, ...]:
    """The keys that replace those of `keys_of` when they are full, in the same order; empty for a peer record.

    depth: how often the key was split, up to `MAX_SPLITS`: a part that is full is split again.
    """
    nibbles = [int(digit, 16) for digit in node_id_of(peer_id).hex()[:depth]]
    match body:
        case ModelRecord():
            return model_key(body.model, *nibbles), catalogue_key(*nibbles)
        case ServerRecord():
            return tuple(server_key(body.model, shard, *nibbles) for shard in shards_of(body.span))
    return ()


def _dht_key(domain: bytes, name: bytes) -> bytes:
    return hashlib.sha256(domain + name).digest()[:NODE_ID_BYTES]
