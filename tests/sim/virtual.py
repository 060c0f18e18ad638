"""An event loop whose time stands still while anything can run, and jumps to the next timer when nothing can."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Mapping
from typing import Any

# The wall clock at the loop's zero, ms.
EPOCH_MS = 1_700_000_000_000


class Stuck(Exception):
    """Nothing can run and nothing ever will: something waits for what nobody is going to do."""


class _NoWaiting(selectors.BaseSelector):
    """Tells the loop that the time it wanted to wait has passed. Sockets and pipes are never ready: there are none."""

    def __init__(self) -> None:
        self.loop: VirtualLoop | None = None
        self._inner = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck
        if timeout > 0:
            assert self.loop is not None
            self.loop.now += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is `now`, seconds from 0. One thread, nothing from outside: the same run every time."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _NoWaiting()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now


class VirtualClock:
    """The server's clock on a virtual loop."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now_ms(self) -> int:
        return EPOCH_MS + int(self._loop.now * 1000)

    def monotonic(self) -> float:
        return self._loop.now
