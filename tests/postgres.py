"""The PostgreSQL of this test session: one server from the wheel, a fresh database for each test that asks.

`TIDINGS_TEST_STORE=postgres` runs every test that takes its store from here on PostgreSQL. Without it they run on
SQLite, and those of the modules in `tests/conftest.py:ON_BOTH` on both.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import asyncpg

from tidings.server.store.base import Store
from tidings.server.store.migrations import migrate as migrate_sqlite
from tidings.server.store.migrations.postgres import migrate
from tidings.server.store.postgres import PostgresStore, connect, translate
from tidings.server.store.sqlite import SqliteStore
from tidings.testing.postgres import PostgresProcess

# A database with the schema, copied for each test: a copy takes some 30 ms, the migrations ten times that.
TEMPLATE = "tidings_template"

# `sqlite` or `postgres`: what `open_store` opens at the moment.
# Taken out of the environment, where servers that tests start would take it for a misspelt setting.
kind = os.environ.pop("TIDINGS_TEST_STORE", "sqlite")

_serial = itertools.count(1)


@cache
def server() -> PostgresProcess:
    """The session's server, started at its first use and ended with the test program. Call it from the main thread:
    the kernel ends it with the thread that started it."""
    folder = Path(tempfile.mkdtemp(prefix="tidings-pg-"))
    # On disk, but with nothing to survive a power cut: the checks that need it bring servers of their own.
    process = PostgresProcess(folder, settings={"fsync": "off", "full_page_writes": "off"})

    def end() -> None:
        process.close()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    process.start()
    return process


@contextmanager
def own_server(**settings: str) -> Iterator[PostgresProcess]:
    """A server that a test may stop and set as it likes; safe, as it comes. Not below pytest's own folders: those are
    closed to others by the next session that starts, and PostgreSQL is not root."""
    folder = Path(tempfile.mkdtemp(prefix="tidings-pg-"))
    try:
        with PostgresProcess(folder, settings=settings) as process:
            yield process
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _template() -> str:
    asyncio.run(_make_template())
    return TEMPLATE


async def _make_template() -> None:
    await _execute(f"CREATE DATABASE {TEMPLATE}")
    connection = await connect(server().url(TEMPLATE))
    await migrate(connection)
    await connection.close()


async def _execute(sql: str) -> None:
    connection = await asyncpg.connect(server().url())
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def fresh_database(*, empty: bool = False) -> str:
    """The URL of a database that nobody else has; with the schema, unless `empty`."""
    server()
    template = "template0" if empty else await asyncio.to_thread(_template)
    name = f"test_{next(_serial)}"
    await _execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return server().url(name)


async def store_setting() -> str:
    """What a configuration says of the store that the tests run on: `sqlite`, or a fresh database's URL."""
    return await fresh_database() if kind == "postgres" else "sqlite"


async def server_environment() -> dict[str, str]:
    """What a server process is to find in its environment, for a fresh store of the kind that the tests run on."""
    if kind == "sqlite":
        return {}
    return {"TIDINGS_STORE": await fresh_database(), "TIDINGS_ALLOW_UNSAFE_STORE": "true"}


def query(url: str, sql: str, *args: object) -> list[tuple[Any, ...]]:
    """Ask a database directly, blocking, in the portable words of the services."""

    async def ask() -> list[tuple[Any, ...]]:
        connection = await connect(url)
        try:
            return [tuple(row) for row in await connection.fetch(translate(sql), *args)]
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, ask()).result()


async def open_store(folder: Path, *, counting: bool = False) -> Store:
    """A store of the kind that the tests run on, empty, with its schema. `counting`: with a count of its `reads`."""
    if kind == "postgres":
        url = await fresh_database()
        cls = CountingPostgresStore if counting else PostgresStore
        return await cls.open(url, connections=4, append_connections=2, asynchronous=True, allow_unsafe=True)
    path = folder / "tidings.db"
    await asyncio.to_thread(migrate_sqlite, path)
    return (CountingSqliteStore if counting else SqliteStore)(path, synchronous="off")


class CountingSqliteStore(SqliteStore):
    """A store that says how often it was read."""

    reads = 0

    async def read(self, unit):  # type: ignore[no-untyped-def]
        self.reads += 1
        return await super().read(unit)


class CountingPostgresStore(PostgresStore):
    """A store that says how often it was read."""

    reads = 0

    async def read(self, unit):  # type: ignore[no-untyped-def]
        self.reads += 1
        return await super().read(unit)
