"""Running Alembic from inside the program: no configuration file, no working directory."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.pool import StaticPool

from ..sqlite import connect
from . import COMPATIBLE, COMPATIBLE_FROM, REVISION, known_revisions


def configuration(**attributes: Any) -> Config:
    """Alembic's configuration; `attributes` reach `env.py`."""
    config = Config(attributes=attributes)
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(path: Path, revision: str = "head") -> None:
    """Run the missing migrations in one transaction, which ends with the new revision in `meta`. Blocks."""
    raw = connect(path)
    engine = create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # The driver itself begins nothing, and DDL must roll back too. Another process that migrates is waited for.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    try:
        with engine.begin() as connection:
            command.upgrade(configuration(connection=connection), revision)
            reached = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
            connection.execute(
                text(
                    "INSERT INTO meta(name,value) VALUES (:name,:value)"
                    " ON CONFLICT (name) DO UPDATE SET value=excluded.value"
                ),
                {"name": REVISION, "value": reached},
            )
    finally:
        engine.dispose()
        raw.close()


def statements(dialect: str, since: str | None = None) -> str:
    """The migrations after revision `since`, or all, as SQL for a database that is not here: `postgresql` or `sqlite`.

    No transaction is in it: whoever runs it brings one.
    """
    output = io.StringIO()
    config = configuration(dialect=dialect)
    config.output_buffer = output
    command.upgrade(config, f"{since}:head" if since else "head", sql=True)
    return output.getvalue()


def postgres_snapshot() -> str:
    """The same for PostgreSQL, as one script that runs inside a transaction."""
    lines = [line.rstrip() for line in statements("postgresql").splitlines()]
    made = [line for line in lines if line and not line.startswith("-- ")]
    return "\n".join(made) + "\n" + "".join(f"{row};\n" for row in _meta_rows(max(known_revisions()), COMPATIBLE_FROM))


def _meta_rows(revision: str, compatible_from: str) -> list[str]:
    return [
        f"INSERT INTO meta(name,value) VALUES ('{REVISION}','{revision}')",
        f"INSERT INTO meta(name,value) VALUES ('{COMPATIBLE}','{compatible_from}')",
    ]


def snapshot() -> str:
    """A script that makes an empty database of the newest revision: what the migrations themselves make."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        upgrade(path)
        connection = connect(path)
        made = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid").fetchall()
        reached = connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        connection.close()
    rows = [
        f"INSERT INTO alembic_version(version_num) VALUES ('{reached}')",
        f"INSERT INTO meta(name,value) VALUES ('{REVISION}','{reached}')",
    ]
    lines = [line.rstrip() for (sql,) in made for line in f"{sql};".splitlines()]
    return "\n".join(lines + [f"{row};" for row in rows]) + "\n"
