"""What the API shows: the nouns, as REST returns them and as events carry them.

Fields that hold their default are left out of the JSON. Times are RFC 3339 in UTC with milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from . import limits
from .ids import Custom, Labels, Name, Time, ToldId, Url
from .notifications import PushSettings

# These are only ever told: what clients send is in `requests` and `commands`, and checked there.
AppId: TypeAlias = ToldId
UserId: TypeAlias = ToldId
ChannelId: TypeAlias = ToldId
MessageId: TypeAlias = ToldId
DeviceId: TypeAlias = ToldId
RoleName: TypeAlias = ToldId
TypeName: TypeAlias = ToldId


class Resource(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base of everything the API shows."""


class Attachment(Resource, frozen=True, kw_only=True):
    """A reference to something outside the message: a file, an image, a link, a place. Metadata only."""

    type: Annotated[
        str, Meta(min_length=1, max_length=32, pattern=r"^[a-z0-9_.\-]+$", examples=["image", "file", "link"])
    ]
    url: Url | None = None
    title: Name | None = None
    mime_type: Annotated[str, Meta(max_length=128, pattern=r"^[\w.+\-]+/[\w.+\-]+$")] | None = None
    size: Annotated[int, Meta(ge=0, le=2**53 - 1, description="bytes")] | None = None
    width: Annotated[int, Meta(ge=0, le=1_000_000, description="pixels")] | None = None
    height: Annotated[int, Meta(ge=0, le=1_000_000, description="pixels")] | None = None
    duration_ms: Annotated[int, Meta(ge=0, le=2**53 - 1)] | None = None
    custom: Custom = {}


class Reaction(Resource, frozen=True, kw_only=True):
    """One emoji under a message: the exact count and the first few who used it."""

    emoji: str
    count: int
    users: list[str] = []


class MessageContent(Resource, frozen=True, kw_only=True):
    """What its author wrote: the part of a message that is encrypted at rest."""

    text: str = ""
    mentions: list[str] = []
    mention_all: bool = False
    attachments: list[Attachment] = []
    custom: dict[str, Any] = {}


class Message(Resource, frozen=True, kw_only=True):
    """A message. `seq` is the seq of the event that created it: its place in the channel for ever.

    `deleted_at` marks a tombstone: content is gone from every read, the place stays. `content_omitted` marks an edit
    that not everybody who hears of it may read: who has the message reads it again. `reactions`, `reply_count` and
    `last_reply_at` are there where a message is read; events tell their changes. Deleted replies do not count.
    """

    id: MessageId
    channel: ChannelId
    seq: int
    user: UserId | None = None
    key: str | None = None
    kind: Literal["regular", "system"] = "regular"
    silent: bool = False
    reply_to: MessageId | None = None
    created_at: Time
    edited_at: Time | None = None
    edited_by: UserId | None = None
    deleted_at: Time | None = None
    deleted_by: UserId | None = None
    edits: int = 0
    reactions: list[Reaction] = []
    reply_count: int = 0
    last_reply_at: Time | None = None
    text: str = ""
    mentions: list[str] = []
    mention_all: bool = False
    attachments: list[Attachment] = []
    custom: dict[str, Any] = {}
    content_omitted: bool = False


class MessageVersion(Resource, frozen=True, kw_only=True):
    """One version of a message that was edited; version 1 is the original."""

    version: int
    at: Time
    by: UserId | None = None
    text: str = ""
    mentions: list[str] = []
    mention_all: bool = False
    attachments: list[Attachment] = []
    custom: dict[str, Any] = {}


class User(Resource, frozen=True, kw_only=True):
    id: UserId
    name: str | None = None
    avatar_url: str | None = None
    role: RoleName = "user"
    custom: dict[str, Any] = {}
    labels: Labels = {}
    created_at: Time
    updated_at: Time
    last_seen_at: Time | None = None
    deactivated_at: Time | None = None
    deleted_at: Time | None = None


class Device(Resource, frozen=True, kw_only=True):
    id: DeviceId
    user: UserId
    platform: str | None = None
    name: str | None = None
    created_at: Time
    last_seen_at: Time


class Member(Resource, frozen=True, kw_only=True):
    user: UserId
    role: RoleName = "member"
    joined_at: Time
    delivered: int = 0
    read: int = 0


class Membership(Resource, frozen=True, kw_only=True):
    """The caller's own side of a channel: settings and counts that nobody else sees."""

    role: RoleName
    joined_at: Time
    hidden: bool = False
    archived: bool = False
    muted_until: Time | None = None
    delivered: int = 0
    read: int = 0
    unread: int = 0
    mentions: int = 0
    marked_unread_from: int | None = None


class Channel(Resource, frozen=True, kw_only=True):
    id: ChannelId
    type: TypeName
    epoch: str
    head: int
    name: str | None = None
    description: str | None = None
    avatar_url: str | None = None
    custom: dict[str, Any] = {}
    labels: Labels = {}
    created_by: UserId | None = None
    created_at: Time
    updated_at: Time
    last_message_at: Time | None = None
    frozen: bool = False
    deleted_at: Time | None = None
    member_count: int = 0
    message_count: int = 0
    membership: Membership | None = None
    # Given when asked for with `include=last_message` / `include=members` (at most 10 members).
    last_message: Message | None = None
    members: list[Member] | None = None


class Head(Resource, frozen=True, kw_only=True):
    """Where a stream stands, for a client that compares it with what it has.

    For channels also the caller's own positions and exact counts.
    """

    stream: str
    epoch: str
    head: int
    read: int = 0
    delivered: int = 0
    unread: int = 0
    mentions: int = 0


class Receipt(Resource, frozen=True, kw_only=True):
    """How far a member is: everything up to and including the seq was delivered to / read by them."""

    user: UserId
    delivered: int = 0
    read: int = 0


class ReceiptCounts(Resource, frozen=True, kw_only=True):
    """How many of those who were members when a message was sent it has reached, its sender left out."""

    members: int
    delivered: int
    read: int
    # The moment that they were counted at: in large channels a few seconds ago.
    as_of: Time


class Unread(Resource, frozen=True, kw_only=True):
    channel: ChannelId
    unread: int
    mentions: int
    read: int
    marked_unread_from: int | None = None


class UnreadTotal(Resource, frozen=True, kw_only=True):
    """Sums over all channels that are neither hidden, archived nor muted, plus the channels that have any."""

    unread: int
    mentions: int
    channels: list[Unread]
    next: str | None = None


class Presence(Resource, frozen=True, kw_only=True):
    user: UserId
    status: Literal["online", "offline"]
    last_seen_at: Time | None = None


class App(Resource, frozen=True, kw_only=True):
    id: AppId
    name: str
    settings: AppSettings
    created_at: Time


class AppSettings(Resource, frozen=True, kw_only=True):
    """What an app may set about itself."""

    create_users_on_connect: Annotated[
        bool, Meta(description="A valid token of an unknown user creates the user (no separate provisioning)")
    ] = False
    token_leeway_seconds: Annotated[int, Meta(ge=0, le=60)] = 10
    token_ttl_seconds_max: Annotated[int, Meta(ge=60, le=31_536_000)] | None = None
    token_audience: Annotated[str, Meta(max_length=limits.NAME_LENGTH_MAX)] | None = None
    token_issuer: Annotated[str, Meta(max_length=limits.NAME_LENGTH_MAX)] | None = None
    deleted_user_messages: Annotated[
        Literal["keep", "redact"],
        Meta(
            description="What becomes of a deleted user's messages: kept under the user's id, or turned into tombstones"
        ),
    ] = "keep"
    last_seen: Annotated[bool, Meta(description="Show people who share a channel when someone was last online")] = True
    push: Annotated[PushSettings, Meta(description="How the app wakes its users' devices")] = PushSettings()


class ApiKey(Resource, frozen=True, kw_only=True):
    """An API key of the app's backend. `secret` is the whole key and appears once, in the answer to its creation."""

    id: str
    name: str
    scopes: list[str]
    created_at: Time
    expires_at: Time | None = None
    revoked_at: Time | None = None
    last_used_at: Time | None = None
    secret: str | None = None


class SigningKeyInfo(Resource, frozen=True, kw_only=True):
    """A key that verifies users' tokens. A generated HS256 secret appears once, in the answer to its creation."""

    kid: str
    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"]
    status: Literal["active", "retired"]
    created_at: Time
    public_key: str | None = None
    secret: str | None = None


class IdentityProvider(Resource, frozen=True, kw_only=True):
    id: str
    jwks_url: Url
    algorithms: list[Literal["RS256", "ES256", "EdDSA"]]
    cache_seconds: int = 300
    created_at: Time


class Role(Resource, frozen=True, kw_only=True):
    """A named set of permission words. `scope` app: held by users anywhere; channel: held by members in a channel;
    relation: held towards the channels of the people a user is related to."""

    scope: Literal["app", "channel", "relation"]
    name: RoleName
    grants: list[str]
    built_in: bool = False


class Relation(Resource, frozen=True, kw_only=True):
    """`user` stands in relation `kind` to `other`: a clinician's `panel` of patients."""

    kind: RoleName
    user: UserId
    other: UserId


class ChannelType(Resource, frozen=True, kw_only=True):
    """What channels of a type can do, and what roles may do in them."""

    name: TypeName
    features: ChannelFeatures
    grants: Annotated[
        dict[str, list[str]],
        Meta(description="Channel role -> permission words; a role that is not named has the app's grants for it"),
    ] = {}
    default_role: RoleName = "member"
    creator_role: RoleName = "owner"
    members_max: Annotated[int, Meta(ge=2, le=1_000_000)] = 100_000
    public: Annotated[bool, Meta(description="Anyone in the app may read and join")] = False
    direct: Annotated[bool, Meta(description="Exactly two people, one channel per pair, membership fixed")] = False
    history: Annotated[
        Literal["all", "since_join"], Meta(description="What a new member sees of the time before they joined")
    ] = "all"
    built_in: bool = False


class ChannelFeatures(Resource, frozen=True, kw_only=True):
    edits: bool = True
    reactions: bool = True
    replies: bool = True
    typing: bool = True
    receipts: bool = True
    attachments: bool = True
    mentions: bool = True


class Token(Resource, frozen=True, kw_only=True):
    token: str
    expires_at: Time


class Job(Resource, frozen=True, kw_only=True):
    """Work that is done behind the scenes. `attempts` were made, `error` is what the last one came to."""

    id: str
    kind: str
    state: Literal["waiting", "dead"]
    due_at: Time
    attempts: int
    error: str | None = None
    created_at: Time
    died_at: Time | None = None


class JobsRetried(Resource, frozen=True, kw_only=True):
    """How many dead jobs live again."""

    count: int


class AuditEntry(Resource, frozen=True, kw_only=True):
    id: str
    at: Time
    actor: str
    action: str
    target: str
    detail: dict[str, Any] = {}
