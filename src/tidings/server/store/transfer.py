"""Moving everything from the embedded database into a PostgreSQL database that is empty: `tidings transfer`.

Three passes over every table of `tables.py`, in the order of the primary key, which is the same in both databases
because texts compare bytewise in both. The first reads the source: it refuses what PostgreSQL could not hold, counts,
and takes a checksum. The second copies, a batch at a time; a batch and the note of how far it came are one
transaction, so that a transfer that was killed goes on behind its last batch. The third reads what PostgreSQL gives
back and compares count and checksum. Only then the target is marked as usable; until then no node opens it
(`transferring.check_target`).

A checksum is SHA-256 over the rows as they follow one another, each as a MessagePack array of its columns in the order
of `tables.py`, every value in its shortest form: nil, int, str or bin. Two databases that have it in common hold the
same rows with the same values of the same types.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias

import asyncpg
import msgspec
from sqlalchemy import BigInteger, Integer, LargeBinary, Table

from tidings.server.errors import StoreCorrupt, TidingsError

from . import migrations, sqlite
from .migrations import postgres as postgres_migrations
from .postgres import GENERATION, check_safety, connect, redact
from .tables import metadata
from .transferring import DONE, POSITION, UNFINISHED, Journal, Mark, Sum, write_mark

Phase: TypeAlias = Literal["Checking", "Copying", "Verifying"]
# Called with phase, table, rows of the phase done so far, and rows of the phase in all.
Told: TypeAlias = Callable[[Phase, str, int, int], None]

# Rows and bytes of ciphertext in one batch: some 50 ms of work, and what is copied again after a kill.
BATCH_ROWS: Final = 5_000
BATCH_BYTES: Final = 4 << 20
# Rows fetched at once: with bodies of the greatest size a few MiB.
FETCH_ROWS: Final = 250
# The session lock of whoever transfers into a database: "transfer" in ASCII.
LOCK: Final = int.from_bytes(b"transfer", "big") >> 1

# What belongs to a database and not to the data in it. `~` sorts behind everything in the names of positions.
_OWN: Final = (
    f"name NOT IN ('{migrations.REVISION}','{migrations.COMPATIBLE}','{GENERATION}','{UNFINISHED}','{DONE}')"
    f" AND NOT (name>='{POSITION}' AND name<'{POSITION}~')"
)

# For a goodbye to the target; then the connection is cut.
CLOSE_SECONDS: Final = 5.0

_encoder: Final = msgspec.msgpack.Encoder()


def _untold(_phase: Phase, _table: str, _done: int, _total: int) -> None:
    """Nobody wants to know."""


class TransferRefused(TidingsError):
    """This source cannot go into this target. Nothing was changed."""


class TransferFailed(TidingsError):
    """What arrived is not what was sent. The target is not usable."""


class Position(msgspec.Struct, frozen=True):
    """How far a table was copied: rows, and the primary key of the last one; empty before the first."""

    rows: int
    last: list[int | str]


class Outcome(msgspec.Struct, frozen=True):
    """What a transfer found and did. `copied`: rows by this run, the rest by runs before it."""

    source: dict[str, Sum]
    root_kids: list[str]
    copied: int
    resumed: bool

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.source.values())


class Shape:
    """A table in both databases' words."""

    def __init__(self, table: Table) -> None:
        self.name = table.name
        self.columns = [column.name for column in table.columns]
        self.key = [column.name for column in table.primary_key]
        self.key_at = [self.columns.index(name) for name in self.key]
        self.blobs = [at for at, column in enumerate(table.columns) if isinstance(column.type, LargeBinary)]
        # The column that PostgreSQL would number by itself, if there is one.
        first = next(iter(table.primary_key))
        alone = len(self.key) == 1 and isinstance(first.type, BigInteger | Integer) and first.autoincrement
        self.serial = first.name if alone else None
        self.texts = [column.name for column in table.columns if _storage(column.type) == "text"]
        self._types = {column.name: (_storage(column.type), bool(column.nullable)) for column in table.columns}
        self.where = _OWN if table.name == "meta" else "1=1"
        self._list = ",".join(map(_quoted, self.columns))
        self._key_list = ",".join(map(_quoted, self.key))

    def select(self, *, after: bool = False) -> str:
        """All rows in the order of the key; with `after`, those behind a key that is given as parameters (`?`)."""
        behind = f" AND ({self._key_list})>({','.join('?' * len(self.key))})" if after else ""
        return f'SELECT {self._list} FROM "{self.name}" WHERE {self.where}{behind} ORDER BY {self._key_list}'

    def select_texts(self) -> str:
        """All keys with the texts beside them."""
        texts = ",".join(map(_quoted, self.texts))
        return f'SELECT {self._key_list},{texts} FROM "{self.name}" WHERE {self.where} ORDER BY {self._key_list}'

    def count(self) -> str:
        return f'SELECT count(*) FROM "{self.name}" WHERE {self.where}'

    def misfits(self) -> str:
        """In SQLite, where a column holds any type and a text a NUL: keys of rows that PostgreSQL would not take."""
        wrong = []
        for name, (storage, nullable) in self._types.items():
            column = _quoted(name)
            if storage == "text":
                wrong.append(f"instr({column},char(0))>0")
            allowed = f"'{storage}','null'" if nullable else f"'{storage}'"
            wrong.append(f"typeof({column}) NOT IN ({allowed})")
        return f'SELECT {self._key_list} FROM "{self.name}" WHERE {self.where} AND ({" OR ".join(wrong)}) LIMIT 1'


def _storage(type: Any) -> str:
    if isinstance(type, LargeBinary):
        return "blob"
    return "integer" if isinstance(type, BigInteger | Integer) else "text"


def _quoted(name: str) -> str:
    return f'"{name}"'


SHAPES: Final = tuple(Shape(table) for table in metadata.tables.values())


# ---------------------------------------------------------------- the transfer


async def transfer(
    source: Path, url: str, *, allow_unsafe: bool = False, batch_rows: int = BATCH_ROWS, told: Told = _untold
) -> Outcome:
    """Copy everything, or what is left to copy, verify it, and mark the target as usable.

    `source` is an absolute path. Nobody may write to either meanwhile. Raises TransferRefused before anything is
    changed, TransferFailed when it could not be finished, StoreCorrupt, StoreUnavailable, UnsafeStore, SchemaTooNew,
    SchemaUnknown.
    """
    with _snapshot(source) as rows:
        async with _target(url) as connection:
            await check_safety(connection, allow=allow_unsafe)
            if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                raise TransferRefused(
                    "Another transfer into this database is under way, or one was cut off and PostgreSQL does not know "
                    "it yet: try again in a minute."
                )
            await _check_target(connection)
            found = survey(rows, told)
            await postgres_migrations.migrate(connection)
            resumed = await _begin(connection, source, found)
            mark = Mark(redact(url), _now())
            write_mark(source.parent, mark)
            # A plan that walks a table or sorts it is right while it is small, and would be kept.
            await connection.execute("SET enable_seqscan = off; SET enable_sort = off")
            copied = await _copy(connection, rows, found, batch_rows, told)
            await _verify(connection, found, told)
            await _finish(connection)
            write_mark(source.parent, msgspec.structs.replace(mark, finished_at=_now()))
        return Outcome(found, root_kids(rows), copied, resumed)


async def look(source: Path, url: str, *, told: Told = _untold) -> tuple[Outcome, dict[str, int]]:
    """What a transfer would copy, and how many rows of each table are there already. Changes nothing.

    Raises as `transfer` does.
    """
    with _snapshot(source) as rows:
        async with _target(url) as connection:
            await _check_target(connection)
            found = survey(rows, told)
            there: dict[str, int] = {}
            journal = None
            if (await postgres_migrations.plan(connection)).current is not None:
                journal = await _journal(connection, found)
                for shape in SHAPES if journal else ():
                    there[shape.name] = (await _position(connection, shape)).rows
        return Outcome(found, root_kids(rows), 0, journal is not None), there


def survey(rows: sqlite3.Connection, told: Told = _untold) -> dict[str, Sum]:
    """Count and sum up every table of the source. Raises TransferRefused, naming the first row that cannot go."""
    total = sum(rows.execute(shape.count()).fetchone()[0] for shape in SHAPES)
    found: dict[str, Sum] = {}
    done = 0
    for shape in SHAPES:
        told("Checking", shape.name, done, total)
        _check_values(rows, shape)
        summed = _Summing()
        try:
            for batch in _fetched(rows.execute(shape.select())):
                summed.add(batch)
                told("Checking", shape.name, done + summed.rows, total)
        except sqlite3.OperationalError:
            _check_texts(rows, shape)
            raise
        found[shape.name] = summed.sum()
        done += summed.rows
    told("Checking", "", done, total)
    return found


def root_kids(rows: sqlite3.Connection) -> list[str]:
    """The ids of the root keys without which the data cannot be read."""
    return [kid for (kid,) in rows.execute("SELECT DISTINCT root_kid FROM app_keys ORDER BY root_kid")]


class _Summing:
    """Counts rows and sums them up, in the order in which they come."""

    def __init__(self) -> None:
        self.rows = 0
        self._digest = hashlib.sha256()
        self._buffer = bytearray()

    def add(self, rows: list[tuple[Any, ...]]) -> None:
        buffer = self._buffer
        del buffer[:]
        for row in rows:
            _encoder.encode_into(row, buffer, len(buffer))
        self._digest.update(buffer)
        self.rows += len(rows)

    def sum(self) -> Sum:
        return Sum(self.rows, self._digest.hexdigest())


# ---------------------------------------------------------------- the source


@contextmanager
def _snapshot(path: Path) -> Iterator[sqlite3.Connection]:
    """The source as of one moment. Raises TransferRefused, StoreCorrupt, SchemaUnknown."""
    if not path.is_file():
        raise TransferRefused(f"There is no database at {path}: name the server's data directory with --from.")
    planned = migrations.plan(path)
    if planned.steps:
        raise TransferRefused(
            f"{path} has schema revision {planned.current}, and this Tidings {migrations.HEAD}: bring it up with "
            "`tidings migrate` first (take a backup before)."
        )
    with closing(sqlite.connect(path, read_only=True)) as connection:
        try:
            connection.execute("BEGIN")
            yield connection
        except sqlite3.Error as error:
            raise StoreCorrupt(f"{path} cannot be read: {error}. Restore a backup and transfer that.") from error


def _fetched(cursor: sqlite3.Cursor) -> Iterator[list[tuple[Any, ...]]]:
    while batch := cursor.fetchmany(FETCH_ROWS):
        yield batch


def _check_values(rows: sqlite3.Connection, shape: Shape) -> None:
    """Raise TransferRefused for a value of another type than its column's, or a text with a zero byte."""
    with _as_bytes(rows):
        found = rows.execute(shape.misfits()).fetchone()
    if found is not None:
        _refuse(shape, found, "it has a value of another type than its column's, or a text with a zero byte in it")


def _check_texts(rows: sqlite3.Connection, shape: Shape) -> None:
    """Raise TransferRefused for a text that is not UTF-8."""
    with _as_bytes(rows):
        for batch in _fetched(rows.execute(shape.select_texts())):
            for row in batch:
                if not _is_utf8(row):
                    _refuse(shape, row[: len(shape.key)], "it has a text that is not UTF-8")


@contextmanager
def _as_bytes(rows: sqlite3.Connection) -> Iterator[None]:
    rows.text_factory = bytes
    try:
        yield
    finally:
        rows.text_factory = str


def _refuse(shape: Shape, key: tuple[Any, ...], why: str) -> NoReturn:
    parts = [part.decode(errors="backslashreplace") if isinstance(part, bytes) else part for part in key]
    named = ", ".join(f"{name} {part!r}" for name, part in zip(shape.key, parts, strict=True))
    raise TransferRefused(
        f"PostgreSQL cannot hold the row of {shape.name} with {named}: {why}. Mend or remove it in the source, then "
        "try again."
    )


def _is_utf8(row: tuple[Any, ...]) -> bool:
    try:
        for value in row:
            if value.__class__ is bytes:
                value.decode()
    except UnicodeDecodeError:
        return False
    return True


# ---------------------------------------------------------------- the target


@asynccontextmanager
async def _target(url: str) -> AsyncIterator[Any]:
    """A connection to the target. What PostgreSQL refuses is said without a row's values."""
    connection = await connect(url, server_settings={"application_name": "tidings transfer"})
    try:
        yield connection
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError, TimeoutError) as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise TransferFailed(
            f"PostgreSQL: {type(error).__name__}: {said}. The source is as it was; run the same again, and it goes on "
            "where it was."
        ) from error
    finally:
        await connection.close(timeout=CLOSE_SECONDS)


async def _check_target(connection: Any) -> None:
    """Raise TransferRefused for a database that could not hold every text, or is of another version."""
    if await connection.fetchval("SELECT current_setting('server_encoding')") != "UTF8":
        raise TransferRefused("The database's encoding is not UTF8: make it anew with ENCODING 'UTF8'.")
    planned = await postgres_migrations.plan(connection)
    if planned.target != migrations.HEAD:
        raise TransferRefused(
            f"The database has schema revision {planned.target}, and this Tidings {migrations.HEAD}: transfer into an "
            "empty one, and let the newer Tidings bring it up."
        )


async def _journal(connection: Any, found: dict[str, Sum]) -> Journal | None:
    """The journal of the transfer that was begun; None where the database is empty.

    Raises TransferRefused where there is anything else, be it the beginning of another source's transfer.
    """
    done = await connection.fetchval("SELECT value FROM meta WHERE name=$1", DONE)
    if done is not None:
        journal = msgspec.json.decode(done, type=Journal)
        raise TransferRefused(
            f"This database is in use: the transfer from {journal.origin} into it was finished at "
            f"{journal.finished_at:%Y-%m-%d %H:%M} UTC."
        )
    begun = await connection.fetchval("SELECT value FROM meta WHERE name=$1", UNFINISHED)
    if begun is not None:
        journal = msgspec.json.decode(begun, type=Journal)
        other = next((name for name in found if journal.source.get(name) != found[name]), None)
        if other is not None:
            raise TransferRefused(
                f"A transfer from {journal.origin} into this database was begun at {journal.begun_at:%Y-%m-%d %H:%M} "
                f"UTC, and {other} is not what it was then: this is another source, or a server has run on it. Begin "
                "anew with an empty database (DROP DATABASE, CREATE DATABASE)."
            )
        return journal
    for shape in SHAPES:
        if await connection.fetchval(f'SELECT 1 FROM "{shape.name}" WHERE {shape.where} LIMIT 1') is not None:
            raise TransferRefused(
                f"The database is not empty: {shape.name} has rows. A transfer needs a database of its own, on which "
                "no node has been started yet."
            )
    return None


async def _begin(connection: Any, source: Path, found: dict[str, Sum]) -> bool:
    """Note what is to arrive; whether an earlier run has begun it. Raises TransferRefused."""
    async with connection.transaction():
        # As whoever migrates: no node is in the middle of its start.
        await connection.execute("SELECT pg_advisory_xact_lock($1)", postgres_migrations.LOCK)
        if await _journal(connection, found) is not None:
            return True
        await _write(connection, UNFINISHED, Journal(_now(), str(source), found))
    return False


async def _copy(connection: Any, rows: sqlite3.Connection, found: dict[str, Sum], batch_rows: int, told: Told) -> int:
    """Copy what is not there yet; how many rows."""
    loop = asyncio.get_running_loop()
    total = sum(table.rows for table in found.values())
    done = copied = 0
    for shape in SHAPES:
        position = await _position(connection, shape)
        told("Copying", shape.name, done + position.rows, total)
        if position.rows < found[shape.name].rows:
            cursor = rows.execute(shape.select(after=bool(position.last)), position.last or ())
            batch = await asyncio.to_thread(_batch, cursor, shape, batch_rows)
            while batch:
                last = [batch[-1][at] for at in shape.key_at]
                position = Position(position.rows + len(batch), last)
                # While this batch is on its way the next is read.
                reading = loop.run_in_executor(None, _batch, cursor, shape, batch_rows)
                sending, batch = batch, []
                try:
                    await _send(connection, shape, sending, position)
                finally:
                    batch = await reading
                copied += len(sending)
                told("Copying", shape.name, done + position.rows, total)
        done += found[shape.name].rows
    told("Copying", "", total, total)
    return copied


def _batch(cursor: sqlite3.Cursor, shape: Shape, rows_max: int) -> list[tuple[Any, ...]]:
    """The next rows, as many as make a batch."""
    batch: list[tuple[Any, ...]] = []
    size = 0
    while len(batch) < rows_max and size < BATCH_BYTES:
        some = cursor.fetchmany(min(FETCH_ROWS, rows_max - len(batch)))
        if not some:
            break
        size += sum(len(row[at] or b"") for row in some for at in shape.blobs)
        batch += some
    return batch


async def _send(connection: Any, shape: Shape, batch: list[tuple[Any, ...]], position: Position) -> None:
    """A batch and the note of how far it comes, whole or not at all."""
    async with connection.transaction():
        await connection.copy_records_to_table(shape.name, records=batch, columns=shape.columns)
        await _write(connection, POSITION + shape.name, position)


async def _verify(connection: Any, found: dict[str, Sum], told: Told) -> None:
    """Compare what PostgreSQL gives back with what was read. Raises TransferFailed."""
    total = sum(table.rows for table in found.values())
    done = 0
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        for shape in SHAPES:
            told("Verifying", shape.name, done, total)
            summed = _Summing()
            cursor = await connection.cursor(shape.select())
            while records := await cursor.fetch(FETCH_ROWS):
                summed.add([tuple(record) for record in records])
                told("Verifying", shape.name, done + summed.rows, total)
            expected, got = found[shape.name], summed.sum()
            if got != expected:
                differs = (
                    f"{got.rows:,} rows instead of {expected.rows:,}"
                    if got.rows != expected.rows
                    else f"the checksum over its {got.rows:,} rows differs"
                )
                raise TransferFailed(
                    f"Verification found that {shape.name} did not arrive as it was: {differs}. The database stays "
                    "locked against use, the source is as it was. Begin anew with an empty database."
                )
            done += summed.rows
    told("Verifying", "", done, total)


async def _finish(connection: Any) -> None:
    """Let numbers go on where they were, and nodes in."""
    await connection.execute("ANALYZE")
    async with connection.transaction():
        for shape in SHAPES:
            if shape.serial is not None:
                await connection.execute(
                    f"SELECT setval(pg_get_serial_sequence('{shape.name}','{shape.serial}'),"
                    f" coalesce(max({shape.serial}),1), max({shape.serial}) IS NOT NULL) FROM {shape.name}"
                )
        begun = await connection.fetchval("SELECT value FROM meta WHERE name=$1", UNFINISHED)
        journal = msgspec.structs.replace(msgspec.json.decode(begun, type=Journal), finished_at=_now())
        await connection.execute(
            "DELETE FROM meta WHERE name=$1 OR (name>=$2 AND name<$3)", UNFINISHED, POSITION, POSITION + "~"
        )
        await _write(connection, DONE, journal)


async def _position(connection: Any, shape: Shape) -> Position:
    found = await connection.fetchval("SELECT value FROM meta WHERE name=$1", POSITION + shape.name)
    return Position(0, []) if found is None else msgspec.json.decode(found, type=Position)


async def _write(connection: Any, name: str, value: Position | Journal) -> None:
    await connection.execute(
        "INSERT INTO meta(name,value) VALUES ($1,$2) ON CONFLICT (name) DO UPDATE SET value=excluded.value",
        name,
        msgspec.json.encode(value).decode(),
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
