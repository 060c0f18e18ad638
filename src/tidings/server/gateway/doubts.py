"""What is remembered and may not hold any more: asked of the store again, in the background.

Whoever finds out that something was not heard says so here. Nothing else waits for the answers: streams are read from
the log, which asks by itself, and who may not be here any more is shown out as soon as it is known.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Final

from tidings.server.errors import Refusal, StoreUnavailable
from tidings.server.services.auth import RECHECK_BATCH

from .connection import Connection
from .hub import Subscriber
from .session import State

if TYPE_CHECKING:
    from .gateway import Gateway

# How long to wait for a store that does not answer, seconds.
RETRY_SECONDS: Final = 0.5


class Doubts:
    """Memberships and credentials of one node that are to be asked for again."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._memberships: dict[Subscriber, None] = {}
        self._reading: asyncio.Task[None] | None = None
        self._credentials: dict[Connection, None] = {}
        self._asking: asyncio.Task[None] | None = None

    async def everything(self) -> None:
        """Trust nothing that is remembered, and read what streams have grown. Raises StoreUnavailable."""
        gateway = self._gateway
        gateway.access.forget_all()
        gateway.services.apps.forget_all()
        gateway.services.auth.forget_all()
        gateway.hub.doubt()
        for connection in list(gateway.connections):
            connection.access_changed()
        gateway.hub.recheck(await gateway.sync.grown(gateway.hub.heads(list(gateway.hub.streams))))

    # ------------------------------------------------------------ memberships

    def about_memberships(self, subscriber: Subscriber) -> None:
        """What we know of the user's memberships may be wrong."""
        # What is remembered of their access may be from before what we have not heard of.
        self._gateway.access.forget_user(subscriber.app, subscriber.user)
        # Nobody may be here now: who comes next reads their memberships anew.
        subscriber.known = False
        if subscriber.peers and not self._gateway.draining:
            self._memberships[subscriber] = None
            if self._reading is None or self._reading.done():
                self._reading = self._gateway.tasks.spawn(self._read_memberships(), "reconcile memberships")

    async def _read_memberships(self) -> None:
        while self._memberships:
            subscriber = next(iter(self._memberships))
            del self._memberships[subscriber]
            actor = next((peer.actor for peer in subscriber.peers if isinstance(peer, Connection) and peer.actor), None)
            if actor is None:
                continue
            try:
                await self._gateway.load(subscriber, actor, heard=True)
            except StoreUnavailable:
                self._memberships[subscriber] = None
                await asyncio.sleep(RETRY_SECONDS)

    # ------------------------------------------------------------ credentials

    def about_credentials(self, connection: Connection) -> None:
        """See whether the connection's credentials still count; those who have collected are asked for together."""
        if connection.session.state is State.OPEN:
            self._credentials[connection] = None
            if self._asking is None or self._asking.done():
                self._asking = self._gateway.tasks.spawn(self._check_credentials(), "recheck credentials")

    async def _check_credentials(self) -> None:
        gateway = self._gateway
        while self._credentials:
            some = list(islice(self._credentials, RECHECK_BATCH))
            for connection in some:
                del self._credentials[connection]
            asked = [
                (connection, connection.granted)
                for connection in some
                if connection.granted is not None and not connection.ended
            ]
            try:
                found = await gateway.services.auth.recheck_all([granted for _, granted in asked])
            except StoreUnavailable:
                self._credentials |= dict.fromkeys(some)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            for (connection, granted), fresh in zip(asked, found, strict=True):
                if isinstance(fresh, Refusal):
                    # A token that came meanwhile was looked at when it came.
                    if connection.granted is granted:
                        connection.close(fresh)
                    continue
                if connection.granted is granted:
                    connection.granted, connection.actor = fresh, fresh.actor
                if fresh.actor.app.blind_roles or connection.guarded:
                    connection.guarded = fresh.actor.app.blind_roles
                    gateway.hub.guard(connection, list(connection.streams))
            # Frames and other connections get their turn.
            await asyncio.sleep(0)
