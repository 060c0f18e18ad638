"""The database's schema over time: which revision a database has, and how it gets to ours.

Every start asks `migrate`. When the database already has our revision that is one row read from `meta`, and neither
Alembic nor SQLAlchemy is imported (they cost more than the rest of the start). A database that a newer Tidings has
migrated is refused: an older one would not know what its columns mean.

Over PostgreSQL old nodes serve while a new one migrates, so migrations come in three steps, each in a release of its
own: *expand* (add what the new code needs, in a way that the old does not notice), *migrate* (the new code fills it;
both read what they know), *contract* (take away what nobody reads any more). COMPATIBLE_FROM is the revision of the
oldest code that can work with the schema as it is: expanding leaves it, contracting raises it. It stands in `meta`, and
a node that is older refuses to start (`store/migrations/postgres.py`). The embedded database has one process, which is
stopped while it is migrated.

To change the schema, edit `store/tables.py`, then `python -m tidings.server.store.migrations new what_changes`, look at
the file that it writes, and set HEAD.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidings.server.errors import StoreCorrupt, TidingsError

from ..sqlite import connect

# The revision that this code works with: the newest file in `versions`.
HEAD: Final = "0004"
VERSIONS: Final = Path(__file__).parent / "versions"
# The row of `meta` that holds a database's revision.
REVISION: Final = "schema_revision"
# The oldest revision whose code can use the schema at HEAD, and the row of `meta` that says so to older nodes.
COMPATIBLE_FROM: Final = "0001"
COMPATIBLE: Final = "compatible_from"
# What all migrations together make, as one script: a new database is made from it at once, without Alembic.
SNAPSHOT: Final = VERSIONS / "head.sql"
POSTGRES_SNAPSHOT: Final = VERSIONS / "head.postgresql.sql"


class SchemaTooNew(TidingsError):
    """The database was migrated by a newer Tidings than this."""


class SchemaUnknown(TidingsError):
    """There are tables, and nothing says which revision they have."""


@dataclass(slots=True, frozen=True)
class Plan:
    """From which revision to which; `steps` names each migration in between. `current` None: an empty database."""

    current: str | None
    target: str
    steps: tuple[str, ...]


def known_revisions() -> dict[str, str]:
    """Revision → name of its migration (`0001` → `first`), oldest first, from the names of the files."""
    found = sorted(path.stem.split("_", 1) for path in VERSIONS.glob("[0-9]*_*.py"))
    return {revision: name.replace("_", " ") for revision, name in found}


def plan(path: Path) -> Plan:
    """What `migrate` would do, without doing it. Raises SchemaTooNew or SchemaUnknown."""
    current = _revision(path) if path.exists() else None
    if current is not None and current not in known_revisions():
        raise SchemaTooNew(
            f"{path} has schema revision {current}; this Tidings knows {HEAD} and earlier. Start the newer Tidings "
            "that migrated it, or restore a backup from before that."
        )
    return Plan(current, HEAD, steps_after(current))


def steps_after(current: str | None) -> tuple[str, ...]:
    """The migrations that a database of revision `current` lacks, each as `0002 its name`."""
    return tuple(f"{revision} {name}" for revision, name in known_revisions().items() if revision > (current or ""))


def migrate(path: Path) -> Plan:
    """Bring the database to our revision, making it if there is none; what was done. Blocks.

    All steps commit together, or none. Two processes at once: the second waits and finds nothing to do. Raises
    SchemaTooNew, SchemaUnknown, StoreCorrupt, UnsafeStore.
    """
    planned = plan(path)
    if not planned.steps:
        return planned
    if planned.current is None:
        if not _make(path):
            return migrate(path)
    else:
        from . import runner  # Imports Alembic and SQLAlchemy, hence only when there is something to do.

        runner.upgrade(path)
    _check_integrity(path)
    return planned


def _revision(path: Path) -> str | None:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE type='table' LIMIT 1").fetchone() is None:
            return None
        row = None
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone() is not None:
            row = connection.execute("SELECT value FROM meta WHERE name=?", (REVISION,)).fetchone()
    except sqlite3.DatabaseError as error:
        raise SchemaUnknown(f"{path} is not a database that can be read: {error}") from None
    finally:
        connection.close()
    if row is None:
        raise SchemaUnknown(f"{path} has tables but no schema revision: it was not made by `tidings migrate`")
    return str(row[0])


def _make(path: Path) -> bool:
    """Make a new database from the snapshot; False if another process was faster."""
    connection = connect(path)
    try:
        connection.executescript(f"BEGIN IMMEDIATE;\n{SNAPSHOT.read_text()}COMMIT;")
    except sqlite3.OperationalError:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone() is None:
            raise
        return False
    finally:
        connection.close()
    return True


def _check_integrity(path: Path) -> None:
    connection = connect(path)
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    finally:
        connection.close()
    if found != "ok":
        raise StoreCorrupt(f"{path} is damaged: {found}. Restore a backup.")
