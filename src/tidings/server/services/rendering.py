"""Making things public: rows and plaintext to the bytes that every reader gets."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from tidings.server.crypto.keyring import StreamCipher
from tidings.server.store.log import EventRow
from tidings.wire.codec import encode, splice
from tidings.wire.events import Event, EventType
from tidings.wire.ids import time_of
from tidings.wire.resources import Attachment, Message

CREATED = EventType.MESSAGE_CREATED.value
UPDATED = EventType.MESSAGE_UPDATED.value


class MessageBody(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A message as it is sealed: `wire.resources.Message` without `seq`, which is known only after the commit."""

    id: str
    channel: str
    user: str | None = None
    key: str | None = None
    kind: Literal["regular", "system"] = "regular"
    silent: bool = False
    reply_to: str | None = None
    created_at: datetime
    edited_at: datetime | None = None
    edited_by: str | None = None
    edits: int = 0
    text: str = ""
    mentions: list[str] = []
    mention_all: bool = False
    attachments: list[Attachment] = []
    custom: dict[str, Any] = {}


class _Place(msgspec.Struct, frozen=True):
    seq: int


decode_body = msgspec.json.Decoder(MessageBody).decode
decode_message = msgspec.json.Decoder(Message).decode
decode_place = msgspec.json.Decoder(_Place).decode


def render_event(type: str, stream: str, seq: int, at: int, by: str | None, data: bytes) -> bytes:
    """An event as it goes over the wire; `data` is the encoded payload."""
    return encode(Event(type, stream, seq, time_of(at), by, msgspec.Raw(data)))


def render_created(stream: str, seq: int, at: int, by: str | None, body: bytes) -> bytes:
    """A `message.created` event from the message's sealed form."""
    return render_event(CREATED, stream, seq, at, by, splice(b'{"seq":%d}' % seq, body))


def render_tombstone(
    channel: str,
    id: str,
    seq: int,
    user: str | None,
    created_at: int,
    deleted_at: int,
    deleted_by: str | None,
    reply_to: str | None,
) -> bytes:
    """A deleted message: its place, also among the replies to another one, without its content."""
    return encode(
        Message(
            id=id,
            channel=channel,
            seq=seq,
            user=user,
            reply_to=reply_to,
            created_at=time_of(created_at),
            deleted_at=time_of(deleted_at),
            deleted_by=deleted_by,
        )
    )


def render_withheld(data: bytes) -> bytes:
    """An edited message for those who may not read it: that it was edited, without its content."""
    full = decode_message(data)
    return encode(
        Message(
            id=full.id,
            channel=full.channel,
            seq=full.seq,
            user=full.user,
            kind=full.kind,
            created_at=full.created_at,
            edited_at=full.edited_at,
            edited_by=full.edited_by,
            edits=full.edits,
            content_omitted=True,
        )
    )


def render_logged(stream: str, row: EventRow, cipher: StreamCipher, tombstone: bytes | None, floor: int = 0) -> bytes:
    """An event read from the log: the same bytes that went out live, or with `tombstone` in place of a message that
    was deleted since, or without the content of a message that is edited but not the reader's to see, since its place
    is not after `floor`. Raises Tampered."""
    if row.redacted or row.sealed is None:
        data = tombstone if tombstone is not None else b"{}"
    else:
        data = cipher.open(row.sealed, row.item.encode())
        if row.type == CREATED:
            data = splice(b'{"seq":%d}' % row.seq, data)
        elif floor and row.type == UPDATED and decode_place(data).seq <= floor:
            data = render_withheld(data)
    return render_event(row.type, stream, row.seq, row.at, row.by, data)
