"""People and channels, made through the REST API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tidings.client.rest import Rest
from tidings.wire.limits import BULK_MAX

from .server import BenchServer

# Requests under way at once while setting up.
AT_ONCE = 16


async def make_users(server: BenchServer, users: list[str]) -> None:
    async with server.rest() as rest:
        await rest.users.upsert([{"id": user, "name": f"Dr {user}"} for user in users])


async def make_groups(server: BenchServer, channels: dict[str, list[str]]) -> None:
    """Group channels by id, with any number of members each."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with server.rest() as rest:

        async def one(channel: str, members: list[str]) -> None:
            async with gate:
                await rest.channels.create(channel, type="group", name="Ward 3b", members=members[:BULK_MAX])
                if len(members) > BULK_MAX:
                    await rest.members.add(channel, members[BULK_MAX:])

        await asyncio.gather(*(one(channel, members) for channel, members in channels.items()))


async def make_directs(server: BenchServer, pairs: list[tuple[str, str]]) -> list[str]:
    """A direct channel for each pair; their ids in order."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with server.rest() as rest:

        async def one(pair: tuple[str, str]) -> str:
            async with gate:
                return (await rest.channels.create(type="direct", members=list(pair))).id

        return list(await asyncio.gather(*(one(pair) for pair in pairs)))


@asynccontextmanager
async def acting(server: BenchServer, user: str) -> AsyncIterator[Rest]:
    """The backend in a user's name."""
    async with server.rest() as rest:
        yield rest.as_user(user)
