"""Backends hear of every event: signed, in order per channel, by the published schedule, whatever fails in between."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook as Verifier

from tidings.server.clock import Ids
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.domain.standard_webhooks import JITTER, SCHEDULE, matches, retry_after
from tidings.server.errors import Forbidden, NotFound, Refusal
from tidings.server.jobs.relay import Relay
from tidings.server.jobs.webhooks import webhook_kinds
from tidings.server.jobs.worker import Worker
from tidings.server.posting import Posted, Poster
from tidings.server.services.queue import Queue
from tidings.server.services.webhooks import FAILING_MS, WebhookReader, Webhooks
from tidings.server.telemetry import Metrics
from tidings.wire.ids import time_of
from tidings.wire.webhooks import Webhook, WebhookCreate, WebhookReplay, WebhookRotate, WebhookUpdate

from .conftest import World

CANARY = "a swollen knee"


@dataclass
class Request:
    url: str
    headers: dict[str, str]
    body: bytes
    at: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        return json.loads(self.body)  # type: ignore[no-any-return]


@dataclass
class Sink(Poster):
    """Endpoints that take everything, unless they are told to answer otherwise."""

    world: World
    requests: list[Request] = field(default_factory=list)
    answers: list[Posted] = field(default_factory=list)
    always: Posted = field(default_factory=lambda: Posted(204))

    def __post_init__(self) -> None:
        Poster.__init__(self, OutboundPolicy())

    async def post(
        self, url: str, *, headers: dict[str, str], body: bytes, seconds: float, answer_bytes_max: int
    ) -> Posted:
        self.requests.append(Request(url, headers, body, self.world.clock.now_ms()))
        return self.answers.pop(0) if self.answers else self.always

    def seqs(self) -> list[int]:
        return [request.event["data"]["seq"] for request in self.requests]


@dataclass
class Desk:
    world: World
    sink: Sink
    webhooks: Webhooks
    relay: Relay
    worker: Worker
    queue: Queue
    metrics: Metrics

    async def add(self, url: str = "https://api.example.com/hook", **more: Any) -> Webhook:
        return await self.webhooks.create(self.world.backend, WebhookCreate(url=url, **more))

    async def pass_on(self) -> None:
        while await self.relay.turn():
            pass

    async def run(self, seconds: float = 0) -> None:
        await self.pass_on()
        self.world.clock.advance(seconds)
        await self.worker.run_due()

    async def talk(self, *texts: str) -> str:
        channel = await self.world.channel("alice", "bob")
        for text in texts:
            await self.world.send(self.world.acting("alice"), channel.id, text)
        return channel.id


@pytest.fixture
async def desk(world: World) -> Desk:
    metrics, ids = Metrics(), Ids(world.clock)
    sink = Sink(world)
    webhooks = Webhooks(world.store, world.apps, sink, world.clock, ids, metrics, Random(1))
    queue = Queue(world.store, world.clock, ids)
    worker = Worker(queue, webhook_kinds(webhooks), world.clock, metrics, random=Random(1))
    relay = Relay(world.store, [WebhookReader()], world.bus, world.clock, metrics)
    made = Desk(world, sink, webhooks, relay, worker, queue, metrics)
    for name in ("alice", "bob"):
        await world.user(name)
    await made.pass_on()
    # The reference library looks at the clock of the machine.
    world.clock.set_wall(round(datetime.now().astimezone().timestamp() * 1_000))
    return made


async def test_w1_what_is_sent_verifies_with_the_reference_library(desk: Desk) -> None:
    hook = await desk.add()
    await desk.talk("hello")
    await desk.run()
    assert hook.secret is not None
    verifier = Verifier(hook.secret)
    for request in desk.sink.requests:
        assert verifier.verify(request.body, request.headers) == request.event
        with pytest.raises(Exception, match="No matching signature"):
            verifier.verify(request.body + b" ", request.headers)
        signed = f"{request.id}.{request.headers['webhook-timestamp']}.".encode() + request.body
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(hook.public_key.removeprefix("whpk_")))
        (asymmetric,) = [one for one in request.headers["webhook-signature"].split() if one.startswith("v1a,")]
        public.verify(base64.b64decode(asymmetric.removeprefix("v1a,")), signed)
    assert [request.event["type"] for request in desk.sink.requests][-1] == "message.created"


async def test_w1_while_a_secret_is_exchanged_both_verify_and_afterwards_only_the_new_one(desk: Desk) -> None:
    old = await desk.add()
    new = await desk.webhooks.rotate(desk.world.backend, old.id, WebhookRotate(overlap_hours=1))
    assert old.secret is not None
    assert new.secret is not None
    assert new.public_key != old.public_key
    channel = await desk.talk("hello")
    await desk.run()
    request = desk.sink.requests[-1]
    for secret in (old.secret, new.secret):
        Verifier(secret).verify(request.body, request.headers)
    assert len(request.headers["webhook-signature"].split()) == 4
    desk.world.clock.advance(3_601)
    await desk.world.send(desk.world.acting("alice"), channel)
    await desk.run()
    assert len(desk.sink.requests[-1].headers["webhook-signature"].split()) == 2


async def test_every_event_of_a_channel_comes_once_in_order_with_identifiers_only(desk: Desk) -> None:
    world = desk.world
    await desk.add()
    channel = await desk.talk(CANARY, "two")
    await world.members.remove(world.backend, channel, "bob")
    await desk.run()
    assert desk.sink.seqs() == list(range(1, len(desk.sink.requests) + 1))
    types = [request.event["type"] for request in desk.sink.requests]
    assert {"channel.created", "member.added", "message.created", "member.removed"} <= set(types)
    first = next(request.event for request in desk.sink.requests if request.event["type"] == "message.created")
    assert first["data"].keys() == {"app", "channel", "channel_type", "seq", "by", "message"}
    assert (first["data"]["by"], first["data"]["channel"]) == ("alice", channel)
    assert (
        next(e for e in (r.event for r in desk.sink.requests) if e["type"] == "member.removed")["data"]["user"] == "bob"
    )
    assert len({request.id for request in desk.sink.requests}) == len(types)
    assert await world.rows("SELECT 1 FROM jobs") == []


async def test_h12_nothing_that_was_said_is_in_what_is_sent_or_kept(desk: Desk) -> None:
    world = desk.world
    await desk.add()
    await desk.talk(CANARY)
    desk.sink.always = Posted(500)
    await desk.run()
    assert all(CANARY.encode() not in request.body for request in desk.sink.requests)
    for table in ("jobs", "webhook_deliveries", "webhooks"):
        assert CANARY not in repr(await world.rows(f"SELECT * FROM {table}"))


async def test_content_comes_along_where_the_app_has_said_so_and_is_sealed_in_the_log(desk: Desk) -> None:
    await desk.add(content=True, events=["message.*"])
    channel = await desk.talk(CANARY)
    await desk.run()
    (request,) = desk.sink.requests
    assert request.event["data"]["event"]["text"] == CANARY
    assert CANARY not in repr(await desk.world.rows("SELECT * FROM webhook_deliveries"))
    sent = await desk.world.send(desk.world.acting("alice"), channel, "soon gone")
    await desk.world.messages.delete(desk.world.acting("alice"), channel, sent.message_id)
    await desk.run()
    assert "event" not in desk.sink.requests[-2].event["data"]


async def test_filters_choose_types_and_channel_types(desk: Desk) -> None:
    await desk.add("https://a.example.com/", events=["message.created"])
    await desk.add("https://b.example.com/", events=["member.*"], channel_types=["direct"])
    await desk.talk("hello")
    await desk.world.channel("alice", "bob", type="direct")
    await desk.run()
    told = [(request.url, request.event["type"]) for request in desk.sink.requests]
    assert sorted(told) == [
        ("https://a.example.com/", "message.created"),
        *[("https://b.example.com/", "member.added")] * 2,
    ]


def test_filters() -> None:
    assert matches(["*"], "message.created")
    assert matches(["message.*"], "message.created")
    assert matches(["member.added", "message.created"], "message.created")
    assert not matches(["message.*"], "member.added")
    assert not matches(["message.*"], "messages.created")
    assert not matches(["message.deleted"], "message.created")


async def test_w2_the_schedule_is_followed_with_one_id_and_then_the_next_event_comes(desk: Desk) -> None:
    await desk.add(events=["message.created"])
    await desk.talk("one", "two")
    desk.sink.answers = [Posted(500)] * len(SCHEDULE)
    began = desk.world.clock.now_ms()
    for wait in SCHEDULE:
        await desk.run(wait * (1 + JITTER) + 1)
    first = desk.sink.requests[: len(SCHEDULE)]
    assert len({request.id for request in first}) == 1
    waits = [(b.at - a.at) / 1_000 for a, b in pairwise(first)]
    assert first[0].at - began <= 2_000
    for wait, planned in zip(waits, SCHEDULE[1:], strict=True):
        # What is due is done when the test lets time pass, at most a jitter later.
        assert planned <= wait <= planned * (1 + 2 * JITTER) + 3
    assert [request.event["data"]["seq"] for request in desk.sink.requests[len(SCHEDULE) :]] == [
        first[0].event["data"]["seq"] + 1
    ]
    log, _ = await desk.webhooks.deliveries(desk.world.backend, (await desk.webhooks.find(desk.world.backend))[0].id)
    assert [one.outcome for one in reversed(log)] == ["failed"] * 7 + ["exhausted", "delivered"]
    assert [one.attempt for one in reversed(log)] == [1, 2, 3, 4, 5, 6, 7, 8, 1]


async def test_w2_nothing_comes_before_its_time(desk: Desk) -> None:
    await desk.add(events=["message.created"])
    channel = await desk.talk("one")
    desk.sink.answers = [Posted(503), Posted(503)]
    await desk.run()
    await desk.run(4.9)
    assert len(desk.sink.requests) == 1
    # Nor is it brought forward by what happens next.
    await desk.world.send(desk.world.acting("alice"), channel)
    await desk.run()
    assert len(desk.sink.requests) == 1
    await desk.run(1)
    assert len(desk.sink.requests) == 2


async def test_w2_retry_after_is_honoured(desk: Desk) -> None:
    await desk.add(events=["message.created"])
    await desk.talk("one")
    desk.sink.answers = [Posted(429, {"retry-after": "120"})]
    await desk.run()
    await desk.run(119)
    assert len(desk.sink.requests) == 1
    await desk.run(2)
    assert len(desk.sink.requests) == 2
    assert retry_after("Wed, 21 Oct 2026 07:28:00 GMT", 1792567680_000 - 5_000) == 5
    assert retry_after("soon", 0) is None
    assert retry_after("99999999", 0) == 24 * 3_600


async def test_w2_gone_switches_off_at_once_and_others_are_told(desk: Desk) -> None:
    world = desk.world
    hook = await desk.add(events=["message.created"])
    other = await desk.add("https://ops.example.com/", events=["channel.deleted"])
    await desk.talk("one", "two")
    desk.sink.answers = [Posted(410)]
    await desk.run()
    gone = await desk.webhooks.get(world.backend, hook.id)
    assert (gone.status, gone.reason) == ("disabled", "gone")
    assert [request.url for request in desk.sink.requests] == [hook.url, other.url]
    assert desk.sink.requests[-1].event == {
        "type": "webhook.disabled",
        "timestamp": desk.sink.requests[-1].event["timestamp"],
        "data": {"app": "app_1", "webhook": hook.id, "reason": "gone"},
    }
    assert ("webhook.disabled", f"webhook:{hook.id}") in await world.rows("SELECT action, target FROM audit")
    await world.send(world.acting("alice"), (await world.channel("alice")).id)
    await desk.run(3_600)
    assert len(desk.sink.requests) == 2


async def test_what_fails_for_days_is_switched_off_and_what_recovers_is_not(desk: Desk) -> None:
    world = desk.world
    hook = await desk.add(events=["message.created"])
    channel = await desk.talk("one")
    desk.sink.always = Posted(error="the host could not be reached")
    began = world.clock.now_ms()
    await desk.run()
    assert (await desk.webhooks.get(world.backend, hook.id)).failing_since == time_of(began)
    while (await desk.webhooks.get(world.backend, hook.id)).status == "enabled":
        assert world.clock.now_ms() - began < 2 * FAILING_MS
        await world.send(world.acting("alice"), channel)
        await desk.run(3_600)
    off = await desk.webhooks.get(world.backend, hook.id)
    assert off.reason == "failing"
    assert world.clock.now_ms() - began >= FAILING_MS
    desk.sink.always = Posted(200)
    sent = len(desk.sink.requests)
    on = await desk.webhooks.update(world.backend, hook.id, WebhookUpdate(status="enabled"))
    assert (on.status, on.failing_since) == ("enabled", None)
    await world.send(world.acting("alice"), channel)
    await desk.run()
    # What was missed meanwhile comes only when it is asked for.
    assert len(desk.sink.requests) == sent + 1
    await desk.webhooks.replay(world.backend, hook.id, WebhookReplay(since=time_of(began)))
    await desk.run()
    messages = [row[0] for row in await world.rows("SELECT seq FROM messages ORDER BY seq")]
    assert desk.sink.seqs()[sent + 1 :] == messages


async def test_while_an_endpoint_fails_its_other_channels_wait_and_go_on_when_it_recovers(desk: Desk) -> None:
    await desk.add(events=["message.created"])
    desk.sink.always = Posted(502)
    await desk.talk("one")
    await desk.run()
    for _ in range(5):
        await desk.talk("more")
    await desk.run()
    assert len(desk.sink.requests) == 1
    desk.sink.always = Posted(200)
    await desk.run(6)
    assert len(desk.sink.requests) == 7


async def test_channels_do_not_wait_for_each_other_and_each_is_in_order(desk: Desk) -> None:
    await desk.add(events=["message.created"])
    for number in range(4):
        await desk.talk(*(f"{number}-{text}" for text in range(60)))
    await desk.run()
    by_channel: dict[str, list[int]] = {}
    for request in desk.sink.requests:
        by_channel.setdefault(request.event["data"]["channel"], []).append(request.event["data"]["seq"])
    assert len(by_channel) == 4
    for seqs in by_channel.values():
        assert seqs == sorted(seqs)
        assert len(seqs) == 60


async def test_a_worker_that_dies_in_between_sends_again_with_the_same_ids(desk: Desk) -> None:
    await desk.add(events=["message.created"])
    await desk.talk("one", "two")
    await desk.pass_on()
    (job,) = await desk.queue.claim({"webhook": 1}, 1_000)
    progress = await desk.webhooks.deliver(job.app, job.key, job.payload or b"")
    assert progress is not None
    # It never ends its claim; the lease does.
    await desk.run(2)
    ids = [request.id for request in desk.sink.requests]
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2


async def test_one_message_or_a_time_is_sent_again(desk: Desk) -> None:
    world = desk.world
    hook = await desk.add(events=["message.created"])
    channel = await desk.talk("one")
    await desk.run()
    world.clock.advance(60)
    since = world.clock.now_ms()
    await world.send(world.acting("alice"), channel)
    await desk.run()
    world.clock.advance(60)
    until = world.clock.now_ms()
    await world.send(world.acting("alice"), channel)
    await desk.run()
    ids = [request.id for request in desk.sink.requests]
    done = await desk.webhooks.replay(world.backend, hook.id, WebhookReplay(message=ids[0]))
    assert done.channels == 1
    await desk.run()
    assert [request.id for request in desk.sink.requests[3:]] == ids[:1]
    await desk.webhooks.replay(world.backend, hook.id, WebhookReplay(since=time_of(since), until=time_of(until)))
    await desk.run()
    assert [request.id for request in desk.sink.requests[4:]] == ids[1:2]
    with pytest.raises(NotFound):
        await desk.webhooks.replay(world.backend, hook.id, WebhookReplay(message="msg_none"))
    with pytest.raises(Refusal):
        await desk.webhooks.replay(world.backend, hook.id, WebhookReplay())


async def test_the_test_button_shows_what_was_sent_and_what_came_back(desk: Desk) -> None:
    hook = await desk.add()
    desk.sink.answers = [Posted(418, {"x-tea": "yes"}, b"short and stout")]
    done = await desk.webhooks.test(desk.world.backend, hook.id)
    assert (done.delivery.outcome, done.delivery.status, done.delivery.type) == ("failed", 418, "webhook.test")
    assert (done.response_headers, done.response_body) == ({"x-tea": "yes"}, "short and stout")
    assert json.loads(done.request_body)["type"] == "webhook.test"
    again = await desk.webhooks.delivery(desk.world.backend, hook.id, done.delivery.id)
    assert again == done


async def test_the_log_is_paged_and_filtered(desk: Desk) -> None:
    hook = await desk.add(events=["message.created"])
    await desk.talk(*(f"{number}" for number in range(7)))
    await desk.run()
    found, cursor = await desk.webhooks.deliveries(desk.world.backend, hook.id, limit=5)
    rest, end = await desk.webhooks.deliveries(desk.world.backend, hook.id, limit=5, cursor=cursor)
    assert (len(found), len(rest), end) == (5, 2, None)
    one, _ = await desk.webhooks.deliveries(desk.world.backend, hook.id, message=found[0].message)
    assert one == found[:1]
    assert (await desk.webhooks.deliveries(desk.world.backend, hook.id, outcome="failed"))[0] == []


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1/",
        "https://user:pass@api.example.com/",
        "https://0x7f000001/",
        "https://2130706433/",
        "ftp://api.example.com/",
    ],
)
async def test_s12_addresses_that_are_internal_are_refused_when_they_are_set_up(desk: Desk, url: str) -> None:
    with pytest.raises(Refusal) as refused:
        await desk.add(url)
    assert refused.value.field == "url"


async def test_s12_a_name_that_is_internal_when_it_is_resolved_is_not_connected_to(world: World) -> None:
    poster = Poster(OutboundPolicy())
    try:
        posted = await poster.post("https://localhost:9/", headers={}, body=b"{}", seconds=5, answer_bytes_max=10)
    finally:
        await poster.aclose()
    assert posted.refused


async def test_they_are_for_those_who_may_and_stay_in_the_app(desk: Desk) -> None:
    world = desk.world
    hook = await desk.add()
    for act in (
        desk.webhooks.find(world.acting("alice")),
        desk.webhooks.get(world.acting("alice"), hook.id),
        desk.webhooks.create(world.acting("alice"), WebhookCreate(url="https://api.example.com/")),
        desk.webhooks.update(world.acting("alice"), hook.id, WebhookUpdate()),
        desk.webhooks.delete(world.acting("alice"), hook.id),
        desk.webhooks.rotate(world.acting("alice"), hook.id, WebhookRotate()),
        desk.webhooks.test(world.acting("alice"), hook.id),
        desk.webhooks.deliveries(world.acting("alice"), hook.id),
        desk.webhooks.replay(world.acting("alice"), hook.id, WebhookReplay()),
    ):
        with pytest.raises(Forbidden):
            await act
    assert hook.secret not in repr(await desk.webhooks.find(world.backend))
    assert hook.secret not in repr(await world.rows("SELECT * FROM webhooks"))
    await desk.webhooks.delete(world.backend, hook.id)
    with pytest.raises(NotFound):
        await desk.webhooks.get(world.backend, hook.id)


async def test_secrets_of_ones_own_are_checked(desk: Desk) -> None:
    secret = "whsec_" + base64.b64encode(b"x" * 32).decode()
    assert (await desk.add(secret=secret)).secret == secret
    for wrong in ("whsec_short", "whsec_" + base64.b64encode(b"x" * 65).decode(), "secret", "whsec_äöü"):
        with pytest.raises(Refusal) as refused:
            await desk.add(secret=wrong)
        assert refused.value.field == "secret"


async def test_a_real_endpoint_is_reached_over_a_real_connection(desk: Desk) -> None:
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(
            next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1]
        )
        heard.append(head + await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    poster = Poster(OutboundPolicy(hosts=(f"127.0.0.1:{port}",)))
    world = desk.world
    webhooks = Webhooks(world.store, world.apps, poster, world.clock, Ids(world.clock), desk.metrics)
    hook = await webhooks.create(world.backend, WebhookCreate(url=f"http://127.0.0.1:{port}/hook"))
    try:
        done = await webhooks.test(world.backend, hook.id)
    finally:
        await poster.aclose()
        server.close()
    assert (done.delivery.outcome, done.delivery.status, done.response_body) == ("delivered", 200, "ok")
    assert heard[0].startswith(b"POST /hook HTTP/1.1\r\n")
    assert b"webhook-signature: v1," in heard[0].lower()


async def test_a_new_key_finds_what_is_sealed(desk: Desk) -> None:
    hook = await desk.add()
    await desk.webhooks.test(desk.world.backend, hook.id)
    assert await desk.world.opens("webhooks", "webhook_deliveries") == 2
