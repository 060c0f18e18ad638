"""Connections: what an idle one weighs, and how many can be made in a second of the server's processor time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import resource
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from bench.fill import Fill, filled_server
from bench.measure import Findings, at_least, at_most
from bench.plan import Plan
from bench.workers import Link, worker

IDLE = 10_000
CONNECTS = 4_000
WARM_UP = 400
GROUP_SIZE = 100
GROUPS_EACH = 10
WORKERS = 2
# Connections from one source address: well within its 28,000 ephemeral ports.
PER_SOURCE = 5_000
# Files a server or client has open beside its connections.
OTHER_FILES = 500
# Handshakes under way at once in one load process.
AT_ONCE = 64
# After the last connection: until the batches that are written once a second are done.
SETTLE_SECONDS = 3.0


async def run_memory(plan: Plan, findings: Findings) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(plan.size(IDLE, 1_000), limit - OTHER_FILES)
    users = [f"user-{n}" for n in range(count + WARM_UP)]
    if count < IDLE and not plan.quick:
        findings.note(f"{count} connections (goal: {IDLE}): the hard limit of open files here is {limit}.")
    for groups in (0, GROUPS_EACH):
        what = "in one direct channel each" if not groups else f"in {groups} more groups of {GROUP_SIZE}"
        for _ in range(max(1, plan.runs // 2 + 1) if not groups else 1):
            async with filled_server(partial(_people, users, groups)) as server:
                tokens = [server.credentials.token(user) for user in users]
                async with _load(server.port, tokens[:WARM_UP]) as warm:
                    await _connect(warm)
                    await asyncio.sleep(SETTLE_SECONDS)
                before = server.memory()
                async with _load(server.port, tokens[WARM_UP:]) as load:
                    await _connect(load)
                    await asyncio.sleep(SETTLE_SECONDS)
                    after = server.memory()
                goal = at_most(20) if not groups else None
                findings.add(f"RSS per connection, {what}", (after.rss - before.rss) / count / 1024, "KiB", goal)
                findings.add(f"PSS per connection, {what}", (after.pss - before.pss) / count / 1024, "KiB")
                findings.add("server before, RSS", before.rss / 2**20, "MiB")
    findings.note(
        f"{count} authenticated connections of as many users, idle. Before: the server after {WARM_UP} "
        "connections that came and went. The kernel's memory for sockets is not counted."
    )


async def run_connects(plan: Plan, findings: Findings) -> None:
    count = plan.size(CONNECTS, 400)
    users = [f"user-{n}" for n in range(count)]
    async with filled_server(partial(_people, users, 0)) as server:
        tokens = [server.credentials.token(user) for user in users]
        for turn in range(plan.runs + 1):
            async with _load(server.port, tokens) as load:
                before = server.cpu_time()
                seconds = await _connect(load)
                cpu = server.cpu_time() - before
            if turn == 0:
                # Everything is read from the store, what a user may do and what they listen to.
                findings.add("server CPU per first connect since the start", cpu.total_s / count * 1e6, "µs")
                continue
            findings.add("connects per server core-second", count / cpu.total_s, "1/s", at_least(1_500))
            findings.add("connects, by the clock", count / seconds, "1/s")
            findings.add("server CPU per connect", cpu.total_s / count * 1e6, "µs")
    findings.note(
        f"{count} connections of as many users, {WORKERS} load processes with {AT_ONCE} handshakes under way each: "
        "TCP, upgrade, HS256 token, memberships, `connected`. In one direct channel each."
    )


async def _people(users: list[str], groups: int, fill: Fill) -> None:
    await fill.users(users)
    await fill.directs(zip(users[::2], users[1::2], strict=True))
    await fill.groups(
        {
            f"g{start // GROUP_SIZE}-{n}": users[start : start + GROUP_SIZE]
            for start in range(0, len(users), GROUP_SIZE)
            for n in range(groups)
        }
    )


@contextlib.asynccontextmanager
async def _load(port: int, tokens: list[str]) -> AsyncIterator[list[Link]]:
    async with contextlib.AsyncExitStack() as stack:
        links = [
            await stack.enter_async_context(worker(drive, port, tokens[place::WORKERS], place))
            for place in range(WORKERS)
        ]
        for link in links:
            await link.receive()
        yield links


async def _connect(links: list[Link]) -> float:
    """Connect everyone; the seconds it took."""
    began = time.perf_counter()
    await asyncio.gather(*(link.ask() for link in links))
    return time.perf_counter() - began


async def drive(link: Link, port: int, tokens: list[str], place: int) -> None:
    link.send("ready")
    await link.receive()
    gate = asyncio.Semaphore(AT_ONCE)
    kept = []

    async def one(number: int, token: str) -> None:
        source = f"127.0.{place + 1}.{number // PER_SOURCE + 1}"
        async with gate:
            loop = asyncio.get_running_loop()
            transport, protocol = await loop.create_connection(
                lambda: Bare(token), "127.0.0.1", port, local_addr=(source, 0)
            )
            await protocol.connected
            kept.append(transport)

    await asyncio.gather(*(one(number, token) for number, token in enumerate(tokens)))
    link.send(len(kept))
    await link.receive()


class Bare(asyncio.Protocol):
    """Upgrades, sends `connect`, waits for `connected`, and then only listens."""

    def __init__(self, token: str) -> None:
        hello = json.dumps({"type": "connect", "ref": 1, "token": token, "device": {"id": "d1"}}).encode()
        self._hello = masked(hello)
        self._said = b""
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        key = base64.b64encode(os.urandom(16))
        transport.write(
            b"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n"
        )

    def data_received(self, data: bytes) -> None:
        if self.connected.done():
            return
        self._said += data
        if self._hello and b"\r\n\r\n" in self._said:
            if not self._said.startswith(b"HTTP/1.1 101"):
                self.connected.set_exception(RuntimeError(self._said.decode()))
                return
            self._transport.write(self._hello)
            self._hello = b""
        if b'"type":"connected"' in self._said:
            self.connected.set_result(None)
            self._said = b""
        elif b'"type":"error"' in self._said:
            self.connected.set_exception(RuntimeError(self._said.decode(errors="replace")))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.connected.done():
            self.connected.set_exception(ConnectionError(f"closed before `connected`: {self._said!r}"))


def masked(payload: bytes) -> bytes:
    """A client's text frame (RFC 6455, section 5.2), with a mask of zeros: legal, and nothing to compute."""
    size = len(payload)
    head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
    return head + bytes(4) + payload
