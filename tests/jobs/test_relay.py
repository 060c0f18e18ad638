"""From the outbox into jobs: every event once, in order, by one relay at a time, whatever ends in between."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tidings.server.jobs.relay import ROWS_MAX, OutboxRow, Relay
from tidings.server.services.queue import Put
from tidings.server.store.base import Tx
from tidings.server.tasks import Tasks

from .conftest import Desk
from .test_worker import until


@dataclass
class Book:
    """A reader that writes down what it was given."""

    seen: list[OutboxRow] = field(default_factory=list)
    fails: int = 0

    async def read(self, tx: Tx, rows: Sequence[OutboxRow], now: int) -> Sequence[Put]:
        if self.fails:
            self.fails -= 1
            raise KeyError("reader")
        self.seen += rows
        return [Put("work", f"{row.sid}", row.app, payload=b"%d" % (row.seq - 1)) for row in rows]


async def fill(desk: Desk, *events: tuple[int, int]) -> None:
    async def unit(tx: Tx) -> None:
        await tx.many(
            "INSERT INTO outbox(app,sid,seq,type) VALUES (1,?,?,'message.created')", [list(event) for event in events]
        )

    await desk.store.run(unit)


def relay(desk: Desk, *books: Book) -> Relay:
    return Relay(desk.store, books, desk.bus, desk.clock, desk.metrics)


async def test_events_become_jobs_in_the_transaction_that_takes_them_away(desk: Desk) -> None:
    book = Book()
    await fill(desk, (7, 1), (8, 1), (7, 2))
    assert await relay(desk, book).turn() == 3
    assert [(row.sid, row.seq) for row in book.seen] == [(7, 1), (8, 1), (7, 2)]
    assert await desk.rows("SELECT key, payload FROM jobs ORDER BY key") == [("7", b"0"), ("8", b"0")]
    assert await relay(desk, book).turn() == 0


async def test_a_reader_that_fails_loses_nothing(desk: Desk) -> None:
    first, second = Book(), Book(fails=1)
    await fill(desk, (7, 1))
    with pytest.raises(KeyError):
        await relay(desk, first, second).turn()
    assert await desk.rows("SELECT 1 FROM jobs") == []
    assert await relay(desk, first, second).turn() == 1
    assert len(await desk.rows("SELECT 1 FROM jobs")) == 1


async def test_without_readers_the_outbox_stays_empty(desk: Desk) -> None:
    await fill(desk, *((1, seq) for seq in range(1, ROWS_MAX + 2)))
    one = relay(desk)
    assert await one.turn() == ROWS_MAX
    assert await one.turn() == 1
    assert await desk.rows("SELECT 1 FROM outbox") == []


async def test_several_relays_hand_each_event_on_once_and_in_order(desk: Desk) -> None:
    book = Book()
    tasks = Tasks("test")
    for _ in range(3):
        tasks.spawn(relay(desk, book).run(), "relay")
    for first in range(1, 201, 20):
        await fill(desk, *((sid, seq) for seq in range(first, first + 20) for sid in (1, 2)))

    async def emptied() -> bool:
        return not await desk.rows("SELECT 1 FROM outbox")

    await until(emptied)
    await tasks.close()
    for sid in (1, 2):
        # A transaction that lost against another is run again: what counts is what was committed, which comes last.
        assert [row.seq for row in book.seen if row.sid == sid] == list(range(1, 201))


async def test_it_is_woken_by_what_is_published(desk: Desk) -> None:
    from tidings.server.bus.base import Published

    woken = asyncio.Event()
    book = Book()
    one = Relay(desk.store, [book], desk.bus, desk.clock, desk.metrics, wake=woken.set)
    tasks = Tasks("test")
    tasks.spawn(one.run(), "relay")
    await fill(desk, (1, 1))
    desk.bus.publish(Published(1, 1, b"{}"))
    async with asyncio.timeout(5):
        await woken.wait()
    await tasks.close()
    assert len(book.seen) == 1
