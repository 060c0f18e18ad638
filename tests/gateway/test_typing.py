"""Typing: told at most every two seconds, ended when its author goes, and never a reason to wait."""

from __future__ import annotations

import pytest

from tidings.server.gateway import crowds
from tidings.server.gateway.crowds import CROWD_RENEW_SECONDS, CROWD_SHOWN_MS
from tidings.server.gateway.gateway import TYPING_SECONDS
from tidings.wire import limits
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


# ---------------------------------------------------------------- large channels: a number


def counted(peer: RecordingPeer) -> list[int]:
    assert all("user" not in frame for frame in peer.of("typing"))
    return [frame["count"] for frame in peer.of("typing")]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members are many."""
    monkeypatch.setattr(limits, "RECEIPTS_MEMBERS_MAX", 1)
    monkeypatch.setattr(crowds, "CROWD_SECONDS", 0.01)


@pytest.mark.usefixtures("large")
async def test_a_large_channel_is_told_how_many_type(node: Node) -> None:
    await node.add("c", "carol")
    alice, phone, bob, carol = [
        await node.connect(user, device)
        for user, device in (("alice", "laptop"), ("alice", "phone"), ("bob", "b"), ("carol", "c"))
    ]
    await alice.ask("typing", channel="c")
    await carol.until(lambda: counted(carol) == [1])
    assert carol.of("typing") == [{"type": "typing", "channel": "c", "count": 1, "expires_in_ms": CROWD_SHOWN_MS}]
    await phone.ask("typing", channel="c")
    await bob.ask("typing", channel="c")
    await carol.until(lambda: counted(carol) == [1, 2])
    assert await alice.until(lambda: counted(alice) == [1, 2]), "whoever types is told as well"
    await bob.ask("typing", channel="c", on=False)
    await carol.until(lambda: counted(carol) == [1, 2, 1])
    await alice.ask("typing", channel="c", on=False)
    await phone.ask("typing", channel="c", on=False)
    await carol.until(lambda: len(counted(carol)) == 4)
    assert carol.of("typing")[-1] == {"type": "typing", "channel": "c", "count": 0, "on": False, "expires_in_ms": 0}
    await carol.until(lambda: not len(node.gateway.crowds))


@pytest.mark.usefixtures("large")
async def test_many_who_type_in_a_large_channel_are_told_once_in_its_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The time does not end while the test runs.
    monkeypatch.setattr(crowds, "CROWD_SECONDS", 3_600.0)
    await node.add("c", "carol")
    alice, bob, carol = [await node.connect(user) for user in ("alice", "bob", "carol")]
    await alice.ask("typing", channel="c")
    await carol.until(lambda: counted(carol) == [1])
    for _ in range(3):
        await bob.ask("typing", channel="c")
        await alice.ask("typing", channel="c", on=False)
        await alice.ask("typing", channel="c")
    await carol.quiet()
    assert counted(carol) == [1]


@pytest.mark.usefixtures("large")
async def test_a_number_is_told_again_while_it_lasts_and_lapses_unless_it_is_renewed(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await alice.ask("typing", channel="c")
    await bob.until(lambda: counted(bob) == [1])
    node.clock.advance(CROWD_RENEW_SECONDS)
    await bob.until(lambda: counted(bob) == [1, 1])
    node.clock.advance(CROWD_SHOWN_MS / 1000 - CROWD_RENEW_SECONDS)
    await bob.until(lambda: counted(bob) == [1, 1, 0])
    await alice.ask("typing", channel="c")
    await bob.until(lambda: counted(bob) == [1, 1, 0, 1])


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("way", ["message", "closed", "removed"])
async def test_who_sends_or_goes_counts_no_more(node: Node, way: str) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await alice.ask("typing", channel="c")
    await bob.until(lambda: counted(bob) == [1])
    if way == "message":
        await alice.ask("message.send", channel="c", key="k_typed", text="done")
    elif way == "closed":
        node.gateway.forget(alice)
    else:
        await node.remove("c", "alice")
    await bob.until(lambda: counted(bob) == [1, 0])
