"""Positions and marks: what is unread, what others are told of it, and where they are not told."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tidings.server.bus.base import Signal
from tidings.server.domain.permissions import Permission
from tidings.server.errors import NotFound, Refusal
from tidings.server.services import receipts as module
from tidings.server.services.access import ChannelView
from tidings.server.services.receipts import COUNTED_SECONDS, Receipts, Standing
from tidings.server.store.base import Appended, Tx
from tidings.wire.requests import MembersAdd
from tidings.wire.resources import ChannelFeatures, ChannelType

from .conftest import World


@pytest.fixture
def receipts(world: World) -> Receipts:
    return Receipts(world.store, world.access, world.bus, world.clock)


async def test_marking_as_unread_only_ever_adds(world: World, receipts: Receipts) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    seqs = [(await world.send(alice, "c1")).seq for _ in range(10)]
    await receipts.read(bob, "c1", seqs[3])

    async def mark(seq: int) -> tuple[int, int | None]:
        unread = await receipts.mark_unread(bob, "c1", seq)
        return unread.unread, unread.marked_unread_from

    assert await mark(seqs[7]) == (6, seqs[4]), "already unread, as is what stands before it"
    assert await mark(seqs[2]) == (8, seqs[2])
    assert await mark(seqs[3]) == (8, seqs[2]), "a later mark takes nothing back"
    assert await mark(seqs[1]) == (9, seqs[1])
    assert (await receipts.read(bob, "c1", seqs[9])).unread == 0
    assert await mark(seqs[9]) == (1, seqs[9])


async def test_a_mark_counts_nothing_from_before_ones_time(world: World, receipts: Receipts) -> None:
    await world.user("alice")
    await world.user("carol")
    await world.configure(ChannelType(name="ward", features=ChannelFeatures(), history="since_join"))
    alice, carol = world.acting("alice"), world.acting("carol")
    await world.channel("alice", id="c1", type="ward")
    for _ in range(3):
        await world.send(alice, "c1")
    await world.members.add(world.backend, "c1", MembersAdd(users=["carol"]))
    joined = world.events("c1")[-1]["seq"]
    assert (await receipts.mark_unread(carol, "c1", 1)).unread == 0
    await world.send(alice, "c1")
    marked = await receipts.mark_unread(carol, "c1", 1)
    assert (marked.unread, marked.marked_unread_from) == (1, joined)


def told(world: World) -> list[dict[str, Any]]:
    """Receipts that went out to a channel."""
    frames = [msgspec.json.decode(signal.payload) for signal in world.told(Signal) if signal.sid is not None]
    return [receipt for frame in frames for receipt in frame["receipts"]]


async def sid_of(world: World, channel: str) -> int:
    [(sid,)] = await world.rows("SELECT sid FROM channels WHERE id=?", channel)
    return int(sid)


async def test_receipts_that_are_switched_off_are_kept_and_not_shown(world: World, receipts: Receipts) -> None:
    await world.user("alice")
    await world.user("bob")
    await world.configure(ChannelType(name="calm", features=ChannelFeatures(receipts=False)))
    alice, bob = world.acting("alice"), world.acting("bob")
    await world.channel("alice", "bob", id="c1", type="calm")
    sent = await world.send(alice, "c1")
    sid = await sid_of(world, "c1")
    receipts.acknowledge(app=1, user="bob", device="phone", sid=sid, channel="c1", seq=sent.seq)
    await receipts.flush()
    assert (await receipts.read(bob, "c1", sent.seq)).unread == 0
    await receipts.flush()
    assert told(world) == []
    assert await world.rows("SELECT delivered, read FROM members WHERE user='bob'") == [(sent.seq, sent.seq)]
    with pytest.raises(Refusal) as caught:
        await receipts.list(alice, "c1", limit=10)
    assert caught.value.code == "feature_off"


async def test_who_may_not_send_receipts_has_a_device_position_only(world: World, receipts: Receipts) -> None:
    alice = await world.user("alice")
    await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    sent = await world.send(alice, "c1")
    sid = await sid_of(world, "c1")
    before = await world.rows("SELECT delivered FROM members WHERE user='bob'")
    receipts.acknowledge(app=1, user="bob", device="phone", sid=sid, channel="c1", seq=sent.seq, tell=False)
    await receipts.flush()
    assert told(world) == []
    assert await world.rows("SELECT delivered FROM members WHERE user='bob'") == before
    assert await world.rows("SELECT device, seq FROM device_positions") == [("phone", sent.seq)]


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
async def test_a_message_knows_how_many_others_it_has_reached(
    world: World, receipts: Receipts, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr("tidings.server.services.receipts.RECEIPTS_MEMBERS_MAX", 1)
    people = {name: await world.user(name) for name in ("alice", "bob", "carol", "dave", "late")}
    alice = people["alice"]
    await world.channel("alice", "bob", "carol", "dave", id="c1")
    first, second = await world.send(alice, "c1"), await world.send(alice, "c1")
    sid = await sid_of(world, "c1")

    async def counts(message: Appended) -> tuple[int, int, int]:
        world.clock.advance(COUNTED_SECONDS)
        found = await receipts.of_message(alice, "c1", message.message_id)
        return found.members, found.delivered, found.read

    assert await counts(first) == (3, 0, 0)
    receipts.acknowledge(app=1, user="bob", device="phone", sid=sid, channel="c1", seq=second.seq)
    await receipts.flush()
    await receipts.read(people["carol"], "c1", first.seq)
    assert (await counts(first), await counts(second)) == ((3, 2, 1), (3, 1, 0))
    # Who joins has everything from before: that says nothing of whether they have seen it.
    await world.members.add(world.backend, "c1", MembersAdd(users=["late"]))
    third = await world.send(people["bob"], "c1")
    await receipts.read(people["late"], "c1", third.seq)
    assert (await counts(first), await counts(third)) == ((3, 2, 2), (4, 1, 1))
    # Who has left is counted no more, be it the sender.
    await world.members.remove(world.backend, "c1", "bob")
    assert (await counts(first), await counts(third)) == ((2, 1, 1), (4, 1, 1))


async def test_in_a_large_channel_asking_often_looks_through_it_once(
    world: World, receipts: Receipts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.server.services.receipts.RECEIPTS_MEMBERS_MAX", 1)
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    first = await world.send(alice, "c1")
    looked: list[int] = []

    async def standing(tx: Tx, channel: ChannelView, now: int) -> Standing:
        looked.append(now)
        return await real(tx, channel, now)

    real = module._standing
    monkeypatch.setattr(module, "_standing", standing)
    found = await asyncio.gather(*(receipts.of_message(alice, "c1", first.message_id) for _ in range(9)))
    assert len(looked) == 1
    await receipts.read(bob, "c1", first.seq)
    later = await world.send(alice, "c1")
    # As of before: nobody has it yet, and nobody fewer than that.
    assert await receipts.of_message(alice, "c1", first.message_id) == found[0]
    again = await receipts.of_message(alice, "c1", later.message_id)
    assert (again.members, again.delivered, again.read, again.as_of) == (1, 0, 0, found[0].as_of)
    world.clock.advance(COUNTED_SECONDS)
    assert (await receipts.of_message(alice, "c1", first.message_id)).read == 1
    with pytest.raises(NotFound):
        await receipts.of_message(alice, "c1", "m_none")


async def test_in_a_large_channel_positions_are_not_told_as_they_move(
    world: World, receipts: Receipts, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    sid = await sid_of(world, "c1")

    async def move() -> list[dict[str, Any]]:
        world.notices.clear()
        sent = await world.send(alice, "c1")
        receipts.acknowledge(app=1, user="bob", device="phone", sid=sid, channel="c1", seq=sent.seq)
        await receipts.flush()
        await receipts.read(bob, "c1", sent.seq)
        await receipts.flush()
        return told(world)

    assert len(await move()) == 2
    monkeypatch.setattr("tidings.server.services.receipts.RECEIPTS_MEMBERS_MAX", 1)
    assert await move() == [], "it is the members that count, not how many of them have moved"
    assert len((await receipts.list(alice, "c1", limit=10))[0]) == 2
    # Typing is bounded by the same number, which is remembered with the channel.
    access = await world.access.channel(alice, "c1", Permission.TYPING_SEND)
    assert access.channel.member_count == 2
    await world.user("carol")
    await world.members.add(world.backend, "c1", MembersAdd(users=["carol"]))
    access = await world.access.channel(alice, "c1", Permission.TYPING_SEND)
    assert access.channel.member_count == 3
