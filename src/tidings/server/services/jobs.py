"""What an app's people see of its jobs: what waits, what was given up and why, and another try."""

from __future__ import annotations

from typing import Final, Literal

from tidings.server.clock import Clock, Ids
from tidings.server.domain.permissions import Permission
from tidings.server.errors import NotFound
from tidings.server.store.base import Store, Tx
from tidings.wire import limits
from tidings.wire.ids import time_of
from tidings.wire.resources import Job, JobsRetried

from .access import Actor
from .audit import Action, Line, line_id, line_of
from .paging import make_cursor, read_cursor
from .queue import Queue, StoredJob

P = Permission
_PREFIX: Final = "job_"


class Jobs:
    """Use-cases of jobs. All need `job.manage`."""

    def __init__(self, store: Store, queue: Queue, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._queue = queue
        self._clock = clock
        self._ids = ids

    async def list(
        self,
        actor: Actor,
        *,
        state: Literal["dead", "waiting"] = "dead",
        kind: str | None = None,
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
    ) -> tuple[list[Job], str | None]:
        """The app's jobs, the oldest first, and the cursor of the next page."""
        actor.check(P.JOB_MANAGE)
        listing = ["jobs", state, kind]
        after = 0 if cursor is None else read_cursor(actor.app, listing, cursor, tuple[int])[0]
        rows = await self._queue.jobs(actor.app.app, dead=state == "dead", kind=kind, after=after, limit=limit + 1)
        more = make_cursor(actor.app, listing, [rows[limit - 1].id]) if len(rows) > limit else None
        return [render_job(row) for row in rows[:limit]], more

    async def retry(self, actor: Actor, job: str | None = None, kind: str | None = None) -> JobsRetried:
        """Let dead jobs live again: one, those of a kind, or all, the oldest thousand. Raises NotFound."""
        actor.check(P.JOB_MANAGE)
        line = self._line(actor, Action.JOBS_RETRIED, job, kind)

        async def unit(tx: Tx) -> int:
            count = await self._queue.replay(tx, actor.app.app, id=_number(job), kind=kind)
            if job is not None and not count:
                raise NotFound("job")
            await line.write(tx)
            return count

        return JobsRetried(count=await self._store.run(unit))

    async def drop(self, actor: Actor, job: str) -> None:
        """Give a dead job up for good. Raises NotFound."""
        actor.check(P.JOB_MANAGE)
        line = self._line(actor, Action.JOB_DROPPED, job, None)

        async def unit(tx: Tx) -> None:
            if not await self._queue.drop(tx, actor.app.app, id=_number(job)):
                raise NotFound("job")
            await line.write(tx)

        await self._store.run(unit)

    def _line(self, actor: Actor, action: Action, job: str | None, kind: str | None) -> Line:
        return line_of(actor, action, f"job:{job or kind or '*'}", line_id(self._ids), self._clock.now_ms())


def render_job(job: StoredJob) -> Job:
    """A job as people see it."""
    return Job(
        id=f"{_PREFIX}{job.id}",
        kind=job.kind,
        state="waiting" if job.dead_at is None else "dead",
        due_at=time_of(job.due_at),
        attempts=job.attempts,
        error=job.error,
        created_at=time_of(job.created_at),
        died_at=None if job.dead_at is None else time_of(job.dead_at),
    )


def _number(job: str | None) -> int | None:
    if job is None:
        return None
    digits = job.removeprefix(_PREFIX)
    # What cannot be a number of ours is the number of none.
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else 0
