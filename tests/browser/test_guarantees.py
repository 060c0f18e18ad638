"""Whole runs in real browsers, judged by the history checker: what each page saw, what was acknowledged, what the
server has. The network is cut, pages are reloaded, the server is killed in the middle of sending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from tests.browser.conftest import Stage, until
from tests.browser.test_demo import CUT
from tests.browser.witness import Room

SENDING = "() => chat.outbox.get().some(({ state }) => state === 'sending')"


@pytest_asyncio.fixture
async def room(stage: Stage) -> AsyncIterator[Room]:
    stage.expected = CUT
    made = await Room.open(stage, "amira", "lena")
    yield made
    await made.close()


def numbered(words: str, count: int) -> list[str]:
    return [f"{words} {number}" for number in range(count)]


async def test_a_cut_network_and_reloads_in_the_middle_break_no_promise(room: Room) -> None:
    phone, laptop, lena = (
        await room.enter("phone", "amira"),
        await room.enter("laptop", "amira"),
        await room.enter("d", "lena"),
    )
    await asyncio.gather(*(one.send(*numbered(f"{one.name} begins", 3)) for one in room.witnesses))
    for one in room.witnesses:
        await one.sent()
    # Two of three are cut off, one of them in the middle of sending; the third goes on.
    await phone.send(*numbered("phone is cut", 6))
    for one in (phone, laptop):
        await one.context.set_offline(True)
        await one.page.evaluate("() => chat.goOffline()")
    await laptop.send(*numbered("laptop waits", 4))
    await lena.send(*numbered("lena goes on", 4))
    await lena.sent()
    for one in (phone, laptop):
        await one.context.set_offline(False)
        await one.page.evaluate("() => chat.goOnline()")
    for one in room.witnesses:
        await one.sent()
    # The page goes while it sends.
    await asyncio.gather(laptop.send(*numbered("laptop reloads", 6)), lena.send(*numbered("lena meanwhile", 3)))
    await until(laptop.page, SENDING + " || chat.outbox.get().length === 0")
    await laptop.reload()
    await phone.send("phone last")
    # What was on the disk when its page went is sent; the acknowledgement may have been told to nobody.
    texts = await room.judge(acknowledged=21)
    for words, count in (("phone is cut", 6), ("laptop waits", 4), ("lena goes on", 4), ("lena meanwhile", 3)):
        assert [text for text in texts if text.startswith(words)] == numbered(words, count)


async def test_a_killed_server_in_the_middle_breaks_no_promise(room: Room) -> None:
    amira, lena = await room.enter("a", "amira"), await room.enter("b", "lena")
    server = room.stage.server
    for turn in range(2):
        await asyncio.gather(*(one.send(*numbered(f"{one.name} turn {turn}", 8)) for one in room.witnesses))
        await until(lena.page, SENDING + " || chat.outbox.get().length === 0")
        server.kill9()
        await server.wait_exit()
        await asyncio.gather(*(one.send(f"{one.name} down {turn}") for one in room.witnesses))
        await amira.acknowledge()
        await server.start()
        if turn:
            # It comes back to a page that is made anew, with what waits on its disk.
            await until(amira.page, "() => chat.status.get().storage === 'indexeddb'")
            await amira.reload()
        for one in room.witnesses:
            await one.sent()
    texts = await room.judge(acknowledged=27)
    for words in ("a turn 0", "b turn 0", "b turn 1"):
        assert [text for text in texts if text.startswith(words)] == numbered(words, 8)
    assert {"a down 0", "b down 0", "b down 1"} <= set(texts)
