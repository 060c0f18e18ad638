"""How jobs are done: again until they work out, dead when they never do, and after any end exactly as it was
written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from tidings.server.clock import SystemClock
from tidings.server.jobs.housekeeping import housekeeping_kind, start_housekeeping
from tidings.server.jobs.worker import Again, Done, GiveUp, Kind, Pressure, Retry, Worker
from tidings.server.services.queue import Job, Put
from tidings.server.store.base import Tx
from tidings.server.tasks import Tasks

from .conftest import Desk


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)  # why: other tasks and threads bring it about


async def test_what_is_due_is_done_and_gone(desk: Desk) -> None:
    await desk.put(*(Put("work", key, 1) for key in "abc"))
    assert await desk.worker().run_due() == 3
    assert desk.done == ["a", "b", "c"]
    assert await desk.rows("SELECT 1 FROM jobs") == []


async def test_what_fails_waits_longer_each_time_and_is_dead_in_the_end(desk: Desk) -> None:
    async def fail(job: Job) -> None:
        desk.done.append(str(job.attempts))
        raise Retry("the other side is down")

    worker = desk.worker(fail, attempts_max=4, first_seconds=10, longest_seconds=30)
    await desk.work(payload=b"p")
    waits = []
    while await worker.run_due():
        due = await desk.queue.next_due(["work"])
        if due is not None:
            waits.append((due - desk.clock.now_ms()) / 1000)
            desk.clock.advance(waits[-1])
    assert desk.done == ["1", "2", "3", "4"]
    assert all(0 <= wait <= bound for wait, bound in zip(waits, (10, 20, 30), strict=True))
    (dead,) = await desk.queue.jobs(1, dead=True)
    assert (dead.error, dead.attempts, dead.payload) == ("the other side is down", 4, b"p")


async def test_when_to_come_back_may_be_said(desk: Desk) -> None:
    async def fail(_job: Job) -> None:
        raise Retry("slow down", after_seconds=77)

    await desk.work()
    await desk.worker(fail).run_due()
    assert await desk.queue.next_due(["work"]) == desk.clock.now_ms() + 77_000


async def test_what_can_never_work_out_is_dead_at_once_and_so_is_no_other(desk: Desk) -> None:
    async def some(job: Job) -> None:
        if job.key == "b":
            raise GiveUp("there is no such thing")
        if job.key == "c":
            raise ZeroDivisionError
        desk.done.append(job.key)

    await desk.put(*(Put("work", key, 1) for key in "abcd"))
    await desk.worker(some).run_due()
    assert desk.done == ["a", "d"]
    assert [job.key for job in await desk.queue.jobs(1, dead=True)] == ["b"]
    (waiting,) = await desk.queue.jobs(1, dead=False)
    assert (waiting.key, waiting.error) == ("c", "ZeroDivisionError (see the log)")


async def test_one_that_takes_too_long_is_ended(desk: Desk) -> None:
    async def hang(_job: Job) -> None:
        await asyncio.Event().wait()

    await desk.work()
    await desk.worker(hang, seconds_max=0.01).run_due()
    (job,) = await desk.queue.jobs(1, dead=False)
    assert job.error == "took longer than 0.01 s"


async def test_progress_is_kept_and_what_is_written_at_the_end_is_written_with_it(desk: Desk) -> None:
    async def step(job: Job) -> Again | Done:
        number = int(job.payload or b"0")
        desk.done.append(str(number))

        async def unit(tx: Tx) -> None:
            await tx.execute("INSERT INTO meta(name,value) VALUES (?,'')", f"step {number}")

        return Again(payload=b"%d" % (number + 1), unit=unit) if number < 2 else Done(unit=unit)

    await desk.work()
    assert await desk.worker(step).run_due() == 3
    assert desk.done == ["0", "1", "2"]
    assert len(await desk.rows("SELECT 1 FROM meta WHERE name LIKE 'step %'")) == 3


async def test_a_unit_that_fails_harms_only_its_own_job(desk: Desk) -> None:
    async def end(job: Job) -> Done:
        async def unit(tx: Tx) -> None:
            await tx.execute("INSERT INTO meta(name,value) VALUES (?,'')", f"end {job.key}")
            if job.key == "b":
                raise KeyError(job.key)

        return Done(unit=unit)

    await desk.put(*(Put("work", key, 1) for key in "abc"))
    await desk.worker(end).run_due()
    assert sorted(await desk.rows("SELECT name FROM meta WHERE name LIKE 'end %'")) == [("end a",), ("end c",)]
    (job,) = await desk.queue.jobs(1, dead=False)
    assert (job.key, job.error) == ("b", "KeyError while it was ended (see the log)")


async def test_running_it_takes_what_is_put_and_gives_back_what_it_could_not_end(desk: Desk) -> None:
    held = asyncio.Event()

    async def handle(job: Job) -> None:
        if job.key == "stuck":
            await held.wait()
        desk.done.append(job.key)

    worker = desk.worker(handle)
    tasks = Tasks("test")
    running = tasks.spawn(worker.run(), "worker")
    await desk.put(Put("work", "stuck", 1), *(Put("work", f"{number}", 1) for number in range(100)))
    worker.wake()

    async def all_done() -> bool:
        return len(desk.done) == 100 and len(await desk.rows("SELECT 1 FROM jobs")) == 1

    await until(all_done)
    running.cancel()
    await asyncio.wait({running})
    (job,) = await desk.claim()
    assert (job.key, job.attempts) == ("stuck", 1)


async def test_a_worker_that_is_woken_for_nothing_waits_again(desk: Desk) -> None:
    asked = 0
    real = desk.queue.next_due

    async def next_due(kinds: Sequence[str]) -> int | None:
        nonlocal asked
        asked += 1
        return await real(kinds)

    desk.queue.next_due = next_due  # type: ignore[method-assign]
    tasks = Tasks("test")
    workers = [desk.worker(), Worker(desk.queue, [], desk.clock, desk.metrics)]
    for worker in workers:
        tasks.spawn(worker.run(), "worker")
        worker.wake()
    began = SystemClock().monotonic()

    async def a_while_later() -> bool:
        return SystemClock().monotonic() - began > 0.3

    await until(a_while_later)
    await tasks.close()
    assert asked < 20


async def test_several_workers_do_everything_once(desk: Desk) -> None:
    await desk.put(*(Put("work", f"{number}", 1) for number in range(300)))
    tasks = Tasks("test")
    for _ in range(3):
        tasks.spawn(desk.worker(concurrency=8).run(), "worker")

    async def all_done() -> bool:
        return not await desk.rows("SELECT 1 FROM jobs")

    await until(all_done)
    await tasks.close()
    assert sorted(desk.done, key=int) == [str(number) for number in range(300)]


async def test_a_backlog_is_done_in_order(desk: Desk) -> None:
    now = desk.clock.now_ms()
    await desk.put(*(Put("work", f"{number:04}", 1, now - 1_000 + number) for number in range(600)))
    tasks = Tasks("test")
    tasks.spawn(desk.worker(concurrency=4).run(), "worker")

    async def all_done() -> bool:
        return len(desk.done) == 600

    await until(all_done)
    await tasks.close()
    assert desk.done == sorted(desk.done)


async def test_under_pressure_jobs_are_claimed_more_slowly(desk: Desk) -> None:
    """Claims of a handful with a pause between them: what is claimed at once is what may be under way at once."""
    pressure = Pressure()
    pressure.PAUSE_SECONDS = 0.05  # type: ignore[misc]
    for _ in range(2):
        pressure.told(1.0)
    assert (pressure.share, pressure.pause) == (0.25, pytest.approx(0.15))
    pressure.STEP = 0.0  # type: ignore[misc]
    await desk.put(*(Put("work", f"{number}", 1) for number in range(12)))
    tasks = Tasks("test")
    clock = SystemClock()
    began = clock.monotonic()
    tasks.spawn(desk.worker(concurrency=4, pressure=pressure).run(), "worker")

    async def all_done() -> bool:
        return len(desk.done) == 12

    await until(all_done)
    await tasks.close()
    # Three claims: two pauses at least.
    assert clock.monotonic() - began >= 0.3


def test_a_late_loop_and_many_messages_give_jobs_less_room_and_get_it_back() -> None:
    sent = 0
    pressure = Pressure(lambda: sent)
    for _ in range(10):
        pressure.told(0.05)
    assert pressure.share == Pressure.LEAST
    for _ in range(31):
        pressure.told(0.001)
        sent += Pressure.EVENTS_MAX
    assert pressure.share == 1.0
    sent += 1
    pressure.told(0.001)
    assert pressure.share == 0.5


@pytest.mark.sqlite
async def test_leases_are_renewed_while_a_job_takes_longer(desk: Desk) -> None:
    desk.queue._clock = clock = SystemClock()  # why: leases run out in real time here
    release = asyncio.Event()

    async def handle(job: Job) -> None:
        desk.done.append(job.key)
        await release.wait()

    kinds = [Kind("work", handle)]
    tasks = Tasks("test")
    await desk.put(Put("work", "a", 1, 1))
    for _ in range(2):
        tasks.spawn(Worker(desk.queue, kinds, clock, desk.metrics, lease_ms=300).run(), "worker")

    began = clock.monotonic()

    async def long_enough() -> bool:
        return clock.monotonic() - began > 1.0

    await until(long_enough)
    assert desk.done == ["a"]
    release.set()

    async def all_done() -> bool:
        return not await desk.rows("SELECT 1 FROM jobs")

    await until(all_done)
    await tasks.close()


async def test_logs_are_cut_back_and_it_goes_on(desk: Desk) -> None:
    now = desk.clock.now_ms()
    for at in (now - 8 * 86_400_000, now - 6 * 86_400_000):
        await desk.execute(
            'INSERT INTO push_log(app,sid,seq,"user",device,id,at,outcome,reason) VALUES (1,1,1,?,?,?,?,?,?)',
            *("u", "d", f"{at}", at, "skipped", "muted"),
        )
        await desk.execute(
            "INSERT INTO webhook_deliveries(app,webhook,id,message,type,at,attempt,outcome,milliseconds)"
            " VALUES (1,'w',?,'m','t',?,1,'failed',1)",
            *(f"{at}", at),
        )
    for _ in range(2):
        await start_housekeeping(desk.store, desk.clock)
    kind = housekeeping_kind(desk.store, desk.clock, 7)
    assert await Worker(desk.queue, [kind], desk.clock, desk.metrics).run_due() == 1
    for table in ("push_log", "webhook_deliveries"):
        assert await desk.rows(f"SELECT at FROM {table}") == [(now - 6 * 86_400_000,)]
    assert await desk.queue.next_due([kind.name]) == now + 3_600_000
