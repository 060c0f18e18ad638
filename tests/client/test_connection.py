"""The connection comes back in every state, and stays away when it is told to."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.client.backoff import BACKOFF_BASE_SECONDS, BACKOFF_CAP_SECONDS, FullJitter
from tidings.client.connection import State
from tidings.client.errors import Closed, ConnectionRefused, OutcomeUnknown, Timeout

from .conftest import client, take, until
from .fake import FakeServer


@given(st.integers(), st.integers(0, 200))
def test_full_jitter_is_uniform_below_a_doubling_bound(seed: int, attempt: int) -> None:
    jitter = FullJitter(random=random.Random(seed))
    jitter.attempt = attempt
    bound = min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2**attempt)
    assert jitter.bound() == bound
    assert 0 <= jitter.next() <= bound
    assert jitter.attempt == attempt + 1


def test_full_jitter_spreads_a_crowd_over_the_whole_interval() -> None:
    source = random.Random(7)
    delays = []
    for _ in range(4000):
        jitter = FullJitter(base=1, cap=8, random=source)
        jitter.attempt = 10
        delays.append(jitter.next())
    assert abs(sum(delays) / len(delays) - 4) < 0.15
    for eighth in range(8):
        assert 400 < sum(eighth <= delay < eighth + 1 for delay in delays) < 600


async def test_the_states_can_be_followed(server: FakeServer) -> None:
    async with client(server) as chat:
        states = chat.states()
        assert [(await anext(states)).state for _ in range(2)] == [State.CONNECTING, State.CONNECTED]
        server.cut()
        async with asyncio.timeout(5):
            seen = []
            async for change in states:
                seen.append(change.state)
                if change.state is State.CONNECTED:
                    break
        assert set(seen) == {State.WAITING, State.CONNECTING, State.CONNECTED}
    assert chat.state is State.CLOSED


async def test_a_server_that_is_not_there_yet_is_waited_for(server: FakeServer) -> None:
    await server.stop()
    async with client(server) as chat:
        await until(lambda: chat.state is State.WAITING)
        await server.start()
        await chat.wait_connected(5)


@pytest.mark.parametrize("code", [1006, 4000, 4001, 4002, 4408, 4429])
async def test_an_end_during_connecting_brings_the_client_back(server: FakeServer, code: int) -> None:
    server.close_next = [(code if code > 1006 else 1001, "")] * 3
    async with client(server) as chat:
        await chat.wait_connected(5)
    assert len(server.connects) == 4


async def test_a_break_while_catching_up_brings_the_client_back(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        events = chat.events()
        server.append("c1", text="1")
        await take(events, 1)
        breaks = iter(range(3))

        def cut(command: dict[str, Any]) -> None:
            if command["type"] == "sync" and next(breaks, None) is not None:
                server.append("c1", text="and another", publish=False)
                server.cut()

        server.refuse = cut
        server.cut()
        server.append("c1", text="2")
        got = await take(events, 2)
        assert [event.seq for event in got] == [2, 3]
        await until(lambda: len(server.connects) >= 5)


@pytest.mark.parametrize(
    ("code", "reason"), [(4501, "token_signature"), (4503, "user_deactivated"), (4505, "replaced")]
)
async def test_the_client_does_not_come_back_from_the_4500s(server: FakeServer, code: int, reason: str) -> None:
    server.close_next = [(code, reason)]
    async with client(server) as chat:
        with pytest.raises(ConnectionRefused) as refused:
            await chat.wait_connected(5)
        assert (refused.value.code, refused.value.close_code) == (reason, code)
        assert chat.state is State.CLOSED
        with pytest.raises(ConnectionRefused):
            await chat.channel("c1").send("too late")
    assert len(server.connects) == 1


async def test_going_away_tells_when_to_come_back(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        states = chat.states()
        await anext(states)
        server.sessions[0].put({"type": "going_away", "reason": "restart", "reconnect_in_ms": 300})
        # As a server's drain ends: a planned restart is nothing to warn of.
        server.sessions[0].put(
            {"type": "error", "ref": None, "code": "going_away", "retry": "later", "detail": "Soon."}
        )
        server.sessions[0].drop(4000, "going_away")
        async for change in states:
            if change.retry_in is not None:
                assert 0.3 <= change.retry_in <= 0.81
                break
        await chat.wait_connected(5)
    assert "nobody waits for" not in caplog.text


async def test_an_expired_token_is_replaced_at_once(server: FakeServer) -> None:
    tokens = iter(range(10))

    async def provide() -> str:
        return f"user:alice:{next(tokens)}"

    async with client(server, token_provider=provide) as chat:
        await chat.wait_connected(5)
        states = chat.states()
        await anext(states)
        server.sessions[0].drop(4401, "token_expired")
        async for change in states:
            if change.retry_in is not None:
                assert change.retry_in == 0
                break
        await chat.wait_connected(5)
    assert [connect["token"] for connect in server.connects] == ["user:alice:0", "user:alice:1"]


async def test_an_expired_token_without_a_provider_is_the_end(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        server.sessions[0].drop(4401, "token_expired")
        await until(lambda: chat.state is State.CLOSED)
        assert isinstance(chat.error, ConnectionRefused)
        assert chat.error.code == "token_expired"


async def test_tokens_that_are_refused_again_and_again_are_asked_for_with_pauses(server: FakeServer) -> None:
    asked = 0

    async def provide() -> str:
        nonlocal asked
        asked += 1
        return "user:alice"

    server.close_next = [(4401, "token_expired")] * 5
    async with client(server, token_provider=provide) as chat:
        delays = []
        async for change in chat.states():
            if change.retry_in is not None:
                delays.append(change.retry_in)
            if change.state is State.CONNECTED:
                break
    assert asked == 6
    assert delays[0] == 0
    assert all(delay > 0 for delay in delays[1:])


async def test_a_token_is_refreshed_on_the_living_connection(server: FakeServer) -> None:
    server.expires_in = 1.5
    tokens = iter(range(100))

    async def provide() -> str:
        return f"user:alice:{next(tokens)}"

    async with client(server, token_provider=provide) as chat:
        await chat.wait_connected(5)
        await until(lambda: any(c["type"] == "authenticate" for c in server.commands))
        assert next(c for c in server.commands if c["type"] == "authenticate")["token"] == "user:alice:1"
        assert len(server.connects) == 1


async def test_a_provider_that_fails_is_asked_again(server: FakeServer) -> None:
    failures = iter(range(2))

    async def provide() -> str:
        if next(failures, None) is not None:
            raise RuntimeError("the token service is down")
        return "user:alice"

    async with client(server, token_provider=provide) as chat:
        await chat.wait_connected(5)


async def test_a_server_that_falls_silent_is_left_after_two_heartbeats(server: FakeServer) -> None:
    server.heartbeat = 1
    server.silent = True
    async with client(server) as chat:
        await chat.wait_connected(5)
        await until(lambda: len(server.connects) == 2)
        server.silent = False
        await chat.wait_connected(5)


async def test_heartbeats_are_sent_and_their_mark_is_given_at_the_next_connect(server: FakeServer) -> None:
    server.heartbeat = 1
    async with client(server) as chat:
        await chat.wait_connected(5)
        server.append("c1", text="1")
        server.append("c1", text="2")
        await until(lambda: any(c["type"] == "ping" for c in server.commands))
        await until(lambda: chat._following.mark == "2")
        server.cut()
        await until(lambda: len(server.connects) == 2)
        assert server.connects[1]["since"] == "2"


async def test_commands_that_may_be_repeated_survive_a_break_and_others_say_so(server: FakeServer) -> None:
    async with client(server) as chat:
        await chat.wait_connected(5)
        breaks = iter([1])

        def cut(command: dict[str, Any]) -> None:
            if command["type"] in ("reaction.add", "message.edit") and next(breaks, None):
                server.cut()

        server.refuse = cut
        assert await chat.channel("c1").react("m_1", "👍") == 1
        await chat.wait_connected(5)
        breaks = iter([1])
        with pytest.raises(OutcomeUnknown):
            await chat.channel("c1").edit("m_1", "new text")


async def test_waiting_for_a_connection_can_be_bounded(server: FakeServer) -> None:
    await server.stop()
    async with client(server) as chat:
        with pytest.raises(Timeout):
            await chat.wait_connected(0.05)
        with pytest.raises(Timeout):
            await chat.channel("c1").read(3, timeout=0.05)
        waiting = asyncio.ensure_future(chat.wait_connected())
        await asyncio.sleep(0)
    with pytest.raises(Closed):
        await waiting


async def test_typing_is_throttled(server: FakeServer) -> None:
    time = 100.0
    async with client(server, clock=lambda: time) as chat:
        await chat.wait_connected(5)
        channel = chat.channel("c1")
        for _ in range(10):
            channel.typing()
        time += 3.1
        channel.typing()
        channel.typing(False)
        channel.typing(False)
        await chat.channel("c1").read(1)
        assert [c["on"] for c in server.commands if c["type"] == "typing"] == [True, True, False]


async def test_history_pages_backwards_to_the_beginning(server: FakeServer) -> None:
    for n in range(450):
        server.append("c1", text=str(n))
    async with client(server) as chat:
        seqs = [message.seq async for message in chat.channel("c1").history()]
    assert seqs == list(range(450, 0, -1))


# ---------------------------------------------------------------- HTTP


async def test_http_is_taken_when_the_socket_is_blocked(http_server: FakeServer) -> None:
    async with client(http_server) as chat:
        await chat.wait_connected(5)
        assert chat.transport == "http"
        events = chat.events()
        sent = await chat.channel("c1").send("over HTTP")
        (event,) = await take(events, 1)
        assert (event.seq, event.message.text) == (sent.seq, "over HTTP")


async def test_http_can_be_asked_for_and_catches_up_after_its_session_ends(http_server: FakeServer) -> None:
    async with client(http_server, transport="http") as chat:
        await chat.wait_connected(5)
        events = chat.events()
        http_server.append("c1", text="1")
        await take(events, 1)
        http_server.cut()
        for n in range(2, 30):
            http_server.append("c1", text=str(n))
        assert [event.seq for event in await take(events, 28)] == list(range(2, 30))
        assert len(http_server.connects) == 2


async def test_a_blocked_socket_is_an_error_when_only_the_socket_is_wanted(http_server: FakeServer) -> None:
    async with client(http_server, transport="websocket") as chat:
        await until(lambda: chat.state is State.WAITING)
        assert "upgrade" in chat._connection.change.reason
