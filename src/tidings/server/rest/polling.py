"""Long polls: an answer at once if there is news, else when there is, when time is up, or when the server drains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, TypeVar

from .operation import Call

T = TypeVar("T")


async def poll(
    call: Call[Any, Any],
    sids: Collection[int],
    seconds: int,
    read: Callable[[], Awaitable[T]],
    has_news: Callable[[T], bool],
) -> T:
    """What `read` gives, waiting at most `seconds` for one of the streams `sids` to grow if it has no news.

    The wait begins before the first read, so that nothing falls between the two. It ends with the connection: a client
    that left costs nothing.
    """
    if seconds <= 0 or call.draining():
        return await read()
    growth = asyncio.create_task(call.services.sync.wait_for_any(sids, seconds))  # owned by this call
    gone = asyncio.create_task(_gone(call.receive))  # owned by this call
    try:
        # The wait registers in its first step.
        await asyncio.sleep(0)
        found = await read()
        if has_news(found):
            return found
        await asyncio.wait((growth, gone), return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            return found
        # Who was turned out while waiting gets nothing of what came since.
        await call.renew()
        return await read()
    finally:
        for task in (growth, gone):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _gone(receive: Any) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
