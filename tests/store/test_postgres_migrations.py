"""The schema in PostgreSQL over time, while nodes of different age use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy

from tests.postgres import fresh_database
from tidings.server.app import migrate_store, open_store
from tidings.server.config import Config
from tidings.server.store import migrations
from tidings.server.store.migrations import HEAD, POSTGRES_SNAPSHOT, SchemaTooNew, SchemaUnknown, runner
from tidings.server.store.migrations import postgres as schema
from tidings.server.store.postgres import connect
from tidings.server.store.tables import metadata

# Table, index, whether it is the primary key, whether it is unique, and its columns in order.
INDEXES = """
SELECT t.relname::text, c.relname::text, i.indisprimary, i.indisunique, array(
  SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY AS k(n, place)
  JOIN pg_attribute a ON a.attrelid=i.indrelid AND a.attnum=k.n ORDER BY k.place
)
FROM pg_index i JOIN pg_class c ON c.oid=i.indexrelid JOIN pg_class t ON t.oid=i.indrelid
JOIN pg_namespace n ON n.oid=c.relnamespace WHERE n.nspname='public'
"""


@pytest.fixture
async def connection() -> AsyncIterator[Any]:
    made = await connect(await fresh_database(empty=True))
    yield made
    await made.close()


async def test_a_new_database_has_the_schema_of_the_tables(connection: Any) -> None:
    await schema.migrate(connection)
    rows = await connection.fetch(
        "SELECT table_name, column_name, data_type, is_nullable, collation_name FROM information_schema.columns"
        " WHERE table_schema='public' AND table_name<>'alembic_version'"
    )
    words = {sqlalchemy.BigInteger: "bigint", sqlalchemy.Text: "text", sqlalchemy.LargeBinary: "bytea"}
    expected = {
        (table.name, column.name, words[type(column.type)], "YES" if column.nullable else "NO")
        for table in metadata.tables.values()
        for column in table.columns
    }
    assert {tuple(row)[:4] for row in rows} == expected
    assert {row["collation_name"] for row in rows if row["data_type"] == "text"} == {"C"}
    found = await connection.fetch(INDEXES)
    # A UNIQUE constraint's index has a name that PostgreSQL made up.
    assert {(row[1], row[3], tuple(row[4])) for row in found if not row[2] and row[1] != "apps_id_key"} == {
        (index.name, bool(index.unique), tuple(column.name for column in index.columns))
        for table in metadata.tables.values()
        for index in table.indexes
    }
    assert {(row[0], tuple(row[4])) for row in found if row[2] and row[0] != "alembic_version"} == {
        (table.name, tuple(column.name for column in table.primary_key.columns)) for table in metadata.tables.values()
    }


def test_the_snapshot_is_what_the_migrations_make() -> None:
    assert POSTGRES_SNAPSHOT.read_text() == runner.postgres_snapshot()


async def test_a_plan_changes_nothing(connection: Any) -> None:
    planned = await schema.plan(connection)
    assert (planned.current, planned.target) == (None, HEAD)
    assert planned.steps == tuple(f"{revision} {name}" for revision, name in migrations.known_revisions().items())
    assert await connection.fetchval("SELECT to_regclass('meta')") is None


class Overtaken:
    """A connection on which somebody else migrates between the first question and its answer's use."""

    def __init__(self, connection: Any, url: str) -> None:
        self._connection, self._url = connection, url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetchval(self, *question: Any) -> Any:
        answer = await self._connection.fetchval(*question)
        if self._url:
            other, self._url = await connect(self._url), ""
            await schema.migrate(other)
            await other.close()
        return answer


async def test_a_schema_that_is_made_in_between_is_not_taken_for_a_strangers() -> None:
    url = await fresh_database(empty=True)
    connection = await connect(url)
    try:
        assert (await schema.migrate(Overtaken(connection, url))).current == HEAD
    finally:
        await connection.close()


async def test_whoever_loses_the_race_to_migrate_finds_it_done() -> None:
    url = await fresh_database(empty=True)

    async def node() -> tuple[str, ...]:
        connection = await connect(url)
        try:
            return (await schema.migrate(connection)).steps
        finally:
            await connection.close()

    found = await asyncio.gather(*(node() for _ in range(6)))
    assert sorted(found, key=len)[:-1] == [()] * 5
    assert max(found, key=len)


def _as_next_version(monkeypatch: pytest.MonkeyPatch, sql: str, compatible_from: str) -> None:
    """Be the Tidings after this one, whose migration runs `sql`."""
    known = {**migrations.known_revisions(), "0999": "the next"}
    for module in (schema, migrations):
        monkeypatch.setattr(module, "HEAD", "0999")
        monkeypatch.setattr(module, "known_revisions", lambda: known)
    monkeypatch.setattr(schema, "COMPATIBLE_FROM", compatible_from)
    monkeypatch.setattr(runner, "statements", lambda dialect, since: sql)


async def test_old_nodes_go_on_and_start_on_a_schema_that_was_only_expanded(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await schema.migrate(connection)
    with monkeypatch.context() as newer:
        _as_next_version(newer, "ALTER TABLE users ADD COLUMN shoe_size BIGINT", compatible_from=HEAD)
        done = await schema.migrate(connection)
        assert (done.current, done.target, done.steps) == (HEAD, "0999", ("0999 the next",))
        assert (await schema.migrate(connection)).steps == ()
    planned = await schema.plan(connection)
    assert (planned.current, planned.steps) == ("0999", ())
    assert (await schema.migrate(connection)).steps == ()
    assert await connection.fetchval("SELECT value FROM meta WHERE name='schema_revision'") == "0999"


async def test_a_node_refuses_to_start_on_a_schema_that_it_cannot_use(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await schema.migrate(connection)
    with monkeypatch.context() as newer:
        _as_next_version(newer, "ALTER TABLE users DROP COLUMN invisible", compatible_from="0999")
        await schema.migrate(connection)
    for attempt in (schema.plan, schema.migrate):
        with pytest.raises(SchemaTooNew, match="needs a Tidings that knows revision 0999"):
            await attempt(connection)


async def test_a_migration_that_fails_leaves_everything_as_it_was(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await schema.migrate(connection)
    with monkeypatch.context() as newer:
        _as_next_version(newer, "ALTER TABLE users ADD COLUMN x BIGINT; SELECT 1/0", compatible_from=HEAD)
        with pytest.raises(Exception, match="division"):
            await schema.migrate(connection)
    assert (await schema.plan(connection)).steps == ()
    assert not await connection.fetch("SELECT 1 FROM information_schema.columns WHERE column_name='x'")


async def test_tables_of_unknown_origin_are_refused(connection: Any) -> None:
    await connection.execute("CREATE TABLE streams (id BIGINT)")
    with pytest.raises(SchemaUnknown):
        await schema.migrate(connection)


async def test_a_node_brings_its_database_up_by_itself_and_the_command_says_what_it_would_do(tmp_path: Any) -> None:
    url = await fresh_database(empty=True)
    config = Config(data_dir=tmp_path, store=url, allow_unsafe_store=True)
    name, planned = await migrate_store(config, plan=True)
    assert planned.steps
    assert "@" in name
    assert url.split(":")[2].split("@")[0] not in name, "the password is in what people read"
    opened = await open_store(config)
    assert opened.fresh
    await opened.store.close()
    assert (await migrate_store(config, plan=True))[1].steps == ()
