"""Making streams, and the streams that belong to users."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tidings.server.bus.base import Published
from tidings.server.clock import Ids
from tidings.server.crypto.base import AppKeyNotLoaded
from tidings.server.crypto.keyring import Keyring, StreamCipher, WrappedStreamKey
from tidings.server.store import log
from tidings.server.store.base import Tx, new_sid
from tidings.wire.codec import encode
from tidings.wire.events import EventType

from .apps import AppContext, Apps
from .change import record
from .rendering import render_event

T = TypeVar("T")

# A user's own stream, as they and their devices call it.
OWN_STREAM: Final = "@me"
# An epoch is compared, never computed with: 40 random bits tell any two apart that a stream will ever have.
_EPOCH_BYTES: Final = 5


# Draws of a stream's number before giving up. Its random part has 21 bits: of a hundred streams made in one
# millisecond, two draw the same once in 400 times; eight times in a row is a broken source of randomness.
_DRAWS_MAX: Final = 8


class SidTaken(Exception):
    """Another stream has this number: draw again."""


@dataclass(slots=True, frozen=True)
class NewStream:
    """A stream about to be made."""

    sid: int
    epoch: str
    key: WrappedStreamKey
    cipher: StreamCipher


@dataclass(slots=True, frozen=True)
class UserStream:
    """A user's own stream, open for appending."""

    user: str
    sid: int
    cipher: StreamCipher


def new_epoch(ids: Ids) -> str:
    """Eight characters (a-z, 2-7) that name one history of a stream."""
    return base64.b32encode(ids.random_bytes(_EPOCH_BYTES)).decode().lower()


def new_stream(keyring: Keyring, app: AppContext, ids: Ids, now_ms: int) -> NewStream:
    """Number, epoch and key of a stream that a unit will insert."""
    sid = new_sid(now_ms, int.from_bytes(ids.random_bytes(4)))
    key = keyring.new_stream_key(app.id, str(sid))
    return NewStream(sid, new_epoch(ids), key, keyring.cipher(app.id, str(sid), key))


async def insert_new(tx: Tx, app: AppContext, stream: NewStream, kind: str, ref: str, at: int) -> None:
    """Insert a stream's row. Raises SidTaken: two streams made in one millisecond drew the same number."""
    if await tx.one("SELECT 1 FROM streams WHERE sid=?", stream.sid) is not None:
        raise SidTaken
    await log.insert_stream(
        tx,
        sid=stream.sid,
        app=app.app,
        kind=kind,
        ref=ref,
        epoch=stream.epoch,
        at=at,
        key_wrapped=stream.key.wrapped,
        key_version=stream.key.version,
        key_app_version=stream.key.app_key_version,
    )


async def shred(tx: Tx, sid: int) -> None:
    """Destroy a stream's key: nothing of its history can be read again."""
    await tx.execute("UPDATE streams SET key_wrapped=? WHERE sid=?", b"", sid)


async def user_streams(tx: Tx, keyring: Keyring, app: AppContext, users: Iterable[str]) -> list[UserStream]:
    """The own streams of users, ordered by user so that units lock them in one order; without the deleted ones."""
    wanted = list(users)
    found: list[UserStream] = []
    for start in range(0, len(wanted), 200):
        chunk = wanted[start : start + 200]
        rows = await tx.all(
            "SELECT ref, sid, key_wrapped, key_version, key_app_version FROM streams"
            f" WHERE app=? AND kind='user' AND ref IN ({log.placeholders(chunk)})",
            app.app,
            *chunk,
        )
        for user, sid, wrapped, version, app_version in rows:
            if wrapped:
                key = WrappedStreamKey(version=version, app_key_version=app_version, wrapped=wrapped)
                found.append(UserStream(user, sid, keyring.cipher(app.id, str(sid), key)))
    found.sort(key=lambda stream: stream.user)
    return found


async def record_own(
    tx: Tx,
    app: AppContext,
    stream: UserStream,
    *,
    type: EventType,
    at: int,
    by: str | None,
    ref: str,
    mark: str,
    data: Any,
    now: int | None = None,
) -> Published:
    """Append an event to a user's own stream. `mark` is unique to the unit and to the event within it."""
    return await record(
        tx,
        app=app.app,
        sid=stream.sid,
        stream=OWN_STREAM,
        cipher=stream.cipher,
        type=type.value,
        at=at,
        by=by,
        ref=ref,
        item=mark,
        data=data,
        now=now,
    )


async def record_each(
    tx: Tx,
    app: AppContext,
    streams: list[UserStream],
    *,
    type: EventType,
    at: int,
    by: str | None,
    ref: str,
    mark: str,
    data: Callable[[UserStream], Any],
    now: int | None = None,
) -> list[Published]:
    """As `record_own`, for the own streams of many users, in the order given."""
    encoded = {stream.sid: encode(data(stream)) for stream in streams}
    item = mark.encode()
    seqs = await log.append_to_each(
        tx,
        app=app.app,
        type=type.value,
        at=at,
        now=at if now is None else now,
        by=by,
        ref=ref,
        item=mark,
        sealed={stream.sid: stream.cipher.seal(encoded[stream.sid], item) for stream in streams},
    )
    return [
        Published(sid, seqs[sid], render_event(type.value, OWN_STREAM, seqs[sid], at, by, body))
        for sid, body in encoded.items()
    ]


async def with_keys(
    apps: Apps, app: AppContext, act: Callable[[], Awaitable[T]], *, renew: Callable[[], None] | None = None
) -> T:
    """Run something that opens streams; once more after reading the app's keys if another process has rotated them.

    `renew` draws new numbers for the streams that `act` makes, when one of them was taken.
    """
    draws = 0
    reread = False
    while True:
        try:
            return await act()
        except AppKeyNotLoaded:
            if reread:
                raise
            reread = True
            apps.forget(app.app)
            await apps.get(app.id)
        except SidTaken:
            draws += 1
            if renew is None or draws == _DRAWS_MAX:
                raise
            renew()
