"""What moved: nothing that came after a mark is ever left out of its answer."""

from __future__ import annotations

import pytest

from tidings.server.services.sync import Sync, make_mark

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
