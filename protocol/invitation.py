"""Reads and writes the link with which a member of a swarm invites another machine (spec/discovery/invitation.md).

A link travels through chats, mails and cameras, and users copy it by hand: it ends with a checksum, so that one that
was cut off is refused as such. It may hold the key of a private swarm, which no message of ours repeats.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.noise import SWARM_KEY_BYTES

SWARM_DIGEST_BYTES = 16
# A link should fit into a QR code that a phone reads from a screen; four addresses of the usual length make 500.
MAX_LINK_CHARS = 2048
MAX_PEERS = 4
MAX_MODEL_CHARS = 256
_SUM_CHARS = 8
# Commas, for a shell reads the & and ? of other links as its own: this one needs no quotes.
_PREFIX = "peerd://join/1,"
_OF_A_VERSION = re.compile(r"peerd://join/([0-9]{1,9}),")
# What addresses and names of models consist of, and a path may hold unescaped (RFC 3986, section 3.3).
_SAFE = "/:@"


def swarm_digest(key: bytes) -> bytes:
    """What names a private swarm without giving its key away: 16 bytes. `key`: the swarm's 32 random bytes."""
    return hashlib.sha256(b"peerd swarm 1\n" + key).digest()[:SWARM_DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a link says. Raises ValueError for values that a link cannot hold.

    peers: addresses of peers of the swarm, each with its PeerId.
    model: the model's name on a hub, or the name that people have for it; "" for none.
    swarm: the digest of a private swarm's key; None for a swarm that everybody may join.
    key: the key itself, where the link is to hold it. Such a link is a secret.
    """

    peers: tuple[Multiaddr, ...]
    model: str = ""
    swarm: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.peers) <= MAX_PEERS:
            raise ValueError(f"an invitation names 1 to {MAX_PEERS} peers, not {len(self.peers)}")
        for address in self.peers:
            if address.peer_id is None or not address.is_dialable:
                raise ValueError(f"{address} is not the address of a peer that can be dialled, with its PeerId")
        if len(self.model) > MAX_MODEL_CHARS or not self.model.isprintable():
            raise ValueError(f"a model's name has at most {MAX_MODEL_CHARS} printable characters")
        if self.key is not None and (len(self.key) != SWARM_KEY_BYTES or self.swarm != swarm_digest(self.key)):
            raise ValueError("the key is not that of the swarm")
        if len(str(self)) > MAX_LINK_CHARS:
            raise ValueError(
                f"the link would have more than {MAX_LINK_CHARS} characters: give the model a shorter name"
            )

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Read a link. White space in it is ignored, for mails break long lines.

        Raises ValueError that says in one line what is wrong, without repeating the link.
        """
        text = "".join(text[: 2 * MAX_LINK_CHARS].split())
        _check_whole(text)
        return _of_fields(text.removeprefix(_PREFIX).split(",")[:-1])

    def __str__(self) -> str:
        fields = [f"peer={quote(str(address), _SAFE)}" for address in self.peers]
        if self.model:
            fields.append(f"model={quote(self.model, _SAFE)}")
        if self.key is not None:
            fields.append(f"key={_encoded(self.key)}")
        elif self.swarm is not None:
            fields.append(f"swarm={_encoded(self.swarm)}")
        body = _PREFIX + ",".join(fields)
        return f"{body},sum={_sum_of(body)}"


def _check_whole(text: str) -> None:
    """Raise ValueError if `text` is no link, a link of another version, or a part of one."""
    if not text.startswith(_PREFIX):
        other = _OF_A_VERSION.match(text)
        if other is not None:
            raise ValueError(f"the link has version {other[1]}, and this peerd reads version 1: update peerd")
        if text.startswith("peerd://") and _PREFIX.startswith(text):
            raise ValueError("the link was cut off: copy all of it")
        raise ValueError(f"this is no invitation to a swarm: its link begins with {_PREFIX}")
    body, _, rest = text.rpartition(",sum=")
    if len(text) > MAX_LINK_CHARS or rest != _sum_of(body):
        raise ValueError("the link was cut off or changed on its way: copy all of it, up to the end of sum=")


def _of_fields(fields: list[str]) -> Invitation:
    peers: list[Multiaddr] = []
    once: dict[str, str] = {}
    for each in fields:
        name, _, raw = each.partition("=")
        value = _unquoted(raw)
        if name == "peer":
            peers.append(Multiaddr.parse(value))
        elif name in once:
            raise ValueError(f"the link says {name} twice")
        elif name in ("model", "swarm", "key"):
            once[name] = value
    key = _decoded(once["key"], SWARM_KEY_BYTES) if "key" in once else None
    swarm = _decoded(once["swarm"], SWARM_DIGEST_BYTES) if "swarm" in once else None
    if key is not None:
        swarm = swarm_digest(key)
    return Invitation(tuple(peers), once.get("model", ""), swarm, key)


def _unquoted(raw: str) -> str:
    try:
        return unquote(raw, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the link holds text that is not UTF-8: ask for another link") from None


def _sum_of(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:_SUM_CHARS]


def _encoded(value: bytes) -> str:
    return urlsafe_b64encode(value).rstrip(b"=").decode()


def _decoded(text: str, size: int) -> bytes:
    try:
        value = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        value = b""
    # One spelling alone: the decoder passes over characters that are not of its alphabet.
    if len(value) != size or _encoded(value) != text:
        raise ValueError("the link's key, or the name of its swarm, is damaged: ask for another link")
    return value
