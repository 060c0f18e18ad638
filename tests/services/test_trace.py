"""Where is my message? The whole way, for whoever may ask, and nothing that was said."""

from __future__ import annotations

import msgspec
import pytest

from tidings.server.errors import Forbidden, NotFound
from tidings.server.services.receipts import Receipts
from tidings.server.services.trace import Trace

from .conftest import World

CANARY = "a swollen knee"


@pytest.fixture
def trace(world: World) -> Trace:
    return Trace(world.store, world.bus)


async def device(world: World, user: str, id: str, **more: object) -> None:
    await world.execute(
        "INSERT INTO devices(app,user,id,platform,created_at,last_seen_at) VALUES (1,?,?,?,1,1)",
        user,
        id,
        more.get("platform"),
    )


async def test_it_tells_who_has_it_on_which_device_and_who_has_read_it(world: World, trace: Trace) -> None:
    alice, _, carol = [await world.user(name) for name in ("alice", "bob", "carol")]
    channel = await world.channel("alice", "bob", "carol")
    sent = await world.send(alice, channel.id, CANARY)
    for user, id in (("bob", "phone"), ("bob", "laptop")):
        await device(world, user, id)
    receipts = Receipts(world.store, world.access, world.bus, world.clock)
    sid = (await world.rows("SELECT sid FROM channels WHERE id=?", channel.id))[0][0]
    world.clock.advance(3)
    receipts.acknowledge(app=1, user="bob", device="phone", sid=sid, channel=channel.id, seq=sent.seq)
    await receipts.flush()
    await receipts.read(carol, channel.id, sent.seq)
    world.bus.answer_devices(lambda app, user: ["laptop"] if user == "bob" else [])

    found = await trace.message(world.backend, sent.message_id, channel.id)
    assert (found.seq, found.sender, found.members) == (sent.seq, "alice", 3)
    bob, reader = found.recipients
    assert [(one.user, one.delivered, one.read) for one in (bob, reader)] == [
        ("bob", True, False),
        ("carol", True, True),
    ]
    laptop, phone = bob.devices
    assert (laptop.id, laptop.acknowledged, laptop.connected) == ("laptop", False, True)
    assert (phone.id, phone.acknowledged, phone.connected) == ("phone", True, False)
    assert phone.acknowledged_at is not None
    assert round((phone.acknowledged_at - found.accepted_at).total_seconds()) == 3
    assert CANARY.encode() not in msgspec.json.encode(found)


async def test_pushes_webhooks_and_what_is_still_to_be_done_are_in_it(world: World, trace: Trace) -> None:
    alice, _ = await world.user("alice"), await world.user("bob")
    channel = await world.channel("alice", "bob")
    sent = await world.send(alice, channel.id)
    sid = (await world.rows("SELECT sid FROM channels WHERE id=?", channel.id))[0][0]
    now = world.clock.now_ms()
    for serial, (device_id, outcome, reason) in enumerate(
        (("", "skipped", "quiet_hours"), ("phone", "scheduled", "not_acknowledged"), ("phone", "accepted", "sent"))
    ):
        await world.execute(
            "INSERT INTO push_log(app,sid,seq,user,device,id,at,outcome,reason,provider) VALUES (1,?,?,?,?,?,?,?,?,?)",
            *(sid, sent.seq, "bob", device_id, f"{serial}", now, outcome, reason, "apns"),
        )
    await world.execute(
        "INSERT INTO webhooks(app,id,definition,sealed,status,created_at,updated_at)"
        " VALUES (1,'wh','{}',?,'enabled',1,1)",
        b"x",
    )
    await world.execute(
        "INSERT INTO webhook_deliveries(app,webhook,id,message,type,sid,seq,at,attempt,outcome,status,milliseconds)"
        " VALUES (1,'wh','d1','msg_1','message.created',?,?,?,1,'failed',503,12)",
        *(sid, sent.seq, now),
    )
    await world.execute(
        "INSERT INTO jobs(app,kind,key,due_at,attempts,error,created_at) VALUES (1,'webhook',?,?,1,'status 503',1)",
        *(f"wh/{sid}", now + 5_000),
    )
    found = await trace.message(world.backend, sent.message_id)
    assert [(one.device, one.outcome, one.reason) for one in found.recipients[0].push] == [
        (None, "skipped", "quiet_hours"),
        ("phone", "scheduled", "not_acknowledged"),
        ("phone", "accepted", "sent"),
    ]
    assert [(one.webhook, one.outcome, one.status) for one in found.webhooks] == [("wh", "failed", 503)]
    assert [(one.kind, one.target, one.state, one.error) for one in found.work] == [
        ("webhook", "wh", "waiting", "status 503")
    ]
    # Nothing has taken the event out of the outbox here.
    assert not found.handed_on


async def test_members_come_in_pages_and_one_can_be_asked_for(world: World, trace: Trace) -> None:
    names = [f"u{number}" for number in range(5)]
    for name in names:
        await world.user(name)
    channel = await world.channel(*names)
    sent = await world.send(world.acting("u0"), channel.id)
    first = await trace.message(world.backend, sent.message_id, limit=3)
    second = await trace.message(world.backend, sent.message_id, limit=3, cursor=first.next)
    assert [one.user for page in (first, second) for one in page.recipients] == ["u1", "u2", "u3", "u4"]
    assert second.next is None
    alone = await trace.message(world.backend, sent.message_id, user="u3")
    assert [one.user for one in alone.recipients] == ["u3"]
    with pytest.raises(NotFound):
        await trace.message(world.backend, sent.message_id, user="nobody")


async def test_it_is_a_right_of_its_own_and_stays_in_the_app_and_channel(world: World, trace: Trace) -> None:
    alice = await world.user("alice")
    channel, other = await world.channel("alice"), await world.channel("alice")
    sent = await world.send(alice, channel.id)
    with pytest.raises(Forbidden):
        await trace.message(alice, sent.message_id)
    with pytest.raises(Forbidden):
        await trace.message(world.key("channel.read", "message.versions"), sent.message_id)
    assert (await trace.message(world.key("trace.read"), sent.message_id)).seq == sent.seq
    with pytest.raises(NotFound):
        await trace.message(world.backend, sent.message_id, other.id)
    await world.execute("UPDATE channels SET app=2 WHERE id=?", channel.id)
    with pytest.raises(NotFound):
        await trace.message(world.backend, sent.message_id)
