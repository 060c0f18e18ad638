"""What a client remembers: positions, the mark, and messages that wait to be sent.

`MemoryStore` forgets at the end of the program. `FileStore` is one SQLite file for one (app, user, device), written by
one thread so that the event loop never waits for a disk: jobs that arrive while a transaction is being written share
the next one, and so its fsync.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from .errors import StoreError, StoreInUse, StoreMismatch

# Jobs in one transaction: a few milliseconds of work between two fsyncs.
GROUP_MAX = 1_000
SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS streams (
    name TEXT PRIMARY KEY, epoch TEXT, seq INTEGER NOT NULL, open INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
    n INTEGER PRIMARY KEY, channel TEXT NOT NULL, key TEXT NOT NULL, command BLOB NOT NULL, created_ms INTEGER NOT NULL,
    UNIQUE (channel, key));
"""


class SavedStream(msgspec.Struct, frozen=True):
    """`seq`: the application has taken everything up to it. `open`: more than that had been announced."""

    name: str
    epoch: str | None
    seq: int
    open: bool


class SavedMessage(msgspec.Struct, frozen=True):
    """A message in the outbox. `n` orders them; `command` is the encoded `message.send`."""

    n: int
    channel: str
    key: str
    command: bytes
    created_ms: int


class Saved(msgspec.Struct, frozen=True):
    mark: str | None = None
    streams: list[SavedStream] = []
    outbox: list[SavedMessage] = []


class Store(Protocol):
    """The port. `save` and `remove` may be lost in a crash, at worst by a moment; `add` is durable when it returns."""

    async def open(self, identity: dict[str, str]) -> Saved:
        """Read everything and bind the store to this identity. Raises StoreInUse, StoreMismatch, StoreError."""

    async def identify(self, identity: dict[str, str]) -> None:
        """Bind the store to this identity, or raise StoreMismatch. Names that are not given are not compared."""

    async def add(self, message: SavedMessage) -> None:
        """Keep a message until `remove`. Raises StoreError, also when one with its channel and key is kept."""

    def remove(self, n: int) -> None:
        """Forget a message; an unknown one is none."""

    def save(self, mark: str | None, streams: Iterable[SavedStream], dropped: Iterable[str]) -> None:
        """Keep the mark (None: the one there is), these streams, and not the dropped ones: all of it or nothing."""

    async def close(self) -> None:
        """Write what waits and let go."""


class MemoryStore:
    """Remembers nothing beyond the client's own memory."""

    async def open(self, identity: dict[str, str]) -> Saved:
        """See Store; nothing is kept."""
        return Saved()

    async def identify(self, identity: dict[str, str]) -> None:
        """See Store; nothing is kept."""
        pass

    async def add(self, message: SavedMessage) -> None:
        """See Store; nothing is kept."""
        pass

    def remove(self, n: int) -> None:
        """See Store; nothing is kept."""
        pass

    def save(self, mark: str | None, streams: Iterable[SavedStream], dropped: Iterable[str]) -> None:
        """See Store; nothing is kept."""
        pass

    async def close(self) -> None:
        """See Store; nothing is kept."""
        pass


_Work = Callable[[sqlite3.Connection], Any]
_Job = tuple[_Work, "asyncio.Future[Any] | None"]


class FileStore:
    """One SQLite file: WAL, `synchronous=FULL` (an acknowledged write survives a power cut), locked to one process.

    `on_error` is called on the event loop when a write that nobody waits for fails.
    """

    def __init__(self, path: str | Path, *, on_error: Callable[[StoreError], None]) -> None:
        self._path = Path(path)
        self._on_error = on_error
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self, identity: dict[str, str]) -> Saved:
        """Open or make the file. Raises StoreInUse, StoreMismatch, StoreError."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, args=(opened,), name="tidings-store", daemon=True)
        self._thread.start()
        await opened
        try:
            await self.identify(identity)
            saved: Saved = await self._run(_load)
            return saved
        except BaseException:
            await self.close()
            raise

    async def identify(self, identity: dict[str, str]) -> None:
        """See Store."""
        await self._run(lambda db: _identify(db, identity))

    async def add(self, message: SavedMessage) -> None:
        """See Store."""
        row = (message.n, message.channel, message.key, message.command, message.created_ms)
        await self._run(lambda db: db.execute("INSERT INTO outbox VALUES (?, ?, ?, ?, ?)", row))

    def remove(self, n: int) -> None:
        """See Store."""
        self._jobs.put((lambda db: db.execute("DELETE FROM outbox WHERE n = ?", (n,)), None))

    def save(self, mark: str | None, streams: Iterable[SavedStream], dropped: Iterable[str]) -> None:
        """See Store."""
        rows = [(stream.name, stream.epoch, stream.seq, int(stream.open)) for stream in streams]
        gone = [(name,) for name in dropped]

        def work(db: sqlite3.Connection) -> None:
            # One transaction: the mark must never be newer than the positions it vouches for.
            db.executemany("DELETE FROM streams WHERE name = ?", gone)
            db.executemany("INSERT OR REPLACE INTO streams VALUES (?, ?, ?, ?)", rows)
            if mark is not None:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('mark', ?)", (mark,))

        self._jobs.put((work, None))

    async def close(self) -> None:
        """Write what waits and release the file."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._jobs.put(None)
        await asyncio.to_thread(thread.join)

    async def _run(self, work: _Work) -> Any:
        if self._thread is None or self._loop is None:
            raise StoreError("the store is closed")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((work, future))
        return await future

    # ------------------------------------------------------------ the thread

    def _work(self, opened: asyncio.Future[None]) -> None:
        try:
            db = _connect(self._path)
        except StoreError as error:
            self._answer([(opened, None, error)])
            return
        self._answer([(opened, None, None)])
        try:
            while (job := self._jobs.get()) is not None:
                group = [job]
                stop = False
                while len(group) < GROUP_MAX:
                    try:
                        more = self._jobs.get_nowait()
                    except queue.Empty:
                        break
                    if more is None:
                        stop = True
                        break
                    group.append(more)
                self._answer(_write(db, group))
                if stop:
                    break
        finally:
            db.close()

    def _answer(self, results: list[tuple[asyncio.Future[Any] | None, Any, StoreError | None]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._resolve, results)
        except RuntimeError:
            pass  # The loop is gone, and with it whoever waited.

    def _resolve(self, results: list[tuple[asyncio.Future[Any] | None, Any, StoreError | None]]) -> None:
        for future, value, error in results:
            if future is None:
                if error is not None:
                    self._on_error(error)
            elif not future.done():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(value)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, timeout=0.5, check_same_thread=False)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"cannot open {path}: {error}") from error
    try:
        # Held until close: two clients on one outbox would race each other.
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("BEGIN IMMEDIATE")
        db.execute("COMMIT")
        db.executescript(_SCHEMA)
        db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))
        (version,) = db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    except sqlite3.OperationalError as error:
        db.close()
        if "locked" in str(error):
            raise StoreInUse(f"{path} is open in another client") from error
        raise StoreError(f"cannot use {path}: {error}") from error
    except sqlite3.Error as error:
        db.close()
        raise StoreError(f"{path} is not a client store: {error}") from error
    if version != str(SCHEMA_VERSION):
        db.close()
        raise StoreError(f"{path} was written by another version of this library (schema {version})")
    return db


def _write(
    db: sqlite3.Connection, group: list[_Job]
) -> list[tuple[asyncio.Future[Any] | None, Any, StoreError | None]]:
    """Run the jobs in one transaction. A job that fails is undone alone; a failed commit fails them all."""
    results: list[tuple[asyncio.Future[Any] | None, Any, StoreError | None]] = []
    try:
        db.execute("BEGIN IMMEDIATE")
        for work, future in group:
            db.execute("SAVEPOINT job")
            try:
                value = work(db)
            except (sqlite3.Error, StoreError) as error:
                db.execute("ROLLBACK TO job")
                failure = error if isinstance(error, StoreError) else StoreError(f"local store: {error}")
                results.append((future, None, failure))
            else:
                results.append((future, value, None))
            db.execute("RELEASE job")
        db.execute("COMMIT")
    except sqlite3.Error as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        failed = StoreError(f"local store: {error}")
        return [(future, None, failed) for _, future in group]
    return results


def _identify(db: sqlite3.Connection, identity: dict[str, str]) -> None:
    for name, value in identity.items():
        row = db.execute("SELECT value FROM meta WHERE name = ?", (f"identity.{name}",)).fetchone()
        if row is None:
            db.execute("INSERT INTO meta VALUES (?, ?)", (f"identity.{name}", value))
        elif row[0] != value:
            raise StoreMismatch(f"this store belongs to {name} {row[0]!r}, not {value!r}")


def _load(db: sqlite3.Connection) -> Saved:
    mark = db.execute("SELECT value FROM meta WHERE name = 'mark'").fetchone()
    return Saved(
        mark=mark[0] if mark else None,
        streams=[
            SavedStream(name, epoch, seq, bool(is_open))
            for name, epoch, seq, is_open in db.execute("SELECT name, epoch, seq, open FROM streams")
        ],
        outbox=[
            SavedMessage(*row)
            for row in db.execute("SELECT n, channel, key, command, created_ms FROM outbox ORDER BY n")
        ],
    )
