"""Connections that send little or nothing: they cost a stranger as much as they cost us, for a short time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
import uvicorn
from uvicorn.server import ServerState

from tidings.server.config import Config
from tidings.server.rest.http_protocol import http_protocol
from tidings.testing.process import ServerProcess
from tidings.testing.rawsocket import RawSocket
from tidings.wire.problems import CATALOGUE

from .world import World

# Far below what uvicorn closes idle connections after (5 s), so that the two cannot be taken for one another.
HEAD_SECONDS = 0.4
CAP = 4

Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServerProcess]:
    settings = {"TIDINGS_AUTH_TIMEOUT_SECONDS": str(HEAD_SECONDS), "TIDINGS_CONNECTIONS_PER_ADDRESS": str(CAP)}
    async with ServerProcess(tmp_path_factory.mktemp("connections") / "data", environment=settings) as process:
        yield process


@asynccontextmanager
async def dial(port: int, said: bytes = b"") -> AsyncIterator[Pipe]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(said)
        yield reader, writer
    finally:
        writer.close()


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server hangs up."""
    async with asyncio.timeout(4):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("said", [b"", b"GET /healthz HTTP/1.1\r\nHo", b"\r\n", GET + b"GET /he"])
async def test_a_connection_that_does_not_ask_is_closed(server: ServerProcess, said: bytes) -> None:
    async with dial(server.port, said) as (reader, _):
        began = time.monotonic()
        answer = await rest_of(reader)
        assert time.monotonic() - began >= HEAD_SECONDS * 0.9
        assert answer.count(b"HTTP/1.1") == said.count(b"\r\n\r\n")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_body_that_is_waited_for_hides_no_head(server: ServerProcess) -> None:
    body = b"POST /v1/users HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Length: 9\r\n\r\n"
    async with dial(server.port, body) as (waits, _):
        await waits.readuntil(b"}")
        for _ in range(2):
            async with dial(server.port) as (reader, _):
                await rest_of(reader)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_head_that_comes_byte_by_byte_gains_no_time(server: ServerProcess) -> None:
    async with dial(server.port) as (reader, writer):

        async def drip() -> None:
            while not writer.is_closing():
                writer.write(b"G" if not dripped else b"x")
                dripped.append(1)
                await asyncio.sleep(HEAD_SECONDS / 8)  # why: the dripping itself

        dripped: list[int] = []
        writer.write(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        dripping = asyncio.create_task(drip())
        try:
            await rest_of(reader)
        finally:
            dripping.cancel()


@pytest.mark.asyncio(loop_scope="module")
async def test_line_ends_do_not_keep_an_answered_connection_open(server: ServerProcess) -> None:
    async with dial(server.port, GET) as (reader, writer):
        await reader.readuntil(b"}")
        writer.write(b"\r\n")
        await rest_of(reader)


@pytest.mark.asyncio(loop_scope="module")
async def test_sockets_are_the_gateways_to_count_and_to_close(server: ServerProcess) -> None:
    for _ in range(CAP + 1):
        async with await RawSocket.open(server.port) as raw:
            await raw.handshake("/v1/ws")
            assert (await raw.read_close()).code == CATALOGUE["auth_timeout"].close


@pytest.mark.asyncio(loop_scope="module")
async def test_connections_of_one_address_are_counted(server: ServerProcess) -> None:
    pipes = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CAP)]
    for reader, writer in pipes:
        writer.write(GET)
        await reader.readuntil(b"}")
    async with dial(server.port) as (reader, _):
        refused = await rest_of(reader)
    assert refused.startswith(b"HTTP/1.1 429 ")
    assert b'"code":"too_many_connections"' in refused
    assert b"retry-after: 5" in refused
    for _, writer in pipes:
        writer.close()
    # Those that are gone no longer count.
    async with asyncio.timeout(4):
        while True:
            async with dial(server.port, GET) as (reader, _):
                if (await reader.readline()).startswith(b"HTTP/1.1 200"):
                    return


async def test_a_body_has_its_time_and_no_more(world: World) -> None:
    await world.user("alice")
    channel = await world.channel("alice")
    protocol = http_protocol(Config(auth_timeout_seconds=30.0), body_seconds=0.2)
    config = uvicorn.Config(world.rest, lifespan="off", log_config=None)
    listening = await asyncio.get_running_loop().create_server(
        lambda: protocol(config, ServerState(), {}), "127.0.0.1", 0
    )
    head = [f"POST /v1/channels/{channel}/messages HTTP/1.1", "Host: x", "Content-Type: application/json"]
    port = listening.sockets[0].getsockname()[1]
    try:
        for headers, status in (
            ([*head, f"Authorization: {world.as_('alice')['authorization']}", "Tidings-App: clinic"], b"408"),
            # Answered before its body was read, and still not given for ever.
            (head, b"401"),
        ):
            said = "\r\n".join([*headers, "Content-Length: 100", "", '{"text":"half']).encode()
            async with dial(port, said) as (reader, _):
                answer = await rest_of(reader)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert b"application/problem+json" in answer
    finally:
        listening.close()
    assert (await world.ok("backend", "GET", f"/v1/channels/{channel}/messages"))["messages"] == []
