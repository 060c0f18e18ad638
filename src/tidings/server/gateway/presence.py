"""Presence: who is online, told to those who watch and share a channel. Best effort, never in the log."""

from __future__ import annotations

import asyncio

from tidings.server.clock import Clock
from tidings.server.services.access import Actor
from tidings.server.store import log as store_log
from tidings.server.store.base import Store, Tx
from tidings.wire.codec import encode
from tidings.wire.commands import PresenceSignal
from tidings.wire.ids import time_of
from tidings.wire.resources import Presence

from .connection import Connection
from .hub import Hub

Key = tuple[int, str]


class PresenceBoard:
    """Online and watching users of this node."""

    def __init__(self, store: Store, hub: Hub, clock: Clock, *, grace_seconds: float) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock
        self._grace = grace_seconds
        self._watchers: dict[Key, set[Connection]] = {}
        # Users shown as online; those whose last connection has ended stay for the grace period.
        self._online: set[Key] = set()
        self._leaving: dict[Key, asyncio.TimerHandle] = {}
        # When users were last seen, to be written by `take_seen`.
        self._seen: dict[Key, int] = {}

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
            self._tell(key, PresenceSignal(user=key[1], status="online"))

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
            at = time_of(self._clock.now_ms())
            self._tell(key, PresenceSignal(user=key[1], status="offline", last_seen_at=at))

    def _tell(self, key: Key, signal: PresenceSignal) -> None:
        watchers = self._watchers.get(key)
        if watchers:
            payload = encode(signal)
            for connection in watchers:
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
        found = []
        for user in wanted:
            if user not in known:
                continue
            key = (app, user)
            self._watchers.setdefault(key, set()).add(connection)
            connection.watching.add(key)
            seen = known[user]
            if key in self._online:
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
                if not watchers:
                    del self._watchers[key]
        connection.watching.clear()

    def close(self) -> None:
        """Forget every timer."""
        for handle in self._leaving.values():
            handle.cancel()
        self._leaving.clear()
