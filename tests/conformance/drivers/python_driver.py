"""The Python SDK as a program that does what it is told, one JSON document a line: see ../README.md."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

from tidings.client import (
    ChannelLeft,
    Client,
    ConnectionRefused,
    FullJitter,
    HistoryReset,
    MessageCreated,
    Refused,
    State,
    TidingsError,
)


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def main(url: str) -> None:
    tokens = 0

    async def token() -> str:
        nonlocal tokens
        tokens += 1
        return f"t{tokens}"

    def quick(source: random.Random) -> FullJitter:
        return FullJitter(base=0.01, cap=0.05, random=source)

    client = Client(url, token_provider=token, device="d1", transport="websocket", backoff=quick)

    async def states() -> None:
        async for change in client.states():
            if change.state is State.CONNECTED:
                tell(state="online")
            elif change.state is State.CLOSED:
                tell(state="refused")

    async def events(stream: str) -> None:
        async for event in client.events(stream):
            if isinstance(event, MessageCreated):
                tell(text=event.message.text, seq=event.seq)
            elif isinstance(event, HistoryReset):
                tell(reset=stream)
            elif isinstance(event, ChannelLeft):
                tell(left=event.channel)

    async def send(key: str, text: str) -> None:
        try:
            sent = await client.channel("c1").send(text, key=key)
            tell(sent=key, seq=sent.seq)
        except Refused as refused:
            tell(failed=key, code=refused.code)

    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tasks: list[asyncio.Task[None]] = []
    order = asyncio.Lock()
    while line := await lines.readline():
        step = json.loads(line)
        if step["client"] == "start":
            await client.open()
            for work in (states(), events("c1"), events("@me")):
                tasks.append(asyncio.create_task(_quietly(work)))
        elif step["client"] == "send":
            async with order:
                tasks.append(asyncio.create_task(send(step["key"], step["text"])))
                await asyncio.sleep(0)
    await client.close()


async def _quietly(work: Any) -> None:
    try:
        await work
    except (ConnectionRefused, TidingsError):
        pass


asyncio.run(main(sys.argv[1]))
