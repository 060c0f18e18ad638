"""Delivered and read positions: state of a membership, merged by maximum, never a log event.

`ack` (delivered) comes often and from every device: it is collected and written in one unit per tick. `read` decides
unread counts, so it is written at once and answered after the commit. Both are told to the channel in one signal per
tick.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import OrderedDict
from itertools import accumulate, islice
from typing import Final

from tidings.server.bus.base import Bus, Signal
from tidings.server.clock import Clock
from tidings.server.domain.permissions import Permission
from tidings.server.errors import NotFound, Refusal
from tidings.server.store.base import Row, Store, Tx
from tidings.server.store.log import placeholders
from tidings.server.telemetry import get_logger
from tidings.wire.codec import encode
from tidings.wire.commands import ReceiptsSignal, UnreadSignal
from tidings.wire.ids import time_of
from tidings.wire.limits import RECEIPTS_MEMBERS_MAX
from tidings.wire.resources import Receipt, ReceiptCounts, Unread, UnreadTotal

from .access import Access, AccessService, Actor, ChannelView
from .apps import CompiledType
from .clearing import put_clearing
from .counting import HIDDEN, MENTIONED, UNREAD, Counts, unread_of

log = get_logger(__name__)

# How long positions are collected before they are written and told, seconds: a human does not see ticks move faster.
TICK_SECONDS: Final = 0.25
# Positions waiting to be written; beyond it they are written at once. About 20 MB.
PENDING_MAX: Final = 100_000
# Positions written in one unit: over a network that is a quarter of a second, and so long their rows are locked.
UNIT_MAX: Final = 2_000
# Rows looked up by one statement: texts that stay prepared.
AT_ONCE: Final = 128
_KEY: Final = "(CAST(? AS BIGINT),CAST(? AS BIGINT),CAST(? AS TEXT))"
# How long the positions of a large channel count after they were looked through, seconds: for 100,000 members that
# takes a reader's thread a third of a second, which must not depend on how many ask.
COUNTED_SECONDS: Final = 10.0
# Large channels whose counts are kept: some 10 KB each, as members stand at few different positions.
COUNTED_MAX: Final = 256


def _are_told(type: CompiledType, member_count: int) -> bool:
    """Whether positions in such a channel are told to its members as they move."""
    return type.definition.features.receipts and member_count <= RECEIPTS_MEMBERS_MAX


class Standing:
    """How many members of a channel stand where, as of `at` (ms). Rows: position, members; from the least on."""

    def __init__(self, at: int, joined: list[Row], delivered: list[Row], read: list[Row]) -> None:
        self.at = at
        self._joined, self._delivered, self._read = _Reached(joined), _Reached(delivered), _Reached(read)

    def counts(self, seq: int, without: Row | None) -> tuple[int, int, int]:
        """Of those who joined before `seq`: how many there are, have it, and have read it; but for one, whose own
        (joined, delivered, read) are given. Who joined later begins beyond it with all three."""
        later = self._joined.at_least(seq)
        here = (
            self._joined.at_least(0) - later,
            self._delivered.at_least(seq) - later,
            self._read.at_least(seq) - later,
        )
        if without is None or without[0] >= seq:
            return here
        return here[0] - 1, max(0, here[1] - (without[1] >= seq)), max(0, here[2] - (without[2] >= seq))


class _Reached:
    """Answers how many stand at a position or beyond it."""

    def __init__(self, rows: list[Row]) -> None:
        self._positions = [int(row[0]) for row in rows]
        # How many stand at the n-th position or beyond, and 0 for nobody.
        self._beyond = list(accumulate((int(row[1]) for row in reversed(rows)), initial=0))[::-1]

    def at_least(self, position: int) -> int:
        return self._beyond[bisect_left(self._positions, position)]


class Receipts:
    """Positions of members and devices, and what is unread."""

    def __init__(self, store: Store, access: AccessService, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._access = access
        self._bus = bus
        self._clock = clock
        # (app, sid, user) -> seq delivered to any device; (app, user, device, sid) -> seq.
        self._delivered: dict[tuple[int, int, str], int] = {}
        self._devices: dict[tuple[int, str, str, int], int] = {}
        # sid -> user -> (delivered, read) to be told, with the channel's name and app.
        self._told: dict[int, dict[str, tuple[int, int]]] = {}
        self._names: dict[int, tuple[int, str]] = {}
        self._wake = asyncio.Event()
        # sid -> positions of a large channel. One is looked through at a time.
        self._counted: OrderedDict[int, Standing] = OrderedDict()
        self._counting = asyncio.Lock()

    # ------------------------------------------------------------ delivered

    def acknowledge(
        self, *, app: int, user: str, device: str, sid: int, channel: str, seq: int, tell: bool = True
    ) -> None:
        """A device has everything up to `seq`. Written within a tick; a crash before that only repeats a push.

        `tell` False for those who may not send receipts: their device's position is kept, the member's is not moved.
        Whether the channel's type shows receipts at all is looked up here.
        """
        if tell:
            key = (app, sid, user)
            if seq > self._delivered.get(key, 0):
                self._delivered[key] = seq
            self._names[sid] = (app, channel)
        device_key = (app, user, device, sid)
        if seq > self._devices.get(device_key, 0):
            self._devices[device_key] = seq
        if not self._wake.is_set():
            self._wake.set()

    async def run(self) -> None:
        """Write and tell, tick by tick, until cancelled; what is pending then is written."""
        try:
            while True:
                await self._wake.wait()
                if len(self._delivered) < PENDING_MAX:
                    await asyncio.sleep(TICK_SECONDS)
                self._wake.clear()
                try:
                    await self.flush()
                except Refusal as refusal:
                    log.warning("receipts_not_written", code=refusal.code)
                    self._wake.set()
        finally:
            try:
                await asyncio.shield(self.flush())
            except Refusal:
                pass

    async def flush(self) -> None:
        """Write what is pending and tell the channels. On failure it stays pending."""
        delivered, self._delivered = self._delivered, {}
        devices, self._devices = self._devices, {}
        try:
            while delivered or devices:
                some, some_devices = dict(islice(delivered.items(), UNIT_MAX)), dict(islice(devices.items(), UNIT_MAX))
                await self._write(some, some_devices)
                for key in some:
                    del delivered[key]
                for device_key in some_devices:
                    del devices[device_key]
        except Refusal:
            for key, seq in delivered.items():
                self._delivered[key] = max(seq, self._delivered.get(key, 0))
            for device_key, seq in devices.items():
                self._devices[device_key] = max(seq, self._devices.get(device_key, 0))
            raise
        finally:
            self._announce()

    async def _write(
        self, delivered: dict[tuple[int, int, str], int], devices: dict[tuple[int, str, str, int], int]
    ) -> None:
        """Write positions in one unit, and note what is to be told of them."""
        now = self._clock.now_ms()

        async def unit(tx: Tx) -> tuple[list[tuple[int, str, int, int]], dict[int, Row]]:
            # Another device of theirs may be further, and reading and sending move the position, too: what is told is
            # the row.
            found = await _lock_positions(tx, sorted(delivered))
            moved = [
                (sid, user, max(at, delivered[app, sid, user]), read) for (app, sid, user), (at, read) in found.items()
            ]
            await tx.many(
                "UPDATE members SET delivered=? WHERE app=? AND sid=? AND user=?",
                [(delivered[key], *key) for key, (at, _) in found.items() if at < delivered[key]],
            )
            await tx.many(
                "INSERT INTO device_positions(app,user,device,sid,seq,at) VALUES (?,?,?,?,?,?)"
                " ON CONFLICT (app,user,device,sid) DO UPDATE SET seq=excluded.seq, at=excluded.at"
                " WHERE device_positions.seq<excluded.seq",
                [(*key, seq, now) for key, seq in sorted(devices.items())],
            )
            return moved, await _channels_of(tx, sorted({sid for sid, *_ in moved}))

        moved, channels = await self._store.run(unit)
        shown = {
            sid
            for sid, (app, type, member_count) in channels.items()
            if _are_told(await self._access.type_of(app, type), member_count)
        }
        for sid, user, position, read in moved:
            if sid in shown:
                self._tell(sid, user, position, read)

    def _tell(self, sid: int, user: str, delivered: int, read: int) -> None:
        told = self._told.setdefault(sid, {})
        before = told.get(user, (0, 0))
        told[user] = (max(before[0], delivered), max(before[1], read))

    def _announce(self) -> None:
        told, self._told = self._told, {}
        names = self._names
        # What was acknowledged while this was being written is told next time, and needs its channel's name then.
        waiting = {sid for _, sid, _ in self._delivered}
        self._names = {sid: name for sid, name in names.items() if sid in waiting}
        for sid, users in told.items():
            app, channel = names[sid]
            receipts = [Receipt(user=user, delivered=seqs[0], read=seqs[1]) for user, seqs in users.items()]
            self._bus.publish(Signal(app, encode(ReceiptsSignal(channel=channel, receipts=receipts)), sid=sid))

    # ------------------------------------------------------------ read

    async def read(self, actor: Actor, channel_id: str, seq: int) -> Unread:
        """The user has read everything up to `seq`; clears a mark. The counts after it.

        Moving back is no error and changes nothing (G6). Raises Refusal `position_ahead` beyond the head.
        """
        access = await self._member(actor, channel_id)
        channel, now = access.channel, self._clock.now_ms()
        user = str(actor.user)

        async def unit(tx: Tx) -> Counts:
            head = await tx.one(
                "SELECT head FROM streams WHERE sid=?" + tx.for_update,
                channel.sid,
            )
            if head is None or seq > head[0]:
                raise Refusal(
                    "position_ahead",
                    f"The channel ends at {head[0] if head else 0}.",
                    field="seq",
                    bound=head[0] if head else 0,
                )
            counted = await tx.one(
                "SELECT counted FROM messages WHERE app=? AND sid=? AND seq<=? ORDER BY seq DESC LIMIT 1",
                channel.app,
                channel.sid,
                seq,
            )
            moved = await tx.execute(
                "UPDATE members SET read=?, read_counted=?, delivered=CASE WHEN delivered<? THEN ? ELSE delivered END,"
                " moved_at=? WHERE app=? AND sid=? AND user=? AND read<?",
                seq,
                counted[0] if counted else 0,
                seq,
                seq,
                now,
                channel.app,
                channel.sid,
                user,
                seq,
            )
            await tx.execute(
                "UPDATE members SET marked_from=NULL, moved_at=? WHERE app=? AND sid=? AND user=?"
                " AND marked_from IS NOT NULL",
                now,
                channel.app,
                channel.sid,
                user,
            )
            counts = await unread_of(tx, channel.app, channel.sid, user)
            if counts is None:
                raise NotFound("channel", field="channel")
            if moved:
                await put_clearing(tx, channel.app, channel.sid, user, now)
            return counts

        counts = await self._store.run(unit)
        if _are_told(channel.type, channel.member_count):
            self._names[channel.sid] = (channel.app, channel.id)
            self._tell(channel.sid, user, counts.delivered, counts.read)
            self._wake.set()
        return self._tell_own(actor, channel_id, counts)

    async def mark_unread(self, actor: Actor, channel_id: str, seq: int) -> Unread:
        """Count everything from `seq` on as unread until the channel is read again. Positions stay (G6).

        Marking only ever adds: what is unread stays so, also what stands before `seq`. The mark lies at the earlier of
        `seq` and where the unread begins, and never at what the member may not see.
        """
        access = await self._member(actor, channel_id)
        channel, now = access.channel, self._clock.now_ms()

        async def unit(tx: Tx) -> Counts:
            head = await tx.one("SELECT head FROM streams WHERE sid=?", channel.sid)
            if head is None or seq > head[0] or seq < 1:
                raise Refusal(
                    "position_ahead",
                    f"There is no event {seq} in the channel.",
                    field="seq",
                    bound=head[0] if head else 0,
                )
            member = await tx.one(
                "SELECT m.read, m.marked_from, m.joined_seq FROM members m WHERE m.app=? AND m.sid=? AND m.user=?"
                + tx.for_update,
                channel.app,
                channel.sid,
                actor.user,
            )
            if member is None:
                raise NotFound("channel", field="channel")
            position, marked, joined = member
            floor = max(channel.floor, joined) if channel.type.definition.history == "since_join" else channel.floor
            await tx.execute(
                "UPDATE members SET marked_from=?, moved_at=? WHERE app=? AND sid=? AND user=?",
                max(floor + 1, min(seq, position + 1 if marked is None else marked)),
                now,
                channel.app,
                channel.sid,
                actor.user,
            )
            counts = await unread_of(tx, channel.app, channel.sid, str(actor.user))
            if counts is None:
                raise NotFound("channel", field="channel")
            return counts

        return self._tell_own(actor, channel_id, await self._store.run(unit))

    async def _member(self, actor: Actor, channel_id: str) -> Access:
        access = await self._access.channel(actor, channel_id, Permission.RECEIPT_SEND)
        if actor.user is None or not access.member.is_member:
            raise Refusal("conflict", "Only members have a read position.", field="channel")
        return access

    def _tell_own(self, actor: Actor, channel_id: str, counts: Counts) -> Unread:
        self._bus.publish(
            Signal(
                actor.app.app,
                encode(
                    UnreadSignal(
                        channel=channel_id,
                        read=counts.read,
                        unread=counts.unread,
                        mentions=counts.mentions,
                        marked_unread_from=counts.marked_from,
                    )
                ),
                user=actor.user,
                skip_session=actor.session,
            )
        )
        return Unread(
            channel=channel_id,
            unread=counts.unread,
            mentions=counts.mentions,
            read=counts.read,
            marked_unread_from=counts.marked_from,
        )

    # ------------------------------------------------------------ reading positions

    async def list(
        self, actor: Actor, channel_id: str, *, limit: int, cursor: str | None = None
    ) -> tuple[list[Receipt], str | None]:
        """How far every member is, by user id, a page at a time. Raises Refusal `feature_off` where it is not shown."""
        access = await self._access.channel(actor, channel_id, Permission.MEMBER_READ)
        if not access.channel.type.definition.features.receipts:
            raise Refusal("feature_off", "Receipts are switched off in this type of channel.", field="channel")

        async def unit(tx: Tx) -> list[Receipt]:
            rows = await tx.all(
                "SELECT user, delivered, read FROM members WHERE app=? AND sid=? AND user>? ORDER BY user LIMIT ?",
                access.channel.app,
                access.channel.sid,
                cursor or "",
                limit + 1,
            )
            return [Receipt(user=user, delivered=delivered, read=read) for user, delivered, read in rows]

        found = await self._store.read(unit)
        return found[:limit], found[limit - 1].user if len(found) > limit else None

    async def of_message(self, actor: Actor, channel_id: str, message_id: str) -> ReceiptCounts:
        """How many members a message has reached, and how many have read it; its sender is not counted, nor who joined
        later.

        Exact in channels in which positions are told as they move; in larger ones as of `COUNTED_SECONDS` ago at most,
        so that asking costs the same however many members there are. Raises NotFound, Refusal `feature_off`.
        """

        async def unit(
            tx: Tx, access: Access, epoch: str, head: int
        ) -> tuple[Access, int, Row | None, Standing | None]:
            channel = access.channel
            if not channel.type.definition.features.receipts:
                raise Refusal("feature_off", "Receipts are switched off in this type of channel.", field="channel")
            found = await tx.one(
                "SELECT seq, sender FROM messages WHERE app=? AND id=? AND sid=?", channel.app, message_id, channel.sid
            )
            if found is None or found[0] <= access.floor:
                raise NotFound("message", field="message")
            sender = await tx.one(
                "SELECT joined_seq, delivered, read FROM members m WHERE m.app=? AND m.sid=? AND m.user=?",
                channel.app,
                channel.sid,
                found[1],
            )
            small = channel.member_count <= RECEIPTS_MEMBERS_MAX
            return access, found[0], sender, await _standing(tx, channel, self._clock.now_ms()) if small else None

        access, seq, sender, standing = await self._access.read(actor, channel_id, Permission.MEMBER_READ, unit)
        if standing is None:
            standing = await self._standing_of(access.channel)
        members, delivered, read = standing.counts(seq, sender)
        return ReceiptCounts(members=members, delivered=delivered, read=read, as_of=time_of(standing.at))

    async def _standing_of(self, channel: ChannelView) -> Standing:
        """The positions of a large channel, looked through now or a few seconds ago."""
        async with self._counting:
            known = self._counted.get(channel.sid)
            now = self._clock.now_ms()
            if known is not None and known.at <= now < known.at + COUNTED_SECONDS * 1000:
                return known

            async def unit(tx: Tx) -> Standing:
                return await _standing(tx, channel, now)

            found = self._counted[channel.sid] = await self._store.read(unit)
            self._counted.move_to_end(channel.sid)
            if len(self._counted) > COUNTED_MAX:
                self._counted.popitem(last=False)
            return found

    async def unread_total(self, actor: Actor, *, limit: int, cursor: str | None = None) -> UnreadTotal:
        """What is unread in channels that are not hidden, archived or muted: exact sums, and the channels by page."""
        if actor.user is None:
            raise Refusal("invalid_field", "Unread counts are a user's: name them with Tidings-User.", field="user")
        now, app, user = self._clock.now_ms(), actor.app.app, actor.user
        counted = (
            f"SELECT s.ref AS ref, {UNREAD} AS unread, {MENTIONED} AS mentions, m.read AS read, m.marked_from AS marked"
            " FROM members m JOIN streams s ON s.sid=m.sid WHERE m.app=? AND m.user=? AND m.archived=0"
            f" AND NOT {HIDDEN} AND (m.muted_until IS NULL OR m.muted_until<=?)"
            " AND (s.counted>m.read_counted OR m.marked_from IS NOT NULL OR s.head>m.read)"
        )

        async def unit(tx: Tx) -> UnreadTotal:
            total = await tx.one(
                "SELECT CAST(coalesce(sum(unread),0) AS BIGINT), CAST(coalesce(sum(mentions),0) AS BIGINT)"
                f" FROM ({counted}) q",
                app,
                user,
                now,
            )
            rows = await tx.all(
                f"SELECT ref, unread, mentions, read, marked FROM ({counted}) q"
                " WHERE (unread>0 OR mentions>0) AND ref>? ORDER BY ref LIMIT ?",
                app,
                user,
                now,
                cursor or "",
                limit + 1,
            )
            channels = [
                Unread(channel=ref, unread=unread, mentions=mentions, read=read, marked_unread_from=marked)
                for ref, unread, mentions, read, marked in rows
            ]
            more = channels[limit - 1].channel if len(channels) > limit else None
            return UnreadTotal(
                unread=total[0] if total else 0, mentions=total[1] if total else 0, channels=channels[:limit], next=more
            )

        return await self._store.read(unit)


async def _lock_positions(tx: Tx, keys: list[tuple[int, int, str]]) -> dict[tuple[int, int, str], tuple[int, int]]:
    """Where members (app, sid, user) stand: delivered and read. Their rows stay locked, in the order of the keys."""
    found: dict[tuple[int, int, str], tuple[int, int]] = {}
    for start in range(0, len(keys), AT_ONCE):
        chunk = keys[start : start + AT_ONCE]
        # Filled up to a power of two: the statement's texts stay few and prepared.
        chunk += [chunk[-1]] * ((1 << (len(chunk) - 1).bit_length()) - len(chunk))
        rows = await tx.all(
            f"WITH v(app,sid,name) AS (VALUES {','.join([_KEY] * len(chunk))})"
            " SELECT m.app, m.sid, m.user, m.delivered, m.read FROM v"
            " JOIN members m ON m.app=v.app AND m.sid=v.sid AND m.user=v.name ORDER BY m.app, m.sid, m.user"
            + tx.for_update,
            *(value for key in chunk for value in key),
        )
        for app, sid, user, delivered, read in rows:
            found[app, sid, user] = (delivered, read)
    return found


async def _channels_of(tx: Tx, sids: list[int]) -> dict[int, Row]:
    """App, type and number of members of the channels of these streams."""
    found: dict[int, Row] = {}
    for start in range(0, len(sids), AT_ONCE):
        chunk = sids[start : start + AT_ONCE]
        chunk += [chunk[-1]] * ((1 << (len(chunk) - 1).bit_length()) - len(chunk))
        rows = await tx.all(
            f"SELECT c.sid, c.app, c.type, c.member_count FROM channels c WHERE c.sid IN ({placeholders(chunk)})",
            *chunk,
        )
        for sid, *rest in rows:
            found[sid] = tuple(rest)
    return found


async def _standing(tx: Tx, channel: ChannelView, now: int) -> Standing:
    found = [
        await tx.all(
            f"SELECT m.{column}, count(*) FROM members m WHERE m.app=? AND m.sid=? GROUP BY m.{column}"
            f" ORDER BY m.{column}",
            channel.app,
            channel.sid,
        )
        for column in ("joined_seq", "delivered", "read")
    ]
    return Standing(now, *found)
