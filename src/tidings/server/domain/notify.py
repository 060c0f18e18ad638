"""Whether somebody is to be woken for a message, and if not, why not. Pure: facts in, a word out.

What a person has said most precisely counts: for this device in this channel, for this channel, for this device, for
all; then what the app has set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tidings.wire.notifications import DAYS, Level, NotificationPreferences, QuietHours


class Reason(StrEnum):
    """Why a push left or did not, in one list; documented in docs/guides/trace.md."""

    # Decided without looking at a device.
    NO_PROVIDER = "no_provider"
    OWN_MESSAGE = "own_message"
    SILENT = "silent"
    SYSTEM = "system"
    DELETED = "deleted"
    LARGE_CHANNEL = "large_channel"
    MUTED = "muted"
    NO_TOKEN = "no_token"  # noqa: S105 - a reason, not a secret
    # Decided by preferences.
    LEVEL_NONE = "level_none"
    NOT_MENTIONED = "not_mentioned"
    SNOOZED = "snoozed"
    QUIET_HOURS = "quiet_hours"
    # Decided by what has reached the device or the user.
    ACKNOWLEDGED = "acknowledged"
    READ = "read"
    CONNECTED = "connected"
    NOT_ACKNOWLEDGED = "not_acknowledged"
    # What became of it when it was to leave.
    SENT = "sent"
    FALLBACK = "fallback"
    CLEARED = "cleared"
    NOT_MEMBER = "not_member"
    PROVIDER_OFF = "provider_off"
    MISCONFIGURED = "misconfigured"
    TOKEN_DEAD = "token_dead"  # noqa: S105 - a reason, not a secret
    REJECTED = "rejected"
    TOO_LARGE = "too_large"
    UNAVAILABLE = "unavailable"
    TOO_LATE = "too_late"


NOTHING: Final = NotificationPreferences()


@dataclass(slots=True, frozen=True)
class Facts:
    """A message as far as it matters to one member. `mentions`: them by name, or everybody."""

    mentions: bool = False
    muted: bool = False


@dataclass(slots=True, frozen=True)
class Verdict:
    """Whether to wake, and the reason why not. `quiet`: without a sound."""

    wake: bool
    reason: Reason | None = None
    quiet: bool = False


@dataclass(slots=True, frozen=True)
class Wishes:
    """What a user has said about being told, by scope: (device or "", channel or not)."""

    everywhere: NotificationPreferences = NOTHING
    device: NotificationPreferences = NOTHING
    channel: Level | None = None
    device_channel: Level | None = None

    def level(self, default: Level) -> Level:
        """The level that counts."""
        for said in (self.device_channel, self.channel, self.device.level, self.everywhere.level):
            if said is not None:
                return said
        return default


def decide(facts: Facts, wishes: Wishes, default: Level, now_ms: int) -> Verdict:
    """Whether a device of somebody is to be woken, as far as they have a say in it."""
    if facts.muted:
        return Verdict(False, Reason.MUTED)
    level = wishes.level(default)
    if level == "none":
        return Verdict(False, Reason.LEVEL_NONE)
    if level == "mentions" and not facts.mentions:
        return Verdict(False, Reason.NOT_MENTIONED)
    for said in (wishes.device, wishes.everywhere):
        if said.snoozed_until is not None and now_ms < said.snoozed_until.timestamp() * 1000:
            return Verdict(False, Reason.SNOOZED)
    quiet = wishes.device.quiet_hours or wishes.everywhere.quiet_hours
    if quiet is not None and not (quiet.allow_mentions and facts.mentions) and is_quiet(quiet, now_ms):
        return Verdict(quiet.mode == "silent", None if quiet.mode == "silent" else Reason.QUIET_HOURS, True)
    return Verdict(True)


@lru_cache(maxsize=1_000)
def zone(name: str) -> ZoneInfo | None:
    """The time zone of that name, None if there is none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def is_quiet(hours: QuietHours, now_ms: int) -> bool:
    """Whether it is within quiet hours, on the clock that hangs on the user's wall.

    Wall times are compared as people read them: in the hour that a change of the clocks repeats, the same minutes are
    quiet twice, and of one that is left out nothing is.
    """
    local = _wall(hours, now_ms)
    start, end = _minutes(hours.start), _minutes(hours.end)
    minute = local.hour * 60 + local.minute
    today, yesterday = DAYS[local.weekday()], DAYS[local.weekday() - 1]
    if start < end:
        return today in hours.days and start <= minute < end
    return (today in hours.days and minute >= start) or (yesterday in hours.days and minute < end)


def quiet_until(hours: QuietHours, now_ms: int) -> int | None:
    """When the quiet hours that hold now are over, ms; None when it is not quiet."""
    if not is_quiet(hours, now_ms):
        return None
    # Their end is on a wall clock: steps of a minute, since clocks may change in between. A week at the most.
    at = now_ms - now_ms % _MINUTE_MS
    for _ in range(_WEEK_MINUTES):
        at += _MINUTE_MS
        if not is_quiet(hours, at):
            return at
    return at


_MINUTE_MS: Final = 60_000
_WEEK_MINUTES: Final = 7 * 24 * 60 + 120
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _wall(hours: QuietHours, now_ms: int) -> datetime:
    # A zone that this machine no longer knows counts as UTC: it was checked when it was set.
    return (_EPOCH + timedelta(milliseconds=now_ms)).astimezone(zone(hours.timezone) or UTC)


def _minutes(text: str) -> int:
    return int(text[:2]) * 60 + int(text[3:])


def wishes_of(stored: Mapping[tuple[str, bool], NotificationPreferences], device: str) -> Wishes:
    """A device's wishes from what is stored: (device or "", whether it is about the channel) → preferences."""
    return Wishes(
        everywhere=stored.get(("", False), NOTHING),
        device=stored.get((device, False), NOTHING),
        channel=stored.get(("", True), NOTHING).level,
        device_channel=stored.get((device, True), NOTHING).level,
    )
