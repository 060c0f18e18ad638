"""The session without a socket: numbered frames that can be asked for again, for their own user only."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from tidings.server.domain.limits import Limiter, Rate
from tidings.server.errors import Refusal
from tidings.server.gateway.http import COMMANDS_MAX, IDLE_SECONDS, HttpConnection, http_routes
from tidings.server.rest import create_rest_app
from tidings.server.services.auth import Auth

from .world import Node, open_node


class Door:
    """The node's HTTP door and one user's session behind it."""

    def __init__(self, node: Node, http: httpx.AsyncClient) -> None:
        self.node = node
        self.http = http
        self.refs = itertools.count(1)

    async def headers(self, user: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {await self.node.token(user)}"}

    async def open(self, user: str, device: str = "web", **fields: Any) -> Client:
        headers = await self.headers(user)
        answer = await self.http.post(
            "/v1/realtime", headers=headers, json={"type": "connect", "device": {"id": device}, **fields}
        )
        assert answer.status_code == 200, answer.text
        return Client(self, headers, answer.json())

    def connection(self, session: str) -> HttpConnection:
        return self.node.gateway.http_sessions[session]


class Client:
    def __init__(self, door: Door, headers: dict[str, str], opened: dict[str, Any]) -> None:
        self.door, self.headers, self.opened = door, headers, opened
        self.session: str = opened["session"]
        self.path = f"/v1/realtime/{self.session}"

    async def say(self, *commands: dict[str, Any], one: bool = False) -> httpx.Response:
        body: Any = commands[0] if one else list(commands)
        return await self.door.http.post(f"{self.path}/commands", headers=self.headers, json=body)

    async def poll(self, after: int = 0, wait: float = 0) -> dict[str, Any]:
        answer = await self.poll_raw(after, wait)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def poll_raw(self, after: int = 0, wait: float = 0) -> httpx.Response:
        return await self.door.http.get(
            f"{self.path}/poll", headers=self.headers, params={"after": after, "wait": wait}
        )

    async def settled(self) -> None:
        """What was announced until now has been numbered."""
        await self.say({"type": "ping", "ref": 9_000 + next(self.door.refs)}, one=True)
        self.door.node.gateway.hub.flush()


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with open_node(tmp_path) as node:
        await node.users("alice", "bob", "carol")
        await node.channel("c", "alice", "bob")
        rest = create_rest_app(
            node.core.services,
            config=node.config,
            metrics=node.core.metrics,
            limiter=Limiter(Rate(1_000_000, 1_000_000)),
            asyncapi=lambda: b"{}",
            draining=lambda: node.gateway.draining,
            route_handlers=http_routes(node.gateway),
        )
        transport = httpx.ASGITransport(app=cast(Any, rest))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield Door(node, http)


async def test_opening_answers_with_connected(door: Door) -> None:
    alice = await door.open("alice")
    [connected] = alice.opened["frames"]
    assert (connected["type"], connected["user"], connected["session"]) == ("connected", "alice", alice.session)


async def test_frames_are_numbered_from_one_and_come_as_on_a_socket(door: Door) -> None:
    alice = await door.open("alice")
    for text in ("one", "two"):
        await door.node.send("c", text)
    await alice.settled()
    answer = await alice.poll()
    assert [frame["n"] for frame in answer["frames"]] == list(range(1, len(answer["frames"]) + 1))
    texts = [frame["frame"]["data"]["text"] for frame in answer["frames"] if "data" in frame["frame"]]
    assert texts == ["one", "two"]
    assert answer["next"] == answer["frames"][-1]["n"]


async def test_a_poll_whose_answer_was_lost_is_repeated_exactly(door: Door) -> None:
    alice = await door.open("alice")
    await door.node.send("c")
    await alice.settled()
    first = await alice.poll()
    assert await alice.poll() == first
    await door.node.send("c")
    await alice.settled()
    again = await alice.poll()
    assert again["frames"][: len(first["frames"])] == first["frames"]
    assert len(again["frames"]) > len(first["frames"])


async def test_what_was_acknowledged_is_not_sent_again_and_cannot_be_asked_for(door: Door) -> None:
    alice = await door.open("alice")
    await door.node.send("c")
    await alice.settled()
    first = await alice.poll()
    assert await alice.poll(first["next"]) == {"frames": [], "next": first["next"]}
    # All of it is gone now: to begin again would be a gap that nobody notices.
    gone = await alice.poll_raw(0)
    assert (gone.status_code, gone.json()["code"]) == (404, "session_unknown")
    await door.node.send("c")
    await alice.settled()
    assert (await alice.poll_raw(0)).json()["code"] == "session_unknown"
    assert (await alice.poll(first["next"]))["frames"][0]["n"] == first["next"] + 1


async def test_acknowledging_more_than_was_sent_is_refused(door: Door) -> None:
    alice = await door.open("alice")
    answer = await alice.poll_raw(5)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "position_ahead", "after")
    negative = await alice.poll_raw(-1)
    assert (negative.status_code, negative.json()["field"]) == (422, "after")


async def test_a_poll_waits_for_the_first_frame(door: Door) -> None:
    alice = await door.open("alice")
    polling = asyncio.create_task(alice.poll(0, 20))
    async with asyncio.timeout(5):
        while not door.connection(alice.session).readers:
            await asyncio.sleep(0.001)  # why: the pace of a loop that looks at a condition
    await door.node.send("c", "at last")
    answer = await polling
    assert [frame["frame"]["data"]["text"] for frame in answer["frames"]] == ["at last"]


async def test_commands_are_accepted_and_answered_in_the_stream_by_ref(door: Door) -> None:
    alice = await door.open("alice")
    sent = await alice.say(
        {"type": "message.send", "ref": 1, "channel": "c", "key": "k1", "text": "a"},
        {"type": "message.send", "ref": 2, "channel": "c", "key": "k2", "text": "b"},
    )
    assert sent.status_code == 202
    assert (await alice.say({"type": "ping", "ref": 3}, one=True)).status_code == 202
    found: dict[int, Any] = {}
    after = 0
    async with asyncio.timeout(5):
        while len(found) < 3:
            answer = await alice.poll(after, 5)
            after = answer["next"]
            found |= {frame["frame"]["ref"]: frame["frame"] for frame in answer["frames"] if "ref" in frame["frame"]}
    assert found[1]["type"] == found[2]["type"] == "message.sent"
    assert found[2]["seq"] == found[1]["seq"] + 1
    assert found[3]["type"] == "pong"


async def test_commands_are_all_read_before_any_takes_effect(door: Door) -> None:
    alice = await door.open("alice")
    head = await door.node.head("c")
    good = {"type": "message.send", "ref": 1, "channel": "c", "key": "k1", "text": "a"}
    for bad, field in (
        ({"type": "message.send", "channel": "c", "key": "k2", "text": 5}, "[1].text"),
        ({"type": "connect", "device": {"id": "d"}}, "[1]"),
        ({"type": "nonsense"}, "[1].type"),
    ):
        answer = await alice.say(good, bad)
        assert 400 <= answer.status_code < 500
        assert answer.json()["field"] == field
    too_many = await alice.say(*[{"type": "ping"}] * (COMMANDS_MAX + 1))
    assert (too_many.status_code, too_many.json()["bound"]) == (422, COMMANDS_MAX)
    await alice.settled()
    assert await door.node.head("c") == head


async def test_a_session_is_its_own_users_alone(door: Door) -> None:
    alice = await door.open("alice")
    await door.node.send("c", "secret")
    await alice.settled()
    for user in ("bob", "carol"):
        headers = await door.headers(user)
        for answer in (
            await door.http.get(f"{alice.path}/poll", headers=headers, params={"wait": 0}),
            await door.http.get(f"{alice.path}/events", headers=headers),
            await door.http.post(f"{alice.path}/commands", headers=headers, json={"type": "ping"}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "session_unknown")
            assert "secret" not in answer.text
    for headers in ({}, {"Authorization": "Bearer nonsense"}):
        answer = await door.http.get(f"{alice.path}/poll", headers=headers, params={"wait": 0})
        assert answer.status_code == 401
    backend = {"Authorization": f"Bearer {door.node.api_key}"}
    assert (await door.http.get(f"{alice.path}/poll", headers=backend)).status_code == 404


async def test_an_unknown_session_says_to_open_a_new_one(door: Door) -> None:
    answer = await door.http.get("/v1/realtime/s_nothing/poll", headers=await door.headers("alice"))
    assert (answer.status_code, answer.json()["code"], answer.json()["retry"]) == (404, "session_unknown", "resync")


async def test_an_app_named_beside_the_token_is_looked_at(door: Door) -> None:
    alice = await door.open("alice")
    alice.headers["Tidings-App"] = "app_other"
    assert (await alice.poll_raw()).status_code == 401
    alice.headers["Tidings-App"] = door.node.app_id
    assert (await alice.poll_raw()).status_code == 200


async def test_a_session_that_nobody_reads_ends(door: Door) -> None:
    alice = await door.open("alice")
    connection = door.connection(alice.session)
    door.node.clock.advance(IDLE_SECONDS)
    connection.tick(door.node.clock.monotonic())
    assert alice.session in door.node.gateway.http_sessions
    door.node.clock.advance(0.1)
    connection.tick(door.node.clock.monotonic())
    assert alice.session not in door.node.gateway.http_sessions
    assert door.node.gateway.hub.peers_of(1, "alice") == []
    assert (await alice.poll_raw()).json()["code"] == "session_unknown"


async def test_a_session_that_is_read_lives_on(door: Door) -> None:
    alice = await door.open("alice")
    connection = door.connection(alice.session)
    for _ in range(5):
        door.node.clock.advance(IDLE_SECONDS - 1)
        connection.tick(door.node.clock.monotonic())
        await alice.poll()
    assert alice.session in door.node.gateway.http_sessions


async def test_a_reader_who_waits_counts_as_reading(door: Door) -> None:
    alice = await door.open("alice")
    connection = door.connection(alice.session)
    polling = asyncio.create_task(alice.poll(0, 20))
    async with asyncio.timeout(5):
        while not connection.readers:
            await asyncio.sleep(0.001)  # why: the pace of a loop that looks at a condition
    door.node.clock.advance(IDLE_SECONDS + 1)
    connection.tick(door.node.clock.monotonic())
    await door.node.send("c", "here")
    assert (await polling)["frames"]


async def test_a_revoked_session_tells_its_reader_why(door: Door) -> None:
    alice = await door.open("alice")
    polling = asyncio.create_task(alice.poll(0, 20))
    async with asyncio.timeout(5):
        while not door.connection(alice.session).readers:
            await asyncio.sleep(0.001)  # why: the pace of a loop that looks at a condition
    door.node.clock.advance(1)
    auth: Auth = door.node.core.services.auth
    await auth.revoke(door.node.backend, "alice")
    [frame] = (await polling)["frames"]
    assert (frame["frame"]["type"], frame["frame"]["code"]) == ("error", "token_revoked")
    assert (await alice.poll_raw()).status_code == 401


async def test_a_session_that_is_not_fetched_from_is_bounded_and_misses_nothing(tmp_path: Path) -> None:
    async with open_node(tmp_path, outbox_bytes_max=4_000) as node:
        await node.users("alice")
        await node.channel("c", "alice")
        connection = HttpConnection(node.gateway, "192.0.2.1", await node.token("alice"))
        node.gateway.opened(connection)
        connection.receive(b'{"type":"connect","device":{"id":"d"}}')
        async with asyncio.timeout(5):
            while not connection._kept:
                await asyncio.sleep(0.001)  # why: the pace of a loop that looks at a condition
        connection.take_first()
        start = await node.head("c")
        for _ in range(60):
            await node.send("c", "x" * 100)
        node.gateway.hub.flush()
        assert connection.paused
        assert connection._bytes < 3 * 4_000
        found: list[int] = []
        after = 0
        async with asyncio.timeout(5):
            while len(found) < 60:
                connection.acknowledge(after)
                for number, data in await connection.wait(after, 5):
                    frame = json.loads(data)
                    if frame.get("stream") == "c" and "data" in frame:
                        found.append(frame["seq"])
                    after = number
        assert found == list(range(start + 1, start + 61))


async def test_opening_is_refused_as_on_a_socket(door: Door) -> None:
    headers = await door.headers("alice")
    no_device = await door.http.post("/v1/realtime", headers=headers, json={"type": "connect"})
    assert (no_device.status_code, no_device.json()["field"]) == (422, "device")
    nobody = await door.http.post("/v1/realtime", json={"type": "connect", "device": {"id": "d"}})
    assert nobody.status_code == 401
    assert door.node.gateway.connections == set()
    assert door.node.gateway.http_sessions == {}


async def test_documents_nested_beyond_reason_are_refused_as_such(door: Door) -> None:
    deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
    alice = await door.open("alice")
    headers = alice.headers
    for path, body in (
        ("/v1/realtime", b'{"type":"connect","device":{"id":"d"},"positions":' + deep + b"}"),
        (f"{alice.path}/commands", b'[{"type":"message.send","channel":"c","key":"k","custom":' + deep + b"}]"),
        (f"{alice.path}/commands", b'{"type":"message.send","channel":"c","key":"k","custom":' + deep + b"}"),
        (f"{alice.path}/commands", b"[" * 5000 + b"]" * 5000),
    ):
        answer = await door.http.post(path, headers=headers, content=body)
        assert answer.status_code in (400, 422), answer.text


async def test_the_same_device_on_a_socket_takes_over(door: Door) -> None:
    alice = await door.open("alice", "phone")
    await door.node.connect("alice", "phone")
    assert (await alice.poll_raw()).json()["code"] == "session_unknown"


async def test_server_sent_events_carry_numbers_and_go_on_where_they_were(door: Door) -> None:
    alice = await door.open("alice")
    await door.node.send("c", "one")
    await door.node.send("c", "two")
    await alice.settled()
    first = await events_of(door, alice, {}, ends_with=b"two")
    assert b": tidings" in first
    assert b"id: 1\ndata: " in first
    resumed = await events_of(door, alice, {"Last-Event-ID": "1"}, ends_with=b"two")
    assert b"id: 2\n" in resumed
    assert b"id: 1\n" not in resumed
    assert b"one" not in resumed


async def events_of(door: Door, client: Client, headers: dict[str, str], *, ends_with: bytes) -> bytes:
    """Read an event stream until something is in it, then end the session's transport side and collect the rest.

    The in-process HTTP client hands over a body only when it is complete, so the ASGI application is called directly.
    """
    app = door.http._transport.app  # type: ignore[attr-defined]
    parts: list[bytes] = []
    done = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.request", "body": b"", "more_body": False}
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200
        parts.append(message.get("body", b""))
        if ends_with in b"".join(parts):
            done.set()

    raw = [(name.lower().encode(), value.encode()) for name, value in {**client.headers, **headers}.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": f"{client.path}/events", "raw_path": f"{client.path}/events".encode(), "query_string": b"",
        "root_path": "", "headers": raw, "client": ("127.0.0.1", 1), "server": ("test", 80), "state": {},
    }  # fmt: skip
    serving = asyncio.create_task(app(scope, receive, send))
    async with asyncio.timeout(5):
        await done.wait()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return b"".join(parts)


def test_refusals_of_ended_sessions_are_in_the_catalogue() -> None:
    assert Refusal("session_unknown", "x").problem.close == 4404
