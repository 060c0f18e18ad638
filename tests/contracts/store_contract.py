"""What every store must do, told through the port alone.

An adapter is a `Site`: a database that can be opened, opened again, written to by somebody else and made to fail.
`ADAPTERS` in `test_store.py` lists them; no case below knows which one it runs on.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import pytest

from tidings.server.errors import Refusal, StoreUnavailable
from tidings.server.store import log
from tidings.server.store.base import BACKEND, COUNTS, MENTIONS_ALL, SILENT, Append, Appended, Row, Stale, Store, Tx

APP, OTHER_APP = 1, 2
# Appends at once: several statements of many rows each.
MANY = 150


class Site(Protocol):
    """Where a store lives."""

    async def open(self) -> Store:
        """A store on this database, as a server opens it. Closed by the site in the end."""
        ...

    async def outside(self, sql: str) -> None:
        """Commit a statement from another process's connection."""
        ...

    async def fail(self, store: Store) -> None:
        """Let the store's next commits fail, as a full disk does."""
        ...

    async def heal(self, store: Store) -> None:
        """Let commits succeed again."""
        ...


Sender = Callable[..., "asyncio.Future[Appended]"]
_serial = itertools.count(1)


def submit(store: Store, sid: int, key: str, **other: Any) -> asyncio.Future[Appended]:
    """Append a message; its outcome."""
    future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()

    def done(outcome: Appended | Exception) -> None:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    fields: dict[str, Any] = {
        "app": APP,
        "access_version": 1,
        "sender": "alice",
        "digest": b"body",
        "message_id": f"m_{next(_serial):06}",
        "sealed": b"sealed",
        "at": 1_000,
        "flags": COUNTS,
        "reply_to": None,
        "mentions": (),
        "done": done,
    }
    store.append(Append(sid=sid, key=key, **{**fields, **other}))
    return future


async def outcomes(futures: list[asyncio.Future[Appended]]) -> list[Appended | BaseException]:
    return list(await asyncio.gather(*futures, return_exceptions=True))


async def make_stream(store: Store, sid: int, *members: str, app: int = APP) -> None:
    async def unit(tx: Tx) -> None:
        await log.insert_stream(
            tx,
            sid=sid,
            app=app,
            kind="channel",
            ref=f"ch{sid}",
            epoch="e",
            at=1,
            key_wrapped=b"k",
            key_version=1,
            key_app_version=1,
        )
        for user in members:
            await tx.execute(
                "INSERT INTO members(app,sid,user,role,joined_at,joined_seq,moved_at) VALUES (?,?,?,?,?,?,?)",
                app,
                sid,
                user,
                "member",
                1,
                0,
                1,
            )

    await store.run(unit)


async def query(store: Store, sql: str, *args: Any) -> list[Row]:
    async def unit(tx: Tx) -> list[Row]:
        return await tx.all(sql, *args)

    return await store.read(unit)


async def seqs(store: Store, sid: int) -> list[int]:
    """The numbers of the stream's events, in order."""

    async def unit(tx: Tx) -> list[int]:
        return [row.seq for row in await log.events_after(tx, APP, sid, 0, 10_000)]

    return await store.read(unit)


async def event(tx: Tx, sid: int, item: str) -> int:
    return await log.append_event(
        tx, app=APP, sid=sid, type="test", at=2, now=2, by=None, ref=None, item=item, sealed=None
    )


def event_unit(sid: int, item: str) -> Callable[[Tx], Awaitable[int]]:
    async def unit(tx: Tx) -> int:
        return await event(tx, sid, item)

    return unit


class StoreContract:
    """The cases. Subclasses give the fixtures `site` and `store` (open, with the streams 1 and 2 of `APP`)."""

    # ------------------------------------------------------------ numbers

    async def test_appends_get_the_numbers_from_one_on_without_a_gap(self, store: Store) -> None:
        async def writer(name: str) -> list[int]:
            found = []
            for n in range(MANY // 10):
                found.append((await submit(store, 1 + n % 2, f"{name}{n}", sender=name)).seq)
            return found

        await asyncio.gather(*(writer(f"w{n}") for n in range(10)))
        total = await seqs(store, 1) + await seqs(store, 2)
        assert await seqs(store, 1) == list(range(1, len(await seqs(store, 1)) + 1))
        assert await seqs(store, 2) == list(range(1, len(await seqs(store, 2)) + 1))
        assert len(total) == MANY

    async def test_a_burst_is_numbered_in_the_order_it_was_handed_over(self, store: Store) -> None:
        found = await asyncio.gather(*[submit(store, 1, f"k{n}") for n in range(MANY)])
        assert [stored.seq for stored in found] == list(range(1, MANY + 1))

    async def test_appends_and_units_take_numbers_from_one_sequence(self, store: Store) -> None:
        first = submit(store, 1, "a")
        second = asyncio.ensure_future(store.run(event_unit(1, "e1")))
        await asyncio.sleep(0)
        third = submit(store, 1, "b")
        before, unit, after = (await first).seq, await second, (await third).seq
        assert sorted([before, unit, after]) == [1, 2, 3]
        assert before < after
        assert await seqs(store, 1) == [1, 2, 3]

    async def test_nothing_that_failed_leaves_a_gap(self, store: Store) -> None:
        async def failing(tx: Tx) -> None:
            await event(tx, 1, "never")
            raise ValueError

        submitted = []
        for n in range(30):
            submitted.append(submit(store, 1, f"k{n}"))
            submitted.append(submit(store, 1, f"s{n}", access_version=9))
            submitted.append(submit(store, 1, f"k{n}", digest=b"other"))
            submitted.append(asyncio.ensure_future(store.run(failing)))  # type: ignore[arg-type]
            await asyncio.sleep(0)
        await outcomes(submitted)
        assert await seqs(store, 1) == list(range(1, 31))
        assert await query(store, "SELECT head, messages FROM streams WHERE sid=1") == [(30, 30)]

    # ------------------------------------------------------------ once

    async def test_a_repeated_key_gives_the_first_result_in_one_batch_and_later(self, store: Store) -> None:
        copies = await asyncio.gather(*[submit(store, 1, "same", message_id=f"m_copy{n}", at=n) for n in range(50)])
        later = await submit(store, 1, "same", at=99)
        first = copies[0]
        assert (first.seq, first.duplicate) == (1, False)
        for copy in [*copies[1:], later]:
            assert copy == Appended(first.message_id, 1, first.at, True)
        assert await seqs(store, 1) == [1]

    async def test_a_repeated_key_gives_the_first_result_after_a_restart(self, site: Site, store: Store) -> None:
        first = await submit(store, 1, "same")
        await store.close()
        again = await site.open()
        assert await submit(again, 1, "same") == Appended(first.message_id, first.seq, first.at, True)
        assert (await submit(again, 1, "next")).seq == 2

    async def test_the_same_key_with_another_body_is_refused_and_stores_nothing(self, store: Store) -> None:
        first, other = await outcomes([submit(store, 1, "same"), submit(store, 1, "same", digest=b"other")])
        (later,) = await outcomes([submit(store, 1, "same", digest=b"other")])
        assert isinstance(first, Appended)
        for refusal in (other, later):
            assert isinstance(refusal, Refusal)
            assert (refusal.code, refusal.field) == ("key_reused", "key")
        assert await seqs(store, 1) == [1]

    async def test_a_key_belongs_to_its_sender_and_stream(self, store: Store) -> None:
        found = await asyncio.gather(
            submit(store, 1, "k"), submit(store, 2, "k"), submit(store, 1, "k", sender="bob"), submit(store, 1, "k")
        )
        assert [(stored.seq, stored.duplicate) for stored in found] == [(1, False), (1, False), (2, False), (1, True)]

    async def test_a_retry_finds_its_first_result_even_when_access_has_changed(self, store: Store) -> None:
        await submit(store, 1, "k")

        async def touch(tx: Tx) -> int:
            return await log.touch_access(tx, 1)

        assert await store.run(touch) == 2
        assert (await submit(store, 1, "k")).duplicate

    # ------------------------------------------------------------ access

    async def test_an_append_under_a_past_access_version_stores_nothing(self, store: Store) -> None:
        async def touch(tx: Tx) -> int:
            return await log.touch_access(tx, 1)

        await submit(store, 1, "before")
        assert await store.run(touch) == 2
        stale, fresh = await outcomes([submit(store, 1, "stale"), submit(store, 1, "fresh", access_version=2)])
        assert isinstance(stale, Stale)
        assert isinstance(fresh, Appended)
        assert fresh.seq == 2
        assert await query(store, "SELECT key FROM messages WHERE sid=1 ORDER BY seq") == [("before",), ("fresh",)]

    async def test_an_append_beside_a_change_of_access_is_stored_before_it_or_not_at_all(self, store: Store) -> None:
        async def touch(tx: Tx) -> int:
            version = await log.touch_access(tx, 1)
            await event(tx, 1, f"touched {version}")
            return version

        for version in range(1, 11):
            beside = [submit(store, 1, f"{version}/{n}", access_version=version) for n in range(5)]
            touching = asyncio.ensure_future(store.run(touch))
            beside += [submit(store, 1, f"{version}/{n}", access_version=version) for n in range(5, 10)]
            found = await outcomes(beside)
            await touching
            assert {type(outcome) for outcome in found} <= {Appended, Stale}
            events = await query(store, "SELECT max(seq) FROM events WHERE sid=1")
            stored = [outcome.seq for outcome in found if isinstance(outcome, Appended)]
            assert stored == sorted(stored)
            assert all(seq < events[0][0] for seq in stored)

    async def test_an_append_to_a_stream_that_is_not_there_stores_nothing(self, store: Store) -> None:
        (found,) = await outcomes([submit(store, 404, "k")])
        assert isinstance(found, Stale)
        assert await query(store, "SELECT count(*) FROM messages") == [(0,)]

    async def test_an_app_cannot_append_to_a_stream_of_another(self, store: Store) -> None:
        found = await outcomes([submit(store, 1, "own"), submit(store, 1, "foreign", app=OTHER_APP)])
        assert isinstance(found[0], Appended)
        assert isinstance(found[1], Stale)
        assert await query(store, "SELECT app, key FROM messages") == [(APP, "own")]

    # ------------------------------------------------------------ order and announcements

    async def test_what_is_under_way_together_is_told_in_the_order_of_its_numbers(self, store: Store) -> None:
        told: list[tuple[str, int]] = []
        futures: list[asyncio.Future[Any]] = []

        def noting(name: str) -> Callable[[Any], None]:
            return lambda outcome: told.append((name, outcome.seq if isinstance(outcome, Appended) else outcome))

        def append(name: str) -> None:
            store.append(
                Append(
                    APP, 1, 1, "alice", name, b"d", f"m_{name}", b"s", 1, COUNTS, None, (), noting(name)
                )
            )  # fmt: skip

        for n in range(40):
            append(f"a{n}")
            futures.append(asyncio.ensure_future(store.run(event_unit(1, f"e{n}"), noting(f"u{n}"))))
            await asyncio.sleep(0)
        await asyncio.gather(*futures)
        await submit(store, 1, "last")
        assert [seq for _, seq in told] == list(range(1, 81))
        # Of appends to one stream, the order in which they were handed over is the order of their numbers.
        assert [name for name, _ in told if name[0] == "a"] == [f"a{n}" for n in range(40)]

    async def test_units_that_change_the_same_row_are_told_in_the_order_of_their_commits(self, store: Store) -> None:
        told: list[int] = []

        async def forward(tx: Tx) -> int:
            row = await tx.one("SELECT m.read FROM members m WHERE m.sid=1 AND m.user='bob'" + tx.for_update)
            assert row is not None
            await tx.execute("UPDATE members SET read=? WHERE sid=1 AND members.user='bob'", row[0] + 1)
            return int(row[0]) + 1

        await asyncio.gather(*(store.run(forward, told.append) for _ in range(40)))
        assert told == list(range(1, 41))

    async def test_a_change_is_announced_before_its_caller_goes_on(self, store: Store) -> None:
        told: list[int] = []
        result = await store.run(event_unit(1, "e"), told.append)
        assert told == [result] == [1]

    async def test_a_broken_announcement_silences_nobody_else(self, store: Store) -> None:
        loop = asyncio.get_running_loop()
        reported: list[Any] = []
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

        def broken(_: int) -> None:
            raise ZeroDivisionError

        told: list[int] = []
        first = asyncio.ensure_future(store.run(event_unit(1, "e1"), broken))
        second = asyncio.ensure_future(store.run(event_unit(1, "e2"), told.append))
        found = await asyncio.gather(first, second, return_exceptions=True)
        loop.set_exception_handler(None)
        assert isinstance(found[0], ZeroDivisionError)
        assert (found[1], told) == (2, [2])
        assert [type(error) for error in reported] == [ZeroDivisionError]

    async def test_a_caller_who_gave_up_changes_nothing_for_the_others(self, store: Store) -> None:
        told: list[int] = []
        given_up = asyncio.ensure_future(store.run(event_unit(1, "e1"), told.append))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await store.run(event_unit(1, "e2"), told.append) == 2
        assert told == [1, 2]

    # ------------------------------------------------------------ units

    async def test_a_failing_unit_rolls_back_alone(self, store: Store) -> None:
        told: list[Any] = []

        async def failing(tx: Tx) -> None:
            await event(tx, 1, "never")
            await tx.execute("UPDATE streams SET epoch='broken' WHERE sid=1")
            raise KeyError("no")

        before = submit(store, 1, "a")
        failed = asyncio.ensure_future(store.run(failing, told.append))
        after = asyncio.ensure_future(store.run(event_unit(1, "e")))
        await asyncio.sleep(0)
        last = submit(store, 1, "b")
        with pytest.raises(KeyError):
            await failed
        assert sorted([(await before).seq, await after, (await last).seq]) == [1, 2, 3]
        assert told == []
        assert await query(store, "SELECT epoch FROM streams WHERE sid=1") == [("e",)]

    async def test_a_refusal_from_a_unit_reaches_its_caller_as_it_is(self, store: Store) -> None:
        refusal = Refusal("conflict", "No.", field="x")

        async def refusing(tx: Tx) -> None:
            raise refusal

        with pytest.raises(Refusal) as raised:
            await store.run(refusing)
        assert raised.value is refusal

    async def test_a_row_that_breaks_a_rule_of_the_schema_fails_its_unit_alone(self, store: Store) -> None:
        async def doubled(tx: Tx) -> None:
            await tx.execute("INSERT INTO meta(name, value) VALUES ('a','1')")
            await tx.execute("INSERT INTO meta(name, value) VALUES ('a','2')")

        failed = asyncio.ensure_future(store.run(doubled))
        neighbour = asyncio.ensure_future(store.run(event_unit(1, "e")))
        found = await asyncio.gather(failed, neighbour, return_exceptions=True)
        assert isinstance(found[0], Exception)
        assert found[1] == 1
        assert await query(store, "SELECT count(*) FROM meta WHERE name='a'") == [(0,)]

    async def test_a_unit_that_awaits_anything_else_is_an_error(self, store: Store) -> None:
        async def waiting(tx: Tx) -> None:
            await event(tx, 1, "never")
            await asyncio.sleep(0)

        with pytest.raises(RuntimeError):
            await store.run(waiting)
        assert await store.run(event_unit(1, "e")) == 1

    async def test_statements_say_how_many_rows_they_changed(self, store: Store) -> None:
        async def unit(tx: Tx) -> list[Any]:
            await tx.many("INSERT INTO meta(name, value) VALUES (?,?)", [("a", "1"), ("b", "1"), ("c", "2")])
            return [
                await tx.execute("UPDATE meta SET value='3' WHERE value=?", "1"),
                await tx.execute("UPDATE meta SET value='3' WHERE value=?", "9"),
                await tx.one("SELECT name FROM meta WHERE name='nothing'"),
                await tx.one("SELECT value FROM meta WHERE name=?" + tx.for_update, "c"),
                await tx.all("SELECT name FROM meta WHERE value='3' ORDER BY name"),
            ]

        assert await store.run(unit) == [2, 0, None, ("2",), [("a",), ("b",)]]

    # ------------------------------------------------------------ reading

    async def test_a_read_sees_every_write_acknowledged_before_it(self, store: Store) -> None:
        for n in range(1, 40):
            await submit(store, 1, f"k{n}")
            assert await query(store, "SELECT head FROM streams WHERE sid=1") == [(n,)]

    @pytest.mark.parametrize("door", ["read", "glance"])
    async def test_a_read_is_one_snapshot(self, store: Store, door: str) -> None:
        async def unit(tx: Tx) -> list[tuple[int, int]]:
            found = []
            for _ in range(30):
                head = await tx.one("SELECT head FROM streams WHERE sid=1")
                last = await tx.one("SELECT coalesce(max(seq),0) FROM messages WHERE sid=1")
                assert head is not None
                assert last is not None
                found.append((head[0], last[0]))
            return found

        writing = asyncio.gather(*[submit(store, 1, f"k{n}") for n in range(MANY)])
        for _ in range(10):
            found = await getattr(store, door)(unit)
            assert len(set(found)) == 1
            assert found[0][0] == found[0][1]
        await writing

    @pytest.mark.parametrize("door", ["read", "glance"])
    async def test_a_write_while_reading_is_refused(self, store: Store, door: str) -> None:
        async def unit(tx: Tx) -> int:
            return await tx.execute("UPDATE streams SET head=99 WHERE sid=1")

        with pytest.raises(Exception):  # noqa: B017 - each database has its own word for it
            await getattr(store, door)(unit)
        assert await query(store, "SELECT head FROM streams WHERE sid=1") == [(0,)]

    @pytest.mark.parametrize("door", ["read", "glance"])
    async def test_an_error_while_reading_reaches_its_caller_and_reading_goes_on(self, store: Store, door: str) -> None:
        async def unit(tx: Tx) -> None:
            raise KeyError

        for _ in range(5):
            with pytest.raises(KeyError):
                await getattr(store, door)(unit)
        assert await seqs(store, 1) == []

    # ------------------------------------------------------------ what an append leaves behind

    async def test_counters_and_positions_follow_the_messages(self, store: Store) -> None:
        await asyncio.gather(
            submit(store, 1, "1", at=10),
            submit(store, 1, "2", flags=SILENT, at=11),
            submit(store, 1, "3", sender="bob", at=12),
            submit(store, 1, "4", sender=BACKEND, at=13),
        )
        assert await query(
            store, "SELECT head, messages, counted, moved_at, last_message_at FROM streams WHERE sid=1"
        ) == [(4, 4, 3, 13, 13)]
        assert await query(store, "SELECT seq, counted, content_seq FROM messages WHERE sid=1 ORDER BY seq") == [
            (1, 1, 1),
            (2, 1, 2),
            (3, 2, 3),
            (4, 3, 4),
        ]
        # Whoever sends has read up to their own message; the others have not moved.
        assert await query(
            store, "SELECT m.user, delivered, read, read_counted FROM members m WHERE sid=1 ORDER BY m.user"
        ) == [("alice", 2, 2, 1), ("bob", 3, 3, 2), ("carol", 0, 0, 0)]
        assert await query(store, "SELECT sid, seq, type FROM outbox ORDER BY id") == [
            (1, seq, "message.created") for seq in (1, 2, 3, 4)
        ]

    async def test_sending_removes_the_senders_mark_and_nobody_elses(self, store: Store) -> None:
        async def mark(tx: Tx) -> int:
            return await tx.execute("UPDATE members SET marked_from=1 WHERE sid=1")

        await submit(store, 1, "1")
        await store.run(mark)
        await submit(store, 1, "2")
        assert await query(store, "SELECT m.user FROM members m WHERE marked_from IS NOT NULL ORDER BY m.user") == [
            ("bob",),
            ("carol",),
        ]

    async def test_mentions_have_a_row_each_and_repeats_have_none(self, store: Store) -> None:
        await submit(store, 1, "1", mentions=("bob", "carol"))
        await submit(store, 1, "2", flags=COUNTS | MENTIONS_ALL, mentions=("bob",))
        await submit(store, 1, "1", mentions=("bob", "carol"))
        await outcomes([submit(store, 1, "3", mentions=("bob",), access_version=9)])
        assert await query(store, "SELECT seq, mentions.user FROM mentions WHERE sid=1 ORDER BY 1, 2") == [
            (1, "bob"),
            (1, "carol"),
            (2, "*"),
            (2, "bob"),
        ]

    async def test_the_outbox_holds_what_was_stored_and_nothing_else(self, store: Store) -> None:
        await submit(store, 1, "1")
        await outcomes([submit(store, 1, "1"), submit(store, 1, "2", access_version=9)])
        await store.run(event_unit(1, "e"))
        assert await query(store, "SELECT seq, type FROM outbox ORDER BY seq") == [(1, "message.created"), (2, "test")]

    # ------------------------------------------------------------ trouble

    async def test_a_store_in_trouble_says_so_to_everyone_and_recovers_by_itself(
        self, site: Site, store: Store
    ) -> None:
        await submit(store, 1, "before")
        told: list[Any] = []
        await site.fail(store)
        failing: list[Any] = [submit(store, 1, f"k{n}", sealed=b"x" * 5_000) for n in range(20)]
        failing += [asyncio.ensure_future(store.run(event_unit(1, f"e{n}"), told.append)) for n in range(5)]
        found = await outcomes(failing)
        assert {type(outcome) for outcome in found} == {StoreUnavailable}
        assert told == []
        # What was acknowledged before can still be read.
        assert await seqs(store, 1) == [1]
        await site.heal(store)
        assert (await submit(store, 1, "k0", sealed=b"x" * 5_000)).seq == 2
        assert await store.run(event_unit(1, "e0")) == 3
        assert await seqs(store, 1) == [1, 2, 3]

    async def test_a_commit_from_elsewhere_is_noticed_once_and_own_ones_are_not(self, site: Site, store: Store) -> None:
        assert await store.changed_elsewhere() is False
        await submit(store, 1, "k")
        await store.run(event_unit(1, "e"))
        assert await store.changed_elsewhere() is False
        await site.outside("UPDATE streams SET epoch='restored' WHERE sid=2")
        assert await store.changed_elsewhere() is True
        assert await store.changed_elsewhere() is False
        assert await query(store, "SELECT epoch FROM streams WHERE sid=2") == [("restored",)]

    # ------------------------------------------------------------ the end

    async def test_closing_finishes_what_is_queued_and_refuses_what_comes_later(self, site: Site, store: Store) -> None:
        queued = [submit(store, 1, f"k{n}") for n in range(MANY)]
        unit = asyncio.ensure_future(store.run(event_unit(1, "e")))
        await asyncio.sleep(0)
        await store.close()
        stored = [stored.seq for stored in await asyncio.gather(*queued)]
        assert stored == sorted(stored)
        assert sorted([*stored, await unit]) == list(range(1, MANY + 2))
        (late,) = await outcomes([submit(store, 1, "late")])
        assert isinstance(late, StoreUnavailable)
        with pytest.raises(StoreUnavailable):
            await store.run(event_unit(1, "late"))
        with pytest.raises(StoreUnavailable):
            await store.read(event_unit(1, "late"))
        with pytest.raises(StoreUnavailable):
            await store.glance(event_unit(1, "late"))
        assert await store.changed_elsewhere() is False
        await store.close()
        assert await seqs(await site.open(), 1) == list(range(1, MANY + 2))

    async def test_what_was_acknowledged_is_there_after_a_restart(self, site: Site, store: Store) -> None:
        await asyncio.gather(*[submit(store, 1, f"k{n}", sealed=b"%d" % n) for n in range(MANY)])
        before = await query(store, "SELECT seq, id, sealed FROM messages ORDER BY seq")
        await store.close()
        again = await site.open()
        assert await query(again, "SELECT seq, id, sealed FROM messages ORDER BY seq") == before
        assert (await submit(again, 1, "next")).seq == MANY + 1
