"""Durable events: one entry of a stream each, the same bytes for every reader.

On the wire: `{"type":"message.created","stream":"ch_1","seq":7,"at":"…","by":"alice","data":{…}}`. `data` has the
shape that `EVENT_DATA` names for the type. A client that meets a type it does not know advances its position and
goes on: types are added, never changed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal

import msgspec

from .ids import ChannelId, DeviceId, MessageId, RoleName, Time, UserId
from .resources import Channel, Message, Resource, User


class EventType(StrEnum):
    MESSAGE_CREATED = "message.created"
    MESSAGE_UPDATED = "message.updated"
    MESSAGE_DELETED = "message.deleted"
    REACTION_ADDED = "reaction.added"
    REACTION_REMOVED = "reaction.removed"
    MEMBER_ADDED = "member.added"
    MEMBER_UPDATED = "member.updated"
    MEMBER_REMOVED = "member.removed"
    CHANNEL_CREATED = "channel.created"
    CHANNEL_UPDATED = "channel.updated"
    CHANNEL_DELETED = "channel.deleted"
    # On the user's own stream, `@me`.
    CHANNEL_JOINED = "channel.joined"
    CHANNEL_LEFT = "channel.left"
    CHANNEL_SETTINGS = "channel.settings"
    PROFILE_UPDATED = "profile.updated"
    NOTIFICATIONS_UPDATED = "notifications.updated"


# Events of users' own streams; all others are of channels.
OWN_EVENTS: Final = frozenset(
    {"channel.joined", "channel.left", "channel.settings", "profile.updated", "notifications.updated"}
)


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event of a stream. `by` is the user who caused it, absent when the app's backend or the server did."""

    type: str
    stream: str
    seq: int
    at: Time
    by: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")


class MessageDeleted(Resource, frozen=True, kw_only=True):
    """`hard`: content and earlier versions are destroyed; otherwise only hidden from readers."""

    id: MessageId
    message_seq: int
    hard: bool = False
    # The message that it replied to, which has one reply less now.
    reply_to: MessageId | None = None


class ReactionChanged(Resource, frozen=True, kw_only=True):
    message_id: MessageId
    message_seq: int
    emoji: str
    user: UserId
    # How many users have this emoji on the message after the change.
    count: int = 0


class MemberChanged(Resource, frozen=True, kw_only=True):
    user: UserId
    role: RoleName | None = None
    # member.removed only: who ended it.
    reason: Literal["left", "removed", "deleted"] | None = None


class ChannelDeleted(Resource, frozen=True, kw_only=True):
    id: ChannelId


class ChannelJoined(Resource, frozen=True, kw_only=True):
    """Where the channel's stream stood when the user joined: `head` is the seq before their own member.added."""

    channel: ChannelId
    role: RoleName
    epoch: str
    head: int


class ChannelLeft(Resource, frozen=True, kw_only=True):
    channel: ChannelId
    reason: Literal["left", "removed", "deleted"]


class ChannelSettings(Resource, frozen=True, kw_only=True):
    channel: ChannelId
    hidden: bool = False
    archived: bool = False
    muted_until: Time | None = None


class NotificationsUpdated(Resource, frozen=True, kw_only=True):
    """What the user wants to be told of has changed: ask for it. `device` and `channel` say what it is about; without
    them it is about all."""

    device: DeviceId | None = None
    channel: ChannelId | None = None


EVENT_DATA: Final[dict[EventType, type[Any]]] = {
    EventType.MESSAGE_CREATED: Message,
    EventType.MESSAGE_UPDATED: Message,
    EventType.MESSAGE_DELETED: MessageDeleted,
    EventType.REACTION_ADDED: ReactionChanged,
    EventType.REACTION_REMOVED: ReactionChanged,
    EventType.MEMBER_ADDED: MemberChanged,
    EventType.MEMBER_UPDATED: MemberChanged,
    EventType.MEMBER_REMOVED: MemberChanged,
    EventType.CHANNEL_CREATED: Channel,
    EventType.CHANNEL_UPDATED: Channel,
    EventType.CHANNEL_DELETED: ChannelDeleted,
    EventType.CHANNEL_JOINED: ChannelJoined,
    EventType.CHANNEL_LEFT: ChannelLeft,
    EventType.CHANNEL_SETTINGS: ChannelSettings,
    EventType.PROFILE_UPDATED: User,
    EventType.NOTIFICATIONS_UPDATED: NotificationsUpdated,
}
