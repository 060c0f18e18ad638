"""Catching up: what a client missed, exactly, and the switch to live without a gap or a double."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tidings.server.errors import NotFound, StoreUnavailable
from tidings.server.gateway import gateway as gateway_module
from tidings.server.gateway import hub as hub_module
from tidings.wire import limits

from .world import Node, RecordingPeer


async def caught_up(peer: RecordingPeer, stream: str) -> None:
    await peer.until(lambda: [frame for frame in peer.of("synced") if frame["stream"] == stream])


async def test_without_since_everything_is_live_from_now_on(node: Node) -> None:
    await node.send("c")
    start = await node.head("c")
    alice = await node.connect("alice")
    await node.send("c")
    await alice.quiet()
    assert alice.events("c") == [start + 1]
    assert alice.of("connected")[0].get("moved", []) == []


async def test_a_position_is_resumed_exactly_then_live(node: Node) -> None:
    start = await node.head("c")
    for _ in range(7):
        await node.send("c")
    alice = await node.connect("alice", positions={"c": {"seq": start + 2}})
    await caught_up(alice, "c")
    await node.send("c")
    await alice.quiet()
    assert alice.events("c") == list(range(start + 3, start + 9))


async def test_more_than_a_page_is_resumed_in_order(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "CATCH_UP_PAGE", 3)
    for _ in range(20):
        await node.send("c")
    alice = await node.connect("alice", positions={"c": {"seq": 0}})
    await caught_up(alice, "c")
    assert alice.events("c") == list(range(1, await node.head("c") + 1))


async def test_sync_replays_after_the_position_then_says_synced(node: Node) -> None:
    alice = await node.connect("alice")
    head = await node.head("c")
    reply = await alice.ask("sync", positions={"c": {"seq": 0}})
    assert reply["type"] == "syncing"
    assert reply["streams"] == ["c"]
    await caught_up(alice, "c")
    kinds = [frame["type"] for frame in alice.frames]
    assert kinds.index("syncing") < kinds.index("synced")
    assert alice.events("c") == list(range(1, head + 1))
    assert alice.of("synced")[0]["seq"] == head


async def test_an_up_to_date_position_is_synced_at_once(node: Node) -> None:
    alice = await node.connect("alice")
    await alice.ask("sync", positions={"c": {"seq": await node.head("c")}})
    await caught_up(alice, "c")
    assert alice.events("c") == []


async def test_a_commit_whose_announcement_is_under_way_is_neither_lost_nor_doubled(node: Node) -> None:
    for _ in range(5):
        sending = [asyncio.create_task(node.send("c")) for _ in range(3)]
        alice = await node.connect("alice", positions={"c": {"seq": 0}})
        await asyncio.gather(*sending)
        await caught_up(alice, "c")
        await alice.quiet()
        assert alice.events("c") == list(range(1, await node.head("c") + 1))
        alice.gone()


# ------------------------------------------------------------ since


async def test_who_wants_no_events_for_now_gets_replies_and_later_goes_on_exactly_there(node: Node) -> None:
    alice = await node.connect("alice")
    await node.send("c")
    await alice.quiet()
    (last,) = alice.events("c")
    assert (await alice.ask("hold"))["type"] == "done"
    for _ in range(5):
        await node.send("c")
    await alice.quiet()
    assert len((await alice.ask("history", channel="c"))["messages"]) == 6
    # A transport that was full meanwhile changes nothing about it, nor does a position that is named.
    alice.pause()
    alice.resume()
    await alice.until(lambda: alice._catching is None)
    await alice.ask("sync", positions={"c": {"seq": last + 2}})
    await alice.until(lambda: alice._catching is None)
    await alice.quiet()
    assert alice.events("c") == [last]
    # No mark vouches for what was not sent.
    node.clock.advance(60)
    assert (await alice.ask("ping"))["mark"] == alice.of("pong")[0]["mark"]
    await alice.ask("hold", on=False)
    await caught_up(alice, "c")
    assert (await alice.ask("ping"))["mark"] > alice.of("pong")[0]["mark"]
    await node.send("c")
    await alice.quiet()
    assert alice.events("c") == [last, last + 3, last + 4, last + 5, last + 6]


async def test_streams_that_moved_since_are_held_until_the_client_names_them(node: Node) -> None:
    await node.channel("quiet", "alice")
    mark = (await node.connect("alice")).of("connected")[0]["mark"]
    node.clock.advance(60)
    later = (await node.connect("alice", "other")).of("connected")[0]["mark"]
    assert later > mark
    await node.send("c")
    head = await node.head("c")
    alice = await node.connect("alice", since=later)
    moved = {entry["stream"]: entry for entry in alice.of("connected")[0]["moved"]}
    assert list(moved) == ["c"]
    assert (moved["c"]["head"], moved["c"]["unread"]) == (head, 1)
    await node.send("c")
    await node.send("quiet")
    await alice.quiet()
    assert alice.events("c") == []
    assert len(alice.events("quiet")) == 1
    await alice.ask("sync", positions={"c": {"seq": head}})
    await caught_up(alice, "c")
    assert alice.events("c") == [head + 1]


async def test_a_mark_does_not_vouch_for_what_is_still_on_its_way(node: Node) -> None:
    node.clock.advance(60)
    mark = (await node.connect("alice", "other")).of("connected")[0]["mark"]
    await node.send("c")
    head = await node.head("c")
    node.clock.advance(60)
    alice = await node.connect("alice", since=mark)
    # Whoever loses the line now has to be told of "c" again.
    assert alice.of("connected")[0]["mark"] == mark
    assert (await alice.ask("heads", since=mark))["mark"] == mark
    assert (await alice.ask("ping"))["mark"] == mark
    await alice.ask("sync", positions={"c": {"seq": head - 1}})
    await caught_up(alice, "c")
    assert (await alice.ask("ping"))["mark"] > mark
    # With positions and no mark there is nothing that vouches for anything.
    node.clock.advance(60)
    alice = await node.connect("alice", positions={"c": {"seq": head - 1}})
    everything = alice.of("connected")[0]["mark"]
    again = await node.connect("alice", since=everything)
    assert "c" in [entry["stream"] for entry in again.of("connected")[0]["moved"]]


async def test_a_stream_of_positions_is_not_listed_as_moved(node: Node) -> None:
    mark = (await node.connect("bob")).of("connected")[0]["mark"]
    await node.send("c")
    alice = await node.connect("alice", since=mark, positions={"c": {"seq": 1}})
    assert "c" not in [entry["stream"] for entry in alice.of("connected")[0]["moved"]]
    await caught_up(alice, "c")
    assert alice.events("c") == list(range(2, await node.head("c") + 1))


async def test_a_mark_is_conservative(node: Node) -> None:
    await node.send("c")
    mark = (await node.connect("alice")).of("connected")[0]["mark"]
    again = await node.connect("alice", since=mark)
    assert "c" in [entry["stream"] for entry in again.of("connected")[0]["moved"]]


async def test_an_unreadable_mark_is_refused_and_the_connection_closed(node: Node) -> None:
    alice = await node.connect("alice", since="tomorrow")
    error = alice.of("error")[0]
    assert (error["code"], error["field"]) == ("cursor_invalid", "since")
    assert alice.closed_with is not None
    assert node.gateway.hub.users == {}


async def test_more_streams_than_fit_come_by_page_and_stay_held(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SYNC_STREAMS_MAX", 4)
    mark = (await node.connect("bob")).of("connected")[0]["mark"]
    names = [await node.channel(f"n{n}", "alice") for n in range(9)]
    alice = await node.connect("alice", since=mark)
    connected = alice.of("connected")[0]
    found = [entry["stream"] for entry in connected["moved"]]
    assert len(found) == 4, "the first page comes at once"
    cursor, pages = connected["more"], 1
    while cursor is not None:
        page = await alice.ask("heads", since=mark, cursor=cursor, limit=4)
        assert page["type"] == "heads", page
        found += [entry["stream"] for entry in page["moved"]]
        cursor, pages = page.get("more"), pages + 1
    assert pages >= 3
    assert sorted(found) == sorted([*names, "c", "@me"])
    assert len(alice.behind) == len(found), "those on later pages are held like the first"
    await node.send("n3")
    await alice.quiet()
    assert alice.events("n3") == []
    await alice.ask("sync", positions={"n3": {"seq": await node.head("n3") - 1}})
    await caught_up(alice, "n3")
    assert alice.events("n3") == [await node.head("n3")]


@pytest.mark.parametrize("comes_back", [False, True])
async def test_what_moves_while_a_client_connects_is_told_or_comes_by_itself(
    node: Node, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """Before the snapshot of what moved it is in it, and held; after it, it comes."""
    for name in ("before", "after"):
        await node.channel(name, "alice")
    bob = await node.connect("bob")
    node.clock.advance(60)
    if comes_back:
        (await node.connect("alice")).gone()
    await bob.ask("ping")
    mark = (await bob.ask("ping"))["mark"]
    memberships, moved = node.gateway.sync.memberships, node.gateway.sync.moved

    async def slow_memberships(*args: Any) -> Any:
        found = await memberships(*args)
        await node.send("before")
        return found

    async def slow_moved(*args: Any) -> Any:
        if comes_back:
            await node.send("before")
        found = await moved(*args)
        await node.send("before")
        await node.send("after")
        return found

    monkeypatch.setattr(node.gateway.sync, "memberships", slow_memberships)
    monkeypatch.setattr(node.gateway.sync, "moved", slow_moved)
    start = {name: await node.head(name) for name in ("before", "after")}
    alice = await node.connect("alice", since=mark)
    told = {entry["stream"]: entry["head"] for entry in alice.of("connected")[0]["moved"]}
    assert told == {"before": start["before"] + 1}
    await alice.got("after", start["after"] + 1)
    await alice.ask("sync", positions={"before": {"seq": start["before"]}})
    await node.send("before")
    await node.send("after")
    await alice.got("before", start["before"] + 3)
    await alice.got("after", start["after"] + 2)
    assert alice.events("before") == [start["before"] + number for number in (1, 2, 3)]
    assert alice.events("after") == [start["after"] + number for number in (1, 2)]


# ------------------------------------------------------------ refusals


async def test_positions_that_do_not_fit_are_refused_each_with_its_reason(node: Node) -> None:
    alice = await node.connect("alice")
    head = await node.head("c")
    for position, code in (
        ({"seq": head + 1}, "position_ahead"),
        ({"seq": 0, "epoch": "another"}, "epoch_changed"),
    ):
        reply = await alice.ask("sync", positions={"c": position})
        assert reply["streams"] == []
        refused = reply["refused"]["c"]
        assert (refused["code"], refused["head"]) == (code, head)
        assert refused["epoch"]
    reply = await alice.ask("sync", positions={"nowhere": {"seq": 0}})
    assert reply["refused"]["nowhere"]["code"] == "not_found"


async def test_a_position_that_has_not_come_through_this_node_is_compared_with_the_store(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    start = await node.head("c")
    with node.deaf():
        await node.send("c")
    reply = await alice.ask("sync", positions={"c": {"seq": start + 1}})
    assert reply["streams"] == ["c"]
    await node.send("c")
    for peer, first in ((alice, start + 2), (bob, start + 1)):
        await peer.got("c", start + 2)
        assert peer.events("c") == list(range(first, start + 3))


async def test_a_move_that_was_never_announced_is_read_from_the_log_in_a_while(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ANNOUNCED_SECONDS", 0.01)
    bob = await node.connect("bob")
    mark = (await bob.ask("ping"))["mark"]
    start = await node.head("c")
    with node.deaf():
        await node.send("c")
    alice = await node.connect("alice", since=mark)
    await alice.ask("sync", positions={"c": {"seq": start}})
    for peer in (alice, bob):
        await peer.got("c", start + 1)
        assert peer.events("c") == [start + 1]


async def test_a_foreign_stream_looks_like_none(node: Node) -> None:
    carol = await node.connect("carol")
    reply = await carol.ask("sync", positions={"c": {"seq": 0}, "never": {"seq": 0}})
    assert {refused["code"] for refused in reply["refused"].values()} == {"not_found"}
    await carol.quiet()
    assert carol.events("c") == []


async def test_refusals_at_connect_come_right_after_connected(node: Node) -> None:
    alice = await node.connect("alice", positions={"c": {"seq": 999}, "never": {"seq": 0}})
    await alice.until(lambda: alice.of("syncing"))
    refused = alice.of("syncing")[0]["refused"]
    assert {name: entry["code"] for name, entry in refused.items()} == {"c": "position_ahead", "never": "not_found"}


async def test_a_refused_stream_can_be_synced_again_from_a_position_that_fits(node: Node) -> None:
    alice = await node.connect("alice")
    await alice.ask("sync", positions={"c": {"seq": 0, "epoch": "another"}})
    head = await node.head("c")
    await alice.ask("sync", positions={"c": {"seq": head}})
    await node.send("c")
    await alice.got("c", head + 1)
    assert alice.events("c") == [head + 1]


# ------------------------------------------------------------ faults


async def test_a_store_that_fails_for_a_while_delays_catching_up_and_loses_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await node.send("c")
    monkeypatch.setattr(gateway_module, "CATCH_UP_RETRY_SECONDS", 0.01)
    read, catch_up = node.gateway.sync.read, node.gateway.catch_up
    failures: list[int] = []
    begun: list[Any] = []

    async def failing(*args: Any) -> Any:
        if len(failures) < 4:
            failures.append(1)
            raise StoreUnavailable("the disk is full")
        return await read(*args)

    async def counted(peer: Any) -> None:
        begun.append(peer)
        await catch_up(peer)

    monkeypatch.setattr(node.gateway.sync, "read", failing)
    monkeypatch.setattr(node.gateway, "catch_up", counted)
    alice = await node.connect("alice", positions={"c": {"seq": 0}})
    await caught_up(alice, "c")
    assert alice.events("c") == list(range(1, await node.head("c") + 1))
    # It waits and goes on: dying and beginning anew at once would be a storm just when the store is in trouble.
    assert begun == [alice]


async def test_a_stream_that_is_gone_is_left_and_never_live(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = await node.connect("alice")

    async def gone(*args: Any) -> Any:
        raise NotFound("stream", field="stream")

    monkeypatch.setattr(node.gateway.sync, "read", gone)
    await alice.ask("sync", positions={"c": {"seq": 0}})
    await alice.until(lambda: not alice.behind)
    await node.send("c")
    await alice.quiet()
    assert alice.events("c") == []


async def test_a_member_removed_while_a_page_is_read_gets_nothing_of_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await node.send("c")
    real = node.gateway.sync.read

    async def overtaken(*args: Any) -> Any:
        page = await real(*args)
        await node.remove("c", "bob")
        return page

    monkeypatch.setattr(node.gateway.sync, "read", overtaken)
    bob = await node.connect("bob", positions={"c": {"seq": 0}})
    await bob.until(lambda: bob.of("channel.left"))
    await bob.quiet()
    assert bob.events("c") == []
    assert bob.of("synced") == []


# ------------------------------------------------------------ interleavings


async def test_joining_and_leaving_while_the_connection_enters(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.channel("joined", "bob")
    real = node.gateway.sync.memberships

    async def overtaken(actor: Any) -> Any:
        entry = await real(actor)
        await node.remove("c", "alice")
        await node.send("c")
        await node.add("joined", "alice")
        await node.send("joined")
        return entry

    monkeypatch.setattr(node.gateway.sync, "memberships", overtaken)
    alice = await node.connect("alice")
    head = await node.head("joined")
    await alice.got("joined", head)
    await alice.quiet()
    assert alice.events("joined") == [head - 1, head]
    assert alice.events("c") == []


async def test_a_channel_left_and_joined_again_while_the_connection_enters(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = node.gateway.sync.memberships

    async def overtaken(actor: Any) -> Any:
        entry = await real(actor)
        await node.remove("c", "alice")
        await node.add("c", "alice")
        return entry

    monkeypatch.setattr(node.gateway.sync, "memberships", overtaken)
    alice = await node.connect("alice")
    await node.send("c")
    head = await node.head("c")
    await alice.got("c", head)
    assert alice.events("c")[-1] == head


@pytest.mark.parametrize("seed", range(12))
async def test_no_gap_and_no_double_under_any_interleaving(
    node: Node, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing, pausing, holding, resuming and going on in a seeded order with a step of the loop in between."""
    monkeypatch.setattr(gateway_module, "CATCH_UP_PAGE", 2)
    rng = random.Random(seed)
    real = node.gateway.sync.read

    async def slow(*args: Any) -> Any:
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        page = await real(*args)
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        return page

    monkeypatch.setattr(node.gateway.sync, "read", slow)
    for _ in range(3):
        await node.send("c")
    head = await node.head("c")
    alice = await node.connect("alice", positions={"c": {"seq": head - 2}})
    bob = await node.connect("bob")
    sending: list[asyncio.Task[Any]] = []
    for _ in range(60):
        step = rng.random()
        if step < 0.5:
            sending.append(asyncio.create_task(node.send("c")))
        elif step < 0.6:
            alice.pause()
        elif step < 0.75:
            alice.resume()
        elif step < 0.8:
            bob.pause()
        elif step < 0.85:
            bob.resume()
        elif step < 0.88:
            bob.say("hold", on=rng.random() < 0.5)
        elif step < 0.9 and alice.events("c") and not alice.paused:
            # The client lost what it had after some point and says so.
            await alice.quiet()
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            await asyncio.sleep(0.001)  # why: the pace of a loop that looks at a condition
    await asyncio.gather(*sending)
    alice.resume()
    bob.resume()
    bob.say("hold", on=False)
    end = await node.head("c")
    for peer, start in ((alice, head - 1), (bob, head + 1)):
        await peer.got("c", end)
        await peer.quiet()
        assert peer.events("c") == list(range(start, end + 1))
        assert peer.behind == {}


@pytest.mark.parametrize("seed", range(6))
async def test_a_client_by_the_rules_has_everything_once_whatever_it_asks_for(
    node: Node, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking again in the middle of everything: by the position rule nothing is missing in the end."""
    monkeypatch.setattr(gateway_module, "CATCH_UP_PAGE", 2)
    rng = random.Random(seed)
    alice = await node.connect("alice", positions={"c": {"seq": 0}})
    sending: list[asyncio.Task[Any]] = []
    for _ in range(25):
        sending.append(asyncio.create_task(node.send("c")))
        if rng.random() < 0.3:
            alice.say("sync", positions={"c": {"seq": max([0, *alice.events("c")])}})
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            await asyncio.sleep(0.002)  # why: the pace of a loop that looks at a condition
    await asyncio.gather(*sending)
    end = await node.head("c")
    await alice.until(lambda: not alice.behind)
    await alice.quiet()
    position = 0
    for seq in alice.events("c"):
        assert seq <= position + 1, "a gap"
        position = max(position, seq)
    assert position == end


@pytest.mark.parametrize("seed", range(8))
async def test_who_comes_and_goes_while_members_change_has_everything_that_is_theirs_once(
    node: Node, seed: int
) -> None:
    """A client by the rules: it keeps positions, names what moved, and starts a channel where it joined."""
    rng = random.Random(seed)
    names = [await node.channel(f"r{number}", "alice", "bob") for number in range(3)]
    member = dict.fromkeys(names, True)
    position = {name: await node.head(name) for name in names}
    mark = (await node.connect("bob")).of("connected")[0]["mark"]
    node.clock.advance(60)
    peer: RecordingPeer | None = None
    taken = 0
    sending: list[asyncio.Task[Any]] = []

    def take(peer: RecordingPeer) -> None:
        nonlocal taken
        frames = peer.frames
        for frame in frames[taken:]:
            name, seq = frame.get("stream"), frame.get("seq")
            if name in position and "data" in frame:
                assert seq <= position[name] + 1, (name, seq, position[name])
                position[name] = max(position[name], seq)
        taken = len(frames)

    async def come() -> RecordingPeer:
        peer = await node.connect("alice", since=mark)
        moved = {entry["stream"]: entry["head"] for entry in peer.of("connected")[0].get("moved", [])}
        if moved:
            await peer.ask("sync", positions={name: {"seq": position.get(name, at)} for name, at in moved.items()})
        return peer

    async def settle(peer: RecordingPeer) -> None:
        await asyncio.gather(*sending)
        sending.clear()
        await peer.until(lambda: not peer.behind)
        await peer.quiet()
        take(peer)

    for _ in range(40):
        step, name = rng.random(), rng.choice(names)
        if step < 0.5:
            sending.append(asyncio.create_task(node.send(name)))
        elif step < 0.65:
            if peer is not None:
                await settle(peer)
            change = node.remove(name, "alice") if member[name] else node.add(name, "alice")
            await change
            member[name] = not member[name]
            if not member[name]:
                assert peer is None or name not in {stream.name for stream in peer.streams.values()}
            else:
                # What came before the joining is not asked for.
                position[name] = max(position[name], await node.head(name) - 1)
        elif peer is None:
            peer, taken = await come(), 0
        elif step < 0.8:
            await settle(peer)
            node.clock.advance(20)
            mark = (await peer.ask("ping"))["mark"]
        else:
            take(peer)
            peer.gone()
            peer = None
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
    if peer is None:
        peer, taken = await come(), 0
    await settle(peer)
    for name in names:
        if member[name]:
            assert position[name] == await node.head(name)
