"""Identifies peers: an Ed25519 key, and the PeerId that names it (spec/connection/identity.md).

A PeerId must have exactly one spelling: one that could be written in two ways would count as two peers in every
quota and every set. So decoding is strict, and whatever decodes encodes to the same text again. Key files are read
elsewhere.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PeerId = NewType("PeerId", str)

# Peers meet the same few thousand names again and again, and base58 takes as long as a DHT table lookup.
_CACHED_NAMES = 8192

KEY_BYTES = 32
SIGNATURE_BYTES = 64
NODE_ID_BYTES = 20

# libp2p's peer ids: multihash `identity` (0x00) of 36 bytes, which are the protobuf
# PublicKey{Type=1: Ed25519 (1), Data=2: 32 bytes} in its one canonical encoding.
_PROTOBUF_PREFIX = bytes.fromhex("08011220")
_IDENTITY_MULTIHASH = bytes.fromhex("0024")
_MULTIHASH_PREFIX = _IDENTITY_MULTIHASH + _PROTOBUF_PREFIX
_MULTIHASH_BYTES = len(_MULTIHASH_PREFIX) + KEY_BYTES

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUE = {char: value for value, char in enumerate(_BASE58)}
# The prefix fixes the leading characters, and so the length, of every Ed25519 PeerId.
_PEER_ID_START = "12D3KooW"
PEER_ID_CHARS = 52


class Identity:
    """A private key, its public key and its PeerId. Its `repr` does not show the secret."""

    __slots__ = ("_key", "peer_id", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the operating system's random numbers."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte secret. Raises ValueError for any other length."""
        if len(seed) != KEY_BYTES:
            raise ValueError(f"an identity's seed has {KEY_BYTES} bytes, not {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def seed(self) -> bytes:
        """The 32-byte secret (RFC 8032's private key). Every process that has it can act as this peer."""
        return self._key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `data`, which must be domain-separated by the caller."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"


def verify(public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is this key's signature of `data`. False for a key or signature of a wrong length."""
    if len(public_key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=_CACHED_NAMES)
def peer_id_of(public_key: bytes) -> PeerId:
    """The name of a raw 32-byte Ed25519 key. Raises ValueError for any other length."""
    return PeerId(_base58_encode(_multihash_of(public_key)))


@lru_cache(maxsize=_CACHED_NAMES)
def public_key_of(peer_id: str) -> bytes:
    """The raw 32-byte key inside a PeerId. Raises ValueError unless it is the key's one canonical name."""
    if len(peer_id) != PEER_ID_CHARS or not peer_id.startswith(_PEER_ID_START):
        raise ValueError(f"a PeerId is {_PEER_ID_START}... with {PEER_ID_CHARS} characters, not {peer_id[:64]!r}")
    value = 0
    for char in peer_id:
        digit = _BASE58_VALUE.get(char)
        if digit is None:
            raise ValueError(f"a PeerId is written in base58, which has no {char!r}: {peer_id!r}")
        value = value * 58 + digit
    # 52 base58 digits after one zero byte always fit: 58**51 < 256**38.
    multihash = value.to_bytes(_MULTIHASH_BYTES, "big")
    if not multihash.startswith(_MULTIHASH_PREFIX):
        raise ValueError(f"not the PeerId of an Ed25519 key: {peer_id!r}")
    return multihash[len(_MULTIHASH_PREFIX) :]


def encode_public_key(public_key: bytes) -> bytes:
    """libp2p's protobuf form of a raw 32-byte key: 36 bytes. Raises ValueError for any other length."""
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
    return _PROTOBUF_PREFIX + public_key


def decode_public_key(data: bytes) -> bytes:
    """The raw 32-byte key in libp2p's protobuf form. Raises ValueError unless it is the one canonical encoding."""
    if len(data) != len(_PROTOBUF_PREFIX) + KEY_BYTES or not data.startswith(_PROTOBUF_PREFIX):
        raise ValueError("not the canonical protobuf of an Ed25519 public key")
    return data[len(_PROTOBUF_PREFIX) :]


def node_id_of(peer_id: str) -> bytes:
    """The peer's position in the DHT: sha256 of the PeerId's 38 multihash bytes, cut to 20 bytes.

    Raises ValueError if `peer_id` is not canonical.
    """
    return hashlib.sha256(_multihash_of(public_key_of(peer_id))).digest()[:NODE_ID_BYTES]


def _multihash_of(public_key: bytes) -> bytes:
    return _IDENTITY_MULTIHASH + encode_public_key(public_key)


def _base58_encode(data: bytes) -> str:
    value = int.from_bytes(data, "big")
    chars: list[str] = []
    while value:
        value, digit = divmod(value, 58)
        chars.append(_BASE58[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return _BASE58[0] * zeros + "".join(reversed(chars))
