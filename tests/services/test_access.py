"""Who may do what in a channel, as it is now: whatever was decided earlier, and by whomever."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tidings.server.bus.base import MembersMoved
from tidings.server.domain.permissions import Permission as P
from tidings.server.errors import Forbidden, NotFound
from tidings.server.services.access import ChannelView
from tidings.server.services.messages import Draft
from tidings.wire.requests import ChannelCreate, MembersAdd, MemberUpdate
from tidings.wire.resources import Relation

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


async def test_who_joins_or_leaves_costs_no_other_member_a_look_into_the_store(world: World) -> None:
    backend, bob = await world.backend(), await world.acting("bob")
    for name in ("carol", "dave"):
        await world.add_user(name)
    await world.access.channel(bob, "c1", P.MESSAGE_SEND)
    await world.access.channel(backend, "c1", P.MEMBER_ADD)
    await world.members.add(backend, "c1", MembersAdd(users=["carol", "dave"]))
    await world.members.update(backend, "c1", "dave", MemberUpdate(role="moderator"))
    await world.members.remove(backend, "c1", "carol")
    reads = world.store.reads
    access = world.access.cached(bob, "c1")
    assert access is not None
    (row,) = await world.rows("SELECT s.access_version, c.member_count FROM streams s JOIN channels c ON c.sid=s.sid")
    assert (access.channel.access_version, access.channel.member_count) == tuple(row)
    await world.messages.send(bob, "c1", Draft(text="still here"), "k")
    assert world.store.reads == reads + 1, "the one of this test"


async def test_who_came_or_went_is_looked_at_anew_and_what_was_decided_for_them_does_not_count(world: World) -> None:
    backend = await world.backend()
    await world.channels.create(backend, ChannelCreate(id="open", type="public", members=["alice"]))
    alice, bob = await world.acting("alice"), await world.acting("bob")
    assert not (await world.access.channel(bob, "open", P.CHANNEL_READ)).member.is_member
    await world.members.join(bob, "open")
    assert (await world.access.channel(bob, "open", P.MESSAGE_SEND)).member.is_member
    early = await world.access.channel(alice, "open", P.MESSAGE_SEND)
    await world.members.remove(backend, "open", "alice")
    # Still in somebody's hands, and refused by the store: its version has passed.
    (row,) = await world.rows("SELECT access_version FROM streams WHERE kind='channel' AND ref='open'")
    assert early.channel.access_version == row[0] - 1
    with pytest.raises(Forbidden):
        await world.messages.send(alice, "open", Draft(text="too late"), "k")


async def test_whose_rights_hang_on_a_member_loses_and_gains_them_with_that_member(world: World) -> None:
    await world.admin.put_role(await world.backend(), "relation", "clinician", ["channel.read", "message.send"])
    await world.add_user("clara")
    backend = await world.backend()
    await world.admin.put_relation(backend, Relation(kind="clinician", user="clara", other="alice"))
    clara, bob = await world.acting("clara"), await world.acting("bob")
    await world.access.channel(bob, "c1", P.MESSAGE_SEND)
    await world.messages.send(clara, "c1", Draft(text="hello"), "k1")
    await world.members.remove(backend, "c1", "alice")
    with pytest.raises(NotFound):
        await world.access.channel(clara, "c1", P.CHANNEL_READ)
    await world.access.channel(bob, "c1", P.MESSAGE_SEND)
    with pytest.raises(NotFound):
        await world.access.channel(clara, "c1", P.CHANNEL_READ)
    await world.members.add(backend, "c1", MembersAdd(users=["alice"]))
    await world.messages.send(clara, "c1", Draft(text="again"), "k2")


async def test_a_change_that_was_not_heard_of_is_not_skipped(world: World) -> None:
    bob = await world.acting("bob")
    access = await world.access.channel(bob, "c1", P.MESSAGE_SEND)
    version = access.channel.access_version
    for later, known in ((version - 1, True), (version, True), (version + 1, True), (version + 3, False)):
        world.access.members_moved(access.channel.app, "c1", MembersMoved(later, 7, ["somebody"]))
        assert (world.access.cached(bob, "c1") is not None) == known, later


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
