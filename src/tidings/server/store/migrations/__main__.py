"""Write a migration: `python -m tidings.server.store.migrations new what_changes`.

`first` writes the first one anew, which is right only as long as no database of users exists. What Alembic cannot see
by comparing SQLite's tables (PostgreSQL's collations and storage) is written into the file by hand, as it is there;
`snapshots` then writes the scripts for new databases anew.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from alembic import command
from sqlalchemy import create_engine

from . import POSTGRES_SNAPSHOT, SNAPSHOT, VERSIONS, known_revisions
from .runner import configuration, postgres_snapshot, snapshot, upgrade


def write(revision: str, slug: str) -> None:
    """Compare `tables.py` with what the migrations so far make, and write the difference as a migration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        if known_revisions():
            upgrade(path)
        engine = create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            made = command.revision(
                configuration(connection=connection), slug.replace("_", " "), autogenerate=True, rev_id=revision
            )
        engine.dispose()
    script = made[0] if isinstance(made, list) else made
    if script is None or script.path is None:
        raise SystemExit("nothing was written")
    target = VERSIONS / f"{revision}_{slug}.py"
    # Alembic's own remarks ("please adjust!") are for whoever writes the file, not for who reads it.
    lines = Path(script.path).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(script.path).unlink()
    target.write_text("".join(line for line in lines if "# ###" not in line), encoding="utf-8")
    for arguments in (["check", "--fix", "-q", "--select", "I,F401"], ["format", "-q"]):
        subprocess.run([sys.executable, "-m", "ruff", *arguments, str(target)], check=True)
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    POSTGRES_SNAPSHOT.write_text(postgres_snapshot(), encoding="utf-8")
    sys.stdout.write(f"{target}\nLook at it, then set HEAD to {revision}.\n")


def main(arguments: list[str]) -> None:
    """Run the command line."""
    match arguments:
        case ["first"]:
            for old in VERSIONS.glob("0001_*.py"):
                old.unlink()
            write("0001", "first")
        case ["new", slug]:
            write(f"{int(max(known_revisions(), default='0')) + 1:04}", slug)
        case ["snapshots"]:
            SNAPSHOT.write_text(snapshot(), encoding="utf-8")
            POSTGRES_SNAPSHOT.write_text(postgres_snapshot(), encoding="utf-8")
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
