"""Durable sends over REST: 32 clients, each on one kept-alive connection, one request at a time."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from bench.measure import Findings, at_least, percentile
from bench.plan import Plan
from bench.server import fresh_server
from bench.setup import make_directs, make_users
from bench.workers import Link, worker

CLIENTS = 32
TEXT = "x" * 200
WARM_UP = 1_000


async def run(plan: Plan, findings: Findings) -> None:
    count = plan.size(15_000, 1_500)
    for _ in range(plan.runs):
        async with fresh_server() as server:
            users = [f"user-{n}" for n in range(CLIENTS)]
            await make_users(server, users)
            channels = await make_directs(server, list(zip(users[::2], users[1::2], strict=True)))
            tokens = [server.credentials.token(user) for user in users]
            async with worker(drive, server.port, tokens, channels) as link:
                await link.receive()
                await link.ask(WARM_UP)
                before = server.cpu_time()
                seconds, latencies = await link.ask(count)
                cpu = server.cpu_time() - before
            findings.add("stored, per server core-second", count / cpu.total_s, "messages/s", at_least(2_500))
            findings.add("stored, by the clock", count / seconds, "messages/s")
            findings.add("server CPU per message", cpu.total_s / count * 1e6, "µs")
            findings.add("  of it in the kernel", cpu.system_s / count * 1e6, "µs")
            findings.add("p50 answer", percentile(latencies, 0.5) * 1e3, "ms")
            findings.add("p99 answer", percentile(latencies, 0.99) * 1e3, "ms")
    findings.note(
        f"{CLIENTS} users with tokens, {CLIENTS // 2} direct channels, {len(TEXT)} bytes of text, HTTP/1.1. Nobody is "
        "connected by socket. SQLite, synchronous=FULL."
    )


async def drive(link: Link, port: int, tokens: list[str], channels: list[str]) -> None:
    loop = asyncio.get_running_loop()
    clients = []
    for place, token in enumerate(tokens):
        _, client = await loop.create_connection(
            partial(Poster, token, channels[place // 2], str(place)),
            "127.0.0.1",
            port,
        )
        clients.append(client)
    link.send("ready")
    while True:
        count = await link.receive()
        latencies: list[float] = []
        left = count

        async def one(client: Poster, latencies: list[float] = latencies) -> None:
            nonlocal left
            while left > 0:
                left -= 1
                began = time.perf_counter()
                await client.post()
                latencies.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(one(client) for client in clients))
        link.send((time.perf_counter() - began, latencies))


class Poster(asyncio.Protocol):
    """Posts messages over one connection and looks at nothing but the status and the length of the answer."""

    def __init__(self, token: str, channel: str, name: str) -> None:
        self._head = (
            f"POST /v1/channels/{channel}/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._name = name
        self._number = 0
        self._said = b""
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def post(self) -> asyncio.Future[None]:
        """Send the next message; done with the answer. Raises RuntimeError unless it is 201."""
        self._number += 1
        body = b'{"key":"%s-%d","text":"%s"}' % (self._name.encode(), self._number, TEXT.encode())
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(self._head + b"%d\r\n\r\n" % len(body) + body)
        return self._answer

    def data_received(self, data: bytes) -> None:
        said = self._said = self._said + data
        end = said.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = said[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(said) < end + 4 + length:
            return
        answer, self._answer, self._said = self._answer, None, b""
        if said.startswith(b"HTTP/1.1 201"):
            answer.set_result(None)
        else:
            answer.set_exception(RuntimeError(said.decode()))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed"))
