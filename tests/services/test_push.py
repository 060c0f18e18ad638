"""Who is woken, with what, and why not: through the queue, over a real store, with providers that write down."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from random import Random
from typing import Any

import msgspec
import pytest

from tidings.server.clock import Ids
from tidings.server.errors import Forbidden, NotFound, Refusal
from tidings.server.jobs.push import push_kinds
from tidings.server.jobs.relay import Relay
from tidings.server.jobs.worker import Worker
from tidings.server.push.base import Notification, Outcome
from tidings.server.services.notifications import Notifications
from tidings.server.services.push import CONNECTED_MS, Push, PushReader
from tidings.server.services.push_test import PushTester
from tidings.server.services.queue import Queue
from tidings.server.services.receipts import Receipts
from tidings.server.telemetry import Metrics
from tidings.wire.ids import time_of
from tidings.wire.notifications import (
    ChannelNotifications,
    FallbackStep,
    NotificationPreferences,
    PushProviderPut,
    PushSettings,
    PushTest,
    PushTestDevice,
    PushTokenPut,
    QuietHours,
    Template,
)
from tidings.wire.push import HttpConfig, PushConfig

from .conftest import World

CANARY = "a swollen knee"
ACCEPTED = Outcome(kind="accepted", reason="ok", provider_id="p1")


@dataclass
class Recorder:
    """Providers of any kind: write down what they are given, answer what they are told to."""

    sent: list[tuple[str, Notification]] = field(default_factory=list)
    answers: list[Outcome] = field(default_factory=list)
    opened: list[PushConfig] = field(default_factory=list)

    def check(self, config: PushConfig) -> PushConfig:
        return config

    def complete(self, config: PushConfig) -> PushConfig:
        return config

    def check_token(self, config: PushConfig, token: str) -> None:
        if token == "bad":
            raise Refusal("invalid_field", "That is no token.", field="token")

    def open(self, config: PushConfig) -> Recorder:
        self.opened.append(config)
        return self

    async def send(self, token: str, notification: Notification) -> Outcome:
        self.sent.append((token, notification))
        return self.answers.pop(0) if self.answers else ACCEPTED

    async def close(self) -> None:
        pass


@dataclass
class Desk:
    world: World
    recorder: Recorder
    push: Push
    notifications: Notifications
    receipts: Receipts
    relay: Relay
    worker: Worker
    queue: Queue
    metrics: Metrics

    async def provider(self, id: str = "apns") -> None:
        config = HttpConfig(url="https://push.example.com", secrets=["whsec_" + "a" * 32])
        await self.notifications.put_provider(self.world.backend, id, PushProviderPut(config=config))

    async def token(self, user: str, device: str = "phone", provider: str = "apns", **more: Any) -> None:
        wanted = PushTokenPut(provider=provider, token=f"{user}-{device}-{provider}", **more)
        await self.notifications.put_token(self.world.acting(user), user, device, wanted)

    async def settings(self, **push: Any) -> None:
        await self.world.configure(push=PushSettings(**push))

    async def pass_on(self) -> None:
        while await self.relay.turn():
            pass

    async def run(self, seconds: float = 0) -> None:
        """Hand events on, let time pass, and do what is due then."""
        await self.pass_on()
        self.world.clock.advance(seconds)
        await self.worker.run_due()

    async def acknowledge(self, user: str, device: str, channel: str, seq: int) -> None:
        sid = (await self.world.rows("SELECT sid FROM channels WHERE id=?", channel))[0][0]
        self.receipts.acknowledge(app=1, user=user, device=device, sid=sid, channel=channel, seq=seq)
        await self.receipts.flush()

    async def log(self) -> list[tuple[str, str, str, str]]:
        rows = await self.world.rows("SELECT user, device, outcome, reason FROM push_log ORDER BY id")
        return [tuple(row) for row in rows]  # type: ignore[misc]


@pytest.fixture
async def desk(world: World) -> AsyncIterator[Desk]:
    recorder, metrics = Recorder(), Metrics()
    ids = Ids(world.clock)
    push = Push(world.store, world.apps, world.bus, recorder, world.clock, ids, metrics, Random(1))
    queue = Queue(world.store, world.clock, ids)
    worker = Worker(queue, push_kinds(push), world.clock, metrics, random=Random(1))
    made = Desk(
        world,
        recorder,
        push,
        Notifications(world.store, world.apps, world.access, world.changes, recorder, world.clock, ids),
        Receipts(world.store, world.access, world.bus, world.clock),
        Relay(world.store, [PushReader()], world.bus, world.clock, metrics),
        worker,
        queue,
        metrics,
    )
    for name in ("alice", "bob"):
        await world.user(name)
    yield made
    await push.close()


async def test_a_device_that_has_not_got_it_in_time_is_woken_and_it_is_written_down(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await desk.run(60)
    sent = await world.send(world.acting("alice"), channel.id, CANARY)
    await desk.run(4)
    assert (desk.recorder.sent, await desk.log()) == ([], [])
    await desk.run(2)
    ((token, notification),) = desk.recorder.sent
    assert token == "bob-phone-apns"
    assert notification.data == {
        "app": "app_1",
        "channel": channel.id,
        "message": sent.message_id,
        "seq": str(sent.seq),
        "event": "message",
    }
    assert (notification.title, notification.body) == ("Test", "You have a new message.")
    assert (notification.badge, notification.collapse_key, notification.priority) == (1, channel.id, "high")
    assert CANARY.encode() not in msgspec.json.encode(notification)
    assert await desk.log() == [
        ("bob", "phone", "scheduled", "not_acknowledged"),
        ("bob", "phone", "accepted", "sent"),
    ]
    await desk.run(3_600)
    assert len(desk.recorder.sent) == 1


async def test_nothing_leaves_for_what_was_acknowledged_within_the_grace_period(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await desk.token("bob", "tablet")
    sent = await world.send(world.acting("alice"), channel.id)
    await desk.pass_on()
    world.clock.advance(4.9)
    await desk.acknowledge("bob", "phone", channel.id, sent.seq)
    await desk.run(2)
    assert [token for token, _ in desk.recorder.sent] == ["bob-tablet-apns"]
    assert ("bob", "phone", "skipped", "acknowledged") in await desk.log()


async def test_what_is_acknowledged_or_read_between_decision_and_sending_does_not_leave(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    for _ in range(2):
        await world.send(world.acting("alice"), channel.id)
    desk.recorder.answers = [Outcome(kind="retry", reason="Busy", status=503)] * 2
    await desk.run(6)
    assert len(desk.recorder.sent) == 2
    first, second = [row[0] for row in await world.rows("SELECT seq FROM messages ORDER BY seq")]
    await desk.receipts.read(world.acting("bob"), channel.id, first)
    await desk.acknowledge("bob", "phone", channel.id, second)
    await desk.run(60)
    assert len(desk.recorder.sent) == 2
    assert (await desk.log())[-2:] == [
        ("bob", "phone", "skipped", "read"),
        ("bob", "phone", "skipped", "acknowledged"),
    ]


async def test_whoever_was_removed_or_deactivated_hears_nothing(desk: Desk) -> None:
    world = desk.world
    await world.user("carol")
    channel = await world.channel("alice", "bob", "carol")
    await desk.provider()
    await desk.token("bob")
    await desk.token("carol")
    await world.send(world.acting("alice"), channel.id)
    desk.recorder.answers = [Outcome(kind="retry", reason="Busy", status=503)] * 2
    await desk.run(6)
    await world.members.remove(world.backend, channel.id, "bob")
    await world.users.deactivate(world.backend, "carol")
    await desk.run(60)
    assert len(desk.recorder.sent) == 2
    assert {row for row in await desk.log() if row[2] == "dropped"} == {
        ("bob", "phone", "dropped", "not_member"),
        ("carol", "phone", "dropped", "not_member"),
    }


async def test_a_connected_device_gets_none_and_one_that_turns_out_to_be_gone_does(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob", "here")
    await desk.token("bob", "gone")
    connected = ["here", "gone"]
    world.bus.answer_devices(lambda app, user: connected if user == "bob" else [])
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    assert desk.recorder.sent == []
    connected.remove("gone")
    await desk.run(CONNECTED_MS / 1_000)
    assert [token for token, _ in desk.recorder.sent] == ["bob-gone-apns"]
    assert ("bob", "here", "skipped", "connected") in await desk.log()


async def test_every_other_reason_not_to_wake_is_written_down(desk: Desk) -> None:
    world = desk.world
    for name in ("muted", "none", "night", "tokenless"):
        await world.user(name)
    channel = await world.channel("alice", "bob", "muted", "none", "night", "tokenless")
    await desk.provider()
    for name in ("bob", "muted", "none", "night"):
        await desk.token(name)
    await world.execute("UPDATE members SET muted_until=? WHERE members.user='muted'", world.clock.now_ms() + 9_999_999)
    await desk.notifications.put_preferences(world.acting("none"), "none", NotificationPreferences(level="none"))
    await desk.notifications.put_channel_preferences(
        world.acting("bob"), channel.id, ChannelNotifications(level="mentions")
    )
    hours = QuietHours(start="00:00", end="00:00", timezone="Europe/Berlin")
    await desk.notifications.put_preferences(world.acting("night"), "night", NotificationPreferences(quiet_hours=hours))
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    assert desk.recorder.sent == []
    assert sorted(await desk.log()) == [
        ("bob", "phone", "skipped", "not_mentioned"),
        ("muted", "phone", "skipped", "muted"),
        ("night", "phone", "skipped", "quiet_hours"),
        ("none", "phone", "skipped", "level_none"),
        ("tokenless", "", "skipped", "no_token"),
    ]
    await world.send(world.acting("alice"), channel.id, mentions=["bob"])
    await desk.run(6)
    assert [(token, notification.data["event"]) for token, notification in desk.recorder.sent] == [
        ("bob-phone-apns", "mention")
    ]


async def test_silent_system_and_deleted_messages_wake_nobody(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await world.send(world.acting("alice"), channel.id, silent=True)
    await world.send(world.backend, channel.id, kind="system")
    gone = await world.send(world.acting("alice"), channel.id)
    await world.messages.delete(world.acting("alice"), channel.id, gone.message_id)
    await desk.run(6)
    assert desk.recorder.sent == []
    assert [reason for *_, reason in await desk.log()] == ["silent", "system", "deleted"]


async def test_in_large_channels_only_those_who_are_named_are_woken(desk: Desk) -> None:
    world = desk.world
    await world.user("carol")
    channel = await world.channel("alice", "bob", "carol")
    await desk.settings(members_max=2)
    await desk.provider()
    await desk.token("bob")
    await desk.token("carol")
    await world.send(world.acting("alice"), channel.id, mentions=["carol"])
    await desk.run(6)
    assert [token for token, _ in desk.recorder.sent] == ["carol-phone-apns"]
    assert ("", "", "skipped", "large_channel") in await desk.log()


async def test_quiet_hours_may_only_take_the_sound(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    hours = QuietHours(start="00:00", end="00:00", timezone="Europe/Berlin", mode="silent")
    await desk.notifications.put_preferences(world.acting("bob"), "bob", NotificationPreferences(quiet_hours=hours))
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    ((_, notification),) = desk.recorder.sent
    assert (notification.sound, notification.priority) == (None, "normal")


async def test_content_leaves_only_where_the_app_has_said_so(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob", name="Ward 3")
    await world.execute("UPDATE apps SET name='Clinic' WHERE app=1")
    template = {"message": {"de": Template(title="{sender} in {channel}", body="{text} ({count})")}}
    await desk.settings(content=True, templates=template)
    await desk.provider()
    await desk.token("bob", language="de-AT")
    await world.send(world.acting("alice"), channel.id, CANARY)
    await world.send(world.acting("alice"), channel.id, "and {sender}")
    await desk.run(6)
    assert [(notification.title, notification.body) for _, notification in desk.recorder.sent] == [
        ("alice in Ward 3", f"{CANARY} (2)"),
        ("alice in Ward 3", "and {sender} (2)"),
    ]


async def test_a_dead_token_goes_and_a_new_one_of_the_device_stays(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await desk.token("bob", "tablet")
    desk.recorder.answers = [Outcome(kind="token_dead", reason="Unregistered", status=410), ACCEPTED]
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    left = await desk.notifications.tokens(world.acting("bob"), "bob")
    assert len(left) == 1
    dead = {"phone", "tablet"} - {left[0].device}
    assert ("bob", dead.pop(), "dropped", "token_dead") in await desk.log()


async def test_throttling_is_honoured_and_trouble_ends_some_time(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await world.send(world.acting("alice"), channel.id)
    desk.recorder.answers = [Outcome(kind="retry", reason="TooManyRequests", status=429, retry_after=300.0)]
    await desk.run(6)
    await desk.run(299)
    assert len(desk.recorder.sent) == 1
    await desk.run(2)
    assert len(desk.recorder.sent) == 2
    assert (await desk.log())[-2:] == [
        ("bob", "phone", "retrying", "unavailable"),
        ("bob", "phone", "accepted", "sent"),
    ]
    await world.send(world.acting("alice"), channel.id)
    desk.recorder.answers = [Outcome(kind="retry", reason="Busy", status=503)] * 99
    for _ in range(20):
        await desk.run(700)
    assert len(desk.recorder.sent) == 12
    assert (await desk.log())[-1] == ("bob", "phone", "failed", "unavailable")
    assert await world.rows("SELECT 1 FROM jobs") == []


async def test_what_is_too_old_is_dropped(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.settings(ttl_seconds=60)
    await desk.provider()
    await desk.token("bob")
    await world.send(world.acting("alice"), channel.id)
    await desk.run(61)
    assert desk.recorder.sent == []
    assert (await desk.log())[-1] == ("bob", "phone", "dropped", "too_late")


async def test_bad_configuration_is_reported_once_and_nothing_leaves_until_it_is_put_anew(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await desk.token("bob", "tablet")
    desk.recorder.answers = [Outcome(kind="misconfigured", reason="InvalidProviderToken", status=403)]
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    (provider,) = await desk.notifications.providers(world.backend)
    assert (provider.status, provider.error) == ("misconfigured", "403 InvalidProviderToken")
    before = len(desk.recorder.sent)
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    assert len(desk.recorder.sent) == before
    assert (await desk.log())[-1][2:] == ("skipped", "no_provider")
    await desk.provider()
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    assert len(desk.recorder.sent) == before + 2


async def test_the_next_provider_is_asked_when_nobody_has_got_it_in_time(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.settings(fallback=[FallbackStep(provider="sms", after_minutes=10)])
    for id in ("apns", "sms"):
        await desk.provider(id)
    await desk.token("bob")
    await desk.token("bob", "number", "sms")
    first = await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    await desk.acknowledge("bob", "phone", channel.id, first.seq)
    await desk.run(600)
    assert [token for token, _ in desk.recorder.sent] == ["bob-phone-apns"]
    assert (await desk.log())[-1] == ("bob", "number", "skipped", "acknowledged")
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    await desk.run(600)
    assert [token for token, _ in desk.recorder.sent] == ["bob-phone-apns", "bob-phone-apns", "bob-number-sms"]


async def test_many_messages_are_decided_in_order_and_each_once(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    seqs = []
    for _ in range(120):
        seqs.append((await world.send(world.acting("alice"), channel.id)).seq)
        world.clock.advance(0.1)
    await desk.run(1)
    await desk.run(20)
    decided = [row[0] for row in await world.rows("SELECT seq FROM push_log WHERE outcome='scheduled' ORDER BY id")]
    assert decided == seqs


async def test_what_is_read_on_one_device_is_taken_away_from_those_that_were_woken(desk: Desk) -> None:
    world = desk.world
    channel, other = await world.channel("alice", "bob"), await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await desk.token("bob", "tablet")
    sent = await world.send(world.acting("alice"), channel.id)
    await world.send(world.acting("alice"), other.id)
    await world.execute("UPDATE push_providers SET kind='apns'")
    await desk.acknowledge("bob", "tablet", channel.id, sent.seq)
    await desk.run(6)
    before = len(desk.recorder.sent)
    await desk.receipts.read(world.acting("bob"), channel.id, sent.seq)
    # Reading it again changes nothing.
    await desk.receipts.read(world.acting("bob"), channel.id, sent.seq)
    await desk.run(4)
    ((token, notification),) = desk.recorder.sent[before:]
    assert token == "bob-phone-apns"
    assert (notification.silent, notification.badge, notification.title) == (True, 1, "")
    assert notification.data == {"app": "app_1", "channel": channel.id, "seq": str(sent.seq), "event": "read"}
    assert (await desk.log())[-1] == ("bob", "phone", "accepted", "cleared")
    assert await world.rows("SELECT 1 FROM jobs") == []
    # One that is connected hears of it anyway, and a browser would show something.
    world.bus.answer_devices(lambda app, user: ["phone", "tablet"])
    await desk.receipts.read(world.acting("bob"), other.id, 2)
    await desk.run(4)
    assert len(desk.recorder.sent) == before + 1


async def test_the_grace_period_is_each_messages_own(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    await world.send(world.acting("alice"), channel.id)
    await desk.run(4)
    second = await world.send(world.acting("alice"), channel.id)
    await desk.run(2)
    assert len(desk.recorder.sent) == 1
    await desk.acknowledge("bob", "phone", channel.id, second.seq)
    await desk.run(6)
    assert len(desk.recorder.sent) == 1


async def test_without_a_provider_there_are_no_jobs(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice", "bob")
    await world.send(world.acting("alice"), channel.id)
    await desk.run(6)
    assert await world.rows("SELECT 1 FROM jobs") == []


async def test_it_is_explained_step_by_step_and_a_test_can_be_sent(desk: Desk) -> None:
    world = desk.world
    tester = PushTester(world.store, world.apps, world.bus, desk.push, world.clock, Ids(world.clock))

    def answers(one: PushTestDevice) -> dict[str, tuple[bool, str]]:
        return {step.question: (step.passed, step.answer) for step in one.steps}

    (nothing,) = (await tester.test(world.backend, PushTest(user="bob"))).devices
    assert not nothing.would_wake
    failed = [question for question, (passed, _) in answers(nothing).items() if not passed]
    assert failed == ["Has the app a push provider?", "Has the user a device?", "Has the device told a push token?"]
    channel = await world.channel("alice", "bob")
    await desk.provider()
    await desk.token("bob")
    (ready,) = (await tester.test(world.backend, PushTest(user="bob", channel=channel.id, send=True))).devices
    assert (ready.would_wake, ready.sent) == (True, "accepted: ok")
    ((token, notification),) = desk.recorder.sent
    assert (token, notification.data) == ("bob-phone-apns", {"app": "app_1", "event": "test"})
    hours = QuietHours(start="00:00", end="00:00", timezone="Europe/Berlin")
    until = time_of(world.clock.now_ms() + 3_600_000)
    await desk.notifications.put_preferences(
        world.acting("bob"),
        "bob",
        NotificationPreferences(level="mentions", quiet_hours=hours, snoozed_until=until),
    )
    await world.execute("UPDATE members SET muted_until=? WHERE members.user='bob'", world.clock.now_ms() + 9_999)
    world.bus.answer_devices(lambda app, user: ["phone"])
    (never,) = (await tester.test(world.backend, PushTest(user="bob", device="phone", channel=channel.id))).devices
    failed = [question for question, (passed, _) in answers(never).items() if not passed]
    assert failed == [
        "Is the channel muted?",
        "Do they want every message?",
        "Have they snoozed?",
        "Is it quiet time?",
        "Is the device away?",
    ]
    with pytest.raises(Forbidden):
        await tester.test(world.acting("bob"), PushTest(user="bob"))
    with pytest.raises(NotFound):
        await tester.test(world.backend, PushTest(user="bob", device="other"))


async def test_a_new_key_finds_what_is_sealed(desk: Desk) -> None:
    await desk.provider()
    await desk.token("bob")
    assert await desk.world.opens("push_providers", "push_tokens") == 2


# ---------------------------------------------------------------- what people say


async def test_a_token_belongs_to_the_device_that_told_it_last(desk: Desk) -> None:
    world = desk.world
    await desk.provider()
    wanted = PushTokenPut(provider="apns", token="shared")
    await desk.notifications.put_token(world.acting("alice"), "alice", "phone", wanted)
    await desk.notifications.put_token(world.acting("bob"), "bob", "phone", wanted)
    assert await desk.notifications.tokens(world.acting("alice"), "alice") == []
    (token,) = await desk.notifications.tokens(world.acting("bob"), "bob")
    assert (token.user, token.device, token.provider) == ("bob", "phone", "apns")
    (row,) = await world.rows("SELECT sealed FROM push_tokens")
    assert b"shared" not in bytes(row[0])


async def test_tokens_are_checked_and_ones_own(desk: Desk) -> None:
    world = desk.world
    put = desk.notifications.put_token
    with pytest.raises(NotFound):
        await put(world.acting("bob"), "bob", "phone", PushTokenPut(provider="apns", token="t"))
    await desk.provider()
    for wrong in (PushTokenPut(provider="apns"), PushTokenPut(provider="apns", token="bad")):
        with pytest.raises(Refusal) as refused:
            await put(world.acting("bob"), "bob", "phone", wrong)
        assert refused.value.field == "token"
    with pytest.raises(Forbidden):
        await put(world.acting("bob"), "alice", "phone", PushTokenPut(provider="apns", token="t"))
    await put(world.backend, "alice", "phone", PushTokenPut(provider="apns", token="t"))
    with pytest.raises(Forbidden):
        await desk.notifications.tokens(world.acting("bob"), "alice")
    await desk.notifications.remove_token(world.acting("alice"), "alice", "phone")
    with pytest.raises(NotFound):
        await desk.notifications.remove_token(world.acting("alice"), "alice", "phone")


async def test_a_removed_device_and_a_deleted_user_are_woken_no_more(desk: Desk) -> None:
    world = desk.world
    await desk.provider()
    await desk.token("bob")
    await desk.token("bob", "tablet")
    await desk.notifications.put_preferences(world.acting("bob"), "bob", NotificationPreferences(level="none"), "phone")
    await world.users.remove_device(world.acting("bob"), "bob", "phone")
    assert [token.device for token in await desk.notifications.tokens(world.acting("bob"), "bob")] == ["tablet"]
    assert await world.rows("SELECT 1 FROM notification_preferences") == []
    await world.users.delete(world.backend, "bob")
    assert await world.rows("SELECT 1 FROM push_tokens") == []


async def test_preferences_are_replaced_told_to_other_devices_and_gone_when_empty(desk: Desk) -> None:
    world = desk.world
    bob = world.acting("bob")
    until = datetime.fromisoformat("2026-05-01T12:00:00+00:00")
    said = NotificationPreferences(level="mentions", snoozed_until=until, language="de")
    await desk.notifications.put_preferences(bob, "bob", said)
    assert await desk.notifications.preferences(bob, "bob") == said
    assert await desk.notifications.preferences(bob, "bob", "phone") == NotificationPreferences()
    event = world.own_events()[-1]
    assert (event["type"], event["data"]) == ("notifications.updated", {})
    await desk.notifications.put_preferences(bob, "bob", NotificationPreferences())
    assert await world.rows("SELECT 1 FROM notification_preferences") == []
    with pytest.raises(Forbidden):
        await desk.notifications.put_preferences(bob, "alice", said)
    nowhere = QuietHours(start="22:00", end="07:00", timezone="Mars/Olympus")
    with pytest.raises(Refusal) as refused:
        await desk.notifications.put_preferences(bob, "bob", NotificationPreferences(quiet_hours=nowhere))
    assert refused.value.field == "quiet_hours.timezone"


async def test_what_is_said_about_a_channel_is_for_those_who_see_it(desk: Desk) -> None:
    world = desk.world
    channel = await world.channel("alice")
    wanted = ChannelNotifications(level="none")
    with pytest.raises(NotFound):
        await desk.notifications.put_channel_preferences(world.acting("bob"), channel.id, wanted)
    await desk.notifications.put_channel_preferences(world.acting("alice"), channel.id, wanted, "phone")
    assert await desk.notifications.channel_preferences(world.acting("alice"), channel.id, "phone") == wanted
    assert world.own_events()[-1]["data"] == {"channel": channel.id, "device": "phone"}


async def test_providers_keep_their_secrets_and_are_for_those_who_may(desk: Desk) -> None:
    world = desk.world
    await desk.provider()
    (shown,) = await desk.notifications.providers(world.backend)
    assert b"whsec" not in msgspec.json.encode(shown)
    # What is left out stays.
    config = HttpConfig(url="https://other.example.com")
    await desk.notifications.put_provider(world.backend, "apns", PushProviderPut(config=config, enabled=False))
    (row,) = await world.rows("SELECT sealed, definition, status FROM push_providers")
    opened = world.app.cipher.open(bytes(row[0]), b"push:apns")
    assert b"whsec_" in opened
    assert b"other.example.com" in opened
    assert "whsec" not in row[1]
    assert row[2] == "disabled"
    for act in (
        desk.notifications.providers(world.acting("bob")),
        desk.notifications.put_provider(world.acting("bob"), "x", PushProviderPut(config=config)),
        desk.notifications.delete_provider(world.acting("bob"), "apns"),
    ):
        with pytest.raises(Forbidden):
            await act
    await desk.token("bob")
    await desk.notifications.delete_provider(world.backend, "apns")
    assert await world.rows("SELECT 1 FROM push_tokens") == []
    actions = [row[0] for row in await world.rows("SELECT action FROM audit ORDER BY id")]
    assert actions[-3:] == ["push_provider.put", "push_provider.put", "push_provider.deleted"]
