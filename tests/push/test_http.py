"""The app's own endpoint: signed, and its answers understood (W4)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import msgspec
import pytest

from tests.push.conftest import HELLO
from tidings.server.clock import ManualClock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.errors import Refusal
from tidings.server.push import http as adapter
from tidings.server.push.base import Provider
from tidings.server.push.factory import PushProviders
from tidings.testing.push_stubs import Answer, HookStub
from tidings.wire.push import HttpConfig, with_secrets_of, without_secrets

TOKEN = "patient@example.org"
TABLE = {
    200: "accepted",
    201: "accepted",
    202: "accepted",
    204: "accepted",
    400: "rejected",
    401: "misconfigured",
    403: "misconfigured",
    404: "misconfigured",
    408: "retry",
    409: "rejected",
    410: "token_dead",
    413: "too_large",
    422: "rejected",
    425: "retry",
    429: "retry",
    500: "retry",
    502: "retry",
    503: "retry",
    504: "retry",
}
OTHERS = {206: "accepted", 301: "misconfigured", 418: "misconfigured", 507: "retry"}
OTHER_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


async def test_a_push_arrives_signed(hook: HookStub, hook_provider: Provider, clock: ManualClock) -> None:
    told = await hook_provider.send(TOKEN, HELLO)
    assert (told.kind, told.status, told.provider_id) == ("accepted", 202, "mail-p1")
    [received] = hook.received
    assert received.payload == {
        "type": "push.notification",
        "timestamp": clock.now_ms() // 1000,
        "data": {
            "token": TOKEN,
            "notification": {
                "id": "p1",
                "title": "Clinic",
                "body": "You have a new message",
                "data": {"channel": "ch_1", "message": "m_1"},
            },
        },
    }
    assert (received.headers["webhook-id"], hook.faults) == ("p1", [])


def test_the_signature_is_the_one_of_standard_webhooks() -> None:
    """The vector of its reference libraries."""
    key = base64.b64decode(OTHER_SECRET.removeprefix("whsec_"))
    told = adapter.signatures([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert told == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_push_is_signed_with_both_secrets_while_one_replaces_the_other(
    hook: HookStub, hook_config: HttpConfig, providers: PushProviders
) -> None:
    both = msgspec.structs.replace(hook_config, secrets=[OTHER_SECRET, hook.secret])
    assert (await providers.open(providers.check(both)).send(TOKEN, HELLO)).kind == "accepted"
    other = msgspec.structs.replace(hook_config, secrets=[OTHER_SECRET])
    told = await providers.open(other).send(TOKEN, HELLO)
    assert (told.kind, told.status, hook.faults) == ("misconfigured", 401, ["signature"])


@pytest.mark.parametrize("status", TABLE | OTHERS)
async def test_each_status_of_the_table_is_obeyed(status: int, hook: HookStub, hook_provider: Provider) -> None:
    hook.answer(TOKEN, Answer(status, headers={"retry-after": "7"}))
    told = await hook_provider.send(TOKEN, HELLO)
    assert (told.kind, told.status) == ((TABLE | OTHERS)[status], status)
    assert told.retry_after == (7 if told.kind == "retry" else None)


def test_the_table_is_whole() -> None:
    assert TABLE == adapter.ERRORS


async def test_the_endpoint_may_say_why(hook: HookStub, hook_provider: Provider) -> None:
    for body, reason in (
        ({"reason": "bounced"}, "bounced"),
        ({"reason": "a sentence"}, "status_410"),
        ([], "status_410"),
    ):
        hook.answer(TOKEN, Answer(410, body))
        told = await hook_provider.send(TOKEN, HELLO)
        assert (told.kind, told.reason) == ("token_dead", reason)


async def test_trouble_on_the_way_is_tried_again(hook: HookStub, hook_provider: Provider) -> None:
    hook.answer_next(TOKEN, Answer(cut=True))
    assert (await hook_provider.send(TOKEN, HELLO)).kind == "retry"
    assert (await hook_provider.send(TOKEN, HELLO)).kind == "accepted"
    await hook.stop()
    assert (await hook_provider.send(TOKEN, HELLO)).kind == "retry"


async def test_a_redirect_is_not_followed(hook: HookStub, hook_provider: Provider) -> None:
    hook.answer(TOKEN, Answer(307, headers={"location": f"{hook.url}/push"}))
    assert (await hook_provider.send(TOKEN, HELLO)).kind == "misconfigured"
    assert len(hook.received) == 1


async def test_an_endpoint_that_moved_to_the_inside_is_the_set_up_s_fault(
    hook: HookStub, hook_config: HttpConfig, clock: ManualClock
) -> None:
    async def inside(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    strict = PushProviders(OutboundPolicy(), clock, resolve=inside)
    moved = msgspec.structs.replace(hook_config, url=f"https://mail.example:{hook.port}/push")
    told = await strict.open(strict.check(moved)).send(TOKEN, HELLO)
    await strict.aclose()
    assert (told.kind, told.reason, hook.connections) == ("misconfigured", "address_refused", 0)


async def test_a_long_body_is_cut(hook: HookStub, hook_provider: Provider) -> None:
    assert (await hook_provider.send(TOKEN, msgspec.structs.replace(HELLO, body="ü" * 50_000))).kind == "accepted"
    payload = hook.received[0].payload
    assert 19_900 < len(json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()) <= 20_000
    told = await hook_provider.send(TOKEN, msgspec.structs.replace(HELLO, data={"x": "x" * 30_000}))
    assert told.kind == "too_large"


def test_a_configuration_that_cannot_work_is_refused_by_its_field(
    hook_config: HttpConfig, providers: PushProviders
) -> None:
    for field, value in (
        ("url", "http://mail.example/push"),
        ("url", "https://169.254.169.254/"),
        ("secrets", []),
        ("secrets", ["whsec_c2hvcnQ="]),
        ("secrets", ["no prefix"]),
        ("secrets", [OTHER_SECRET, "whsec_***"]),
    ):
        with pytest.raises(Refusal) as refused:
            providers.check(msgspec.structs.replace(hook_config, **{field: value}))
        assert refused.value.field == field
        assert OTHER_SECRET not in refused.value.detail
    providers.check_token(hook_config, "+49 151 0000000")
    for token in ("", "a\nb", "x" * 5000):
        with pytest.raises(Refusal):
            providers.check_token(hook_config, token)


def test_secrets_are_not_shown_and_kept_by_a_change_that_leaves_them_out(hook_config: HttpConfig) -> None:
    shown = without_secrets(hook_config)
    assert json.loads(msgspec.json.encode(shown)) == {"kind": "http", "url": hook_config.url}
    assert with_secrets_of(shown, hook_config) == hook_config
    fresh = msgspec.structs.replace(hook_config, secrets=[OTHER_SECRET])
    assert with_secrets_of(fresh, hook_config) == fresh


async def test_the_signature_covers_the_time(hook: HookStub, hook_provider: Provider, clock: ManualClock) -> None:
    await hook_provider.send(TOKEN, HELLO)
    clock.advance(10)
    await hook_provider.send(TOKEN, HELLO)
    first, second = (received.headers["webhook-signature"] for received in hook.received)
    assert first != second
    key = base64.b64decode(hook.secret.removeprefix("whsec_"))
    assert len(hmac.new(key, b"", hashlib.sha256).digest()) == len(base64.b64decode(first.removeprefix("v1,")))
