"""The SDK against a whole server: one process, real sockets, a bad network in between, and kills."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import pytest_asyncio

from tests import postgres
from tidings.client import (
    ChannelJoined,
    ChannelLeft,
    ConnectionRefused,
    MessageCreated,
    MessageDeleted,
    MessageUpdated,
    PresenceSignal,
    ReactionAdded,
    ReactionRemoved,
    ReceiptsSignal,
    Refused,
    State,
    SyncClient,
    SyncRest,
    TypingSignal,
    UnreadSignal,
    following,
)
from tidings.testing.chaos import ChaosProxy
from tidings.testing.process import ServerProcess
from tidings.wire.commands import Command, Hold

from .conftest import take, until
from .real import ENVIRONMENT, Place, UpgradeBlocker, key_of, texts_until


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    environment = ENVIRONMENT | await postgres.server_environment()
    async with ServerProcess(tmp_path_factory.mktemp("real") / "data", environment=environment) as server:
        yield Place(server, await key_of(server))


async def test_a_message_arrives_everywhere_at_the_same_place(place: Place) -> None:
    async with place.ward() as ward, await ward.client(ward.alice) as alice, await ward.client(ward.bob) as bob:
        await alice.wait_connected(5)
        await bob.wait_connected(5)
        assert (alice.user, alice.transport) == (ward.alice, "websocket")
        heard_a, heard_b = alice.events(), bob.events(ward.channel)
        sent = await alice.channel(ward.channel).send("Good morning", mentions=[ward.bob], custom={"n": 1})
        for heard in (heard_a, heard_b):
            (event,) = await take(heard, 1)
            match event:
                case MessageCreated(channel=ward.channel, seq=sent.seq, by=ward.alice, message=message):
                    assert (message.id, message.text, message.custom) == (sent.id, "Good morning", {"n": 1})
                case _:
                    pytest.fail(f"not the message: {event}")


async def test_a_key_is_one_message_for_ever(place: Place) -> None:
    async with place.ward() as ward, await ward.client(ward.alice) as alice:
        channel = alice.channel(ward.channel)
        first = await channel.send("once", key="k1", timeout=5)
        again = await channel.send("once", key="k1", timeout=5)
        assert (again.id, again.seq, again.duplicate) == (first.id, first.seq, True)
        with pytest.raises(Refused) as refused:
            await channel.send("something else", key="k1", timeout=5)
        assert refused.value.code == "key_reused"
        assert await ward.texts() == ["once"]


async def test_a_cut_connection_catches_up_exactly(place: Place) -> None:
    seen: list[Any] = []
    async with place.ward() as ward, ChaosProxy(place.server.port, seed=1) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        async with (
            await ward.client(ward.alice) as alice,
            await ward.client(ward.bob, url=url, observer=lambda one: seen.append(one.source)) as bob,
        ):
            await alice.wait_connected(5)
            await bob.wait_connected(5)
            begun = await ward.head()
            heard = bob.events(ward.channel)

            async def write() -> None:
                for n in range(400):
                    await alice.channel(ward.channel).send(str(n))
                    if n % 80 == 40:
                        proxy.cut()
                await alice.channel(ward.channel).send("end")

            writing = asyncio.ensure_future(write())
            got = await texts_until(heard, "end")
            await writing
            assert [seq for seq, _ in got] == list(range(begun + 1, begun + 402))
            assert [text for _, text in got] == [*map(str, range(400)), "end"]
            assert proxy.stats.cuts >= 3
            assert {"live", "catchup"} <= set(seen)


async def test_replies_that_get_lost_leave_one_message_each(place: Place) -> None:
    async with place.ward() as ward, ChaosProxy(place.server.port, seed=2) as proxy:
        async with await ward.client(ward.alice, url=f"http://127.0.0.1:{proxy.port}") as alice:
            await alice.wait_connected(5)
            proxy.set(drop_reply_share=0.3)
            waiting = [await alice.channel(ward.channel).send(str(n), wait=False) for n in range(30)]
            await until(lambda: proxy.stats.replies_dropped >= 4, 20)
            proxy.heal()
            await alice.flush(20)
            assert any(one.result is not None and one.result.duplicate for one in waiting)
        assert await ward.texts() == [str(n) for n in range(30)]


async def test_a_server_killed_in_the_middle_of_sends_gets_each_once(place: Place, tmp_path: Path) -> None:
    async with place.ward() as ward:
        async with (
            await ward.client(ward.alice, store=tmp_path / "alice.db") as alice,
            await ward.client(ward.bob) as bob,
        ):
            await alice.wait_connected(5)
            await bob.wait_connected(5)
            heard = bob.events(ward.channel)
            waiting = []
            for n in range(200):
                waiting.append(await alice.channel(ward.channel).send(str(n), wait=False))
                if n == 60:
                    await until(lambda: sum(one.state == "sent" for one in waiting) > 20)
                    place.server.kill9()
            sent_before = sum(one.state == "sent" for one in waiting)
            assert sent_before < 200
            await place.server.restart()
            await alice.flush(20)
            assert [one.state for one in waiting] == ["sent"] * 200
            got = await texts_until(heard, "199")
            assert [text for _, text in got] == [str(n) for n in range(200)]
            seqs = [seq for seq, _ in got]
            assert seqs == list(range(seqs[0], seqs[0] + 200))
        assert await ward.texts() == [str(n) for n in range(200)]


async def test_a_restarted_client_goes_on_where_the_application_was(place: Place, tmp_path: Path) -> None:
    async with place.ward() as ward:
        begun = await ward.head()
        backend = ward.rest.as_user(ward.alice).messages
        async with await ward.client(ward.bob, store=tmp_path / "bob.db") as bob:
            await bob.wait_connected(5)
            for n in range(5):
                await backend.send(ward.channel, str(n))
            await take(bob.events(ward.channel), 3)
        for n in range(5, 8):
            await backend.send(ward.channel, str(n))
        async with await ward.client(ward.bob, store=tmp_path / "bob.db") as bob:
            # The third was given but not acknowledged.
            got = await take(bob.events(ward.channel), 6)
        assert [event.seq for event in got] == list(range(begun + 3, begun + 9))


@pytest.mark.parametrize("transport", ["websocket", "http"])
async def test_a_bot_that_answers_while_it_catches_up_receives_each_event_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, transport: Literal["websocket", "http"]
) -> None:
    # A queue of 10 and a hold beyond 50 kB make of 200 messages of 4 kB what 100,000 are otherwise.
    monkeypatch.setattr(following, "HOLD_BYTES", 50_000)
    async with place.ward() as ward:
        backend = ward.rest.as_user(ward.alice).messages
        for n in range(200):
            await backend.send(ward.channel, f"{n} " + "x" * 4000)
        bob = await ward.client(ward.bob, start="all", transport=transport)
        handle, received, held = bob._connection.on_frame, Counter[int](), 0

        def counted(data: bytes) -> None:
            if data.startswith(b'{"type":"message.created"'):
                received[msgspec.json.decode(data)["seq"]] += 1
            handle(data)

        transmit = bob._connection.transmit

        def watched(command: Command, *rest: Any) -> int | None:
            nonlocal held
            held += isinstance(command, Hold)
            return transmit(command, *rest)

        monkeypatch.setattr(bob._connection, "on_frame", counted)
        monkeypatch.setattr(bob._connection, "transmit", watched)
        seqs: list[int] = []
        async with bob:
            async with asyncio.timeout(30):
                async for event in bob.events(ward.channel, queue_size=10):
                    if isinstance(event, MessageCreated) and event.by == ward.alice:
                        seqs.append(event.seq)
                        if len(seqs) % 20 == 1:
                            await bob.channel(ward.channel).send(f"answer to {event.seq}")
                        if len(seqs) == 200:
                            break
        assert seqs == list(range(seqs[0], seqs[0] + 200))
        assert set(received.values()) == {1}
        assert held >= 2


async def test_channels_joined_and_left_while_away_are_told(place: Place) -> None:
    async with (
        place.ward(start=3) as ward,
        ChaosProxy(place.server.port) as proxy,
        await ward.client(ward.bob, url=f"http://127.0.0.1:{proxy.port}") as bob,
    ):
        await bob.wait_connected(5)
        heard = bob.events()
        await proxy.refuse_connections()
        proxy.cut()
        await until(lambda: bob.state is not State.CONNECTED)
        other = await ward.rest.channels.create(f"other-{ward.channel}", members=[ward.alice])
        await ward.rest.as_user(ward.alice).messages.send(other.id, "before Bob")
        await ward.rest.members.add(other.id, [ward.bob])
        sent = await ward.rest.as_user(ward.alice).messages.send(other.id, "welcome")
        await ward.rest.members.remove(ward.channel, ward.bob)
        secret = await ward.rest.as_user(ward.alice).messages.send(ward.channel, "not for Bob")
        await proxy.accept_connections()
        got = []
        async with asyncio.timeout(10):
            while not any(isinstance(e, ChannelLeft) for e in got) or not any(
                isinstance(e, MessageCreated) for e in got
            ):
                got.append(await anext(heard))
        assert [e.channel for e in got if isinstance(e, ChannelJoined)] == [other.id]
        assert [e.channel for e in got if isinstance(e, ChannelLeft)] == [ward.channel]
        messages = [e for e in got if isinstance(e, MessageCreated)]
        assert [(e.channel, e.seq, e.message.text) for e in messages] == [(other.id, sent.seq, "welcome")]
        assert bob.position(ward.channel) is None
        # Back in: the stream goes on from there, without what came in between.
        await ward.rest.members.add(ward.channel, [ward.bob])
        again = await ward.rest.as_user(ward.alice).messages.send(ward.channel, "welcome back")
        back = await texts_until(heard, "welcome back")
        assert back == [(again.seq, "welcome back")]
        assert again.seq > secret.seq


async def test_a_channel_joined_while_connected_is_live_at_once(place: Place) -> None:
    async with place.ward() as ward, await ward.client(ward.bob) as bob:
        await bob.wait_connected(5)
        heard = bob.events()
        other = await ward.rest.channels.create(f"live-{ward.channel}", members=[ward.alice, ward.bob])
        sent = await ward.rest.as_user(ward.alice).messages.send(other.id, "hello")
        got = []
        async with asyncio.timeout(5):
            while not got or not isinstance(got[-1], MessageCreated):
                got.append(await anext(heard))
        assert any(isinstance(e, ChannelJoined) and e.channel == other.id for e in got)
        assert (got[-1].channel, got[-1].seq) == (other.id, sent.seq)


async def test_a_token_is_renewed_on_the_living_connection(place: Place) -> None:
    async with place.ward() as ward:
        asked = 0

        async def provide() -> str:
            nonlocal asked
            asked += 1
            return (await ward.rest.users.token(ward.bob, ttl_seconds=2)).token

        async with await ward.client(ward.bob, token_provider=provide) as bob:
            await bob.wait_connected(5)
            assert bob.session is not None
            session, states = bob.session.session, bob.states()
            await anext(states)
            # Past the end of the first token and the second.
            await until(lambda: asked >= 4, 20)
            assert bob.session.session == session
            assert bob.state is State.CONNECTED


async def test_a_connection_that_outlives_its_token_comes_back_with_a_fresh_one(place: Place) -> None:
    async with place.ward() as ward:
        asked = 0

        async def provide() -> str:
            nonlocal asked
            asked += 1
            if asked in (2, 3):
                raise RuntimeError("the token service is down")
            return (await ward.rest.users.token(ward.bob, ttl_seconds=1 if asked == 1 else 3600)).token

        app = await ward.rest.app.get()
        async with await ward.client(ward.bob, token_provider=provide) as bob:
            await bob.wait_connected(5)
            heard = bob.events(ward.channel)
            assert bob.session is not None
            first = bob.session.session
            sent = await ward.rest.as_user(ward.alice).messages.send(ward.channel, "before")
            await until(
                lambda: bob.session is not None and bob.session.session != first,
                app.settings.token_leeway_seconds + 10,
            )
            await ward.rest.as_user(ward.alice).messages.send(ward.channel, "after")
            got = await texts_until(heard, "after")
            assert [seq for seq, _ in got] == [sent.seq, sent.seq + 1]


async def test_revoked_tokens_and_bad_ones_end_the_client_with_the_reason(place: Place) -> None:
    async with place.ward() as ward:
        async with await ward.client(ward.bob) as bob:
            await bob.wait_connected(5)
            await ward.rest.users.deactivate(ward.bob)
            await until(lambda: bob.state is State.CLOSED, 10)
            assert isinstance(bob.error, ConnectionRefused)
            assert bob.error.code == "user_deactivated"
        async with await ward.client(ward.alice, token_provider=None, token="not.a.token") as alice:
            with pytest.raises(ConnectionRefused):
                await alice.wait_connected(5)


async def test_history_pages_in_both_directions(place: Place) -> None:
    async with place.ward() as ward:
        backend = ward.rest.as_user(ward.alice).messages
        await asyncio.gather(*(backend.send(ward.channel, str(n)) for n in range(250)))
        async with await ward.client(ward.bob) as bob:
            channel = bob.channel(ward.channel)
            newest = [message.seq async for message in channel.history()]
            oldest = [message.seq async for message in channel.history(newest_first=False)]
            assert newest == oldest[::-1]
            assert len(newest) == 250
            page = await channel.page(around=newest[100], limit=5)
            assert len(page.messages) == 5
            assert newest[100] in [message.seq for message in page.messages]
            assert (page.has_before, page.has_after) == (True, True)
            assert page.head == await ward.head()


async def test_receipts_and_unread_counts_reach_the_others(place: Place) -> None:
    async with (
        place.ward() as ward,
        await ward.client(ward.alice) as alice,
        await ward.client(ward.bob) as bob,
        await ward.client(ward.bob, device="bob-laptop") as laptop,
    ):
        for one in (alice, bob, laptop):
            await one.wait_connected(5)
        receipts, unread = alice.signals(ReceiptsSignal), laptop.signals(UnreadSignal)
        heard = bob.events(ward.channel)
        sent = [await alice.channel(ward.channel).send(str(n)) for n in range(3)]
        await take(heard, 3)
        heard.taken()

        async def wait_receipt(kind: str, seq: int) -> None:
            async with asyncio.timeout(10):
                async for signal in receipts:
                    if any(r.user == ward.bob and getattr(r, kind) >= seq for r in signal.receipts):
                        return

        await wait_receipt("delivered", sent[2].seq)
        reply = await bob.channel(ward.channel).read(sent[1].seq)
        assert (reply.unread, reply.mentions) == (1, 0)
        await wait_receipt("read", sent[1].seq)
        assert (await take(unread, 1))[0].unread == 1
        (head,) = [one for one in await bob.heads() if one.stream == ward.channel]
        assert (head.unread, head.read) == (1, sent[1].seq)
        await bob.channel(ward.channel).mark_unread(sent[0].seq)
        assert (await take(unread, 1))[0].marked_unread_from == sent[0].seq
        with pytest.raises(Refused):
            await bob.channel(ward.channel).read(sent[2].seq + 1000)


async def test_typing_and_presence_are_signalled(place: Place) -> None:
    async with place.ward() as ward, await ward.client(ward.alice) as alice:
        await alice.wait_connected(5)
        presence, typing = alice.signals(PresenceSignal), alice.signals(TypingSignal)
        assert [one.status for one in await alice.watch_presence([ward.bob])] == ["offline"]
        async with await ward.client(ward.bob) as bob:
            await bob.wait_connected(5)
            assert [(s.user, s.status) for s in await take(presence, 1)] == [(ward.bob, "online")]
            bob.channel(ward.channel).typing()
            assert [(s.user, s.on) for s in await take(typing, 1)] == [(ward.bob, True)]
            bob.channel(ward.channel).typing(False)
            assert [(s.user, s.on) for s in await take(typing, 1)] == [(ward.bob, False)]
            await bob.set_presence("invisible")
            assert [s.status for s in await take(presence, 1)] == ["offline"]
            await bob.set_presence("online")
            assert [s.status for s in await take(presence, 1)] == ["online"]
        assert [s.status for s in await take(presence, 1, 10)] == ["offline"]


async def test_edits_deletions_and_reactions_are_events(place: Place) -> None:
    async with place.ward() as ward, await ward.client(ward.alice) as alice, await ward.client(ward.bob) as bob:
        await alice.wait_connected(5)
        await bob.wait_connected(5)
        heard = bob.events(ward.channel)
        channel = alice.channel(ward.channel)
        sent = await channel.send("helo", custom={"draft": True})
        assert await channel.edit(sent.id, "hello") == sent.seq + 1
        assert await channel.react(sent.id, "👍") == sent.seq + 2
        assert await channel.react(sent.id, "👍") is None
        assert await channel.unreact(sent.id, "👍") == sent.seq + 3
        assert await channel.unreact(sent.id, "👍") is None
        assert await channel.delete(sent.id) == sent.seq + 4
        got = await take(heard, 5)
        assert [type(e) for e in got] == [
            MessageCreated,
            MessageUpdated,
            ReactionAdded,
            ReactionRemoved,
            MessageDeleted,
        ]
        assert (got[1].message.text, got[1].message.custom) == ("hello", {"draft": True})
        assert got[2].reaction.emoji == "👍"
        with pytest.raises(Refused):
            await bob.channel(ward.channel).edit(sent.id, "not mine")


# ---------------------------------------------------------------- HTTP instead of a socket


async def test_http_carries_the_same_conversation(place: Place) -> None:
    async with (
        place.ward() as ward,
        await ward.client(ward.alice) as alice,
        await ward.client(ward.bob, transport="http") as bob,
    ):
        await alice.wait_connected(5)
        await bob.wait_connected(5)
        assert bob.transport == "http"
        heard = bob.events(ward.channel)
        sent = [await alice.channel(ward.channel).send(str(n)) for n in range(100)]
        sent.append(await bob.channel(ward.channel).send("and back", timeout=5))
        got = await texts_until(heard, "and back")
        assert [seq for seq, _ in got] == [one.seq for one in sent]
        assert (await bob.channel(ward.channel).read(sent[-1].seq)).unread == 0
        assert len((await bob.channel(ward.channel).page(limit=10)).messages) == 10


async def test_http_is_taken_where_upgrades_are_refused_and_catches_up(place: Place) -> None:
    async with (
        place.ward() as ward,
        UpgradeBlocker(place.server.port) as blocker,
        await ward.client(ward.bob, url=blocker.url) as bob,
    ):
        await bob.wait_connected(10)
        assert (bob.transport, blocker.blocked) == ("http", 1)
        heard = bob.events(ward.channel)
        backend = ward.rest.as_user(ward.alice).messages
        begun = (await backend.send(ward.channel, "first")).seq
        await take(heard, 1)
        assert bob.session is not None
        before = bob.session.session
        # The session is lost, and what comes meanwhile is caught up by the next one.
        assert bob._connection._transport is not None
        bob._connection._transport.abort()
        for n in range(50):
            await backend.send(ward.channel, str(n))
        got = await texts_until(heard, "49")
        assert [seq for seq, _ in got] == list(range(begun + 1, begun + 51))
        await until(lambda: bob.state is State.CONNECTED)
        assert bob.session.session != before
        assert blocker.blocked == 1


async def test_an_http_session_survives_a_restart_of_the_server(place: Place) -> None:
    async with place.ward() as ward, await ward.client(ward.bob, transport="http") as bob:
        await bob.wait_connected(5)
        heard = bob.events(ward.channel)
        first = await bob.channel(ward.channel).send("before", timeout=5)
        place.server.kill9()
        waiting = await bob.channel(ward.channel).send("meanwhile", wait=False)
        await place.server.restart()
        sent = await waiting.sent(40)
        assert sent.seq == first.seq + 1
        assert [seq for seq, _ in await texts_until(heard, "meanwhile")] == [first.seq, sent.seq]


# ---------------------------------------------------------------- without await


async def test_the_blocking_clients_do_the_same(place: Place) -> None:
    def script(token: str, channel: str) -> None:
        with (
            SyncRest(place.url, api_key=place.api_key) as rest,
            SyncClient(place.url, token=token, device="script") as chat,
        ):
            chat.wait_connected(5)
            events = chat.events(channel, timeout=10)
            sent = chat.channel(channel).send("from a script")
            assert events.next(5).seq == sent.seq
            events.taken()
            assert chat.position(channel) == sent.seq
            assert [message.id for message in rest.messages.history(channel)] == [sent.id]
            assert [member.user for member in rest.members.all(channel)]
            assert rest.as_user(str(chat.user)).receipts.read(channel, sent.seq).unread == 0
            with pytest.raises(Refused):
                rest.channels.get("no-such-channel")

    async with place.ward() as ward:
        token = (await ward.rest.users.token(ward.alice)).token
        await asyncio.to_thread(script, token, ward.channel)
