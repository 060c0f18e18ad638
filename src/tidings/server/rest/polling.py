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

    The wait begins before the first read, so that nothing falls between the two; being woken for nothing does not end
    it, as a node among others is woken now and then to be sure. It ends with the connection: a client
    that left costs nothing. Raises Refusal `rate_limited` when too many wait already: an answer without news would make
    its client ask again at once.
    """
    if seconds <= 0 or call.draining():
        return await read()
    with call.services.sync.waiting(call.actor, sids) as growth:
        await call.services.sync.in_place()
        found = await read()
        if has_news(found):
            return found
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        gone = asyncio.create_task(_gone(call.receive))  # owned by this call
        try:
            while True:
                grown = asyncio.create_task(growth.wait())  # owned by this call
                await asyncio.wait((grown, gone), timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
                grown.cancel()
                if gone.done():
                    return found
                in_time = growth.is_set()
                growth.clear()
                # Who was turned out while waiting gets nothing of what came since.
                await call.renew()
                found = await read()
                if has_news(found) or not in_time or call.draining():
                    return found
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone


async def _gone(receive: Any) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
