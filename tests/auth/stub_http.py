"""An HTTP/1.1 server on loopback that answers what a test tells it to and counts who came."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

# A server may hang until the test lets go; never longer than this, so that a failing test ends.
HOLD_SECONDS_MAX = 20


@dataclass
class StubServer:
    """`answer` makes the whole raw response. While `gate` is clear, requests wait after they were counted."""

    host: str
    port: int = 0
    answer: Callable[[], bytes] = lambda: response(b"{}")
    requests: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    drip: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/jwks.json"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            async with asyncio.timeout(HOLD_SECONDS_MAX):
                await self.gate.wait()
                if self.drip is not None:
                    await self.drip(writer)
                else:
                    writer.write(self.answer())
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def stub_server(
    host: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[StubServer]:
    stub = StubServer(host)
    stub.gate.set()
    server = await asyncio.start_server(stub.serve, host, port, ssl=tls)
    stub.port = server.sockets[0].getsockname()[1]
    try:
        yield stub
    finally:
        stub.gate.set()
        server.close()
        await server.wait_closed()


def response(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{headers}\r\n".encode() + body


def key_set(*jwks: Any) -> bytes:
    return response(json.dumps({"keys": jwks}).encode(), headers="content-type: application/json\r\n")
