"""Before a message is stored its app may have a say: approve, change, refuse, or not be there."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from standardwebhooks import Webhook as Verifier

from tidings.server.clock import SystemClock
from tidings.server.domain.breaker import FAILURES_MAX, FIRST_SECONDS, LONGEST_SECONDS, Breaker
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.errors import Forbidden, NotFound, Refusal
from tidings.server.posting import Posted, Poster
from tidings.server.services.access import backend_actor
from tidings.server.services.messages import Draft, Edit, Messages
from tidings.server.services.presend import UNDER_WAY_MAX, Presend, PresendHooks
from tidings.server.services.rotation import BOXES
from tidings.server.store.tables import metadata
from tidings.server.telemetry import Metrics
from tidings.wire.presend import PresendHook, PresendHookPut, PresendTest

from .conftest import World


def said(**answer: Any) -> Posted:
    return Posted(200, {}, json.dumps(answer).encode())


ALLOW = said(action="allow")


@dataclass
class Moderator(Poster):
    """The app's endpoint."""

    answers: list[Posted] = field(default_factory=list)
    always: Posted = field(default_factory=lambda: ALLOW)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    gate: asyncio.Event | None = None

    def __post_init__(self) -> None:
        Poster.__init__(self, OutboundPolicy())

    async def post(
        self, url: str, *, headers: dict[str, str], body: bytes, seconds: float, answer_bytes_max: int
    ) -> Posted:
        self.asked.append(json.loads(body))
        self.headers.append(headers)
        self.bodies.append(body)
        if self.gate is not None:
            await self.gate.wait()
        return self.answers.pop(0) if self.answers else self.always


@dataclass
class Desk:
    world: World
    moderator: Moderator
    hooks: PresendHooks
    channel: str

    async def put(self, **fields: Any) -> PresendHook:
        made = await self.hooks.put(self.world.backend, PresendHookPut(**{"url": "https://mod.example.com/", **fields}))
        self.world.apps.forget(1)
        self.world.app = await self.world.apps.get("app_1")
        self.world.backend = backend_actor(self.world.app, "k1")
        return made

    async def send(self, text: str = "hello", key: str = "k", user: str = "alice", **fields: Any) -> Any:
        actor = self.world.acting(user)
        return await self.world.messages.send(actor, self.channel, Draft(text=text, **fields), key)

    async def texts(self) -> list[str]:
        page = await self.world.messages.history(self.world.acting("alice"), self.channel)
        return [json.loads(one)["text"] for one in page.messages]


@pytest.fixture
async def desk(world: World) -> Desk:
    moderator = Moderator()
    presend = Presend(moderator, world.clock, world.ids, Metrics())
    world.messages = Messages(world.store, world.access, world.bus, world.clock, world.ids, presend)
    hooks = PresendHooks(world.store, world.apps, world.changes, presend, moderator, world.clock, world.ids)
    for name in ("alice", "bob"):
        await world.user(name)
    channel = await world.channel("alice", "bob")
    return Desk(world, moderator, hooks, channel.id)


async def test_what_is_approved_is_stored_and_the_question_is_signed(desk: Desk) -> None:
    desk.world.clock.set_wall(SystemClock().now_ms())
    hook = await desk.put()
    assert hook.secret is not None
    await desk.send("hello", mentions=["bob"])
    assert await desk.texts() == ["hello"]
    (asked,) = desk.moderator.asked
    assert asked["type"] == "message.before_send"
    assert asked["data"] == {
        "app": "app_1",
        "channel": desk.channel,
        "channel_type": "group",
        "user": "alice",
        "text": "hello",
        "mentions": ["bob"],
    }
    Verifier(hook.secret).verify(desk.moderator.bodies[0], desk.moderator.headers[0])
    new = await desk.put(rotate=True)
    await desk.send("again", "k2")
    for secret in (hook.secret, new.secret):
        assert secret is not None
        Verifier(secret).verify(desk.moderator.bodies[1], desk.moderator.headers[1])


async def test_what_is_refused_is_not_stored_and_its_sender_hears_why(desk: Desk) -> None:
    await desk.put()
    desk.moderator.answers = [said(action="refuse", reason="No telephone numbers, please.")]
    with pytest.raises(Refusal) as refused:
        await desk.send()
    assert (refused.value.code, refused.value.detail) == ("message_refused", "No telephone numbers, please.")
    assert refused.value.problem.retry.value == "never"
    assert await desk.world.rows("SELECT 1 FROM messages") == []


async def test_what_is_changed_is_stored_as_changed_and_a_retry_is_not_asked_about_again(desk: Desk) -> None:
    await desk.put()
    desk.moderator.answers = [said(action="change", text="h***o", custom={"flag": True})]
    first = await desk.send("hello")
    again = await desk.send("hello")
    assert (again.message_id, again.seq) == (first.message_id, first.seq)
    assert await desk.texts() == ["h***o"]
    assert len(desk.moderator.asked) == 1
    with pytest.raises(Refusal, match="key_reused"):
        await desk.send("h***o")


async def test_a_change_keeps_to_the_bounds(desk: Desk) -> None:
    await desk.put()
    desk.moderator.answers = [
        said(action="change", text="x" * 30_000),
        said(action="change", custom={"a": "x" * 9_000}),
    ]
    with pytest.raises(Refusal, match="hook_unavailable"):
        await desk.send()
    with pytest.raises(Refusal, match="invalid_field"):
        await desk.send()
    assert await desk.world.rows("SELECT 1 FROM messages") == []


@pytest.mark.parametrize(
    "answer",
    [
        Posted(error="no answer within 1.5 s"),
        Posted(500),
        Posted(204),
        Posted(200, {}, b"yes"),
        Posted(200, {}, b'{"action":"perhaps"}'),
        Posted(302),
        Posted(error="internal", refused=True),
    ],
)
async def test_without_an_answer_it_is_refused_to_be_tried_again_or_sent(desk: Desk, answer: Posted) -> None:
    await desk.put()
    desk.moderator.always = answer
    with pytest.raises(Refusal) as refused:
        await desk.send()
    assert (refused.value.code, refused.value.problem.retry.value) == ("hook_unavailable", "later")
    assert await desk.world.rows("SELECT 1 FROM messages") == []
    await desk.put(on_failure="allow")
    await desk.send()
    assert await desk.texts() == ["hello"]


async def test_one_who_never_answers_is_left_alone_for_a_while(desk: Desk) -> None:
    await desk.put(on_failure="allow")
    desk.moderator.always = Posted(error="no answer within 1.5 s")
    for number in range(FAILURES_MAX + 3):
        await desk.send(key=f"k{number}")
    assert len(desk.moderator.asked) == FAILURES_MAX
    desk.world.clock.advance(FIRST_SECONDS + 0.1)
    desk.moderator.always = ALLOW
    for number in range(3):
        await desk.send(key=f"later{number}")
    assert len(desk.moderator.asked) == FAILURES_MAX + 3


def test_the_breaker_lets_one_probe_through_and_waits_longer_each_time() -> None:
    breaker, now = Breaker(), 0.0
    for _ in range(FAILURES_MAX):
        assert breaker.may_ask(now)
        breaker.failed(now)
    assert breaker.is_open
    waits = []
    for _ in range(6):
        began = now
        while not breaker.may_ask(now):
            now += 0.5
        waits.append(now - began)
        assert not breaker.may_ask(now)
        breaker.failed(now)
    assert waits == [5, 10, 20, 40, 60, 60]
    assert max(waits) == LONGEST_SECONDS
    now += LONGEST_SECONDS
    assert breaker.may_ask(now)
    breaker.gave_up()
    assert breaker.may_ask(now)
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.may_ask(now)
    assert breaker.may_ask(now)


async def test_edits_are_asked_about_too(desk: Desk) -> None:
    await desk.put()
    sent = await desk.send("hello")
    alice = desk.world.acting("alice")
    desk.moderator.answers = [said(action="refuse", reason="no")]
    with pytest.raises(Refusal, match="message_refused"):
        await desk.world.messages.edit(alice, desk.channel, sent.message_id, Edit(text="worse"))
    desk.moderator.answers = [said(action="change", text="better")]
    await desk.world.messages.edit(alice, desk.channel, sent.message_id, Edit(text="worse"))
    assert await desk.texts() == ["better"]
    assert [one["type"] for one in desk.moderator.asked][1:] == ["message.before_edit"] * 2
    assert desk.moderator.asked[-1]["data"]["message"] == sent.message_id
    # Whoever may not edit it is not asked about.
    with pytest.raises(Forbidden):
        await desk.world.messages.edit(desk.world.acting("bob"), desk.channel, sent.message_id, Edit(text="mine"))
    assert len(desk.moderator.asked) == 3


async def test_only_where_and_whom_the_app_wants_to_be_asked_about(desk: Desk) -> None:
    await desk.put(channel_types=["direct"])
    await desk.send()
    await desk.put()
    await desk.world.messages.send(desk.world.backend, desk.channel, Draft(text="from the app"), "b1")
    assert desk.moderator.asked == []
    await desk.put(include_backend=True)
    await desk.world.messages.send(desk.world.backend, desk.channel, Draft(text="from the app"), "b2")
    assert len(desk.moderator.asked) == 1
    await desk.put(enabled=False)
    await desk.send(key="k2")
    assert len(desk.moderator.asked) == 1
    await desk.hooks.delete(desk.world.backend)
    with pytest.raises(NotFound):
        await desk.hooks.get(desk.world.backend)


async def test_the_short_way_is_not_taken_where_the_app_is_asked(desk: Desk) -> None:
    alice = desk.world.acting("alice")
    done: list[Any] = []
    await desk.send(key="first")
    assert desk.world.messages.send_now(alice, desk.channel, Draft(text="now"), "now", done.append) > 0
    await desk.put()
    asked = desk.world.acting("alice")
    assert desk.world.messages.send_now(asked, desk.channel, Draft(text="then"), "then", done.append) == 0


async def test_whoever_is_removed_while_the_app_thinks_sends_nothing(desk: Desk) -> None:
    await desk.put()
    desk.moderator.gate = asyncio.Event()
    sending = asyncio.ensure_future(desk.send(user="bob"))
    async with asyncio.timeout(5):
        while not desk.moderator.asked:
            await asyncio.sleep(0)
    await desk.world.members.remove(desk.world.backend, desk.channel, "bob")
    desk.moderator.gate.set()
    with pytest.raises(NotFound):
        await sending
    assert await desk.world.rows("SELECT 1 FROM messages") == []


async def test_no_more_than_so_many_wait_for_an_answer(desk: Desk) -> None:
    await desk.put()
    desk.moderator.gate = asyncio.Event()
    sending = [asyncio.ensure_future(desk.send(key=f"k{number}")) for number in range(UNDER_WAY_MAX)]
    async with asyncio.timeout(10):
        while len(desk.moderator.asked) < UNDER_WAY_MAX:
            await asyncio.sleep(0.01)  # why: the store's threads look up each
    with pytest.raises(Refusal, match="hook_unavailable"):
        await desk.send(key="one too many")
    desk.moderator.gate.set()
    await asyncio.gather(*sending)
    assert len(await desk.texts()) <= UNDER_WAY_MAX


async def test_it_can_be_tried_and_is_for_those_who_may(desk: Desk) -> None:
    backend = desk.world.backend
    await desk.put()
    desk.moderator.answers = [said(action="refuse", reason="no"), Posted(503)]
    tried = await desk.hooks.test(backend, PresendTest(text="hm"))
    assert (tried.outcome, tried.reason, tried.status) == ("refused", "no", 200)
    assert (await desk.hooks.test(backend, PresendTest())).outcome == "failed"
    assert (await desk.hooks.get(backend)).secret is None
    for act in (
        desk.hooks.get(desk.world.acting("alice")),
        desk.hooks.put(desk.world.acting("alice"), PresendHookPut(url="https://x.example.com/")),
        desk.hooks.delete(desk.world.acting("alice")),
        desk.hooks.test(desk.world.acting("alice"), PresendTest()),
    ):
        with pytest.raises(Forbidden):
            await act
    with pytest.raises(Refusal) as refused:
        await desk.put(url="https://127.0.0.1/")
    assert refused.value.field == "url"


async def test_a_new_key_finds_what_is_sealed(desk: Desk) -> None:
    await desk.put()
    assert await desk.world.opens("presend_hooks") == 1


def test_every_box_under_the_apps_key_is_in_the_list_of_rotation() -> None:
    of_streams = {"events", "messages", "channels"}
    sealed = {name for name, table in metadata.tables.items() if "sealed" in table.columns}
    assert {kind.table for kind in BOXES} == sealed - of_streams
