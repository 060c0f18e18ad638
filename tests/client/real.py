"""A whole server for the SDK's tests, and the people who use it."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from tidings.client import Client, Rest
from tidings.testing.process import ServerProcess

from .conftest import quick, until

# Rates are another test's subject: here they would only make a burst of test messages slow.
ENVIRONMENT = {
    "TIDINGS_SESSION_RATE_PER_SECOND": "100000",
    "TIDINGS_SESSION_BURST": "100000",
    "TIDINGS_REST_RATE_PER_SECOND": "100000",
    "TIDINGS_REST_BURST": "100000",
    "TIDINGS_PRESENCE_GRACE_SECONDS": "0",
}

_numbers = itertools.count(1)


class Place:
    """A running server with an app of its own; `api_key` may do everything in it."""

    def __init__(self, server: ServerProcess, api_key: str) -> None:
        self.server = server
        self.api_key = api_key

    @property
    def url(self) -> str:
        return self.server.url

    def rest(self, **options: Any) -> Rest:
        return Rest(self.url, api_key=self.api_key, **options)

    @asynccontextmanager
    async def ward(self, *, start: int = 0) -> AsyncIterator[Ward]:
        """A fresh channel with Alice and Bob in it, and `start` messages of hers."""
        number = next(_numbers)
        async with self.rest() as rest:
            alice, bob = f"alice-{number}", f"bob-{number}"
            await rest.users.upsert([{"id": alice, "name": "Alice"}, {"id": bob, "name": "Bob"}])
            channel = await rest.channels.create(f"ward-{number}", members=[alice, bob])
            for n in range(start):
                await rest.as_user(alice).messages.send(channel.id, f"before {n}")
            yield Ward(self, rest, channel.id, alice, bob)


class Ward:
    """One channel, two people, and the backend (`rest`)."""

    def __init__(self, place: Place, rest: Rest, channel: str, alice: str, bob: str) -> None:
        self.place = place
        self.rest = rest
        self.channel = channel
        self.alice = alice
        self.bob = bob

    async def client(self, user: str, *, url: str | None = None, **options: Any) -> Client:
        """A client of this user that is not open yet."""
        if "token_provider" not in options:
            options["token"] = (await self.rest.users.token(user)).token
        return Client(url or self.place.url, **{"device": f"{user}-phone", "backoff": quick, **options})

    async def head(self) -> int:
        return (await self.rest.channels.get(self.channel)).head

    async def texts(self) -> list[str]:
        """Every message's text in the order of the log."""
        return [message.text async for message in self.rest.messages.history(self.channel, newest_first=False)]


async def key_of(server: ServerProcess) -> str:
    """The API key that the first start printed, which may be a moment after the server answers."""

    def printed() -> re.Match[str] | None:
        return re.search(r"API key\s+(tk_\S+)", server.stderr_path.read_text())

    await until(printed)
    found = printed()
    assert found
    return found[1]


async def texts_until(events: Any, last: str, seconds: float = 20.0) -> list[tuple[int, str]]:
    """(seq, text) of the messages that come, up to and including the one with the text `last`."""
    got: list[tuple[int, str]] = []
    async with asyncio.timeout(seconds):
        async for event in events:
            message = getattr(event, "message", None)
            if message is not None and hasattr(message, "text"):
                got.append((event.seq, message.text))
                if message.text == last:
                    return got
    return got


class UpgradeBlocker:
    """A proxy that lets HTTP through and answers a WebSocket upgrade with 403, as some companies' do."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.blocked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"upgrade: websocket" in head.lower():
                self.blocked += 1
                writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
                return
            back, out = await asyncio.open_connection("127.0.0.1", self._target_port)
            out.write(head)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, out))
                    group.create_task(_pump(back, writer))
            finally:
                out.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # One of the two is gone, or the test is over.
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
