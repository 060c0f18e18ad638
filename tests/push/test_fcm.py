"""Firebase Cloud Messaging: what is sent, whose token it is, and what each answer means (W4)."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from tests.push.conftest import FCM_TOKEN, HELLO
from tidings.server.clock import ManualClock
from tidings.server.errors import Refusal
from tidings.server.push import fcm as adapter
from tidings.server.push.base import Notification, Provider
from tidings.server.push.factory import PushProviders
from tidings.testing.push_stubs import Answer, FcmStub
from tidings.testing.push_stubs.fcm import fcm_error
from tidings.wire.push import FcmConfig

# https://firebase.google.com/docs/reference/fcm/rest/v1/ErrorCode: HTTP status, google.rpc's word → what is to be done,
# and whether it is about this token only.
TABLE = {
    "UNSPECIFIED_ERROR": (500, "UNKNOWN", "retry", False),
    "INVALID_ARGUMENT": (400, "INVALID_ARGUMENT", "rejected", False),
    "UNREGISTERED": (404, "NOT_FOUND", "token_dead", False),
    "SENDER_ID_MISMATCH": (403, "PERMISSION_DENIED", "misconfigured", True),
    "QUOTA_EXCEEDED": (429, "RESOURCE_EXHAUSTED", "retry", False),
    "UNAVAILABLE": (503, "UNAVAILABLE", "retry", False),
    "INTERNAL": (500, "INTERNAL", "retry", False),
    "THIRD_PARTY_AUTH_ERROR": (401, "UNAUTHENTICATED", "misconfigured", True),
}
# Answers without a word of FCM's own.
BARE = [
    (fcm_error(400, "INVALID_ARGUMENT"), "rejected", "INVALID_ARGUMENT"),
    (fcm_error(403, "PERMISSION_DENIED"), "misconfigured", "PERMISSION_DENIED"),
    (fcm_error(404, "NOT_FOUND"), "misconfigured", "NOT_FOUND"),
    (fcm_error(429, "RESOURCE_EXHAUSTED"), "retry", "RESOURCE_EXHAUSTED"),
    (fcm_error(503, "UNAVAILABLE"), "retry", "UNAVAILABLE"),
    (fcm_error(504, "DEADLINE_EXCEEDED"), "retry", "DEADLINE_EXCEEDED"),
    (Answer(502, "<html>"), "retry", "status_502"),
    (Answer(403, None), "misconfigured", "status_403"),
    (Answer(404, None), "rejected", "status_404"),
    (Answer(302, None, {"location": "https://elsewhere.example"}), "rejected", "status_302"),
    (Answer(418, {"error": ["not", "theirs"]}), "rejected", "status_418"),
    (Answer(400, {"error": {"status": "two words", "details": [1, {"@type": 2}]}}), "rejected", "status_400"),
]


async def test_a_push_arrives_with_what_each_platform_needs(fcm: FcmStub, fcm_provider: Provider) -> None:
    told = await fcm_provider.send(
        FCM_TOKEN,
        msgspec.structs.replace(
            HELLO, badge=3, sound="default", collapse_key="ch_1", thread="ch_1", category="chat", ttl_seconds=60
        ),
    )
    assert (told.kind, told.status) == ("accepted", 200)
    assert told.provider_id == "projects/clinic-1/messages/0"
    [received] = fcm.received
    message = received.payload
    assert (received.token, message["data"]) == (FCM_TOKEN, {"channel": "ch_1", "message": "m_1"})
    assert message["notification"] == {"title": "Clinic", "body": "You have a new message"}
    android = message["android"]
    assert (android["priority"], android["ttl"], android["collapse_key"]) == ("HIGH", "60s", "ch_1")
    assert android["notification"] == {
        "sound": "default",
        "channel_id": "chat",
        "tag": "ch_1",
        "notification_count": 3,
    }
    assert message["apns"]["headers"] == {
        "apns-priority": "10",
        "apns-push-type": "alert",
        "apns-collapse-id": "ch_1",
    }
    assert message["apns"]["payload"]["aps"] == {
        "badge": 3,
        "sound": "default",
        "category": "chat",
        "thread-id": "ch_1",
    }
    assert message["webpush"]["headers"] == {"TTL": "60", "Urgency": "high"}
    assert fcm.faults == []


async def test_a_silent_push_shows_nothing(fcm: FcmStub, fcm_provider: Provider) -> None:
    await fcm_provider.send(FCM_TOKEN, Notification(id="p2", data={"sync": "1"}, silent=True, badge=0))
    message = fcm.received[0].payload
    assert "notification" not in message
    assert message["android"]["priority"] == "NORMAL"
    assert message["apns"]["payload"]["aps"] == {"badge": 0, "content-available": 1}
    assert message["apns"]["headers"] == {"apns-priority": "5", "apns-push-type": "background"}


@pytest.mark.parametrize("code", TABLE)
async def test_each_error_of_the_table_is_obeyed(code: str, fcm: FcmStub, fcm_provider: Provider) -> None:
    status, word, kind, only_token = TABLE[code]
    fcm.answer(FCM_TOKEN, fcm_error(status, word, code, **{"retry-after": "7"}))
    told = await fcm_provider.send(FCM_TOKEN, HELLO)
    assert (told.kind, told.reason, told.status, told.only_token) == (kind, code, status, only_token)
    assert told.retry_after == (7 if kind == "retry" else None)
    # A THIRD_PARTY_AUTH_ERROR is a 401 that no new access token mends.
    assert (len(fcm.received), fcm.exchanges) == (1, 1)


def test_the_table_is_whole() -> None:
    assert {code: (row[0], row[2]) for code, row in TABLE.items()} == adapter.ERRORS


@pytest.mark.parametrize(("answer", "kind", "reason"), BARE)
async def test_what_is_answered_in_front_of_fcm_is_understood(
    answer: Answer, kind: str, reason: str, fcm: FcmStub, fcm_provider: Provider
) -> None:
    fcm.answer(FCM_TOKEN, answer)
    told = await fcm_provider.send(FCM_TOKEN, HELLO)
    assert (told.kind, told.reason, told.status) == (kind, reason, answer.status)


async def test_a_bad_request_costs_a_token_only_where_the_token_is_what_is_bad(
    fcm: FcmStub, fcm_provider: Provider
) -> None:
    async def told(**fields: str) -> str:
        fcm.answer(FCM_TOKEN, fcm_error(400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", **fields))
        return (await fcm_provider.send(FCM_TOKEN, HELLO)).kind

    assert await told(field="message.token") == "token_dead"
    assert await told(message="The registration token is not a valid FCM registration token") == "token_dead"
    assert await told(field="message.android.ttl") == "rejected"
    assert await told(message="Request contains an invalid argument.") == "rejected"
    assert await told(message="Android message is too big") == "too_large"


async def test_a_quota_without_a_time_waits_a_minute(fcm: FcmStub, fcm_provider: Provider) -> None:
    fcm.answer(FCM_TOKEN, fcm_error(429, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"))
    assert (await fcm_provider.send(FCM_TOKEN, HELLO)).retry_after == 60


async def test_one_access_token_serves_many_pushes_and_is_renewed_before_it_ends(
    fcm: FcmStub, fcm_provider: Provider, clock: ManualClock
) -> None:
    fcm.token_answer = Answer(hold=True)
    async with asyncio.TaskGroup() as group:
        sending = [group.create_task(fcm_provider.send(FCM_TOKEN, HELLO)) for _ in range(20)]
        while not fcm.exchanges:
            await asyncio.sleep(0)
        fcm.gate.set()
    assert [task.result().kind for task in sending] == ["accepted"] * 20
    assert fcm.exchanges == 1
    clock.advance(3600 - 301)
    await fcm_provider.send(FCM_TOKEN, HELLO)
    assert fcm.exchanges == 1
    clock.advance(2)
    assert (await fcm_provider.send(FCM_TOKEN, HELLO)).kind == "accepted"
    assert (fcm.exchanges, fcm.faults) == (2, [])


async def test_a_refused_access_token_is_exchanged_once(fcm: FcmStub, fcm_provider: Provider) -> None:
    await fcm_provider.send(FCM_TOKEN, HELLO)
    fcm.revoke()
    async with asyncio.TaskGroup() as group:
        sending = [group.create_task(fcm_provider.send(FCM_TOKEN, HELLO)) for _ in range(5)]
    assert {task.result().kind for task in sending} == {"accepted"}
    assert fcm.exchanges == 2
    # And when that does not help, it is the set-up.
    fcm.answer(FCM_TOKEN, fcm_error(401, "UNAUTHENTICATED"))
    told = await fcm_provider.send(FCM_TOKEN, HELLO)
    assert (told.kind, told.reason, fcm.exchanges) == ("misconfigured", "UNAUTHENTICATED", 3)


async def test_a_refused_key_is_not_tried_for_a_minute(
    fcm: FcmStub, fcm_provider: Provider, clock: ManualClock
) -> None:
    fcm.token_answer = Answer(400, {"error": "invalid_grant"})
    for _ in range(3):
        told = await fcm_provider.send(FCM_TOKEN, HELLO)
        assert (told.kind, told.reason, told.only_token) == ("misconfigured", "invalid_grant", False)
    assert (fcm.exchanges, fcm.received) == (1, [])
    clock.advance(61)
    fcm.token_answer = None
    assert (await fcm_provider.send(FCM_TOKEN, HELLO)).kind == "accepted"


@pytest.mark.parametrize(
    "answer", [Answer(503, None, {"retry-after": "30"}), Answer(429), Answer(500), Answer(cut=True), Answer(200, {})]
)
async def test_trouble_at_the_token_endpoint_passes(
    answer: Answer, fcm: FcmStub, fcm_provider: Provider, clock: ManualClock
) -> None:
    fcm.token_answer = answer
    told = await fcm_provider.send(FCM_TOKEN, HELLO)
    assert (told.kind, told.retry_after) == ("retry", 30 if answer.headers else None)
    fcm.token_answer = None
    clock.advance(31)
    assert (await fcm_provider.send(FCM_TOKEN, HELLO)).kind == "accepted"


async def test_trouble_on_the_way_is_tried_again(fcm: FcmStub, fcm_provider: Provider) -> None:
    await fcm_provider.send(FCM_TOKEN, HELLO)
    fcm.answer(FCM_TOKEN, Answer(cut=True))
    assert (await fcm_provider.send(FCM_TOKEN, HELLO)).kind == "retry"
    await fcm.stop()
    told = await fcm_provider.send(FCM_TOKEN, HELLO)
    assert (told.kind, told.reason) == ("retry", "unreachable")


async def test_a_long_body_is_cut_to_what_fcm_takes(fcm: FcmStub, fcm_provider: Provider) -> None:
    long = msgspec.structs.replace(HELLO, body="«Été» " * 2000)
    assert (await fcm_provider.send(FCM_TOKEN, long)).kind == "accepted"
    body = fcm.received[0].payload["notification"]["body"]
    assert body.endswith("…")
    assert body[:-1] in long.body
    assert 3500 < len(json.dumps(fcm.received[0].payload, ensure_ascii=False).encode()) < 4500
    huge = msgspec.structs.replace(HELLO, data={"custom": "x" * 5000})
    told = await fcm_provider.send(FCM_TOKEN, huge)
    assert (told.kind, len(fcm.received), fcm.faults) == ("too_large", 1, [])


def test_a_configuration_that_cannot_work_is_refused_by_its_field(
    fcm_config: FcmConfig, providers: PushProviders
) -> None:
    account = fcm_config.service_account
    ec_key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----\n"
    for field, broken in (
        ("service_account.private_key", {"service_account": msgspec.structs.replace(account, private_key="")}),
        ("service_account.private_key", {"service_account": msgspec.structs.replace(account, private_key=ec_key)}),
        (
            "service_account.token_uri",
            {"service_account": msgspec.structs.replace(account, token_uri="http://169.254.169.254/")},
        ),
        ("endpoint", {"endpoint": "https://10.0.0.1/"}),
    ):
        with pytest.raises(Refusal) as refused:
            providers.check(msgspec.structs.replace(fcm_config, **broken))
        assert refused.value.field == field
        assert "PRIVATE KEY" not in refused.value.detail
    providers.check_token(fcm_config, FCM_TOKEN)
    for token in ("", "short", "with blank " * 9, "ä" * 99, "a" * 5000):
        with pytest.raises(Refusal):
            providers.check_token(fcm_config, token)


def test_the_console_s_file_is_taken_as_it_is(fcm: FcmStub, providers: PushProviders) -> None:
    body = {"kind": "fcm", "service_account": fcm.service_account(), "endpoint": fcm.url}
    config = msgspec.json.decode(json.dumps(body), type=FcmConfig)
    assert providers.check(config) == config
