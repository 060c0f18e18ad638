"""Jobs in the store: one per key, claimed by one at a time, never lost."""

from __future__ import annotations

import asyncio

import pytest

from tidings.server.services.queue import BULK, URGENT, Ending, Put, cancel, cancel_beginning, put
from tidings.server.store.base import Tx

from .conftest import Desk


async def test_a_job_put_twice_is_done_once(desk: Desk) -> None:
    await desk.work(payload=b"first")
    await desk.work(payload=b"second")
    jobs = await desk.claim()
    assert [(job.key, job.payload, job.attempts) for job in jobs] == [("a", b"first", 1)]
    assert await desk.queue.end([Ending(jobs[0])]) == [True]
    assert await desk.rows("SELECT 1 FROM jobs") == []


async def test_put_in_a_transaction_that_fails_there_is_none(desk: Desk) -> None:
    async def unit(tx: Tx) -> None:
        await tx.execute(
            "INSERT INTO jobs(app,kind,key,due_at,created_at) VALUES (1,'work','a',0,0)",
        )
        raise KeyError("no")

    with pytest.raises(KeyError):
        await desk.store.run(unit)
    assert await desk.claim() == []


async def test_the_earlier_time_counts(desk: Desk) -> None:
    now = desk.clock.now_ms()
    await desk.work(due_at=now + 5_000)
    await desk.work(due_at=now + 2_000)
    await desk.work(due_at=now + 9_000)
    assert await desk.queue.next_due(["work"]) == now + 2_000
    assert await desk.claim() == []
    desk.clock.advance(2)
    assert len(await desk.claim()) == 1


async def test_a_job_that_waits_for_another_try_is_not_brought_forward(desk: Desk) -> None:
    await desk.work()
    (job,) = await desk.claim()
    later = desk.clock.now_ms() + 60_000
    await desk.queue.end([Ending(job, due_at=later, attempts=1, error="no answer")])
    await desk.work()
    assert await desk.queue.next_due(["work"]) == later


async def test_put_while_it_is_done_it_is_done_once_more(desk: Desk) -> None:
    await desk.work(payload=b"1")
    (job,) = await desk.claim()
    await desk.work(payload=b"2")
    await desk.work(payload=b"3")
    assert await desk.claim() == []
    await desk.queue.end([Ending(job, payload=b"where it got to")])
    (again,) = await desk.claim()
    assert (again.payload, again.attempts) == (b"where it got to", 1)
    await desk.queue.end([Ending(again)])
    assert await desk.claim() == []


async def test_put_for_later_while_it_is_done_it_is_done_then(desk: Desk) -> None:
    await desk.work()
    (job,) = await desk.claim()
    now = desk.clock.now_ms()
    await desk.work(due_at=now + 7_000)
    await desk.work(due_at=now + 3_000)
    await desk.queue.end([Ending(job, due_at=now + 5_000)])
    assert await desk.queue.next_due(["work"]) == now + 3_000


async def test_a_claim_falls_to_the_next_when_its_lease_is_over_and_can_end_nothing_then(desk: Desk) -> None:
    await desk.work()
    (job,) = await desk.claim(lease_ms=1_000)
    desk.clock.advance(0.9)
    await desk.queue.renew([job], 1_000)
    desk.clock.advance(0.9)
    assert await desk.claim() == []
    desk.clock.advance(0.2)
    (taken,) = await desk.claim()
    assert (taken.id, taken.attempts) == (job.id, 2)

    async def unit(tx: Tx) -> None:
        await tx.execute("INSERT INTO meta(name,value) VALUES ('written','late')")

    assert await desk.queue.end([Ending(job, unit=unit)]) == [False]
    await desk.queue.renew([job], 1_000_000)
    await desk.queue.release([job])
    assert await desk.rows("SELECT value FROM meta WHERE name='written'") == []
    assert await desk.claim() == []
    assert await desk.queue.end([Ending(taken, unit=unit)]) == [True]
    assert await desk.rows("SELECT value FROM meta WHERE name='written'") == [("late",)]


async def test_what_is_given_back_is_there_at_once_and_counts_for_nothing(desk: Desk) -> None:
    await desk.work()
    await desk.queue.release(await desk.claim())
    (job,) = await desk.claim()
    assert job.attempts == 1


async def test_urgent_ones_first_and_then_the_longest_due(desk: Desk) -> None:
    now = desk.clock.now_ms()
    await desk.put(
        Put("work", "bulk", 1, now - 9, BULK),
        Put("work", "late", 1, now - 1),
        Put("work", "early", 1, now - 5),
        Put("work", "urgent", 1, now, URGENT),
        Put("other", "x", 1, now - 99),
    )
    assert [job.key for job in await desk.claim(3)] == ["urgent", "early", "late"]
    assert [job.key for job in await desk.claim(3)] == ["bulk"]


async def test_many_who_claim_at_once_never_get_the_same(desk: Desk) -> None:
    await desk.put(*(Put("work", f"{number:03}", 1) for number in range(200)))
    claims = await asyncio.gather(*(desk.claim(20, 60_000) for _ in range(12)))
    keys = [job.key for jobs in claims for job in jobs]
    assert len(keys) == len(set(keys))
    while more := await desk.claim(50, 60_000):
        keys += [job.key for job in more]
    assert sorted(keys) == [f"{number:03}" for number in range(200)]


async def test_dead_jobs_are_listed_replayed_and_dropped(desk: Desk) -> None:
    await desk.put(Put("work", "a", 1), Put("work", "b", 1), Put("work", "c", 2))
    for job in await desk.claim():
        await desk.queue.end([Ending(job, error="no such host", dead=True)])
    assert await desk.claim() == []
    dead = await desk.queue.jobs(1, dead=True)
    assert [(job.key, job.error, job.attempts) for job in dead] == [("a", "no such host", 1), ("b", "no such host", 1)]
    assert (await desk.queue.depth())["work"].dead == 3

    async def replay(tx: Tx) -> int:
        return await desk.queue.replay(tx, 1, id=dead[0].id)

    async def foreign(tx: Tx) -> int:
        return await desk.queue.drop(tx, 2, id=dead[1].id)

    async def drop(tx: Tx) -> int:
        return await desk.queue.drop(tx, 1)

    assert await desk.store.run(replay) == 1
    assert await desk.store.run(foreign) == 0
    assert await desk.store.run(drop) == 1
    (job,) = await desk.claim()
    assert (job.key, job.attempts) == ("a", 1)
    assert [job.key for job in await desk.queue.jobs(None, dead=True)] == ["c"]


async def test_a_dead_job_that_is_put_again_lives_again(desk: Desk) -> None:
    await desk.work(payload=b"position")
    (job,) = await desk.claim()
    await desk.queue.end([Ending(job, payload=job.payload, error="gone", dead=True)])
    await desk.work(payload=b"other")
    (again,) = await desk.claim()
    assert (again.payload, again.attempts) == (b"position", 1)


async def test_jobs_are_cancelled_by_key_or_beginning(desk: Desk) -> None:
    await desk.put(*(Put("work", key, 1) for key in ("w1/1", "w1/2", "w2/1")), Put("work", "w1/1", 2))
    (job,) = await desk.claim(1)
    assert job.key == "w1/1"

    async def beginning(tx: Tx) -> int:
        return await cancel_beginning(tx, "work", 1, "w1/")

    async def one(tx: Tx) -> bool:
        return await cancel(tx, "work", 2, "w1/1")

    assert await desk.store.run(beginning) == 2
    assert await desk.store.run(one)
    assert await desk.queue.end([Ending(job, due_at=5)]) == [False]
    assert [job.key for job in await desk.claim()] == ["w2/1"]


async def test_the_depth_says_what_waits_and_since_when(desk: Desk) -> None:
    now = desk.clock.now_ms()
    await desk.put(Put("work", "a", 1, now - 5_000), Put("work", "b", 1, now + 5_000), Put("work", "c", 1, now - 9_000))
    await desk.claim(1)
    depth = (await desk.queue.depth())["work"]
    assert (depth.waiting, depth.claimed, depth.dead, depth.oldest) == (2, 1, 0, now - 5_000)


async def test_a_job_that_takes_itself_away_takes_no_other_with_it(desk: Desk) -> None:
    await desk.work("old")
    (job,) = await desk.claim()

    async def unit(tx: Tx) -> None:
        await cancel(tx, "work", 1, "old")
        await put(tx, [Put("work", "new", 1)], now=desk.clock.now_ms())

    await desk.queue.end([Ending(job, unit=unit)])
    assert [job.key for job in await desk.claim()] == ["new"]
    await desk.work("older")
    (job,) = [one for one in await desk.claim() if one.key == "older"]

    async def again(tx: Tx) -> None:
        await cancel(tx, "work", 1, "older")
        await put(tx, [Put("work", "newer", 1, desk.clock.now_ms() + 9)], now=desk.clock.now_ms())

    await desk.queue.end([Ending(job, due_at=1, payload=b"mine", unit=again)])
    assert await desk.queue.next_due(["work"]) == desk.clock.now_ms() + 9
