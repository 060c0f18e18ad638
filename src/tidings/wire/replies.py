"""Bodies of REST replies that are not themselves a resource."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from .ids import ChannelId, ClientKey, MessageId, Time
from .resources import Head, Message

T = TypeVar("T")


class Page(msgspec.Struct, Generic[T], frozen=True):
    """One page of a list. `next` is the cursor of the page after it, null on the last one."""

    items: list[T]
    next: Annotated[str, Meta(max_length=512)] | None = None


class SentMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A stored message. `duplicate`: the key was used before with the same body, and this is the first result.

    `key` is the sender's, or the one the server made: such a send is not safe to repeat.
    """

    id: MessageId
    channel: ChannelId
    seq: int
    at: Time
    key: ClientKey
    duplicate: bool = False


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """The change is stored. `seq` is its event's, null when there was nothing to change."""

    seq: int | None


class HistoryPage(msgspec.Struct, frozen=True, kw_only=True):
    """Messages in ascending order of seq, and where the stream stood in the same snapshot."""

    messages: list[Message]
    epoch: str
    head: int
    has_before: bool
    has_after: bool


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a stream. `data` has the shape that its `type` says; meet unknown types with indifference.

    `by` is the user who caused it, absent when the app's backend or the server did.
    """

    type: str
    stream: str
    seq: int
    at: Time
    by: str | None = None
    data: dict[str, Any] = {}


class EventsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Events in ascending order of seq, gapless after the position that was given; `head` is the stream's last seq."""

    events: list[StreamEvent]
    epoch: str
    head: int


class SyncPage(msgspec.Struct, frozen=True, kw_only=True):
    """Streams that moved since the mark. Keep `mark` once every page (`next`) is read, and give it as `since`."""

    mark: str
    moved: list[Head]
    next: str | None = None


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`status` is `ok`, or says why the server should get no traffic. `bus` is given where this node hears nothing of
    the others: it reads everything from the store then, and serves on, more slowly."""

    status: str
    bus: Literal["cut_off"] | None = None
