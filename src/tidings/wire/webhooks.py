"""Webhooks: where an app's backend hears of its events, and what became of each attempt to tell it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from .ids import Time, TypeName, Url

# Several services each with their own, and a few that are being tried out.
WEBHOOKS_MAX = 20
FILTERS_MAX = 50

EventFilter = Annotated[
    str, Meta(pattern=r"^(\*|[a-z_]+\.(\*|[a-z_]+))$", max_length=64, examples=["message.created", "message.*", "*"])
]
Description = Annotated[str, Meta(max_length=256)]
Outcome = Literal["delivered", "failed", "exhausted", "refused"]


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint. `secret` verifies HMAC-SHA256 (`v1`), `public_key` ed25519 (`v1a`); the secret is shown when it is
    made and never again. `content`: whether the events' data come along. `failing_since`: nothing has been delivered
    since then, though it was tried; `paused_until`: the next attempt.
    """

    id: str
    url: str
    description: str = ""
    events: list[EventFilter] = field(default_factory=lambda: ["*"])
    channel_types: list[str] = field(default_factory=list)
    content: bool = False
    status: Literal["enabled", "disabled"]
    reason: Annotated[str | None, Meta(description="Why it is disabled: by whom, gone, failing")] = None
    created_at: Time
    updated_at: Time
    failing_since: Time | None = None
    paused_until: Time | None = None
    public_key: str
    secret: str | None = None


class WebhookCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`events`: types, `message.*` or `*`. `channel_types`: events of channels of these types only; empty: of all.
    `secret`: one of your own, `whsec_` and base64 of 24 to 64 bytes; it is made if it is left out.
    """

    url: Url
    description: Description = ""
    events: Annotated[list[EventFilter], Meta(min_length=1, max_length=FILTERS_MAX)] = field(
        default_factory=lambda: ["*"]
    )
    channel_types: Annotated[list[TypeName], Meta(max_length=FILTERS_MAX)] = field(default_factory=list)
    content: bool = False
    secret: Annotated[str, Meta(max_length=128)] | None = None


class WebhookUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Changes what is named. Enabling sends nothing of what was missed: replay that."""

    url: Url | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    events: Annotated[list[EventFilter], Meta(min_length=1, max_length=FILTERS_MAX)] | UnsetType = UNSET
    channel_types: Annotated[list[TypeName], Meta(max_length=FILTERS_MAX)] | UnsetType = UNSET
    content: bool | UnsetType = UNSET
    status: Literal["enabled", "disabled"] | UnsetType = UNSET


class WebhookRotate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new secret and key pair. What is sent is signed with the old ones as well for `overlap_hours`."""

    secret: Annotated[str, Meta(max_length=128)] | None = None
    overlap_hours: Annotated[int, Meta(ge=0, le=24 * 30)] = 24


class WebhookDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt. `message` is the `webhook-id` header: the same for every attempt at one event.

    `outcome`: delivered; failed, and will be tried again; exhausted, the last attempt failed; refused, the address is
    not one that this server connects to (tried again, too).
    """

    id: str
    webhook: str
    message: str
    type: str
    at: Time
    attempt: int
    outcome: Outcome
    status: int | None = None
    milliseconds: int
    error: str | None = None


class WebhookExchange(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt with what was sent and what came back; bodies are cut."""

    delivery: WebhookDelivery
    url: str
    request_headers: dict[str, str]
    request_body: str
    response_headers: dict[str, str] = {}
    response_body: str = ""


class WebhookReplay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `message` (its `webhook-id`), or everything that happened from `since` on and before `until`."""

    message: Annotated[str, Meta(max_length=64)] | None = None
    since: Time | None = None
    until: Time | None = None


class WebhookReplayed(msgspec.Struct, frozen=True, kw_only=True):
    """How many channels have something that is sent again, in the background, in order."""

    channels: int


class WebhookBody(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent: the shape of Standard Webhooks."""

    type: str
    timestamp: Time
    data: dict[str, Any]
