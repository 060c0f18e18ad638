"""Members: who gets in, who gets out, and what everybody hears of it."""

from __future__ import annotations

import pytest

from tidings.server.bus.base import Joined, Left, Published
from tidings.server.errors import Refusal
from tidings.wire.requests import MembersAdd

from .conftest import World


async def test_a_member_who_is_removed_is_cut_off_before_the_others_hear_of_it(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    channel = await world.channel("alice", roles={"alice": "owner"})
    added = await world.members.add(alice, channel.id, MembersAdd(users=["bob", "alice"]))
    assert [(member.user, member.role) for member in added] == [("bob", "member"), ("alice", "owner")]
    joined = world.told(Joined)[-1]
    assert (joined.user, joined.head) == ("bob", 2)
    assert (await world.channels.get(bob, channel.id)).member_count == 2
    world.notices.clear()
    await world.members.remove(alice, channel.id, "bob")
    left, removed, own = world.notices[:3]
    assert isinstance(left, Left) and left.user == "bob"
    assert isinstance(removed, Published) and isinstance(own, Published)
    assert [(event["type"], event["data"]["reason"]) for event in world.events()] == [
        ("member.removed", "removed"),
        ("channel.left", "removed"),
    ]
    with pytest.raises(Refusal, match="not_found"):
        await world.channels.get(bob, channel.id)
    assert (await world.channels.get(alice, channel.id)).member_count == 1
