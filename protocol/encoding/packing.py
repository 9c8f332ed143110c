"""Packs and unpacks the msgpack that peers may use: unique text keys, bounded depth, no extension types.

msgpack's own decoder accepts repeated keys, byte-string keys, timestamps and a thousand levels, which two
implementations would read differently or not survive; `unpack` refuses them all. The caller must bound the size of
the data first, and schema.py checks the fields afterwards.
"""

from __future__ import annotations

from typing import Any

import msgpack

from peerd.protocol.errors import RemoteProtocolError

MAX_DEPTH = 8

_SCALARS = frozenset((str, bytes, int, float, bool, type(None)))


def pack(value: Any) -> bytes:
    """`value` in msgpack's shortest form. Raises TypeError or ValueError for what msgpack cannot hold."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: bytes | bytearray | memoryview, *, max_depth: int = MAX_DEPTH) -> Any:
    """The one value in `data`: None, bool, int, float, str, bytes, list or dict, nested at most `max_depth` deep.

    Raises RemoteProtocolError for anything else.
    """
    try:
        _check_complete(data)
        value = msgpack.unpackb(data, strict_map_key=True, object_pairs_hook=_unique_keys, ext_hook=_refuse_extension)
    except ValueError as error:
        raise RemoteProtocolError(f"malformed msgpack: {str(error) or type(error).__name__}") from None
    _check(value, max_depth)
    return value


def _check_complete(data: bytes | bytearray | memoryview) -> None:
    """Raise ValueError where a list or map claims more than there is: the decoder would allocate each claim first.

    Skipping builds nothing. What is complete costs memory in proportion to its bytes.
    """
    # By default it makes room for 1 MiB.
    unpacker = msgpack.Unpacker(read_size=max(1, len(data)), max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        raise ValueError("incomplete input") from None


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    if any(type(key) is not str for key, _ in pairs):
        raise ValueError("a map's keys must be text")
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a map has the same key twice")
    return unique


def _refuse_extension(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _check(value: Any, depth_left: int) -> None:
    """Refuse what the decoder's hooks do not see: too deep nesting and msgpack's built-in timestamp extension."""
    kind = type(value)
    if kind in _SCALARS:
        return
    if kind is not list and kind is not dict:
        raise RemoteProtocolError("malformed msgpack: extension type -1")
    if depth_left == 0:
        raise RemoteProtocolError("malformed msgpack: nested too deep")
    for item in value.values() if kind is dict else value:
        # Most are, and a header of 16,000 numbers must not cost as many calls.
        if type(item) not in _SCALARS:
            _check(item, depth_left - 1)
