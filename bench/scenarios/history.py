"""Latest page and unread count in a channel with a thousand messages and in one with a million."""

from __future__ import annotations

import asyncio
import time

from bench.fill import Fill, kept_server
from bench.measure import Findings, at_most
from bench.plan import Plan
from bench.server import BenchServer
from bench.workers import Link, worker

READER = "reader"
WRITER = "writer"
PAGE = 50
WARM_UP = 50


async def run(plan: Plan, findings: Findings) -> None:
    largest = 7 if plan.long else 4 if plan.quick else 6
    sizes = [10**3, 10**largest]
    requests = plan.size(1_000, 100)

    async def make(fill: Fill) -> None:
        # Each channel has a reader of its own, whose count of unread messages is then of that channel.
        await fill.users([WRITER, *(f"{READER}-{size}" for size in sizes)])
        await fill.groups({f"c-{size}": [WRITER, f"{READER}-{size}"] for size in sizes})
        for size in sizes:
            await fill.messages(f"c-{size}", WRITER, size)

    async with kept_server(f"history-{largest}", make) as server:
        for what, path in (
            (f"latest {PAGE} messages", "/v1/channels/c-{size}/messages?limit=50"),
            ("unread count, nothing read", "/v1/unread"),
        ):
            for turn in range(plan.runs + 1):
                costs = []
                for size in sizes:
                    token = server.credentials.token(f"{READER}-{size}")
                    seconds, cpu = await _ask(server, path.format(size=size), token, requests if turn else WARM_UP)
                    costs.append(cpu)
                    if turn:
                        findings.add(f"{what}, at 10^{len(str(size)) - 1}: server CPU", cpu * 1e6, "µs")
                        findings.add(f"{what}, at 10^{len(str(size)) - 1}: by the clock", seconds * 1e6, "µs")
                if turn:
                    findings.add(f"{what}: CPU at 10^{largest} to 10^3", costs[1] / costs[0], "×", at_most(1.2))
    findings.note(f"One client, one request at a time over one connection, {requests} of each in a run, sizes in turn.")


async def _ask(server: BenchServer, path: str, token: str, count: int) -> tuple[float, float]:
    """Seconds and server CPU seconds of one request."""
    async with worker(drive, server.port, path, token, count) as link:
        await link.receive()
        before = server.cpu_time()
        seconds = await link.ask()
        return seconds / count, (server.cpu_time() - before).total_s / count


async def drive(link: Link, port: int, path: str, token: str, count: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()

    async def ask() -> None:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(body.decode())

    await ask()
    link.send("ready")
    await link.receive()
    began = time.perf_counter()
    for _ in range(count):
        await ask()
    link.send(time.perf_counter() - began)
    await link.receive()
