"""The parent of worker processes: who is started when, who is missed, and what is told to whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 20.0

# A worker that serves nobody: it says that it is ready, and ends when it is asked to. What else it does is in its name.
PROGRAM = """
import os, signal, sys, time
from tidings.server.commands.workers import Supervisor
from tidings.server.systemd import notify
from tidings.server.telemetry import setup_logging

def work(number, first):
    asked = []
    how = sys.argv[1]
    if how == "second_fails" and number == 2:
        return 3
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    if how == "first_waits" and number == 1:
        while not os.path.exists("go"):
            time.sleep(0.01)
    notify("READY=1")
    while not asked or (how == "never_drains" and number == 1):
        if not (how == "stalls" and number == 2 and first):
            notify("WATCHDOG=1")
        time.sleep(0.02)
    return 0

setup_logging(format="json")
sys.exit(Supervisor(3, work, drain_seconds=0.1).run())
"""


class Parent:
    """The process under test, and what it has logged so far."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self.process = process
        self._said = said

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._said.read_text().splitlines() if line.endswith("}")]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    async def until(self, condition: Callable[[], object]) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while not (found := condition()):
                await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition
        return found

    async def ready(self) -> list[int]:
        return list((await self.until(lambda: self.of("workers_ready")))[0]["pids"])

    async def ended(self) -> int:
        await self.until(lambda: self.process.poll() is not None)
        return int(self.process.returncode)


@asynccontextmanager
async def parent(folder: Path, how: str = "", **environment: str) -> AsyncIterator[Parent]:
    said = folder / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, how],
            stderr=output,
            cwd=folder,
            env=os.environ | environment,
            process_group=0,
        )
    try:
        yield Parent(process, said)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_it_starts_them_and_ends_when_all_have(tmp_path: Path) -> None:
    async with parent(tmp_path) as one:
        pids = await one.ready()
        assert len(set(pids)) == 3
        assert all(alive(pid) for pid in pids)
        one.process.send_signal(signal.SIGTERM)
        assert await one.ended() == 0
        assert not any(alive(pid) for pid in pids)


async def test_ctrl_c_which_reaches_all_of_them_ends_them_as_well(tmp_path: Path) -> None:
    async with parent(tmp_path) as one:
        await one.ready()
        one.process.send_signal(signal.SIGINT)
        assert await one.ended() == 0


async def test_nobody_else_is_started_before_the_first_is_ready(tmp_path: Path) -> None:
    async with parent(tmp_path, "first_waits") as one:
        await one.until(lambda: one.of("worker_started"))
        # Whatever wakes the parent must not start the others.
        for _ in range(5):
            one.process.send_signal(signal.SIGCHLD)
            await asyncio.sleep(0)
        assert [line["worker"] for line in one.of("worker_started")] == [1]
        (tmp_path / "go").touch()
        await one.ready()


async def test_one_that_dies_is_started_again_and_the_others_are_left_alone(tmp_path: Path) -> None:
    async with parent(tmp_path) as one:
        pids = await one.ready()
        os.kill(pids[1], signal.SIGKILL)
        back = (await one.until(lambda: one.of("worker_back")))[0]
        assert (back["worker"], one.of("worker_died")[0]["code"]) == (2, -signal.SIGKILL)
        assert alive(pids[0])
        assert alive(pids[2])
        assert alive(back["pid"])


async def test_one_that_goes_on_dying_is_tried_less_and_less_often(tmp_path: Path) -> None:
    async with parent(tmp_path) as one:
        await one.ready()
        for number in range(3):
            os.kill([line for line in one.of("worker_started") if line["worker"] == 3][-1]["pid"], signal.SIGKILL)
            await one.until(lambda number=number: len(one.of("worker_back")) > number)
        waits = [line["starts_again_in"] for line in one.of("worker_died")]
        assert waits == [0.2, 0.4, 0.8]


async def test_when_one_cannot_start_none_stays_and_the_status_says_so(tmp_path: Path) -> None:
    async with parent(tmp_path, "second_fails") as one:
        assert await one.ended() == 3
        assert not any(alive(line["pid"]) for line in one.of("worker_started"))
        assert one.of("workers_ready") == []


async def test_one_that_does_not_drain_is_killed_and_that_is_a_failure(tmp_path: Path) -> None:
    async with parent(tmp_path, "never_drains") as one:
        await one.ready()
        one.process.send_signal(signal.SIGTERM)
        assert await one.ended() == 1
        assert [line["worker"] for line in one.of("worker_did_not_drain")] == [1]


async def test_they_drain_when_their_parent_is_killed(tmp_path: Path) -> None:
    async with parent(tmp_path) as one:
        pids = await one.ready()
        one.process.kill()
        await one.until(lambda: not any(alive(pid) for pid in pids))


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """systemd's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0tidings-test-workers-{os.getpid()}")
        listening.setblocking(False)
        yield listening


async def heard(manager: socket.socket) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return (await asyncio.get_running_loop().sock_recv(manager, 256)).decode()


async def test_systemd_hears_that_all_are_ready_and_not_what_each_says(tmp_path: Path, manager: socket.socket) -> None:
    address = "@" + manager.getsockname()[1:].decode()
    async with parent(tmp_path, "first_waits", NOTIFY_SOCKET=address) as one:
        await one.until(lambda: one.of("worker_started"))
        (tmp_path / "go").touch()
        assert await heard(manager) == "READY=1"
        assert len(one.of("worker_started")) == 3
        one.process.send_signal(signal.SIGTERM)
        assert await heard(manager) == "STOPPING=1"
        assert await one.ended() == 0
        with pytest.raises(BlockingIOError):
            manager.recv(256)


async def test_one_whose_event_loop_has_stopped_is_started_again_while_systemd_hears_signs_of_life(
    tmp_path: Path, manager: socket.socket
) -> None:
    address = "@" + manager.getsockname()[1:].decode()
    async with parent(tmp_path, "stalls", NOTIFY_SOCKET=address, WATCHDOG_USEC="1000000") as one:
        pids = await one.ready()
        back = (await one.until(lambda: one.of("worker_back")))[0]
        assert back["worker"] == 2
        assert [line["pid"] for line in one.of("worker_stalled")] == [pids[1]]
        assert {await heard(manager) for _ in range(3)} <= {"READY=1", "WATCHDOG=1"}


async def test_what_strangers_say_in_a_workers_name_does_not_count(tmp_path: Path) -> None:
    async with parent(tmp_path, "first_waits") as one:
        await one.until(lambda: one.of("worker_started"))
        names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
        address = next(name for name in names if name.startswith(f"@tidings-{one.process.pid}-"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            # More than wait unread: the last one is sent when the first ones have been looked at.
            for _ in range(2_000):
                stranger.sendto(b"READY=1", "\0" + address[1:])
        assert [line["worker"] for line in one.of("worker_started")] == [1]
