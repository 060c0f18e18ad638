"""The schema over time: whatever way a database came to be, it is the one that the code expects."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from tidings.server.store.migrations import (
    HEAD,
    SNAPSHOT,
    SchemaTooNew,
    SchemaUnknown,
    known_revisions,
    migrate,
    plan,
)
from tidings.server.store.migrations.runner import configuration, snapshot, statements, upgrade
from tidings.server.store.tables import metadata


def schema(path: Path) -> dict[str, str]:
    """Name → SQL of everything in the database, blanks made alike."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: " ".join(sql.split()) for name, sql in rows if name != "alembic_version"}


@pytest.mark.parametrize("make", [migrate, upgrade], ids=["snapshot", "migrations"])
def test_a_new_database_has_the_schema_of_the_tables(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    made, expected = tmp_path / "made.db", tmp_path / "expected.db"
    make(made)
    engine = create_engine(f"sqlite:///{expected}")
    metadata.create_all(engine)
    engine.dispose()
    assert schema(made) == schema(expected), "edit tables.py only together with a migration: see store/migrations"
    engine = create_engine(f"sqlite:///{made}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    assert plan(made).steps == ()


def test_the_snapshot_is_what_the_migrations_make() -> None:
    assert SNAPSHOT.read_text() == snapshot()


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(configuration()).get_heads() == [HEAD]
    assert list(known_revisions())[-1] == HEAD


def test_migrating_again_does_nothing_and_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    assert migrate(path).current is None
    program = (
        "import sys; from pathlib import Path; from tidings.server.store.migrations import migrate;"
        f"print(migrate(Path({str(path)!r})).steps, [m for m in ('alembic', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "() []"


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    found = plan(path)
    assert (found.current, found.target) == (None, HEAD)
    assert found.steps
    assert not path.exists()


def test_a_database_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    migrate(path)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE meta SET value='9999' WHERE name='schema_revision'")
    connection.close()
    for attempt in (plan, migrate):
        with pytest.raises(SchemaTooNew, match="9999"):
            attempt(path)


def test_tables_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE users (id)")
    connection.close()
    with pytest.raises(SchemaUnknown):
        migrate(path)
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as the header of one" * 3)
    with pytest.raises(SchemaUnknown):
        migrate(tmp_path / "text.db")


def test_whoever_loses_the_race_to_make_a_database_finds_it_made(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    program = (
        f"from pathlib import Path; from tidings.server.store.migrations import migrate; migrate(Path({str(path)!r}))"
    )
    racers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [racer.wait(timeout=60) for racer in racers] == [0] * 4
    assert plan(path).steps == ()


def test_the_migrations_are_valid_for_postgresql_too() -> None:
    sql = statements("postgresql")
    for table in metadata.tables:
        assert f"CREATE TABLE {table} " in sql
    assert '"user" TEXT COLLATE "C" NOT NULL' in sql
    assert "BYTEA" in sql
    assert "WHERE deleted_at IS NOT NULL" in sql
    assert "ROWID" not in sql
