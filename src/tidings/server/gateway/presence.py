"""Presence: who is online, told to those who watch and share a channel. Best effort, never in the log.

A node knows who is online on it. Of everybody else it asks the others, through the bus, when somebody begins to watch
them, and again from time to time: a node that died takes its users along without a word. Whoever comes or goes is
announced by the node they come to or go from; one that they leave last asks the others before it says so.
"""

from __future__ import annotations

import asyncio
from typing import Final

from tidings.server.bus.base import Bus, Notice, Shown
from tidings.server.clock import Clock
from tidings.server.services.access import Actor
from tidings.server.store import log as store_log
from tidings.server.store.base import Store, Tx
from tidings.server.tasks import Tasks
from tidings.wire.codec import encode
from tidings.wire.commands import PresenceSignal
from tidings.wire.ids import time_of
from tidings.wire.resources import Presence

from .connection import Connection
from .hub import Hub

Key = tuple[int, str]

# How often other nodes are asked again about people who are watched here and not online here, seconds; who is not found
# twice in a row is told to be offline.
ASK_AGAIN_SECONDS: Final = 5.0
# People asked about in one such round at most: about 5 µs each, here and there.
ASK_AGAIN_MAX: Final = 5_000


class PresenceBoard:
    """Online and watching users of this node."""

    def __init__(self, store: Store, hub: Hub, bus: Bus, clock: Clock, tasks: Tasks, *, grace_seconds: float) -> None:
        self._store = store
        self._bus = bus
        self._tasks = tasks
        self._hub = hub
        self._clock = clock
        self._grace = grace_seconds
        self._watchers: dict[Key, set[Connection]] = {}
        # Whether those who are watched were last told to be online; how often they were not found since.
        self._told: dict[Key, bool] = {}
        self._not_found: dict[Key, int] = {}
        self._asked_last: Key = (0, "")
        # Users shown as online; those whose last connection has ended stay for the grace period.
        self._online: set[Key] = set()
        self._leaving: dict[Key, asyncio.TimerHandle] = {}
        # When users were last seen, to be written by `take_seen`.
        self._seen: dict[Key, int] = {}
        bus.listen(self._heard, Shown)
        bus.answer_online(lambda app, user: (app, user) in self._online)

    def appeared(self, connection: Connection) -> None:
        """A connection is open, or became visible."""
        key = (connection.app, connection.user)
        self._seen[key] = self._clock.now_ms()
        if not connection.visible:
            return
        leaving = self._leaving.pop(key, None)
        if leaving is not None:
            leaving.cancel()
        if key not in self._online:
            self._online.add(key)
            self._bus.publish(Shown(*key))

    def vanished(self, connection: Connection) -> None:
        """A connection has ended, or became invisible."""
        self.unwatch(connection)
        key = (connection.app, connection.user)
        self._seen[key] = self._clock.now_ms()
        if key in self._online and key not in self._leaving and not self._visible(key):
            loop = asyncio.get_running_loop()
            self._leaving[key] = loop.call_later(self._grace, self._left, key)

    def hide(self, connection: Connection) -> None:
        """The user wants to be seen as offline on this connection, at once."""
        key = (connection.app, connection.user)
        if key in self._online and not self._visible(key):
            leaving = self._leaving.pop(key, None)
            if leaving is not None:
                leaving.cancel()
            self._left(key)

    def _visible(self, key: Key) -> bool:
        return any(isinstance(peer, Connection) and peer.visible for peer in self._hub.peers_of(*key))

    def _left(self, key: Key) -> None:
        self._leaving.pop(key, None)
        if key in self._online and not self._visible(key):
            self._online.discard(key)
            if self._bus.node:
                self._tasks.spawn(self._left_here(key), "presence")
            else:
                self._bus.publish(Shown(*key, self._clock.now_ms()))

    async def _left_here(self, key: Key) -> None:
        # They are off our list before we ask: of two nodes that are left at the same moment, at least one finds nobody.
        if not await self._bus.online(key[0], (key[1],)) and key not in self._online:
            self._bus.publish(Shown(*key, self._clock.now_ms()))

    def _heard(self, notice: Notice) -> None:
        if type(notice) is Shown:
            key = (notice.app, notice.user)
            if key in self._watchers:
                self._not_found.pop(key, None)
                if notice.last_seen_ms is None:
                    self._tell(key, PresenceSignal(user=key[1], status="online"))
                elif key not in self._online:
                    at = time_of(notice.last_seen_ms)
                    self._tell(key, PresenceSignal(user=key[1], status="offline", last_seen_at=at))

    def _tell(self, key: Key, signal: PresenceSignal) -> None:
        online = signal.status == "online"
        if self._told.get(key) is online:
            return
        self._told[key] = online
        payload = encode(signal)
        for connection in self._watchers[key]:
            if not connection.paused:
                connection.send(payload)

    def take_seen(self) -> dict[Key, int]:
        """When users were last seen, since the last call; everyone online now included."""
        seen, self._seen = self._seen, {}
        return seen

    # ------------------------------------------------------------ watching

    async def watch(self, connection: Connection, actor: Actor, users: list[str]) -> list[Presence]:
        """Watch these people from now on instead of those before; their presence now.

        Only people who share a channel with the watcher are told of: of the others nothing is known here.
        """
        app = actor.app.app
        wanted = list(dict.fromkeys(users))
        hidden = not actor.app.settings.last_seen

        async def unit(tx: Tx) -> dict[str, int | None]:
            if not wanted:
                return {}
            rows = await tx.all(
                "SELECT u.id, u.last_seen_at, u.invisible FROM users u WHERE u.app=? AND u.deleted_at IS NULL"
                f" AND u.id IN ({store_log.placeholders(wanted)})"
                " AND EXISTS (SELECT 1 FROM members a JOIN members b ON b.app=a.app AND b.sid=a.sid"
                " WHERE a.app=u.app AND a.user=u.id AND b.user=?)",
                app,
                *wanted,
                actor.user,
            )
            return {user: None if hidden or invisible else seen for user, seen, invisible in rows}

        known = await self._store.read(unit)
        self.unwatch(connection)
        if connection.ended:
            return []
        if self._bus.node:
            # Their coming and going is listened to before others are asked: nothing falls in between. The watcher
            # itself is told by the answer.
            keys = [(app, user) for user in known]
            for key in keys:
                self._listen(key)
            asked = False
            try:
                await self._ask([key for key in keys if key not in self._online])
                asked = not connection.ended
            finally:
                if not asked:
                    for key in keys:
                        self._unlisten(key)
        if connection.ended:
            return []
        for user in known:
            key = (app, user)
            self._listen(key).add(connection)
            connection.watching.add(key)
        found = []
        for user in wanted:
            if user not in known:
                continue
            key = (app, user)
            seen = known[user]
            if key in self._online or self._told.get(key, False):
                found.append(Presence(user=user, status="online"))
            else:
                found.append(
                    Presence(user=user, status="offline", last_seen_at=None if seen is None else time_of(seen))
                )
        return found

    def unwatch(self, connection: Connection) -> None:
        """The connection watches nobody any more."""
        for key in connection.watching:
            watchers = self._watchers.get(key)
            if watchers is not None:
                watchers.discard(connection)
                self._unlisten(key)
        connection.watching.clear()

    def _listen(self, key: Key) -> set[Connection]:
        """Whoever watches the user, who is listened to from now on."""
        watchers = self._watchers.get(key)
        if watchers is None:
            watchers = self._watchers[key] = set()
            self._told[key] = key in self._online
            self._bus.watch(*key)
        return watchers

    def _unlisten(self, key: Key) -> None:
        """Not any more, if nobody watches them."""
        if key in self._watchers and not self._watchers[key]:
            del self._watchers[key], self._told[key]
            self._not_found.pop(key, None)
            self._bus.unwatch(*key)

    # ------------------------------------------------------------ asking other nodes

    async def _ask(self, keys: list[Key], *, gone_after: int = 1) -> None:
        """Find out who is online elsewhere, and tell their watchers what is new; who was not found `gone_after` times
        is offline."""
        by_app: dict[int, list[str]] = {}
        for app, user in keys:
            by_app.setdefault(app, []).append(user)
        online = {(app, user) for app, users in by_app.items() for user in await self._bus.online(app, users)}
        for key in keys:
            if key not in self._watchers or key in self._online:
                continue
            if key in online:
                self._not_found.pop(key, None)
                self._tell(key, PresenceSignal(user=key[1], status="online"))
            elif self._told[key]:
                missed = self._not_found[key] = self._not_found.get(key, 0) + 1
                if missed >= gone_after:
                    del self._not_found[key]
                    at = time_of(self._clock.now_ms())
                    self._tell(key, PresenceSignal(user=key[1], status="offline", last_seen_at=at))

    async def ask_again(self) -> None:
        """One round of asking about those who are watched here and online elsewhere, or said to be offline."""
        keys = sorted(key for key in self._watchers if key not in self._online)
        start = next((place for place, key in enumerate(keys) if key > self._asked_last), 0)
        some = keys[start : start + ASK_AGAIN_MAX]
        if some:
            self._asked_last = some[-1]
            await self._ask(some, gone_after=2)

    async def keep_asking(self) -> None:
        """Rounds of `ask_again`, until cancelled."""
        while True:
            await asyncio.sleep(ASK_AGAIN_SECONDS)
            if self._bus.connected:
                await self.ask_again()

    def close(self) -> None:
        """Forget every timer."""
        for handle in self._leaving.values():
            handle.cancel()
        self._leaving.clear()
