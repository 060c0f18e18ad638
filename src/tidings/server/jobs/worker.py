"""The worker: claims jobs that are due, has them done, and ends them.

Any number of workers may run on one store, in server processes or as `tidings worker`. A handler does its work
outside of any transaction and gives back how the job goes on; whatever it has to write (a log, a position, further
jobs) goes into the transaction that ends the claim, so that a crash leaves either all of it or a job that is done
once more. Hence *at least once*: what a handler does to the outside world must bear repeating.

In a server process jobs share event loop and store with everybody's messages. While many are sent, jobs are claimed
more slowly (`Pressure`): a backlog waits, a conversation does not.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, TypeAlias

from tidings.server.clock import Clock
from tidings.server.errors import StoreUnavailable
from tidings.server.services.queue import ERROR_CHARACTERS_MAX, Ending, Job, Queue, Unit
from tidings.server.tasks import Tasks
from tidings.server.telemetry import Metrics, get_logger

log = get_logger(__name__)

# How long a claim holds without being renewed, ms: so late somebody else takes over what a killed worker was at.
LEASE_MS: Final = 15_000
RENEW_SECONDS: Final = 5.0
# How often the queue is looked at when nothing is known to be due: other processes put jobs, too.
POLL_SECONDS: Final = 1.0
# Jobs claimed, and endings written, in one transaction.
CLAIM_MAX: Final = 256
ENDINGS_MAX: Final = 256
# How often the depth of the queue is counted for the metrics.
COUNT_SECONDS: Final = 15.0


class Retry(Exception):
    """It did not work out: again later, by the kind's back-off or after `after_seconds`. `detail` is shown to
    people."""

    def __init__(self, detail: str, *, after_seconds: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.after_seconds = after_seconds


class GiveUp(Exception):
    """It will never work out: the job is dead. `detail` is shown to people."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(slots=True, frozen=True)
class Done:
    """The job is done. `payload` is what it goes on with if it was put again meanwhile (None: what it had); `unit` is
    run in the transaction that ends it."""

    payload: bytes | None = None
    unit: Unit | None = None


@dataclass(slots=True, frozen=True)
class Again:
    """The job is to be done again at `due_at` (ms; 0: at once), with this payload (None: what it had).

    `attempts` 0 means progress: putting it again may bring it forward. With more it waits for its time.
    """

    due_at: int = 0
    payload: bytes | None = None
    attempts: int = 0
    error: str | None = None
    unit: Unit | None = None


Outcome: TypeAlias = Done | Again | None


@dataclass(slots=True, frozen=True)
class Kind:
    """A kind of job and how it is done.

    `concurrency` at once in one worker. A handler that takes longer than `seconds_max` is ended, which counts as a
    failure. After failure n it waits a random time up to `first_seconds`·2ⁿ⁻¹, at most `longest_seconds` (full jitter,
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/); after `attempts_max` it is dead.
    """

    name: str
    handle: Callable[[Job], Awaitable[Outcome]]
    concurrency: int = 16
    seconds_max: float = 60.0
    attempts_max: int = 12
    first_seconds: float = 2.0
    longest_seconds: float = 3_600.0


class Pressure:
    """How much room jobs get beside people's messages, from 1 down to `LEAST`: halved while many messages are sent or
    the event loop is late, and given back in small steps (additive increase, multiplicative decrease, as TCP does:
    RFC 5681).

    `sent` tells how many events this process has published since it began.
    """

    EVERY_SECONDS: Final = 0.020
    # A thousand events a second: from there on the store's writer is busy enough that each job delays somebody.
    EVENTS_MAX: Final = 20
    # A loop that is full of sends is late by a batch of them, about 20 ms.
    LATE_SECONDS: Final = 0.010
    LEAST: Final = 1 / 32
    STEP: Final = 1 / 32
    PAUSE_SECONDS: Final = 0.005

    def __init__(self, sent: Callable[[], int] = lambda: 0) -> None:
        self.share = 1.0
        self._sent = sent
        self._before = sent()

    @property
    def pause(self) -> float:
        """Seconds between two claims: none while there is no pressure, a sixth of one under the highest."""
        return (1 / self.share - 1) * self.PAUSE_SECONDS

    def told(self, late_seconds: float) -> None:
        """A timer that fires every `EVERY_SECONDS` fired so late."""
        sent = self._sent()
        if late_seconds > self.LATE_SECONDS or sent - self._before > self.EVENTS_MAX:
            self.share = max(self.LEAST, self.share / 2)
        else:
            self.share = min(1.0, self.share + self.STEP)
        self._before = sent


class Worker:
    """Does jobs of some kinds until it is closed."""

    def __init__(
        self,
        queue: Queue,
        kinds: Iterable[Kind],
        clock: Clock,
        metrics: Metrics,
        *,
        random: Random | None = None,
        pressure: Pressure | None = None,
        lease_ms: int = LEASE_MS,
    ) -> None:
        """`pressure`: where the loop is shared with more important work."""
        self._queue = queue
        self._kinds = {kind.name: kind for kind in kinds}
        self._clock = clock
        self._metrics = metrics
        self._random = random or Random()
        self._pressure = pressure
        self._lease_ms = lease_ms
        self._running: dict[int, Job] = {}
        self._counts: Counter[str] = Counter()
        self._endings: list[Ending] = []
        self._ended = asyncio.Event()
        self._wake = asyncio.Event()
        self._tasks = Tasks("jobs")

    # ------------------------------------------------------------ for ever

    async def run(self) -> None:
        """Work until cancelled; what is under way then goes back to the queue."""
        for work, name in (
            (self._end_for_ever(), "endings"),
            (self._renew_for_ever(), "leases"),
            (self._count_for_ever(), "depth"),
        ):
            self._tasks.spawn(work, name)
        if self._pressure is not None:
            self._tasks.spawn(self._feel_for_ever(self._pressure), "pressure")
        try:
            while True:
                # Before looking: what is put from here on wakes us again.
                self._wake.clear()
                claimed = 0
                try:
                    claimed = await self._claim()
                    pause = 0.0 if claimed else await self._pause()
                except StoreUnavailable:
                    pause = POLL_SECONDS
                if self._pressure is not None and claimed:
                    await asyncio.sleep(self._pressure.pause)
                # Others have their turn in between, also where the store answers without waiting.
                await self._wait(pause) if pause else await asyncio.sleep(0)
        finally:
            await self._close()

    def wake(self) -> None:
        """Jobs have been put: look at once."""
        self._wake.set()

    async def run_due(self, *, jobs_max: int = 10_000) -> int:
        """Do what is due now, and what becomes due through that, then return how many jobs that were. For tests and
        commands: nothing else of this worker may run meanwhile."""
        done = 0
        while done < jobs_max:
            claimed = await self._queue.claim({name: CLAIM_MAX for name in self._kinds}, self._lease_ms)
            if not claimed:
                return done
            endings = [await self._do(job) for job in claimed]
            await self._write(endings)
            done += len(claimed)
        return done

    async def _claim(self) -> int:
        self._metrics.jobs_share.value = 1.0 if self._pressure is None else self._pressure.share
        wanted = {}
        for kind in self._kinds.values():
            free = kind.concurrency - self._counts[kind.name]
            # In handfuls: a claim is a transaction.
            if free > 0 and free * 4 >= kind.concurrency:
                wanted[kind.name] = min(free, CLAIM_MAX)
        if not wanted:
            return 0
        due = await self._queue.next_due(list(wanted))
        if due is None or due > self._clock.now_ms():
            return 0
        claimed = await self._queue.claim(wanted, self._lease_ms)
        for job in claimed:
            self._running[job.id] = job
            self._counts[job.kind] += 1
            self._tasks.spawn(self._handle(job), f"job {job.kind}")
        return len(claimed)

    async def _pause(self) -> float:
        """How long nothing will be due, seconds."""
        due = await self._queue.next_due(list(self._kinds))
        if due is None:
            return POLL_SECONDS
        # What is overdue waits for room, which wakes us.
        ahead = (due - self._clock.now_ms()) / 1000
        return POLL_SECONDS if ahead <= 0 else min(POLL_SECONDS, max(0.005, ahead))

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    # ------------------------------------------------------------ one job

    async def _handle(self, job: Job) -> None:
        ending = await self._do(job)
        self._endings.append(ending)
        self._ended.set()

    async def _do(self, job: Job) -> Ending:
        """Do a job; how it ends. Raises only what cancels."""
        kind = self._kinds[job.kind]
        began = self._clock.monotonic()
        failure: str
        after: float | None = None
        dead = False
        try:
            async with asyncio.timeout(kind.seconds_max):
                outcome = await kind.handle(job)
        except GiveUp as error:
            failure, dead = error.detail, True
        except Retry as error:
            failure, after = error.detail, error.after_seconds
        except TimeoutError:
            failure = f"took longer than {kind.seconds_max:g} s"
        except StoreUnavailable:
            failure = "the store was not available"
        except Exception as error:
            log.error("job_failed", kind=job.kind, job=job.id, attempt=job.attempts, exc_info=error)
            failure = f"{type(error).__name__} (see the log)"
        else:
            self._count(job, began, "again" if isinstance(outcome, Again) else "done")
            return self._ending(job, outcome)
        dead = dead or job.attempts >= kind.attempts_max
        self._count(job, began, "dead" if dead else "failed")
        if dead:
            log.error("job_dead", kind=job.kind, job=job.id, app=job.app, attempts=job.attempts, why=failure)
            return Ending(job, payload=job.payload, error=failure[:ERROR_CHARACTERS_MAX], dead=True)
        if after is None:
            after = self._random.uniform(0, min(kind.longest_seconds, kind.first_seconds * 2 ** (job.attempts - 1)))
        return Ending(
            job,
            due_at=self._clock.now_ms() + round(after * 1000),
            payload=job.payload,
            attempts=job.attempts,
            error=failure[:ERROR_CHARACTERS_MAX],
        )

    def _ending(self, job: Job, outcome: Outcome) -> Ending:
        match outcome:
            case None:
                return Ending(job, payload=job.payload)
            case Done(payload=payload, unit=unit):
                return Ending(job, payload=job.payload if payload is None else payload, unit=unit)
            case Again():
                return Ending(
                    job,
                    due_at=outcome.due_at or self._clock.now_ms(),
                    payload=job.payload if outcome.payload is None else outcome.payload,
                    attempts=outcome.attempts,
                    error=outcome.error,
                    unit=outcome.unit,
                )

    def _count(self, job: Job, began: float, outcome: str) -> None:
        self._metrics.jobs_ended.labels(job.kind, outcome).value += 1
        self._metrics.job_seconds.labels(job.kind).observe(self._clock.monotonic() - began)

    # ------------------------------------------------------------ endings

    async def _end_for_ever(self) -> None:
        while True:
            await self._ended.wait()
            self._ended.clear()
            while self._endings:
                batch = self._endings[:ENDINGS_MAX]
                try:
                    await self._write(batch)
                except StoreUnavailable:
                    # They are held as long as the leases are renewed, which fails, too, meanwhile.
                    await asyncio.sleep(POLL_SECONDS)  # why: nobody tells when a store comes back
                    continue
                del self._endings[: len(batch)]
                for ending in batch:
                    self._forget(ending.job)
                self._wake.set()

    async def _write(self, endings: Sequence[Ending]) -> None:
        """End claims; if a unit of one fails, the others' are ended all the same, and it is tried again later. Raises
        StoreUnavailable."""
        try:
            await self._queue.end(endings)
        except StoreUnavailable:
            raise
        except Exception as error:
            if len(endings) > 1:
                for ending in endings:
                    await self._write([ending])
                return
            job = endings[0].job
            log.error("job_not_ended", kind=job.kind, job=job.id, exc_info=error)
            kind = self._kinds[job.kind]
            await self._queue.end(
                [
                    Ending(
                        job,
                        due_at=self._clock.now_ms() + round(kind.longest_seconds * 1000),
                        payload=job.payload,
                        attempts=job.attempts,
                        error=f"{type(error).__name__} while it was ended (see the log)",
                        dead=job.attempts >= kind.attempts_max,
                    )
                ]
            )

    def _forget(self, job: Job) -> None:
        if self._running.pop(job.id, None) is not None:
            self._counts[job.kind] -= 1

    # ------------------------------------------------------------ beside it

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(min(RENEW_SECONDS, self._lease_ms / 3000))
            if self._running:
                try:
                    await self._queue.renew(list(self._running.values()), self._lease_ms)
                except StoreUnavailable:
                    continue

    async def _count_for_ever(self) -> None:
        while True:
            try:
                found = await self._queue.depth()
            except StoreUnavailable:
                pass
            else:
                now = self._clock.now_ms()
                for kind in {*self._kinds, *found}:
                    depth = found.get(kind)
                    self._metrics.jobs_waiting.labels(kind).value = depth.waiting if depth else 0
                    self._metrics.jobs_dead.labels(kind).value = depth.dead if depth else 0
                    late = (now - depth.oldest) / 1000 if depth and depth.oldest is not None else 0.0
                    self._metrics.jobs_overdue.labels(kind).value = late
            await asyncio.sleep(COUNT_SECONDS)

    async def _feel_for_ever(self, pressure: Pressure) -> None:
        while True:
            began = self._clock.monotonic()
            await asyncio.sleep(pressure.EVERY_SECONDS)
            before = pressure.share
            pressure.told(self._clock.monotonic() - began - pressure.EVERY_SECONDS)
            if pressure.share > before:
                self._wake.set()

    async def _close(self) -> None:
        """Let go: what was done is written, what was not goes back."""
        await self._tasks.close()
        endings, self._endings = self._endings, []
        for ending in endings:
            self._running.pop(ending.job.id, None)
        try:
            if endings:
                await self._write(endings)
            await self._queue.release(list(self._running.values()))
        except StoreUnavailable:
            # Their leases end by themselves.
            log.warning("jobs_not_released", count=len(self._running))
        self._running.clear()
        self._counts.clear()
