"""The handshake of a connection: Noise XX or XXpsk0, with PeerIds proven as in libp2p-noise (spec/connection/noise.md).

Adds the identity payload to noise_xx.py; randomness is an argument. An error must leave nothing behind: our identity
is never shown to a peer that failed to prove the PeerId that we dialled, and a failed handshake can never complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from peerd.protocol.connection.noise_xx import KEY_BYTES, TAG_BYTES, CipherState, NoiseXX
from peerd.protocol.errors import HandshakeFailed, LocalProtocolError, RemoteProtocolError, WrongPeer
from peerd.protocol.identity import (
    SIGNATURE_BYTES,
    Identity,
    PeerId,
    decode_public_key,
    encode_public_key,
    peer_id_of,
    verify,
)

__all__ = ["PROLOGUE", "SWARM_KEY_BYTES", "MAX_HANDSHAKE_BYTES", "TAG_BYTES", "CipherState", "Handshake"]

PROLOGUE = b"peerd/1"
SWARM_KEY_BYTES = 32
# Our messages have at most 200 bytes; the rest is room for fields that later versions may add.
MAX_HANDSHAKE_BYTES = 1024
# libp2p-noise: the prefix of the static key in the bytes that the identity key signs.
_STATIC_KEY_DOMAIN = b"noise-libp2p-static-key:"


class Handshake:
    """Three messages after which both sides know each other's PeerId and share two ciphers.

    identity: our own identity, which we prove.
    expected: the PeerId that the other side must prove; None accepts any peer.
    swarm_key: the private swarm's 32 random bytes; None for the public protocol.
    random_bytes: the source of the two fresh X25519 secrets.

    Drive it with `must_write`, `write` and `read` until `complete`, then call `split`. An error ends it for good.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        initiator: bool,
        expected: PeerId | None = None,
        swarm_key: bytes | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if swarm_key is not None and len(swarm_key) != SWARM_KEY_BYTES:
            raise ValueError(f"a swarm key has {SWARM_KEY_BYTES} bytes, not {len(swarm_key)}")
        self._identity = identity
        self._expected = expected
        self._private_swarm = swarm_key is not None
        self._noise = NoiseXX(
            initiator=initiator,
            static=random_bytes(KEY_BYTES),
            ephemeral=random_bytes(KEY_BYTES),
            prologue=PROLOGUE,
            psk=swarm_key,
        )
        self._broken = False
        self._peer_id: PeerId | None = None

    @property
    def complete(self) -> bool:
        """Whether both sides have proved who they are, as far as we can know."""
        return self._noise.complete and not self._broken

    @property
    def must_write(self) -> bool:
        """Whether the next message is ours to write."""
        return self._noise.must_write and not self._broken

    @property
    def peer_id(self) -> PeerId:
        """The PeerId that the other side proved. Raises LocalProtocolError before it did."""
        if self._peer_id is None:
            raise LocalProtocolError("the peer has not proved yet who it is")
        return self._peer_id

    def write(self) -> bytes:
        """Our next message. Raises LocalProtocolError out of turn or after an error, HandshakeFailed for a bad key."""
        self._break_unless_done()
        message = self._noise.write(self._identity_payload() if self._noise.turn else b"")
        self._broken = False
        return message

    def read(self, message: bytes) -> None:
        """Take the peer's next message, whole.

        Raises HandshakeFailed (WrongPeer for another PeerId than `expected`), RemoteProtocolError for bytes that no
        peer of ours sends, LocalProtocolError out of turn or after an error.
        """
        self._break_unless_done()
        if len(message) > MAX_HANDSHAKE_BYTES:
            raise RemoteProtocolError(f"a handshake message has at most {MAX_HANDSHAKE_BYTES} bytes")
        if self._noise.turn == 0 and not self._noise.must_write:
            self._read_first(message)
        else:
            self._learn_peer(self._noise.read(message))
        self._broken = False

    def split(self) -> tuple[CipherState, CipherState]:
        """The ciphers to send with and to receive with. Raises LocalProtocolError unless `complete`, or on a second
        call.
        """
        if self._broken:
            raise LocalProtocolError("the handshake has failed")
        return self._noise.split()

    def _break_unless_done(self) -> None:
        """Mark the handshake broken until the caller succeeds, so that any error on the way leaves it broken."""
        if self._broken:
            raise LocalProtocolError("the handshake has failed")
        self._broken = True

    def _read_first(self, message: bytes) -> None:
        """Take the first message: one key, encrypted in a private swarm. Its length shows whether the peer uses a swarm
        key.
        """
        sealed = KEY_BYTES + TAG_BYTES
        if self._private_swarm and len(message) == KEY_BYTES:
            raise HandshakeFailed("the peer has no swarm key, but this swarm is private")
        if not self._private_swarm and len(message) == sealed:
            raise HandshakeFailed("the peer uses a swarm key, but we have none")
        if len(message) != (sealed if self._private_swarm else KEY_BYTES):
            raise RemoteProtocolError("the peer's first message is no handshake of ours")
        try:
            self._noise.read(message)
        except HandshakeFailed:
            raise HandshakeFailed("the peer has another swarm key, or speaks another protocol version") from None

    def _identity_payload(self) -> bytes:
        key = encode_public_key(self._identity.public_key)
        signature = self._identity.sign(_STATIC_KEY_DOMAIN + self._noise.static_public)
        return bytes((0x0A, len(key))) + key + bytes((0x12, len(signature))) + signature

    def _learn_peer(self, payload: bytes) -> None:
        fields = _parse_payload(payload)
        try:
            public_key = decode_public_key(fields.get(1, b""))
        except ValueError as error:
            raise RemoteProtocolError(f"the peer's identity key: {error}") from None
        signature = fields.get(2, b"")
        if len(signature) != SIGNATURE_BYTES:
            raise RemoteProtocolError(f"the peer's identity signature has {len(signature)} bytes")
        if not verify(public_key, _STATIC_KEY_DOMAIN + self._noise.remote_static, signature):
            raise HandshakeFailed("the peer does not hold the identity key that it claims")
        if public_key == self._identity.public_key:
            raise HandshakeFailed("the peer is ourselves: the address leads back to us, or two peers share one key")
        peer_id = peer_id_of(public_key)
        if self._expected is not None and peer_id != self._expected:
            raise WrongPeer(f"the peer is {peer_id}, not {self._expected}")
        self._peer_id = peer_id


def _parse_payload(payload: bytes) -> dict[int, bytes]:
    """The fields of libp2p's NoiseHandshakePayload: protobuf, restricted to length-delimited fields, once each."""
    fields: dict[int, bytes] = {}
    at = 0
    while at < len(payload):
        tag, at = _read_varint(payload, at)
        length, at = _read_varint(payload, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type != 2 or number == 0 or number in fields or length > len(payload) - at:
            raise RemoteProtocolError("the peer's identity payload is malformed")
        fields[number] = payload[at : at + length]
        at += length
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at `at`, and the offset behind it. Two bytes hold every number that fits a handshake message."""
    value = 0
    for shift in (0, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise RemoteProtocolError("the peer's identity payload is malformed")
