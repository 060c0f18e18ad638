"""Positions and marks: what is unread, what others are told of it, and where they are not told."""

from __future__ import annotations

import pytest

from tidings.server.services.receipts import Receipts
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
