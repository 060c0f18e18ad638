"""Several nodes over PostgreSQL and NATS: what a second worker adds, and what it costs that there are others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.fill import Fill, fill_store
from bench.measure import Findings, at_least, at_most
from bench.plan import Plan
from bench.scenarios.catchup import READER, WRITER, drive_mark, drive_quiet, write_one
from bench.scenarios.fanout import MEMBERS, ward
from bench.scenarios.fanout import drive as drive_fanout
from bench.scenarios.sends import WARM_UP
from bench.scenarios.sends import drive as drive_sends
from bench.server import BenchServer, Credentials, fresh_postgres, scratch
from bench.setup import make_directs, make_users
from bench.workers import worker
from tidings.testing.nats import NatsProcess
from tidings.testing.postgres import PostgresProcess
from tidings.testing.process import child_pids, cpu_seconds

# Of each worker: enough that it is never idle while PostgreSQL works.
CLIENTS_EACH: Final = 100
MANY: Final = 10_000


async def run_workers(plan: Plan, findings: Findings) -> None:
    count = plan.size(40_000, 4_000)
    for _ in range(plan.runs):
        costs = []
        for workers in (1, 2):
            async with _nodes(workers) as (server, postgres):
                users = [f"user-{n}" for n in range(CLIENTS_EACH * workers)]
                await make_users(server, users)
                channels = await make_directs(server, list(zip(users[::2], users[1::2], strict=True)))
                tokens = [server.credentials.token(user) for user in users]
                async with worker(drive_sends, server.port, tokens, channels) as link:
                    await link.receive()
                    await link.ask(("closed", WARM_UP))
                    before, theirs = _each(server), postgres.cpu_seconds()
                    seconds, _ = await link.ask(("closed", count))
                    spent = [now - then for now, then in zip(_each(server), before, strict=True)]
                    theirs = postgres.cpu_seconds() - theirs
            name = f"{workers} worker{'s' * (workers > 1)}: "
            costs.append(sum(spent) / count)
            findings.add(name + "CPU per message", costs[-1] * 1e6, "µs")
            findings.add(name + "the busiest one's share", max(spent) / sum(spent), "of 1")
            findings.add(name + "PostgreSQL's CPU per message", theirs / count * 1e6, "µs")
            findings.add(name + "acknowledged, by the clock", count / seconds, "messages/s")
        one, two = costs
        findings.add("messages per budget of CPU, two workers to one", 2 * one / two, "×", at_least(1.8))
    findings.note(
        f"{CLIENTS_EACH} sockets for each worker, in half as many direct channels, spread by the kernel: half of the "
        "messages are for somebody at the other worker. PostgreSQL and NATS run on the same cores and are not counted. "
        "The ratio: what two workers' processor time is worth at their cost of a message, to one's at its own."
    )


async def run_fanout(plan: Plan, findings: Findings) -> None:
    messages = plan.size(3_000, 300)
    for _ in range(plan.runs):
        costs = []
        for workers in (1, 2):
            async with _nodes(workers, bus=workers > 1) as (server, _):
                tokens = await ward(server)
                async with worker(drive_fanout, server.port, tokens, None) as link:
                    await link.receive()
                    await link.ask(("flood", messages // 10))
                    before = _each(server)
                    await link.ask(("flood", messages))
                    costs.append(sum(_each(server)) - sum(before))
            name = "one node" if workers == 1 else "two nodes"
            findings.add(f"{name}: CPU per delivery", costs[-1] / messages / MEMBERS * 1e6, "µs")
            findings.add(f"{name}: CPU per message", costs[-1] / messages * 1e6, "µs")
        findings.add("two nodes to one, per delivery", costs[1] / costs[0], "×", at_most(1.3))
    findings.note(
        f"{MEMBERS} members of one channel, one sender with messages under way all the time, over PostgreSQL. "
        "Two nodes: the members are spread over both by the kernel, NATS is in between, the time of both is counted."
    )


async def run_quiet(plan: Plan, findings: Findings) -> None:
    count = plan.size(MANY, 300)
    reader = f"{READER}-{count}"

    async def make(fill: Fill) -> None:
        await fill.users([WRITER, reader])
        await fill.groups({f"quiet-{count}-{n}": [WRITER, reader] for n in range(count)})

    with fresh_postgres() as postgres, scratch() as folder:
        credentials = await fill_store(folder / "server", make, store=postgres.url())
        async with _nodes(2, postgres=postgres, credentials=credentials, data=folder / "server") as (server, _):
            token = server.credentials.token(reader)
            async with worker(drive_mark, server.port, token) as link:
                mark = await link.receive()
            for _ in range(plan.runs):
                async with worker(drive_quiet, server.port, token, mark) as link:
                    await link.receive()
                    # What the reader misses is written while nobody is connected, by whichever node.
                    await write_one(server, f"quiet-{count}-0", f"t{time.time_ns()}")
                    before = sum(_each(server))
                    received, seconds = await link.ask()
                    findings.add("nodes' CPU", (sum(_each(server)) - before) * 1e3, "ms")
                findings.add("received", received / 1e3, "KB", at_most(10))
                findings.add("from the connection to the missed message", seconds, "s", at_most(1))
    findings.note(
        f"A user of {count} channels, one missed message, two nodes over PostgreSQL and NATS; the first run or two may "
        "meet a node on which they have not been yet."
    )


def _each(server: BenchServer) -> list[float]:
    """Processor seconds of every node so far."""
    return [cpu_seconds(pid) for pid in child_pids(server.pid) or [server.pid]]


@contextlib.asynccontextmanager
async def _nodes(
    workers: int,
    *,
    bus: bool = True,
    postgres: PostgresProcess | None = None,
    credentials: Credentials | None = None,
    data: Path | None = None,
) -> AsyncIterator[tuple[BenchServer, PostgresProcess]]:
    """Workers behind one port, over a database of their own unless there is one."""
    async with contextlib.AsyncExitStack() as stack:
        if postgres is None:
            postgres = stack.enter_context(fresh_postgres())
        folder = stack.enter_context(scratch())
        environment = {"TIDINGS_WORKERS": str(workers), "TIDINGS_LOG_LEVEL": "info"}
        if bus:
            nats = await stack.enter_async_context(NatsProcess(folder / "nats"))
            environment["TIDINGS_BUS"] = nats.url
        server = BenchServer(data or folder / "server", credentials, store=postgres.url(), environment=environment)
        await stack.enter_async_context(server)
        await server.all_ready(workers)
        yield server, postgres
