"""The embedded store: SQLite in WAL mode, one writer thread, group commit.

The writer takes whatever is queued, runs it in one transaction and pays one fsync for all of it; while that is on
its way the next batch collects. Appends of a batch are written with a few statements of many rows: inside a step
SQLite runs without the interpreter's lock, so the event loop goes on meanwhile, and a loaded batch costs a handful
of lock hand-overs instead of five per message.

`synchronous=FULL` is not a preference: with NORMAL a power cut loses acknowledged commits (see docs/decisions).
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

from tidings.server.errors import Refusal, StoreUnavailable, UnsafeStore

from .base import COUNTS, EVERYONE, MENTIONS_ALL, Append, Appended, Row, Stale, Unit

T = TypeVar("T")

# Items in one transaction: at 20 µs each, a full batch holds the database for 10 ms, the most that a single write
# queued behind it should wait.
BATCH_MAX: Final = 512
# Rows in one statement: SQLite takes 32,766 parameters; 64 rows of 18 keep preparation cheap.
ROWS_MAX: Final = 64
# How long to wait for another process (an operator's command) that holds the write lock.
BUSY_MS: Final = 5_000
# Pages in the log before they are moved into the database: 16 MiB, so that a checkpoint is rare and short.
CHECKPOINT_PAGES: Final = 4_000
# Page cache per connection, KiB.
CACHE_KIB: Final = 65_536


class SqliteTx:
    """One transaction on one connection. Its methods never suspend, so a unit runs through in one go."""

    __slots__ = ("_execute", "_executemany")
    # One writer at a time, by SQLite's write lock.
    for_update = ""
    for_key_share = ""
    claiming = ""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self._executemany = connection.executemany

    async def all(self, sql: str, *args: Any) -> list[Row]:
        return self._execute(sql, args).fetchall()

    async def one(self, sql: str, *args: Any) -> Row | None:
        row: Row | None = self._execute(sql, args).fetchone()
        return row

    async def execute(self, sql: str, *args: Any) -> int:
        return self._execute(sql, args).rowcount

    async def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._executemany(sql, rows)

    def took(self, sid: int, seq: int) -> None:
        """One commit at a time: their order is known."""


def run_unit(unit: Unit[T], tx: SqliteTx) -> T:
    """Run a unit to its end without an event loop: nothing it may await ever suspends."""
    coroutine = unit(tx).__await__()
    try:
        next(coroutine)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close() if hasattr(coroutine, "close") else None
    raise RuntimeError("a unit of the store awaited something other than its transaction")


def _read_from(connection: sqlite3.Connection, unit: Unit[T]) -> T:
    try:
        connection.execute("BEGIN")
        try:
            return run_unit(unit, SqliteTx(connection))
        finally:
            connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(str(error)) from error


class _Work:
    """A unit in the writer's queue."""

    __slots__ = ("future", "then", "unit")

    def __init__(self, unit: Unit[Any], future: asyncio.Future[Any], then: Callable[[Any], None] | None) -> None:
        self.unit = unit
        self.future = future
        self.then = then


class _Version:
    """Asks the writer's connection whether somebody else has committed."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[int]) -> None:
        self.future = future


class SqliteStore:
    """The `Store` port over one SQLite file. Create it inside the running event loop with `open`."""

    def __init__(
        self,
        path: Path,
        *,
        readers: int = 2,
        synchronous: str = "full",
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self.path = path
        self._synchronous = synchronous
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Append | _Work | _Version | None] = queue.SimpleQueue()
        self._closed = False
        self._writer_connection = connect(path, synchronous=synchronous)
        check_safety(self._writer_connection, allow=synchronous != "full")
        describe_tables(self._writer_connection)
        self._seen_version = -1
        self._local = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []
        # The event loop's own.
        self._glances: sqlite3.Connection | None = None
        self._readers = ThreadPoolExecutor(readers, "store-reader", initializer=self._open_reader)
        self._writer = threading.Thread(target=self._write_for_ever, name="store-writer", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------ the port

    def append(self, item: Append) -> None:
        if self._closed:
            self._loop.call_soon(item.done, StoreUnavailable("it is closing"))
        else:
            self._queue.put(item)

    async def run(self, unit: Unit[T], then: Callable[[T], None] | None = None) -> T:
        if self._closed:
            raise StoreUnavailable("it is closing")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Work(unit, future, then))
        return await future

    async def read(self, unit: Unit[T]) -> T:
        if self._closed:
            raise StoreUnavailable("it is closing")
        return await self._loop.run_in_executor(self._readers, self._read, unit)

    async def glance(self, unit: Unit[T]) -> T:
        if self._closed:
            raise StoreUnavailable("it is closing")
        if self._glances is None:
            self._glances = self._connect_reader()
        return _read_from(self._glances, unit)

    async def changed_elsewhere(self) -> bool:
        if self._closed:
            return False
        future: asyncio.Future[int] = self._loop.create_future()
        self._queue.put(_Version(future))
        version = await future
        changed = self._seen_version not in (-1, version)
        self._seen_version = version
        return changed

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._readers.shutdown(wait=True)
        for connection in self._reader_connections:
            connection.close()
        self._writer_connection.close()

    # ------------------------------------------------------------ readers

    def _open_reader(self) -> None:
        self._local.connection = self._connect_reader()

    def _connect_reader(self) -> sqlite3.Connection:
        connection = connect(self.path, synchronous=self._synchronous, read_only=True)
        self._reader_connections.append(connection)
        return connection

    def _read(self, unit: Unit[T]) -> T:
        return _read_from(self._local.connection, unit)

    # ------------------------------------------------------------ the writer thread

    def _write_for_ever(self) -> None:
        try:
            self._write()
        except BaseException as error:
            # A bug of ours: whoever waits is told, and nothing more is taken, so that the server shows it.
            self._closed = True
            self._tell(self._loop.call_exception_handler, {"message": "the store's writer died", "exception": error})
            while True:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    return
                if isinstance(item, (Append, _Work)):
                    self._tell(self._finish, [(item, StoreUnavailable("its writer has died"))], 0.0)

    def _write(self) -> None:
        take = self._queue.get
        take_more = self._queue.get_nowait
        stopping = False
        while not stopping:
            item = take()
            batch: list[Append | _Work] = []
            while True:
                if item is None:
                    stopping = True
                    break
                if isinstance(item, _Version):
                    try:
                        version = self._writer_connection.execute("PRAGMA data_version").fetchone()[0]
                    except sqlite3.Error:
                        # Unknown counts as changed: whoever asks looks again.
                        version = -2
                    self._tell(_settle, item.future, version)
                else:
                    batch.append(item)
                    if len(batch) >= BATCH_MAX:
                        break
                try:
                    item = take_more()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass  # The loop is gone: nobody is left to be told.

    def _commit(self, batch: list[Append | _Work]) -> None:
        started = time.perf_counter()
        connection = self._writer_connection
        outcomes: list[tuple[Append | _Work, Any]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            appends: list[Append] = []
            for item in batch:
                if isinstance(item, Append):
                    appends.append(item)
                    continue
                if appends:
                    outcomes += append_batch(connection, appends)
                    appends = []
                outcomes.append((item, self._attempt(connection, item)))
            if appends:
                outcomes += append_batch(connection, appends)
            connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                try:
                    connection.execute("ROLLBACK")
                except sqlite3.Error:
                    pass  # A full disk has rolled back already.
            reason: Exception = error
            if isinstance(error, sqlite3.Error):
                reason = StoreUnavailable(f"{type(error).__name__}: {error}")
            outcomes = [(item, reason) for item in batch]
        self._tell(self._finish, outcomes, time.perf_counter() - started)

    @staticmethod
    def _attempt(connection: sqlite3.Connection, work: _Work) -> Any:
        connection.execute("SAVEPOINT unit")
        try:
            result = run_unit(work.unit, SqliteTx(connection))
        except sqlite3.OperationalError:
            raise  # The database itself is in trouble: the whole batch fails.
        except Exception as error:
            connection.execute("ROLLBACK TO unit")
            connection.execute("RELEASE unit")
            return error
        connection.execute("RELEASE unit")
        return result

    def _finish(self, outcomes: list[tuple[Append | _Work, Any]], seconds: float) -> None:
        """On the event loop, after the commit: tell everyone, in the order of the commits."""
        report = self._loop.call_exception_handler
        for item, outcome in outcomes:
            try:
                if isinstance(item, Append):
                    item.done(outcome)
                elif isinstance(outcome, Exception):
                    if not item.future.done():
                        item.future.set_exception(outcome)
                else:
                    if item.then is not None:
                        item.then(outcome)
                    if not item.future.done():
                        item.future.set_result(outcome)
            except Exception as error:  # One listener's bug must not silence the others.
                report({"message": "announcing a commit failed", "exception": error})
                if isinstance(item, _Work) and not item.future.done():
                    item.future.set_exception(error)
        if self._observe is not None:
            self._observe(len(outcomes), seconds)


def _settle(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


def connect(path: Path, *, synchronous: str = "full", read_only: bool = False) -> sqlite3.Connection:
    """Open the database file the only way it is ever opened. Raises UnsafeStore when WAL cannot be had."""
    if not path.exists() and not read_only:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=512, timeout=BUSY_MS / 1000
    )
    execute = connection.execute
    mode = execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        connection.close()
        raise UnsafeStore(f"{path}: SQLite cannot use write-ahead logging here (journal_mode is {mode})")
    execute(f"PRAGMA synchronous={synchronous}")
    execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    # Intermediate results stay in memory: nothing readable is ever spilled beside the database.
    execute("PRAGMA temp_store=MEMORY")
    # What is destroyed is overwritten, not only unlinked.
    execute("PRAGMA secure_delete=ON")
    execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    if read_only:
        execute("PRAGMA query_only=ON")
    return connection


# What ANALYZE would find in a grown app: rows, then how many share each longer prefix of the index. SQLite's planner
# guesses from the shapes of indexes alone otherwise, and guesses that everything of an app is few: it walks all members
# to find one user's channels, and everything unread to find mentions. Its names: https://sqlite.org/fileformat2.html#stat1tab
STATISTICS: Final = (
    ("members", "members", "1000000 100000 20 1"),
    ("members", "members_user", "1000000 100000 20 1"),
    ("members", "members_moved", "1000000 100000 20 2"),
    ("messages", "messages", "10000000 1000000 1000 1"),
    ("mentions", "mentions", "100000 10000 100 10 1"),
)


def describe_tables(connection: sqlite3.Connection) -> None:
    """Tell the query planner what the tables look like, unless it was told before."""
    execute = connection.execute
    if not execute("SELECT 1 FROM sqlite_schema WHERE name='members'").fetchone():
        return
    # Makes `sqlite_stat1` if it is not there, reads it if it is; looks at no table.
    execute("ANALYZE sqlite_schema")
    if execute("SELECT 1 FROM sqlite_stat1 WHERE tbl='members'").fetchone():
        return
    execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO sqlite_stat1(tbl,idx,stat) VALUES (?,?,?)", STATISTICS)
    execute("COMMIT")
    execute("ANALYZE sqlite_schema")


def check_safety(connection: sqlite3.Connection, *, allow: bool) -> None:
    """Refuse a connection whose commits may be lost at a power cut. Raises UnsafeStore.

    SQLite's documentation: in WAL mode only FULL (2) or EXTRA (3) sync the log at each commit.
    """
    level = connection.execute("PRAGMA synchronous").fetchone()[0]
    mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    if (level < 2 or mode != "wal") and not allow:
        raise UnsafeStore(
            f"store_synchronous={level} loses acknowledged messages at a power cut; it needs FULL. "
            "To run unsafely on purpose set allow_unsafe_store = true."
        )


# ---------------------------------------------------------------- the append path


@cache
def _statement(head: str, columns: int, rows: int, tail: str) -> str:
    # Remembered, so that the connection's cache of prepared statements finds it by identity.
    row = "(" + ",".join("?" * columns) + ")"
    return head + ",".join([row] * rows) + tail


def _write_rows(connection: sqlite3.Connection, head: str, tail: str, rows: list[tuple[Any, ...]]) -> None:
    """Run `head VALUES rows tail` in as few statements as powers of two allow: their texts stay few and prepared."""
    start, left = 0, len(rows)
    while left:
        size = min(ROWS_MAX, 1 << (left.bit_length() - 1))
        chunk = rows[start : start + size]
        connection.execute(_statement(head, len(chunk[0]), size, tail), list(chain.from_iterable(chunk)))
        start += size
        left -= size


def _read_rows(connection: sqlite3.Connection, head: str, tail: str, rows: list[tuple[Any, ...]]) -> Iterable[Row]:
    """Look rows of keys up, padding each statement to a power of two with its last key."""
    for start in range(0, len(rows), ROWS_MAX):
        chunk = rows[start : start + ROWS_MAX]
        size = 1 << (len(chunk) - 1).bit_length()
        chunk = chunk + [chunk[-1]] * (size - len(chunk))
        yield from connection.execute(
            _statement(head, len(chunk[0]), size, tail), list(chain.from_iterable(chunk))
        ).fetchall()


_HEADS = (
    "WITH v(app,sid) AS (VALUES ",
    ") SELECT s.sid, s.head, s.counted, s.messages, s.access_version, s.app FROM v CROSS JOIN streams s"
    " ON s.sid=v.sid AND s.app=v.app",
)
_KEYS = (
    "WITH v(app,sid,sender,key) AS (VALUES ",
    ") SELECT m.sid, m.sender, m.key, m.id, m.seq, m.at, m.digest FROM v CROSS JOIN messages m"
    " ON m.app=v.app AND m.sid=v.sid AND m.sender=v.sender AND m.key=v.key",
)
_MESSAGES = (
    "INSERT INTO messages(app,sid,seq,id,sender,key,digest,content_seq,counted,flags,reply_to,at,sealed) VALUES ",
    "",
)
_OUTBOX = ("INSERT INTO outbox(app,sid,seq,type) VALUES ", "")
_MENTIONS = ("INSERT INTO mentions(app,sid,user,seq) VALUES ", " ON CONFLICT DO NOTHING")
_STREAMS = (
    "WITH v(sid,head,counted,messages,at) AS (VALUES ",
    ") UPDATE streams SET head=v.head, counted=v.counted, messages=v.messages, last_message_at=v.at,"
    # Never back: a message that waited here is older than an event that did not.
    " moved_at=CASE WHEN streams.moved_at<v.at THEN v.at ELSE streams.moved_at END"
    " FROM v WHERE streams.sid=v.sid",
)
_SENDERS = (
    "WITH v(app,sid,user,seq,counted) AS (VALUES ",
    # Not `moved_at`: the stream has moved by the same message, and an index hangs on it.
    ") UPDATE members SET delivered=v.seq, read=v.seq, read_counted=v.counted, marked_from=NULL"
    " FROM v WHERE members.app=v.app AND members.sid=v.sid AND members.user=v.user",
)


def append_batch(connection: sqlite3.Connection, items: list[Append]) -> list[tuple[Append, Any]]:
    """Append messages inside the open transaction; the outcome of each, in order.

    `seq` is taken from the stream's row here, under the write lock: numbers cannot commit out of order.
    A repeated key gets its first result; the same key with another fingerprint, or an outdated access version,
    stores nothing.
    """
    heads = {
        row[0]: list(row[1:])
        for row in _read_rows(connection, *_HEADS, list({(item.app, item.sid): None for item in items}))
    }
    known: dict[tuple[int, str, str], tuple[str, int, int, bytes]] = {
        (row[0], row[1], row[2]): (row[3], row[4], row[5], row[6])
        for row in _read_rows(connection, *_KEYS, [(item.app, item.sid, item.sender, item.key) for item in items])
    }
    outcomes: list[tuple[Append, Any]] = []
    messages: list[tuple[Any, ...]] = []
    outbox: list[tuple[Any, ...]] = []
    mentions: list[tuple[Any, ...]] = []
    moved: dict[int, int] = {}
    senders: dict[tuple[int, int, str], tuple[int, int]] = {}
    for item in items:
        sid = item.sid
        head = heads.get(sid)
        if head is None or head[4] != item.app:
            # No such stream in this app, whatever other apps of the batch append to.
            outcomes.append((item, Stale()))
            continue
        key = (sid, item.sender, item.key)
        first = known.get(key)
        if first is not None:
            if first[3] != item.digest:
                outcome: Any = Refusal(
                    "key_reused", "This key was used for another message in this channel.", field="key"
                )
            else:
                outcome = Appended(first[0], first[1], first[2], True)
            outcomes.append((item, outcome))
            continue
        if head[3] != item.access_version:
            outcomes.append((item, Stale()))
            continue
        seq = head[0] = head[0] + 1
        head[2] += 1
        if item.flags & COUNTS:
            head[1] += 1
        counted = head[1]
        app, sender, message_id, at = item.app, item.sender, item.message_id, item.at
        by = None if sender[0] == "!" else sender
        messages.append(
            (
                app,
                sid,
                seq,
                message_id,
                sender,
                item.key,
                item.digest,
                seq,
                counted,
                item.flags,
                item.reply_to,
                at,
                item.sealed,
            )
        )
        outbox.append((app, sid, seq, "message.created"))
        if item.mentions:
            mentions += [(app, sid, user, seq) for user in item.mentions]
        if item.flags & MENTIONS_ALL:
            mentions.append((app, sid, EVERYONE, seq))
        moved[sid] = at
        if by is not None:
            senders[(app, sid, by)] = (seq, counted)
        known[key] = (message_id, seq, at, item.digest)
        outcomes.append((item, Appended(message_id, seq, at)))
    if messages:
        _write_rows(connection, *_MESSAGES, messages)
        _write_rows(connection, *_OUTBOX, outbox)
        if mentions:
            _write_rows(connection, *_MENTIONS, mentions)
        _write_rows(connection, *_STREAMS, [(sid, *heads[sid][:3], at) for sid, at in moved.items()])
        if senders:
            _write_rows(connection, *_SENDERS, [(*who, *what) for who, what in senders.items()])
    return outcomes
