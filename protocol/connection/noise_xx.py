"""Noise_XX[psk0]_25519_ChaChaPoly_SHA256 from the Noise Protocol Framework, revision 34.

Passes the published vectors; noise.py adds PeerIds. Order is what matters: every token is mixed exactly when the
pattern says, nothing that was read counts before it is authenticated, and no key encrypts twice with one nonce.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from peerd.protocol.errors import HandshakeFailed, LocalProtocolError, RemoteProtocolError

KEY_BYTES = 32
TAG_BYTES = 16
# Noise, section 3; our frames stay below half of it.
MAX_MESSAGE_BYTES = 65535
# Noise, section 5.1: the nonce 2**64 - 1 is reserved.
MAX_NONCE = 2**64 - 1

# Noise, section 7.5 (XX) and 9.4 (psk0 puts the token in front of the first message).
_XX: Final = (("e",), ("e", "ee", "s", "es"), ("s", "se"))
_XX_PSK0: Final = (("psk", "e"), *_XX[1:])

_pack_nonce = struct.Struct("<4xQ").pack


class CipherState:
    """One direction of a finished handshake: a key, and a nonce that counts messages.

    Messages must be decrypted in the order in which they were encrypted.
    """

    __slots__ = ("_aead", "_nonce")

    def __init__(self, key: bytes, nonce: int = 0) -> None:
        self._aead = ChaCha20Poly1305(key)
        self._nonce = nonce

    def encrypt(self, plaintext: bytes | bytearray | memoryview, ad: bytes = b"") -> bytes:
        """The message that carries `plaintext`, 16 bytes longer.

        Raises LocalProtocolError if the message would exceed 65535 bytes, or when all nonces are used.
        """
        nonce = self._nonce
        if nonce >= MAX_NONCE:
            raise LocalProtocolError("this key has encrypted all the messages it may")
        if len(plaintext) > MAX_MESSAGE_BYTES - TAG_BYTES:
            raise LocalProtocolError(f"a Noise message carries at most {MAX_MESSAGE_BYTES - TAG_BYTES} bytes")
        self._nonce = nonce + 1
        return self._aead.encrypt(_pack_nonce(nonce), plaintext, ad)

    def decrypt(self, message: bytes | bytearray | memoryview, ad: bytes = b"") -> bytes:
        """The plaintext of the message.

        Raises RemoteProtocolError if it is not the message that was encrypted with this nonce; the nonce then stays.
        """
        nonce = self._nonce
        if nonce >= MAX_NONCE:
            raise RemoteProtocolError("the peer sent more messages than one key may encrypt")
        if len(message) > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(f"a Noise message has at most {MAX_MESSAGE_BYTES} bytes, not {len(message)}")
        try:
            plaintext = self._aead.decrypt(_pack_nonce(nonce), message, ad)
        except InvalidTag:
            raise RemoteProtocolError("a message did not authenticate: changed, lost or out of order") from None
        self._nonce = nonce + 1
        return plaintext


class _Symmetric:
    """Noise's SymmetricState: the transcript hash, the chaining key and the current cipher."""

    __slots__ = ("_chain", "_cipher", "hash")

    def __init__(self, protocol_name: bytes) -> None:
        padded = protocol_name.ljust(KEY_BYTES, b"\0")
        self.hash = padded if len(padded) == KEY_BYTES else hashlib.sha256(protocol_name).digest()
        self._chain = self.hash
        self._cipher: CipherState | None = None

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self._chain, key = _hkdf(self._chain, material, 2)
        self._cipher = CipherState(key)

    def mix_key_and_hash(self, material: bytes) -> None:
        self._chain, mixed, key = _hkdf(self._chain, material, 3)
        self.mix_hash(mixed)
        self._cipher = CipherState(key)

    @property
    def tag_bytes(self) -> int:
        """How many bytes encryption now adds to a message."""
        return 0 if self._cipher is None else TAG_BYTES

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        sent = plaintext if self._cipher is None else self._cipher.encrypt(plaintext, self.hash)
        self.mix_hash(sent)
        return sent

    def decrypt_and_hash(self, received: bytes) -> bytes:
        plaintext = received if self._cipher is None else self._cipher.decrypt(received, self.hash)
        self.mix_hash(received)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """The initiator's sending cipher and the responder's."""
        first, second = _hkdf(self._chain, b"", 2)
        return CipherState(first), CipherState(second)


def _hkdf(chain: bytes, material: bytes, outputs: int) -> list[bytes]:
    """HKDF as in Noise, section 4.3."""
    secret = hmac.digest(chain, material, "sha256")
    found: list[bytes] = []
    last = b""
    for index in range(1, outputs + 1):
        last = hmac.digest(secret, last + bytes([index]), "sha256")
        found.append(last)
    return found


class NoiseXX:
    """The three messages of XX; with a `psk` of 32 bytes, of XXpsk0.

    `static` and `ephemeral` are X25519 secrets of 32 bytes; the ephemeral one must be new and random, or nothing is
    secret. After an error the object must not be used any more.
    """

    def __init__(
        self, *, initiator: bool, static: bytes, ephemeral: bytes, prologue: bytes, psk: bytes | None = None
    ) -> None:
        name = b"Noise_XX_25519_ChaChaPoly_SHA256" if psk is None else b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"
        self._messages = _XX if psk is None else _XX_PSK0
        self._initiator = initiator
        self._static = X25519PrivateKey.from_private_bytes(static)
        self._ephemeral = X25519PrivateKey.from_private_bytes(ephemeral)
        self._has_psk = psk is not None
        self._psk = psk or b""
        self._symmetric = _Symmetric(name)
        self._symmetric.mix_hash(prologue)
        self._was_split = False
        self._remote_ephemeral = b""
        self.remote_static = b""
        self.turn = 0
        """How many of the three messages have passed."""

    @property
    def static_public(self) -> bytes:
        """Our public static key, which the other side learns."""
        return self._static.public_key().public_bytes_raw()

    @property
    def handshake_hash(self) -> bytes:
        """The hash of the whole conversation so far; when `complete`, both sides have the same."""
        return self._symmetric.hash

    @property
    def complete(self) -> bool:
        """Whether all messages have passed."""
        return self.turn == len(self._messages)

    @property
    def must_write(self) -> bool:
        """Whether the next message is ours to write."""
        return not self.complete and (self.turn % 2 == 0) == self._initiator

    def write(self, payload: bytes) -> bytes:
        """The next message. Raises LocalProtocolError out of turn, HandshakeFailed for a bad key of the peer's."""
        if not self.must_write:
            raise LocalProtocolError("not the time to write a handshake message")
        message = b"".join([self._write_token(token) for token in self._messages[self.turn]])
        message += self._symmetric.encrypt_and_hash(payload)
        self.turn += 1
        return message

    def read(self, message: bytes) -> bytes:
        """The payload of the peer's next message. Raises LocalProtocolError out of turn, else HandshakeFailed."""
        if self.complete or self.must_write:
            raise LocalProtocolError("not the time to read a handshake message")
        rest = message
        try:
            for token in self._messages[self.turn]:
                rest = self._read_token(token, rest)
            payload = self._symmetric.decrypt_and_hash(rest)
        except RemoteProtocolError:
            raise HandshakeFailed(
                "a handshake message did not authenticate: changed on the way, or of another protocol version"
            ) from None
        self.turn += 1
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """The ciphers to send with and to receive with. Works once only, since a second pair would reuse every
        nonce.
        """
        if not self.complete or self._was_split:
            raise LocalProtocolError("the handshake is not complete, or was split already")
        self._was_split = True
        first, second = self._symmetric.split()
        return (first, second) if self._initiator else (second, first)

    def _write_token(self, token: str) -> bytes:
        if token == "e":
            public = self._ephemeral.public_key().public_bytes_raw()
            self._mix_ephemeral(public)
            return public
        if token == "s":
            return self._symmetric.encrypt_and_hash(self.static_public)
        self._mix_secret(token)
        return b""

    def _read_token(self, token: str, rest: bytes) -> bytes:
        if token == "e":
            self._remote_ephemeral, rest = _take(rest, KEY_BYTES)
            self._mix_ephemeral(self._remote_ephemeral)
        elif token == "s":
            sealed, rest = _take(rest, KEY_BYTES + self._symmetric.tag_bytes)
            self.remote_static = self._symmetric.decrypt_and_hash(sealed)
        else:
            self._mix_secret(token)
        return rest

    def _mix_ephemeral(self, public: bytes) -> None:
        self._symmetric.mix_hash(public)
        if self._has_psk:  # Noise, section 9.2: otherwise the psk would encrypt with one key for ever
            self._symmetric.mix_key(public)

    def _mix_secret(self, token: str) -> None:
        if token == "psk":
            self._symmetric.mix_key_and_hash(self._psk)
            return
        # The token names the initiator's key first.
        mine, theirs = token[0], token[1]
        if not self._initiator:
            mine, theirs = theirs, mine
        secret = self._ephemeral if mine == "e" else self._static
        public = self._remote_ephemeral if theirs == "e" else self.remote_static
        try:
            shared = secret.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise HandshakeFailed("the peer sent a key of low order, with which nothing is secret") from None
        self._symmetric.mix_key(shared)


def _take(data: bytes, count: int) -> tuple[bytes, bytes]:
    if len(data) < count:
        raise HandshakeFailed("the peer's handshake message is too short")
    return data[:count], data[count:]
