"""What jobs cost: putting them beside a send, telling webhooks, and a backlog beside people's messages."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import msgspec

from bench.measure import Findings, at_least, at_most
from bench.plan import Plan
from bench.scenarios.sends import CLIENTS, WARM_UP, drive
from bench.server import ENVIRONMENT, BenchServer, fresh_server
from bench.setup import make_directs, make_users
from bench.sink import sink
from bench.workers import worker
from tidings.testing.process import ServerProcess
from tidings.wire.push import WebPushConfig

ALLOW = {"TIDINGS_OUTBOUND_ALLOW_HOSTS": "127.0.0.1"}
WORKER = (sys.executable, "-m", "tidings.server.cli", "worker", "--data", "{data}")
BACKLOG = 100_000


class JobsWorker(ServerProcess):
    """`tidings worker` as a process."""

    async def wait_ready(self) -> None:
        while self.stderr_path.read_text().count("worker.started") < self.starts:
            await asyncio.sleep(0.02)


async def _endpoint(server: BenchServer, url: str) -> None:
    async with server.rest() as rest:
        await rest.request("POST", "/v1/webhooks", body={"url": url, "events": ["message.created"]})


async def _provider(server: BenchServer) -> None:
    async with server.rest() as rest:
        config = msgspec.to_builtins(WebPushConfig(subject="mailto:push@clinic.example"))
        await rest.request("PUT", "/v1/push/providers/webpush", body={"config": config})
        await rest.request("PATCH", "/v1/app", body={"settings": {"push": {"grace_seconds": 600}}})


async def _people(server: BenchServer) -> tuple[list[str], list[str]]:
    users = [f"user-{n}" for n in range(CLIENTS)]
    await make_users(server, users)
    channels = await make_directs(server, list(zip(users[::2], users[1::2], strict=True)))
    return [server.credentials.token(user) for user in users], channels


async def run_enqueue(plan: Plan, findings: Findings) -> None:
    """The closed loop of `sends` without and with a webhook and a push provider, of which nothing is delivered."""
    count = plan.size(50_000, 5_000)
    for _ in range(plan.runs):
        costs = []
        for busy in (False, True):
            async with fresh_server(environment=ALLOW) as server:
                tokens, channels = await _people(server)
                if busy:
                    # Nobody listens there: after the first attempt every lane waits.
                    await _endpoint(server, "http://127.0.0.1:9/hook")
                    await _provider(server)
                async with worker(drive, server.port, tokens, channels) as link:
                    await link.receive()
                    await link.ask(("closed", WARM_UP))
                    before = server.cpu_time()
                    await link.ask(("closed", count))
                    costs.append((server.cpu_time() - before).total_s / count * 1e6)
        findings.add("server CPU per send, without", costs[0], "µs")
        findings.add("server CPU per send, with a webhook and push", costs[1], "µs")
        findings.add("what putting jobs adds", costs[1] / costs[0], "x", at_most(1.15))
    findings.note("For each message of a channel two jobs are put or found there: the webhook's lane and the push's.")


async def run_webhooks(plan: Plan, findings: Findings) -> None:
    """A backlog of messages in many channels, told by one `tidings worker` to a sink in another process."""
    count = plan.size(40_000, 4_000)
    for _ in range(plan.runs):
        async with (
            sink() as port,
            fresh_server(environment={**ALLOW, "TIDINGS_JOBS": "false"}) as server,
        ):
            tokens, channels = await _people(server)
            await _endpoint(server, f"http://127.0.0.1:{port}/hook")
            async with worker(drive, server.port, tokens, channels) as link:
                await link.receive()
                await link.ask(("closed", count))
            logs = server.data.parent / "worker"
            async with JobsWorker(
                server.data, logs=logs, environment={**ENVIRONMENT, **ALLOW}, command=WORKER
            ) as working:
                began = time.monotonic()
                await _until(server.data, f"SELECT count(*)>={count} FROM webhook_deliveries WHERE outcome='delivered'")
                seconds, cpu = time.monotonic() - began, working.cpu_time().total_s
        findings.add("deliveries per core-second", count / cpu, "deliveries/s", at_least(2_000))
        findings.add("  CPU per delivery, start included", cpu / count * 1e6, "µs")
        findings.add("  by the clock", count / seconds, "deliveries/s")
    findings.note(
        "Everything included: outbox, claims, reading the log, two signatures, HTTP, sealing and writing the log."
    )


async def run_backlog(plan: Plan, findings: Findings) -> None:
    """Sends in a closed loop beside a backlog of jobs in the same process, and without."""
    jobs = plan.size(BACKLOG, BACKLOG // 10)
    for _ in range(plan.runs):
        rates = []
        for backlog in (0, jobs):
            async with fresh_server() as server:
                tokens, channels = await _people(server)
                async with worker(drive, server.port, tokens, channels) as link:
                    await link.receive()
                    await link.ask(("closed", WARM_UP))
                    if backlog:
                        _pile_up(server.data, backlog)
                    count = plan.size(60_000, 6_000)
                    seconds, _ = await link.ask(("closed", count))
                    rates.append(count / seconds)
                if backlog:
                    left = _ask(server.data, "SELECT count(*) FROM jobs WHERE kind='push.send'")
                    findings.add("  of the backlog done meanwhile", (backlog - left) / backlog * 100, "%")
                    began = time.monotonic()
                    await _until(server.data, "SELECT NOT EXISTS (SELECT 1 FROM jobs WHERE kind='push.send')")
                    findings.add("  the rest, with nothing else to do", left / (time.monotonic() - began), "jobs/s")
                    done = _ask(server.data, "SELECT count(*) FROM push_log")
                    late = _ask(
                        server.data,
                        "SELECT coalesce(max(behind),0) FROM (SELECT max(seq) OVER (ORDER BY id) - seq AS behind"
                        " FROM push_log)",
                    )
                    assert done == backlog
                    findings.add("  furthest that one was overtaken by", late, "jobs")
        findings.add("sends beside the backlog to sends alone", rates[1] / rates[0], "x", at_least(0.8))
    findings.note(
        f"{jobs:,} pushes to people who have left, each looked up and written down. SQLite, synchronous=FULL."
    )


def _pile_up(data: Path, count: int) -> None:
    """Jobs that have long been due, in order."""
    with closing(sqlite3.connect(data / "tidings.db", timeout=30)) as connection:
        app = connection.execute("SELECT app FROM apps LIMIT 1").fetchone()[0]
        connection.executemany(
            "INSERT INTO jobs(app,kind,key,due_at,payload,created_at) VALUES (?,'push.send',?,?,?,1)",
            (
                (
                    app,
                    f"1/{number}/x/y/z",
                    number,
                    msgspec.json.encode(
                        {"sid": 1, "seq": number, "user": "x", "device": "y", "provider": "z", "at": 1}
                    ),
                )
                for number in range(1, count + 1)
            ),
        )
        connection.commit()


def _ask(data: Path, sql: str) -> int:
    with closing(sqlite3.connect(f"file:{data / 'tidings.db'}?mode=ro", uri=True, timeout=30)) as connection:
        return int(connection.execute(sql).fetchone()[0])


async def _until(data: Path, sql: str) -> None:
    while not _ask(data, sql):
        await asyncio.sleep(0.1)
