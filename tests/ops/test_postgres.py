"""Operating a server over PostgreSQL, through its commands."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests import postgres
from tests.checks.house import House, open_house
from tidings.server.app import open_core
from tidings.server.config import Config
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.services.founding import NewApp
from tidings.testing.process import ServerFailed, ServerProcess

from .conftest import tidings


async def _house(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, str]]:
    url = await postgres.fresh_database(empty=True)
    environment = {"TIDINGS_STORE": url, "TIDINGS_ALLOW_UNSAFE_STORE": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return url, environment


async def test_a_server_makes_its_schema_serves_and_finds_its_data_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, environment = await _house(tmp_path, monkeypatch)
    planned = json.loads((await tidings("migrate", "--plan", "--json", "--data-dir", tmp_path / "data")).out)
    assert planned["from"] == "none"
    assert planned["steps"]
    async with open_house(tmp_path, **environment) as house:
        await house.users("ann")
        channel = await house.channel("ann")
        ann = await house.wire("ann")
        sent = await ann.send(channel, "Good morning", key="k")
        assert sent["type"] == "message.sent"
        await house.server.restart()
        again = await (await house.wire("ann")).send(channel, "Good morning", key="k")
        assert (again["id"], again["duplicate"]) == (sent["id"], True)
        assert not (house.server.data / "tidings.db").exists()
        said = house.server.stdout_path.read_text() + house.server.stderr_path.read_text()
        assert url.split(":")[2].split("@")[0] not in said, "the password is in the log"
        # A command changes something while the server runs, and the server notices.
        where = ("--data-dir", house.server.data)
        made = json.loads((await tidings("key", "create", "late", "--json", *where)).out)
        assert made
        await _epochs_are_renewed(house, channel)


async def _epochs_are_renewed(house: House, channel: str) -> None:
    before, log = await house.log(channel)
    await house.server.terminate()
    done = await tidings("renew-epochs", "--data-dir", house.server.data)
    assert done.status == 0, done.err
    await house.server.start()
    after, again = await house.log(channel)
    assert after != before
    assert again == log


async def test_d3_a_server_over_an_unsafe_database_is_refused_at_start(tmp_path: Path) -> None:
    url = await postgres.fresh_database(empty=True)
    server = ServerProcess(tmp_path / "data", environment={"TIDINGS_STORE": url})
    with pytest.raises(ServerFailed) as failed:
        await server.start()
    await server.close()
    assert "fsync = off" in str(failed.value)
    assert "allow_unsafe_store" in str(failed.value)
    assert server.exit_code == 1


async def test_a_server_whose_database_is_away_says_where_it_looked(tmp_path: Path) -> None:
    server = ServerProcess(
        tmp_path / "data", environment={"TIDINGS_STORE": "postgres://tidings:secret@127.0.0.1:1/chat"}
    )
    with pytest.raises(ServerFailed) as failed:
        await server.start()
    await server.close()
    assert "127.0.0.1:1/chat" in str(failed.value)
    assert "secret" not in str(failed.value)


async def test_the_doctor_looks_at_the_database(tmp_path: Path) -> None:
    with postgres.own_server() as process:
        store = ("--store", process.url(), "--data-dir", tmp_path / "data", "--port", "0")
        done = await tidings("doctor", "--json", *store)
        found = {item["name"]: item for item in json.loads(done.out)}
        assert (done.status, found["postgresql"]["status"]) == (0, "ok"), done.out
        assert "commit" in found
        assert "sqlite" not in found
        assert "the next start will run" in found["schema"]["found"]
        process.stop()
        process.settings["fsync"] = "off"
        process.start()
        done = await tidings("doctor", "--json", *store)
        found = {item["name"]: item for item in json.loads(done.out)}
        assert (done.status, found["postgresql"]["status"]) == (1, "fail")
        assert "fsync = off" in found["postgresql"]["found"]
    done = await tidings("doctor", "--json", *store)
    assert "ConnectionRefusedError" in done.out
    assert done.status == 1


async def test_backups_of_the_file_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_STORE", "postgres://db.internal/chat")
    done = await tidings("backup", tmp_path / "copy")
    assert done.status == 1
    assert "postgresql.md" in done.err


async def test_nodes_that_start_at_once_on_an_empty_database_make_one_app_between_them(tmp_path: Path) -> None:
    url = await postgres.fresh_database(empty=True)
    key_file = tmp_path / "root.key"
    KeyFile(key_file)

    async def node(number: int, started: asyncio.Barrier) -> NewApp | None:
        config = Config(data_dir=tmp_path / str(number), key_file=key_file, store=url, allow_unsafe_store=True)
        async with open_core(config) as core:
            await started.wait()
            return await core.services.admin.create_first_app("First app", via="serve")

    barrier = asyncio.Barrier(6)
    made = await asyncio.gather(*(node(number, barrier) for number in range(6)))
    assert sum(new is not None for new in made) == 1
    async with open_core(
        Config(data_dir=tmp_path / "0", key_file=key_file, store=url, allow_unsafe_store=True)
    ) as core:
        assert await core.services.admin.create_first_app("Another", via="serve") is None
