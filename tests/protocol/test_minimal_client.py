"""The client that the protocol's pages describe, word for word, keeps its promise against the real server."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.backend import Backend
from tidings.testing.process import ServerProcess

CLIENT = Path(__file__).parents[2] / "docs/protocol/minimal-client.mjs"
NODE = shutil.which("node")
# Longest that anything awaited here takes on a busy machine, seconds.
PATIENCE = 30


def node_command() -> list[str]:
    """How to run Node with a WebSocket; skips where there is none."""
    if NODE is None:
        pytest.skip("needs Node.js")
    major = int(
        subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout[1:].split(".")[0]
    )
    if major < 20:
        pytest.skip("needs Node.js 20")
    return [NODE] if major >= 22 else [NODE, "--experimental-websocket", "--no-warnings"]


class MinimalClient:
    """The program under test and what it has printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.messages: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    async def read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.messages.append(json.loads(line))
            self._changed.set()

    def say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())

    async def wait(self, condition: Callable[[list[str]], bool]) -> list[str]:
        async with asyncio.timeout(PATIENCE):
            while not condition(texts := [message["text"] for message in self.messages]):
                self._changed.clear()
                await self._changed.wait()
        return texts


@asynccontextmanager
async def minimal_client(server: ServerProcess, token: str, channel: str, state: Path) -> AsyncIterator[MinimalClient]:
    url = server.url.replace("http", "ws") + "/v1/ws"
    process = await asyncio.create_subprocess_exec(
        *node_command(),
        str(CLIENT),
        url,
        token,
        channel,
        str(state),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    client = MinimalClient(process)
    reader = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        process.kill()
        await process.wait()
        await reader


async def saved(state: Path, channel: str, seq: int) -> None:
    """Wait until the client's file says that it has everything up to `seq`."""
    async with asyncio.timeout(PATIENCE):
        while json.loads(state.read_text())["pos"].get(channel, {}).get("seq", 0) < seq:
            await asyncio.sleep(0)


async def test_a_client_written_from_the_pages_gets_everything_once_and_in_order(tmp_path: Path) -> None:
    node_command()
    async with ServerProcess(tmp_path / "data") as server:
        backend = Backend(server)
        for user in ("alice", "bob"):
            await backend.post("/v1/users", {"id": user})
        channel = (await backend.post("/v1/channels", {"type": "group", "members": ["alice", "bob"]}))["id"]
        await backend.say(channel, "bob", "before")
        token, state = await backend.token("alice"), tmp_path / "state.json"

        async with minimal_client(server, token, channel, state) as client:
            assert await client.wait(lambda texts: "before" in texts) == ["before"]
            client.say("hello")
            await client.wait(lambda texts: "hello" in texts)
            await backend.say(channel, "bob", "live")
            await client.wait(lambda texts: "live" in texts)

            # The server is killed; what is written meanwhile is sent when it is back, what was missed comes.
            server.kill9()
            await server.wait_exit()
            client.say("written while the server was gone")
            await server.start()
            await backend.say(channel, "bob", "after the kill")
            texts = await client.wait(
                lambda texts: {"written while the server was gone", "after the kill"} <= set(texts)
            )
            first = list(client.messages)
            # It saves after printing: only then is it fair to kill it.
            await saved(state, channel, first[-1]["seq"])

        assert texts[:3] == ["before", "hello", "live"]
        # The program itself is killed, misses a lot, and starts again from its file.
        missed = [f"missed {number}" for number in range(30)]
        for text in missed:
            await backend.say(channel, "bob", text)
        async with minimal_client(server, token, channel, state) as client:
            await client.wait(lambda texts: missed[-1] in texts)
            await backend.say(channel, "bob", "live again")
            await client.wait(lambda texts: "live again" in texts)
            second = list(client.messages)

        truth = [(message["seq"], message["text"]) for message in await backend.messages(channel)]
        assert [(message["seq"], message["text"]) for message in first + second] == truth
        await backend.close()
