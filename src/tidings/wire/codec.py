"""Bytes to commands and back. One decoder and one encoder for the process: both are safe to share."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from .commands import AnyCommand, Connect
from .events import Event

T = TypeVar("T")

_encoder: Final = msgspec.json.Encoder(order=None)
encode: Final = _encoder.encode
decode_command: Final = msgspec.json.Decoder(AnyCommand).decode
decode_connect: Final = msgspec.json.Decoder(Connect).decode
decode_event: Final = msgspec.json.Decoder(Event).decode
_plain: Final = msgspec.json.Decoder()
decode_any: Final = _plain.decode


def splice(head: bytes, tail: bytes) -> bytes:
    """Join two encoded JSON objects with distinct keys into one without decoding them.

    The envelope of a message is known to the server, its content is stored encoded: this puts them together
    for the price of a copy.
    """
    if len(tail) <= 2:
        return head
    if len(head) <= 2:
        return tail
    return b"%b,%b" % (head[:-1], tail[1:])


def decode(data: bytes, type: type[T]) -> T:
    """Decode one JSON document as `type`. Raises msgspec.ValidationError / DecodeError."""
    return msgspec.json.decode(data, type=type)


def to_builtins(value: Any) -> Any:
    """The plain JSON-able shape of a struct."""
    return msgspec.to_builtins(value)
