"""Webhooks as jobs: a lane for each endpoint and channel, and notices about endpoints."""

from __future__ import annotations

from tidings.server.services.queue import Job
from tidings.server.services.webhooks import LANE, NOTICE, Webhooks
from tidings.server.store.base import Tx
from tidings.wire.codec import encode

from .worker import Again, Done, Kind, Outcome

# Lanes under way at once in one worker: most of the time they wait for answers.
LANES_MAX = 64
# What a lane waits for is not a failure of its job: it never dies of it.
NEVER = 1 << 30


def webhook_kinds(webhooks: Webhooks) -> list[Kind]:
    """The kinds of jobs that tell backends."""

    async def deliver(job: Job) -> Outcome:
        progress = await webhooks.deliver(job.app, job.key, job.payload or b"{}")
        if progress is None:
            return Done()

        async def unit(tx: Tx) -> None:
            await webhooks.end(tx, job.app, job.key, progress)

        payload = encode(progress.lane)
        if progress.due_at is None:
            return Done(payload=payload, unit=unit)
        # One that waits for its time is not brought forward by further events.
        return Again(due_at=progress.due_at, payload=payload, attempts=1 if progress.waits else 0, unit=unit)

    async def notify(job: Job) -> Outcome:
        attempts, due_at = await webhooks.notify(job.app, job.key, job.payload or b"{}", job.attempts)

        async def unit(tx: Tx) -> None:
            await webhooks.write(tx, job.app, attempts)

        return Done(unit=unit) if due_at is None else Again(due_at=due_at, attempts=job.attempts, unit=unit)

    return [
        Kind(LANE, deliver, concurrency=LANES_MAX, attempts_max=NEVER),
        Kind(NOTICE, notify, concurrency=4, attempts_max=NEVER),
    ]
