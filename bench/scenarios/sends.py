"""Durable sends: 50 clients over sockets, each waiting for its acknowledgement; then latency at half that rate."""

from __future__ import annotations

import asyncio
import time

from bench.measure import Findings, at_least, at_most, percentile
from bench.plan import Plan
from bench.server import BenchServer, fresh_postgres, fresh_server
from bench.setup import make_directs, make_users
from bench.sockets import Socket, acknowledge_all, connect_all, message
from bench.workers import Link, worker
from tidings.testing.postgres import PostgresProcess

CLIENTS = 50
# Over a network commits take longer: that many keep a node busy all the same.
MANY_CLIENTS = 400
BATCHES = "tidings_append_batch_size_count"
TEXT = "x" * 200
WARM_UP = 5_000


async def run(plan: Plan, findings: Findings) -> None:
    count = plan.size(50_000, 5_000)
    for _ in range(plan.runs):
        async with fresh_server() as server:
            users = [f"user-{n}" for n in range(CLIENTS)]
            await make_users(server, users)
            channels = await make_directs(server, list(zip(users[::2], users[1::2], strict=True)))
            tokens = [server.credentials.token(user) for user in users]
            async with worker(drive, server.port, tokens, channels) as link:
                await link.receive()
                await link.ask(("closed", WARM_UP))
                before, loop, written = server.cpu_time(), server.loop_seconds(), server.bytes_written()
                seconds, latencies = await link.ask(("closed", count))
                cpu = server.cpu_time() - before
                loop, written = server.loop_seconds() - loop, server.bytes_written() - written
                rate = count / seconds
                findings.add("acknowledged, closed loop", rate, "messages/s", at_least(8_000))
                findings.add("per server core-second", count / cpu.total_s, "messages/s", at_least(8_000))
                findings.add("server CPU per message", cpu.total_s / count * 1e6, "µs", at_most(100))
                findings.add("  of it in the kernel", cpu.system_s / count * 1e6, "µs")
                findings.add("  of it in the event loop's thread", loop / count * 1e6, "µs")
                findings.add("  written to disk per message", written / count / 1024, "KiB")
                findings.add("p50 acknowledgement, closed loop", percentile(latencies, 0.5) * 1e3, "ms")
                findings.add("p99 acknowledgement, closed loop", percentile(latencies, 0.99) * 1e3, "ms")
                half = rate / 2
                before = server.cpu_time()
                seconds, latencies = await link.ask(("open", int(half * plan.seconds(5)), half))
                cpu = server.cpu_time() - before
                findings.add("at half the rate: p50 acknowledgement", percentile(latencies, 0.5) * 1e3, "ms")
                findings.add(
                    "at half the rate: p99 acknowledgement", percentile(latencies, 0.99) * 1e3, "ms", at_most(20)
                )
                findings.add("at half the rate: server CPU per message", cpu.total_s / len(latencies) * 1e6, "µs")
    findings.note(
        f"{CLIENTS} sockets, {CLIENTS // 2} direct channels, {len(TEXT)} bytes of text; every message goes to both "
        "members' devices, which acknowledge once a second. SQLite, synchronous=FULL."
    )


async def run_postgres(plan: Plan, findings: Findings) -> None:
    for _ in range(plan.runs):
        for clients in (CLIENTS, MANY_CLIENTS):
            with fresh_postgres() as postgres:
                async with fresh_server(postgres.url()) as server:
                    await _measure_postgres(plan, findings, postgres, server, clients)
    findings.note(
        f"{CLIENTS} or {MANY_CLIENTS} sockets in half as many direct channels, {len(TEXT)} bytes of text, each waiting "
        "for its acknowledgement. PostgreSQL 18 beside it on the same cores, synchronous_commit = on; its processor "
        "time is counted apart."
    )


async def _measure_postgres(
    plan: Plan, findings: Findings, postgres: PostgresProcess, server: BenchServer, clients: int
) -> None:
    count = plan.size(50_000, 5_000)
    users = [f"user-{n}" for n in range(clients)]
    await make_users(server, users)
    channels = await make_directs(server, list(zip(users[::2], users[1::2], strict=True)))
    tokens = [server.credentials.token(user) for user in users]
    async with worker(drive, server.port, tokens, channels) as link:
        await link.receive()
        await link.ask(("closed", WARM_UP))
        batches = await _batches(server)
        before, theirs = server.cpu_time(), postgres.cpu_seconds()
        seconds, latencies = await link.ask(("closed", count))
        cpu, theirs = server.cpu_time() - before, postgres.cpu_seconds() - theirs
        batches = await _batches(server) - batches
    name = f"{clients} clients: "
    findings.add(name + "acknowledged, closed loop", count / seconds, "messages/s")
    findings.add(name + "per node core-second", count / cpu.total_s, "messages/s", at_least(5_000))
    findings.add(name + "node CPU per message", cpu.total_s / count * 1e6, "µs", at_most(200))
    findings.add(name + "of it in the kernel", cpu.system_s / count * 1e6, "µs")
    findings.add(name + "PostgreSQL's CPU per message", theirs / count * 1e6, "µs")
    findings.add(name + "messages per commit", count / max(batches, 1), "messages")
    findings.add(name + "p50 acknowledgement", percentile(latencies, 0.5) * 1e3, "ms")
    findings.add(name + "p99 acknowledgement", percentile(latencies, 0.99) * 1e3, "ms")


async def _batches(server: BenchServer) -> float:
    async with server.rest() as rest:
        text = (await rest.request("GET", "/metrics")).decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(BATCHES))


async def drive(link: Link, port: int, tokens: list[str], channels: list[str]) -> None:
    load = Load(await connect_all(port, tokens), channels)
    acknowledging = acknowledge_all(load.sockets)
    link.send("ready")
    while True:
        order = await link.receive()
        if order[0] == "closed":
            link.send(await load.closed_loop(order[1]))
        else:
            link.send(await load.open_loop(order[1], order[2]))
        if acknowledging.done():
            acknowledging.result()


class Load:
    """Fifty clients. Acknowledgements come in the order of the sends of a socket."""

    def __init__(self, sockets: list[Socket], channels: list[str]) -> None:
        self.sockets = sockets
        self._channels = channels
        self._number = 0
        self._left = 0
        self._unsent = 0
        self._latencies: list[float] = []
        self._done = asyncio.Event()
        # Per socket: when each unanswered send was due.
        self._due: list[list[float]] = [[] for _ in sockets]
        for place, one in enumerate(sockets):
            one.on_sent = lambda payload, place=place: self._answered(place)

    async def closed_loop(self, count: int) -> tuple[float, list[float]]:
        """Send `count` messages, each client its next one when the last was acknowledged: seconds, and each latency."""
        self._begin(count)
        self._unsent = count
        began = time.perf_counter()
        for place in range(len(self.sockets)):
            self._send(place, time.perf_counter())
        await self.sockets[0].until(self._done)
        return time.perf_counter() - began, self._latencies

    async def open_loop(self, count: int, rate: float) -> tuple[float, list[float]]:
        """Send `rate` a second whatever the answers do; latencies count from when a message was due."""
        self._begin(count)
        began = time.perf_counter()
        sent = 0
        while sent < count:
            due = min(count, int((time.perf_counter() - began) * rate) + 1)
            while sent < due:
                self._unsent = 1
                self._send(sent % len(self.sockets), began + sent / rate)
                sent += 1
            await asyncio.sleep(0.001)
        await self.sockets[0].until(self._done)
        return time.perf_counter() - began, self._latencies

    def _begin(self, count: int) -> None:
        self._left, self._unsent, self._latencies = count, 0, []
        self._done.clear()

    def _send(self, place: int, due: float) -> None:
        self._unsent -= 1
        self._number += 1
        self._due[place].append(due)
        channel = self._channels[place // 2]
        self.sockets[place].send(message(self._number, channel, f"k{self._number}", TEXT))

    def _answered(self, place: int) -> None:
        now = time.perf_counter()
        self._latencies.append(now - self._due[place].pop(0))
        self._left -= 1
        if self._left == 0:
            self._done.set()
        elif self._unsent > 0:
            self._send(place, now)
