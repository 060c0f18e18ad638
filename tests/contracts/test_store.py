"""The stores under their contract, and what only one of them promises."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest

from tests.postgres import fresh_database
from tidings.server.errors import UnsafeStore
from tidings.server.store.base import Store, Tx
from tidings.server.store.migrations import migrate
from tidings.server.store.postgres import PostgresStore
from tidings.server.store.postgres import connect as connect_postgres
from tidings.server.store.sqlite import SqliteStore, check_safety, connect

from .store_contract import Site, StoreContract, event_unit, make_stream, submit


class SqliteSite:
    """A file in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path / "data" / "tidings.db"
        self.path.parent.mkdir(mode=0o700)
        migrate(self.path)
        self.opened: list[Store] = []

    async def open(self) -> Store:
        store = SqliteStore(self.path)
        self.opened.append(store)
        return store

    async def outside(self, sql: str) -> None:
        connection = connect(self.path)
        connection.execute(sql)
        connection.close()

    async def fail(self, store: Store) -> None:
        # No page more than there are: what SQLite answers is what a full disk makes it answer.
        assert isinstance(store, SqliteStore)
        pages = store._writer_connection.execute("PRAGMA page_count").fetchone()[0]
        store._writer_connection.execute(f"PRAGMA max_page_count={pages}")
        store._writer_connection.execute("PRAGMA query_only=ON")

    async def heal(self, store: Store) -> None:
        assert isinstance(store, SqliteStore)
        store._writer_connection.execute("PRAGMA query_only=OFF")
        store._writer_connection.execute("PRAGMA max_page_count=1073741823")


class PostgresSite:
    """A database on the session's server."""

    def __init__(self, path: Path) -> None:
        self.url = ""
        self.opened: list[Store] = []

    async def open(self) -> Store:
        self.url = self.url or await fresh_database()
        store = await PostgresStore.open(self.url, allow_unsafe=True)
        self.opened.append(store)
        return store

    async def outside(self, sql: str) -> None:
        async def unit(tx: Tx) -> int:
            return await tx.execute(sql)

        command = await PostgresStore.open(self.url, allow_unsafe=True, on_bus=False)
        await command.run(unit)
        await command.close()

    async def fail(self, store: Store) -> None:
        # Found out at the commit, with the server's own code for a full disk.
        await self._execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = 'disk_full'; END $$;"
            " CREATE CONSTRAINT TRIGGER full_disk AFTER INSERT ON outbox DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION full_disk()"
        )

    async def heal(self, store: Store) -> None:
        await self._execute("DROP TRIGGER full_disk ON outbox")

    async def _execute(self, sql: str) -> None:
        connection = await connect_postgres(self.url)
        await connection.execute(sql)
        await connection.close()


# Every adapter of the port: a directory of the test's -> where a store lives.
ADAPTERS: Final[dict[str, Callable[[Path], Site]]] = {"sqlite": SqliteSite, "postgres": PostgresSite}


@pytest.fixture(params=list(ADAPTERS))
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    return ADAPTERS[request.param](tmp_path)


@pytest.fixture
async def store(site: Site) -> AsyncIterator[Store]:
    made = await site.open()
    await make_stream(made, 1, "alice", "bob", "carol")
    await make_stream(made, 2, "alice")
    yield made
    for opened in getattr(site, "opened", [made]):
        await opened.close()


class TestStore(StoreContract):
    """Every case, over every adapter."""


# ------------------------------------------------------------ SQLite alone


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    site = SqliteSite(tmp_path)
    store = await site.open()
    assert isinstance(store, SqliteStore)
    await make_stream(store, 1, "alice")
    yield store
    await store.close()


async def test_with_one_writer_the_order_of_handing_over_is_the_order_of_commits(sqlite: SqliteStore) -> None:
    told: list[str] = []
    first = submit(sqlite, 1, "a")
    futures = []
    for n in range(20):
        futures.append(
            asyncio.ensure_future(sqlite.run(event_unit(1, f"e{n}"), lambda seq: told.append(f"unit {seq}")))
        )
        await asyncio.sleep(0)
        sent = submit(sqlite, 1, f"k{n}")
        sent.add_done_callback(lambda sent: told.append(f"append {sent.result().seq}"))
    await asyncio.gather(first, *futures)
    assert (await submit(sqlite, 1, "last")).seq == 42
    assert [word for word in told if word.startswith("unit")] == [f"unit {2 * n + 2}" for n in range(20)]
    assert sorted(word for word in told if word.startswith("append")) == sorted(
        f"append {2 * n + 3}" for n in range(20)
    )


async def test_a_disk_that_is_full_fails_the_batch_and_is_recovered_from(sqlite: SqliteStore) -> None:
    writer = sqlite._writer_connection
    writer.execute(f"PRAGMA max_page_count={writer.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(Exception, match="full"):
        await submit(sqlite, 1, "big", sealed=b"x" * 1_000_000)
    writer.execute("PRAGMA max_page_count=1073741823")
    assert (await submit(sqlite, 1, "big", sealed=b"x" * 1_000_000)).seq == 1


async def test_every_connection_is_set_up_to_lose_nothing_and_leave_nothing_readable(sqlite: SqliteStore) -> None:
    async def ask(tx: Tx) -> dict[str, object]:
        found = {}
        for name in ("synchronous", "journal_mode", "temp_store", "secure_delete", "query_only"):
            row = await tx.one(f"PRAGMA {name}")
            assert row is not None
            found[name] = row[0]
        return found

    safe = {"synchronous": 2, "journal_mode": "wal", "temp_store": 2, "secure_delete": 1}
    assert await sqlite.run(ask) == {**safe, "query_only": 0}
    assert await sqlite.read(ask) == {**safe, "query_only": 1}


async def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "fresh" / "tidings.db"
        store = SqliteStore(path)

        async def unit(tx: Tx) -> int:
            return await tx.execute("CREATE TABLE t (a INTEGER)")

        await store.run(unit)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert modes["tidings.db"] == modes["tidings.db-wal"] == 0o600
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        await store.close()
    finally:
        os.umask(before)


@pytest.mark.parametrize("level", ["off", "normal"])
def test_a_connection_that_may_lose_commits_is_refused_unless_asked_for(tmp_path: Path, level: str) -> None:
    connection = connect(tmp_path / "tidings.db", synchronous=level)
    with pytest.raises(UnsafeStore, match="FULL"):
        check_safety(connection, allow=False)
    check_safety(connection, allow=True)
    connection.close()


def test_a_journal_that_is_not_a_write_ahead_log_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "t.db")
    connection.execute("PRAGMA synchronous=FULL")
    with pytest.raises(UnsafeStore):
        check_safety(connection, allow=False)
    connection.close()


@pytest.mark.parametrize("level", ["full", "extra"])
def test_a_connection_that_syncs_every_commit_is_accepted(tmp_path: Path, level: str) -> None:
    connection = connect(tmp_path / "tidings.db", synchronous=level)
    check_safety(connection, allow=False)
    connection.close()
