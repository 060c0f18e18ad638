"""A network that lets no socket through: the page talks to the real server by HTTP, and by a socket when it may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.browser.conftest import Stage, until
from tests.browser.test_demo import CUT, stored, write


class Gate:
    """A proxy in front of the server that refuses sockets while `shut`, as some companies' do."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self.shut = True
        self.refused = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if self.shut and b"\r\nupgrade: websocket" in head.lower():
            self.refused += 1
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return await writer.drain()
        there, back = await asyncio.open_connection("127.0.0.1", self._behind)
        back.write(head)
        try:
            await asyncio.gather(_pass(reader, back), _pass(there, writer))
        finally:
            back.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def gate(port: int) -> AsyncIterator[tuple[Gate, str]]:
    made = Gate(port)
    server = await asyncio.start_server(made, "127.0.0.1", 0)
    try:
        yield made, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await made.close()


async def test_messages_go_both_ways_without_a_socket_and_over_one_as_soon_as_it_may(stage: Stage) -> None:
    stage.expected = CUT
    over = "(how) => globalThis.chat?.status.get().state === 'online' && chat.status.get().transport === how"
    async with gate(stage.server.port) as (proxy, url):
        here = await stage.context()
        amira = await stage.page(here)
        await amira.goto(f"{url}/demo?as=amira")
        await until(amira, over, "http")
        assert proxy.refused >= 2
        await amira.click("[data-channel=demo-knee]")
        await amira.wait_for_selector("article")
        lena = await stage.enter("lena")
        await write(amira, "without a socket")
        await lena.wait_for_selector(".bubble >> text=without a socket")
        await write(lena, "and back")
        await amira.wait_for_selector(".bubble >> text=and back")
        # Another network, whose door is open. What is sent as it changes arrives, too.
        proxy.shut = False
        await here.set_offline(True)
        await here.set_offline(False)
        await write(amira, "on the way")
        await until(amira, over, "websocket")
        await write(amira, "over a socket")
        await write(lena, "and back again")
        await amira.wait_for_selector(".bubble >> text=and back again")
        await until(amira, "() => chat.outbox.get().length === 0")
        texts = [message["text"] for message in await stored(stage.server)]
        mine = ["without a socket", "on the way", "over a socket"]
        assert [text for text in texts if text in mine] == mine
        await amira.close()
