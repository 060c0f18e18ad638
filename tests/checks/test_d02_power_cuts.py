"""D2: what was acknowledged survives a power cut, over both stores; and where nothing is synced, the check says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.checks.house import ROOMY, House, first_app, wait_until
from tidings.testing.checker import Verdict, check
from tidings.testing.disk import Disk, why_not
from tidings.testing.history import Send, body_digest
from tidings.testing.postgres import PostgresProcess
from tidings.testing.process import ServerProcess
from tidings.testing.recorder import Recorder

WRITERS = 8
# Between two cuts, so that there is something to lose.
SENT_MIN, SENT_MAX = 100, 400


@cache
def _missing() -> str:
    return why_not()


@pytest.fixture
def disk() -> Iterator[Disk]:
    if _missing():
        pytest.skip(_missing())
    with Disk() as made:
        yield made


class Site:
    """A server whose data, its own or its database's, lies on a disk."""

    def __init__(self, disk: Disk, server: ServerProcess, database: PostgresProcess | None) -> None:
        self.disk, self.server, self.database = disk, server, database

    async def cut(self) -> None:
        """The power goes and comes back; everything starts again.

        The server first: a machine without power says nothing any more. While it lives on, ext4 may answer an fsync
        that was under way with success after the cut (the extents are never marked as written, and the error is only
        logged: `ext4_end_io_end` in fs/ext4/page-io.c), and nobody would have heard that answer.
        """
        self.server.kill9()
        self.disk.cut()
        if self.database is not None:
            await asyncio.to_thread(self.database.kill9)
        await self.server.wait_exit()
        await asyncio.to_thread(self.disk.mend)
        if self.database is not None:
            await asyncio.to_thread(self.database.start)
        await self.server.start()


@asynccontextmanager
async def on_sqlite(disk: Disk, folder: Path, **settings: str) -> AsyncIterator[Site]:
    environment = {**ROOMY, **settings}
    async with ServerProcess(disk.path / "data", logs=folder / "logs", environment=environment) as server:
        yield Site(disk, server, None)


@asynccontextmanager
async def on_postgres(disk: Disk, folder: Path, **settings: str) -> AsyncIterator[Site]:
    database = PostgresProcess(disk.path.parent / "postgres", settings=settings)
    database.data = disk.path / "data"
    try:
        await asyncio.to_thread(database.start)
        # Tested is whether what PostgreSQL acknowledges is safe, not what the server says to it at its start.
        environment = {**ROOMY, "TIDINGS_STORE": database.url(), "TIDINGS_ALLOW_UNSAFE_STORE": "true"}
        async with ServerProcess(folder / "data", logs=folder / "logs", environment=environment) as server:
            yield Site(disk, server, database)
    finally:
        await asyncio.to_thread(database.close)


STORES: dict[str, Callable[..., object]] = {"sqlite": on_sqlite, "postgres": on_postgres}


async def cuts(site: Site, times: int, seed: int, *, lost_is_enough: bool = False) -> Verdict:
    """Write, cut the power in the middle, again and again; what the history checker says of it."""
    rng = random.Random(seed)
    house = House(site.server, *await first_app(site.server))
    names = [f"w{number}" for number in range(WRITERS)]
    await house.users(*names)
    channels = [await house.channel(*names) for _ in range(3)]
    # The people and their channels are on the disk, and so is the database itself, whatever becomes of what they write.
    await asyncio.to_thread(site.disk.settle)
    recorder = Recorder()
    stop = asyncio.Event()
    running = asyncio.Event()
    running.set()
    sent = [0] * WRITERS

    async def write(number: int) -> None:
        name = names[number]
        while not stop.is_set():
            await running.wait()
            try:
                wire = await house.wire(name, device=name)
                while not stop.is_set():
                    key = f"{name}/{sent[number]}"
                    channel = channels[sent[number] % len(channels)]
                    with recorder.operation(name, Send(channel, name, key, body_digest(key))) as operation:
                        reply = await wire.send(channel, key, key=key)
                        if reply["type"] != "message.sent":
                            # The disk is gone and the server is not, for a moment: refused, and nothing is promised.
                            assert reply["code"] == "unavailable", reply
                            await asyncio.sleep(0.01)  # why: a client waits before it tries again
                            continue
                        operation.ok(message_id=reply["id"], seq=reply["seq"])
                    sent[number] += 1
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0)

    async def verdict() -> Verdict:
        seen = Recorder()
        for channel in channels:
            epoch, log = await house.log(channel)
            seen.final_log(channel, log, epoch=epoch)
        return check([*recorder.entries, *seen.entries])

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                group.create_task(write(number))
            for _ in range(times):
                target = sum(sent) + rng.randrange(SENT_MIN, SENT_MAX)
                await wait_until(lambda target=target: sum(sent) >= target, "messages were sent between two cuts", 60)
                running.clear()
                await site.cut()
                if lost_is_enough and not (found := await verdict()).ok:
                    stop.set()
                    running.set()
                    return found
                running.set()
            target = sum(sent) + SENT_MIN
            await wait_until(lambda: sum(sent) >= target, "messages were sent after the last cut", 60)
            stop.set()
        return await verdict()
    finally:
        await house.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("store", list(STORES))
async def test_d2_what_was_acknowledged_survives_power_cuts(disk: Disk, tmp_path: Path, store: str) -> None:
    async with STORES[store](disk, tmp_path) as site:  # type: ignore[attr-defined]
        verdict = await cuts(site, 3, 1)
    assert verdict.ok, verdict.render()
    assert verdict.seen["acknowledged"] >= 3 * SENT_MIN


@pytest.mark.soak
@pytest.mark.parametrize("store", list(STORES))
async def test_d2_what_was_acknowledged_survives_many_power_cuts(disk: Disk, tmp_path: Path, store: str) -> None:
    async with STORES[store](disk, tmp_path) as site:  # type: ignore[attr-defined]
        verdict = await cuts(site, 25, 2)
    assert verdict.ok, verdict.render()


@pytest.mark.timeout(180)
async def test_d2_a_store_that_does_not_wait_for_the_disk_loses_messages(disk: Disk, tmp_path: Path) -> None:
    """What makes the check above worth something: with NORMAL, which the server uses only when told to by name."""
    async with on_sqlite(disk, tmp_path, TIDINGS_STORE_SYNCHRONOUS="normal", TIDINGS_ALLOW_UNSAFE_STORE="true") as site:
        verdict = await cuts(site, 5, 3, lost_is_enough=True)
    assert not verdict.ok
    assert verdict.counts["lost"] > 0, verdict.render()
