"""The PostgreSQL of this test session: one server from the wheel, a fresh database for each test that asks."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import shutil
import tempfile
from functools import cache
from pathlib import Path

import asyncpg

from tidings.server.store.migrations.postgres import migrate
from tidings.server.store.postgres import connect
from tidings.testing.postgres import PostgresProcess

# A database with the schema, copied for each test: a copy takes some 30 ms, the migrations ten times that.
TEMPLATE = "tidings_template"

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
