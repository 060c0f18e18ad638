"""The schema of a PostgreSQL database, which several nodes of different age may use at once.

A node that starts brings the schema up to its revision, unless it is there or beyond. An advisory lock lets one do that
while the others wait. A database beyond our revision is used as it is when its `compatible_from` says that we can;
otherwise the node refuses to start. Alembic's migrations are run as text, so that no second driver is needed.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from . import (
    COMPATIBLE,
    COMPATIBLE_FROM,
    HEAD,
    POSTGRES_SNAPSHOT,
    REVISION,
    Plan,
    SchemaTooNew,
    SchemaUnknown,
    known_revisions,
    steps_after,
)

# asyncpg has no types of its own.
Connection: TypeAlias = Any

# The advisory lock that whoever migrates holds: "tidings" in ASCII, so that it collides with nobody's by accident.
LOCK: Final = int.from_bytes(b"tidings", "big")
# Seconds that one statement of a migration may wait for others' locks: behind one that waits, everything queues.
LOCK_SECONDS: Final = 5


async def plan(connection: Connection) -> Plan:
    """What `migrate` would do, without doing it. Raises SchemaTooNew or SchemaUnknown."""
    found = await _read(connection)
    current = found.get(REVISION)
    if current is not None and current not in known_revisions():
        compatible_from = found.get(COMPATIBLE, current)
        if compatible_from > HEAD:
            raise SchemaTooNew(
                f"The database has schema revision {current}, which needs a Tidings that knows revision "
                f"{compatible_from}; this one knows {HEAD} and earlier. Start the newer Tidings that migrated it."
            )
        return Plan(current, current, ())
    return Plan(current, HEAD, steps_after(current))


async def migrate(connection: Connection) -> Plan:
    """Bring the schema to our revision, making it if there is none; what was done.

    All steps commit together, or none. Whoever comes second waits for the first and finds nothing to do. Raises
    SchemaTooNew, SchemaUnknown.
    """
    planned = await plan(connection)
    if not planned.steps:
        return planned
    async with connection.transaction():
        await connection.execute("SET LOCAL statement_timeout = 0")
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        planned = await plan(connection)
        if not planned.steps:
            return planned
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
        if planned.current is None:
            await connection.execute(POSTGRES_SNAPSHOT.read_text(encoding="utf-8"))
        else:
            from .runner import statements  # Imports Alembic and SQLAlchemy, hence only when there is something to do.

            await connection.execute(statements("postgresql", planned.current))
            await connection.executemany(
                "INSERT INTO meta(name,value) VALUES ($1,$2) ON CONFLICT (name) DO UPDATE SET value=excluded.value",
                [(REVISION, HEAD), (COMPATIBLE, COMPATIBLE_FROM)],
            )
    return planned


async def _read(connection: Connection) -> dict[str, str]:
    """Revision and `compatible_from`, as far as they are there; empty for an empty schema. Raises SchemaUnknown."""
    # Counted first: what another node commits from here on is then seen with its revision.
    tables = await connection.fetchval(
        "SELECT count(*) FROM pg_tables WHERE schemaname=current_schema() AND tablename IN ('meta','streams')"
    )
    if await connection.fetchval("SELECT to_regclass('meta')") is not None:
        rows = await connection.fetch("SELECT name, value FROM meta WHERE name IN ($1,$2)", REVISION, COMPATIBLE)
        if rows:
            return {row["name"]: row["value"] for row in rows}
    if tables:
        raise SchemaUnknown("The database has tables but no schema revision: it was not made by `tidings migrate`.")
    return {}
