"""Fan-out: one sender, 200 members. At a steady 100 messages a second against a C loop of send(), and flat out."""

from __future__ import annotations

import asyncio
import time

from bench import sendloop
from bench.measure import Findings, at_least, at_most
from bench.plan import Plan
from bench.server import BenchServer, fresh_server
from bench.setup import make_groups, make_users
from bench.sockets import Socket, acknowledge_all, connect_all, flood, message
from bench.workers import Link, worker

MEMBERS = 200
RATE = 100
TEXT = "x" * 200
CHANNEL = "ward"
# Messages unacknowledged while sending flat out: enough that the server never waits for the sender.
WINDOW = 32


async def run(plan: Plan, findings: Findings) -> None:
    library = sendloop.build()
    seconds = plan.seconds(5)
    messages = int(RATE * seconds)
    async with fresh_server() as server, worker(sendloop.drive, library, MEMBERS) as loop:
        tokens = await ward(server)
        loop_port = await loop.receive()
        async with worker(drive, server.port, tokens, loop_port) as link:
            await link.receive()
            await loop.receive()
            payload = await link.ask(("steady", RATE // 2))
            for _ in range(plan.runs):
                # Both ways in turn, so that both meet the same machine. The receivers are the same process.
                before = server.cpu_time()
                payload = await link.ask(("steady", messages))
                ours = server.cpu_time() - before
                link.send(("receive", messages))
                theirs = await loop.ask((payload, messages, 10**9 // RATE))
                await link.receive()
                deliveries = messages * MEMBERS
                findings.add("server CPU per delivery", ours.total_s / deliveries * 1e6, "µs")
                findings.add("C loop's CPU per delivery", theirs / deliveries * 1e6, "µs")
                findings.add("ratio", ours.total_s / theirs, "×", at_most(1.5))
    findings.note(
        f"{MEMBERS} members, {RATE} messages/s of {len(TEXT)} bytes of text ({len(payload)} bytes as an event), "
        "receivers acknowledge once a second. The C loop sends the same bytes to as many sockets of the same receiving "
        "process at the same pace; both in turn on one machine. Its time is its thread's, ours the whole process's."
    )


async def run_flood(plan: Plan, findings: Findings) -> None:
    messages = plan.size(5_000, 500)
    async with fresh_server() as server:
        tokens = await ward(server)
        async with worker(drive, server.port, tokens, None) as link:
            await link.receive()
            await link.ask(("flood", messages // 10))
            for _ in range(plan.runs):
                before = server.cpu_time()
                seconds = await link.ask(("flood", messages))
                cpu = server.cpu_time() - before
                deliveries = messages * MEMBERS
                findings.add("deliveries per server core-second", deliveries / cpu.total_s, "1/s", at_least(100_000))
                findings.add("deliveries, by the clock", deliveries / seconds, "1/s")
                findings.add("messages, by the clock", messages / seconds, "1/s")
                findings.add("server CPU per message", cpu.total_s / messages * 1e6, "µs")
    findings.note(
        f"{MEMBERS} members, one sender with {WINDOW} messages under way; sender and receivers are one process."
    )


async def ward(server: BenchServer) -> list[str]:
    users = [f"user-{n}" for n in range(MEMBERS)]
    await make_users(server, users)
    await make_groups(server, {CHANNEL: users})
    return [server.credentials.token(user) for user in users]


async def drive(link: Link, port: int, tokens: list[str], loop_port: int | None) -> None:
    members = await connect_all(port, tokens)
    bare = await connect_all(loop_port, [""] * len(tokens)) if loop_port is not None else []
    acknowledging = acknowledge_all(members)
    link.send("ready")
    number = 0
    while True:
        order, count = await link.receive()
        began = time.perf_counter()
        expected = [(one, one.events + count) for one in (bare if order == "receive" else members)]
        if order == "steady":
            for step in range(count):
                await asyncio.sleep(began + step / RATE - time.perf_counter())
                number += 1
                members[0].send(message(number, CHANNEL, f"k{number}", TEXT))
        elif order == "flood":
            number = await flood(
                members[0], number, count, window=WINDOW, frame=lambda n: message(n, CHANNEL, f"k{n}", TEXT)
            )
        await _received(expected)
        if acknowledging.done():
            acknowledging.result()
        link.send(members[0].last if order == "steady" else time.perf_counter() - began)


async def _received(expected: list[tuple[Socket, int]], seconds: float = 60.0) -> None:
    """Wait until every socket has this many events. Raises RuntimeError."""
    deadline = time.perf_counter() + seconds
    while any(one.events < count for one, count in expected):
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{sum(one.events < count for one, count in expected)} sockets have not received all")
        await asyncio.sleep(0.005)
    if any(one.events > count for one, count in expected):
        raise RuntimeError("more was received than was sent")
