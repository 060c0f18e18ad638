"""The socket's contract as an AsyncAPI 3.0 document, made from the wire types.

Specification: https://www.asyncapi.com/docs/reference/specification/v3.0.0. The document speaks for the server:
`receive` is what clients send to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from inspect import cleandoc
from typing import Any, Final, get_args
from urllib.parse import urlsplit

import msgspec

from tidings.wire import commands as c
from tidings.wire.events import EVENT_DATA, EventType
from tidings.wire.problems import CATALOGUE

from . import frame_examples

SOCKET_PATH: Final = "/v1/ws"

# Which reply answers which command, besides `error`.
REPLY_TO: Final[dict[type[c.Command], type[c.Reply]]] = {
    c.Connect: c.Connected,
    c.Authenticate: c.Authenticated,
    c.Ping: c.Pong,
    c.Sync: c.Syncing,
    c.Heads: c.HeadsReply,
    c.SendMessage: c.MessageSent,
    c.EditMessage: c.Done,
    c.DeleteMessage: c.Done,
    c.AddReaction: c.Done,
    c.RemoveReaction: c.Done,
    c.History: c.HistoryReply,
    c.Ack: c.Done,
    c.Read: c.ReadReply,
    c.MarkUnread: c.ReadReply,
    c.Typing: c.Done,
    c.Hold: c.Done,
    c.SetPresence: c.Done,
    c.WatchPresence: c.PresenceReply,
}

# What AsyncAPI allows in the name of a component; ours are `command.message.send`, `event.message.created` …
_CHANNEL: Final = "#/channels/socket"
_DESCRIPTION: Final = """\
JSON text frames over one WebSocket. The first frame is `connect`; then commands go up and replies, durable events and
best-effort signals come down, in one order. A command with a `ref` is answered with the same `ref`.
Events carry `stream` and `seq`, gapless per stream: a client keeps one position per stream and asks with `sync` for
whatever it misses."""


def command_types() -> tuple[type[c.Command], ...]:
    """Every command, in the order of the protocol."""
    return get_args(c.AnyCommand)


def reply_types() -> tuple[type[c.Reply], ...]:
    """Every reply."""
    return get_args(c.AnyReply)


def signal_types() -> tuple[type[c.Reply], ...]:
    """Every signal."""
    return get_args(c.AnySignal)


def tag_of(frame: type[msgspec.Struct]) -> str:
    """The `type` a frame has on the wire."""
    return str(frame.__struct_config__.tag)


def asyncapi_document(url: str) -> dict[str, Any]:
    """The document for a server whose public address is `url` (`https://chat.example.com`), as plain JSON values."""
    address = urlsplit(url)
    secure = address.scheme in {"https", "wss"}
    messages = _messages()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Tidings: the socket",
            "version": version("tidings"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "this": {
                "host": address.netloc,
                "protocol": "wss" if secure else "ws",
                "pathname": address.path.rstrip("/") or "/",
                "security": [{"$ref": "#/components/securitySchemes/userToken"}],
            }
        },
        "channels": {
            "socket": {
                "address": SOCKET_PATH,
                "title": "The socket",
                "servers": [{"$ref": "#/servers/this"}],
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
            }
        },
        "operations": _operations(),
        "components": {
            "messages": messages,
            "schemas": _schemas(),
            "securitySchemes": {
                "userToken": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "A user's token: in the `Authorization` header of the upgrade, or as `token` of the"
                    " first frame. Never in the address.",
                }
            },
        },
        "x-close-codes": close_codes(),
    }


def close_codes() -> list[dict[str, Any]]:
    """Every close code with the problems that end a connection with it and whether a client comes back."""
    found: dict[int, list[str]] = {}
    for problem in CATALOGUE.values():
        if problem.close is not None:
            found.setdefault(problem.close, []).append(problem.code)
    return [{"code": code, "problems": found[code], "reconnect": code < 4500} for code in sorted(found)]


def _summary(frame: type[Any]) -> str:
    # A struct without a docstring of its own shows its base's.
    own = frame.__dict__.get("__doc__")
    return cleandoc(own) if own else ""


def _message(name: str, schema: str, summary: str, example: Any, *, ref: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"name": name, "payload": {"$ref": f"#/components/schemas/{schema}"}}
    if summary:
        title, _, rest = summary.partition("\n\n")
        message["summary"] = " ".join(title.split())
        if rest:
            message["description"] = rest
    if ref:
        message["correlationId"] = {"location": "$message.payload#/ref"}
    message["examples"] = [{"payload": example}]
    return message


def _messages() -> dict[str, Any]:
    examples = {
        type(one): frame_examples.lean(one)
        for one in (*frame_examples.COMMANDS, *frame_examples.REPLIES, *frame_examples.SIGNALS)
    }
    found: dict[str, Any] = {}
    for kind, frames, ref in (
        ("command", command_types(), True),
        ("reply", reply_types(), True),
        ("signal", signal_types(), False),
    ):
        for frame in frames:
            name = f"{kind}.{tag_of(frame)}"
            found[name] = _message(name, frame.__name__, _summary(frame), examples[frame], ref=ref)
    for event in EventType:
        name = f"event.{event.value}"
        example = msgspec.json.decode(msgspec.json.encode(frame_examples.example_event(event)))
        found[name] = _message(name, name, _summary(EVENT_DATA[event]), example, ref=False)
    return found


def _schemas() -> dict[str, Any]:
    types: Iterable[Any] = [*command_types(), *reply_types(), *signal_types(), *dict.fromkeys(EVENT_DATA.values())]
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for event, data in EVENT_DATA.items():
        schemas[f"event.{event.value}"] = {
            "title": event.value,
            "type": "object",
            "required": ["type", "stream", "seq", "at", "data"],
            "properties": {
                "type": {"const": event.value},
                "stream": {"type": "string", "description": "A channel's id, or `@me`"},
                "seq": {"type": "integer", "minimum": 1},
                "at": {"type": "string", "format": "date-time"},
                "by": {"type": "string", "description": "Who caused it; absent for the app's backend and the server"},
                "data": {"$ref": f"#/components/schemas/{data.__name__}"},
            },
        }
    return schemas


def _operations() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for command in command_types():
        name = tag_of(command)
        reply = tag_of(REPLY_TO[command])
        found[name] = {
            "action": "receive",
            "channel": {"$ref": _CHANNEL},
            "messages": [{"$ref": f"{_CHANNEL}/messages/command.{name}"}],
            "reply": {
                "channel": {"$ref": _CHANNEL},
                "messages": [
                    {"$ref": f"{_CHANNEL}/messages/reply.{reply}"},
                    {"$ref": f"{_CHANNEL}/messages/reply.error"},
                ],
            },
        }
    found["events"] = {
        "action": "send",
        "channel": {"$ref": _CHANNEL},
        "summary": "Durable events, in order and without a gap per stream",
        "messages": [{"$ref": f"{_CHANNEL}/messages/event.{event.value}"} for event in EventType],
    }
    found["signals"] = {
        "action": "send",
        "channel": {"$ref": _CHANNEL},
        "summary": "Best effort, never stored",
        "messages": [{"$ref": f"{_CHANNEL}/messages/signal.{tag_of(signal)}"} for signal in signal_types()],
    }
    return found
