"""What a node asks the store again: the credentials of its sessions while it is cut off from the bus, and the heads of
the streams that it follows. The real gateway in this process, over PostgreSQL and NATS, with sessions that have no
socket."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from bench.fill import Fill, fill_store
from bench.measure import Findings, at_most
from bench.plan import Plan
from bench.server import fresh_postgres, scratch
from tidings.server.app import Core, open_core
from tidings.server.clock import SystemClock
from tidings.server.config import load_config
from tidings.server.domain.limits import Limiter, Rate
from tidings.server.gateway.connection import Connection
from tidings.server.gateway.gateway import Gateway
from tidings.server.gateway.session import State
from tidings.server.services.access import backend_actor
from tidings.server.store.base import Tx
from tidings.server.telemetry import setup_logging
from tidings.testing.nats import NatsProcess
from tidings.testing.postgres import PostgresProcess

SESSIONS: Final = 20_000
STREAMS: Final = 80_000
# What is promised of both, seconds.
WITHIN_SECONDS: Final = 5.0
# Sessions that are looked at one after the other, for comparison.
ALONE: Final = 1_000


class Silent(Connection):
    """A connection whose transport takes everything and says nothing."""

    __slots__ = ()

    def write(self, data: bytes) -> None:
        pass

    def write_one(self, payload: bytes) -> None:
        pass

    def end(self, code: int, reason: str) -> None:
        pass


async def run(plan: Plan, findings: Findings) -> None:
    users = [f"user-{n:05}" for n in range(plan.size(SESSIONS, 2_000))]

    async def make(fill: Fill) -> None:
        await fill.users(users)

    async with _gateway(make) as (core, gateway, postgres):
        auth = core.services.auth
        [app_id] = await _column(core, "SELECT id FROM apps")
        app = await core.services.apps.get(app_id)
        backend = backend_actor(app, "bench")
        connections = {}
        for user in users:
            token = (await auth.mint(backend, user, 3600)).token
            connection = connections[user] = Silent(gateway, "192.0.2.1", None)
            connection.app, connection.user = app.app, user
            connection.granted = await auth.authenticate(token)
            connection.actor = connection.granted.actor
            connection.session.state = State.OPEN
            gateway.connections.add(connection)
        for run in range(plan.runs):
            # Read one by one, as they used to be.
            auth.forget_all()
            began, cpu = time.perf_counter(), time.process_time()
            for user in users[:ALONE]:
                granted = connections[user].granted
                assert granted is not None
                await auth.recheck(granted)
            alone = len(users[:ALONE])
            findings.add("one by one: node's CPU per session", (time.process_time() - cpu) / alone * 1e6, "µs")
            findings.add("one by one: by the clock, per session", (time.perf_counter() - began) / alone * 1e6, "µs")
            # Revoked without a word, the one that is asked for last.
            gone = users[-1 - run]
            await _execute(core, "UPDATE users SET tokens_after=? WHERE id=?", core.services.clock.now_ms() * 2, gone)
            theirs, cpu, began = postgres.cpu_seconds(), time.process_time(), time.perf_counter()
            await gateway.changed_elsewhere()
            await _until(lambda gone=gone: connections[gone].ended)  # type: ignore[misc]
            count = len(gateway.connections)
            findings.add("until the last is shown out", time.perf_counter() - began, "s", at_most(WITHIN_SECONDS))
            findings.add("node's CPU per session", (time.process_time() - cpu) / count * 1e6, "µs")
            findings.add("PostgreSQL's CPU per session", (postgres.cpu_seconds() - theirs) / count * 1e6, "µs")
    findings.note(f"{len(users)} sessions of as many users on one node; one of them is revoked without a notice.")


async def run_healing(plan: Plan, findings: Findings) -> None:
    count = plan.size(STREAMS, 8_000)

    async def make(fill: Fill) -> None:
        await fill.users(["reader"])

    async with _gateway(make) as (core, gateway, postgres):
        # Streams are all that is looked at: no channels behind them.
        await _execute(
            core,
            "INSERT INTO streams(app,kind,ref,epoch,head,moved_at)"
            f" SELECT 1, 'channel', 'bench-'||i, 'e', 1, 1 FROM generate_series(1,{count}) AS n(i)",
        )
        sids = await _column(core, "SELECT sid FROM streams WHERE ref LIKE 'bench-%'")
        hub, nodes = gateway.hub, gateway.nodes
        assert nodes is not None
        reader = Silent(gateway, "192.0.2.1", None)
        reader.app, reader.user = 1, "reader"
        subscriber = hub.enter(reader)
        for sid in sids:
            hub.join(subscriber, sid, f"bench-{sid}", "e", 1)
        # What follows is the healing alone: the reader reads nothing.
        reader.ended = True
        nodes.start()
        await asyncio.sleep(3)  # why: the comparisons that come with following are over
        rng = random.Random(count)
        theirs, cpu, began = postgres.cpu_seconds(), time.process_time(), time.perf_counter()
        for _ in range(plan.size(12, 2)):
            sid = rng.choice(sids)
            head = hub.streams[sid].head + 1
            lost = time.perf_counter()
            await _execute(core, "UPDATE streams SET head=? WHERE sid=?", head, sid)
            await _until(lambda sid=sid, head=head: hub.streams[sid].head >= head)  # type: ignore[misc]
            findings.add("a lost last event found after", time.perf_counter() - lost, "s", at_most(WITHIN_SECONDS))
        seconds = time.perf_counter() - began
        findings.add("node's CPU, of a core", (time.process_time() - cpu) / seconds * 100, "%", at_most(10))
        findings.add("PostgreSQL's CPU, of a core", (postgres.cpu_seconds() - theirs) / seconds * 100, "%")
    findings.note(f"A node that follows {count} streams, of which one grows without a notice.")


@contextlib.asynccontextmanager
async def _gateway(make: Callable[[Fill], object]) -> AsyncIterator[tuple[Core, Gateway, PostgresProcess]]:
    with fresh_postgres() as postgres, scratch() as folder:
        async with NatsProcess(folder / "nats") as nats:
            await fill_store(folder / "server", make, store=postgres.url())  # type: ignore[arg-type]
            setup_logging(level="error", format="json", development=False)
            config = load_config(
                overrides={"data_dir": folder / "server", "store": postgres.url(), "bus": nats.url}, environ={}
            )
            clock = SystemClock()
            async with open_core(config, clock=clock) as core:
                gateway = Gateway(
                    core.services, core.bus, config, clock, core.services.ids, core.metrics, Limiter(Rate(1e6, 1e6))
                )
                yield core, gateway, postgres
                gateway.connections.clear()
                await gateway.drain(0)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.005)


async def _execute(core: Core, sql: str, *args: object) -> None:
    async def unit(tx: Tx) -> None:
        await tx.execute(sql, *args)

    await core.services.store.run(unit)


async def _column(core: Core, sql: str) -> list[int]:
    async def unit(tx: Tx) -> list[int]:
        return [row[0] for row in await tx.all(sql)]

    return await core.services.store.read(unit)
