"""What moved: nothing that came after a mark is ever left out of its answer."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tidings.server.errors import Refusal
from tidings.server.services import sync as sync_module
from tidings.server.services.receipts import Receipts
from tidings.server.services.sync import Sync, make_mark, read_mark
from tidings.server.store import log
from tidings.wire.resources import Head

from .conftest import World


@pytest.fixture
def sync(world: World) -> Sync:
    return Sync(world.store, world.access, world.keyring, world.bus, world.clock)


async def moved(world: World, sync: Sync, user: str, since: str | None) -> list[str]:
    heads, _, _ = await sync.heads(world.acting(user), since, None, 100)
    return [head.stream for head in heads]


async def test_work_resumed_after_a_crash_does_not_take_a_streams_move_back(
    world: World, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("alice", "bob", "carol"):
        await world.user(name)
    await world.channel("alice", "bob", "carol", id="c1")

    async def crash(*_: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(world.users, "_leave_some", lambda *_: _nothing())
        patched.setattr(world.users, "_finish_deletion", crash)
        with pytest.raises(ConnectionError):
            await world.users.delete(world.backend, "carol")
    world.clock.advance(3_600)
    since = make_mark(world.clock.now_ms())
    await world.execute("UPDATE members SET moved_at=0")
    await world.send(world.acting("bob"), "c1")
    assert "c1" in await moved(world, sync, "alice", since)
    assert await world.users.resume_deletions() == 1
    assert world.events("c1")[-1]["type"] == "member.removed"
    assert "c1" in await moved(world, sync, "alice", since)


async def _nothing() -> list[object]:
    return []


async def test_only_streams_that_have_grown_are_told_of_however_many_are_asked_about(
    world: World, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "HEADS_AT_ONCE", 3)
    for number in range(7):
        await world.channel(id=f"c{number}")
    rows = await world.rows("SELECT ref, sid, head FROM streams WHERE kind='channel'")
    sids, heads = {row[0]: row[1] for row in rows}, {row[1]: row[2] for row in rows}
    assert len(heads) == 7
    assert await sync.grown(heads) == {}
    assert await sync.grown({}) == {}
    for name in ("c1", "c5", "c5"):
        await world.send(world.backend, name)
    moved = {sids["c1"]: heads[sids["c1"]] + 1, sids["c5"]: heads[sids["c5"]] + 2}
    assert await sync.grown({**heads, 1: 0}) == moved
    assert await sync.grown({sid: head + 1 for sid, head in heads.items()}) == {sids["c5"]: moved[sids["c5"]]}


async def test_an_event_of_an_earlier_moment_moves_the_stream_now(
    world: World, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader whose mark lies between a deletion and its completion hears of the completion."""
    await world.user("alice")
    await world.user("bob")
    await world.channel("alice", "bob", id="c1")

    async def crash(*_: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(world.users, "_leave_some", lambda *_: _nothing())
        patched.setattr(world.users, "_finish_deletion", crash)
        with pytest.raises(ConnectionError):
            await world.users.delete(world.backend, "bob")
    world.clock.advance(3_600)
    since = make_mark(world.clock.now_ms())
    await world.users.resume_deletions()
    assert "c1" in await moved(world, sync, "alice", since)


async def test_a_clock_that_is_set_back_hides_no_move(world: World, sync: Sync) -> None:
    await world.user("alice")
    bob = await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    world.clock.advance(3_600)
    since = make_mark(world.clock.now_ms())
    await world.execute("UPDATE members SET moved_at=0")
    sent = await world.send(bob, "c1")
    world.clock.advance(1)
    world.clock.set_wall(world.clock.now_ms() - 600_000)
    await world.send(bob, "c1")
    await world.messages.react(bob, "c1", sent.message_id, "+1", add=True)
    assert "c1" in await moved(world, sync, "alice", since)
    assert "c1" in await moved(world, sync, "bob", since), "his own move stands, too"


async def test_what_moved_comes_by_page_and_the_pages_fit_together(
    world: World, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.wire.limits.SYNC_STREAMS_MAX", 4)
    alice, bob = await world.user("alice"), await world.user("bob")
    for number in range(9):
        await world.channel("alice", "bob", id=f"c{number}")
    counted = 0
    real = sync._head

    async def counting(*args: Any) -> Head:
        nonlocal counted
        counted += 1
        return await real(*args)

    monkeypatch.setattr(sync, "_head", counting)
    since = make_mark(world.clock.now_ms())
    assert len(await sync.memberships(alice)) == 10
    now = sync.mark()
    first = await sync.moved(alice, read_mark(since), now, 10)
    assert (len(first.at), len(first.heads), counted) == (10, 4, 3), "what is not shown is not counted"
    assert first.more is not None
    seen = [head.stream for head in first.heads]
    more: str | None = first.more
    while more is not None:
        heads, more, mark = await sync.heads(alice, since, more, 4)
        assert mark == now
        seen += [head.stream for head in heads]
    assert sorted(seen) == sorted(["@me", *(f"c{number}" for number in range(9))])
    assert len(seen) == 10
    world.clock.advance(60)
    await world.send(bob, "c3")
    later = await sync.moved(alice, read_mark(make_mark(world.clock.now_ms())), now, 10)
    assert ([head.stream for head in later.heads], later.more) == (["c3"], None)


async def test_a_stream_that_moved_is_told_with_its_counts(world: World, sync: Sync) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    world.clock.advance(60)
    since = world.clock.now_ms()
    first = await world.send(bob, "c1")
    await world.send(alice, "c1")
    last = await world.send(bob, "c1", mentions=["alice"])
    [head] = (await sync.moved(alice, since, sync.mark(), 2)).heads
    assert (head.stream, head.head, head.read, head.unread, head.mentions) == ("c1", last.seq, first.seq + 1, 1, 1)


@pytest.mark.parametrize("seed", range(4))
async def test_what_moved_is_the_same_whichever_way_it_is_looked_for(
    world: World, sync: Sync, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Through the app's streams that moved, through the user's channels, and in another thread."""
    rng = random.Random(seed)
    alice, bob = await world.user("alice"), await world.user("bob")
    names = [f"c{number}" for number in range(8)]
    for name in names:
        await world.channel("alice", "bob", id=name)
    await world.channel("bob", id="foreign")
    receipts = Receipts(world.store, world.access, world.bus, world.clock)
    moments = []
    for step in range(12):
        world.clock.advance(1)
        moments.append(world.clock.now_ms())
        name = rng.choice(names)
        match rng.randrange(5):
            case 0:
                await world.send(alice, name)
            case 1:
                await world.send(bob, name)
            case 2:
                await world.send(bob, "foreign")
            case 3:
                seq = (await world.send(bob, rng.choice(names))).seq
                world.clock.advance(1)
                await receipts.read(alice, name, min(seq, 2))
            case _:
                await world.channel("alice", id=f"new-{step}")
    for since in moments:
        found = []
        for few, heads, streams in ((10_000, 10_000, 10), (0, 0, 10_000), (0, 0, 1), (10_000, 0, 10)):
            monkeypatch.setattr(sync_module, "FEW_STREAMS", few)
            monkeypatch.setattr(sync_module, "FEW_HEADS", heads)
            moved = await sync.moved(alice, since, "0", streams)
            found.append((moved.at, [head.stream for head in moved.heads], moved.own_head))
        assert found[1:] == found[:1] * 3
        heads, _, _ = await sync.heads(alice, f"{since:x}", None, 100)
        assert [head.stream for head in heads] == found[0][1]


@pytest.mark.parametrize("mark", ["f" * 17, "f" * 64, "-1", "8000000000000000", "zz", ""])
async def test_marks_that_were_not_made_here_are_refused(world: World, sync: Sync, mark: str) -> None:
    alice = await world.user("alice")
    with pytest.raises(Refusal, match="mark"):
        read_mark(mark)
    with pytest.raises(Refusal, match="mark"):
        await sync.heads(alice, mark, None, 10)
    with pytest.raises(Refusal, match="cursor"):
        await sync.heads(alice, None, f"1.{mark}", 10)


@pytest.mark.parametrize("place", ["z" * 20, "-1", "1y2p0ij32e8e8"])
async def test_cursors_beyond_every_stream_are_refused(world: World, sync: Sync, place: str) -> None:
    alice = await world.user("alice")
    with pytest.raises(Refusal) as caught:
        await sync.heads(alice, None, f"{place}.{sync.mark()}", 10)
    assert caught.value.code == "cursor_invalid"
