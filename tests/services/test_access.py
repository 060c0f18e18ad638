"""Who may do what in a channel, as it is now: whatever was decided earlier, and by whomever."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tidings.server.domain.permissions import Permission as P
from tidings.server.errors import Forbidden
from tidings.server.services.access import ChannelView
from tidings.wire.requests import ChannelCreate

from .admin_world import World, open_world

READING = ["channel.read", "member.read"]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as made:
        for user in ("alice", "bob"):
            await made.add_user(user)
        await made.channels.create(await made.backend(), ChannelCreate(id="c1", members=["alice", "bob"]))
        yield made


async def test_a_request_from_before_a_change_of_roles_leaves_no_old_grants_behind(world: World) -> None:
    early = await world.acting("alice")
    await world.admin.put_role(await world.backend(), "channel", "member", READING)
    with pytest.raises(Forbidden):
        await world.access.channel(early, "c1", P.MESSAGE_SEND)
    with pytest.raises(Forbidden):
        await world.access.channel(await world.acting("alice"), "c1", P.MESSAGE_SEND)


async def test_a_request_from_before_a_change_has_the_app_role_of_now(world: World) -> None:
    backend = await world.backend()
    await world.admin.put_role(backend, "app", "nurse", ["channel.read", "message.delete_any"])
    await world.add_user("nina", role="nurse")
    early = await world.acting("nina")
    await world.access.channel(early, "c1", P.MESSAGE_DELETE_ANY)
    await world.admin.put_role(await world.backend(), "app", "nurse", ["channel.read"])
    # Nobody has loaded the channel since, then somebody has: both doors.
    with pytest.raises(Forbidden):
        await world.access.channel(early, "c1", P.MESSAGE_DELETE_ANY)
    with pytest.raises(Forbidden):
        await world.access.channel(early, "c1", P.MESSAGE_DELETE_ANY)
    assert world.access.cached(early, "c1") is not None


async def test_forgetting_a_user_costs_the_same_however_many_channels_are_remembered(world: World) -> None:
    alice, bob = await world.acting("alice"), await world.acting("bob")
    for actor in (alice, bob):
        await world.access.channel(actor, "c1", P.MESSAGE_SEND)
    looked_at = Watched(world.access._channels)
    world.access._channels = looked_at
    world.access.forget_user(alice.app.app, "alice")
    assert looked_at.walks == 0
    assert world.access.cached(alice, "c1") is None
    assert world.access.cached(bob, "c1") is not None
    await world.access.channel(alice, "c1", P.MESSAGE_SEND)
    assert world.access.cached(alice, "c1") is not None


class Watched(OrderedDict[tuple[int, str], ChannelView]):
    """Channels that count how often somebody walks through all of them."""

    walks = 0

    def items(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().items()

    def values(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().values()


async def test_beyond_a_bound_users_are_forgotten_all_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.server.services.access.USERS_FORGOTTEN_MAX", 2)
    bob = await world.acting("bob")
    for name in ("alice", "carol", "dave"):
        await world.access.channel(bob, "c1", P.MESSAGE_SEND)
        world.access.forget_user(bob.app.app, name)
    assert world.access.cached(bob, "c1") is None
    assert world.access._users_forgotten == {}
