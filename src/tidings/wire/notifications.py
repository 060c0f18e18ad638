"""What people want to be told of, where they can be woken, and how an app's pushes look."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, field

from . import limits
from .ids import ChannelId, DeviceId, Time, UserId
from .push import PushConfig, PushSubscription

Level: TypeAlias = Literal["all", "mentions", "none"]
Day: TypeAlias = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

ClockTime = Annotated[str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", examples=["22:00"])]
TimeZone = Annotated[str, Meta(min_length=1, max_length=64, examples=["Europe/Berlin"], description="IANA name")]
Language = Annotated[str, Meta(pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}$", examples=["de-AT"])]
ProviderId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_\-]{0,31}$", examples=["fcm"])]
TemplateText = Annotated[str, Meta(max_length=500)]

# Events that have a push of their own.
PushEvent: TypeAlias = Literal["message", "mention", "reply"]
PUSH_EVENTS: tuple[PushEvent, ...] = ("message", "mention", "reply")

# A person has a work phone, a private one, a tablet, a few browsers.
TOKENS_PER_USER_MAX = 50
FALLBACK_MAX = 5
LANGUAGES_MAX = 50


class QuietHours(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From `start` until `end` on these `days` nothing disturbs. Where `end` is not after `start` it is on the next
    day; a night belongs to the day on which it begins.

    `mode` skip: no push; silent: without a sound. `allow_mentions`: what mentions the user comes as ever.
    """

    start: ClockTime
    end: ClockTime
    timezone: TimeZone
    days: Annotated[list[Day], Meta(min_length=1, max_length=7)] = field(default_factory=lambda: list(DAYS))
    mode: Literal["skip", "silent"] = "skip"
    allow_mentions: bool = False


class NotificationPreferences(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user wants to be told of, on all devices or on one. `level` null: what is set more widely."""

    level: Level | None = None
    quiet_hours: QuietHours | None = None
    snoozed_until: Time | None = None
    language: Language | None = None


class ChannelNotifications(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user wants to be told of in one channel, on all devices or on one. `level` null: what is set for all."""

    level: Level | None = None


class PushTokenPut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a device can be woken: the `token` that the provider gave it, or a browser's `subscription`."""

    provider: ProviderId
    token: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    subscription: PushSubscription | None = None
    language: Language | None = None


class PushToken(msgspec.Struct, frozen=True, kw_only=True):
    """A device can be woken through this provider. The token itself is never shown."""

    user: UserId
    device: DeviceId
    provider: ProviderId
    language: Language | None = None
    created_at: Time
    updated_at: Time


class PushProvider(msgspec.Struct, frozen=True, kw_only=True):
    """How an app reaches a provider, without its secrets. `error` is what the provider said to bad configuration."""

    id: ProviderId
    config: PushConfig
    status: Literal["enabled", "disabled", "misconfigured"]
    error: str | None = None
    created_at: Time
    updated_at: Time


class WebPushKey(msgspec.Struct, frozen=True, kw_only=True):
    """`public_key` is base64url of the 65 bytes that `pushManager.subscribe` takes as `applicationServerKey`."""

    provider: ProviderId
    public_key: str


class PushProviderPut(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Secrets that are left out stay as they are."""

    config: PushConfig
    enabled: bool = True


class Template(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a push says. Variables: {sender}, {channel}, {app}, {count}; {text} where the app has switched content
    on."""

    title: TemplateText = ""
    body: TemplateText = ""


class FallbackStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A provider that is asked so many minutes after the message, if the user has not got it on any device by then."""

    provider: ProviderId
    after_minutes: Annotated[int, Meta(ge=0, le=7 * 24 * 60)]


class PushSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How an app's pushes are made.

    A device that has not acknowledged a message `grace_seconds` after it was sent is woken. In channels with more than
    `members_max` members only those who are mentioned are. `content`: whether pushes may hold what was said, names and
    the like; without it they hold identifiers and a text that is the same for every message.
    """

    grace_seconds: Annotated[int, Meta(ge=0, le=600)] = 5
    content: bool = False
    badge: bool = True
    sound: Annotated[str, Meta(max_length=64)] = "default"
    ttl_seconds: Annotated[int, Meta(ge=0, le=28 * 86_400)] = 86_400
    default_level: Level = "all"
    members_max: Annotated[int, Meta(ge=2, le=limits.RECEIPTS_MEMBERS_MAX)] = 500
    fallback: Annotated[list[FallbackStep], Meta(max_length=FALLBACK_MAX)] = field(default_factory=list)
    templates: dict[PushEvent, Annotated[dict[Language, Template], Meta(max_length=LANGUAGES_MAX)]] = field(
        default_factory=dict
    )
    link: Annotated[
        str, Meta(max_length=500, description="What a click opens; {channel_id} and {message_id} are filled in")
    ] = ""


class PushTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom a message would wake, in a channel if one is named. `send`: also send a test push."""

    user: UserId
    device: DeviceId | None = None
    channel: ChannelId | None = None
    send: bool = False


class PushTestStep(msgspec.Struct, frozen=True, kw_only=True):
    """One question that decides whether a device is woken, and its answer."""

    question: str
    passed: bool
    answer: str


class PushTestDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a message that came now would wake this device, step by step; `sent` is the provider's answer to a
    test."""

    device: DeviceId | None
    provider: ProviderId | None
    would_wake: bool
    steps: list[PushTestStep]
    sent: str | None = None


class PushTestResult(msgspec.Struct, frozen=True, kw_only=True):
    """What would happen to a message for this user."""

    user: UserId
    devices: list[PushTestDevice]
