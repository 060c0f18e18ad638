"""Channels: made once, found again, listed with what is new, ended for everyone."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from tidings.server.bus.base import AccessChanged, Joined, Left, Published
from tidings.server.clock import Ids
from tidings.server.crypto.base import CryptoError
from tidings.server.services import channels as channels_module
from tidings.wire.requests import ChannelCreate, ChannelUpdate, MembershipUpdate
from tidings.wire.resources import ChannelFeatures, ChannelType, Membership

from .conftest import World
from .test_users import refused


async def side(world: World, user: str, channel: str) -> Membership:
    """A member's own side of a channel."""
    found = (await world.channels.get(world.acting(user), channel)).membership
    assert found is not None
    return found


async def listed(world: World, user: str, **filters: Any) -> list[str]:
    """Ids of the channels a user is shown."""
    return [channel.id for channel in (await world.channels.query(world.acting(user), **filters))[0]]


async def test_who_makes_a_channel_owns_it_and_everyone_named_is_in(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    channel, created = await world.channels.create(
        alice, ChannelCreate(id="c1", name="Ward 3", custom={"x": 1}, labels={"ward": "3"}, members=["bob", "bob"])
    )
    assert created
    assert (channel.id, channel.name, channel.custom, channel.labels) == ("c1", "Ward 3", {"x": 1}, {"ward": "3"})
    assert (channel.member_count, channel.created_by, channel.head, len(channel.epoch)) == (2, "alice", 3, 8)
    assert channel.membership is not None
    assert channel.membership.role == "owner"
    assert (await side(world, "bob", "c1")).role == "member"
    assert [(event["type"], event["seq"], event["by"]) for event in world.events("c1")] == [
        ("channel.created", 1, "alice"),
        ("member.added", 2, "alice"),
        ("member.added", 3, "alice"),
    ]
    assert [(event["type"], event["seq"], event["data"]["head"]) for event in world.own_events()] == [
        ("channel.joined", 1, 1),
        ("channel.joined", 1, 2),
    ]
    assert [(notice.user, notice.head) for notice in world.told(Joined)] == [("alice", 1), ("bob", 2)]
    assert [type(notice) for notice in world.notices] == [Published] * 5 + [Joined] * 2
    assert await world.channels.get(bob, "c1") != channel
    for (sealed,) in await world.rows("SELECT sealed FROM channels"):
        assert b"Ward" not in sealed


async def test_what_is_wrong_with_a_new_channel_is_named_and_nothing_is_stored(world: World) -> None:
    alice, _ = await world.user("alice"), await world.user("off")
    await world.users.deactivate(world.backend, "off")
    await world.configure(ChannelType(name="pair", features=ChannelFeatures(), members_max=2))
    alice = world.acting("alice")
    before = await world.rows("SELECT count(*) FROM streams")

    def create(**fields: Any) -> Any:
        return world.channels.create(alice, ChannelCreate(**fields))

    await refused("invalid_field", create(type="nope"), "type")
    await refused("invalid_field", create(members=["alice", "nobody"]), "members[1]")
    await refused("invalid_field", create(members=["alice", "alice", "off"]), "members[2]")
    await refused("invalid_field", create(members=["off"], roles={"off": "king"}), "roles.off")
    await refused("invalid_field", create(roles={"off": "member"}), "roles.off")
    await refused("invalid_field", create(custom={"x": "y" * 9000}), "custom")
    await refused("bound_exceeded", create(type="pair", members=["off", "nobody"]), "members")
    await refused("invalid_field", create(type="direct", members=["alice"]), "members")
    await refused("invalid_field", create(type="direct", members=["off", "nobody"]), "members")
    guest = await world.user("guest", "guest")
    await refused("forbidden", world.channels.create(guest, ChannelCreate()))
    await refused("forbidden", world.channels.create(guest, ChannelCreate(type="direct", members=["alice"])))
    assert await world.rows("SELECT count(*) FROM channels") == [(0,)]
    assert await world.rows("SELECT count(*)-1 FROM streams") == before
    await create(id="c1")
    await refused("already_exists", create(id="c1"), "id")
    # A creator gives no role that holds more than the creator's own.
    await world.configure(ChannelType(name="lecture", features=ChannelFeatures(), creator_role="member"))
    alice = world.acting("alice")
    await refused("forbidden", create(type="lecture", members=["guest"], roles={"guest": "owner"}), "roles.guest")


async def test_a_pair_has_one_direct_channel_however_often_and_from_either_side(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    results = await asyncio.gather(
        *(
            world.channels.create(actor, ChannelCreate(id=f"d{number}", type="direct", members=[other]))
            for number, (actor, other) in enumerate([(alice, "bob"), (bob, "alice")] * 5)
        )
    )
    assert len({channel.id for channel, _ in results}) == 1
    assert sum(created for _, created in results) == 1
    again, created = await world.channels.create(world.backend, ChannelCreate(type="direct", members=["bob", "alice"]))
    assert (again.id, created) == (results[0][0].id, False)
    assert await world.rows("SELECT count(*) FROM streams WHERE kind='channel'") == [(1,)]
    # Starting it again shows it to whom had hidden it.
    await world.channels.set_membership(alice, again.id, MembershipUpdate(hidden=True))
    found, _ = await world.channels.create(alice, ChannelCreate(type="direct", members=["bob"]))
    assert found.membership is not None
    assert not found.membership.hidden
    # Deleted, the pair may start anew.
    await world.channels.delete(world.backend, again.id)
    fresh, created = await world.channels.create(alice, ChannelCreate(type="direct", members=["bob"]))
    assert created
    assert fresh.id != again.id


async def test_who_may_not_know_of_a_channel_is_told_that_there_is_none(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    channel = await world.channel("alice")
    assert (await world.channels.get(alice, channel.id)).id == channel.id
    for call in (
        world.channels.get(bob, channel.id),
        world.channels.update(bob, channel.id, ChannelUpdate(name="x")),
        world.channels.delete(bob, channel.id),
        world.channels.set_membership(bob, channel.id, MembershipUpdate(hidden=True)),
        world.channels.get(bob, "nothing"),
    ):
        await refused("not_found", call, "channel")
    admin = await world.user("admin", "admin")
    assert (await world.channels.get(admin, channel.id)).membership is None


async def test_an_update_tells_everyone_the_channel_as_it_is_then(world: World) -> None:
    alice = await world.user("alice")
    channel = await world.channel("alice", roles={"alice": "owner"}, name="Old", labels={"a": "1"})
    world.notices.clear()
    changed = await world.channels.update(
        alice, channel.id, ChannelUpdate(name="New", custom={"k": "v"}, labels={"b": "2"})
    )
    assert (changed.name, changed.custom, changed.labels, changed.head) == ("New", {"k": "v"}, {"b": "2"}, 3)
    assert changed.membership is not None
    [event] = world.events()
    assert (event["type"], event["seq"], event["data"]["name"], event["data"]["head"]) == (
        "channel.updated",
        3,
        "New",
        3,
    )
    assert "membership" not in event["data"]
    assert await listed(world, "alice", labels={"b": "2"}) == [channel.id]
    assert await listed(world, "alice", labels={"a": "1"}) == []
    # The same again changes nothing and tells nobody.
    assert await world.channels.update(alice, channel.id, ChannelUpdate(name="New")) == changed
    assert len(world.notices) == 1


async def test_freezing_stops_members_at_once_and_needs_its_own_permission(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    channel = await world.channel("alice", "bob", roles={"alice": "moderator"})
    await world.send(bob, channel.id)
    await refused("forbidden", world.channels.update(bob, channel.id, ChannelUpdate(frozen=True)))
    narrow = world.key("channel.read", "channel.update")
    await refused("forbidden", world.channels.update(narrow, channel.id, ChannelUpdate(name="x", frozen=True)))
    assert (await world.channels.update(alice, channel.id, ChannelUpdate(frozen=True))).frozen
    assert world.told(AccessChanged)[-1].channel == channel.id
    await refused("frozen", world.send(bob, channel.id))
    await world.channels.update(alice, channel.id, ChannelUpdate(frozen=False))
    await world.send(bob, channel.id)


async def test_hiding_lasts_until_the_next_message_and_only_for_oneself(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    channel = await world.channel("alice", "bob")
    until = datetime(2030, 1, 1, tzinfo=UTC)
    hidden = await world.channels.set_membership(alice, channel.id, MembershipUpdate(hidden=True, muted_until=until))
    assert hidden.membership is not None
    assert (hidden.membership.hidden, hidden.membership.muted_until) == (True, until)
    event = world.own_events()[-1]
    assert (event["type"], event["data"]["hidden"], event["data"]["channel"]) == ("channel.settings", True, channel.id)
    assert await listed(world, "alice") == []
    assert await listed(world, "alice", hidden=True) == [channel.id]
    assert await listed(world, "alice", ids=[channel.id]) == [channel.id]
    assert await listed(world, "bob") == [channel.id]
    await world.send(bob, channel.id)
    assert await listed(world, "alice") == [channel.id]
    assert not (await side(world, "alice", channel.id)).hidden
    await world.channels.set_membership(alice, channel.id, MembershipUpdate(archived=True))
    assert await listed(world, "alice") == []
    assert await listed(world, "alice", archived=True) == [channel.id]
    await world.channels.set_membership(alice, channel.id, MembershipUpdate(archived=False, muted_until=None))
    assert (await side(world, "alice", channel.id)).muted_until is None
    told = len(world.notices)
    await world.channels.set_membership(alice, channel.id, MembershipUpdate(archived=False))
    assert len(world.notices) == told
    await refused("conflict", world.channels.set_membership(world.backend, channel.id, MembershipUpdate(hidden=True)))


@pytest.mark.parametrize("batch", [2, 200])
async def test_a_deleted_channel_is_gone_for_everyone_and_unreadable_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(channels_module, "RELEASE_BATCH", batch)
    names = [f"u{number}" for number in range(5)]
    for name in names:
        await world.user(name)
    owner = world.acting("u0")
    channel = await world.channel(*names, id="c1", roles={"u0": "owner"}, labels={"a": "b"})
    await world.send(owner, "c1")
    await refused("forbidden", world.channels.delete(world.acting("u1"), "c1"))
    world.notices.clear()
    await world.channels.delete(owner, "c1")
    kinds = [type(notice) for notice in world.notices]
    assert kinds[:2] == [Published, Left]
    assert world.told(Left)[0].user is None
    assert [event["type"] for event in world.events("c1")] == ["channel.deleted"]
    assert [event["data"] for event in world.own_events()] == [{"channel": "c1", "reason": "deleted"}] * 5
    for actor in (owner, world.backend):
        await refused("not_found", world.channels.get(actor, "c1"), "channel")
        await refused("not_found", world.send(actor, "c1"), "channel")
    assert await listed(world, "u0") == []
    assert (await world.channels.query(world.backend))[0] == []
    for table in ("members", "labels", "meta WHERE value LIKE '{%'"):
        assert await world.rows(f"SELECT 1 FROM {table}") == []
    [(sid, wrapped, version, app_version)] = await world.rows(
        "SELECT sid, key_wrapped, key_version, key_app_version FROM streams WHERE ref=?", channel.id
    )
    with pytest.raises(CryptoError):
        world.keyring.cipher(world.app.id, str(sid), world.apps.stream_key(wrapped, version, app_version))
    await refused("already_exists", world.channels.create(owner, ChannelCreate(id="c1")), "id")
    assert await world.rows("SELECT action, target FROM audit") == [("channel.deleted", "channel:c1")]


async def test_a_deletion_that_was_cut_short_is_finished_at_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels_module, "RELEASE_BATCH", 1)
    for name in ("a", "b", "c"):
        await world.user(name)
    channel = await world.channel("a", "b", "c")

    async def crash(*_: Any) -> None:
        raise ConnectionError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(world.channels, "_finish_deletion", crash)
        with pytest.raises(ConnectionError):
            await world.channels.delete(world.backend, channel.id)
    assert len(await world.rows("SELECT 1 FROM members")) == 2
    assert await world.channels.resume_deletions() == 1
    assert await world.channels.resume_deletions() == 0
    assert await world.rows("SELECT 1 FROM members") == []
    assert len([event for event in world.own_events() if event["type"] == "channel.left"]) == 3


async def test_lists_are_sorted_paged_and_stable(world: World) -> None:
    alice = await world.user("alice")
    made = []
    for number in range(5):
        world.clock.advance(1)
        made.append((await world.channel("alice", id=f"c{number}")).id)
    world.clock.advance(1)
    await world.send(alice, "c1")
    world.clock.advance(1)
    await world.channels.update(world.backend, "c2", ChannelUpdate(name="x"))
    assert await listed(world, "alice") == ["c1", "c4", "c3", "c2", "c0"]
    assert await listed(world, "alice", sort="created") == ["c4", "c3", "c2", "c1", "c0"]
    assert await listed(world, "alice", sort="updated") == ["c2", "c4", "c3", "c1", "c0"]
    for sort in ("last_message", "created", "updated"):
        seen: list[str] = []
        cursor = None
        while True:
            page, cursor = await world.channels.query(alice, sort=sort, limit=2, cursor=cursor)  # type: ignore[arg-type]
            seen += [channel.id for channel in page]
            if cursor is None:
                break
        assert seen == await listed(world, "alice", sort=sort)
    _, cursor = await world.channels.query(alice, limit=2)
    await refused("cursor_invalid", world.channels.query(alice, limit=2, cursor=cursor, sort="created"), "cursor")
    await world.user("bob")
    await refused("cursor_invalid", world.channels.query(world.acting("bob"), cursor=cursor), "cursor")


async def test_lists_are_narrowed_by_members_types_and_what_is_unread(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.user("carol")
    await world.channel("alice", "bob", "carol", id="all")
    await world.channel("alice", "bob", id="two")
    direct, _ = await world.channels.create(alice, ChannelCreate(id="direct", type="direct", members=["bob"]))
    assert set(await listed(world, "alice", members=["bob", "carol"])) == {"all"}
    assert set(await listed(world, "alice", types=["direct"])) == {direct.id}
    assert await listed(world, "alice", unread_only=True) == []
    await world.send(bob, "two")
    assert await listed(world, "alice", unread_only=True) == ["two"]
    assert await listed(world, "bob", unread_only=True) == []
    assert await listed(world, "carol", ids=["two", "all"]) == ["all"]


async def test_lists_show_last_message_and_members_to_those_who_may_read_them(world: World) -> None:
    alice, _ = await world.user("alice"), await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    await world.send(alice, "c1", "first")
    await world.send(alice, "c1", "latest")
    [shown] = (await world.channels.query(alice, include_last_message=True, include_members=True))[0]
    assert shown.last_message is not None
    assert shown.last_message.text == "latest"
    assert [member.user for member in shown.members or []] == ["alice", "bob"]
    admin = await world.user("admin", "admin")
    [shown] = (await world.channels.query(admin, include_last_message=True, include_members=True))[0]
    assert shown.last_message is None
    assert shown.members is not None


async def test_people_find_public_channels_and_those_of_people_in_their_care(world: World) -> None:
    await world.user("nurse")
    patient = await world.user("patient")
    await world.channel("patient", id="care")
    await world.channel("patient", id="open", type="public")
    await world.channel(id="other")
    await world.send(patient, "care", "hello")
    assert await listed(world, "nurse") == []
    assert await listed(world, "nurse", joined=False) == ["open"]
    await world.execute("INSERT INTO relations(app,user,other,kind) VALUES (1,'nurse','patient','panel')")
    assert set(await listed(world, "nurse", joined=False)) == {"open", "care"}
    [care] = (await world.channels.query(world.acting("nurse"), ids=["care"], joined=False, include_last_message=True))[
        0
    ]
    assert care.last_message is not None
    assert await listed(world, "patient", joined=False) == []
    assert {channel.id for channel in (await world.channels.query(world.backend))[0]} == {"care", "open", "other"}
    admin = await world.user("admin", "admin")
    assert len((await world.channels.query(admin))[0]) == 3
    assert (await world.channels.query(admin, joined=True))[0] == []


async def test_streams_that_draw_the_same_number_draw_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([b"\0\0\0\1"] * 3 + [b"\0\0\0\2"] + [b"\0\0\0\1"] + [b"\0\0\0\3"])
    random_bytes = world.ids.random_bytes

    class Drawn(Ids):
        def random_bytes(self, count: int) -> bytes:
            return next(draws) if count == 4 else random_bytes(count)

    drawn = Drawn(world.clock)
    monkeypatch.setattr(world.users, "_ids", drawn)
    monkeypatch.setattr(world.channels, "_ids", drawn)
    await world.user("alice")
    await world.user("bob")
    await world.channel("alice", "bob")
    assert await world.rows("SELECT count(*) FROM streams") == [(3,)]


@pytest.mark.sqlite
async def test_finding_open_channels_costs_nothing_for_the_closed_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = await world.user("alice")
    await world.channel(id="open", type="public")
    await world.channel(id="closed")
    asked: list[tuple[str, tuple[Any, ...]]] = []
    read = world.store.read

    async def watched(unit: Any) -> Any:
        async def watching(tx: Any) -> Any:
            real = tx.all

            async def all(sql: str, *args: Any) -> Any:
                asked.append((sql, args))
                return await real(sql, *args)

            monkeypatch.setattr(type(tx), "all", lambda _, sql, *args: all(sql, *args))
            try:
                return await unit(tx)
            finally:
                monkeypatch.undo()

        return await read(watching)

    monkeypatch.setattr(world.store, "read", watched)
    found, _ = await world.channels.query(alice, joined=False)
    assert [channel.id for channel in found] == ["open"]
    sql, args = asked[0]
    plan = [str(row[3]) for row in await world.rows("EXPLAIN QUERY PLAN " + sql, *args)]
    assert [step for step in plan if step.startswith("SEARCH c ")] == ["SEARCH c USING INDEX channels_sid (sid=?)"], (
        plan
    )
