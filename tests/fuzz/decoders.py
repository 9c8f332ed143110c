"""Feeds every decoder of bytes from strangers with broken input: `python -m tests.fuzz.decoders --inputs 1000000`.

A decoder must either return a value or raise the error that its caller handles; anything else would end a connection,
or a start. It may compute for at most `SLOWEST_S`, and its allocations must stay small. Inputs are mutations of the
specification's vectors, one to three on top of each other, so that most pass the first checks and fail a later one.
Everything depends on one seed: a failure reports the seed, and the input in hex.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from peerd.compute.checkpoint.gguf.file import GgufFile
from peerd.compute.checkpoint.safetensors_file import header_length, parse_header
from peerd.compute.errors import CheckpointError
from peerd.protocol.addresses import Multiaddr
from peerd.protocol.connection.frames import decode_frame
from peerd.protocol.connection.hello import Hello
from peerd.protocol.encoding.packing import unpack
from peerd.protocol.encoding.schema import Message, parse
from peerd.protocol.encoding.tensors import TensorHeader, decode_tensor
from peerd.protocol.encoding.wire import MessageReader
from peerd.protocol.errors import PeerdError
from peerd.protocol.identity import Identity, decode_public_key, public_key_of
from peerd.protocol.messages import adapters, audits, dialback, punch, receipts, relay, session, span_training, training
from peerd.protocol.messages.receipts import open_receipt
from peerd.protocol.messages.tickets import open_ticket
from peerd.protocol.records.envelope import SignedRecord, _signed_bytes, open_record, open_untimely
from peerd.routing.dht import messages as dht
from peerd.routing.dht.messages import unpack_records
from peerd.routing.dht.table import load_contacts
from peerd.testing.hostile import hello_message, message_bytes, mutated_bytes, mutated_header

VECTORS = Path(__file__).parents[2] / "spec/vectors"
NOW = 1_700_000_000.0
OWNER = Identity.from_seed(bytes([3]) * 32)
# The limit for one input's computing; the largest take a millisecond. CPU time of the thread, so that other programs do
# not count.
SLOWEST_S = 0.25
# The growth of all decoders together, since the first thousand inputs of each.
MAX_GROWTH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Decoder:
    """`decode` takes a stranger's bytes, and raises only `errors`. `seeds`: valid inputs."""

    name: str
    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...] = (PeerdError,)
    # Whether inputs are MessagePack, so that its values can be changed too.
    is_packed: bool = False


class Found(AssertionError):
    """A decoder broke one of these rules."""


def decoders() -> list[Decoder]:
    """All decoders, each with the specification's vectors."""
    wire = tuple(bytes.fromhex(entry["message"]) for entry in _entries("wire", "message"))
    headers = _hex("messages", "dht", "relay", "training", "adapters", "reachability", "punching", field="header")
    records = _hex("records", field="record")
    kinds = [*_messages(session), *_messages(relay), *_messages(training), *_messages(adapters)]
    kinds += [*_messages(dialback), *_messages(punch), *_messages(dht), *_messages(audits), *_messages(receipts)]
    kinds += [*_messages(span_training), Hello]
    hello = message_bytes(hello_message(NOW))[4:-4]
    found = [
        Decoder("frames", decode_frame, _hex("frames", field="frame")),
        Decoder("messages", _read_messages, wire),
        Decoder("values", unpack, headers, is_packed=True),
        Decoder("headers", _parse_as_any(kinds), (*headers, hello), is_packed=True),
        Decoder("records", SignedRecord.decode, records, is_packed=True),
        Decoder("opened records", _open_records, records, is_packed=True),
        Decoder("bodies of signed records", _sign_and_open, tuple(_payloads(records)), is_packed=True),
        Decoder("lists of records", unpack_records, _hex("dht", field="body")),
        Decoder("tickets", _open_ticket, _hex("tickets", field="ticket")),
        Decoder("receipts", _open_receipt, _hex("receipts", field="receipt")),
        Decoder("tensors", _decode_tensor, tuple(_tensors())),
        Decoder("public keys", decode_public_key, (b"\x08\x01\x12\x20" + bytes(32),), (ValueError,)),
        Decoder("peer ids", _of_text(public_key_of), (OWNER.peer_id.encode(),), (ValueError,)),
        Decoder("addresses", _of_text(Multiaddr.parse), _addresses(), (ValueError,)),
        Decoder("contacts", _of_text(load_contacts), (_CONTACTS,), (ValueError, RecursionError)),
        Decoder("safetensors", _read_safetensors, (_SAFETENSORS,), (CheckpointError,)),
        Decoder("gguf", _read_gguf, (_GGUF,), (CheckpointError,)),
    ]
    return found


def fuzz(decoder: Decoder, inputs: int, random: Random) -> int:
    """Feed one decoder. Returns how many inputs it understood. Raises Found, with the input."""
    understood = 0
    for data in inputs_for(decoder, inputs, random):
        began = time.thread_time()
        try:
            decoder.decode(data)
            understood += 1
        except decoder.errors:
            pass
        except Exception as error:
            raise Found(f"{decoder.name} raised {error!r} on {data.hex()}") from error
        if (took_s := time.thread_time() - began) > SLOWEST_S:
            raise Found(f"{decoder.name} took {took_s:.2f} s on {data.hex()}")
    return understood


def inputs_for(decoder: Decoder, count: int, random: Random) -> Iterator[bytes]:
    """Broken inputs: mutations of the decoder's seeds, and now and then random bytes."""
    for _ in range(count):
        data = random.choice(decoder.seeds) if random.random() < 0.98 else random.randbytes(random.randrange(64))
        for _ in range(random.choice([1, 1, 2, 3])):
            data = _changed(data, decoder.is_packed, random)
        yield data


def _changed(data: bytes, is_packed: bool, random: Random) -> bytes:
    if is_packed and random.random() < 0.7:
        try:
            value = unpack(data)
        except PeerdError:
            value = None
        if isinstance(value, dict) and value:
            return message_bytes(mutated_header(value, random))[4:-4]
    return mutated_bytes(data, random)


def _entries(name: str, field: str) -> Iterator[Mapping[str, Any]]:
    """All objects of a file of vectors that have the field, at any depth."""
    waiting: list[Any] = [json.loads(next(VECTORS.rglob(f"{name}.json")).read_text())]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get(field), str):
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _hex(*names: str, field: str) -> tuple[bytes, ...]:
    found = []
    for name in names:
        for entry in _entries(name, field):
            try:
                found.append(bytes.fromhex(entry[field]))
            except ValueError:
                continue
    assert found, f"no vectors in {names}"
    return tuple(found)


def _messages(module: Any) -> list[type[Message]]:
    kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Message)]
    return [kind for kind in kinds if kind.__module__ == module.__name__]


def _read_messages(data: bytes) -> None:
    """Read messages as from a stream: cut anywhere, with bodies of at most 100 bytes."""
    reader = MessageReader(100)
    for at in range(0, len(data), 7):
        part = memoryview(data)[at : at + 7]
        while part:
            part = part[reader.feed(part) :]
            reader.take()


def _parse_as_any(kinds: list[type[Message]]) -> Callable[[bytes], object]:
    by_type: dict[str, list[type[Message]]] = {}
    for kind in kinds:
        by_type.setdefault(kind.TYPE, []).append(kind)

    def decode(data: bytes) -> object:
        header = unpack(data)
        name = header.get("type") if isinstance(header, dict) else None
        parsed = None
        # Some names mean different things in different protocols.
        for kind in by_type.get(name, kinds[:1]) if isinstance(name, str) else kinds[:1]:
            parsed = parse(header if isinstance(header, dict) else {}, (kind,))
        return parsed

    return decode


def _of_text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: read(data.decode(errors="replace"))


def _open_receipt(data: bytes) -> object:
    return open_receipt(data, client=OWNER.peer_id)


def _open_ticket(data: bytes) -> object:
    return open_ticket(data, owner=OWNER.peer_id, now=NOW)


def _open_records(data: bytes) -> object:
    record = SignedRecord.decode(data)
    open_untimely(record)
    return open_record(record, now=NOW)


def _payloads(records: tuple[bytes, ...]) -> Iterator[bytes]:
    for record in records:
        try:
            yield SignedRecord.decode(record).payload
        except PeerdError:
            continue


def _sign_and_open(payload: bytes) -> object:
    """A genuine record of a stranger, with these bytes as its body."""
    errors: list[PeerdError] = []
    for kind in ("peer", "server", "model"):
        signature = OWNER.sign(_signed_bytes(kind, payload))
        try:
            return open_record(SignedRecord(OWNER.public_key, kind, payload, signature), now=NOW)
        except PeerdError as error:
            errors.append(error)
    raise errors[0]


def _tensors() -> Iterator[bytes]:
    for entry in json.loads((VECTORS / "tensors.json").read_text())["valid"]:
        yield message_bytes(entry["header"], bytes.fromhex(entry["body"]))


def _decode_tensor(data: bytes) -> object:
    reader = MessageReader(4096)
    reader.feed(data)
    message = reader.take()
    if message is None:
        return None
    header = TensorHeader.from_fields(message.header, max_elements=4096)
    return decode_tensor(header, message.body)


def _addresses() -> tuple[bytes, ...]:
    texts = (
        "/ip4/203.0.113.7/tcp/31330/ws",
        "/ip6/2001:db8::1/tcp/443/wss",
        "/dns4/peer.example.org/tcp/443/wss",
        f"/ip4/203.0.113.7/tcp/1/ws/p2p/{OWNER.peer_id}",
        f"/ip4/203.0.113.7/tcp/1/ws/p2p/{OWNER.peer_id}/p2p-circuit/p2p/{OWNER.peer_id}",
    )
    return tuple(text.encode() for text in texts)


_CONTACTS = json.dumps(
    {"version": 1, "contacts": [{"peer_id": OWNER.peer_id, "addresses": ["/ip4/203.0.113.7/tcp/1/ws"]}]}
).encode()
_ENTRIES = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
).encode()
_SAFETENSORS = len(_ENTRIES).to_bytes(8, "little") + _ENTRIES + bytes(24)


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _gguf() -> bytes:
    """Version 3: one string, one number, an array of strings, and a tensor of 4 x 2 float32."""
    pairs = (
        (b"general.architecture", 8, _string(b"llama")),
        (b"llama.block_count", 4, (2).to_bytes(4, "little")),
        (
            b"tokenizer.ggml.tokens",
            9,
            (8).to_bytes(4, "little") + (2).to_bytes(8, "little") + 2 * _string(b"a"),
        ),
    )
    header = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + len(pairs).to_bytes(8, "little")
    for key, kind, value in pairs:
        header += _string(key) + kind.to_bytes(4, "little") + value
    sides = (4).to_bytes(8, "little") + (2).to_bytes(8, "little")
    header += _string(b"token_embd.weight") + (2).to_bytes(4, "little") + sides + bytes(4) + bytes(8)
    return header + bytes(-len(header) % 32) + bytes(32)


_GGUF = _gguf()
_FOLDER = tempfile.TemporaryDirectory(prefix="peerd-fuzz-")


def _read_safetensors(data: bytes) -> object:
    path = Path("model.safetensors")
    length = header_length(data[:8], len(data), path)
    return parse_header(data[8 : 8 + length], len(data), path)


def _read_gguf(data: bytes) -> object:
    path = Path(_FOLDER.name, "model.gguf")
    path.write_bytes(data)
    file = GgufFile(path)
    try:
        return file.tensors
    finally:
        file.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all decoders together")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    asked = parser.parse_args()
    found = decoders()
    print(f"seed {asked.seed}", flush=True)
    for decoder in found:
        fuzz(decoder, min(1000, asked.inputs), Random(asked.seed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for decoder in found:
        began, count = time.perf_counter(), asked.inputs // len(found)
        understood = fuzz(decoder, count, Random(asked.seed + 1))
        rate = count / (time.perf_counter() - began)
        print(f"{decoder.name}: {count} inputs, {understood} understood, {rate:.0f} a second", flush=True)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(f"memory grew by {grown / 2**20:.1f} MiB")
    if grown > MAX_GROWTH_BYTES:
        raise Found(f"memory grew by {grown} bytes")


if __name__ == "__main__":
    main()
