"""What an application is told: one class per event, made for `match`.

    async for event in chat.events():
        match event:
            case MessageCreated(channel=channel, message=message):
                print(channel, message.user, message.text)
            case MemberRemoved(channel=channel, member=member):
                ...

Durable events have `stream`, `seq` and `at`; the events of a channel name it in `channel` and follow each other
without a gap in `seq`. Signals are best effort and have no seq. A frame is decoded once, straight into these classes.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import msgspec
from msgspec import field

from ..wire import commands, events
from ..wire.commands import PresenceSignal, ReceiptsSignal, TypingSignal, UnreadSignal
from ..wire.ids import Time
from ..wire.resources import Channel, Message, User


class DurableEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An entry of a stream. `by`: the user who caused it, None when the app's backend or the server did."""

    seq: int
    at: Time
    by: str | None = None


class ChannelEvent(DurableEvent, frozen=True, kw_only=True):
    """An event of a channel's stream."""

    channel: str = field(name="stream")

    @property
    def stream(self) -> str:
        """The stream's name, under the name that all events have it."""
        return self.channel


class OwnEvent(DurableEvent, frozen=True, kw_only=True):
    """An event of the user's own stream, `@me`."""

    stream: str


class MessageCreated(ChannelEvent, frozen=True, kw_only=True, tag="message.created"):
    message: Message = field(name="data")


class MessageUpdated(ChannelEvent, frozen=True, kw_only=True, tag="message.updated"):
    """`message` is the whole message as it is now; with `content_omitted` it must be read again if it is known here."""

    message: Message = field(name="data")


class MessageDeleted(ChannelEvent, frozen=True, kw_only=True, tag="message.deleted"):
    message: events.MessageDeleted = field(name="data")


class ReactionAdded(ChannelEvent, frozen=True, kw_only=True, tag="reaction.added"):
    reaction: events.ReactionChanged = field(name="data")


class ReactionRemoved(ChannelEvent, frozen=True, kw_only=True, tag="reaction.removed"):
    reaction: events.ReactionChanged = field(name="data")


class MemberAdded(ChannelEvent, frozen=True, kw_only=True, tag="member.added"):
    member: events.MemberChanged = field(name="data")


class MemberUpdated(ChannelEvent, frozen=True, kw_only=True, tag="member.updated"):
    member: events.MemberChanged = field(name="data")


class MemberRemoved(ChannelEvent, frozen=True, kw_only=True, tag="member.removed"):
    member: events.MemberChanged = field(name="data")


class ChannelCreated(ChannelEvent, frozen=True, kw_only=True, tag="channel.created"):
    info: Channel = field(name="data")


class ChannelUpdated(ChannelEvent, frozen=True, kw_only=True, tag="channel.updated"):
    info: Channel = field(name="data")


class ChannelDeleted(ChannelEvent, frozen=True, kw_only=True, tag="channel.deleted"):
    info: events.ChannelDeleted = field(name="data")


class ChannelJoined(OwnEvent, frozen=True, kw_only=True, tag="channel.joined"):
    joined: events.ChannelJoined = field(name="data")

    @property
    def channel(self) -> str:
        """The channel's id."""
        return self.joined.channel


class ChannelLeft(OwnEvent, frozen=True, kw_only=True, tag="channel.left"):
    left: events.ChannelLeft = field(name="data")

    @property
    def channel(self) -> str:
        """The channel's id."""
        return self.left.channel


class ChannelSettingsChanged(OwnEvent, frozen=True, kw_only=True, tag="channel.settings"):
    settings: events.ChannelSettings = field(name="data")

    @property
    def channel(self) -> str:
        """The channel's id."""
        return self.settings.channel


class ProfileUpdated(OwnEvent, frozen=True, kw_only=True, tag="profile.updated"):
    profile: User = field(name="data")


class UnknownEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a type, or of a shape, that this version does not know: newer servers add some. Skip it."""

    type: str
    stream: str
    seq: int
    at: Time
    by: str | None = None
    data: Any = None


class HistoryReset(msgspec.Struct, frozen=True, kw_only=True):
    """What you have of this stream is no longer its history: drop it and take it anew (`channel.history()`).

    `reason`: `epoch_changed` after the server was restored from a backup, `cursor_expired` when this device was away
    for longer than the app's retention, `position_ahead` when the server has less than this device was told. Events
    that follow on the stream have a seq above `seq`.
    """

    stream: str
    seq: int
    epoch: str | None
    reason: str
    head: int


# What `Client.events()` gives.
Event: TypeAlias = (
    MessageCreated
    | MessageUpdated
    | MessageDeleted
    | ReactionAdded
    | ReactionRemoved
    | MemberAdded
    | MemberUpdated
    | MemberRemoved
    | ChannelCreated
    | ChannelUpdated
    | ChannelDeleted
    | ChannelJoined
    | ChannelLeft
    | ChannelSettingsChanged
    | ProfileUpdated
    | UnknownEvent
    | HistoryReset
)


class SendFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A message that waited in the outbox was refused for good and left it. Nobody else will see it."""

    channel: str
    key: str
    text: str
    code: str
    detail: str


# What `Client.signals()` gives.
Signal: TypeAlias = TypingSignal | PresenceSignal | ReceiptsSignal | UnreadSignal | SendFailed

Source: TypeAlias = Literal["live", "catchup"]

_WireEvent: TypeAlias = (
    MessageCreated
    | MessageUpdated
    | MessageDeleted
    | ReactionAdded
    | ReactionRemoved
    | MemberAdded
    | MemberUpdated
    | MemberRemoved
    | ChannelCreated
    | ChannelUpdated
    | ChannelDeleted
    | ChannelJoined
    | ChannelLeft
    | ChannelSettingsChanged
    | ProfileUpdated
)
Frame: TypeAlias = _WireEvent | commands.AnyReply | commands.AnySignal | UnknownEvent

_frame: Final = msgspec.json.Decoder(_WireEvent | commands.AnyReply | commands.AnySignal)
_unknown: Final = msgspec.json.Decoder(UnknownEvent)


_event: Final = msgspec.json.Decoder(_WireEvent)
EVENT_CLASSES: Final[tuple[type[Any], ...]] = (*_WireEvent.__args__, UnknownEvent)


def decode_frame(data: bytes) -> Frame:
    """One frame from the server. Raises msgspec.DecodeError when it is neither known nor an event."""
    try:
        frame: Frame = _frame.decode(data)
        return frame
    except msgspec.ValidationError:
        # A newer server: a type or a value that is not in our list. Its place in the stream still counts.
        return _unknown.decode(data)


def decode_event(data: bytes) -> Event:
    """One event of a stream. Raises msgspec.DecodeError when it is none."""
    try:
        event: Event = _event.decode(data)
        return event
    except msgspec.ValidationError:
        return _unknown.decode(data)
