"""Receipts through sockets: what may be acknowledged, what others are told, and that nothing goes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidings.server.errors import Refusal, StoreUnavailable
from tidings.server.services.receipts import Receipts
from tidings.wire.resources import ChannelFeatures, ChannelType

from .world import Node, RecordingPeer


def receipts_of(peer: RecordingPeer, user: str) -> list[tuple[int, int]]:
    """(delivered, read) of a user as told, in order."""
    return [
        (receipt["delivered"], receipt["read"])
        for frame in peer.of("receipts")
        for receipt in frame["receipts"]
        if receipt["user"] == user
    ]


async def position(node: Node, user: str, channel: str = "c") -> tuple[int, int]:
    [(delivered, read)] = await node.rows(
        "SELECT delivered, read FROM members m JOIN streams s ON s.sid=m.sid WHERE s.ref=? AND m.user=?", channel, user
    )
    return delivered, read


async def test_what_was_sent_can_be_acknowledged_and_others_are_told(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    seq = (await node.send("c")).seq
    await bob.quiet()
    assert (await bob.ask("ack", positions={"c": seq}))["type"] == "done"
    await node.services.receipts.flush()
    await alice.quiet()
    assert [delivered for delivered, _ in receipts_of(alice, "bob")] == [seq]
    assert (await position(node, "bob"))[0] == seq


async def test_more_than_was_sent_is_refused_as_a_whole(node: Node) -> None:
    await node.channel("d", "alice", "bob")
    bob = await node.connect("bob")
    seq = (await node.send("c")).seq
    await bob.quiet()
    before = await position(node, "bob", "d")
    reply = await bob.ask("ack", positions={"d": await node.head("d"), "c": seq + 1})
    assert (reply["code"], reply["field"], reply["bound"]) == ("position_ahead", "positions.c", seq)
    await node.services.receipts.flush()
    assert await position(node, "bob", "d") == before


async def test_a_slow_peer_may_acknowledge_what_it_was_sent_and_no_more(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    first = (await node.send("c")).seq
    await bob.quiet()
    bob.pause()
    second = (await node.send("c")).seq
    await alice.got("c", second)
    with pytest.raises(Refusal, match="More was acknowledged"):
        node.gateway.acknowledge(bob, {"c": second})
    node.gateway.acknowledge(bob, {"c": first})


async def test_what_was_sent_before_a_stream_is_asked_for_again_can_still_be_acknowledged(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    bob = await node.connect("bob")
    first = (await node.send("c")).seq
    second = (await node.send("c")).seq
    await bob.got("c", second)
    go = asyncio.Event()
    real = node.gateway.sync.read

    async def held(*args: Any) -> Any:
        await go.wait()
        return await real(*args)

    monkeypatch.setattr(node.gateway.sync, "read", held)
    bob.say("sync", positions={"c": {"seq": first}})
    await bob.until(lambda: bob.of("syncing"))
    assert bob.behind == {await node.sid("c"): first}
    assert (await bob.ask("ack", positions={"c": second}))["type"] == "done"
    assert (await bob.ask("ack", positions={"c": second + 1}))["code"] == "position_ahead"
    go.set()
    await bob.until(lambda: bob.of("synced"))


async def test_a_channel_of_others_is_ignored(node: Node) -> None:
    carol = await node.connect("carol")
    assert (await carol.ask("ack", positions={"c": 1, "never": 5}))["type"] == "done"
    await node.services.receipts.flush()
    assert await node.rows("SELECT * FROM device_positions") == []


async def test_each_device_has_a_position_of_its_own_and_the_member_the_furthest(node: Node) -> None:
    phone, laptop = await node.connect("bob", "phone"), await node.connect("bob", "laptop")
    for _ in range(3):
        last = (await node.send("c")).seq
    await phone.quiet()
    await laptop.quiet()
    await phone.ask("ack", positions={"c": last})
    await laptop.ask("ack", positions={"c": last - 2})
    await node.services.receipts.flush()
    assert (await position(node, "bob"))[0] == last
    assert await node.rows("SELECT device, seq FROM device_positions ORDER BY device") == [
        ("laptop", last - 2),
        ("phone", last),
    ]


async def test_an_acknowledgement_while_others_are_written_is_told_too(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    first = (await node.send("c")).seq
    second = (await node.send("c")).seq
    await bob.quiet()
    receipts: Receipts = node.services.receipts
    store = receipts._store
    real = store.run

    async def slow(*args: Any) -> Any:
        found = await real(*args)
        node.gateway.acknowledge(bob, {"c": second})
        return found

    node.gateway.acknowledge(bob, {"c": first})
    monkeypatch.setattr(store, "run", slow)
    await receipts.flush()
    monkeypatch.setattr(store, "run", real)
    await receipts.flush()
    await alice.quiet()
    assert [delivered for delivered, _ in receipts_of(alice, "bob")] == [first, second]


async def test_positions_that_could_not_be_written_stay_pending(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    seq = (await node.send("c")).seq
    await bob.quiet()
    await bob.ask("ack", positions={"c": seq})
    receipts: Receipts = node.services.receipts
    store = receipts._store
    real = store.run

    async def failing(*args: Any) -> Any:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(store, "run", failing)
    with pytest.raises(StoreUnavailable):
        await receipts.flush()
    monkeypatch.setattr(store, "run", real)
    await receipts.flush()
    await alice.quiet()
    assert [delivered for delivered, _ in receipts_of(alice, "bob")] == [seq]
    assert (await position(node, "bob"))[0] == seq


async def test_reading_is_answered_with_the_counts_and_told_to_the_other_devices(node: Node) -> None:
    phone, laptop, alice = (
        await node.connect("bob", "phone"),
        await node.connect("bob", "laptop"),
        await node.connect("alice"),
    )
    seqs = [(await node.send("c")).seq for _ in range(3)]
    reply = await phone.ask("read", channel="c", seq=seqs[1])
    assert (reply["read"], reply["unread"]) == (seqs[1], 1)
    await laptop.quiet()
    assert [(frame["read"], frame["unread"]) for frame in laptop.of("unread")] == [(seqs[1], 1)]
    assert phone.of("unread") == []
    await node.services.receipts.flush()
    await alice.quiet()
    assert receipts_of(alice, "bob")[-1] == (seqs[1], seqs[1])


async def test_reading_beyond_the_end_is_refused(node: Node) -> None:
    bob = await node.connect("bob")
    reply = await bob.ask("read", channel="c", seq=await node.head("c") + 1)
    assert (reply["code"], reply["field"], reply["bound"]) == ("position_ahead", "seq", await node.head("c"))


async def test_a_type_of_channel_without_receipts_tells_nobody(node: Node) -> None:
    await node.define(ChannelType(name="calm", features=ChannelFeatures(receipts=False)))
    await node.channel("calm", "alice", "bob", type="calm")
    alice, bob = await node.connect("alice"), await node.connect("bob")
    seq = (await node.send("calm")).seq
    await bob.quiet()
    await bob.ask("ack", positions={"calm": seq})
    await bob.ask("read", channel="calm", seq=seq)
    await node.services.receipts.flush()
    await alice.quiet()
    assert receipts_of(alice, "bob") == []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(moves=st.lists(st.tuples(st.sampled_from(["ack", "read", "flush"]), st.integers(0, 12)), max_size=20))
async def test_positions_only_move_forward(node: Node, moves: list[tuple[str, int]]) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    while await node.head("c") < 12:
        await node.send("c")
    for what, seq in moves:
        before = await position(node, "bob")
        if what == "ack":
            await bob.ask("ack", positions={"c": seq})
        elif what == "read":
            await bob.ask("read", channel="c", seq=seq)
        else:
            await node.services.receipts.flush()
        after = await position(node, "bob")
        assert after[0] >= before[0]
        assert after[1] >= before[1]
        assert after[0] >= after[1]
    await node.services.receipts.flush()
    await alice.quiet()
    told = receipts_of(alice, "bob")
    assert [delivered for delivered, _ in told] == sorted(delivered for delivered, _ in told)
    assert [read for _, read in told] == sorted(read for _, read in told)
    alice.gone()
    bob.gone()
