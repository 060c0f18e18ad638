"""Events reach the application once, in order, whatever the network and the server do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tidings.client import Client, ReceiptsSignal, following
from tidings.client.connection import State
from tidings.client.errors import ConnectionRefused
from tidings.client.events import ChannelJoined, ChannelLeft, HistoryReset, MessageCreated, UnknownEvent
from tidings.client.streams import Streams
from tidings.wire.resources import Receipt

from .conftest import client, take, until
from .fake import FakeServer


def seqs(events: list) -> list[int]:
    return [event.seq for event in events]


async def test_live_events_arrive_typed_and_in_order(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for text in ("a", "b", "c"):
            server.append("c1", text=text)
        got = await take(events, 3)
    match got[0]:
        case MessageCreated(channel="c1", seq=1, by="bob", message=message):
            assert message.text == "a"
        case _:
            pytest.fail(f"not a message: {got[0]}")
    assert seqs(got) == [1, 2, 3]


async def test_a_fresh_device_starts_now_or_from_the_beginning(server: FakeServer) -> None:
    for text in "abc":
        server.append("c1", text=text)
    async with client(server) as chat, client(server, device="tablet", start="all") as other:
        await chat.wait_connected(5)
        await other.wait_connected(5)
        server.append("c1", text="d")
        assert seqs(await take(chat.events(), 1)) == [4]
        assert seqs(await take(other.events(), 4)) == [1, 2, 3, 4]


async def test_a_fresh_device_is_told_of_what_it_wrote_before_it_was_connected(server: FakeServer) -> None:
    server.append("c1", text="before")
    async with client(server) as chat:
        # The heads tell of it before its event comes: the server reads them from its store.
        server.swallow = lambda event: True
        await chat.channel("c1").send("first words")
        server.swallow = lambda event: False
        server.append("c1", text="an answer")
        assert [event.message.text for event in await take(chat.events(), 2)] == ["first words", "an answer"]


async def test_duplicated_frames_are_dropped(server: FakeServer) -> None:
    server.repeat_events = 2
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for n in range(5):
            server.append("c1", text=str(n))
        assert seqs(await take(events, 5)) == [1, 2, 3, 4, 5]
        assert events.waiting == 0
        # Nor does a repetition count as taken.
        assert chat.position("c1") == 4


async def test_a_gap_is_filled_from_the_log(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.append("c1", text="1")
        server.swallow = lambda event: event["seq"] in (2, 3)
        for n in (2, 3):
            server.append("c1", text=str(n))
        server.swallow = lambda event: False
        server.append("c1", text="4")
        assert seqs(await take(events, 4)) == [1, 2, 3, 4]
        assert [c for c in server.commands if c["type"] == "sync"][-1]["positions"]["c1"]["seq"] == 1


async def test_a_stream_that_never_becomes_complete_costs_the_connection_not_the_order(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.swallow = lambda event: event["seq"] == 2
        for n in range(4):
            server.append("c1", text=str(n))
        assert seqs(await take(events, 1)) == [1]
        waiting = asyncio.ensure_future(anext(events))
        await until(lambda: len(server.connects) >= 2)
        assert not waiting.done()
        server.swallow = lambda event: False
        assert (await asyncio.wait_for(waiting, 5)).seq == 2
        assert seqs(await take(events, 2)) == [3, 4]


async def test_what_was_missed_during_an_outage_is_caught_up(server: FakeServer) -> None:
    sources = []
    async with client(server, observer=lambda seen: sources.append(seen.source)) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.append("c1", text="1")
        await take(events, 1)
        port = server.port
        await server.stop()
        for n in range(2, 50):
            server.append("c1", text=str(n))
        server.port = port
        await server.start()
        assert seqs(await take(events, 48)) == list(range(2, 50))
    assert sources[0] == "live"
    assert "catchup" in sources


async def test_channels_that_were_quiet_are_followed_from_the_head_at_connecting(server: FakeServer) -> None:
    server.append("quiet", text="before")
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.cut()
        server.append("quiet", text="while away")
        assert [event.message.text for event in await take(events, 1)] == ["while away"]


async def test_a_channel_joined_while_away_begins_where_the_user_joined(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        port = server.port
        await server.stop()
        for n in range(3):
            server.append("c9", text=f"before {n}")
        server.append("@me", "channel.joined", channel="c9", role="member", epoch=server.epoch, head=3)
        server.append("c9", text="welcome")
        server.port = port
        await server.start()
        joined, welcome = await take(events, 2)
        assert isinstance(joined, ChannelJoined)
        assert joined.channel == "c9"
        assert (welcome.channel, welcome.seq) == ("c9", 4)


async def test_a_position_moves_only_when_the_application_asks_for_the_next_event(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for n in range(3):
            server.append("c1", text=str(n))
        await take(events, 2)
        assert chat.position("c1") == 1
        events.taken()
        assert chat.position("c1") == 2


async def test_an_iterator_that_is_left_gives_back_what_was_not_taken(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for n in range(5):
            server.append("c1", text=str(n))
        async for event in events:
            if event.seq == 3:
                break
        del events
        assert seqs(await take(chat.events(), 3)) == [3, 4, 5]


async def test_leaving_a_with_block_takes_the_last_event(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        async with chat.events() as events:
            for n in range(3):
                server.append("c1", text=str(n))
            await take(events, 2)
        assert seqs(await take(chat.events(), 1)) == [3]


async def test_events_of_channels_nobody_iterates_wait_in_the_log(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        only = chat.channel("c1").events()
        for n in range(3):
            server.append("c2", text=str(n))
            server.append("c1", text=str(n))
        assert seqs(await take(only, 3)) == [1, 2, 3]
        assert {event.channel for event in await take(chat.events("c2"), 3)} == {"c2"}


async def test_the_own_stream_waits_for_the_application_and_not_for_the_client(server: FakeServer) -> None:
    def join(channel: str) -> None:
        server.append("@me", "channel.joined", channel=channel, role="member", epoch="e1", head=0)

    async with client(server) as chat:
        await chat.wait_connected(5)
        only = chat.channel("c1").events()
        join("c1")
        join("c2")
        server.append("@me", "channel.left", channel="c2", reason="left")
        join("c2")
        server.append("c1", text="welcome")
        # The client follows c1, which it knows of from an event that nobody has been shown yet.
        assert seqs(await take(only, 1)) == [1]
        await until(lambda: chat.position("c2") == 0)
        assert chat.position("@me") == 0
        shown = await take(events := chat.events("@me", "c2"), 4)
        assert [type(event) for event in shown] == [ChannelJoined, ChannelJoined, ChannelLeft, ChannelJoined]
        assert chat.position("@me") == 3
        events.leave()
        # What was given and not acknowledged comes to the next one, and so does what nobody was there for.
        join("c3")
        await until(lambda: chat.position("c3") == 0)
        assert seqs(await take(chat.events("@me"), 2)) == [4, 5]


async def test_own_events_are_shown_after_a_restart_and_change_nothing_twice(
    server: FakeServer, tmp_path: Path
) -> None:
    async with client(server, store=tmp_path / "a.db") as chat:
        await chat.wait_connected(5)
        server.append("@me", "channel.left", channel="c1", reason="left")
        server.append("@me", "channel.joined", channel="c1", role="member", epoch="e1", head=0)
        await until(lambda: chat.position("c1") == 0)
        for n in range(3):
            server.append("c1", text=str(n))
        await take(only := chat.channel("c1").events(), 3)
        only.taken()
    server.append("@me", "channel.joined", channel="c2", role="member", epoch="e1", head=0)
    server.append("c2", text="while away")
    async with client(server, store=tmp_path / "a.db") as chat:
        # Once more nobody iterates the own stream: the client alone learns of c2.
        assert seqs(await take(chat.channel("c2").events(), 1)) == [1]
        assert chat.position("@me") == 0
    async with client(server, store=tmp_path / "a.db") as chat:
        events = chat.events("@me", "c1")
        assert seqs(await take(events, 3)) == [1, 2, 3]
        # The departure is told, but it was long ago: c1 goes on where it was.
        server.append("c1", text="3")
        assert [(event.stream, event.seq) for event in await take(events, 1)] == [("c1", 4)]
        assert chat.position("c1") == 3


async def test_a_history_that_ended_while_nobody_iterated_is_told_to_who_comes_next(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        for stream in ("@me", "c1"):
            for n in range(5):
                if stream == "@me":
                    server.append(stream, "profile.updated", id="alice", name=str(n))
                else:
                    server.append(stream, text=str(n))
        events = chat.events()
        await take(events, 10)
        events.taken()
        events.leave()
        server.epoch = "e2"
        for stream in ("@me", "c1"):
            server.streams[stream] = server.streams[stream][:2]
            server.clock += 1
            server.changed[stream] = server.clock
        server.cut()
        await until(lambda: len(server.connects) == 2 and chat.state is State.CONNECTED)
        assert (chat.position("@me"), chat.position("c1")) == (5, 5)
        resets = await take(chat.events(), 2)
        assert {(type(event), event.stream, event.head) for event in resets} == {
            (HistoryReset, "@me", 2),
            (HistoryReset, "c1", 2),
        }


async def test_two_iterators_both_get_everything_and_the_slower_one_sets_the_position(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        fast, slow = chat.events(), chat.events()
        for n in range(3):
            server.append("c1", text=str(n))
        await take(fast, 3)
        fast.taken()
        assert chat.position("c1") == 0
        await take(slow, 3)
        slow.taken()
        assert chat.position("c1") == 3


async def test_a_slow_consumer_stops_the_reading_and_loses_nothing(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events(queue_size=10)
        for n in range(3000):
            server.append("c1", text="x" * 2000)
            if n % 100 == 0:
                await asyncio.sleep(0)
        await until(lambda: server.paused)
        assert events.waiting <= 200
        assert seqs(await take(events, 3000, 20)) == list(range(1, 3001))


async def test_a_consumer_that_sends_while_its_queue_is_full_is_sent_each_event_once(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events("c1", queue_size=4)
        server.append("c1", text="the first")
        await until(lambda: chat._following.streams.get("c1") and chat._following.streams.get("c1").epoch)
        server.sessions[0].events_put.clear()
        for n in range(199):
            server.append("c1", text=str(n))
        got = []
        async with asyncio.timeout(20):
            async for event in events:
                got.append(event.seq)
                if event.seq == 200:
                    break
                await chat.channel("c2").send(f"echo {event.seq}")
        assert got == list(range(1, 201))
        assert server.sessions[0].events_put["c1"] == 199


async def test_while_a_command_waits_the_server_holds_back_what_the_application_has_no_room_for(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "HOLD_BYTES", 20_000)
    releases = 0

    def refuse(command: dict) -> tuple[str, str] | None:
        nonlocal releases
        releases += command["type"] == "hold" and not command["on"]
        return ("rate_limited", "later") if releases == 1 and command["type"] == "hold" else None

    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events("c1", queue_size=10)
        server.append("c1", text="the first")
        await take(events, 1)
        await until(lambda: chat._following.streams.get("c1").epoch == "e1")
        server.sessions[0].events_put.clear()
        server.lose_replies = 1
        await chat.channel("c2").send("whose answer gets lost", wait=False)
        await until(lambda: server.texts("c2"))
        for _ in range(100):
            server.append("c1", text="x" * 1000)
        await until(lambda: server.sessions[0].stood_at is not None)
        server.refuse = refuse
        for _ in range(900):
            server.append("c1", text="x" * 1000)
        # A reply comes all the same, and what was under way before the hold is all there is to keep.
        assert (await chat.channel("c1").page(limit=1)).head == 1001
        assert events.waiting == 100
        assert seqs(await take(events, 1000, 20)) == list(range(2, 1002))
        assert releases >= 2
        assert server.sessions[0].events_put["c1"] == 1000


async def test_what_is_beyond_any_room_is_asked_for_again_when_there_is_some_and_not_before(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "HOLD_BYTES", 20_000)
    monkeypatch.setattr(following, "KEPT_BYTES_MAX", 50_000)
    # A server that goes on all the same.
    server.refuse = lambda command: ("invalid", "never") if command["type"] == "hold" else None
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events("c1", queue_size=10)
        server.append("c1", text="the first")
        await take(events, 1)
        await until(lambda: chat._following.streams.get("c1").epoch == "e1")
        server.lose_replies = 1
        await chat.channel("c2").send("whose answer gets lost", wait=False)
        await until(lambda: server.texts("c2"))
        before = len(server.commands)
        for n in range(300):
            server.append("c1", text="x" * 1000)
            if n % 50 == 0:
                await chat.channel("c1").page(limit=1)
        assert 20 < events.waiting < 60
        assert not [c for c in server.commands[before:] if c["type"] == "sync"]
        assert seqs(await take(events, 300, 20)) == list(range(2, 302))
        asked = [c["positions"]["c1"]["seq"] for c in server.commands[before:] if c["type"] == "sync"]
        # Each brought as much as is kept.
        assert len(asked) <= 300 * 1000 // 50_000 + 1
        assert asked == sorted(set(asked))


async def test_a_new_epoch_is_told_and_the_stream_starts_over(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for n in range(5):
            server.append("c1", text=str(n))
        await take(events, 5)
        await until(lambda: chat._following.streams.get("c1").epoch == "e1")
        server.epoch = "e2"
        server.streams["c1"] = server.streams["c1"][:2]
        server.clock += 1
        server.changed["c1"] = server.clock
        server.cut()
        (reset,) = await take(events, 1)
        assert isinstance(reset, HistoryReset)
        assert (reset.stream, reset.reason, reset.epoch, reset.head) == ("c1", "epoch_changed", "e2", 2)
        await until(lambda: chat.state is State.CONNECTED)
        server.append("c1", text="after")
        assert seqs(await take(events, 1)) == [3]


async def test_events_of_unknown_types_keep_their_place(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.append("c1", text="1")
        server.append("c1", "poll.created", question="?")
        server.append("c1", text="3")
        got = await take(events, 3)
        assert isinstance(got[1], UnknownEvent)
        assert (got[1].type, got[1].data) == ("poll.created", {"question": "?"})
        assert seqs(got) == [1, 2, 3]


async def test_acknowledgements_are_coalesced_and_never_ahead_of_the_application(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        for n in range(20):
            server.append("c1", text=str(n))
        await take(events, 11)
        await until(lambda: any(c["type"] == "ack" for c in server.commands))
        acks = [c for c in server.commands if c["type"] == "ack"]
        assert acks[-1]["positions"] == {"c1": 10}
        assert len(acks) == 1


async def test_callbacks_get_events_and_signals(server: FakeServer) -> None:
    heard: list[str] = []

    async def on_message(event: MessageCreated) -> None:
        heard.append(event.message.text)
        raise RuntimeError("a callback of the application fails")

    async with client(server) as chat:
        chat.on(MessageCreated, on_message)
        await chat.wait_connected(5)
        server.append("c1", text="a")
        server.append("c1", text="b")
        await until(lambda: heard == ["a", "b"])


async def test_iterators_end_with_the_client_and_raise_when_it_was_refused(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        server.sessions[0].drop(4505, "replaced")
        with pytest.raises(ConnectionRefused) as refused:
            await waiting
        assert refused.value.code == "replaced"
    async with client(server) as chat:
        events = chat.events()
        await chat.wait_connected(5)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


def test_the_positions_rule() -> None:
    stream = Streams("now").adopt("c1", "e1", 5)
    assert [stream.judge(seq) for seq in (4, 5, 6, 7)] == ["duplicate", "duplicate", "apply", "gap"]
    stream.asked = True
    assert [stream.judge(seq) for seq in (5, 6, 9)] == ["duplicate", "apply", "ignore"]


async def test_positions_of_members_only_move_forward_whichever_server_tells_of_them() -> None:
    device = Client("http://127.0.0.1:1", token="t", device="d")
    told: list[Any] = []
    device._on_signal = told.append  # type: ignore[method-assign]
    for delivered, read in ((24, 24), (22, 22), (25, 23), (26, 24)):
        receipts = [Receipt(user="bob", delivered=delivered, read=read)]
        device._on_receipts(ReceiptsSignal(channel="c", receipts=receipts))
    assert [(one.receipts[0].delivered, one.receipts[0].read) for one in told] == [(24, 24), (25, 0), (26, 24)]
