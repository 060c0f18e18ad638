"""What became of a message: identifiers, times and reasons, and nothing of what it says."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from .ids import ChannelId, MessageId, Time, UserId
from .resources import Resource


class TracedPush(Resource, frozen=True, kw_only=True):
    """One decision about a push, or one attempt. `device` null: about the user, or (`user` null as well) everybody.

    `reason` is a word of the list in docs/guides/trace.md; `detail` is the provider's own answer, cut.
    """

    at: Time
    device: str | None = None
    outcome: Literal["skipped", "waiting", "scheduled", "accepted", "retrying", "failed", "dropped"]
    reason: str
    provider: str | None = None
    detail: str | None = None


class TracedDevice(Resource, frozen=True, kw_only=True):
    """A device of a recipient. `acknowledged_at` is when it last told its position: that of this message, if it is at
    `position`, and at the latest then if the device is further by now."""

    id: str
    platform: str | None = None
    connected: bool = False
    position: int = 0
    acknowledged: bool = False
    acknowledged_at: Time | None = None
    push_tokens: Annotated[list[str], Meta(description="Providers that can wake it")] = field(default_factory=list)


class TracedRecipient(Resource, frozen=True, kw_only=True):
    """A member, what reached them, and why a push did or did not leave."""

    user: UserId
    delivered: bool
    read: bool
    devices: list[TracedDevice] = field(default_factory=list)
    push: list[TracedPush] = field(default_factory=list)


class TracedDelivery(Resource, frozen=True, kw_only=True):
    """One attempt to tell a webhook."""

    webhook: str
    id: str
    message: Annotated[str, Meta(description="The webhook-id header: the same for every attempt")]
    type: str
    at: Time
    attempt: int
    outcome: str
    status: int | None = None
    milliseconds: int
    error: str | None = None


class TracedWork(Resource, frozen=True, kw_only=True):
    """What is still to be done about the channel: a job that waits, is under way, or was given up."""

    kind: str
    target: Annotated[str, Meta(description="The webhook, or the device")] = ""
    state: Literal["waiting", "working", "dead"]
    due_at: Time
    attempts: int
    error: str | None = None


class MessageTrace(Resource, frozen=True, kw_only=True):
    """The life of a message. `handed_on`: the event has left the outbox, so that jobs know of it."""

    message: MessageId
    channel: ChannelId
    seq: int
    sender: UserId | None = None
    accepted_at: Time
    stored: Annotated[bool, Meta(description="Always true: what is not stored has no trace")] = True
    published: Annotated[bool, Meta(description="Told to every connected device of the channel's members")] = True
    handed_on: bool = True
    edited_at: Time | None = None
    deleted_at: Time | None = None
    members: int
    push: Annotated[list[TracedPush], Meta(description="About everybody in the channel")] = field(default_factory=list)
    webhooks: list[TracedDelivery] = field(default_factory=list)
    work: list[TracedWork] = field(default_factory=list)
    recipients: list[TracedRecipient] = field(default_factory=list)
    next: Annotated[str | None, Meta(description="Cursor of further recipients")] = None
