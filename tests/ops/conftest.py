"""A server's data directory, the server on it, and the command line, all real."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidings.client import Rest
from tidings.server.app import open_core
from tidings.server.config import Config
from tidings.server.services.founding import NewApp
from tidings.testing.process import ServerProcess

# A command starts an interpreter and reads its modules; on a machine with other work that may take seconds.
COMMAND_SECONDS = 60


@dataclass
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


async def start_tidings(*arguments: str | Path) -> asyncio.subprocess.Process:
    """Start a command without waiting for it."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tidings.server.cli",
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )


async def tidings(*arguments: str | Path) -> Done:
    """Run a command to its end."""
    process = await start_tidings(*arguments)
    try:
        out, err = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


@dataclass
class Place:
    """A data directory with one app, two users and a channel."""

    data: Path
    new: NewApp
    server: ServerProcess

    @property
    def config(self) -> Config:
        return Config(data_dir=self.data)

    def rest(self, user: str | None = None) -> Rest:
        return Rest(self.server.url, api_key=self.new.api_key, user=user)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    data = tmp_path / "data"
    async with open_core(Config(data_dir=data)) as core:
        new = await core.services.admin.create_app("Clinic", "app_clinic")
    server = ServerProcess(data, logs=tmp_path / "logs")
    try:
        yield Place(data, new, server)
    finally:
        await server.close()


async def furnish(place: Place) -> None:
    """Two users and a channel, over REST."""
    async with place.rest() as rest:
        await rest.users.create("alice", name="Alice Roe")
        await rest.users.create("bob", name="Bob")
        await rest.channels.create("c1", members=["alice", "bob"])


async def send(rest: Rest, text: str, key: str) -> int:
    """Send to c1; the message's seq."""
    answer = await rest.request("POST", "/v1/channels/c1/messages", body={"text": text, "key": key})
    return int(json.loads(answer)["seq"])


async def texts(rest: Rest) -> list[str]:
    """What is written in c1, oldest first."""
    found: list[str] = []
    after = 0
    while True:
        page = json.loads(await rest.request("GET", f"/v1/channels/c1/messages?after={after}&limit=100"))
        found += [message["text"] for message in page["messages"]]
        if not page["has_after"]:
            return found
        after = page["messages"][-1]["seq"]
