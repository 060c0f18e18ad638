"""The hub through a whole node: who gets what, once, in order, as the same bytes."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest

from tidings.server.bus.base import Published, Revoked, Signal
from tidings.server.errors import Refusal
from tidings.server.gateway import hub as hub_module
from tidings.server.gateway.session import State
from tidings.server.store.base import Tx
from tidings.wire.requests import MemberUpdate
from tidings.wire.resources import ChannelFeatures, ChannelType

from .world import PATIENCE, Node, RecordingPeer


async def test_live_events_reach_every_member_once_and_in_order(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    start = await node.head("c")
    for _ in range(5):
        await node.send("c")
    for peer in (alice, bob):
        await peer.quiet()
        assert peer.events("c") == list(range(start + 1, start + 6))


async def test_nobody_else_gets_them(node: Node) -> None:
    carol = await node.connect("carol")
    await node.send("c")
    await carol.quiet()
    assert carol.events("c") == []


async def test_an_event_is_encoded_once_and_the_same_bytes_go_to_everyone(node: Node) -> None:
    peers = [await node.connect("alice"), await node.connect("alice", "alice-2"), await node.connect("bob")]
    await node.send("c")
    for peer in peers:
        await peer.quiet()
    created = [[payload for payload in peer.payloads if b"message.created" in payload] for peer in peers]
    assert [len(payloads) for payloads in created] == [1, 1, 1]
    assert created[0][0] is created[1][0] is created[2][0]


async def test_a_repeated_announcement_is_dropped(node: Node) -> None:
    alice = await node.connect("alice")
    await node.send("c")
    await alice.quiet()
    [event] = alice.events("c")
    node.core.bus.publish(Published(await node.sid("c"), event, b'{"type":"twice","stream":"c","seq":1,"data":{}}'))
    await alice.quiet()
    assert alice.events("c") == [event]


async def test_a_lost_announcement_is_filled_from_the_log_before_what_follows(
    node: Node,
) -> None:
    alice = await node.connect("alice")
    start = await node.head("c")
    real = node.gateway.hub.notice

    def lossy(notice: Any) -> None:
        if not (isinstance(notice, Published) and notice.seq == start + 2):
            real(notice)

    with node.instead(lossy):
        for _ in range(4):
            await node.send("c")
        await alice.got("c", start + 4)
        await alice.quiet()
    assert alice.events("c") == [start + 1, start + 2, start + 3, start + 4]


async def test_what_grew_without_a_word_is_found_by_comparing_with_the_store(node: Node) -> None:
    alice = await node.connect("alice")
    start = await node.head("c")
    with node.deaf():
        await node.send("c")
    await alice.quiet()
    assert alice.events("c") == []
    await node.gateway.changed_elsewhere()
    await alice.got("c", start + 1)
    await node.send("c")
    await alice.got("c", start + 2)
    assert alice.events("c") == [start + 1, start + 2]


async def test_a_new_member_is_live_from_their_own_joining_on(node: Node) -> None:
    carol = await node.connect("carol")
    await node.send("c")
    before = await node.head("c")
    await node.add("c", "carol")
    await node.send("c")
    await carol.got("c", before + 2)
    assert carol.events("c") == [before + 1, before + 2]
    assert carol.of("member.added")[0]["data"]["user"] == "carol"
    assert [frame["data"]["channel"] for frame in carol.of("channel.joined")] == ["c"]


async def test_nothing_reaches_a_member_from_their_removal_on(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    await node.send("c")
    await bob.quiet()
    had = bob.events("c")
    await node.remove("c", "bob")
    await node.send("c")
    await bob.quiet()
    assert bob.events("c") == had
    assert [frame["data"]["channel"] for frame in bob.of("channel.left")] == ["c"]
    await alice.quiet()
    assert len(alice.events("c")) == len(had) + 2


async def test_nothing_reaches_a_member_whose_role_lost_the_right_to_read(node: Node) -> None:
    await node.define(ChannelType(name="ward", features=ChannelFeatures(), grants={"waiting": ["typing.send"]}))
    await node.channel("w", "alice", "bob", type="ward")
    bob = await node.connect("bob")
    await node.services.members.update(node.backend, "w", "bob", MemberUpdate(role="waiting"))
    await bob.quiet()
    had = bob.events("w")
    await node.send("w")
    await bob.quiet()
    assert bob.events("w") == had


async def test_a_right_to_read_that_is_lost_while_it_is_asked_for_is_asked_for_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.define(ChannelType(name="ward", features=ChannelFeatures(), grants={"waiting": ["typing.send"]}))
    await node.channel("w", "alice", "bob", type="ward")
    real = node.gateway.sync.handle
    asked = 0

    async def overtaken(actor: Any, name: str) -> Any:
        nonlocal asked
        handle = await real(actor, name)
        if name == "w":
            asked += 1
            if asked == 1:
                await node.services.members.update(node.backend, "w", "bob", MemberUpdate(role="waiting"))
        return handle

    monkeypatch.setattr(node.gateway.sync, "handle", overtaken)
    bob = await node.connect("bob")
    await bob.until(lambda: asked and not bob.behind)
    await node.send("w")
    await bob.quiet()
    assert bob.events("w") == []


async def test_a_member_who_may_not_read_is_never_live(node: Node) -> None:
    await node.define(ChannelType(name="ward", features=ChannelFeatures(), grants={"waiting": ["typing.send"]}))
    await node.channel("w", "alice", "bob", type="ward", bob="waiting")
    bob = await node.connect("bob")
    await node.send("w")
    await bob.quiet()
    assert bob.events("w") == []


async def test_a_deleted_channel_goes_silent_for_everyone(node: Node) -> None:
    alice = await node.connect("alice")
    await node.services.channels.delete(node.backend, "c")
    await alice.until(lambda: alice.of("channel.left"))
    assert "c" not in {stream.name for stream in alice.streams.values()}


async def test_a_sender_is_answered_before_their_own_event(node: Node) -> None:
    alice = await node.connect("alice")
    for n in range(3):
        ref = alice.say("message.send", channel="c", key=f"own-{n}", text="hi")
        await alice.until(partial(alice.reply, ref))
        await alice.quiet()
        kinds = [frame["type"] for frame in alice.frames if frame["type"] in ("message.sent", "message.created")]
        assert kinds == ["message.sent", "message.created"] * (n + 1)


async def test_commands_are_answered_in_the_order_they_were_sent(node: Node) -> None:
    alice = await node.connect("alice")
    refs = [
        alice.say("message.send", channel="c", key="o1", text="1"),
        alice.say("history", channel="c"),
        alice.say("message.send", channel="c", key="o2", text="2"),
        alice.say("ping"),
        alice.say("message.send", channel="c", key="o3", text="3"),
        alice.say("read", channel="c", seq=1),
    ]
    await alice.until(lambda: alice.reply(refs[-1]))
    sent = [frame["seq"] for frame in alice.frames if frame["type"] == "message.sent"]
    assert sent == sorted(sent)
    assert len(sent) == 3


@pytest.mark.parametrize("round", range(8))
async def test_sends_of_one_session_keep_their_order_while_the_members_change(node: Node, round: int) -> None:
    alice = await node.connect("alice")
    await alice.ask("message.send", channel="c", key="warm", text="-1")

    async def churn() -> None:
        # Others come and go, which costs alice nothing; her own role changes, so that her sends have to wait.
        members = node.services.members
        for _ in range(10):
            await node.add("c", "carol")
            await members.update(node.backend, "c", "alice", MemberUpdate(role="moderator"))
            await node.remove("c", "carol")
            await members.update(node.backend, "c", "alice", MemberUpdate(role="member"))

    changing = asyncio.create_task(churn())
    refs = []
    for n in range(60):
        refs.append(alice.say("message.send", channel="c", key=f"n{n}", text=str(n)))
        if n % 3 == round % 3:
            await asyncio.sleep(0)
        if n % 7 == round % 7:
            await asyncio.sleep(0.001)  # why: the pace of a loop that looks at a condition
    await changing
    await alice.until(lambda: all(alice.reply(ref) for ref in refs))
    await alice.quiet()
    texts = [int(frame["data"]["text"]) for frame in alice.of("message.created")]
    # Where members change faster than access can be read, a send is refused, to be tried again later.
    replies = [alice.reply(ref) for ref in refs]
    stored = [n for n, reply in enumerate(replies) if reply and reply["type"] == "message.sent"]
    assert {reply["code"] for reply in replies if reply and reply["type"] == "error"} <= {"unavailable"}
    assert texts == [-1, *stored]
    assert len(stored) > 40
    assert alice.session.in_flight == 0


async def test_a_send_that_has_to_wait_comes_after_those_on_their_way_to_the_store(node: Node) -> None:
    alice = await node.connect("alice")
    await alice.ask("message.send", channel="c", key="warm", text="warm")
    store = node.services.store
    reached, gates = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    async def hold(number: int) -> asyncio.Task[None]:
        """Keep the writer from going on, from here in its queue on."""

        async def unit(tx: Tx) -> None:
            reached[number].set()
            gates[number].wait(PATIENCE)

        waiting, queued = asyncio.create_task(store.run(unit)), store._queue.qsize()
        await alice.until(lambda: store._queue.qsize() > queued or reached[number].is_set())
        return waiting

    holding = [await hold(0)]
    assert await asyncio.to_thread(reached[0].wait, PATIENCE)
    changing = asyncio.create_task(
        node.services.members.update(node.backend, "c", "alice", MemberUpdate(role="moderator"))
    )
    await alice.until(store._queue.qsize)
    holding.append(await hold(1))
    # The change of her role is on its way; what is sent now was decided before it, and is to be decided again.
    gates[0].set()
    assert await asyncio.to_thread(reached[1].wait, PATIENCE)
    holding.append(await hold(2))
    first = alice.say("message.send", channel="c", key="first", text="first")
    gates[1].set()
    await changing
    assert await asyncio.to_thread(reached[2].wait, PATIENCE)
    second = alice.say("message.send", channel="c", key="second", text="second")
    await alice.until(lambda: alice._room is not None or store._queue.qsize())
    gates[2].set()
    await asyncio.gather(*holding)
    await alice.until(lambda: alice.reply(first) and alice.reply(second))
    await alice.quiet()
    assert [frame["data"]["text"] for frame in alice.of("message.created")] == ["warm", "first", "second"]


# ------------------------------------------------------------ slow peers


async def test_a_paused_peer_is_put_behind_and_catches_up_exactly(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    start = await node.head("c")
    await node.send("c")
    await bob.got("c", start + 1)
    bob.pause()
    held = len(bob.payloads)
    for _ in range(20):
        await node.send("c")
    await alice.got("c", start + 21)
    assert len(bob.payloads) == held
    assert bob.behind == {await node.sid("c"): start + 1}
    bob.resume()
    await bob.until(lambda: bob.of("synced"))
    await node.send("c")
    await bob.got("c", start + 22)
    assert bob.events("c") == list(range(start + 1, start + 23))
    assert bob.behind == {}


async def test_signals_skip_a_slow_peer(node: Node) -> None:
    bob = await node.connect("bob")
    bob.pause()
    node.core.bus.publish(Signal(bob.app, b'{"type":"typing"}', sid=await node.sid("c")))
    node.gateway.hub.flush()
    bob.resume()
    await bob.quiet()
    assert bob.of("typing") == []


async def test_a_signal_is_not_told_to_the_session_that_caused_it(node: Node) -> None:
    alice, other = await node.connect("alice"), await node.connect("alice", "alice-2")
    node.core.bus.publish(Signal(alice.app, b'{"type":"x"}', user="alice", skip_session=alice.id))
    await alice.quiet()
    await other.quiet()
    assert (len(alice.of("x")), len(other.of("x"))) == (0, 1)


# ------------------------------------------------------------ coming and going


async def test_a_device_that_connects_again_replaces_its_older_connection(node: Node) -> None:
    first = await node.connect("alice", "phone")
    second = await node.connect("alice", "phone")
    other = await node.connect("alice", "laptop")
    assert (first.closed_with, second.closed_with, other.closed_with) == (4505, None, None)
    assert first.of("error")[-1]["code"] == "replaced"
    had = first.payloads[:]
    await node.send("c")
    await second.quiet()
    assert first.payloads == had
    # The older one's end must not take the newer one's place away.
    first.gone()
    third = await node.connect("alice", "phone")
    assert (second.closed_with, third.closed_with) == (4505, None)


async def test_a_revoked_users_connections_end(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    node.clock.advance(1)
    await node.services.auth.revoke(node.backend, "alice")
    assert (alice.closed_with, bob.closed_with) == (4401, None)


async def test_a_token_revoked_while_its_connection_enters_ends_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await node.token("alice")
    node.clock.advance(1)
    real = node.gateway.sync.memberships

    async def overtaken(actor: Any) -> Any:
        await node.services.auth.revoke(node.backend, "alice")
        return await real(actor)

    monkeypatch.setattr(node.gateway.sync, "memberships", overtaken)
    peer = node.peer()
    peer.say("connect", token=token, device={"id": "d"})
    await peer.until(lambda: peer.closed_with is not None or peer.of("connected"))
    assert peer.closed_with == 4401
    assert peer.of("connected") == []


async def test_a_token_revoked_while_its_user_is_looked_up_lets_nobody_in(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await node.token("alice")
    node.clock.advance(1)
    auth = node.services.auth
    auth.forget_all()
    real = auth._load_user

    async def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(auth, "_load_user", real)
        found = await real(*args)
        await auth.revoke(node.backend, "alice")
        return found

    monkeypatch.setattr(auth, "_load_user", overtaken)
    peer = node.peer()
    peer.say("connect", token=token, device={"id": "d"})
    await peer.until(lambda: peer.closed_with is not None or peer.of("connected"))
    assert (peer.closed_with, peer.of("connected")) == (4401, [])
    assert peer.of("error")[0]["code"] == "token_revoked"


async def test_a_transport_that_ends_while_its_connection_enters_leaves_nothing_behind(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = node.gateway.sync.memberships
    peer = node.peer()

    async def overtaken(actor: Any) -> Any:
        entry = await real(actor)
        peer.gone()
        return entry

    monkeypatch.setattr(node.gateway.sync, "memberships", overtaken)
    peer.say("connect", token=await node.token("alice"), device={"id": "d"})
    async with asyncio.timeout(5):
        while len(node.gateway.tasks):
            await asyncio.sleep(0)
    assert peer.session.state is State.CLOSED
    assert (peer.app, "alice") not in node.gateway.hub.users
    assert node.gateway.hub.streams == {}
    assert node.gateway.presence._online == set()


async def test_a_closed_connection_leaves_only_what_its_user_listened_to_and_that_for_a_while(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    alice.gone()
    hub = node.gateway.hub
    assert (node.gateway.connections, set(hub.users)) == ({bob}, {(1, "alice"), (1, "bob")})
    bob.gone()
    assert (node.gateway.connections, node.gateway.by_address) == (set(), {})
    assert hub._kept == 4
    await node.channel("new", "alice")
    await node.remove("c", "bob")
    assert hub._kept == 4
    monkeypatch.setattr(hub_module, "KEPT_STREAMS_MAX", 3)
    hub.sweep()
    assert (set(hub.users), hub._kept) == ({(1, "bob")}, 1)
    monkeypatch.setattr(hub_module, "KEPT_SECONDS", 0.0)
    hub.sweep()
    assert (hub.users, hub.streams, hub.named, hub._idle, hub._kept) == ({}, {}, {}, {}, 0)


async def test_who_comes_back_hears_what_they_joined_meanwhile_and_not_what_they_left(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.channel("left", "alice", "bob")
    await node.channel("deleted", "alice", "bob")
    (await node.connect("alice")).gone()
    await node.channel("joined", "alice", "bob")
    await node.remove("left", "alice")
    await node.services.channels.delete(node.backend, "deleted")

    async def never(*args: Any) -> Any:
        raise AssertionError("the memberships are known")

    monkeypatch.setattr(node.gateway.sync, "memberships", never)
    alice = await node.connect("alice")
    assert sorted(stream.name for stream in alice.streams.values()) == ["@me", "c", "joined"]
    for name in ("c", "joined", "left"):
        await node.send(name)
    await alice.quiet()
    assert [len(alice.events(name)) for name in ("c", "joined", "left")] == [1, 1, 0]


async def test_connections_of_one_user_come_and_go_without_each_other(node: Node) -> None:
    phone = await node.connect("alice", "phone")
    laptop = await node.connect("alice", "laptop")
    await node.send("c")
    await laptop.quiet()
    phone.gone()
    await node.send("c")
    tablet = await node.connect("alice", "tablet")
    await node.send("c")
    for peer, count in ((phone, 1), (laptop, 3), (tablet, 1)):
        if peer is not phone:
            await peer.quiet()
        assert len(peer.events("c")) == count
    assert (phone.streams, phone.behind) == ({}, {})


async def test_a_membership_that_another_process_has_ended_is_not_kept(node: Node) -> None:
    phone, bob = await node.connect("alice", "phone"), await node.connect("bob")
    bob.gone()
    await node.unheard("DELETE FROM members WHERE user IN ('alice', 'bob')")
    await node.gateway.changed_elsewhere()
    alice, bob = await node.connect("alice"), await node.connect("bob")
    for peer in (phone, alice, bob):
        assert [stream.name for stream in peer.streams.values()] == ["@me"]
    await node.send("c")
    for peer in (phone, alice, bob):
        await peer.quiet()
        assert peer.events("c") == []


async def test_a_joining_that_was_not_announced_is_found_by_the_own_streams_head(node: Node) -> None:
    first = await node.connect("carol")
    mark = first.of("connected")[0]["mark"]
    first.gone()
    with node.deaf():
        await node.add("c", "carol")
    carol = await node.connect("carol", since=mark)
    moved = {entry["stream"]: entry["head"] for entry in carol.of("connected")[0]["moved"]}
    assert set(moved) == {"@me", "c"}
    await carol.ask("sync", positions={name: {"seq": head} for name, head in moved.items()})
    await node.send("c")
    await carol.got("c", moved["c"] + 1)


async def test_who_gets_the_right_to_read_back_hears_the_channel_when_they_come_back(node: Node) -> None:
    await node.define(ChannelType(name="ward", features=ChannelFeatures(), grants={"waiting": ["typing.send"]}))
    await node.channel("w", "alice", "bob", type="ward", bob="waiting")
    bob = await node.connect("bob")
    await bob.until(lambda: not bob.behind)
    await node.services.members.update(node.backend, "w", "bob", MemberUpdate(role="member"))
    await node.send("w")
    await bob.quiet()
    assert bob.events("w") == []
    bob.gone()
    bob = await node.connect("bob")
    await bob.until(lambda: not bob.behind)
    head = (await node.send("w")).seq
    await bob.got("w", head)
    assert bob.events("w") == [head]


async def test_draining_says_when_to_come_back_answers_what_was_accepted_then_closes(node: Node) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    ref = alice.say("message.send", channel="c", key="last", text="bye")
    await node.gateway.drain(5)
    assert alice.reply(ref) is not None
    assert (alice.closed_with, bob.closed_with) == (4000, 4000)
    for peer in (alice, bob):
        kinds = [frame["type"] for frame in peer.frames]
        assert kinds.index("going_away") < kinds.index("error")
        assert kinds[-1] == "error"
        assert peer.of("going_away")[0]["reconnect_in_ms"] == int(500 * node.config.reconnect_spread_seconds)
    refusal = node.gateway.admit("192.0.2.1")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "going_away"


async def test_a_connection_that_is_refused_says_why_and_closes_with_its_code(node: Node) -> None:
    peer = node.peer()
    peer.say("connect", token="nonsense", device={"id": "d"}, app=node.app_id)
    await peer.until(lambda: peer.closed_with is not None)
    assert peer.closed_with == 4501
    assert peer.of("error")[0]["code"] == "token_malformed"
    assert peer.session.in_flight == 0


def sessions(peer: RecordingPeer) -> int:
    return len(peer.gateway.connections)


async def test_a_revocation_of_one_device_leaves_the_others(node: Node) -> None:
    phone, laptop = await node.connect("alice", "phone"), await node.connect("alice", "laptop")
    node.core.bus.publish(Revoked(phone.app, "alice", "token_revoked", device="phone"))
    assert (phone.closed_with, laptop.closed_with) == (4401, None)
    assert sessions(laptop) == 1
