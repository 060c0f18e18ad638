"""Bodies of REST requests.

Fields that are left out of a PATCH stay as they are; null empties those that may be empty.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from . import limits
from .ids import (
    ChannelId,
    ClientKey,
    Custom,
    Description,
    Emoji,
    Labels,
    MessageId,
    Name,
    RoleName,
    Seq,
    Text,
    Time,
    TypeName,
    Url,
    UserId,
)
from .inputs import AppSettingsInput, AttachmentInput, ChannelFeaturesInput


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every request body. Unknown fields are refused: a misspelt field must not be lost in silence."""


class UserUpsert(Request, frozen=True, kw_only=True):
    """Create the user or change the named fields of the one that exists."""

    id: UserId
    name: Name | UnsetType | None = UNSET
    avatar_url: Url | UnsetType | None = UNSET
    role: RoleName | UnsetType = UNSET
    custom: Custom | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET


class UserCreate(Request, frozen=True, kw_only=True):
    id: UserId | None = None
    name: Name | None = None
    avatar_url: Url | None = None
    role: RoleName = "user"
    custom: Custom = {}
    labels: Labels = {}


class UserUpdate(Request, frozen=True, kw_only=True):
    name: Name | UnsetType | None = UNSET
    avatar_url: Url | UnsetType | None = UNSET
    role: RoleName | UnsetType = UNSET
    custom: Custom | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET


class UsersUpsert(Request, frozen=True, kw_only=True):
    users: Annotated[list[UserUpsert], Meta(min_length=1, max_length=limits.BULK_MAX)]


class TokenMint(Request, frozen=True, kw_only=True):
    ttl_seconds: Annotated[int, Meta(ge=1, le=31_536_000)] = 3600


class TokensRevoke(Request, frozen=True, kw_only=True):
    """Without `jti`: every token of the user issued until now. With it: that one token."""

    jti: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class ChannelCreate(Request, frozen=True, kw_only=True):
    """`members`: user ids, each with the type's default role unless `roles` says otherwise."""

    id: ChannelId | None = None
    type: TypeName = "group"
    name: Name | None = None
    description: Description | None = None
    avatar_url: Url | None = None
    custom: Custom = {}
    labels: Labels = {}
    members: Annotated[list[UserId], Meta(max_length=limits.MEMBERS_AT_CREATION_MAX)] = []
    roles: dict[UserId, RoleName] = {}


class ChannelUpdate(Request, frozen=True, kw_only=True):
    name: Name | UnsetType | None = UNSET
    description: Description | UnsetType | None = UNSET
    avatar_url: Url | UnsetType | None = UNSET
    custom: Custom | UnsetType = UNSET
    labels: Labels | UnsetType = UNSET
    frozen: bool | UnsetType = UNSET


class MembershipUpdate(Request, frozen=True, kw_only=True):
    """The caller's own side of a channel."""

    hidden: bool | UnsetType = UNSET
    archived: bool | UnsetType = UNSET
    muted_until: Time | UnsetType | None = UNSET


class MembersAdd(Request, frozen=True, kw_only=True):
    users: Annotated[list[UserId], Meta(min_length=1, max_length=limits.BULK_MAX)]
    role: RoleName | None = None


class MemberUpdate(Request, frozen=True, kw_only=True):
    role: RoleName


class MessageSend(Request, frozen=True, kw_only=True):
    """`key` may also be given as the `Idempotency-Key` header; one of the two is required.

    `kind` and `user` are for backends: system messages, and messages on behalf of a user.
    """

    key: ClientKey | None = None
    text: Text = ""
    mentions: Annotated[list[UserId], Meta(max_length=limits.MENTIONS_MAX)] = []
    mention_all: bool = False
    reply_to: MessageId | None = None
    attachments: Annotated[list[AttachmentInput], Meta(max_length=limits.ATTACHMENTS_MAX)] = []
    custom: Custom = {}
    silent: bool = False
    kind: Literal["regular", "system"] = "regular"


class MessageEdit(Request, frozen=True, kw_only=True):
    text: Text | UnsetType = UNSET
    mentions: Annotated[list[UserId], Meta(max_length=limits.MENTIONS_MAX)] | UnsetType = UNSET
    attachments: Annotated[list[AttachmentInput], Meta(max_length=limits.ATTACHMENTS_MAX)] | UnsetType = UNSET
    custom: Custom | UnsetType = UNSET


class ReactionAdd(Request, frozen=True, kw_only=True):
    emoji: Emoji


class ReadMark(Request, frozen=True, kw_only=True):
    seq: Seq


class AppUpdate(Request, frozen=True, kw_only=True):
    name: Name | UnsetType = UNSET
    settings: AppSettingsInput | UnsetType = UNSET


class ApiKeyCreate(Request, frozen=True, kw_only=True):
    """`scopes`: permission words, or `*` for all of them."""

    name: Name
    scopes: Annotated[list[str], Meta(min_length=1, max_length=64)] = msgspec.field(default_factory=lambda: ["*"])
    expires_at: Time | None = None


class SigningKeyCreate(Request, frozen=True, kw_only=True):
    """HS256: leave `secret` out to have one made. Others: the public key in PEM."""

    algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"]
    kid: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.\-]+$")] | None = None
    secret: Annotated[str, Meta(min_length=32, max_length=1024)] | None = None
    public_key: Annotated[str, Meta(max_length=8192)] | None = None


class IdentityProviderCreate(Request, frozen=True, kw_only=True):
    jwks_url: Url
    algorithms: Annotated[list[Literal["RS256", "ES256", "EdDSA"]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["RS256"]
    )
    cache_seconds: Annotated[int, Meta(ge=30, le=86_400)] = 300


class RolePut(Request, frozen=True, kw_only=True):
    grants: Annotated[list[str], Meta(max_length=100)]


class RelationPut(Request, frozen=True, kw_only=True):
    kind: RoleName
    user: UserId
    other: UserId


class JobsRetry(Request, frozen=True, kw_only=True):
    """Only jobs of this kind; without it, all of them."""

    kind: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


class ChannelTypePut(Request, frozen=True, kw_only=True):
    features: ChannelFeaturesInput = ChannelFeaturesInput()
    grants: dict[RoleName, list[str]] = {}
    default_role: RoleName = "member"
    creator_role: RoleName = "owner"
    members_max: Annotated[int, Meta(ge=2, le=1_000_000)] = 100_000
    public: bool = False
    history: Literal["all", "since_join"] = "all"
