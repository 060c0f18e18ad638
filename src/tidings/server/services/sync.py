"""Catching up: what moved, and what exactly is missing.

The client names a conservative point in time (`mark`); the server answers with the streams that moved since; the
client compares them with its own positions, exactly, by `seq`. The cost follows what moved.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from tidings.server.bus.base import Bus, Notice, Published
from tidings.server.clock import Clock
from tidings.server.crypto.keyring import Keyring, StreamCipher, WrappedStreamKey
from tidings.server.domain.permissions import Permission
from tidings.server.errors import NotFound, Refusal, StoreUnavailable
from tidings.server.store import log
from tidings.server.store.base import BACKEND, Row, Stale, Store, Tx
from tidings.wire import limits
from tidings.wire.commands import Position
from tidings.wire.resources import Head

from .access import ATTEMPTS_MAX, AccessService, Actor
from .apps import AppContext
from .counting import unread_of
from .rendering import render_logged, render_tombstone

# How far a mark lies before the moment it was made, ms. It covers the time between a commit and its announcement
# and the steps of a wall clock; what it repeats is compared by seq and costs nothing.
MARK_MARGIN_MS: Final = 10_000
OWN_STREAM: Final = "@me"
# Up to so many streams of a user are read on the event loop: 1 µs each, when another thread costs 60 µs to ask.
FEW_STREAMS: Final = 64
# Up to so many of an app's streams that moved are looked at there, 0.3 µs each, and so many heads counted, 25 µs each.
FEW_MOVED: Final = 500
FEW_HEADS: Final = 8
_EVERYTHING: Final = 2**63 - 1
# Streams' numbers have 63 bits: a cursor beyond them was not made here.
_SID_MAX: Final = 2**63 - 1
# Users' own streams kept open in memory.
OWN_STREAMS_MAX: Final = 20_000
# Long polls at a time. A browser opens six connections to a host at most; the rest is for a user's other devices.
POLLS_PER_USER_MAX: Final = 12
# Of an API key that asks for itself: a backend that follows its rooms one by one.
POLLS_PER_KEY_MAX: Final = 1_000
# Of everybody: each holds a connection, of which there are about as many.
POLLS_MAX: Final = 20_000
# Streams that they wait for, together. 250 bytes each: 125 MB at most. A user with 8,000 channels needs 8,000 of them
# per poll, and gets no more than a fifth of all.
POLLED_STREAMS_MAX: Final = 500_000
# When to try again, ms: a poll waits up to 25 s, so some end in every second.
POLLS_RETRY_MS: Final = 2_000


# A stream that a user may listen to, as a snapshot saw it: sid, name, epoch, head. A tuple: some users have thousands.
Membership: TypeAlias = tuple[int, str, str, int]


@dataclass(slots=True, frozen=True)
class Moved:
    """What moved since a mark: `at` all of it, sid to head; `heads` the first page with counts, `more` the cursor of
    the next one. `own_head`: where the user's own stream stands in the same snapshot, moved or not."""

    heads: list[Head]
    at: dict[int, int]
    more: str | None
    own_head: int


@dataclass(slots=True, frozen=True)
class StreamHandle:
    """A stream that the actor may read: everything after `floor`, under the access version of a channel."""

    app: int
    sid: int
    name: str
    epoch: str
    floor: int
    cipher: StreamCipher
    access_version: int | None = None


@dataclass(slots=True, frozen=True)
class EventPage:
    """Events as they go over the wire, with their seqs, and where the stream stood in the same snapshot."""

    events: list[tuple[int, bytes]]
    epoch: str
    head: int


def make_mark(now_ms: int) -> str:
    """The mark of a moment."""
    return f"{max(0, now_ms - MARK_MARGIN_MS):x}"


def read_mark(mark: str) -> int:
    """The moment of a mark, ms. Raises Refusal."""
    try:
        # Marks of `GET /v1/sync` also carry what was told.
        moment = mark.partition(".")[0]
        # int() would take signs, blanks and underscores, too. Thirteen digits last until the year 144683.
        if not 1 <= len(moment) <= 13 or not all(digit in "0123456789abcdef" for digit in moment):
            raise ValueError
        return int(moment, 16)
    except ValueError:
        raise Refusal("cursor_invalid", "`since` is not a mark of this server.", field="since") from None


def check_position(handle: StreamHandle, head: int, position: Position) -> Refusal | None:
    """Why a client cannot go on from `position`, None if it can."""
    if position.epoch is not None and position.epoch != handle.epoch:
        return Refusal("epoch_changed", "The stream's history was replaced: start over.", field="epoch")
    if position.seq > head:
        return Refusal("position_ahead", f"The stream ends at {head}.", field="seq", bound=head)
    if position.seq < handle.floor:
        return Refusal(
            "cursor_expired", f"Events up to {handle.floor} are gone or not yours.", field="seq", bound=handle.floor
        )
    return None


class Sync:
    """Heads, positions and events of streams."""

    def __init__(self, store: Store, access: AccessService, keyring: Keyring, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._access = access
        self._keyring = keyring
        self._clock = clock
        self._own: OrderedDict[tuple[int, str], StreamHandle] = OrderedDict()
        self._bus = bus
        self._waiters: dict[int, set[asyncio.Event]] = {}
        # Where streams that are waited for stood when they were last compared with the store.
        self._polled: dict[int, int] = {}
        # Long polls that wait at the moment, altogether and by who waits.
        self.polls = 0
        self._polls_of: dict[tuple[int, str], int] = {}
        self._registered = 0
        bus.listen(self._notice, Published)

    # ------------------------------------------------------------ heads

    def mark(self) -> str:
        """A mark for this moment."""
        return make_mark(self._clock.now_ms())

    async def memberships(self, actor: Actor) -> list[Membership]:
        """Everything that a user may listen to, their own stream included, in one snapshot."""
        app, user = actor.app.app, actor.user

        async def unit(tx: Tx, bound: int = _EVERYTHING) -> list[Row]:
            rows = await tx.all(
                "SELECT m.sid, s.ref, s.epoch, s.head FROM members m JOIN streams s ON s.sid=m.sid"
                " WHERE m.app=? AND m.user=? LIMIT ?",
                app,
                user,
                bound,
            )
            own = await tx.one("SELECT sid, epoch, head FROM streams WHERE app=? AND kind='user' AND ref=?", app, user)
            if own is not None:
                rows.append((own[0], OWN_STREAM, own[1], own[2]))
            return rows

        # Most users have few channels: those are read at once.
        rows = await self._store.glance(lambda tx: unit(tx, FEW_STREAMS + 1))
        return rows if len(rows) <= FEW_STREAMS else await self._store.read(unit)

    async def joined_at(self, app: int, user: str, sids: list[int]) -> dict[int, int]:
        """Where channels stood when the user joined them, of those that they are a member of."""

        async def unit(tx: Tx) -> dict[int, int]:
            found: dict[int, int] = {}
            for start in range(0, len(sids), 500):
                chunk = sids[start : start + 500]
                for sid, seq in await tx.all(
                    "SELECT m.sid, m.joined_seq FROM members m WHERE m.app=? AND m.user=?"
                    f" AND m.sid IN ({log.placeholders(chunk)})",
                    app,
                    user,
                    *chunk,
                ):
                    found[sid] = seq
            return found

        return await self._store.read(unit) if sids else {}

    async def moved(self, actor: Actor, since_ms: int, mark: str, streams: int) -> Moved:
        """What of a user's streams, about `streams` in number, has moved since the moment of a mark, in one snapshot.

        At most `SYNC_STREAMS_MAX` channels are looked into; `heads` with the same mark and the cursor `more` has the
        others. `mark` is the one to give out for this moment.
        """
        app, user = actor.app.app, actor.user or ""

        async def unit(tx: Tx, *, few: bool = False) -> Moved | None:
            rows = await self._moved_channels(tx, app, user, since_ms, streams, FEW_MOVED if few else streams)
            if rows is None or (few and len(rows) > FEW_HEADS):
                return None
            own = await tx.one(
                "SELECT sid, epoch, head, moved_at FROM streams WHERE app=? AND kind='user' AND ref=?", app, user
            )
            heads: list[Head] = []
            at = {sid: head for sid, _, _, head in rows}
            if own is not None and own[3] >= since_ms:
                heads.append(Head(stream=OWN_STREAM, epoch=own[1], head=own[2]))
                at[own[0]] = own[2]
            shown = rows[: limits.SYNC_STREAMS_MAX - len(heads)]
            for sid, ref, epoch, head in shown:
                heads.append(await self._head(tx, app, user, sid, ref, epoch, head))
            more = f"{_base36(shown[-1][0])}.{mark}" if len(rows) > len(shown) else None
            return Moved(heads, at, more, 0 if own is None else own[2])

        # Mostly there is little to look at: then at once.
        found = await self._store.glance(lambda tx: unit(tx, few=True)) or await self._store.read(unit)
        assert found is not None, "only a glance may find too much"
        return found

    @staticmethod
    async def _moved_channels(tx: Tx, app: int, user: str, since_ms: int, streams: int, bound: int) -> list[Row] | None:
        """(sid, name, epoch, head) of the user's channels that moved, by sid: the order of `heads`, whose cursor names
        the last one. It costs what moved in the app, or a look at each of the user's channels, whichever is less; None
        if both are more than `bound`."""
        if streams > FEW_STREAMS:
            # A stream of the app that moved costs about as much to look at as one of the user's that did not.
            moved = await tx.one(
                "SELECT count(*) FROM (SELECT 1 FROM streams WHERE app=? AND moved_at>=? LIMIT ?) v",
                app,
                since_ms,
                min(streams, bound),
            )
            few = moved is not None and moved[0] < min(streams, bound)
            if not few and bound < streams:
                return None
            if few:
                # Databases keep to the order of a CROSS JOIN, or know better.
                rows = await tx.all(
                    "SELECT s.sid, s.ref, s.epoch, s.head FROM streams s CROSS JOIN members m"
                    " WHERE s.app=? AND s.moved_at>=? AND m.app=s.app AND m.sid=s.sid AND m.user=?",
                    app,
                    since_ms,
                    user,
                )
                rows += await tx.all(
                    "SELECT s.sid, s.ref, s.epoch, s.head FROM members m CROSS JOIN streams s"
                    " WHERE m.app=? AND m.user=? AND m.moved_at>=? AND s.sid=m.sid",
                    app,
                    user,
                    since_ms,
                )
                return sorted(set(rows))
        return await tx.all(
            "SELECT m.sid, s.ref, s.epoch, s.head FROM members m JOIN streams s ON s.sid=m.sid"
            " WHERE m.app=? AND m.user=? AND (s.moved_at>=? OR m.moved_at>=?) ORDER BY m.sid",
            app,
            user,
            since_ms,
            since_ms,
        )

    async def heads(
        self, actor: Actor, since: str | None, cursor: str | None, limit: int
    ) -> tuple[list[Head], str | None, str]:
        """Streams that moved since a mark (all of them without one), by page: heads, next cursor, new mark."""
        mark = self.mark()
        since_ms = 0 if since is None else read_mark(since)
        after = 0
        if cursor is not None:
            try:
                after_text, _, mark = cursor.partition(".")
                after = int(after_text, 36)
                if not 0 <= after <= _SID_MAX:
                    raise ValueError
                read_mark(mark)
            except (ValueError, Refusal):
                raise Refusal("cursor_invalid", "This cursor was not given out here.", field="cursor") from None
        app, user = actor.app.app, actor.user or ""

        async def unit(tx: Tx) -> tuple[list[Head], str | None]:
            found: list[Head] = []
            if after == 0:
                own = await tx.one(
                    "SELECT epoch, head FROM streams WHERE app=? AND kind='user' AND ref=? AND moved_at>=?",
                    app,
                    user,
                    since_ms,
                )
                if own is not None:
                    found.append(Head(stream=OWN_STREAM, epoch=own[0], head=own[1]))
            rows = await tx.all(
                "SELECT m.sid, s.ref, s.epoch, s.head FROM members m JOIN streams s ON s.sid=m.sid"
                " WHERE m.app=? AND m.user=? AND m.sid>? AND (s.moved_at>=? OR m.moved_at>=?)"
                " ORDER BY m.sid LIMIT ?",
                app,
                user,
                after,
                since_ms,
                since_ms,
                limit + 1,
            )
            for sid, ref, epoch, head in rows[:limit]:
                found.append(await self._head(tx, app, user, sid, ref, epoch, head))
            more = f"{_base36(rows[limit - 1][0])}.{mark}" if len(rows) > limit else None
            return found, more

        moved, more = await self._store.read(unit)
        return moved, more, mark

    @staticmethod
    async def _head(tx: Tx, app: int, user: str, sid: int, ref: str, epoch: str, head: int) -> Head:
        counts = await unread_of(tx, app, sid, user)
        if counts is None:
            return Head(stream=ref, epoch=epoch, head=head)
        return Head(
            stream=ref,
            epoch=epoch,
            head=head,
            read=counts.read,
            delivered=counts.delivered,
            unread=counts.unread,
            mentions=counts.mentions,
        )

    async def heads_of(self, sids: list[int]) -> dict[int, int]:
        """Where streams stand now, by number."""

        async def unit(tx: Tx) -> dict[int, int]:
            found: dict[int, int] = {}
            for start in range(0, len(sids), 500):
                chunk = sids[start : start + 500]
                for sid, head in await tx.all(
                    f"SELECT sid, head FROM streams WHERE sid IN ({log.placeholders(chunk)})",
                    *chunk,
                ):
                    found[sid] = head
            return found

        return await self._store.read(unit)

    async def grown(self, heads: dict[int, int]) -> dict[int, int]:
        """Those of the streams that are further now than these heads, by number, and where they stand."""

        async def unit(tx: Tx) -> dict[int, int]:
            return await log.grown(tx, heads)

        return await self._store.read(unit)

    # ------------------------------------------------------------ events

    async def handle(self, actor: Actor, name: str) -> StreamHandle:
        """A stream by its public name, through the actor. Raises NotFound, Forbidden."""
        if name == OWN_STREAM:
            return await self._own_handle(actor.app, actor.user)
        access = await self._access.channel(actor, name, Permission.CHANNEL_READ)
        channel = access.channel
        return StreamHandle(
            channel.app,
            channel.sid,
            channel.id,
            channel.epoch,
            access.floor,
            channel.cipher,
            channel.access_version,
        )

    async def read(self, handle: StreamHandle, after: int, limit: int) -> EventPage:
        """Events after a seq, in order, at most `limit`; tombstones where messages were deleted since.

        Raises Stale when who may do what in the channel has changed since the handle was given: ask for it again.
        """

        async def unit(tx: Tx) -> EventPage:
            stream = await tx.one("SELECT epoch, head, access_version FROM streams WHERE sid=?", handle.sid)
            if stream is None:
                raise NotFound("stream", field="stream")
            if handle.access_version is not None and stream[2] != handle.access_version:
                raise Stale
            rows = await log.events_after(tx, handle.app, handle.sid, max(after, handle.floor), limit)
            events = []
            for row in rows:
                tombstone = None
                if row.redacted:
                    tombstone = await _tombstone(tx, handle, row.ref)
                events.append((row.seq, render_logged(handle.name, row, handle.cipher, tombstone, handle.floor)))
            return EventPage(events, stream[0], stream[1])

        try:
            return await self._store.read(unit)
        except Stale:
            if handle.access_version is not None:
                self._access.forget_overtaken(handle.app, handle.name, handle.access_version)
            raise

    async def events(self, actor: Actor, name: str, after: int, epoch: str | None, limit: int) -> EventPage:
        """A page of a stream for plain polling. Raises Refusal when the position does not fit."""
        for _ in range(ATTEMPTS_MAX):
            handle = await self.handle(actor, name)
            try:
                page = await self.read(handle, after, limit)
            except Stale:
                continue
            refusal = check_position(handle, page.head, Position(after, epoch))
            if refusal is not None:
                raise refusal
            return page
        raise StoreUnavailable("the channel's members change too fast")

    @contextmanager
    def waiting(self, actor: Actor, sids: Collection[int]) -> Iterator[asyncio.Event]:
        """An event that is set as soon as one of the streams is announced to have grown. Enter it before reading what
        there is. Raises Refusal `rate_limited` when there are too many: of this user's, or altogether."""
        who = (actor.app.app, actor.user or actor.via)
        bound = POLLS_PER_USER_MAX if actor.user is not None else POLLS_PER_KEY_MAX
        own = self._polls_of.get(who, 0)
        if own >= bound:
            raise Refusal(
                "rate_limited", f"At most {bound} long polls at a time.", bound=bound, retry_after_ms=POLLS_RETRY_MS
            )
        if self.polls >= POLLS_MAX or self._registered + len(sids) > POLLED_STREAMS_MAX:
            raise Refusal("rate_limited", "Too many long polls on this server.", retry_after_ms=POLLS_RETRY_MS)
        growth = asyncio.Event()
        self.polls += 1
        self._polls_of[who] = own + 1
        self._registered += len(sids)
        for sid in sids:
            waiting = self._waiters.get(sid)
            if waiting is None:
                waiting = self._waiters[sid] = set()
                self._bus.follow(sid)
            waiting.add(growth)
        try:
            yield growth
        finally:
            self.polls -= 1
            self._registered -= len(sids)
            if left := self._polls_of[who] - 1:
                self._polls_of[who] = left
            else:
                del self._polls_of[who]
            for sid in sids:
                waiting = self._waiters[sid]
                waiting.discard(growth)
                if not waiting:
                    del self._waiters[sid]
                    self._polled.pop(sid, None)
                    self._bus.unfollow(sid)

    async def in_place(self) -> None:
        """What is waited for is heard from now on: what has not been, has been committed."""
        if self._bus.node:
            await self._bus.settle()

    @property
    def polled(self) -> list[int]:
        """Streams that long polls wait for."""
        return list(self._waiters)

    def compare_polled(self, heads: dict[int, int]) -> None:
        """Compare with what the store says: wake who waits for a stream that has grown since the last comparison, or
        that has not been compared before."""
        for sid, head in heads.items():
            if sid in self._waiters and self._polled.get(sid) != head:
                self._polled[sid] = head
                self._wake(sid)

    def _wake(self, sid: int) -> None:
        for growth in self._waiters.get(sid, ()):
            growth.set()

    def wake_all(self) -> None:
        """Answer every long poll: the server is draining."""
        for sid in list(self._waiters):
            self._wake(sid)

    def _notice(self, notice: Notice) -> None:
        if self._waiters and type(notice) is Published:
            self._wake(notice.sid)

    # ------------------------------------------------------------ own streams

    async def _own_handle(self, app: AppContext, user: str | None) -> StreamHandle:
        if user is None:
            raise NotFound("stream", field="stream")
        key = (app.app, user)
        handle = self._own.get(key)
        if handle is not None:
            return handle

        async def unit(tx: Tx) -> log.StreamRow | None:
            return await log.stream_of(tx, app.app, "user", user)

        row = await self._store.read(unit)
        if row is None:
            raise NotFound("stream", field="stream")
        wrapped = WrappedStreamKey(
            version=row.key_version, app_key_version=row.key_app_version, wrapped=row.key_wrapped
        )
        cipher = await self._access.cipher(app, row.sid, wrapped)
        handle = StreamHandle(app.app, row.sid, OWN_STREAM, row.epoch, row.floor, cipher)
        self._own[key] = handle
        if len(self._own) > OWN_STREAMS_MAX:
            self._own.popitem(last=False)
        return handle

    def forget(self, app: int, user: str) -> None:
        """The user's stream is gone."""
        self._own.pop((app, user), None)


async def _tombstone(tx: Tx, handle: StreamHandle, message_id: str | None) -> bytes:
    row = await tx.one(
        "SELECT id,seq,sender,at,deleted_at,deleted_by,reply_to FROM messages WHERE app=? AND sid=? AND id=?",
        handle.app,
        handle.sid,
        message_id,
    )
    if row is None or row[4] is None:
        return b"{}"
    sender = None if row[2] == BACKEND else row[2]
    return render_tombstone(handle.name, row[0], row[1], sender, row[3], row[4], row[5], row[6])


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while number:
        number, digit = divmod(number, 36)
        text = digits[digit] + text
    return text or "0"
