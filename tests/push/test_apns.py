"""Apple's push service over real HTTP/2: what is sent, whose token it is, and what each answer means (W4)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from tests.push.conftest import APNS_TOKEN, HELLO, POLICY
from tidings.server.clock import ManualClock
from tidings.server.errors import Refusal
from tidings.server.push import apns as adapter
from tidings.server.push.base import Notification, Provider
from tidings.server.push.factory import PushProviders
from tidings.testing.push_stubs import Answer, ApnsStub
from tidings.testing.push_stubs.apns import apns_error
from tidings.wire.push import ApnsConfig

# https://developer.apple.com/documentation/usernotifications/handling-notification-responses-from-apns, table 3.
TABLE = {
    "BadCollapseId": (400, "rejected"),
    "BadDeviceToken": (400, "token_dead"),
    "BadExpirationDate": (400, "rejected"),
    "BadMessageId": (400, "rejected"),
    "BadPriority": (400, "rejected"),
    "BadTopic": (400, "misconfigured"),
    "DeviceTokenNotForTopic": (400, "misconfigured"),
    "DuplicateHeaders": (400, "rejected"),
    "IdleTimeout": (400, "retry"),
    "InvalidPushType": (400, "rejected"),
    "MissingDeviceToken": (400, "token_dead"),
    "MissingTopic": (400, "misconfigured"),
    "PayloadEmpty": (400, "rejected"),
    "TopicDisallowed": (400, "misconfigured"),
    "BadCertificate": (403, "misconfigured"),
    "BadCertificateEnvironment": (403, "misconfigured"),
    "BadEnvironmentKeyIdInToken": (403, "misconfigured"),
    "ExpiredProviderToken": (403, "misconfigured"),
    "Forbidden": (403, "misconfigured"),
    "InvalidProviderToken": (403, "misconfigured"),
    "MissingProviderToken": (403, "misconfigured"),
    "UnrelatedKeyIdInToken": (403, "misconfigured"),
    "BadPath": (404, "rejected"),
    "MethodNotAllowed": (405, "rejected"),
    "ExpiredToken": (410, "token_dead"),
    "Unregistered": (410, "token_dead"),
    "PayloadTooLarge": (413, "too_large"),
    "TooManyProviderTokenUpdates": (429, "retry"),
    "TooManyRequests": (429, "retry"),
    "InternalServerError": (500, "retry"),
    "ServiceUnavailable": (503, "retry"),
    "Shutdown": (503, "retry"),
}
# Reasons of a time to come, and answers without one.
UNKNOWN = [
    (apns_error(400, "SomethingNew"), "rejected", "SomethingNew"),
    (apns_error(403, "SomethingNew"), "misconfigured", "SomethingNew"),
    (apns_error(410, "SomethingNew"), "token_dead", "SomethingNew"),
    (apns_error(429, "SomethingNew"), "retry", "SomethingNew"),
    (Answer(502, None), "retry", "status_502"),
    (Answer(400, "no object"), "rejected", "status_400"),
    (apns_error(400, "a sentence, not a word"), "rejected", "status_400"),
]


async def test_a_push_arrives_over_http2(apns: ApnsStub, apns_provider: Provider, clock: ManualClock) -> None:
    sent = msgspec.structs.replace(
        HELLO, badge=3, sound="default", collapse_key="ch_1", thread="ch_1", category="chat", ttl_seconds=60
    )
    told = await apns_provider.send(APNS_TOKEN, sent)
    assert (told.kind, told.status) == ("accepted", 200)
    assert told.provider_id is not None
    [received] = apns.received
    assert received.payload == {
        "aps": {
            "alert": {"title": "Clinic", "body": "You have a new message"},
            "sound": "default",
            "category": "chat",
            "thread-id": "ch_1",
            "badge": 3,
        },
        "data": {"channel": "ch_1", "message": "m_1"},
    }
    headers = received.headers
    assert headers[":scheme"] == "https"
    assert headers["apns-topic"] == "com.example.clinic"
    assert (headers["apns-push-type"], headers["apns-priority"]) == ("alert", "10")
    assert headers["apns-expiration"] == str(clock.now_ms() // 1000 + 60)
    assert (headers["apns-collapse-id"], apns.faults) == ("ch_1", [])


async def test_a_silent_push_goes_to_the_background(apns: ApnsStub, apns_provider: Provider) -> None:
    told = await apns_provider.send(APNS_TOKEN, Notification(id="p2", silent=True, badge=0, ttl_seconds=0))
    assert (told.kind, apns.faults) == ("accepted", [])
    [received] = apns.received
    assert received.payload == {"aps": {"content-available": 1, "badge": 0}}
    assert (received.headers["apns-push-type"], received.headers["apns-priority"]) == ("background", "5")
    assert received.headers["apns-expiration"] == "0"


async def test_many_pushes_share_one_connection(apns: ApnsStub, apns_provider: Provider) -> None:
    await apns_provider.send(APNS_TOKEN, HELLO)
    apns.answer(APNS_TOKEN, Answer(hold=True))
    async with asyncio.TaskGroup() as group:
        sending = [group.create_task(apns_provider.send(APNS_TOKEN, HELLO)) for _ in range(10)]
        while apns.parallel < 10:
            await asyncio.sleep(0)
        apns.gate.set()
    assert {task.result().kind for task in sending} == {"accepted"}
    assert (apns.connections, len(apns.issued)) == (1, 1)


@pytest.mark.parametrize("reason", TABLE)
async def test_each_error_of_the_table_is_obeyed(reason: str, apns: ApnsStub, apns_provider: Provider) -> None:
    status, kind = TABLE[reason]
    apns.answer(APNS_TOKEN, apns_error(status, reason, **{"retry-after": "7"}))
    told = await apns_provider.send(APNS_TOKEN, HELLO)
    assert (told.kind, told.reason, told.status) == (kind, reason, status)
    assert told.retry_after == (7 if kind == "retry" else None)
    assert told.only_token == (reason == "DeviceTokenNotForTopic")
    assert len(apns.received) == 1


def test_the_table_is_whole() -> None:
    assert TABLE == adapter.ERRORS


@pytest.mark.parametrize(("answer", "kind", "reason"), UNKNOWN)
async def test_a_reason_of_a_time_to_come_is_taken_by_its_status(
    answer: Answer, kind: str, reason: str, apns: ApnsStub, apns_provider: Provider
) -> None:
    apns.answer(APNS_TOKEN, answer)
    told = await apns_provider.send(APNS_TOKEN, HELLO)
    assert (told.kind, told.reason, told.status) == (kind, reason, answer.status)


async def test_the_provider_token_is_renewed_between_twenty_minutes_and_an_hour(
    apns: ApnsStub, apns_provider: Provider, clock: ManualClock
) -> None:
    for _ in range(60):
        assert (await apns_provider.send(APNS_TOKEN, HELLO)).kind == "accepted"
        clock.advance(180)
    # Three hours of a push in three minutes.
    assert 4 <= len(apns.issued) <= 6


async def test_a_token_that_apple_calls_expired_is_renewed_once(
    apns: ApnsStub, apns_provider: Provider, clock: ManualClock
) -> None:
    await apns_provider.send(APNS_TOKEN, HELLO)
    clock.advance(25 * 60)
    apns.expires = 1
    assert (await apns_provider.send(APNS_TOKEN, HELLO)).kind == "accepted"
    assert len(apns.issued) == 2
    # One that is not old is not renewed again and again: Apple would answer TooManyProviderTokenUpdates.
    apns.expires = 10
    for _ in range(3):
        told = await apns_provider.send(APNS_TOKEN, HELLO)
        assert (told.kind, told.reason) == ("misconfigured", "ExpiredProviderToken")
    assert (len(apns.issued), apns.expires) == (2, 7)


async def test_a_machine_that_slept_makes_a_new_token(
    apns: ApnsStub, apns_provider: Provider, clock: ManualClock
) -> None:
    await apns_provider.send(APNS_TOKEN, HELLO)
    # The monotonic clock stood still.
    clock.set_wall(clock.now_ms() + 7_200_000)
    assert (await apns_provider.send(APNS_TOKEN, HELLO)).kind == "accepted"
    assert len(apns.issued) == 2


async def test_trouble_on_the_way_is_tried_again(apns: ApnsStub, apns_provider: Provider) -> None:
    await apns_provider.send(APNS_TOKEN, HELLO)
    apns.answer(APNS_TOKEN, Answer(cut=True))
    assert (await apns_provider.send(APNS_TOKEN, HELLO)).kind == "retry"
    apns.answer(APNS_TOKEN, None)
    assert (await apns_provider.send(APNS_TOKEN, HELLO)).kind == "accepted"
    await apns.stop()
    told = await apns_provider.send(APNS_TOKEN, HELLO)
    assert told.kind == "retry"


async def test_who_is_not_apple_gets_nothing(apns: ApnsStub, apns_config: ApnsConfig, clock: ManualClock) -> None:
    """Without the stub's certificate the connection is not trusted, and no token leaves."""
    made = PushProviders(POLICY, clock)
    told = await made.open(apns_config).send(APNS_TOKEN, HELLO)
    await made.aclose()
    assert (told.kind, apns.issued) == ("retry", [])


async def test_a_long_body_is_cut_to_four_kilobytes(apns: ApnsStub, apns_provider: Provider) -> None:
    long = msgspec.structs.replace(HELLO, body="👩‍👩‍👧‍👦 hello " * 500, collapse_key="ä" * 80)
    assert (await apns_provider.send(APNS_TOKEN, long)).kind == "accepted"
    [received] = apns.received
    assert 3950 < len(json.dumps(received.payload, ensure_ascii=False, separators=(",", ":")).encode()) <= 4096
    assert received.payload["aps"]["alert"]["body"].endswith(("👦…", "hello…"))
    assert len(received.headers["apns-collapse-id"]) == 43
    told = await apns_provider.send(APNS_TOKEN, msgspec.structs.replace(HELLO, data={"custom": "x" * 4096}))
    assert (told.kind, apns.faults) == ("too_large", [])


async def test_a_token_that_is_none_never_becomes_a_path(apns: ApnsStub, apns_provider: Provider) -> None:
    for token in ("", "../../x", "zz" * 32, APNS_TOKEN + "/../" + APNS_TOKEN):
        assert (await apns_provider.send(token, HELLO)).kind == "token_dead"
    assert (apns.received, apns.faults) == ([], [])


def test_a_configuration_that_cannot_work_is_refused_by_its_field(
    apns_config: ApnsConfig, providers: PushProviders, tmp_path: Path
) -> None:
    for field, value in (("private_key", ""), ("private_key", "-----BEGIN x"), ("endpoint", "https://192.168.0.1")):
        with pytest.raises(Refusal) as refused:
            providers.check(msgspec.structs.replace(apns_config, **{field: value}))
        assert refused.value.field == field
    providers.check_token(apns_config, APNS_TOKEN)
    for token in ("", "<0a0a>", "0a", "0" * 65):
        with pytest.raises(Refusal):
            providers.check_token(apns_config, token)
    for body in ({"team_id": "lower12345"}, {"topic": "a b"}, {"environment": "test"}, {"colour": "red"}):
        good = {"kind": "apns", "team_id": "TEAM123456", "key_id": "KEY1234567", "topic": "com.example"}
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(json.dumps(good | body), type=ApnsConfig)
