"""Web Push: encryption, who we say to be, where it may go, and what each answer means (W4, S12)."""

from __future__ import annotations

import json

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.auth.test_outbound import INTERNAL_HOSTS
from tests.push.conftest import HELLO, VAPID_KEY
from tidings.server.clock import ManualClock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.errors import Refusal
from tidings.server.push import webpush as adapter
from tidings.server.push.base import Notification, Provider
from tidings.server.push.factory import PushProviders
from tidings.testing.push_stubs import Answer, WebPushStub
from tidings.testing.push_stubs.webpush import decrypt
from tidings.wire.push import WebPushConfig

# RFC 8291, section 5 and appendix A.
RFC_TEXT = b"When I grow up, I want to be a watermelon"
RFC_SENDER_KEY = "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw"
RFC_SENDER_PUBLIC = "BP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A8"
RFC_BROWSER_KEY = "q1dXpw3UpT5VOmu_cf_v6ih07Aems3njxI-JWgLcM94"
RFC_BROWSER_PUBLIC = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
RFC_SALT = "DGv6ra1nlYgDCS1FRnbzlw"
RFC_AUTH = "BTBZMqHH6r4Tts7J_aSIgg"
RFC_BODY = (
    "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_"
    "yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
)
# RFC 8030, RFC 8292, and the push services' own pages.
TABLE = {
    200: "accepted",
    201: "accepted",
    202: "accepted",
    204: "accepted",
    400: "rejected",
    401: "misconfigured",
    403: "misconfigured",
    404: "token_dead",
    405: "rejected",
    406: "retry",
    408: "retry",
    410: "token_dead",
    413: "too_large",
    429: "retry",
    500: "retry",
    502: "retry",
    503: "retry",
    504: "retry",
}


def subscription(endpoint: str, **keys: str) -> str:
    return json.dumps({"endpoint": endpoint, "keys": {"p256dh": RFC_BROWSER_PUBLIC, "auth": RFC_AUTH, **keys}})


def private_key(text: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(adapter.decoded(text)), ec.SECP256R1())


def test_the_vector_of_rfc_8291() -> None:
    to = adapter.read_subscription(subscription("https://push.example.net/push/JzLQ3raZJfFBR0aqvOMsLrt54w4rJUsV"))
    body = adapter.encrypt(RFC_TEXT, to, salt=adapter.decoded(RFC_SALT), key=private_key(RFC_SENDER_KEY))
    assert adapter.encoded(body) == RFC_BODY
    assert decrypt(body, private_key(RFC_BROWSER_KEY), to.auth) == RFC_TEXT


async def test_a_push_arrives_and_the_browser_can_read_it(webpush: WebPushStub, webpush_provider: Provider) -> None:
    token = webpush.subscribe()
    sent = msgspec.structs.replace(
        HELLO, collapse_key="ch_1", ttl_seconds=60, badge=2, link="https://clinic.example/ch_1"
    )
    told = await webpush_provider.send(token, sent)
    assert (told.kind, told.status, told.provider_id) == ("accepted", 201, f"{webpush.url}/message/0")
    [received] = webpush.received
    assert received.payload == {
        "id": "p1",
        "title": "Clinic",
        "body": "You have a new message",
        "data": {"channel": "ch_1", "message": "m_1"},
        "badge": 2,
        "collapse_key": "ch_1",
        "ttl_seconds": 60,
        "link": "https://clinic.example/ch_1",
    }
    assert (received.headers["ttl"], received.headers["urgency"]) == ("60", "high")
    assert len(received.headers["topic"]) == 32
    # The push service learns neither the channel nor anything else.
    assert "ch_1" not in json.dumps(dict(received.headers))
    assert webpush.faults == []


async def test_what_collapses_has_the_same_topic_and_nothing_else_has(
    webpush: WebPushStub, webpush_provider: Provider
) -> None:
    token = webpush.subscribe()
    for key in ("ch_1", "ch_1", "ch_2", "é" * 200):
        await webpush_provider.send(token, msgspec.structs.replace(HELLO, collapse_key=key))
    await webpush_provider.send(token, HELLO)
    one, same, other, long, none = (received.headers.get("topic") for received in webpush.received)
    assert one == same
    assert len({one, other, long, none}) == 4
    assert (none, webpush.faults) == (None, [])


async def test_every_push_has_its_own_key_and_salt(
    webpush_config: WebPushConfig, clock: ManualClock, webpush: WebPushStub
) -> None:
    bodies: list[bytes] = []

    class Keeping:
        async def request(self, method: str, url: str, *, content: bytes, **_: object) -> object:
            bodies.append(content)
            return msgspec.convert({"status": 201, "headers": {}, "body": b""}, adapter.Reply)

    provider = adapter.WebPushProvider(webpush_config, Keeping(), clock)  # type: ignore[arg-type]
    for _ in range(3):
        await provider.send(webpush.subscribe(), HELLO)
    assert len({body[:16] for body in bodies}) == len({body[21:86] for body in bodies}) == 3


@pytest.mark.parametrize("status", TABLE)
async def test_each_status_of_the_table_is_obeyed(
    status: int, webpush: WebPushStub, webpush_provider: Provider
) -> None:
    token = webpush.subscribe(name="b1")
    webpush.answer("b1", Answer(status, headers={"retry-after": "7"}))
    told = await webpush_provider.send(token, HELLO)
    assert (told.kind, told.status) == (TABLE[status], status)
    assert told.retry_after == (7 if told.kind == "retry" else None)
    assert len(webpush.received) == 1


def test_the_table_is_whole() -> None:
    assert TABLE == adapter.ERRORS


@pytest.mark.parametrize(
    ("answer", "kind", "reason", "only_token"),
    [
        (Answer(403, {"reason": "BadJwtToken"}), "misconfigured", "BadJwtToken", False),
        (Answer(403, {"reason": "VapidPkHashMismatch"}), "misconfigured", "VapidPkHashMismatch", True),
        (Answer(403, "the key does not fit the subscription"), "misconfigured", "status_403", True),
        (Answer(410, {"code": 410, "errno": 103}), "token_dead", "errno_103", False),
        (Answer(307, headers={"location": "http://127.0.0.1:1/"}), "rejected", "status_307", False),
        (Answer(451), "rejected", "status_451", False),
        (Answer(599), "retry", "status_599", False),
    ],
)
async def test_what_push_services_add_is_understood(
    answer: Answer, kind: str, reason: str, only_token: bool, webpush: WebPushStub, webpush_provider: Provider
) -> None:
    token = webpush.subscribe(name="b1")
    webpush.answer("b1", answer)
    told = await webpush_provider.send(token, HELLO)
    assert (told.kind, told.reason, told.only_token) == (kind, reason, only_token)


async def test_a_browser_that_unsubscribed_is_dead_and_another_key_s_is_not_the_token_s_fault(
    webpush: WebPushStub, webpush_provider: Provider, webpush_config: WebPushConfig, providers: PushProviders
) -> None:
    ours = providers.check(webpush_config)
    assert isinstance(ours, WebPushConfig)
    mine, gone = webpush.subscribe(ours.public_key), webpush.subscribe(ours.public_key)
    foreign = webpush.subscribe(
        "BP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A8"
    )
    webpush.unsubscribe(gone)
    assert (await webpush_provider.send(mine, HELLO)).kind == "accepted"
    assert (await webpush_provider.send(gone, HELLO)).kind == "token_dead"
    told = await webpush_provider.send(foreign, HELLO)
    assert (told.kind, told.only_token) == ("misconfigured", True)


async def test_one_vapid_token_serves_a_push_service_for_six_hours(
    webpush: WebPushStub, webpush_provider: Provider, clock: ManualClock
) -> None:
    for hours in (0, 5, 2, 30):
        clock.advance(hours * 3600)
        for _ in range(3):
            assert (await webpush_provider.send(webpush.subscribe(), HELLO)).kind == "accepted"
    assert len(webpush.issued) == 3
    claims = jwt.decode(webpush.issued[0], options={"verify_signature": False})
    assert (claims["aud"], claims["sub"]) == (webpush.url, "mailto:push@clinic.example")
    # Nor does one live for longer than a day because the clock was set back.
    clock.set_wall(clock.now_ms() - 48 * 3_600_000)
    assert (await webpush_provider.send(webpush.subscribe(), HELLO)).kind == "accepted"


async def test_each_push_service_gets_its_own_vapid_token(
    webpush: WebPushStub, webpush_provider: Provider, clock: ManualClock
) -> None:
    async with WebPushStub(now=lambda: clock.now_ms() / 1000) as other:
        for stub in (webpush, other, webpush, other):
            assert (await webpush_provider.send(stub.subscribe(), HELLO)).kind == "accepted"
        assert (len(webpush.issued), len(other.issued), webpush.faults, other.faults) == (1, 1, [], [])


def test_the_vapid_tokens_of_strangers_origins_are_bounded(webpush_config: WebPushConfig, clock: ManualClock) -> None:
    tokens = adapter.VapidTokens(webpush_config, clock)
    for number in range(adapter.VAPID_TOKENS_MAX + 10):
        tokens.header(f"https://{number}.example")
    assert len(tokens._tokens) == adapter.VAPID_TOKENS_MAX


@pytest.mark.parametrize("host", INTERNAL_HOSTS)
async def test_a_subscription_reaches_nothing_internal(
    host: str, webpush_config: WebPushConfig, clock: ManualClock
) -> None:
    strict = PushProviders(OutboundPolicy(), clock)
    token = subscription(f"https://{host}/push/1")
    with pytest.raises(Refusal) as refused:
        strict.check_token(webpush_config, token)
    assert refused.value.field == "token"
    # And where it came into the store by another way.
    told = await strict.open(webpush_config).send(token, HELLO)
    assert (told.kind, told.reason) == ("rejected", "address_refused")
    await strict.aclose()


async def test_a_name_that_resolves_to_the_inside_gets_no_push(
    webpush: WebPushStub, webpush_config: WebPushConfig, clock: ManualClock
) -> None:
    async def inside(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    strict = PushProviders(OutboundPolicy(), clock, resolve=inside)
    token = subscription(f"https://push.example:{webpush.port}/push/1")
    strict.check_token(webpush_config, token)
    told = await strict.open(webpush_config).send(token, HELLO)
    await strict.aclose()
    assert (told.kind, told.reason, webpush.connections) == ("rejected", "address_refused", 0)


async def test_the_body_never_passes_four_kilobytes(webpush: WebPushStub, webpush_provider: Provider) -> None:
    token = webpush.subscribe()
    for text in ("x" * 9000, "é" * 4000, "🇩🇪" * 1500, "\x00" * 3000):
        sent = msgspec.structs.replace(HELLO, body=text)
        assert (await webpush_provider.send(token, sent)).kind == "accepted"
        shown = webpush.received[-1].payload["body"]
        assert shown.endswith("…")
        assert text.startswith(shown[:-1])
        assert len(shown) > 500
    told = await webpush_provider.send(token, msgspec.structs.replace(HELLO, data={"custom": "x" * 4000}))
    assert (told.kind, webpush.faults) == ("too_large", [])


async def test_trouble_on_the_way_is_tried_again(webpush: WebPushStub, webpush_provider: Provider) -> None:
    token = webpush.subscribe()
    webpush.answer_next("*", Answer(cut=True))
    assert (await webpush_provider.send(token, HELLO)).kind == "retry"
    assert (await webpush_provider.send(token, HELLO)).kind == "accepted"
    await webpush.stop()
    assert (await webpush_provider.send(token, HELLO)).reason == "unreachable"


async def test_a_subscription_that_is_none_is_refused_and_never_sent_to(
    webpush_config: WebPushConfig, providers: PushProviders, webpush_provider: Provider
) -> None:
    good = "https://push.example/1"
    off_the_curve = adapter.encoded(b"\x04" + b"\x01" * 64)
    for token in (
        "",
        "[]",
        "{}",
        '{"endpoint": "https://push.example/1"}',
        subscription(good, p256dh="x"),
        subscription(good, p256dh=off_the_curve),
        subscription(good, auth="AAAA"),
        subscription(good, auth="*" * 22),
        subscription("not a url"),
        subscription(good + "a" * 5000),
    ):
        with pytest.raises(Refusal):
            providers.check_token(webpush_config, token)
        told = await webpush_provider.send(token, HELLO)
        assert (told.kind, told.reason) == ("token_dead", "malformed")
    for token in (subscription("http://push.example/1"), subscription("https://u:p@push.example/1")):
        with pytest.raises(Refusal):
            providers.check_token(webpush_config, token)


def test_a_configuration_shows_its_public_key_or_says_what_is_wrong(providers: PushProviders) -> None:
    config = WebPushConfig(subject="https://clinic.example", private_key=VAPID_KEY)
    checked = providers.check(config)
    assert isinstance(checked, WebPushConfig)
    assert checked.public_key == RFC_BROWSER_PUBLIC
    pem = private_key(VAPID_KEY).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    of_pem = providers.check(msgspec.structs.replace(config, private_key=pem))
    assert isinstance(of_pem, WebPushConfig)
    assert of_pem.public_key == RFC_BROWSER_PUBLIC
    for field, value in (
        ("private_key", ""),
        ("private_key", "AAAA"),
        ("private_key", "A" * 43),
        ("private_key", RFC_BROWSER_PUBLIC),
        ("public_key", VAPID_KEY),
    ):
        with pytest.raises(Refusal) as refused:
            providers.check(msgspec.structs.replace(config, **{field: value}))
        assert refused.value.field == field


async def test_a_silent_push_is_not_urgent(webpush: WebPushStub, webpush_provider: Provider) -> None:
    await webpush_provider.send(webpush.subscribe(), Notification(id="p", silent=True, data={"sync": "1"}))
    assert webpush.received[0].headers["urgency"] == "low"
    assert webpush.received[0].payload == {"id": "p", "silent": True, "data": {"sync": "1"}}
