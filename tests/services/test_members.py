"""Members: who gets in, who gets out, and what everybody hears of it."""

from __future__ import annotations

import asyncio

from tidings.server.bus.base import AccessChanged, Joined, Left, Published
from tidings.wire.requests import ChannelCreate, MembersAdd, MemberUpdate
from tidings.wire.resources import ChannelFeatures, ChannelType

from .conftest import World
from .test_users import refused


async def test_a_member_who_is_removed_is_cut_off_before_the_others_hear_of_it(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    channel = await world.channel("alice", roles={"alice": "owner"})
    world.notices.clear()
    added = await world.members.add(alice, channel.id, MembersAdd(users=["bob", "alice"]))
    # Other nodes hear these one by one: what they remember of access goes before anybody is told to read.
    assert [type(notice) for notice in world.notices] == [AccessChanged, Published, Published, Joined]
    assert [(member.user, member.role) for member in added] == [("bob", "member"), ("alice", "owner")]
    joined = world.told(Joined)[-1]
    assert (joined.user, joined.head) == ("bob", 2)
    assert (await world.channels.get(bob, channel.id)).member_count == 2
    world.notices.clear()
    await world.members.remove(alice, channel.id, "bob")
    assert [type(notice) for notice in world.notices] == [AccessChanged, Left, Published, Published]
    assert world.told(Left)[0].user == "bob"
    assert [(event["type"], event["data"]["reason"]) for event in world.events()] == [
        ("member.removed", "removed"),
        ("channel.left", "removed"),
    ]
    await refused("not_found", world.channels.get(bob, channel.id), "channel")
    await refused("not_found", world.send(bob, channel.id), "channel")
    assert (await world.channels.get(alice, channel.id)).member_count == 1
    assert await world.rows("SELECT action, target FROM audit") == [("member.removed", f"channel:{channel.id}")]


async def test_a_new_member_has_read_everything_that_was_there(world: World) -> None:
    alice, _, carol = await world.user("alice"), await world.user("bob"), await world.user("carol")
    channel = await world.channel("alice", "bob")
    await world.send(alice, channel.id)
    [_, member] = await world.members.add(world.backend, channel.id, MembersAdd(users=["bob", "carol"]))
    assert (member.read, member.delivered) == (4, 4)
    side = (await world.channels.get(carol, channel.id)).membership
    assert side is not None
    assert side.unread == 0
    await world.send(alice, channel.id)
    side = (await world.channels.get(carol, channel.id)).membership
    assert side is not None
    assert side.unread == 1
    own = world.own_events()[-1]
    assert own["data"] == {"channel": channel.id, "role": "member", "epoch": channel.epoch, "head": 4}


async def test_what_is_wrong_with_an_addition_is_named_and_nothing_is_half_done(world: World) -> None:
    alice, _, _ = await world.user("alice"), await world.user("bob"), await world.user("off")
    await world.users.deactivate(world.backend, "off")
    channel = await world.channel("alice", roles={"alice": "moderator"})
    add = world.members.add
    await refused("invalid_field", add(alice, channel.id, MembersAdd(users=["alice", "bob", "nobody"])), "users[2]")
    await refused("invalid_field", add(alice, channel.id, MembersAdd(users=["bob", "off"])), "users[1]")
    await refused("invalid_field", add(alice, channel.id, MembersAdd(users=["bob"], role="king")), "role")
    await refused("forbidden", add(alice, channel.id, MembersAdd(users=["bob"], role="owner")), "role")
    await refused("not_found", add(world.acting("bob"), channel.id, MembersAdd(users=["bob"])), "channel")
    assert [row[0] for row in await world.rows("SELECT user FROM members")] == ["alice"]
    await add(alice, channel.id, MembersAdd(users=["bob"], role="moderator"))
    # An addition implies no change of role.
    assert (await add(alice, channel.id, MembersAdd(users=["bob"])))[0].role == "moderator"
    assert (await world.channels.get(alice, channel.id)).member_count == 2


async def test_a_type_bounds_its_members_also_when_they_come_at_once(world: World) -> None:
    await world.configure(ChannelType(name="pair", features=ChannelFeatures(), members_max=2, public=True))
    users = [await world.user(name) for name in ("a", "b", "c", "d")]
    channel = await world.channel(type="pair")
    results = await asyncio.gather(*(world.members.join(user, channel.id) for user in users), return_exceptions=True)
    assert sum(isinstance(result, Exception) for result in results) == 2
    assert (await world.channels.get(world.backend, channel.id)).member_count == 2
    await refused(
        "bound_exceeded", world.members.add(world.backend, channel.id, MembersAdd(users=["a", "b", "c"])), "users"
    )


async def test_public_channels_are_joined_and_left_freely(world: World) -> None:
    alice = await world.user("alice")
    public = await world.channel(type="public")
    closed = await world.channel()
    member = await world.members.join(alice, public.id)
    assert member.role == "member"
    told = len(world.notices)
    assert (await world.members.join(alice, public.id)) == member
    assert len(world.notices) == told
    await world.members.leave(alice, public.id)
    assert [event["data"]["reason"] for event in world.own_events() if event["type"] == "channel.left"] == ["left"]
    await refused("not_found", world.members.join(alice, closed.id), "channel")
    await refused("conflict", world.members.join(world.backend, public.id))
    # They may still read it, and are no member.
    await refused("forbidden", world.members.leave(alice, public.id))


async def test_the_two_of_a_direct_channel_stay_the_same(world: World) -> None:
    alice, _, _ = await world.user("alice"), await world.user("bob"), await world.user("carol")
    channel, _ = await world.channels.create(alice, ChannelCreate(type="direct", members=["bob"]))
    await refused("conflict", world.members.add(world.backend, channel.id, MembersAdd(users=["carol"])))
    await refused("conflict", world.members.remove(world.backend, channel.id, "bob"))
    await refused("conflict", world.members.leave(alice, channel.id))
    assert (await world.channels.get(alice, channel.id)).member_count == 2


async def test_nobody_touches_members_with_more_rights_or_gives_rights_they_lack(world: World) -> None:
    for name in ("owner", "mo", "bob"):
        await world.user(name)
    owner, moderator, bob = world.acting("owner"), world.acting("mo"), world.acting("bob")
    channel = await world.channel("owner", "mo", "bob", roles={"owner": "owner", "mo": "moderator"})
    members = world.members
    await refused("forbidden", members.remove(bob, channel.id, "mo"))
    await refused("forbidden", members.remove(moderator, channel.id, "owner"), "user")
    await refused("forbidden", members.update(moderator, channel.id, "bob", MemberUpdate(role="reader")))
    changed = await members.update(owner, channel.id, "bob", MemberUpdate(role="owner"))
    assert changed.role == "owner"
    assert world.events(channel.id)[-1]["data"] == {"user": "bob", "role": "owner"}
    # With another role they may do other things at once.
    await members.update(bob, channel.id, "mo", MemberUpdate(role="reader"))
    await refused("forbidden", world.send(moderator, channel.id))
    await refused("invalid_field", members.update(bob, channel.id, "mo", MemberUpdate(role="king")), "role")
    await refused("not_found", members.update(bob, channel.id, "nobody", MemberUpdate(role="reader")), "user")
    app_moderator = await world.user("sheriff", "moderator")
    await refused("forbidden", members.remove(app_moderator, channel.id, "owner"), "user")
    assert len(await world.rows("SELECT 1 FROM audit WHERE action='member.role_changed'")) == 2


async def test_somebody_stays_who_can_manage_roles(world: World) -> None:
    owner, bob = await world.user("owner"), await world.user("bob")
    channel = await world.channel("owner", "bob", roles={"owner": "owner"})
    members = world.members
    await refused("conflict", members.leave(owner, channel.id), "user")
    await refused("conflict", members.remove(owner, channel.id, "owner"), "user")
    await refused("conflict", members.update(owner, channel.id, "owner", MemberUpdate(role="member")), "user")
    await members.update(owner, channel.id, "bob", MemberUpdate(role="owner"))
    await members.leave(owner, channel.id)
    # Alone, one may go; and backends can always appoint somebody.
    await members.leave(bob, channel.id)
    assert (await world.channels.get(world.backend, channel.id)).member_count == 0
    other = await world.channel("owner", "bob", roles={"owner": "owner"})
    await members.remove(world.backend, other.id, "owner")


async def test_lists_of_members_are_paged_and_can_be_narrowed_to_a_role(world: World) -> None:
    names = [f"u{number}" for number in range(5)]
    for name in names:
        await world.user(name)
    channel = await world.channel(*names, roles={"u3": "owner"})
    reader = world.acting("u0")
    first, cursor = await world.members.list(reader, channel.id, limit=3)
    rest, end = await world.members.list(reader, channel.id, limit=3, cursor=cursor)
    assert [member.user for member in first + rest] == names
    assert end is None
    owners, _ = await world.members.list(reader, channel.id, role="owner")
    assert [member.user for member in owners] == ["u3"]
    other = await world.channel("u0")
    await refused("cursor_invalid", world.members.list(reader, other.id, cursor=cursor), "cursor")
    await world.user("stranger")
    await refused("not_found", world.members.list(world.acting("stranger"), channel.id), "channel")


async def test_someone_who_comes_back_starts_at_the_head_again(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.configure(ChannelType(name="ward", features=ChannelFeatures(), history="since_join"))
    alice, bob = world.acting("alice"), world.acting("bob")
    channel = await world.channel("alice", "bob", type="ward")
    await world.send(alice, channel.id, "before")
    await world.members.leave(bob, channel.id)
    await world.send(alice, channel.id, "between")
    await world.members.add(world.backend, channel.id, MembersAdd(users=["bob"]))
    await world.send(alice, channel.id, "after")
    page = await world.messages.history(bob, channel.id)
    assert [b'"after"' in message for message in page.messages] == [True]
    side = (await world.channels.get(bob, channel.id)).membership
    assert side is not None
    assert side.unread == 1


async def test_who_may_only_read_a_channel_cannot_join_it(world: World) -> None:
    nurse, _ = await world.user("nurse"), await world.user("patient")
    channel = await world.channel("patient")
    await world.execute("INSERT INTO relations(app,user,other,kind) VALUES (1,'nurse','patient','panel')")
    assert (await world.channels.get(nurse, channel.id)).id == channel.id
    await refused("forbidden", world.members.join(nurse, channel.id))


async def test_who_manages_roles_cannot_take_away_a_greater_one(world: World) -> None:
    steward = ["channel.read", "member.read", "member.update"]
    await world.configure(ChannelType(name="ward", features=ChannelFeatures(), grants={"steward": steward}))
    for name in ("owner", "steve"):
        await world.user(name)
    channel = await world.channel("owner", "steve", type="ward", roles={"owner": "owner", "steve": "steward"})
    update = world.members.update(world.acting("steve"), channel.id, "owner", MemberUpdate(role="steward"))
    await refused("forbidden", update, "user")


async def test_whatever_was_authorised_before_a_change_of_members_is_out_of_date(world: World) -> None:
    for name in ("a", "b"):
        await world.user(name)
    channel = await world.channel("a")

    async def version() -> int:
        [(found,)] = await world.rows("SELECT access_version FROM streams WHERE ref=?", channel.id)
        return int(found)

    versions = [await version()]
    await world.members.add(world.backend, channel.id, MembersAdd(users=["b"]))
    versions.append(await version())
    await world.members.update(world.backend, channel.id, "b", MemberUpdate(role="reader"))
    versions.append(await version())
    await world.members.remove(world.backend, channel.id, "b")
    versions.append(await version())
    assert sorted(set(versions)) == versions
