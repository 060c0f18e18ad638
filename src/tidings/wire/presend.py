"""The pre-send hook: an app's own say about each message before it is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from . import limits
from .ids import Custom, Text, Time, TypeName, Url, UserId
from .inputs import AttachmentInput

TYPES_MAX = 50
REASON_LENGTH_MAX = 300

TimeoutMs = Annotated[int, Meta(ge=100, le=10_000, description="After that there is no answer")]
OnFailure = Annotated[
    Literal["refuse", "allow"],
    Meta(
        description="What becomes of a message when the hook does not answer: it is refused, to be tried again; or sent"
    ),
]


class PresendHook(msgspec.Struct, frozen=True, kw_only=True):
    """The hook as it is set up. `secret` is shown when it is made and never again."""

    url: str
    timeout_ms: int = 1_500
    on_failure: OnFailure = "refuse"
    channel_types: list[str] = field(default_factory=list)
    include_backend: bool = False
    enabled: bool = True
    updated_at: Time
    secret: str | None = None


class PresendHookPut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`channel_types`: only in channels of these types; empty: in all. `include_backend`: also messages that no user
    sends. `rotate`: make another secret; what is sent is signed with the one before as well, until it is put again.
    """

    url: Url
    timeout_ms: TimeoutMs = 1_500
    on_failure: OnFailure = "refuse"
    channel_types: Annotated[list[TypeName], Meta(max_length=TYPES_MAX)] = field(default_factory=list)
    include_backend: bool = False
    enabled: bool = True
    rotate: bool = False


class PresendAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint answers. With `change`, what is named takes the place of what the sender wrote, within the same
    bounds; `reason` of a refusal is shown to the sender."""

    action: Literal["allow", "change", "refuse"]
    reason: Annotated[str, Meta(max_length=REASON_LENGTH_MAX)] = ""
    text: Text | None = None
    mentions: Annotated[list[UserId], Meta(max_length=limits.MENTIONS_MAX)] | None = None
    attachments: Annotated[list[AttachmentInput], Meta(max_length=limits.ATTACHMENTS_MAX)] | None = None
    custom: Custom | None = None


class PresendTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to try the hook with; nothing is stored."""

    text: Text = "Is this all right?"


class PresendTried(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint said, and what would become of the message."""

    outcome: Literal["allowed", "changed", "refused", "failed"]
    status: int | None = None
    milliseconds: int
    error: str | None = None
    reason: str | None = None
    text: str | None = None


class PresendAsked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is sent to the endpoint, as `data` of a `message.before_send` or `message.before_edit`."""

    app: str
    channel: str
    channel_type: str
    user: str | None = None
    message: str | None = None
    text: str = ""
    mentions: list[str] = []
    mention_all: bool = False
    reply_to: str | None = None
    attachments: list[Any] = []
    custom: dict[str, Any] = {}
