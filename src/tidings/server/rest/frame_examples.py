"""One example of every frame of the socket, for the AsyncAPI document. Typed, so none goes out of date."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from tidings.wire import commands as c
from tidings.wire import events as e
from tidings.wire import resources as r

_AT: Final = datetime(2026, 3, 14, 9, 26, 53, 589_000, UTC)
_LATER: Final = datetime(2026, 3, 14, 10, 0, tzinfo=UTC)
_MESSAGE_ID: Final = "m_01KKNMRE8N5YV3Q7W2ZC4T6B0D"
_KEY: Final = "5f0c7c1e-4b1d-4d5e-9f6a-2b8f1d0c9a11"
_MARK: Final = "19ceba52715"
_TOKEN: Final = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"  # noqa: S105 - an example of a token's form

_MESSAGE: Final = r.Message(
    id=_MESSAGE_ID,
    channel="ch_7f3k",
    seq=7,
    user="alice",
    key=_KEY,
    created_at=_AT,
    text="Good morning, how is the knee today?",
    mentions=["bob"],
)
_CHANNEL: Final = r.Channel(
    id="ch_7f3k",
    type="group",
    epoch="mfrggzdf",
    head=1,
    name="Knee follow-up",
    created_by="alice",
    created_at=_AT,
    updated_at=_AT,
)
_HEAD: Final = r.Head(stream="ch_7f3k", epoch="mfrggzdf", head=9, read=6, delivered=7, unread=2, mentions=1)

COMMANDS: Final[tuple[c.Command, ...]] = (
    c.Connect(ref=1, token=_TOKEN, device=c.DeviceInfo(id="phone-1", platform="ios"), since=_MARK),
    c.Authenticate(ref=2, token=_TOKEN),
    c.Ping(ref=3),
    c.Sync(ref=4, positions={"ch_7f3k": c.Position(7, "mfrggzdf"), "@me": c.Position(3, "nbswy3dp")}),
    c.Heads(ref=5, since=_MARK),
    c.Hold(ref=16),
    c.SendMessage(ref=6, channel="ch_7f3k", key=_KEY, text="Good morning, how is the knee today?", mentions=["bob"]),
    c.EditMessage(ref=7, channel="ch_7f3k", id=_MESSAGE_ID, text="Good morning, how is the knee?"),
    c.DeleteMessage(ref=8, channel="ch_7f3k", id=_MESSAGE_ID),
    c.AddReaction(ref=9, channel="ch_7f3k", id=_MESSAGE_ID, emoji="👍"),
    c.RemoveReaction(ref=10, channel="ch_7f3k", id=_MESSAGE_ID, emoji="👍"),
    c.History(ref=11, channel="ch_7f3k", before=7, limit=20),
    c.Ack(positions={"ch_7f3k": 9}),
    c.Read(ref=12, channel="ch_7f3k", seq=9),
    c.MarkUnread(ref=13, channel="ch_7f3k", seq=7),
    c.Typing(channel="ch_7f3k"),
    c.SetPresence(ref=14, status="invisible"),
    c.WatchPresence(ref=15, users=["bob", "carol"]),
)

REPLIES: Final[tuple[c.Reply, ...]] = (
    c.Connected(
        ref=1,
        session="s_4nq6zj7m2x5k3b8t9w1r0v6c2y",
        user="alice",
        device="phone-1",
        server_time=_AT,
        mark=_MARK,
        heartbeat_seconds=25,
        expires_at=_LATER,
        limits=c.Limits(131_072, 20_000, 8_192, 50.0, 200, 256),
        moved=[_HEAD],
    ),
    c.Authenticated(ref=2, expires_at=_LATER),
    c.Pong(ref=3, at=_AT, mark=_MARK),
    c.HeadsReply(ref=5, mark=_MARK, moved=[_HEAD]),
    c.Syncing(
        ref=4,
        streams=["@me"],
        refused={
            "ch_7f3k": c.StreamRefused("epoch_changed", "The stream's history was replaced: start over.", "e2", 4)
        },
    ),
    c.MessageSent(ref=6, channel="ch_7f3k", id=_MESSAGE_ID, seq=7, at=_AT),
    c.Done(ref=7, seq=8),
    c.HistoryReply(ref=11, channel="ch_7f3k", messages=[_MESSAGE], epoch="mfrggzdf", head=9, has_before=True),
    c.ReadReply(ref=12, channel="ch_7f3k", read=9, unread=0, mentions=0),
    c.PresenceReply(ref=15, users=[r.Presence(user="bob", status="offline", last_seen_at=_AT)]),
    c.ErrorReply(
        ref=6,
        code="invalid_field",
        detail="A message needs a text, an attachment or custom data.",
        retry="never",
        field="text",
        bound=1,
    ),
)

SIGNALS: Final[tuple[c.Reply, ...]] = (
    c.Synced(stream="ch_7f3k", epoch="mfrggzdf", seq=9),
    c.TypingSignal(channel="ch_7f3k", user="bob"),
    c.TypingSignal(channel="ch_7f3k", count=12),
    c.PresenceSignal(user="bob", status="online"),
    c.ReceiptsSignal(channel="ch_7f3k", receipts=[r.Receipt(user="bob", delivered=9, read=7)]),
    c.UnreadSignal(channel="ch_7f3k", read=9, unread=0, mentions=0),
    c.GoingAway(reason="going_away", reconnect_in_ms=7_250),
)

_DATA: Final[dict[e.EventType, r.Resource]] = {
    e.EventType.MESSAGE_CREATED: _MESSAGE,
    e.EventType.MESSAGE_UPDATED: msgspec.structs.replace(
        _MESSAGE, text="Good morning, how is the knee?", edits=1, edited_at=_AT, edited_by="alice"
    ),
    e.EventType.MESSAGE_DELETED: e.MessageDeleted(id=_MESSAGE_ID, message_seq=7),
    e.EventType.REACTION_ADDED: e.ReactionChanged(
        message_id=_MESSAGE_ID, message_seq=7, emoji="👍", user="bob", count=1
    ),
    e.EventType.REACTION_REMOVED: e.ReactionChanged(message_id=_MESSAGE_ID, message_seq=7, emoji="👍", user="bob"),
    e.EventType.MEMBER_ADDED: e.MemberChanged(user="carol", role="member"),
    e.EventType.MEMBER_UPDATED: e.MemberChanged(user="carol", role="moderator"),
    e.EventType.MEMBER_REMOVED: e.MemberChanged(user="carol", reason="left"),
    e.EventType.CHANNEL_CREATED: _CHANNEL,
    e.EventType.CHANNEL_UPDATED: msgspec.structs.replace(_CHANNEL, head=8, name="Knee follow-up, week 2"),
    e.EventType.CHANNEL_DELETED: e.ChannelDeleted(id="ch_7f3k"),
    e.EventType.CHANNEL_JOINED: e.ChannelJoined(channel="ch_7f3k", role="member", epoch="mfrggzdf", head=8),
    e.EventType.CHANNEL_LEFT: e.ChannelLeft(channel="ch_7f3k", reason="removed"),
    e.EventType.CHANNEL_SETTINGS: e.ChannelSettings(channel="ch_7f3k", archived=True),
    e.EventType.NOTIFICATIONS_UPDATED: e.NotificationsUpdated(channel="ch_7f3k"),
    e.EventType.PROFILE_UPDATED: r.User(id="alice", name="Alice Ahmed", created_at=_AT, updated_at=_LATER),
}


def example_event(type: e.EventType) -> e.Event:
    """An event of this type. Raises KeyError for a type without an example."""
    own = type.value in e.OWN_EVENTS
    data = msgspec.Raw(msgspec.json.encode(_DATA[type]))
    return e.Event(type.value, "@me" if own else "ch_7f3k", 4 if own else 9, _AT, "alice", data)


def lean(frame: msgspec.Struct) -> dict[str, Any]:
    """A frame as plain JSON values without the fields that hold their default: as a client would write it."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(frame))
    for field in msgspec.structs.fields(frame):
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if default is not msgspec.NODEFAULT and getattr(frame, field.name) == default:
            plain.pop(field.encode_name, None)
    return plain
