"""The store: refused when it is unsafe; and a reader with a cursor skips nothing, however slow commits are."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.checks.house import ROOMY, assert_gapless
from tidings.server import app as server_app
from tidings.server.config import Config
from tidings.server.services.access import backend_actor
from tidings.server.services.messages import Draft
from tidings.server.store import sqlite
from tidings.testing.process import ServerFailed, ServerProcess
from tidings.wire.requests import ChannelCreate, UserCreate


@pytest.mark.parametrize("synchronous", ["normal", "off"])
async def test_d3_an_unsafe_store_is_refused_at_start_unless_it_is_asked_for_by_name(
    tmp_path: Path, synchronous: str
) -> None:
    unsafe = {**ROOMY, "TIDINGS_STORE_SYNCHRONOUS": synchronous}
    server = ServerProcess(tmp_path / "data", environment=unsafe)
    with pytest.raises(ServerFailed) as failed:
        await server.start()
    await server.close()
    assert "allow_unsafe_store" in str(failed.value)
    assert server.exit_code not in (0, None)
    async with ServerProcess(
        tmp_path / "data", environment={**unsafe, "TIDINGS_ALLOW_UNSAFE_STORE": "true"}
    ) as allowed:
        assert allowed.running


class _SlowToCommit:
    """A connection that takes a random time before each COMMIT."""

    def __init__(self, connection: sqlite3.Connection, rng: random.Random) -> None:
        self._connection = connection
        self._rng = rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql == "COMMIT":
            time.sleep(self._rng.choice((0.0, 0.001, 0.01, 0.03)))  # why: the pace of a loop that looks at a condition
        return self._connection.execute(sql, *args)


@pytest.mark.sqlite
async def test_d5_a_reader_with_a_cursor_never_skips_however_long_commits_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, rng = sqlite.connect, random.Random(5)

    def slow(path: Path, *, read_only: bool = False, **more: Any) -> Any:
        connection = connect(path, read_only=read_only, **more)
        return connection if read_only else _SlowToCommit(connection, rng)

    monkeypatch.setattr(sqlite, "connect", slow)
    writers, each = 16, 15
    async with server_app.open_core(Config(data_dir=tmp_path)) as core:
        services = core.services
        await services.admin.create_app("Slow", app_id="slow")
        backend = backend_actor(await services.apps.get("slow"), "k")
        await services.users.create(backend, UserCreate(id="ann"))
        channel, _ = await services.channels.create(backend, ChannelCreate(id="c", type="group", members=["ann"]))
        head = 2 + writers * each
        acknowledged: set[int] = set()

        async def write(number: int) -> None:
            for count in range(each):
                if count % 5 == 4:
                    # Not on the fast path: a unit of its own beside the appends.
                    sent = await services.messages.send(backend, "c", Draft(text="x"), f"{number}/{count}")
                    acknowledged.add(sent.seq)
                    await services.messages.delete(backend, "c", sent.message_id)
                else:
                    sent = await services.messages.send(backend, "c", Draft(text="x"), f"{number}/{count}")
                    acknowledged.add(sent.seq)

        async def read() -> list[int]:
            seen: list[int] = []
            while not done.is_set() or len(seen) < final():
                expected = {seq for seq in acknowledged if seq > (seen[-1] if seen else 0)}
                page = await services.sync.events(backend, "c", seen[-1] if seen else 0, None, 50)
                seen += [seq for seq, _ in page.events]
                # What was acknowledged before the page was asked for is in it, or behind its end.
                late = {seq for seq in expected if seq <= seen[-1]} - set(seen)
                assert not late, f"the reader went past {late}"
            return seen

        def final() -> int:
            return head + writers * (each // 5)

        done = asyncio.Event()
        readers = [asyncio.create_task(read()) for _ in range(3)]
        await asyncio.gather(*(write(number) for number in range(writers)))
        done.set()
        for seen in await asyncio.gather(*readers):
            assert_gapless(seen, 1, final(), "a reader with a cursor")
        # The same by small pages: what one page leaves out begins the next one.
        paged: list[int] = []
        while len(paged) < final():
            page = await services.sync.events(backend, "c", paged[-1] if paged else 0, None, 7)
            assert page.events, f"nothing comes after {paged[-1]}"
            paged += [seq for seq, _ in page.events]
        assert_gapless(paged, 1, final(), "pages of seven")
        assert channel.id == "c"
