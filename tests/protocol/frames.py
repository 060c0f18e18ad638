"""Judges frames that stand in documents: what a client may send, and exactly what the server would say."""

from typing import Any

import msgspec

from tidings.wire import commands as c
from tidings.wire.codec import decode_command
from tidings.wire.events import EVENT_DATA, Event, EventType

_SAYS = msgspec.json.Decoder(c.AnyReply)
_SIGNALS = msgspec.json.Decoder(c.AnySignal)
_OWN_EVENTS = {"channel.joined", "channel.left", "channel.settings", "notifications.updated", "profile.updated"}


def check_client_frame(frame: Any) -> c.AnyCommand:
    """Decode a frame as the server does. Raises msgspec.ValidationError."""
    return decode_command(msgspec.json.encode(frame))


def check_server_frame(frame: Any) -> Any:
    """Decode a reply, signal or event, and insist that the server would write it like that: unknown fields, and fields
    that hold their default, would not be there. Raises msgspec.ValidationError, AssertionError."""
    data = msgspec.json.encode(frame)
    if "stream" in frame and "seq" in frame and frame["type"] != "synced":
        event = msgspec.json.decode(data, type=Event)
        payload = msgspec.json.decode(bytes(event.data), type=EVENT_DATA[EventType(event.type)])
        assert (event.stream == "@me") == (event.type in _OWN_EVENTS), f"{event.type} is not an event of {event.stream}"
        decoded: Any = msgspec.structs.replace(event, data=msgspec.Raw(msgspec.json.encode(payload)))
    else:
        is_signal = frame["type"] in {str(kind.__struct_config__.tag) for kind in c.AnySignal.__args__}  # type: ignore[attr-defined]
        decoded = (_SIGNALS if is_signal else _SAYS).decode(data)
    says = msgspec.json.decode(msgspec.json.encode(decoded))
    assert says == frame, f"the server would say {msgspec.json.encode(decoded).decode()}"
    return decoded
