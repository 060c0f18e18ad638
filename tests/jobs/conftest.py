"""A queue and a worker over a real store, in a time that the tests move."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.postgres import open_store
from tidings.server.bus.local import LocalBus
from tidings.server.clock import Ids, ManualClock
from tidings.server.jobs.worker import Kind, Outcome, Worker
from tidings.server.services.queue import Job, Put, Queue, put
from tidings.server.store.base import Row, Store, Tx
from tidings.server.telemetry import Metrics


@dataclass
class Desk:
    """Where jobs are put and done."""

    store: Store
    clock: ManualClock
    queue: Queue
    bus: LocalBus
    metrics: Metrics
    done: list[str] = field(default_factory=list)

    async def put(self, *puts: Put) -> None:
        async def unit(tx: Tx) -> None:
            await put(tx, puts, now=self.clock.now_ms())

        await self.store.run(unit)

    async def work(self, key: str = "a", **more: Any) -> None:
        await self.put(Put("work", key, 1, **more))

    async def rows(self, sql: str, *args: Any) -> Sequence[Row]:
        async def unit(tx: Tx) -> Sequence[Row]:
            return await tx.all(sql, *args)

        return await self.store.read(unit)

    async def execute(self, sql: str, *args: Any) -> None:
        async def unit(tx: Tx) -> None:
            await tx.execute(sql, *args)

        await self.store.run(unit)

    async def note(self, job: Job) -> None:
        self.done.append(job.key)

    def worker(self, handle: Callable[[Job], Awaitable[Outcome]] | None = None, **more: Any) -> Worker:
        worker_options = {name: more.pop(name) for name in ("pressure", "lease_ms") if name in more}
        kind = Kind("work", handle or self.note, **more)
        return Worker(self.queue, [kind], self.clock, self.metrics, random=Random(1), **worker_options)

    async def claim(self, limit: int = 10, lease_ms: int = 1_000) -> list[Job]:
        return await self.queue.claim({"work": limit}, lease_ms)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    store = await open_store(tmp_path)
    clock = ManualClock()
    yield Desk(store, clock, Queue(store, clock, Ids(clock)), LocalBus(), Metrics())
    await store.close()
