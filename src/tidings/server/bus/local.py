"""The bus of a single process: a call."""

from __future__ import annotations

from collections.abc import Callable

from .base import Notice


class LocalBus:
    """Hands each notice to the listeners of this process, at once and in order."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Notice], None]] = []

    def publish(self, notice: Notice) -> None:
        for listener in self._listeners:
            listener(notice)

    def listen(self, listener: Callable[[Notice], None]) -> None:
        self._listeners.append(listener)
