"""Data folders filled fast: the server's own use-cases in this process, sealing and all, without waiting for the disk.

What is filled once is kept under `.bench/` for the next run, as long as the schema stays the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec

from tidings.server.app import Core, open_core
from tidings.server.config import load_config
from tidings.server.services.access import Actor, backend_actor
from tidings.server.services.messages import Draft
from tidings.server.store.base import Appended
from tidings.server.telemetry import setup_logging
from tidings.wire.limits import BULK_MAX
from tidings.wire.requests import ChannelCreate, MembersAdd, UserUpsert

from .server import WORK, BenchServer, Credentials, scratch

T = TypeVar("T")

SCHEMA = Path(__file__).parents[1] / "src/tidings/server/store/migrations/versions/head.sql"
CREDENTIALS = "credentials"
# Units and messages handed to the store at once: a commit takes what is waiting.
UNITS_AT_ONCE = 200
MESSAGES_AT_ONCE = 2_000
TEXT = "x" * 200


class Fill:
    """Makes people, channels and messages in one data folder."""

    def __init__(self, core: Core, backend: Actor) -> None:
        self._services = core.services
        self._backend = backend

    async def users(self, users: list[str]) -> None:
        for start in range(0, len(users), BULK_MAX):
            await self._services.users.upsert(
                self._backend, [UserUpsert(id=user, name=f"Dr {user}") for user in users[start : start + BULK_MAX]]
            )

    async def directs(self, pairs: Iterable[tuple[str, str]]) -> None:
        await _each(
            pairs,
            lambda pair: self._services.channels.create(
                self._backend, ChannelCreate(type="direct", members=list(pair))
            ),
        )

    async def groups(self, channels: dict[str, list[str]], *, type: str = "group") -> None:
        """Channels by id, with any number of members each."""

        async def one(item: tuple[str, list[str]]) -> None:
            channel, members = item
            await self._services.channels.create(
                self._backend, ChannelCreate(id=channel, type=type, name="Ward 3b", members=members[:BULK_MAX])
            )
            for start in range(BULK_MAX, len(members), BULK_MAX):
                await self._services.members.add(
                    self._backend, channel, MembersAdd(users=members[start : start + BULK_MAX])
                )

        await _each(channels.items(), one)

    async def messages(self, channel: str, sender: str, count: int) -> None:
        """Messages from one member."""
        messages = self._services.messages
        actor = replace(self._backend, user=sender)
        draft = Draft(text=TEXT)
        await messages.send(actor, channel, draft, "k0")
        room = asyncio.Semaphore(MESSAGES_AT_ONCE)
        failed: list[Exception] = []

        def done(outcome: Appended | Exception) -> None:
            room.release()
            if isinstance(outcome, Exception):
                failed.append(outcome)

        for number in range(1, count):
            await room.acquire()
            if failed:
                raise failed[0]
            if not messages.send_now(actor, channel, draft, f"k{number}", done):
                raise RuntimeError("the channel is not in memory")
        for _ in range(MESSAGES_AT_ONCE):
            await room.acquire()


async def _each(items: Iterable[T], act: Callable[[T], Awaitable[object]]) -> None:
    gate = asyncio.Semaphore(UNITS_AT_ONCE)

    async def one(item: T) -> None:
        async with gate:
            await act(item)

    await asyncio.gather(*(one(item) for item in items))


async def fill_store(folder: Path, make: Callable[[Fill], Awaitable[None]], *, store: str | None = None) -> Credentials:
    """Make an app and what is in it, in a data folder or in the database that `store` names."""
    setup_logging(level="error", format="json", development=False)
    config = load_config(
        overrides={"data_dir": folder, "store": store, "store_synchronous": "off", "allow_unsafe_store": True},
        environ={},
    )
    async with open_core(config) as core:
        new = await core.services.admin.create_app("Bench", via="bench")
        app = await core.services.apps.get(new.app_id)
        await make(Fill(core, backend_actor(app, "bench")))
    return Credentials(new.app_id, new.api_key, new.signing_secret)


@asynccontextmanager
async def filled_server(make: Callable[[Fill], Awaitable[None]]) -> AsyncIterator[BenchServer]:
    """A running server on a folder filled for it alone."""
    with scratch() as folder:
        credentials = await fill_store(folder / "server", make)
        async with BenchServer(folder / "server", credentials) as server:
            yield server


@asynccontextmanager
async def kept_server(name: str, make: Callable[[Fill], Awaitable[None]]) -> AsyncIterator[BenchServer]:
    """A running server on a folder that is filled once and kept. Read from it; what is written stays."""
    kept = WORK / f"{name}-{hashlib.sha256(SCHEMA.read_bytes()).hexdigest()[:12]}"
    if not (kept / CREDENTIALS).exists():
        for old in WORK.glob(f"{name}-*"):
            shutil.rmtree(old)
        kept.mkdir(parents=True)
        credentials = await fill_store(kept / "server", make)
        (kept / CREDENTIALS).write_bytes(msgspec.json.encode(credentials))
    credentials = msgspec.json.decode((kept / CREDENTIALS).read_bytes(), type=Credentials)
    async with BenchServer(kept / "server", credentials) as server:
        yield server
