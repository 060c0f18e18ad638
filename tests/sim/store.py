"""One database for all simulated nodes: the real tables and the real append, run in one go on the loop, with the waits
of a network around them.

What a node is told comes later than what was committed, and between the two everything else may happen: other nodes
commit and announce, the node dies, the line breaks (then a commit is reported as failed though it is stored).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from tidings.server.errors import StoreUnavailable
from tidings.server.store.base import Append, Unit
from tidings.server.store.sqlite import SqliteTx, append_batch, run_unit

T = TypeVar("T")

# Between a node and the database, seconds: one way, at most.
TRIP_SECONDS_MAX = 0.004
# How often a commit's answer gets lost while the database has trouble.
ANSWER_LOST = 0.3


class SimDatabase:
    """The database itself, in memory."""

    def __init__(self, image: bytes, rng: Random) -> None:
        self.rng = rng
        self.connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=512)
        self.connection.deserialize(image)
        # True: refuses everything. `shaky`: commits, and loses some of the answers.
        self.down = False
        self.shaky = False

    @classmethod
    def empty(cls, rng: Random) -> SimDatabase:
        """One without tables."""
        with sqlite3.connect(":memory:") as connection:
            connection.execute("PRAGMA user_version=1")
            return cls(connection.serialize(), rng)

    def rows(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, args).fetchall()


class SimStore:
    """The store's port for one node."""

    def __init__(self, database: SimDatabase) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._collected: list[Append] = []
        # Answers arrive in the order of the commits.
        self._told_at = 0.0
        self.dead = False

    def _trip(self) -> float:
        return self._database.rng.random() * TRIP_SECONDS_MAX

    def _later(self, callback: Callable[..., None], *args: Any) -> None:
        self._told_at = max(self._told_at + 1e-9, self._loop.time() + self._trip())
        self._loop.call_at(self._told_at, self._tell, callback, args)

    def _tell(self, callback: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.dead:
            callback(*args)

    def append(self, item: Append) -> None:
        if not self._collected:
            self._loop.call_later(self._trip(), self._append)
        self._collected.append(item)

    def _append(self) -> None:
        items, self._collected = self._collected, []
        database = self._database
        if self.dead:
            return
        if database.down:
            for item in items:
                self._later(item.done, StoreUnavailable("the database is down"))
            return
        connection = database.connection
        connection.execute("BEGIN")
        outcomes = append_batch(connection, items)
        connection.execute("COMMIT")
        if database.shaky and database.rng.random() < ANSWER_LOST:
            outcomes = [(item, StoreUnavailable("the answer was lost")) for item in items]
        for item, outcome in outcomes:
            self._later(item.done, outcome)

    async def run(self, unit: Unit[T], then: Callable[[T], None] | None = None) -> T:
        await asyncio.sleep(self._trip())
        done: asyncio.Future[T] = self._loop.create_future()
        database = self._database
        if self.dead:
            await self._loop.create_future()
        if database.down:
            raise StoreUnavailable("the database is down")
        connection = database.connection
        connection.execute("BEGIN")
        try:
            value = run_unit(unit, SqliteTx(connection))
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        lost = database.shaky and database.rng.random() < ANSWER_LOST

        def told() -> None:
            try:
                if lost:
                    raise StoreUnavailable("the answer was lost")
                if then is not None:
                    then(value)
                if not done.done():
                    done.set_result(value)
            except Exception as error:
                if not done.done():
                    done.set_exception(error)

        self._later(told)
        return await done

    async def read(self, unit: Unit[T]) -> T:
        await asyncio.sleep(self._trip())
        if self.dead:
            await self._loop.create_future()
        if self._database.down:
            raise StoreUnavailable("the database is down")
        value = run_unit(unit, SqliteTx(self._database.connection))
        await asyncio.sleep(self._trip())
        return value

    async def glance(self, unit: Unit[T]) -> T:
        return await self.read(unit)

    async def changed_elsewhere(self) -> bool:
        return False

    async def close(self) -> None:
        self.dead = True
