"""`tidings transfer`: from a data directory that people used into PostgreSQL, and a server that goes on there."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests import postgres
from tests.checks.house import ROOMY, House, open_house
from tidings.server.app import open_core
from tidings.server.config import Config
from tidings.server.errors import DataMoved, TidingsError
from tidings.server.services.access import backend_actor
from tidings.server.services.messages import Draft
from tidings.server.store.tables import metadata
from tidings.server.store.transfer import BATCH_ROWS, SHAPES, TransferFailed, TransferRefused, look, transfer
from tidings.server.store.transferring import MARK, check_target
from tidings.testing.process import ServerFailed, ServerProcess
from tidings.wire.requests import ChannelCreate, UserUpsert

from .conftest import Done, start_tidings, tidings

pytestmark = pytest.mark.sqlite

# Everything that SQLite and PostgreSQL might spell differently.
ODD = "Grüße, 'Ann' \\N \\\\. \t\r\n \x01\x7f \u2028 é e\u0301 \U0001f469\u200d\U0001f4bb \u202eabc $1 ? ;--"
MESSAGES = 24


async def _live_in(house: House) -> str:
    """Use everything that there is a table for; the id of the first message."""
    rest = house.rest
    await rest.users.upsert(
        [
            {"id": f"u{n}", "name": f"{n} {ODD}", "custom": {"n": [n, None, ODD]}, "labels": {"ward": "é"}}
            for n in range(6)
        ]
    )
    channel = await house.channel(*(f"u{n}" for n in range(5)), id="c1", labels={"case": ODD}, name=ODD)
    await house.channel("u0", "u1", type="direct")
    await house.channel(*(f"u{n}" for n in range(3)), id="c2")
    wires = [await house.wire(f"u{n}", device=f"phone-{n}") for n in range(3)]
    for n in range(MESSAGES):
        fields = {"mentions": ["u1"]} if n % 5 == 0 else {}
        sent = await wires[n % 3].send(channel, f"{n} {ODD}", key=f"k{n}", custom={"odd": ODD}, **fields)
        assert sent["type"] == "message.sent", sent
    page = await rest.messages.page(channel, limit=50)
    ids = [message.id for message in page.messages]
    await rest.as_user("u0").messages.edit(channel, ids[0], text="edited " + ODD)
    await rest.as_user("u0").messages.edit(channel, ids[0], text="edited twice")
    await rest.messages.delete(channel, ids[1])
    await rest.messages.delete(channel, ids[2], hard=True)
    for emoji in ("👩‍💻", "+1", "é"):
        await rest.as_user("u1").messages.react(channel, ids[3], emoji)
    await rest.as_user("u1").messages.unreact(channel, ids[3], "+1")
    await rest.as_user("u2").messages.send(channel, "reply", reply_to=ids[3], key="r")
    await rest.messages.send(channel, "all of you", mention_all=True, key="all")
    for wire, seq in zip(wires, (9, 12, 20), strict=True):
        await wire.ask("ack", positions={channel: seq})
    await rest.as_user("u1").receipts.read(channel, 15)
    await rest.as_user("u2").receipts.mark_unread(channel, 6)
    await rest.as_user("u3").channels.set_membership(channel, archived=True)
    await rest.members.remove(channel, "u4")
    await rest.app.put_role("app", "nurse", ["channel.read"])
    await rest.app.put_channel_type("ward", history="since_join")
    await rest.app.create_key("late", scopes=["user.read"])
    await rest.channels.delete("c2")
    await rest.users.revoke_tokens("u4", jti="gone")
    await house.hang_up()
    # What is written a little later is written.
    await house.server.restart(graceful=True)
    return ids[0]


async def _reads(house: House) -> dict[str, Any]:
    """Every read that the interface offers, with every identifier that there is."""
    known: dict[str, list[str]] = {"channel": ["c1", "c2"], "user": [f"u{n}" for n in range(5)]}
    known["channel"] += [
        channel.id async for channel in house.rest.channels.query() if channel.id not in known["channel"]
    ]
    page = await house.rest.messages.page("c1", limit=50)
    known["message"] = [message.id for message in page.messages[:8]]
    document = json.loads(await house.rest.request("GET", "/v1/openapi.json"))
    found: dict[str, Any] = {}
    for path, operations in document["paths"].items():
        if "get" not in operations or not path.startswith("/v1/") or path in ("/v1/openapi.json", "/v1/asyncapi.json"):
            continue
        addresses = [path]
        for name in re.findall(r"{(\w+)}", path):
            addresses = [one.replace(f"{{{name}}}", value) for one in addresses for value in known.get(name, [])]
        for address in addresses:
            for rest, who in ((house.rest, ""), (house.rest.as_user("u1"), "u1"), (house.rest.as_user("u4"), "u4")):
                found[f"{who} {address}"] = await _read(rest, address)
    return found


async def _read(rest: Any, address: str) -> Any:
    try:
        answer = json.loads(await rest.request("GET", address) or b"null")
    except Exception as error:
        return str(error)
    return _lasting(answer)


def _lasting(value: Any) -> Any:
    """Without what the moment of reading decides."""
    if isinstance(value, dict):
        return {
            name: _lasting(part)
            for name, part in value.items()
            if name not in ("as_of", "mark", "last_used_at", "uptime")
        }
    return [_lasting(part) for part in value] if isinstance(value, list) else value


@asynccontextmanager
async def _moved(old: House, url: str) -> AsyncIterator[House]:
    environment = {**ROOMY, "TIDINGS_STORE": url, "TIDINGS_ALLOW_UNSAFE_STORE": "true"}
    async with ServerProcess(old.server.data, environment=environment) as server:
        house = House(server, old.app, old.api_key, old.secret, store_url=url)
        try:
            yield house
        finally:
            await house.close()


@pytest.fixture
def unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' PostgreSQL does not wait for its disk."""
    monkeypatch.setenv("TIDINGS_ALLOW_UNSAFE_STORE", "true")


async def _transfer(data: Path, url: str, *more: str) -> Done:
    return await tidings("transfer", "--from", data, "--to", url, *more)


@pytest.mark.usefixtures("unsafe")
async def test_a_used_server_goes_on_over_postgresql_as_if_nothing_had_happened(tmp_path: Path) -> None:
    url = await postgres.fresh_database(empty=True)
    async with open_house(tmp_path) as house:
        first = await _live_in(house)
        data = house.server.data
        refused = await _transfer(data, url)
        assert (refused.status, "in use by a server" in refused.err) == (1, True), refused.err
        before = await _reads(house)
        epoch, log = await house.log("c1")
        looked = await _transfer(data, url, "--dry-run")
        assert looked.status == 0, looked.err
        assert "Stop it before the transfer" in looked.err
        assert re.search(rf"messages +{MESSAGES + 2} +0 +{MESSAGES + 2}", looked.out), looked.out
        await house.server.terminate()

        done = await _transfer(data, url)
        assert done.status == 0, done.err
        assert "Counts and checksums agree" in done.err
        assert "\x1b" not in done.err
        assert re.search(r"Copying: ([\d,]+) of \1 rows \(100 %\), [\d,]+ rows/s", done.err), done.err
        assert "root.key" in done.err

        async with _moved(house, url) as now:
            assert await _reads(now) == before
            assert await now.log("c1") == (epoch, log)
            wire = await now.wire("u0", device="phone-0")
            again = await wire.send("c1", f"0 {ODD}", key="k0", custom={"odd": ODD}, mentions=["u1"])
            assert (again["duplicate"], again["id"]) == (True, first)
            fresh = await wire.send("c1", "new", key="fresh")
            assert fresh["seq"] == log[-1].seq + 1
            assert await now.channel("u0", "u2")
            assert (await now.rest.app.create_key("later", scopes=["user.read"])).id
            made = await tidings("app", "create", "Second", "--data-dir", data, "--store", url)
            assert made.status == 0, made.err

        # Neither is transferred again, and the old one takes no more messages by mistake.
        again_done = await _transfer(data, url)
        assert "was finished at" in again_done.err
        with pytest.raises(ServerFailed, match="was transferred to postgres://"):
            await house.server.start()
        (data / MARK).unlink()
        await house.server.start()
        assert await house.log("c1") == (epoch, log)


# ---------------------------------------------------------------- broken off, and what must not be taken for done


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A data directory with a channel of more messages than go into one batch, and nobody using it."""
    async with open_core(Config(data_dir=tmp_path / "data", store_synchronous="off", allow_unsafe_store=True)) as core:
        services = core.services
        new = await services.admin.create_app("Clinic", "app_clinic")
        backend = backend_actor(await services.apps.get(new.app_id), new.api_key_id)
        await services.users.upsert(backend, [UserUpsert(id="ann", name=ODD)])
        channel, _ = await services.channels.create(backend, ChannelCreate(id="c1", type="group", members=["ann"]))
        for start in range(0, BATCH_ROWS + 500, 500):
            await asyncio.gather(
                *(
                    services.messages.send(backend, channel.id, Draft(text=str(n)), f"k{n}")
                    for n in range(start, start + 500)
                )
            )
    return tmp_path / "data"


async def _trigger(url: str, condition: str, body: str) -> None:
    """What PostgreSQL is to do to a row of `messages` that comes in."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;"
            f"CREATE TRIGGER meddle BEFORE INSERT ON messages FOR EACH ROW WHEN ({condition})"
            " EXECUTE FUNCTION meddle();"
        )
    finally:
        await connection.close()


async def _until(connection: Any, sql: str) -> None:
    async with asyncio.timeout(60):
        while not await connection.fetchval(sql):
            await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition


@pytest.mark.usefixtures("unsafe")
async def test_killed_in_the_middle_of_a_table_it_goes_on_behind_its_last_batch(data: Path) -> None:
    url = await postgres.fresh_database()
    await _trigger(url, f"NEW.seq>{BATCH_ROWS + 200}", "PERFORM pg_advisory_lock_shared(7); RETURN NEW;")
    holder = await asyncpg.connect(url)
    await holder.execute("SELECT pg_advisory_lock(7)")
    process = await start_tidings("transfer", "--from", data, "--to", url)
    await _until(holder, "SELECT 1 FROM pg_locks WHERE locktype='advisory' AND NOT granted")
    there = await holder.fetchval("SELECT count(*) FROM messages")
    assert there == BATCH_ROWS
    # Half of it is nobody's to use, on either side.
    for store in ("sqlite", url):
        server = ServerProcess(data, environment={"TIDINGS_STORE": store})
        with pytest.raises(ServerFailed):
            await server.start()
        await server.close()
    process.kill()
    await process.wait()
    for store in ("sqlite", url):
        server = ServerProcess(data, environment={"TIDINGS_STORE": store})
        with pytest.raises(ServerFailed, match="is not finished: run the same `tidings transfer` again"):
            await server.start()
        await server.close()
    doctor = await tidings("doctor", "--json", "--store", url, "--data-dir", data, "--port", "0")
    assert "is not finished" in doctor.out
    await holder.execute("SELECT pg_advisory_unlock(7)")
    await _until(holder, "SELECT count(*)=0 FROM pg_stat_activity WHERE application_name='tidings transfer'")
    looked = await _transfer(data, url, "--dry-run")
    assert re.search(rf"messages +[\d,]+ +{BATCH_ROWS:,} ", looked.out), looked.out
    done = await _transfer(data, url)
    assert done.status == 0, done.err
    assert "by runs before this one" in done.err
    assert await holder.fetchval("SELECT count(*) FROM messages") > there
    await check_target(holder)
    await holder.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("NEW.sealed := set_byte(NEW.sealed, 20, get_byte(NEW.sealed, 20) # 1); RETURN NEW;", "the checksum over"),
        ("NEW.key := NEW.key || ' '; RETURN NEW;", "the checksum over"),
        ("NEW.reply_to := ''; RETURN NEW;", "the checksum over"),
        ("RETURN NULL;", "rows instead of"),
    ],
    ids=["a flipped bit", "a longer key", "nothing that became empty", "a lost row"],
)
async def test_what_arrived_otherwise_is_noticed_and_never_used(data: Path, change: str, said: str) -> None:
    url = await postgres.fresh_database()
    await _trigger(url, "NEW.seq=77", change)
    for _ in range(2):
        with pytest.raises(TransferFailed, match=f"messages did not arrive as it was: .*{said}"):
            await transfer(data / "tidings.db", url, allow_unsafe=True)
        connection = await asyncpg.connect(url)
        with pytest.raises(DataMoved):
            await check_target(connection)
        await connection.close()


async def test_a_database_with_something_in_it_is_refused(data: Path, tmp_path: Path) -> None:
    url = await postgres.fresh_database()
    source = data / "tidings.db"
    async with open_core(Config(data_dir=tmp_path / "other", store=url, allow_unsafe_store=True)) as core:
        await core.services.admin.create_app("Somebody's")
    with pytest.raises(TransferRefused, match="not empty: apps has rows"):
        await transfer(source, url, allow_unsafe=True)
    assert not (data / MARK).exists()
    # One that is not ours at all, and one whose transfer has begun from elsewhere.
    for sql, said in (
        ("CREATE TABLE streams(x int)", "tables but no schema revision"),
        ("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'", "not UTF8"),
    ):
        url = await postgres.fresh_database(empty=True)
        connection = await asyncpg.connect(url)
        await connection.execute(sql)
        await connection.close()
        target = url.rpartition("/")[0] + "/latin" if "latin" in sql else url
        with pytest.raises(TidingsError, match=said):
            await transfer(source, target, allow_unsafe=True)


async def test_a_source_that_changed_since_the_transfer_began_is_refused(data: Path) -> None:
    url = await postgres.fresh_database()
    await _trigger(url, "NEW.seq=77", "RAISE EXCEPTION 'no';")
    with pytest.raises(TransferFailed, match="PostgreSQL: RaiseError: no"):
        await transfer(data / "tidings.db", url, allow_unsafe=True)
    with closing(sqlite3.connect(data / "tidings.db")) as connection:
        connection.execute("UPDATE members SET read=read+1")
        connection.commit()
    for work in (transfer, look):
        with pytest.raises(TransferRefused, match="members is not what it was then"):
            await work(data / "tidings.db", url, **({"allow_unsafe": True} if work is transfer else {}))


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("UPDATE channels SET type=type||char(0)||'x'", r"the row of channels with app 1, id 'c1': .* zero byte"),
        ("UPDATE audit SET id='a'||char(0), target=CAST(x'61ff' AS TEXT)", r"the row of audit with .*'a\\x00'"),
        ("UPDATE users SET role=CAST(x'61ff' AS TEXT)", r"the row of users with app 1, id 'ann': .* not UTF-8"),
        ("UPDATE channels SET frozen='yes'", r"the row of channels with app 1, id 'c1': .* another type"),
        ("UPDATE channels SET frozen=0.5", r"the row of channels with app 1, id 'c1': .* another type"),
        ("UPDATE users SET sealed='text'", r"the row of users with app 1, id 'ann': .* another type"),
    ],
    ids=["a NUL", "a NUL in a key", "not UTF-8", "a text for a number", "a fraction", "a text for bytes"],
)
async def test_what_postgresql_cannot_hold_is_named_before_anything_is_copied(data: Path, sql: str, said: str) -> None:
    url = await postgres.fresh_database(empty=True)
    with closing(sqlite3.connect(data / "tidings.db")) as connection:
        # One row only: the audit trail has several.
        connection.execute(sql + (" WHERE rowid=(SELECT min(rowid) FROM audit)" if "audit" in sql else ""))
        connection.commit()
    with pytest.raises(TransferRefused, match=said):
        await transfer(data / "tidings.db", url, allow_unsafe=True)
    assert postgres.query(url, "SELECT 1 FROM pg_tables WHERE tablename='meta'") == []
    assert not (data / MARK).exists()


def test_every_table_is_transferred_in_an_order_that_both_databases_share() -> None:
    assert {shape.name for shape in SHAPES} == set(metadata.tables)
    assert all(shape.key for shape in SHAPES)
    assert {shape.name for shape in SHAPES if shape.serial} == {"apps", "jobs", "outbox", "streams"}


async def test_a_command_line_without_a_target_says_what_is_missing(tmp_path: Path) -> None:
    done = await tidings("transfer", "--from", tmp_path)
    assert (done.status, "--to postgres://" in done.err) == (1, True)
    done = await tidings("transfer", "--from", tmp_path, "--to", "postgres://127.0.0.1:1/none")
    assert (done.status, "There is no database at" in done.err) == (1, True), done.err
