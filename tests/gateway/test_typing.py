"""Typing: told at most every two seconds, ended when its author goes, and never a reason to wait."""

from __future__ import annotations

from tidings.server.gateway.gateway import TYPING_SECONDS
from tidings.wire.resources import ChannelFeatures, ChannelType

from .world import Node, RecordingPeer


def shown(peer: RecordingPeer) -> list[tuple[str, bool]]:
    return [(frame["user"], frame.get("on", True)) for frame in peer.of("typing")]


async def test_others_see_it_and_the_typist_does_not(node: Node) -> None:
    alice, bob, carol = [await node.connect(user) for user in ("alice", "bob", "carol")]
    assert (await alice.ask("typing", channel="c"))["type"] == "done"
    await bob.quiet()
    await carol.quiet()
    assert shown(bob) == [("alice", True)]
    assert bob.of("typing")[0]["channel"] == "c"
    assert shown(alice) == shown(carol) == []


async def test_the_typists_other_device_sees_it(node: Node) -> None:
    phone, laptop = await node.connect("alice", "phone"), await node.connect("alice", "laptop")
    await phone.ask("typing", channel="c")
    await laptop.quiet()
    assert shown(laptop) == [("alice", True)]


async def test_it_is_told_once_in_its_time(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    for _ in range(5):
        await alice.ask("typing", channel="c")
    await bob.quiet()
    assert len(bob.of("typing")) == 1
    node.clock.advance(TYPING_SECONDS)
    await alice.ask("typing", channel="c")
    await bob.quiet()
    assert len(bob.of("typing")) == 2


async def test_channels_are_told_apart(node: Node) -> None:
    await node.channel("d", "alice", "bob")
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await alice.ask("typing", channel="c")
    await alice.ask("typing", channel="d")
    await bob.quiet()
    assert [frame["channel"] for frame in bob.of("typing")] == ["c", "d"]


async def test_it_can_be_ended_once(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await alice.ask("typing", channel="c")
    await alice.ask("typing", channel="c", on=False)
    await alice.ask("typing", channel="c", on=False)
    await bob.quiet()
    assert shown(bob) == [("alice", True), ("alice", False)]


async def test_it_ends_with_the_connection(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await alice.ask("typing", channel="c")
    alice.gone()
    await bob.quiet()
    assert shown(bob) == [("alice", True), ("alice", False)]


async def test_it_ends_when_the_typist_leaves_the_channel(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await alice.ask("typing", channel="c")
    await node.remove("c", "alice")
    await bob.quiet()
    assert shown(bob) == [("alice", True), ("alice", False)]
    await alice.quiet()
    assert shown(alice) == []
    alice.gone()
    await bob.quiet()
    assert len(bob.of("typing")) == 2


async def test_who_may_not_see_the_channel_cannot_type_there(node: Node) -> None:
    carol, bob = await node.connect("carol"), await node.connect("bob")
    reply = await carol.ask("typing", channel="c")
    assert (reply["type"], reply["code"]) == ("error", "not_found")
    await bob.quiet()
    assert shown(bob) == []


async def test_readers_may_not_type(node: Node) -> None:
    await node.channel("news", "alice", "bob", alice="reader")
    alice = await node.connect("alice")
    assert (await alice.ask("typing", channel="news"))["code"] == "forbidden"


async def test_a_type_of_channel_can_do_without(node: Node) -> None:
    await node.define(ChannelType(name="calm", features=ChannelFeatures(typing=False)))
    await node.channel("calm", "alice", "bob", type="calm")
    alice = await node.connect("alice")
    assert (await alice.ask("typing", channel="calm"))["code"] == "feature_off"
