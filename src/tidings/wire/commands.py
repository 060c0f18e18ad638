"""The socket's language: commands from clients, replies and signals from the server.

A command has a `type` and, when the client wants an answer, a `ref`, echoed in the reply. A session's commands take
effect in the order in which they were sent. Durable events (see `events`) arrive between replies.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from . import limits
from .ids import (
    AppId,
    ChannelId,
    ClientKey,
    Custom,
    DeviceId,
    Emoji,
    Limit,
    MessageId,
    Ref,
    Seq,
    StreamName,
    Text,
    Time,
    UserId,
)
from .inputs import AttachmentInput
from .resources import Head, Message, Presence, Receipt

# ---------------------------------------------------------------- commands


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    ref: Ref | None = None


class Position(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a client has of a stream: everything up to and including `seq`, of history `epoch`."""

    seq: Seq
    epoch: Annotated[str, Meta(max_length=64)] | None = None


Positions: TypeAlias = Annotated[dict[StreamName, Position], Meta(max_length=limits.SYNC_STREAMS_MAX)]


class DeviceInfo(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    id: DeviceId
    platform: Annotated[str, Meta(max_length=32)] | None = None
    name: Annotated[str, Meta(max_length=limits.NAME_LENGTH_MAX)] | None = None


class Connect(Command, frozen=True, kw_only=True, tag="connect"):
    """The first frame. `since`: the last `mark` the client was given; without it everything is live from now on.

    `positions`: what the client has; the server streams what is missing there at once, then goes live.
    With `since`, streams that moved and are not in `positions` wait until the client names them with `sync`.
    """

    token: Annotated[str, Meta(max_length=limits.TOKEN_BYTES_MAX)] | None = None
    app: AppId | None = None
    device: DeviceInfo
    since: Annotated[str, Meta(max_length=64)] | None = None
    positions: Positions = {}
    presence: Literal["online", "invisible"] = "online"
    client: Annotated[str, Meta(max_length=64)] | None = None


class Authenticate(Command, frozen=True, kw_only=True, tag="authenticate"):
    """A fresh token of the same user on the living connection, before the old one expires."""

    token: Annotated[str, Meta(max_length=limits.TOKEN_BYTES_MAX)]


class Ping(Command, frozen=True, kw_only=True, tag="ping"):
    """Answered by `pong`, which carries a newer `mark`."""


class Sync(Command, frozen=True, kw_only=True, tag="sync"):
    """Stream everything after these positions, in order, then go live on these streams."""

    positions: Positions


class Heads(Command, frozen=True, kw_only=True, tag="heads"):
    """The streams that moved since `since`, a page at a time."""

    since: Annotated[str, Meta(max_length=64)] | None = None
    cursor: Annotated[str, Meta(max_length=512)] | None = None
    limit: Annotated[int, Meta(ge=1, le=limits.SYNC_STREAMS_MAX)] = limits.SYNC_STREAMS_MAX


class Hold(Command, frozen=True, kw_only=True, tag="hold"):
    """No events and no signals until it is taken back with `on` false: then each stream goes on where it stood."""

    on: bool = True


class SendMessage(Command, frozen=True, kw_only=True, tag="message.send"):
    channel: ChannelId
    key: ClientKey
    text: Text = ""
    mentions: Annotated[list[UserId], Meta(max_length=limits.MENTIONS_MAX)] = []
    mention_all: bool = False
    reply_to: MessageId | None = None
    attachments: Annotated[list[AttachmentInput], Meta(max_length=limits.ATTACHMENTS_MAX)] = []
    custom: Custom = {}
    silent: bool = False


class EditMessage(Command, frozen=True, kw_only=True, tag="message.edit"):
    """Fields that are left out stay as they are."""

    channel: ChannelId
    id: MessageId
    text: Text | msgspec.UnsetType = msgspec.UNSET
    mentions: Annotated[list[UserId], Meta(max_length=limits.MENTIONS_MAX)] | msgspec.UnsetType = msgspec.UNSET
    attachments: Annotated[list[AttachmentInput], Meta(max_length=limits.ATTACHMENTS_MAX)] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    custom: Custom | msgspec.UnsetType = msgspec.UNSET


class DeleteMessage(Command, frozen=True, kw_only=True, tag="message.delete"):
    channel: ChannelId
    id: MessageId
    hard: bool = False


class AddReaction(Command, frozen=True, kw_only=True, tag="reaction.add"):
    channel: ChannelId
    id: MessageId
    emoji: Emoji


class RemoveReaction(Command, frozen=True, kw_only=True, tag="reaction.remove"):
    channel: ChannelId
    id: MessageId
    emoji: Emoji


class History(Command, frozen=True, kw_only=True, tag="history"):
    """Messages before, after or around a seq, newest page first when none is given."""

    channel: ChannelId
    before: Seq | None = None
    after: Seq | None = None
    around: Seq | None = None
    limit: Limit = limits.PAGE_DEFAULT


class Ack(Command, frozen=True, kw_only=True, tag="ack"):
    """This device has everything up to these seqs. Coalesce: once a second is plenty."""

    positions: Annotated[dict[StreamName, Seq], Meta(max_length=limits.SYNC_STREAMS_MAX)]


class Read(Command, frozen=True, kw_only=True, tag="read"):
    channel: ChannelId
    seq: Seq


class MarkUnread(Command, frozen=True, kw_only=True, tag="unread.mark"):
    """Count everything from the message at `seq` on as unread until the channel is read again."""

    channel: ChannelId
    seq: Seq


class Typing(Command, frozen=True, kw_only=True, tag="typing"):
    channel: ChannelId
    on: bool = True


class SetPresence(Command, frozen=True, kw_only=True, tag="presence.set"):
    status: Literal["online", "invisible"]


class WatchPresence(Command, frozen=True, kw_only=True, tag="presence.watch"):
    """Replaces the list of people whose presence this connection is told. Answered with their presence now."""

    users: Annotated[list[UserId], Meta(max_length=limits.PRESENCE_WATCH_MAX)]


AnyCommand: TypeAlias = (
    Connect
    | Authenticate
    | Ping
    | Sync
    | Heads
    | Hold
    | SendMessage
    | EditMessage
    | DeleteMessage
    | AddReaction
    | RemoveReaction
    | History
    | Ack
    | Read
    | MarkUnread
    | Typing
    | SetPresence
    | WatchPresence
)

# ---------------------------------------------------------------- replies


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    ref: int | None = None


class Limits(msgspec.Struct, frozen=True):
    frame_bytes: int
    text_length: int
    custom_bytes: int
    commands_per_second: float
    commands_burst: int
    in_flight: int


class Connected(Reply, frozen=True, kw_only=True, tag="connected"):
    """`moved`: the streams that moved since `since` (empty without `since`); `more`: cursor for the `heads` command.

    `mark` is an opaque, conservative point in time: keep the newest one and give it as `since` next time.
    """

    session: str
    user: UserId
    device: DeviceId
    server_time: Time
    mark: str
    heartbeat_seconds: int
    expires_at: Time | None
    limits: Limits
    moved: list[Head] = []
    more: str | None = None


class Authenticated(Reply, frozen=True, kw_only=True, tag="authenticated"):
    expires_at: Time


class Pong(Reply, frozen=True, kw_only=True, tag="pong"):
    at: Time
    mark: str


class HeadsReply(Reply, frozen=True, kw_only=True, tag="heads"):
    mark: str
    moved: list[Head]
    more: str | None = None


class StreamRefused(msgspec.Struct, frozen=True, omit_defaults=True):
    code: str
    detail: str
    epoch: str | None = None
    head: int | None = None


class Syncing(Reply, frozen=True, kw_only=True, tag="syncing"):
    """What will be streamed; `refused`: streams that cannot, each with its reason and where it stands now."""

    streams: list[str]
    refused: dict[str, StreamRefused] = {}


class MessageSent(Reply, frozen=True, kw_only=True, tag="message.sent"):
    """Stored. `duplicate`: the key was used before and this is the first result."""

    channel: ChannelId
    id: MessageId
    seq: int
    at: Time
    duplicate: bool = False


class Done(Reply, frozen=True, kw_only=True, tag="done"):
    """An edit, deletion, reaction or other change is stored. `seq`: its event's, absent when nothing changed."""

    seq: int | None = None


class HistoryReply(Reply, frozen=True, kw_only=True, tag="history"):
    """Messages in ascending order. `head`/`epoch`: where the stream stood; live events above `head` come next."""

    channel: ChannelId
    messages: list[Message]
    epoch: str
    head: int
    has_before: bool = False
    has_after: bool = False


class ReadReply(Reply, frozen=True, kw_only=True, tag="read"):
    channel: ChannelId
    read: int
    unread: int
    mentions: int


class PresenceReply(Reply, frozen=True, kw_only=True, tag="presence.list"):
    users: list[Presence]


class ErrorReply(Reply, frozen=True, kw_only=True, tag="error"):
    """A refusal: an entry of the catalogue in `problems`."""

    code: str
    detail: str
    retry: str
    field: str | None = None
    bound: int | None = None
    retry_after_ms: int | None = None


# ---------------------------------------------------------------- signals: best effort, never stored


class Synced(Reply, frozen=True, kw_only=True, tag="synced"):
    """The stream has caught up: what follows on it is live."""

    stream: str
    epoch: str
    seq: int


class TypingSignal(Reply, frozen=True, kw_only=True, tag="typing"):
    """`user` is typing until `expires_in_ms` from now, or until a message of theirs arrives.

    In a channel of more than `RECEIPTS_MEMBERS_MAX` members nobody is named: `count` people are typing there, the
    reader included, and replaces the number before.
    """

    channel: ChannelId
    user: UserId | None = None
    count: int | None = None
    on: bool = True
    expires_in_ms: int = 6000


class PresenceSignal(Reply, frozen=True, kw_only=True, tag="presence"):
    user: UserId
    status: Literal["online", "offline"]
    last_seen_at: Time | None = None


class ReceiptsSignal(Reply, frozen=True, kw_only=True, tag="receipts"):
    channel: ChannelId
    receipts: list[Receipt]


class UnreadSignal(Reply, frozen=True, kw_only=True, tag="unread"):
    """To the user's own devices, when their read position or marker moved."""

    channel: ChannelId
    read: int
    unread: int
    mentions: int
    marked_unread_from: int | None = None


class GoingAway(Reply, frozen=True, kw_only=True, tag="going_away"):
    """The server will close this connection now; come back after `reconnect_in_ms`."""

    reason: str
    reconnect_in_ms: int


AnyReply: TypeAlias = (
    Connected
    | Authenticated
    | Pong
    | HeadsReply
    | Syncing
    | MessageSent
    | Done
    | HistoryReply
    | ReadReply
    | PresenceReply
    | ErrorReply
)
AnySignal: TypeAlias = Synced | TypingSignal | PresenceSignal | ReceiptsSignal | UnreadSignal | GoingAway
