"""The bus of a single process: a call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from .base import Listeners, Notice, Unreachable


class LocalBus:
    """Hands each notice to the listeners of this process, at once and in order. There are no other nodes: interest
    costs nothing, and nothing can be missed."""

    node = ""
    connected = True

    def __init__(self) -> None:
        self._listeners = Listeners()
        self._of = self._listeners.of
        self._devices: Callable[[int, str], list[str]] = lambda app, user: []

    def publish(self, notice: Notice) -> None:
        for listener in self._of[type(notice)]:
            listener(notice)

    def listen(self, listener: Callable[[Any], None], *kinds: type[Notice]) -> None:
        self._listeners.add(listener, kinds)

    def follow(self, sid: int) -> None:
        pass

    def unfollow(self, sid: int) -> None:
        pass

    def attend(self, app: int, user: str) -> None:
        pass

    def unattend(self, app: int, user: str) -> None:
        pass

    def watch(self, app: int, user: str) -> None:
        pass

    def unwatch(self, app: int, user: str) -> None:
        pass

    async def settle(self) -> bool:
        return True

    async def online(self, app: int, users: Iterable[str]) -> set[str]:
        return set()

    def answer_online(self, shown: Callable[[int, str], bool]) -> None:
        pass

    async def connected_devices(self, app: int, users: Iterable[str]) -> set[tuple[str, str]]:
        return {(user, device) for user in users for device in self._devices(app, user)}

    def answer_devices(self, devices: Callable[[int, str], list[str]]) -> None:
        self._devices = devices

    async def request(self, node: str, topic: str, payload: bytes, seconds: float) -> bytes:
        raise Unreachable(node)

    def serve(self, topic: str, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        pass

    async def close(self) -> None:
        pass
