"""A bus that delays, repeats, drops and partitions, under the same port as the real ones.

What decides about access is not dropped silently, as on the real one: a node that was cut off knows it, forgets what it
remembers while it is, and is told `Lost` when it is back. Everything else may vanish without a word.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from random import Random
from typing import Any

from tidings.server.bus.base import (
    AccessChanged,
    Arrived,
    Crowd,
    Joined,
    Left,
    Listeners,
    Lost,
    Notice,
    Published,
    Revoked,
    Shown,
    Signal,
    Unreachable,
    Used,
)

# Seconds a notice travels at most, and how much longer it may take while the network has trouble.
TRAVEL_SECONDS_MAX = 0.003
TROUBLE_SECONDS_MAX = 0.5

_ACCESS = (Joined, Left, AccessChanged, Revoked, Used)


class SimNetwork:
    """What lies between the nodes."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.buses: dict[str, SimBus] = {}
        # Shares of what is dropped and of what comes twice, and whether things take long.
        self.drops = 0.0
        self.repeats = 0.0
        self.slow = False

    def travel(self) -> float:
        seconds = self.rng.random() * TRAVEL_SECONDS_MAX
        return seconds + self.rng.random() * TROUBLE_SECONDS_MAX if self.slow else seconds


class SimBus:
    """The bus's port for one node."""

    def __init__(self, network: SimNetwork, node: str) -> None:
        self.node = node
        self.connected = True
        self.dead = False
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._listeners = Listeners()
        self._wanted: Counter[tuple[object, ...]] = Counter()
        # What the others know of what is wanted here: it takes time until they do.
        self._known: set[tuple[object, ...]] = set()
        self._shown: Callable[[int, str], bool] = lambda app, user: False
        self._devices: Callable[[int, str], list[str]] = lambda app, user: []
        self._answers: dict[str, Callable[[bytes], Awaitable[bytes]]] = {}
        # When the last notice of each other node comes.
        self._heard_at: dict[str, float] = {}
        network.buses[node] = self

    # ------------------------------------------------------------ notices

    def publish(self, notice: Notice) -> None:
        for listener in self._listeners.of[type(notice)]:
            listener(notice)
        if not self.connected or self.dead:
            return
        network, loop = self._network, self._loop
        for bus in network.buses.values():
            if bus is self or not bus.connected or not bus._wants(notice):
                continue
            if not isinstance(notice, _ACCESS) and network.rng.random() < network.drops:
                continue
            # From one node to another things come in the order in which they were told, as over NATS.
            at = max(loop.time() + network.travel(), bus._heard_at.get(self.node, 0.0) + 1e-9)
            bus._heard_at[self.node] = at
            loop.call_at(at, bus._hear, notice)
            if network.rng.random() < network.repeats:
                loop.call_at(at + network.travel(), bus._hear, notice)

    def _wants(self, notice: Notice) -> bool:
        match notice:
            case Published() | Crowd():
                return ("s", notice.sid) in self._known
            case Signal():
                if notice.sid is not None:
                    return ("s", notice.sid) in self._known
                return ("u", notice.app, notice.user) in self._known
            case Arrived():
                return ("u", notice.app, notice.user) in self._known
            case Shown():
                return ("w", notice.app, notice.user) in self._known
            case Lost():
                return False
            case _:
                return True

    def _hear(self, notice: Notice) -> None:
        if self.connected and not self.dead:
            for listener in self._listeners.of[type(notice)]:
                listener(notice)

    def listen(self, listener: Callable[[Any], None], *kinds: type[Notice]) -> None:
        self._listeners.add(listener, kinds)

    # ------------------------------------------------------------ interest

    def _want(self, what: tuple[object, ...]) -> None:
        self._wanted[what] += 1
        if self._wanted[what] == 1:
            self._loop.call_later(self._network.travel(), self._spread, what)

    def _spread(self, what: tuple[object, ...]) -> None:
        if self._wanted[what] > 0 and self.connected:
            self._known.add(what)

    def _unwant(self, what: tuple[object, ...]) -> None:
        self._wanted[what] -= 1
        if self._wanted[what] == 0:
            del self._wanted[what]
            self._known.discard(what)

    def follow(self, sid: int) -> None:
        self._want(("s", sid))

    def unfollow(self, sid: int) -> None:
        self._unwant(("s", sid))

    def attend(self, app: int, user: str) -> None:
        self._want(("u", app, user))

    def unattend(self, app: int, user: str) -> None:
        self._unwant(("u", app, user))

    def watch(self, app: int, user: str) -> None:
        self._want(("w", app, user))

    def unwatch(self, app: int, user: str) -> None:
        self._unwant(("w", app, user))

    async def settle(self) -> bool:
        if not self.connected:
            return False
        await asyncio.sleep(self._network.travel())
        if not self.connected:
            return False
        self._known = set(self._wanted)
        return True

    # ------------------------------------------------------------ questions

    async def online(self, app: int, users: Iterable[str]) -> set[str]:
        await asyncio.sleep(self._network.travel())
        if not self.connected:
            return set()
        others = [bus for bus in self._network.buses.values() if bus is not self and bus.connected]
        return {user for user in users if any(bus._shown(app, user) for bus in others)}

    def answer_online(self, shown: Callable[[int, str], bool]) -> None:
        self._shown = shown

    async def connected_devices(self, app: int, users: Iterable[str]) -> set[tuple[str, str]]:
        await asyncio.sleep(self._network.travel())
        buses = [bus for bus in self._network.buses.values() if bus is self or (bus.connected and self.connected)]
        return {(user, device) for bus in buses for user in users for device in bus._devices(app, user)}

    def answer_devices(self, devices: Callable[[int, str], list[str]]) -> None:
        self._devices = devices

    async def request(self, node: str, topic: str, payload: bytes, seconds: float) -> bytes:
        await asyncio.sleep(self._network.travel())
        bus = self._network.buses.get(node)
        if bus is None or not bus.connected or not self.connected or topic not in bus._answers:
            raise Unreachable(node)
        return await bus._answers[topic](payload)

    def serve(self, topic: str, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._answers[topic] = answer

    async def close(self) -> None:
        self.die()

    # ------------------------------------------------------------ trouble

    def cut(self) -> None:
        """The node is cut off from the bus, and notices."""
        self.connected = False
        self._known.clear()

    def heal(self) -> None:
        """It is back: what it wants is known again a moment later, and it is told that it may have missed something."""
        if self.dead or self.connected:
            return
        self.connected = True
        self._known = set(self._wanted)
        for listener in self._listeners.of[Lost]:
            listener(Lost())

    def die(self) -> None:
        """The node is gone."""
        self.dead = True
        self.connected = False
        self._network.buses.pop(self.node, None)
