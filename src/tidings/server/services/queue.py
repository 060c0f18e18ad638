"""The queue of jobs: work that is done later, at least once, by one at a time.

Whoever wants something done puts a job into the transaction of what makes it necessary (`put`), so that neither is
there without the other. A job has a key: of a kind, an app and a key there is one. Putting it again while it waits is
no second job; while it is being done, it is done once more afterwards. So a job says *look after this*, and finds out
itself what there is to do: nothing is lost when several reasons come together, and nothing is queued twice.

A claim is a lease: the job's time moves to the lease's end, and the job falls to the next who asks if it is not ended
or renewed by then. Every claim has a number, and only the claim that holds the job can end it: what a worker that was
away for too long writes at the end is not written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from tidings.server.clock import Clock, Ids
from tidings.server.store.base import Row, Store, Tx
from tidings.server.store.log import placeholders

URGENT: Final = 0
NORMAL: Final = 1
BULK: Final = 2
PRIORITIES: Final = (URGENT, NORMAL, BULK)

# An error is shown to people: a sentence or two.
ERROR_CHARACTERS_MAX: Final = 500
# Identifiers and positions. What is larger belongs into a table of its own.
PAYLOAD_BYTES_MAX: Final = 16_384
# Dead jobs that are put back by one request: so long their rows are locked.
REPLAY_MAX: Final = 1_000

_JOB: Final = "id,app,kind,key,priority,due_at,attempts,payload,error,created_at,dead_at"

Unit: TypeAlias = Callable[[Tx], Awaitable[None]]


@dataclass(slots=True, frozen=True)
class Put:
    """A job to be done. `due_at` is ms, 0: at once. `payload` holds identifiers, never content. `app` 0: of no app."""

    kind: str
    key: str
    app: int = 0
    due_at: int = 0
    priority: int = NORMAL
    payload: bytes | None = None


@dataclass(slots=True, frozen=True)
class Job:
    """A claimed job. `attempts` counts this one."""

    id: int
    app: int
    kind: str
    key: str
    priority: int
    due_at: int
    attempts: int
    payload: bytes | None
    created_at: int
    lease: int


@dataclass(slots=True, frozen=True)
class Ending:
    """How a claim ends: done, or again at `due_at`, or dead.

    `payload` and `attempts` are what it goes on with; for a job that is done they count when it was put again
    meanwhile. `unit` is run in the same transaction, and not at all if the claim has fallen to somebody else.
    """

    job: Job
    due_at: int | None = None
    payload: bytes | None = None
    attempts: int = 0
    error: str | None = None
    dead: bool = False
    unit: Unit | None = None


@dataclass(slots=True, frozen=True)
class StoredJob:
    """A row of `jobs`, for people. Times in ms."""

    id: int
    app: int
    kind: str
    key: str
    priority: int
    due_at: int
    attempts: int
    payload: bytes | None = field(repr=False)
    error: str | None
    created_at: int
    dead_at: int | None


@dataclass(slots=True, frozen=True)
class Depth:
    """How many jobs of a kind wait, are being done, and are dead; since when (ms) the oldest is overdue."""

    waiting: int = 0
    claimed: int = 0
    dead: int = 0
    oldest: int | None = None


async def put(tx: Tx, puts: Sequence[Put], *, now: int) -> None:
    """Put jobs, in the transaction of what makes them necessary. `now` is the present, ms.

    One that waits already keeps its payload and takes the earlier time, unless it waits for another try; one that is
    being done is done again afterwards; a dead one lives again. Locks rows in the order of their keys.
    """
    await tx.many(
        "INSERT INTO jobs(app,kind,key,priority,due_at,payload,created_at) VALUES (?,?,?,?,?,?,?)"
        " ON CONFLICT (kind,app,key) DO UPDATE SET"
        " due_at=CASE WHEN jobs.dead_at IS NOT NULL THEN excluded.due_at"
        " WHEN jobs.lease<>0 OR jobs.attempts>0 OR jobs.due_at<excluded.due_at THEN jobs.due_at"
        " ELSE excluded.due_at END,"
        " rearmed=CASE WHEN jobs.lease=0 OR jobs.dead_at IS NOT NULL THEN 0"
        " WHEN jobs.rearmed>0 AND jobs.rearmed<excluded.due_at THEN jobs.rearmed ELSE excluded.due_at END,"
        " attempts=CASE WHEN jobs.dead_at IS NOT NULL THEN 0 ELSE jobs.attempts END,"
        " priority=CASE WHEN excluded.priority<jobs.priority THEN excluded.priority ELSE jobs.priority END,"
        " dead_at=NULL",
        [
            (one.app, one.kind, one.key, one.priority, one.due_at or now, one.payload, now)
            for one in sorted(puts, key=_order)
        ],
    )


def _order(one: Put) -> tuple[str, int, str]:
    return one.kind, one.app, one.key


async def cancel(tx: Tx, kind: str, app: int, key: str) -> bool:
    """Take a job away, whatever state it is in; whether there was one. A claim that is under way cannot end any
    more."""
    return await tx.execute("DELETE FROM jobs WHERE kind=? AND app=? AND key=?", kind, app, key) > 0


async def cancel_beginning(tx: Tx, kind: str, app: int, prefix: str) -> int:
    """Take every job of an app away whose key begins so; how many there were."""
    return await tx.execute(
        "DELETE FROM jobs WHERE kind=? AND app=? AND key>=? AND key<?", kind, app, prefix, prefix + "\U0010ffff"
    )


class Queue:
    """Claims, ends and shows jobs."""

    def __init__(self, store: Store, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids

    # ------------------------------------------------------------ working

    async def next_due(self, kinds: Sequence[str]) -> int | None:
        """When the first job of these kinds is due, ms; None if there is none."""

        async def unit(tx: Tx) -> int | None:
            found: int | None = None
            for kind in kinds:
                for priority in PRIORITIES:
                    row = await tx.one(
                        "SELECT min(due_at) FROM jobs WHERE kind=? AND priority=? AND dead_at IS NULL", kind, priority
                    )
                    if row is not None and row[0] is not None and (found is None or row[0] < found):
                        found = int(row[0])
            return found

        return await self._store.glance(unit)

    async def claim(self, wanted: dict[str, int], lease_ms: int) -> list[Job]:
        """Claim due jobs, at most so many of each kind: the urgent ones first, of one priority the longest due
        first."""
        lease = int.from_bytes(self._ids.random_bytes(7)) or 1

        async def unit(tx: Tx) -> list[Job]:
            now = self._clock.now_ms()
            rows: list[Row] = []
            for kind, limit in wanted.items():
                room = limit
                for priority in PRIORITIES:
                    if room > 0:
                        some = await tx.all(
                            "SELECT id,app,kind,key,priority,due_at,attempts,payload,created_at FROM jobs"
                            " WHERE kind=? AND priority=? AND dead_at IS NULL AND due_at<=?"
                            f" ORDER BY due_at, id LIMIT ?{tx.claiming}",
                            kind,
                            priority,
                            now,
                            room,
                        )
                        room -= len(some)
                        rows += some
            if rows:
                await tx.execute(
                    "UPDATE jobs SET lease=?, due_at=?, attempts=attempts+1, rearmed=0"
                    f" WHERE id IN ({placeholders(rows)})",
                    lease,
                    now + lease_ms,
                    *(row[0] for row in rows),
                )
            return [
                Job(id, app, kind, key, priority, due_at, attempts + 1, payload, created_at, lease)
                for id, app, kind, key, priority, due_at, attempts, payload, created_at in rows
            ]

        return await self._store.run(unit)

    async def renew(self, jobs: Sequence[Job], lease_ms: int) -> None:
        """Hold claims for longer. One that has fallen to somebody else stays theirs."""

        async def unit(tx: Tx) -> None:
            until = self._clock.now_ms() + lease_ms
            for job in sorted(jobs, key=lambda job: job.id):
                await tx.execute("UPDATE jobs SET due_at=? WHERE id=? AND lease=?", until, job.id, job.lease)

        await self._store.run(unit)

    async def end(self, endings: Sequence[Ending]) -> list[bool]:
        """End claims in one transaction; of each, whether it still held. What a unit raises is raised, and nothing is
        ended."""

        async def unit(tx: Tx) -> list[bool]:
            now = self._clock.now_ms()
            ids = [ending.job.id for ending in endings]
            rows = await tx.all(
                f"SELECT id,lease,rearmed FROM jobs WHERE id IN ({placeholders(ids)})"
                f" ORDER BY kind,app,key{tx.for_update}",
                *ids,
            )
            held = {row[0]: row for row in rows}
            over: list[tuple[int, int]] = []
            later: list[tuple[int | bytes | str | None, ...]] = []
            results = []
            for ending in endings:
                row = held.get(ending.job.id)
                if row is None or row[1] != ending.job.lease:
                    results.append(False)
                    continue
                results.append(True)
                if ending.unit is not None:
                    await ending.unit(tx)
                rearmed, held_by = row[2], (ending.job.id, ending.job.lease)
                if ending.dead:
                    later.append((now, ending.job.attempts, ending.payload, ending.error, now, *held_by))
                elif ending.due_at is not None:
                    due = min(ending.due_at, rearmed) if rearmed and not ending.attempts else ending.due_at
                    later.append((due, ending.attempts, ending.payload, ending.error, None, *held_by))
                elif rearmed:
                    later.append((rearmed, 0, ending.payload, None, None, *held_by))
                else:
                    over.append(held_by)
            if over:
                # By the lease, too: a unit may have taken the job away and put another, which gets its number.
                await tx.many("DELETE FROM jobs WHERE id=? AND lease=?", over)
            if later:
                await tx.many(
                    "UPDATE jobs SET lease=0, rearmed=0, due_at=?, attempts=?, payload=?, error=?, dead_at=?"
                    " WHERE id=? AND lease=?",
                    later,
                )
            return results

        return await self._store.run(unit)

    async def release(self, jobs: Sequence[Job]) -> None:
        """Give claims back as if they had never been made: others may have the jobs at once."""

        async def unit(tx: Tx) -> None:
            for job in sorted(jobs, key=lambda job: job.id):
                await tx.execute(
                    "UPDATE jobs SET lease=0, due_at=?, rearmed=0, attempts=attempts-1 WHERE id=? AND lease=?",
                    job.due_at,
                    job.id,
                    job.lease,
                )

        if jobs:
            await self._store.run(unit)

    # ------------------------------------------------------------ looking

    async def depth(self) -> dict[str, Depth]:
        """How many jobs there are, by kind."""

        async def unit(tx: Tx) -> dict[str, Depth]:
            now = self._clock.now_ms()
            live = await tx.all(
                "SELECT kind, count(*), sum(CASE WHEN lease<>0 AND due_at>? THEN 1 ELSE 0 END),"
                " min(CASE WHEN due_at<=? THEN due_at END) FROM jobs WHERE dead_at IS NULL GROUP BY kind",
                now,
                now,
            )
            rows = await tx.all("SELECT kind, count(*) FROM jobs WHERE dead_at IS NOT NULL GROUP BY kind")
            dead: dict[str, int] = {kind: count for kind, count in rows}
            found = {
                kind: Depth(count - claimed, claimed, dead.pop(kind, 0), oldest)
                for kind, count, claimed, oldest in live
            }
            return found | {kind: Depth(dead=count) for kind, count in dead.items()}

        return await self._store.read(unit)

    async def jobs(
        self, app: int | None, *, dead: bool, kind: str | None = None, after: int = 0, limit: int = 50
    ) -> list[StoredJob]:
        """Jobs by id, those of one app or (None) all: the dead, or the living."""

        async def unit(tx: Tx) -> list[StoredJob]:
            conditions = ["id>?", "dead_at IS NOT NULL" if dead else "dead_at IS NULL"]
            args: list[int | str] = [after]
            if app is not None:
                conditions.append("app=?")
                args.append(app)
            if kind is not None:
                conditions.append("kind=?")
                args.append(kind)
            rows = await tx.all(
                f"SELECT {_JOB} FROM jobs WHERE {' AND '.join(conditions)} ORDER BY id LIMIT ?", *args, limit
            )
            return [StoredJob(*row) for row in rows]

        return await self._store.read(unit)

    async def replay(self, tx: Tx, app: int | None, *, id: int | None = None, kind: str | None = None) -> int:
        """Let dead jobs live again, due at once and with all their attempts: one, those of a kind, or all, at most
        `REPLAY_MAX`; how many. `app` None: of every app."""
        conditions, args = _dead(app, id, kind)
        now = self._clock.now_ms()
        return await tx.execute(
            "UPDATE jobs SET dead_at=NULL, lease=0, attempts=0, due_at=? WHERE id IN"
            f" (SELECT id FROM jobs WHERE {conditions} ORDER BY id LIMIT ?)",
            now,
            *args,
            REPLAY_MAX,
        )

    async def drop(self, tx: Tx, app: int | None, *, id: int | None = None, kind: str | None = None) -> int:
        """Give dead jobs up for good, as `replay` takes them; how many."""
        conditions, args = _dead(app, id, kind)
        return await tx.execute(
            f"DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE {conditions} ORDER BY id LIMIT ?)",
            *args,
            REPLAY_MAX,
        )


def _dead(app: int | None, id: int | None, kind: str | None) -> tuple[str, list[int | str]]:
    conditions = ["dead_at IS NOT NULL"]
    args: list[int | str] = []
    for column, value in (("app", app), ("id", id), ("kind", kind)):
        if value is not None:
            conditions.append(f"{column}=?")
            args.append(value)
    return " AND ".join(conditions), args
