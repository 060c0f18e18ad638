"""A server behind nginx and behind Caddy, both real, on the files that are delivered."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from tests.deploy.proxy import ANOTHER, SOMEBODY, Front, caddy, frame, front, nginx
from tidings.server.rest.operation import BULK_BYTES_MAX
from tidings.wire import limits

PROXIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed: apt-get install {name}"),
    )
    for name in ("nginx", "caddy")
]
PER_ADDRESS = 3


@pytest.fixture(params=PROXIES)
async def behind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Front]:
    command = {"nginx": nginx, "caddy": caddy}[request.param]
    settings = {"TIDINGS_CONNECTIONS_PER_ADDRESS": str(PER_ADDRESS)}
    async with front(tmp_path, command, secure=request.param == "nginx", settings=settings) as made:
        yield made


async def test_sockets_polls_and_streams_bring_messages_as_they_come(behind: Front) -> None:
    bearer = {"Authorization": f"Bearer {behind.tokens['bob']}"}
    async with behind.socket("bob") as ws, behind.http(headers=bearer) as http:
        sessions = []
        for device in ("poll", "stream"):
            opened = await http.post("/v1/realtime", json={"type": "connect", "device": {"id": device}})
            assert opened.status_code == 200, opened.text
            sessions.append(f"/v1/realtime/{opened.json()['session']}")
        polling = asyncio.ensure_future(http.get(f"{sessions[0]}/poll", params={"after": 0, "wait": 25}))
        async with http.stream("GET", f"{sessions[1]}/events") as stream, asyncio.timeout(20):
            lines = stream.aiter_lines()
            # The first comment comes before anything has happened: nothing waits until a buffer is full.
            assert (await anext(lines)).startswith(":")
            assert not polling.done()
            await behind.say("Good morning")
            async for line in lines:
                if line.startswith("data:"):
                    break
            assert json.loads(line[5:])["data"]["text"] == "Good morning"
        assert (await frame(ws, "message.created"))["data"]["text"] == "Good morning"
        answer = (await polling).json()
        assert [one["frame"]["data"]["text"] for one in answer["frames"]] == ["Good morning"]


async def test_clients_are_told_apart_by_the_address_that_the_proxy_saw(behind: Front) -> None:
    async with AsyncExitStack() as open_sockets:
        for number in range(PER_ADDRESS):
            await open_sockets.enter_async_context(behind.socket("bob", f"d{number}"))
        # Full for this address; and what it writes about itself changes nothing.
        for headers in ({}, {"X-Forwarded-For": "203.0.113.7"}, {"Forwarded": "for=203.0.113.7"}):
            with pytest.raises(InvalidStatus) as refused:
                await open_sockets.enter_async_context(behind.socket("bob", "one-more", headers=headers))
            assert refused.value.response.status_code == 429
        # For another one it is not.
        await open_sockets.enter_async_context(behind.socket("bob", "elsewhere", source=ANOTHER))


async def test_a_refusal_is_the_servers_up_to_its_own_bounds(behind: Front) -> None:
    async with behind.http(SOMEBODY) as http:
        # The longest token that may be, and it is the server that says no.
        long = await http.get("/v1/channels", headers={"Authorization": "Bearer " + "x" * (limits.TOKEN_BYTES_MAX - 8)})
        assert (long.status_code, long.headers["content-type"]) == (401, "application/problem+json")
        # The largest body that any operation takes.
        key = {"Authorization": f"Bearer {behind.api_key}", "Content-Type": "application/json"}
        large = await http.put("/v1/users", headers=key, content=b" " * (BULK_BYTES_MAX - 40_000) + b'{"users":[]}')
        assert (large.status_code, large.headers["content-type"]) == (422, "application/problem+json")
        # Beyond that nginx does not even pass it on; Caddy does until it has counted so much, and then may tell of the
        # server that has refused and gone, or hang up in the middle of its answer.
        try:
            beyond = await http.put("/v1/users", headers=key, content=b" " * (4 * BULK_BYTES_MAX))
        except httpx.RemoteProtocolError:
            assert not behind.secure
        else:
            assert beyond.status_code in ({413} if behind.secure else {413, 502})


async def test_what_is_for_operators_is_not_for_the_world(behind: Front) -> None:
    async with behind.http() as http:
        for path in ("/metrics", "/readyz"):
            answer = await http.get(path)
            assert (answer.status_code, "tidings_" in answer.text) == (404, False)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: apt-get install nginx")
async def test_a_reload_of_nginx_keeps_the_sockets(tmp_path: Path) -> None:
    async with front(tmp_path, nginx, secure=True) as behind, behind.socket("bob", "before") as before:
        children = Path(f"/proc/{behind.process.pid}/task/{behind.process.pid}/children")
        workers = set(children.read_text().split())
        behind.reload()
        async with asyncio.timeout(30):
            while not set(children.read_text().split()) - workers:
                await asyncio.sleep(0.01)  # why: until nginx has started its new worker
        async with behind.socket("bob", "after") as after:
            await behind.say("Still here")
            for ws in (before, after):
                assert (await frame(ws, "message.created"))["data"]["text"] == "Still here"
        # The old worker is still there, for the old socket.
        assert workers & set(children.read_text().split())


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: apt-get install nginx")
async def test_a_node_that_comes_back_is_used_again(tmp_path: Path) -> None:
    async with front(tmp_path, nginx, secure=True) as behind, behind.http() as http:
        await behind.server.restart(graceful=True)
        async with asyncio.timeout(30):
            # nginx leaves a node alone for fail_timeout after it could not reach it.
            while (await http.get("/healthz")).status_code != 200:
                await asyncio.sleep(0.05)  # why: until nginx tries it again
        async with behind.socket("alice"):
            pass
