"""What a transfer from SQLite to PostgreSQL leaves in both, for whoever opens one of them.

In the target a row of `meta` stands from the first copied row until the last was verified: nobody uses half of the
data. Beside the source lies a file from the same moment on, for ever: a server that was started there by mistake would
take messages that never reach the other. Both are small and read at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from tidings.server.errors import DataMoved

# Rows of `meta` in the target: while it goes on, how far each table has come, and afterwards.
UNFINISHED: Final = "transfer"
POSITION: Final = "transfer:"
DONE: Final = "transferred"
# The file beside the source.
MARK: Final = "transferred.json"


class Sum(msgspec.Struct, frozen=True, array_like=True):
    """What is in a table: its rows, and the checksum over them."""

    rows: int
    sha256: str


class Journal(msgspec.Struct, frozen=True):
    """What the target says of a transfer into it. `source`: what is to arrive, by table."""

    begun_at: datetime
    origin: str
    source: dict[str, Sum]
    finished_at: datetime | None = None


class Mark(msgspec.Struct, frozen=True):
    """What the source says of a transfer from it. `to`: the target's URL without its password."""

    to: str
    begun_at: datetime
    finished_at: datetime | None = None


async def check_target(connection: Any) -> None:
    """Refuse a PostgreSQL database into which a transfer is not finished. Raises DataMoved."""
    found = await connection.fetchval("SELECT value FROM meta WHERE name=$1", UNFINISHED)
    if found is not None:
        journal = msgspec.json.decode(found, type=Journal)
        raise DataMoved(
            f"The transfer from {journal.origin} into this database, begun at {_time(journal.begun_at)}, is not "
            "finished: run the same `tidings transfer` again. It goes on where it was."
        )


def check_source(data_dir: Path) -> None:
    """Refuse an embedded database whose data is on its way to another, or has moved there. Raises DataMoved."""
    path = data_dir / MARK
    try:
        mark = msgspec.json.decode(path.read_bytes(), type=Mark)
    except FileNotFoundError:
        return
    except msgspec.DecodeError as error:
        raise DataMoved(f"{path} says that this data was transferred, and cannot be read: {error}.") from None
    if mark.finished_at is None:
        raise DataMoved(
            f"A transfer of {data_dir} to {mark.to}, begun at {_time(mark.begun_at)}, is not finished: run the same "
            f"`tidings transfer` again. To stay here instead, remove {path}; that transfer cannot be resumed then."
        )
    raise DataMoved(
        f"The data of {data_dir} was transferred to {mark.to} at {_time(mark.finished_at)}: serve that, with the "
        f"setting `store`. To use what is here all the same remove {path}; the two will have nothing to do with one "
        "another."
    )


def write_mark(data_dir: Path, mark: Mark) -> None:
    """Put the file beside the source, durably. Raises OSError."""
    path = data_dir / MARK
    temporary = path.with_name(f".{MARK}.{os.getpid()}")
    with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(mark), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fd = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"
