"""Changes: units of writes whose announcements leave with the commit.

A unit records events inside its transaction and returns them as notices; they go to the bus after the commit, in the
order of the commits, before the caller hears of it. So whoever was told that something is done can rely on it: a member
who was removed gets nothing more, a channel that was joined is live.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from tidings.server.bus.base import AccessChanged, Bus, Left, Notice, Published, Revoked
from tidings.server.crypto.keyring import StreamCipher
from tidings.server.store import log
from tidings.server.store.base import Store, Tx
from tidings.wire.codec import encode

from .rendering import render_event

T = TypeVar("T")

# Notices without which a node would go on letting somebody see what is not theirs any more.
_DECIDES: Final = (AccessChanged, Left, Revoked)


@dataclass(slots=True, frozen=True)
class Change(Generic[T]):
    """What a unit did: its result, and what to announce once it is committed."""

    value: T
    notices: tuple[Notice, ...] = ()


class Changes:
    """Runs units that change something and announces them."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self._store = store
        self._bus = bus

    async def run(self, unit: Callable[[Tx], Awaitable[Change[T]]]) -> T:
        """Commit the unit, announce it, give back its value. Raises what the unit raises; nothing is stored then.

        What decides who may see what is told to the other nodes before this returns, through the store if the bus is
        away. Raises StoreUnavailable if that cannot be done: then it is stored, and may safely be done again.
        """
        change = await self._store.run(unit, self._announce)
        if not self._bus.connected and any(isinstance(notice, _DECIDES) for notice in change.notices):
            await self._store.run(log.count_generation)
        return change.value

    def _announce(self, change: Change[Any]) -> None:
        for notice in change.notices:
            self._bus.publish(notice)


async def record(
    tx: Tx,
    *,
    app: int,
    sid: int,
    stream: str,
    cipher: StreamCipher,
    type: str,
    at: int,
    by: str | None,
    ref: str | None,
    item: str,
    data: Any,
    now: int | None = None,
) -> Published:
    """Append an event to a stream inside a unit, sealed, and give back its announcement.

    `item` names the row for its associated data and must be unique in the stream; `data` is a struct of
    `tidings.wire.events`, or its encoding. `now` (ms) is the present where `at` is an earlier moment.
    """
    encoded = data if isinstance(data, bytes) else encode(data)
    seq = await log.append_event(
        tx,
        app=app,
        sid=sid,
        type=type,
        at=at,
        now=at if now is None else now,
        by=by,
        ref=ref,
        item=item,
        sealed=cipher.seal(encoded, item.encode()),
    )
    return Published(sid, seq, render_event(type, stream, seq, at, by, encoded))


async def record_many(
    tx: Tx,
    *,
    app: int,
    sid: int,
    stream: str,
    cipher: StreamCipher,
    type: str,
    at: int,
    by: str | None,
    events: Sequence[tuple[str | None, str, Any]],
) -> list[Published]:
    """As `record`, for events that follow one another on a stream: what they refer to, their items, their data."""
    encoded = [(ref, item, encode(data)) for ref, item, data in events]
    sealed = [(ref, item, cipher.seal(data, item.encode())) for ref, item, data in encoded]
    first = await log.append_events(tx, app=app, sid=sid, type=type, at=at, by=by, events=sealed)
    return [
        Published(sid, seq, render_event(type, stream, seq, at, by, data))
        for seq, (_, _, data) in enumerate(encoded, first)
    ]
