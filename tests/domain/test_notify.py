"""Who is woken: what was said most precisely counts, and every refusal has its word."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.server.domain.notify import Facts, Reason, Verdict, Wishes, decide, is_quiet, quiet_until, wishes_of, zone
from tidings.wire.notifications import DAYS, Level, NotificationPreferences, QuietHours

LEVELS: list[Level | None] = [None, "all", "mentions", "none"]


def ms(text: str, timezone: str = "UTC") -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(timezone)).timestamp() * 1000)


def said(**fields: object) -> NotificationPreferences:
    return NotificationPreferences(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("level", "mentions", "verdict"),
    [
        ("all", False, Verdict(True)),
        ("all", True, Verdict(True)),
        ("mentions", False, Verdict(False, Reason.NOT_MENTIONED)),
        ("mentions", True, Verdict(True)),
        ("none", False, Verdict(False, Reason.LEVEL_NONE)),
        ("none", True, Verdict(False, Reason.LEVEL_NONE)),
    ],
)
def test_levels(level: Level, mentions: bool, verdict: Verdict) -> None:
    assert decide(Facts(mentions=mentions), Wishes(channel=level), "all", 0) == verdict
    assert decide(Facts(mentions=mentions), Wishes(), level, 0) == verdict


@given(st.sampled_from(LEVELS), st.sampled_from(LEVELS), st.sampled_from(LEVELS), st.sampled_from(LEVELS))
def test_the_most_precise_word_counts(
    device_channel: Level | None, channel: Level | None, device: Level | None, everywhere: Level | None
) -> None:
    wishes = Wishes(said(level=everywhere), said(level=device), channel, device_channel)
    expected = device_channel or channel or device or everywhere or "mentions"
    assert wishes.level("mentions") == expected


def test_muted_is_first_and_a_mention_does_not_break_it() -> None:
    wishes = Wishes(channel="all")
    assert decide(Facts(mentions=True, muted=True), wishes, "all", 0) == Verdict(False, Reason.MUTED)


@pytest.mark.parametrize("scope", ["everywhere", "device"])
def test_a_snooze_holds_until_its_time(scope: str) -> None:
    until = datetime(2026, 5, 1, 12, tzinfo=UTC)
    wishes = Wishes(**{scope: said(snoozed_until=until)})  # type: ignore[arg-type]
    end = round(until.timestamp() * 1000)
    assert decide(Facts(mentions=True), wishes, "all", end - 1) == Verdict(False, Reason.SNOOZED)
    assert decide(Facts(), wishes, "all", end) == Verdict(True)


NIGHT = QuietHours(start="22:00", end="07:00", timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("local", "quiet"),
    [
        ("2026-03-10T21:59", False),
        ("2026-03-10T22:00", True),
        ("2026-03-10T23:59", True),
        ("2026-03-11T00:00", True),
        ("2026-03-11T06:59", True),
        ("2026-03-11T07:00", False),
        ("2026-03-11T12:00", False),
    ],
)
def test_quiet_hours_go_over_midnight_on_the_users_clock(local: str, quiet: bool) -> None:
    assert is_quiet(NIGHT, ms(local, "Europe/Berlin")) is quiet


def test_a_night_belongs_to_the_day_on_which_it_begins() -> None:
    friday = QuietHours(start="22:00", end="07:00", timezone="UTC", days=["fri"])
    assert is_quiet(friday, ms("2026-03-13T23:00"))
    assert is_quiet(friday, ms("2026-03-14T06:00"))
    assert not is_quiet(friday, ms("2026-03-14T23:00"))
    assert not is_quiet(friday, ms("2026-03-13T06:00"))


def test_equal_ends_are_a_whole_day() -> None:
    sunday = QuietHours(start="08:00", end="08:00", timezone="UTC", days=["sun"])
    assert is_quiet(sunday, ms("2026-03-15T08:00"))
    assert is_quiet(sunday, ms("2026-03-16T07:59"))
    assert not is_quiet(sunday, ms("2026-03-16T08:00"))


def test_when_clocks_change_the_wall_counts() -> None:
    # On 29 March 2026 clocks in Berlin go from 02:00 to 03:00, on 25 October back from 03:00 to 02:00.
    early = QuietHours(start="01:00", end="03:00", timezone="Europe/Berlin")
    assert is_quiet(early, ms("2026-03-29T00:59", "UTC"))
    assert not is_quiet(early, ms("2026-03-29T01:00", "UTC"))
    twice = QuietHours(start="02:00", end="03:00", timezone="Europe/Berlin")
    assert is_quiet(twice, ms("2026-10-25T00:30", "UTC"))
    assert is_quiet(twice, ms("2026-10-25T01:30", "UTC"))
    assert not is_quiet(twice, ms("2026-10-25T02:00", "UTC"))


def test_quiet_hours_skip_or_only_silence_and_mentions_may_be_let_through() -> None:
    night = ms("2026-03-11T03:00", "Europe/Berlin")
    skip = Wishes(said(quiet_hours=NIGHT))
    assert decide(Facts(), skip, "all", night) == Verdict(False, Reason.QUIET_HOURS, True)
    silent = Wishes(said(quiet_hours=QuietHours(start="22:00", end="07:00", timezone="Europe/Berlin", mode="silent")))
    assert decide(Facts(), silent, "all", night) == Verdict(True, None, True)
    open_to = QuietHours(start="22:00", end="07:00", timezone="Europe/Berlin", allow_mentions=True)
    assert decide(Facts(mentions=True), Wishes(said(quiet_hours=open_to)), "all", night) == Verdict(True)
    assert not decide(Facts(), Wishes(said(quiet_hours=open_to)), "all", night).wake
    # A device's own hours replace the user's.
    day = QuietHours(start="12:00", end="13:00", timezone="Europe/Berlin")
    assert decide(Facts(), Wishes(said(quiet_hours=NIGHT), said(quiet_hours=day)), "all", night) == Verdict(True)


clock_times = st.builds(lambda minute: f"{minute // 60:02}:{minute % 60:02}", st.integers(0, 24 * 60 - 1))
quiet_hours = st.builds(
    QuietHours,
    start=clock_times,
    end=clock_times,
    timezone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Chatham"]),
    days=st.lists(st.sampled_from(DAYS), min_size=1, max_size=6, unique=True),
)


@given(quiet_hours, st.integers(ms("2026-01-01T00:00"), ms("2027-01-01T00:00")))
def test_quiet_hours_end_where_it_is_said_that_they_end(hours: QuietHours, now: int) -> None:
    until = quiet_until(hours, now)
    assert (until is None) == (not is_quiet(hours, now))
    if until is not None:
        assert now < until <= now + timedelta(days=8) / timedelta(milliseconds=1)
        assert not is_quiet(hours, until)
        assert is_quiet(hours, until - 60_000) or until - 60_000 < now


def test_unknown_zones_are_none() -> None:
    assert zone("Europe/Berlin") is not None
    for name in ("Mars/Olympus", "../../etc/passwd", "", "Europe/Berlin\0"):
        assert zone(name) is None


def test_wishes_are_put_together_by_scope() -> None:
    stored = {
        ("", False): said(level="all"),
        ("phone", False): said(level="mentions"),
        ("", True): said(level="none"),
        ("phone", True): said(level="all"),
        ("laptop", True): said(level="none"),
    }
    wishes = wishes_of(stored, "phone")
    assert (wishes.everywhere.level, wishes.device.level, wishes.channel, wishes.device_channel) == (
        "all",
        "mentions",
        "none",
        "all",
    )
