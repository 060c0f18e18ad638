"""What only PostgreSQL promises: safe settings, several nodes on one database, and trouble that is survived."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from tests.contracts.store_contract import APP, event, event_unit, make_stream, outcomes, query, seqs, submit
from tests.postgres import fresh_database, own_server, server
from tidings.server.errors import StoreUnavailable, UnsafeStore
from tidings.server.store import postgres
from tidings.server.store.base import COUNTS, Appended, Tx
from tidings.server.store.migrations.postgres import migrate
from tidings.server.store.postgres import PostgresStore, redact, translate
from tidings.testing.chaos import LOOPBACK, ChaosProxy
from tidings.testing.postgres import PostgresProcess

# What a condition may take on a busy machine, seconds.
PATIENCE = 20.0


async def open_store(url: str, **more: Any) -> PostgresStore:
    return await PostgresStore.open(url, **{"allow_unsafe": True, **more})


@pytest.fixture
async def url() -> str:
    return await fresh_database()


@pytest.fixture
async def store(url: str) -> AsyncIterator[PostgresStore]:
    made = await open_store(url)
    await make_stream(made, 1, "alice", "bob", "carol")
    await make_stream(made, 2, "alice")
    yield made
    await made.close()


@pytest.fixture(scope="module", name="own_server")
def _own_server() -> Iterator[PostgresProcess]:
    with own_server() as process:
        yield process


async def own_database(process: PostgresProcess, name: str) -> str:
    """The URL of a database with the schema on a server of the test's own."""
    admin = await asyncpg.connect(process.url())
    await admin.execute(f"DROP DATABASE IF EXISTS {name}")
    await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    connection = await postgres.connect(process.url(name))
    await migrate(connection)
    await connection.close()
    return process.url(name)


async def until_recovered(store: PostgresStore, sid: int = 1) -> Appended:
    """Send again and again, as a client does, until it is stored."""
    deadline = time.monotonic() + PATIENCE
    while True:
        (outcome,) = await outcomes([submit(store, sid, "recovered")])
        if isinstance(outcome, Appended):
            return outcome
        assert isinstance(outcome, StoreUnavailable), outcome
        assert time.monotonic() < deadline, outcome
        await asyncio.sleep(0.02)  # why: the pace of a loop that looks at a condition


# ------------------------------------------------------------ words


def test_statements_are_put_into_its_words() -> None:
    assert translate("SELECT user, m.user, users FROM members WHERE a=? AND b='user?' AND members.user=?") == (
        "SELECT \"user\", m.user, users FROM members WHERE a=$1 AND b='user?' AND members.user=$2"
    )
    assert translate("INSERT INTO t(app,user,seq) VALUES (?,?,?) ON CONFLICT (app,user) DO NOTHING") == (
        'INSERT INTO t(app,"user",seq) VALUES ($1,$2,$3) ON CONFLICT (app,"user") DO NOTHING'
    )


def test_no_message_holds_the_password() -> None:
    assert redact("postgres://tidings:secret@db.internal:5432/chat?sslmode=require") == (
        "postgres://tidings@db.internal:5432/chat"
    )


async def test_a_database_that_cannot_be_reached_is_named_without_its_password() -> None:
    with pytest.raises(StoreUnavailable) as failed:
        await open_store("postgres://tidings:secret@127.0.0.1:1/chat")
    assert "127.0.0.1:1/chat" in str(failed.value)
    assert "secret" not in str(failed.value)


# ------------------------------------------------------------ D3


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_d3_a_server_that_may_lose_commits_is_refused_unless_it_is_asked_for_by_name(
    own_server: PostgresProcess, setting: str
) -> None:
    url = await own_database(own_server, "unsafe")
    store = await PostgresStore.open(url)
    assert await store.run(_nothing) is None
    await set_and_wait(own_server, setting, "off")
    try:
        with pytest.raises(UnsafeStore, match=f"{setting} = off.*allow_unsafe_store"):
            await PostgresStore.open(url)
        await (await PostgresStore.open(url, allow_unsafe=True)).close()
        # Nor does a node that runs already take such a server for its own, as after a failover to another one.
        await store._pool.expire_connections()
        with pytest.raises(StoreUnavailable, match=setting):
            await store.run(_nothing)
    finally:
        await set_and_wait(own_server, setting, "on")
    assert await store.run(_nothing) is None
    await store.close()


async def _nothing(tx: Tx) -> None:
    await tx.one("SELECT 1")


async def set_and_wait(process: PostgresProcess, setting: str, value: str) -> None:
    """Change a setting of the server and wait until new sessions have it."""
    process.reload(**{setting: value})
    deadline = time.monotonic() + PATIENCE
    found = ""
    while found != value:
        assert time.monotonic() < deadline, f"{setting} is still {found}"
        connection = await asyncpg.connect(process.url())
        found = await connection.fetchval("SELECT current_setting($1)", setting)
        await connection.close()


@pytest.mark.parametrize("level", ["off", "local", "remote_write"])
async def test_d3_commits_wait_for_the_disk_whatever_the_database_says(own_server: PostgresProcess, level: str) -> None:
    url = await own_database(own_server, "eager")
    connection = await asyncpg.connect(own_server.url())
    await connection.execute(f"ALTER ROLE postgres SET synchronous_commit = '{level}'")

    async def commits(tx: Tx) -> Any:
        return (await tx.one("SELECT current_setting('synchronous_commit')") or ("",))[0]

    try:
        safe = await PostgresStore.open(url)
        assert await safe.run(commits) == "on"
        assert await safe.read(commits) == "on"
        await safe.close()
        unsafe = await PostgresStore.open(url, allow_unsafe=True, asynchronous=True)
        assert await unsafe.run(commits) == "off"
        await unsafe.close()
    finally:
        await connection.execute("ALTER ROLE postgres RESET synchronous_commit")
        await connection.close()


# ------------------------------------------------------------ several nodes


async def test_d4_thirty_two_writers_on_two_nodes_leave_no_gap(url: str, store: PostgresStore) -> None:
    other = await open_store(url)
    told: list[tuple[int, int]] = []

    async def writer(name: int) -> None:
        node = (store, other)[name % 2]
        for n in range(15):
            if n % 5 == 4:
                await node.run(event_unit(1, f"{name}/{n}"), lambda seq: told.append((name % 2, seq)))
            else:
                told.append((name % 2, (await submit(node, 1, f"{name}/{n}", sender=f"w{name}")).seq))

    await asyncio.gather(*(writer(name) for name in range(32)))
    assert sorted(seq for _, seq in told) == list(range(1, 32 * 15 + 1))
    assert await seqs(store, 1) == await seqs(other, 1) == list(range(1, 32 * 15 + 1))
    await other.close()


async def test_d7_repeats_that_race_on_two_nodes_are_stored_once(url: str, store: PostgresStore) -> None:
    other = await open_store(url)
    for n in range(60):
        copies = [submit(node, 1, f"k{n}") for node in (store, other, store, other)]
        copies += [submit(node, 1, f"fill{n}/{i}") for i, node in enumerate((store, other))]
        found = await asyncio.gather(*copies)
        first = [stored for stored in found[:4] if not stored.duplicate]
        assert len(first) == 1
        assert {(stored.message_id, stored.seq) for stored in found[:4]} == {(first[0].message_id, first[0].seq)}
    assert await seqs(store, 1) == list(range(1, 60 * 3 + 1))
    await other.close()


async def test_d7_a_repeat_that_waited_behind_its_first_try_gets_its_result(url: str, store: PostgresStore) -> None:
    other = await open_store(url)
    holder = await asyncpg.connect(url)
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM streams WHERE sid=1 FOR UPDATE")
        # Both have begun, and see a database without the message, when one of them stores it.
        copies = [submit(node, 1, "same") for node in (store, other)]
        while len(await query(store, "SELECT 1 FROM pg_locks WHERE NOT granted")) < 2:
            await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition
    first, second = await asyncio.gather(*copies)
    assert (first.message_id, first.seq) == (second.message_id, second.seq)
    assert {first.duplicate, second.duplicate} == {True, False}
    await holder.close()
    await other.close()


async def test_batches_and_changes_on_many_streams_never_wait_for_each_other_in_a_circle(
    url: str, store: PostgresStore
) -> None:
    other = await open_store(url)
    sids, users = list(range(10, 40)), ["alice", "bob", "carol"]
    for sid in sids:
        await make_stream(store, sid, *users)
    rng = random.Random(4)

    async def send(node: PostgresStore, name: str) -> None:
        for n in range(8):
            chosen = rng.sample(sids, 12)
            await asyncio.gather(
                *[
                    submit(node, sid, f"{name}/{n}/{user}", sender=user)
                    for sid in chosen
                    for user in rng.sample(users, 2)
                ]
            )

    async def receipts(node: PostgresStore) -> None:
        for n in range(20):
            rows = sorted((APP, sid, user) for sid in rng.sample(sids, 10) for user in users)

            async def unit(tx: Tx, rows: list[tuple[int, int, str]] = rows, n: int = n) -> None:
                await tx.many(
                    "UPDATE members SET delivered=? WHERE app=? AND sid=? AND user=? AND delivered<?",
                    [(n, *row, n) for row in rows],
                )

            await node.run(unit)

    work = [send(node, f"{place}{i}") for place, node in enumerate((store, other)) for i in range(3)]
    await asyncio.gather(*work, receipts(store), receipts(other))
    for sid in sids:
        found = await seqs(store, sid)
        assert found == list(range(1, len(found) + 1))
    # The statistics of a session are written when it has been idle for a moment: ending it writes them too.
    await other.close()
    [(deadlocks,)] = await query(
        store, "SELECT CAST(deadlocks AS BIGINT) FROM pg_stat_database WHERE datname=current_database()"
    )
    assert deadlocks == 0


async def test_one_locked_stream_holds_up_no_other(url: str, store: PostgresStore) -> None:
    holder = await asyncpg.connect(url)
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM streams WHERE sid=1 FOR UPDATE")
        held = submit(store, 1, "held")
        await asyncio.sleep(0)
        assert [(await submit(store, 2, f"k{n}")).seq for n in range(20)] == list(range(1, 21))
        assert not held.done()
    assert (await held).seq == 1
    await holder.close()


# ------------------------------------------------------------ one bad apple


async def test_what_the_database_does_not_take_fails_alone(store: PostgresStore) -> None:
    # A text with a NUL cannot be stored.
    found = await outcomes(
        [submit(store, 1, "a"), submit(store, 1, "b\0"), submit(store, 1, "c"), submit(store, 2, "d")]
    )
    assert [type(outcome) for outcome in found][:1] == [Appended]
    assert isinstance(found[1], asyncpg.PostgresError)
    assert [outcome.seq for outcome in found if isinstance(outcome, Appended)] == [1, 2, 1]
    assert await seqs(store, 1) == [1, 2]


async def test_plans_do_not_depend_on_how_large_tables_were(store: PostgresStore) -> None:
    """The lookup of keys goes through its index from the first message on."""

    async def plan(tx: Tx) -> str:
        sql = "SELECT seq FROM messages WHERE app=? AND sid=? AND sender=? AND key=?"
        return "\n".join(row[0] for row in await tx.all("EXPLAIN " + sql, APP, 1, "alice", "k"))

    assert "messages_key" in await store.read(plan)


# ------------------------------------------------------------ D21


async def _load(store: PostgresStore, stop: asyncio.Event) -> dict[str, Any]:
    """Ten writers that go on whatever the answers are; each key's last outcome."""
    found: dict[str, Any] = {}

    async def writer(name: int) -> None:
        n = 0
        while not stop.is_set():
            key = f"{name}/{n}"
            (found[key],) = await outcomes([submit(store, 1 + name % 2, key, sender=f"w{name}")])
            n += 1
            if not isinstance(found[key], Appended):
                await asyncio.sleep(0.01)  # why: a client waits before it tries again

    async def reader() -> None:
        while not stop.is_set():
            try:
                await query(store, "SELECT head FROM streams WHERE sid=1")
                await store.run(event_unit(2, "e"))
            except StoreUnavailable:
                await asyncio.sleep(0.01)  # why: as above

    await asyncio.gather(*(writer(name) for name in range(10)), reader())
    return found


@pytest.mark.parametrize("fault", ["restart", "kill -9", "terminate"])
async def test_d21_the_database_may_go_away_and_come_back(own_server: PostgresProcess, fault: str) -> None:
    url = await own_database(own_server, "gone")
    store = await PostgresStore.open(url)
    await make_stream(store, 1)
    await make_stream(store, 2)
    stop = asyncio.Event()
    load = asyncio.ensure_future(_load(store, stop))
    for round in range(3):
        await until_stored(store, 40 * (round + 1))
        if fault == "restart":
            own_server.restart()
        elif fault == "kill -9":
            own_server.kill9()
            own_server.start()
        else:
            admin = await asyncpg.connect(own_server.url())
            await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname='gone'")
            await admin.close()
    recovered = await until_recovered(store)
    assert recovered.seq
    stop.set()
    found = await load
    unexpected = [outcome for outcome in found.values() if not isinstance(outcome, Appended | StoreUnavailable)]
    assert unexpected == []
    stored = {key: (sid, seq) for key, sid, seq in await query(store, "SELECT key, sid, seq FROM messages")}
    acknowledged = {key: outcome.seq for key, outcome in found.items() if isinstance(outcome, Appended)}
    assert {key: stored.get(key, (0, 0))[1] for key in acknowledged} == acknowledged
    for sid in (1, 2):
        numbers = await seqs(store, sid)
        assert numbers == list(range(1, len(numbers) + 1))
    await store.close()


async def until_stored(store: PostgresStore, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            [(stored,)] = await query(store, "SELECT count(*) FROM messages")
        except StoreUnavailable:
            stored = 0
        if stored >= count:
            return
        assert time.monotonic() < deadline, f"{stored} of {count} messages were stored"
        await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition


async def test_d21_a_commit_whose_answer_is_lost_is_not_acknowledged(url: str, store: PostgresStore) -> None:
    port = server().port
    async with ChaosProxy(port) as proxy:
        far = await open_store(url.replace(f"{LOOPBACK}:{port}", f"{LOOPBACK}:{proxy.port}"))
        assert (await submit(far, 1, "before")).seq == 1
        # The statement arrives and commits; its answer does not come back.
        proxy.set(stall_down=True)
        lost = submit(far, 1, "lost")
        await until_stored(store, 2)
        assert not lost.done()
        proxy.cut()
        proxy.heal()
        with pytest.raises(StoreUnavailable, match="not known"):
            await lost
        # The client tries again with the same key, and gets the first result.
        again = await submit(far, 1, "lost")
        assert (again.seq, again.duplicate) == (2, True)

        async def unit(tx: Tx) -> int:
            seq = await event(tx, 1, "lost too")
            proxy.set(stall_down=True)
            return seq

        told: list[int] = []
        changing = asyncio.ensure_future(far.run(unit, told.append))
        while await seqs(store, 1) != [1, 2, 3]:
            await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition
        assert not changing.done()
        proxy.cut()
        proxy.heal()
        with pytest.raises(StoreUnavailable, match="not known"):
            await changing
        assert told == []
        assert (await submit(far, 1, "after")).seq == 4
        await far.close()


async def test_d21_waiting_for_a_lock_ends_and_nothing_is_stored(url: str) -> None:
    store = await open_store(url, statement_seconds=0.3)
    await make_stream(store, 1)
    holder = await asyncpg.connect(url)
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM streams WHERE sid=1 FOR UPDATE")
        found = await asyncio.gather(submit(store, 1, "held"), store.run(event_unit(1, "held")), return_exceptions=True)
    assert {type(outcome) for outcome in found} == {StoreUnavailable}
    assert (await submit(store, 1, "held")).seq == 1
    await holder.close()
    await store.close()


async def test_d21_who_waited_too_long_behind_a_stuck_batch_is_told_so(
    url: str, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "QUEUE_SECONDS", 0.05)
    holder = await asyncpg.connect(url)
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM streams WHERE sid=1 FOR UPDATE")
        stuck = submit(store, 1, "stuck")
        await asyncio.sleep(0)
        behind, began = submit(store, 1, "behind"), asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - began <= postgres.QUEUE_SECONDS:
            assert (await submit(store, 2, f"{asyncio.get_running_loop().time()}")).seq
    assert (await stuck).seq == 1
    with pytest.raises(StoreUnavailable, match="keep up"):
        await behind
    assert (await submit(store, 1, "behind")).seq == 2
    await holder.close()


async def test_d21_when_all_connections_are_taken_the_next_is_told_so(
    url: str, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "CONNECT_SECONDS", 0.2)
    narrow = await open_store(url, connections=1)
    holder = await asyncpg.connect(url)
    async with holder.transaction():
        await holder.execute("SELECT 1 FROM streams WHERE sid=1 FOR UPDATE")
        waiting = asyncio.ensure_future(narrow.run(event_unit(1, "e")))
        await asyncio.sleep(0)
        while narrow._pool.get_idle_size() or not narrow._pool.get_size():
            await asyncio.sleep(0)  # why: the pace of a loop that looks at a condition
        with pytest.raises(StoreUnavailable):
            await query(narrow, "SELECT 1")
        # Messages have connections of their own.
        assert (await submit(narrow, 2, "k")).seq == 1
    assert await waiting == 1
    assert await query(narrow, "SELECT 1") == [(1,)]
    await holder.close()
    await narrow.close()


async def test_a_unit_that_was_overtaken_is_run_again_and_told_once(url: str, store: PostgresStore) -> None:
    told: list[int] = []
    runs = 0

    async def crosswise(tx: Tx) -> int:
        nonlocal runs
        runs += 1
        await tx.execute("UPDATE streams SET epoch='a' WHERE sid=2")
        return await event(tx, 1, f"e{runs}")

    holder = await asyncpg.connect(url)
    # Of two in a circle, the one that looks first is ended.
    await holder.execute("SET deadlock_timeout = '60s'")
    async with holder.transaction():
        await holder.execute("UPDATE streams SET epoch='b' WHERE sid=1")
        unit = asyncio.ensure_future(store.run(crosswise, told.append))
        while not await query(store, "SELECT 1 FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition
        await holder.execute("UPDATE streams SET epoch='b' WHERE sid=2")
    assert await unit == 1
    # Once more, or as often as it takes on a busy machine until the other one has let go.
    assert (runs > 1, told) == (True, [1])
    assert await query(store, "SELECT item FROM events WHERE sid=1") == [(f"e{runs}",)]
    await holder.close()


async def test_counts_of_a_message_that_waited_do_not_go_back(store: PostgresStore) -> None:
    await submit(store, 1, "new", at=2_000)
    await submit(store, 1, "old", at=1_500, flags=COUNTS)
    assert await query(store, "SELECT moved_at, last_message_at, counted FROM streams WHERE sid=1") == [
        (2_000, 1_500, 2)
    ]
