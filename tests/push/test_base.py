"""What all adapters share: cutting to size, the time to wait, secrets that are not shown."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.push.conftest import HELLO, VAPID_KEY
from tidings.server.clock import ManualClock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.errors import Refusal
from tidings.server.outbound import Reply
from tidings.server.push import apns, fcm, http, webpush
from tidings.server.push.asking import reason_word, retry_after
from tidings.server.push.base import Notification, collapse_id, cut, encode_notification, fit
from tidings.server.push.lazy import LazyProviders
from tidings.wire.push import (
    ApnsConfig,
    FcmConfig,
    PushConfig,
    ServiceAccount,
    WebPushConfig,
    with_secrets_of,
    without_secrets,
)

LOADED = """
import sys
import tidings.server.push.base, tidings.server.push.lazy, tidings.server.clock
from tidings.server.domain.netguard import OutboundPolicy
tidings.server.push.lazy.LazyProviders(OutboundPolicy(), tidings.server.clock.SystemClock())
print(*sorted({"httpx", "aiohttp"} & set(sys.modules)))
"""
FAMILY = "👩‍👩‍👧‍👦"


@pytest.mark.parametrize(
    ("text", "characters", "shown"),
    [
        ("hello", 5, "hello"),
        ("hello", 4, "hell…"),
        ("hello there", 6, "hello…"),
        ("hello", 0, ""),
        (f"a{FAMILY}b", 4, "a…"),
        (f"a{FAMILY}b", 8, f"a{FAMILY}…"),
        ("cafe\u0301s", 4, "caf…"),
        ("🇩🇪🇫🇷🇮🇹", 3, "🇩🇪…"),
        ("👍🏽👍🏽", 3, "👍🏽…"),
        ("👍🏽", 1, ""),
        ("❤️x", 1, ""),
        ("हिन्दी", 1, ""),
    ],
)
def test_a_text_is_cut_where_a_reader_sees_a_border(text: str, characters: int, shown: str) -> None:
    assert cut(text, characters) == shown


@given(st.text(max_size=300), st.integers(0, 300))
def test_a_cut_is_a_beginning_of_the_text(text: str, characters: int) -> None:
    shown = cut(text, characters)
    assert shown == text or text.startswith(shown.removesuffix("…").rstrip())
    assert len(shown) <= characters + 1


@given(st.text(st.characters(codec="utf-8"), max_size=400), st.text(st.characters(codec="utf-8"), max_size=100))
def test_what_fits_is_within_the_bound_and_still_utf8(body: str, title: str) -> None:
    notification = msgspec.structs.replace(HELLO, title=title, body=body)
    rendered = fit(notification, encode_notification, 220)
    assert rendered is not None
    assert len(rendered) <= 220
    shown = json.loads(rendered)
    assert shown["data"] == HELLO.data
    if shown.get("body", "") != body and body:
        # The title is cut only when no body is left.
        assert shown.get("title", "") == title or not shown.get("body")


def test_nothing_is_sent_when_what_the_app_needs_does_not_fit() -> None:
    assert fit(Notification(id="p", data={"a": "x" * 100}), encode_notification, 100) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("9" * 400, 86_400),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0),
        ("Tue, 14 Nov 2123 22:00:00 GMT", 86_400),
        ("Tue, 99 Nov 2023 22:00:00 GMT", None),
    ],
)
def test_the_time_to_wait_is_read_and_bounded(header: str, seconds: float | None) -> None:
    assert retry_after(Reply(503, {"retry-after": header}, b""), ManualClock()) == seconds


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.sampled_from(["BadDeviceToken", "UNREGISTERED"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "status", "details", "@type", "errorCode", "fieldViolations", "reason", "errno", "id", "name"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
RIDDLES = [
    b"[" * 60_000,
    b'{"error":' * 10_000,
    b'"\xff"',
    b'{"reason":"\xed\xa0\x80"}',
    b'{"errno":1e999}',
    b"",
    b"null",
]


@given(
    st.integers(100, 599), JSON.map(lambda value: json.dumps(value).encode()) | st.binary() | st.sampled_from(RIDDLES)
)
def test_no_answer_can_make_an_adapter_fail(status: int, body: bytes) -> None:
    for adapter in (apns, fcm, http, webpush):
        told = adapter.outcome(Reply(status, {}, body), ManualClock())
        assert (told.kind == "accepted") == (told.reason == "accepted")
        assert len(told.reason) <= 64


def test_no_subscription_can_make_its_reader_fail() -> None:
    for token in ('{"x":' * 800, "[" * 4000, '{"endpoint":"https://[::1/","keys":{"p256dh":"","auth":""}}', "\ud800"):
        with pytest.raises(ValueError):
            webpush.read_subscription(token)


def test_a_reason_is_a_word_or_a_status() -> None:
    assert reason_word("BadDeviceToken", 400) == "BadDeviceToken"
    for text in (None, 7, "", "two words", "line\nbreak", "x" * 65, "ä", "<script>", "word\n"):
        assert reason_word(text, 400) == "status_400"


def test_a_collapse_key_fits_a_header() -> None:
    assert collapse_id("ch_1") == "ch_1"
    for key in ("x" * 65, "ä", "a\nb"):
        assert len(collapse_id(key)) == 43


ACCOUNT = ServiceAccount(project_id="p", client_email="e", private_key="SECRET")


@pytest.mark.parametrize(
    "config",
    [
        FcmConfig(service_account=ACCOUNT),
        ApnsConfig(team_id="TEAM123456", key_id="KEY1234567", private_key="SECRET", topic="com.example"),
        WebPushConfig(subject="mailto:a@b", private_key="SECRET", public_key="PUBLIC"),
    ],
)
def test_secrets_are_not_shown_and_kept_by_a_change_that_leaves_them_out(config: PushConfig) -> None:
    shown = msgspec.json.encode(without_secrets(config))
    assert b"SECRET" not in shown
    assert with_secrets_of(msgspec.json.decode(shown, type=PushConfig), config) == config
    # Those of another kind are no use.
    other = FcmConfig(service_account=ServiceAccount(project_id="p", client_email="e"))
    if not isinstance(config, FcmConfig):
        assert with_secrets_of(other, config) == other


def test_who_only_decides_about_pushes_loads_no_http_client() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


async def test_the_providers_are_loaded_when_they_are_needed() -> None:
    lazy = LazyProviders(OutboundPolicy(), ManualClock())
    await lazy.aclose()
    config = WebPushConfig(subject="mailto:a@clinic.example", private_key=VAPID_KEY)
    assert isinstance(lazy.check(config), WebPushConfig)
    await lazy.load()
    with pytest.raises(Refusal):
        lazy.check_token(config, "no subscription")
    assert (await lazy.open(config).send("no subscription", HELLO)).kind == "token_dead"
    await lazy.aclose()
