"""The store at scale: PostgreSQL through asyncpg, any number of nodes on one database.

Appends collect while a batch is on its way, and leave as one statement and one commit (`postgres_append.py`); several
batches may be under way at once, over different streams. Units run at READ COMMITTED on a connection of their own: what
their reads decide is locked by `for_update`, as it would have to be at any level that does not fail half of them. What
is committed is told in order (`commits.py`).

Losing the connection while a commit is on its way leaves its fate unknown. It is reported as unavailable, never as
done: a message is sent again under its key, and gets its first result if there is one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit

import asyncpg

from tidings.server.errors import StoreUnavailable, UnsafeStore
from tidings.server.tasks import Tasks
from tidings.server.telemetry import get_logger

from .base import Append, Row, Tx, Unit
from .commits import CommitOrder, Flight, Ticket
from .log import count_generation
from .postgres_append import APPEND, LOCK, Batch, Outcome

T = TypeVar("T")
# asyncpg has no types of its own.
Connection: TypeAlias = Any
Pool: TypeAlias = Any

log = get_logger(__name__)

# Messages in one statement: at 50 µs each in the database, a full batch holds its streams for 25 ms.
BATCH_MAX: Final = 512
# A second batch leaves beside the first when so many messages wait: smaller ones cost more apiece than they gain …
FLIGHT_MIN: Final = 64
# … or when the oldest has been away for so long, seconds: it waits for somebody's lock, and others need not.
FLIGHT_PATIENCE: Final = 0.010
# How often a unit or batch that lost to another (a deadlock, a repeat stored elsewhere) is tried anew.
ATTEMPTS_MAX: Final = 5
# Translations kept: the services hold some 300 texts; lists of ids make more.
TRANSLATIONS_MAX: Final = 1_024
# Statements kept prepared on each connection: the database holds a plan of some 20 KB for each.
PREPARED_MAX: Final = 256
# Time for a new connection, seconds: three round trips around the world, and scram.
CONNECT_SECONDS: Final = 5.0
# What the client waits beyond the server's own limit on a statement, seconds, before it takes the server for gone.
GRACE_SECONDS: Final = 2.0
# How long a message may wait for a batch to take it, and a unit may take up to its COMMIT, seconds. With the time that
# one more statement may take, both stay within the ten seconds by which clients' marks lie back: what became visible
# later than that, a client that connects could miss until the next event.
QUEUE_SECONDS: Final = 4.0
UNIT_SECONDS: Final = 8.0
# A transaction whose node has stopped in the middle is ended by the server: its locks hold up others. Milliseconds.
IDLE_IN_TRANSACTION_MS: Final = 10_000
# The oldest PostgreSQL that still gets fixes, and that the tests' features are sure to be in.
VERSION_MIN: Final = 150_000
# Of `synchronous_commit`: those that have the commit on this server's disk, and on its replicas where there are some.
SAFE_COMMITS: Final = frozenset({"on", "remote_apply"})
# The row of `meta` that `log.count_generation` counts up.
GENERATION: Final = "generation"

_TOKEN: Final = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|\?|(?<![\w.])user(?!\w)""")


@lru_cache(TRANSLATIONS_MAX)
def translate(sql: str) -> str:
    """The portable text in PostgreSQL's words: parameters are numbered, and `user`, a function there, is quoted."""
    number = 0

    def word(match: re.Match[str]) -> str:
        nonlocal number
        found = match[0]
        if found == "?":
            number += 1
            return f"${number}"
        return '"user"' if found == "user" else found

    return _TOKEN.sub(word, sql)


class _Statement:
    """What a unit awaits: a request to whoever drives it."""

    __slots__ = ("args", "kind", "sql")

    def __init__(self, kind: Literal["all", "one", "execute", "many"], sql: str, args: Sequence[Any]) -> None:
        self.kind = kind
        self.sql = sql
        self.args = args

    def __await__(self) -> Generator[_Statement, Any, Any]:
        return (yield self)

    async def run(self, connection: Connection) -> Any:
        sql = translate(self.sql)
        if self.kind == "all":
            return [tuple(record) for record in await connection.fetch(sql, *self.args)]
        if self.kind == "one":
            record = await connection.fetchrow(sql, *self.args)
            return None if record is None else tuple(record)
        if self.kind == "execute":
            # The answer is `UPDATE 3`, `INSERT 0 3`.
            done: str = await connection.execute(sql, *self.args)
            count = done.rpartition(" ")[2]
            return int(count) if count.isdigit() else 0
        return await connection.executemany(sql, self.args)


class PostgresTx:
    """One transaction on one connection."""

    __slots__ = ("_took",)
    for_update = " FOR UPDATE"
    for_key_share = " FOR KEY SHARE"
    claiming = " FOR UPDATE SKIP LOCKED"

    def __init__(self, took: Callable[[int, int], None] | None = None) -> None:
        self._took = took

    def took(self, sid: int, seq: int) -> None:
        if self._took is not None:
            self._took(sid, seq)

    async def all(self, sql: str, *args: Any) -> list[Row]:
        rows: list[Row] = await _Statement("all", sql, args)
        return rows

    async def one(self, sql: str, *args: Any) -> Row | None:
        row: Row | None = await _Statement("one", sql, args)
        return row

    async def execute(self, sql: str, *args: Any) -> int:
        count: int = await _Statement("execute", sql, args)
        return count

    async def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            await _Statement("many", sql, rows)


async def _drive(unit: Unit[T], tx: Tx, connection: Connection) -> T:
    """Run a unit to its end, doing what it asks for on the connection. It may await nothing else."""
    steps = unit(tx).__await__()
    step: Any
    resume: Callable[[Any], Any] = steps.send
    answer: Any = None
    while True:
        try:
            step = resume(answer)
        except StopIteration as stop:
            value: T = stop.value
            return value
        if type(step) is not _Statement:
            steps.close()
            raise RuntimeError("a unit of the store awaited something other than its transaction")
        try:
            resume, answer = steps.send, await step.run(connection)
        except BaseException as error:
            resume, answer = steps.throw, error


# ---------------------------------------------------------------- what went wrong

# The server or the way to it is in trouble, and it is not the statement's fault.
_TROUBLE: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.InternalServerError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    UnsafeStore,
)
# Somebody else was first; the same again will do.
_OVERTAKEN: Final = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.InvalidCachedStatementError,
    asyncpg.OutdatedSchemaCacheError,
)


def _is_trouble(error: BaseException) -> bool:
    # asyncpg's complaints about arguments are InterfaceErrors too: those are bugs of ours.
    return isinstance(error, _TROUBLE) and not isinstance(error, asyncpg.DataError | ValueError)


def _is_cut(error: BaseException) -> bool:
    """Whether the connection is gone, as after a restart of the server: a new one may do."""
    return (
        _is_trouble(error)
        and isinstance(
            error,
            OSError
            | asyncpg.PostgresConnectionError
            | asyncpg.InterfaceError
            | asyncpg.InternalClientError
            | asyncpg.AdminShutdownError
            | asyncpg.CrashShutdownError,
        )
        and not isinstance(error, TimeoutError)
    )


def _is_unknown(error: BaseException) -> bool:
    """Whether a commit that ended so may have happened all the same. An answer from the server says that it did not,
    unless it is the server's last word: it may come while replicas are waited for, after the commit."""
    return _is_cut(error) or isinstance(error, TimeoutError)


def _unavailable(error: BaseException, *, unknown: bool = False) -> StoreUnavailable:
    if isinstance(error, StoreUnavailable):
        return error
    why = "the database did not answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}"
    # The server's own words name tables and settings, never values: those come as details, which are left out.
    if isinstance(error, asyncpg.PostgresError | UnsafeStore) and str(error):
        why = f"{why}: {str(error).splitlines()[0]}"
    return StoreUnavailable(why, unknown=unknown)


# ---------------------------------------------------------------- connections


def redact(url: str) -> str:
    """A store's URL without its password, for logs and messages."""
    parts = urlsplit(url)
    user = f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}{parts.netloc.rpartition('@')[2]}{parts.path}"


async def connect(url: str, **more: Any) -> Connection:
    """A connection of our settings to the primary. Raises StoreUnavailable in words for whoever starts a server."""
    try:
        return await asyncpg.connect(url, **{"timeout": CONNECT_SECONDS, "target_session_attrs": "primary"} | more)
    except Exception as error:
        if not _is_trouble(error) and not isinstance(error, ValueError):
            raise
        raise StoreUnavailable(f"{redact(url)}: {type(error).__name__}: {error}") from error


async def check_safety(connection: Connection, *, allow: bool) -> None:
    """Refuse a server whose commits may be lost at a power cut, after setting for this session what a session may set.

    https://www.postgresql.org/docs/current/runtime-config-wal.html: `fsync` and `full_page_writes` are the server's;
    with `synchronous_commit` off, local or remote_write a commit is acknowledged before all that should have it do.
    Raises UnsafeStore.
    """
    if connection.get_server_version() < (VERSION_MIN // 10_000,):
        raise UnsafeStore(f"PostgreSQL {connection.get_server_version().major} is too old; it needs 15 or newer.")
    settings = "current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit')"
    fsync, full_pages, commit = await connection.fetchrow(f"SELECT {settings}") or ("", "", "")
    if allow:
        return
    if commit not in SAFE_COMMITS:
        await connection.execute("SET synchronous_commit TO on")
        commit = await connection.fetchval("SELECT current_setting('synchronous_commit')")
    for name, value, safe in (
        ("fsync", fsync, fsync == "on"),
        ("full_page_writes", full_pages, full_pages == "on"),
        ("synchronous_commit", commit, commit in SAFE_COMMITS),
    ):
        if not safe:
            raise UnsafeStore(
                f"PostgreSQL has {name} = {value}, which loses acknowledged messages at a power cut. Set {name} = on "
                "there. To run unsafely on purpose set allow_unsafe_store = true."
            )


class PostgresStore:
    """The `Store` port over a PostgreSQL database. Make it with `open`, inside the running event loop."""

    def __init__(
        self,
        pool: Pool,
        append_pool: Pool,
        *,
        on_bus: bool = True,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self._pool = pool
        self._on_bus = on_bus
        self._append_pool = append_pool
        self._flights_max = append_pool.get_max_size()
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks("store")
        self._order = CommitOrder()
        self._closed = False
        # Messages by stream, oldest stream first; those whose stream is in a flight wait for its end in `_busy`.
        self._ready: OrderedDict[int, deque[Append]] = OrderedDict()
        self._busy: dict[int, deque[Append]] = {}
        self._ready_count = 0
        # Since when the first of each line has been waiting, on the loop's clock.
        self._since: dict[int, float] = {}
        self._flights: dict[Flight, float] = {}
        self._launching: asyncio.Handle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._running = 0
        self._idle: asyncio.Future[None] | None = None
        self._seen_generation: str | None = None

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        connections: int = 10,
        append_connections: int = 4,
        statement_seconds: float = 5.0,
        asynchronous: bool = False,
        allow_unsafe: bool = False,
        on_bus: bool = True,
        observe: Callable[[int, float], None] | None = None,
    ) -> PostgresStore:
        """Connect and check. `asynchronous` commits without waiting for the disk, which needs `allow_unsafe`.
        Not `on_bus`: what it commits is announced to nobody, so nodes are to look again (`changed_elsewhere`).

        Raises UnsafeStore, StoreUnavailable.
        """
        settings = {
            "application_name": "tidings",
            "statement_timeout": f"{int(statement_seconds * 1000)}",
            "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_MS}",
            "default_transaction_isolation": "read committed",
            # Every statement of ours has its index, and plans are kept: one made while a table was small must not walk
            # through it when it has grown. A statement without an index walks all the same.
            "enable_seqscan": "off",
            "jit": "off",
        }
        if asynchronous and allow_unsafe:
            settings["synchronous_commit"] = "off"

        async def prepare(connection: Connection) -> None:
            await check_safety(connection, allow=allow_unsafe)

        async def keep(connection: Connection) -> None:
            """Nothing of a session outlives its transaction: there is nothing to reset."""

        def pool(size: int) -> Pool:
            return asyncpg.create_pool(
                url,
                min_size=0,
                max_size=size,
                max_inactive_connection_lifetime=300.0,
                max_queries=1_000_000,
                init=prepare,
                reset=keep,
                server_settings=settings,
                statement_cache_size=PREPARED_MAX,
                max_cached_statement_lifetime=0,
                max_cacheable_statement_size=0,
                command_timeout=statement_seconds + GRACE_SECONDS,
                timeout=CONNECT_SECONDS,
                target_session_attrs="primary",
            )

        first = await connect(url, server_settings=settings)
        try:
            await prepare(first)
        finally:
            await first.close()
        made = cls(await pool(connections), await pool(append_connections), on_bus=on_bus, observe=observe)
        made._seen_generation = await made.read(_generation)
        return made

    # ------------------------------------------------------------ the port

    def append(self, item: Append) -> None:
        if self._closed:
            self._loop.call_soon(item.done, StoreUnavailable("it is closing"))
            return
        line = self._busy.get(item.sid)
        if line is None:
            line = self._ready.get(item.sid)
            if line is None:
                line = self._ready[item.sid] = deque()
            self._ready_count += 1
        if not line:
            self._since[item.sid] = self._loop.time()
        line.append(item)
        if self._launching is None:
            # What comes in the same tick of the loop leaves together.
            self._launching = self._loop.call_soon(self._launch)

    async def run(self, unit: Unit[T], then: Callable[[T], None] | None = None) -> T:
        if self._closed:
            raise StoreUnavailable("it is closing")
        future: asyncio.Future[T] = self._loop.create_future()
        # In a task of its own: a caller who gives up must not end it between its commit and its announcement.
        self._running += 1
        self._tasks.spawn(self._run(unit, then, future), "unit")
        return await future

    async def read(self, unit: Unit[T]) -> T:
        if self._closed:
            raise StoreUnavailable("it is closing")
        self._running += 1
        try:
            try:
                return await self._read(unit)
            except Exception as error:
                if not _is_cut(error):
                    raise
                # Connections that a restart has cut are found out by their use: once more, with a new one.
                return await self._read(unit)
        except Exception as error:
            if not _is_trouble(error):
                raise
            raise _unavailable(error) from error
        finally:
            self._ended()

    async def glance(self, unit: Unit[T]) -> T:
        return await self.read(unit)

    async def changed_elsewhere(self) -> bool:
        """Whether somebody who is not on the bus has committed since the last call.

        Commits of other nodes are everyday life here, and their notices travel by the bus. An operator's command has no
        bus, and a node may have lost it: they count up the generation in `meta`.
        """
        if self._closed:
            return False
        generation = await self.read(_generation)
        changed = generation != self._seen_generation
        self._seen_generation = generation
        return changed

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._patience is not None:
            self._patience.cancel()
        while self._ready or self._busy or self._running:
            self._idle = self._loop.create_future()
            await self._idle
        await self._tasks.close()
        await asyncio.gather(self._append_pool.close(), self._pool.close())

    # ------------------------------------------------------------ appends

    def _launch(self) -> None:
        """Let batches leave, as many as make sense."""
        self._launching = None
        while self._ready:
            if self._flights:
                oldest = next(iter(self._flights.values()))
                late = self._loop.time() - oldest
                if len(self._flights) >= self._flights_max:
                    return
                if self._ready_count < FLIGHT_MIN and late < FLIGHT_PATIENCE and not self._closed:
                    if self._patience is None:
                        self._patience = self._loop.call_later(FLIGHT_PATIENCE - late, self._lose_patience)
                    return
            self._take_off()

    def _lose_patience(self) -> None:
        self._patience = None
        self._launch()

    def _take_off(self) -> None:
        items: list[Append] = []
        sids = []
        now = self._loop.time()
        while self._ready and len(items) < BATCH_MAX:
            sid, line = self._ready.popitem(last=False)
            self._ready_count -= len(line)
            if now - self._since.pop(sid) > QUEUE_SECONDS:
                self._refuse(line, "the database does not keep up")
                continue
            size = min(len(line), BATCH_MAX - len(items))
            items += [line.popleft() for _ in range(size)]
            if line:
                self._since[sid] = now
            self._busy[sid] = line
            sids.append(sid)
        if not items:
            self._wake()
            return
        flight = Flight(frozenset(sids))
        self._flights[flight] = now
        self._order.started(flight)
        self._tasks.spawn(self._fly(flight, items), "batch")

    async def _fly(self, flight: Flight, items: list[Append]) -> None:
        started = time.perf_counter()
        firsts: dict[int, int] = {}
        told: list[tuple[Append, Outcome]]
        out_of_reach = False
        try:
            told, firsts = await self._append(items)
        except _OutOfReach as error:
            out_of_reach = True
            told = [(item, _unavailable(error)) for item in items]
        except Exception as error:
            told = [(item, error) for item in items]
        del self._flights[flight]
        self._order.landed(flight, firsts, lambda: self._landed(flight, told, started, out_of_reach=out_of_reach))

    async def _append(self, items: list[Append]) -> tuple[list[tuple[Append, Outcome]], dict[int, int]]:
        """Store a batch; the outcomes. Raises StoreUnavailable, or _OutOfReach before anything was sent."""
        try:
            connection = await self._append_pool.acquire(timeout=CONNECT_SECONDS)
        except Exception as error:
            if not _is_trouble(error):
                raise
            raise _OutOfReach(f"{type(error).__name__}: {error}") from error
        try:
            try:
                return await _append_batch(connection, Batch(items))
            except StoreUnavailable:
                raise
            except Exception as error:
                if _is_trouble(error):
                    _drop(connection, error)
                    raise _unavailable(error, unknown=_is_unknown(error)) from error
                if len(items) == 1:
                    raise
                log.error("batch_failed", items=len(items), exc_info=error)
            # Something in one of them is more than the database takes: it alone shall fail.
            return await self._append_singly(connection, items)
        finally:
            await self._give_back(self._append_pool, connection)

    @staticmethod
    async def _append_singly(
        connection: Connection, items: list[Append]
    ) -> tuple[list[tuple[Append, Outcome]], dict[int, int]]:
        told: list[tuple[Append, Outcome]] = []
        firsts: dict[int, int] = {}
        for item in items:
            try:
                one, first = await _append_batch(connection, Batch([item]))
            except Exception as error:
                told.append((item, _unavailable(error, unknown=_is_unknown(error)) if _is_trouble(error) else error))
                continue
            told += one
            firsts = first | firsts
        return told, firsts

    def _landed(
        self, flight: Flight, told: list[tuple[Append, Outcome]], started: float, *, out_of_reach: bool
    ) -> None:
        """On the event loop, when it is this batch's turn: tell everyone, and let their streams go on."""
        for item, outcome in told:
            try:
                item.done(outcome)
            except Exception as error:  # One listener's bug must not silence the others.
                self._report(error)
        for sid in flight.sids:
            line = self._busy.pop(sid)
            if line:
                self._ready[sid] = line
                self._ready_count += len(line)
        if out_of_reach:
            self._refuse_waiting()
        if self._observe is not None:
            self._observe(len(told), time.perf_counter() - started)
        if self._launching is None:
            self._launch()
        self._wake()

    def _refuse_waiting(self) -> None:
        """The database is out of reach: who waits behind is told now, not after everybody's turn at finding out."""
        lines = list(self._ready.values())
        for sid in self._ready:
            del self._since[sid]
        self._ready.clear()
        self._ready_count = 0
        for line in lines:
            self._refuse(line, "the database is out of reach")

    def _refuse(self, line: deque[Append], why: str) -> None:
        for item in line:
            try:
                item.done(StoreUnavailable(why))
            except Exception as error:
                self._report(error)

    # ------------------------------------------------------------ units

    async def _run(self, unit: Unit[T], then: Callable[[T], None] | None, future: asyncio.Future[T]) -> None:
        started = time.perf_counter()
        ticket = Ticket()
        try:
            value, ticket = await self._commit(unit)
        except asyncio.CancelledError:
            self._finish_unit(future, None, StoreUnavailable("it is closing"), None)
            raise
        except Exception as error:
            self._finish_unit(future, None, _unavailable(error) if _is_trouble(error) else error, None)
            return

        def tell() -> None:
            self._finish_unit(future, value, None, then)
            if self._observe is not None:
                self._observe(1, time.perf_counter() - started)

        self._order.finished(ticket, tell)

    def _finish_unit(
        self, future: asyncio.Future[T], value: Any, error: Exception | None, then: Callable[[T], None] | None
    ) -> None:
        if error is None and then is not None:
            try:
                then(value)
            except Exception as broken:
                self._report(broken)
                error = broken
        if not future.done():
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)
        self._ended()

    async def _commit(self, unit: Unit[T]) -> tuple[T, Ticket]:
        """Run a unit and commit it, again if it was overtaken. Raises what the unit raises, or StoreUnavailable."""
        cut = False
        attempt = 0
        while True:
            attempt += 1
            ticket = Ticket()
            try:
                return await self._attempt(unit, ticket), ticket
            except BaseException as error:
                self._order.finished(ticket, None)
                if isinstance(error, _OVERTAKEN):
                    if attempt < ATTEMPTS_MAX:
                        continue
                    raise StoreUnavailable("others kept changing the same") from error
                # A connection that a restart has cut is found out by its use. Nothing was under way: once more.
                if isinstance(error, _CutBefore) and not cut:
                    cut = True
                    continue
                raise

    async def _attempt(self, unit: Unit[T], ticket: Ticket) -> T:
        order = self._order
        connection = await self._pool.acquire(timeout=CONNECT_SECONDS)
        try:
            try:
                await connection.execute("BEGIN")
            except Exception as error:
                _drop(connection, error)
                if not _is_cut(error):
                    raise
                raise _CutBefore(f"{type(error).__name__}: {error}") from error
            try:
                async with asyncio.timeout(UNIT_SECONDS):
                    value = await _drive(unit, PostgresTx(lambda sid, seq: order.took(ticket, sid, seq)), connection)
                    if not self._on_bus:
                        await _drive(count_generation, PostgresTx(), connection)
            except BaseException as error:
                if not _drop(connection, error):
                    await _roll_back(connection)
                raise
            order.committing(ticket)
            try:
                done = await connection.execute("COMMIT")
            except BaseException as error:
                _drop(connection, error)
                if _is_trouble(error):
                    raise _unavailable(error, unknown=_is_unknown(error)) from error
                raise
            if done != "COMMIT":
                raise RuntimeError("a unit of the store went on after one of its statements had failed")
            return value
        finally:
            await self._give_back(self._pool, connection)

    # ------------------------------------------------------------ reads

    async def _read(self, unit: Unit[T]) -> T:
        connection = await self._pool.acquire(timeout=CONNECT_SECONDS)
        try:
            try:
                await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                value = await _drive(unit, PostgresTx(), connection)
            except BaseException as error:
                if not _drop(connection, error):
                    await _roll_back(connection)
                raise
            await _roll_back(connection)
            return value
        finally:
            await self._give_back(self._pool, connection)

    # ------------------------------------------------------------ all of them

    @staticmethod
    async def _give_back(pool: Pool, connection: Any) -> None:
        try:
            await pool.release(connection)
        except _TROUBLE:
            pass  # It is closed, and replaced at the next need.

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "announcing a commit failed", "exception": error})

    def _ended(self) -> None:
        self._running -= 1
        self._wake()

    def _wake(self) -> None:
        idle, self._idle = self._idle, None
        if idle is not None and not idle.done():
            idle.set_result(None)


class _CutBefore(ConnectionError):
    """The connection was gone before anything was asked of it."""


class _OutOfReach(ConnectionError):
    """There is no connection to be had."""


def _drop(connection: Connection, error: BaseException) -> bool:
    """Be done with a connection on which nothing can be asked any more: it is cut, or an answer may still come."""
    lost = _is_cut(error) or isinstance(error, TimeoutError | asyncio.CancelledError)
    if lost:
        _terminate(connection)
    return lost


def _terminate(connection: Connection) -> None:
    try:
        connection.terminate()
    except asyncpg.InterfaceError:
        pass  # The pool has noticed before us.


async def _roll_back(connection: Connection) -> None:
    """End the transaction without a trace. A connection on which that fails is of no further use."""
    try:
        await connection.execute("ROLLBACK")
    except _TROUBLE:
        _terminate(connection)


async def _append_batch(connection: Connection, batch: Batch) -> tuple[list[tuple[Append, Outcome]], dict[int, int]]:
    """Store a batch; the outcome of each message, and the first number taken of each stream."""
    for attempt in range(ATTEMPTS_MAX):
        try:
            if not attempt:
                return batch.outcomes(await connection.fetch(APPEND, *batch.arguments()))
            async with connection.transaction():
                await connection.execute(LOCK, batch.sids())
                rows = await connection.fetch(APPEND, *batch.arguments())
            return batch.outcomes(rows)
        except (asyncpg.UniqueViolationError, *_OVERTAKEN):
            continue
    raise StoreUnavailable("others kept changing the same")


async def _generation(tx: Tx) -> str | None:
    row = await tx.one("SELECT value FROM meta WHERE name=?", GENERATION)
    return None if row is None else str(row[0])
