"""Catching up: which events come when, what is asked for again, and what is remembered of it.

`Following` compares what the server sends with what the device has, stream by stream, and hands each event once and in
order to the application's queues. A position moves when the application has taken the event, never before.

When the queues are full the connection is not read: TCP makes the server wait. That would keep a command waiting for
its reply, too, so while one waits the connection is read on, and what comes is kept. Beyond HOLD_BYTES the server is
asked to hold events back until there is room, and to go on with replies. So each event is received once.

The own stream has two readers: the application, like any other stream's, and the client itself, which learns from it
which channels were joined and left. Each has its own position, so the client goes on where nobody iterates the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from ..wire.commands import (
    Ack,
    Command,
    Connected,
    ErrorReply,
    Heads,
    HeadsReply,
    Hold,
    Position,
    Reply,
    Sync,
    Synced,
    Syncing,
)
from ..wire.problems import Retry
from ..wire.resources import Head
from .errors import TidingsError
from .events import ChannelJoined, ChannelLeft, Event, HistoryReset, Source
from .store import Saved, SavedStream, Store
from .streams import FRUITLESS_SYNCS_MAX, OWN_STREAM, Start, Stream, Streams, batches
from .subscriptions import HOLD_BYTES, KEPT_BYTES_MAX, Delivery, Events, Feed

log = logging.getLogger("tidings.client")

R = TypeVar("R", bound=Reply)

# Positions reach the disk this long after they moved: a crash repeats at most that much to the application.
SAVE_SECONDS = 0.1

# Under this name the store keeps how far the client itself has read the own stream.
_OWN_APPLIED: Final = "@me:client"
# The server does not have the history that our position is of: begin again.
_OTHER_HISTORY: Final = ("epoch_changed", "cursor_expired", "position_ahead")


class Wire(Protocol):
    """What following needs of a connection. Without one, `identified` and `opened` are false and nothing is sent."""

    # The server has said whose connection it is; what moved meanwhile has been compared, too.
    identified: bool
    opened: bool
    # Frames are left in the network for now.
    paused: bool
    # Length of the frame that is being handled.
    frame_bytes: int

    @property
    def waiting(self) -> bool:
        """Some command waits for its reply."""

    def transmit(self, command: Command, answer: Callable[[Reply | None], None] | None = None) -> int | None:
        """Send a command; its ref, None without a connection. `answer` is called once, with None if it is lost."""

    async def ask(self, command: Command, kind: type[R]) -> R:
        """Send a command and wait for its reply on this connection. Raises Refused, NotConnected, ProtocolError."""

    def answer(self, ref: int | None, reply: Reply) -> bool:
        """Give a reply to who waits for it; whether somebody did."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read on."""

    def abort(self, reason: str) -> None:
        """Drop the connection; another one follows."""

    def retry_bound(self) -> float:
        """The longest pause before a retry at present, seconds."""


class Following:
    """All streams of one client, and the queues that its application reads."""

    def __init__(
        self,
        wire: Wire,
        store: Store,
        *,
        start: Start,
        remembers: bool,
        auto_ack: bool,
        observe: Callable[[Event, Source], None] | None,
    ) -> None:
        self._wire = wire
        self._store = store
        self._remembers = remembers
        self._auto_ack = auto_ack
        self._observe = observe
        self.streams = Streams(start)
        self.feeds: list[Feed] = []
        self.closing = False
        self._ended = False
        self._error: TidingsError | None = None
        self._held: dict[str, Head] = {}
        self._own_synced = asyncio.Event()
        # What the client itself has of the own stream, and of which history; and that it must be asked for more of it.
        self._applied = 0
        self._applied_epoch: str | None = None
        self._own_due = False
        # The server holds events back until we have room.
        self._held_back = False
        # What is to be saved and acknowledged.
        self.mark: str | None = None
        self._mark_dirty = False
        self._dirty: dict[str, Stream] = {}
        self._save_handle: asyncio.TimerHandle | None = None
        self.unacked: dict[str, Stream] = {}

    def restore(self, saved: Saved) -> None:
        """Begin with what an earlier run of the program had."""
        self.mark = saved.mark
        applied: SavedStream | None = None
        for row in saved.streams:
            if row.name == _OWN_APPLIED:
                applied = row
                continue
            self.streams.adopt(row.name, row.epoch, row.seq).behind = row.open
            if row.name == OWN_STREAM and applied is None:
                applied = row
        own = self.streams.get(OWN_STREAM)
        if own is not None and applied is not None:
            self._applied, self._applied_epoch = applied.seq, applied.epoch
            if not self._feeds_of(own):
                own.received, own.epoch = applied.seq, applied.epoch

    def subscribe(self, only: frozenset[str] | None, limit: int) -> Events:
        """A new queue of at most `limit` events for all streams or for `only` these, and its iterator."""
        feed = Feed(only, limit)
        own = self.streams.get(OWN_STREAM)
        if own is not None and feed.wants(OWN_STREAM) and not self._feeds_of(own) and own.passed:
            # The client has read on alone: the application begins where the application was.
            own.rewind()
            self._touch(own)
        self.feeds.append(feed)
        if self._ended:
            feed.end(self._error)
        for stream in self.streams:
            stream.feeds = None
        # The other side calls back on a client that may be gone.
        iterator = Events(feed, taken=self._taken, given=self._observe, room=self._has_room, left=self._feed_left)
        self.resync()
        return iterator

    def lost(self) -> None:
        """The connection is gone: replays under way have ended."""
        self.streams.lost_connection()

    def forget_mark(self) -> None:
        """The server does not know the mark any more: the next connection compares all heads."""
        self.mark = None

    def end(self, error: TidingsError | None) -> None:
        """Nothing more will come: iterators end, or raise `error` when there is one."""
        self._ended, self._error = True, error
        for feed in self.feeds:
            feed.end(error)

    def begin(self) -> None:
        """A new connection is being made."""
        self._held = {}
        self._own_synced.clear()
        self._held_back = False

    async def catch_up(self, connected: Connected) -> None:
        """Learn what moved while there was no connection. Raises Refused, NotConnected, ProtocolError."""
        since, more = self.mark, connected.more
        while more is not None:
            page = await self._wire.ask(Heads(since=since, cursor=more), HeadsReply)
            self.note_moved(page.moved)
            more = page.more
        if since is None:
            await self._learn_heads()
        # The own stream first: it tells which channels were joined and left meanwhile.
        own = self.streams.get(OWN_STREAM)
        if own is not None and own.behind:
            self._own_due = True
            self.resync()
            while own.asked:
                self._own_synced.clear()
                await self._own_synced.wait()
        for name, head in self._held.items():
            if self.streams.get(name) is None:
                stream = self.streams.adopt_head(name, head.epoch, head.head)
                stream.behind = True
                self._touch(stream)
        self._held = {}

    # ------------------------------------------------------------ events

    def on_event(self, event: Any) -> None:
        """An event has come: new, repeated, or behind a gap."""
        name: str = event.stream
        seq: int = event.seq
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams.adopt_live(name, seq)
            if name == OWN_STREAM:
                self._applied = stream.received
            # Its epoch comes with the answer: without one, a restored backup could go unnoticed.
            self._wire.transmit(Sync(positions={name: Position(seq=stream.received)}))
        if name == OWN_STREAM:
            self._apply(event, stream)
        if seq != stream.received + 1:
            if stream.judge(seq) == "gap":
                stream.behind = True
                self._touch(stream)
                self.resync()
            return
        feeds = stream.feeds
        if feeds is None:
            feeds = self._feeds_of(stream)
        if not feeds:
            if name == OWN_STREAM:
                # The client has it; the application will be given it when it asks.
                stream.received = seq
                self._touch(stream)
            elif not stream.behind:
                stream.behind = True
                self._touch(stream)
            return
        for feed in feeds:
            if len(feed.queue) >= feed.limit and not self._may_keep(feed):
                # Let go, and the stream stands still. Asked for again, once, when there is room.
                stream.behind = True
                self._touch(stream)
                return
        stream.received = seq
        stream.fruitless = 0
        delivery = Delivery(stream, event, not stream.asked, self._wire.frame_bytes)
        for feed in feeds:
            last = feed.last
            if last.get(name, 0) < seq:
                last[name] = seq
                delivery.holders += 1
                feed.put(delivery)
        if not delivery.holders:
            self._move(stream, event)
        if self._remembers:
            # Open until it is taken: a mark that is saved meanwhile must not vouch for it.
            self._touch(stream)

    def _feeds_of(self, stream: Stream) -> tuple[Feed, ...]:
        """Who is offered the stream's events."""
        feeds = stream.feeds = tuple(feed for feed in self.feeds if feed.wants(stream.name))
        return feeds

    def _may_keep(self, feed: Feed) -> bool:
        """This queue is full: slow down what comes. Whether what has come already may be kept on top."""
        wire = self._wire
        if wire.opened and not wire.waiting:
            wire.pause()
        elif feed.size >= HOLD_BYTES and not self._held_back and wire.identified:
            self._hold_back(True)
        return feed.size < KEPT_BYTES_MAX

    def _hold_back(self, on: bool) -> None:
        self._held_back = on
        # Whether the first one is heard only decides how much has to be kept; without the second one nothing comes.
        self._wire.transmit(Hold(on=on), None if on else self._going_on)

    def _going_on(self, reply: Reply | None) -> None:
        # A server that does not know the command has not held anything back.
        if isinstance(reply, ErrorReply) and reply.retry == Retry.LATER:
            delay = max(self._wire.retry_bound(), (reply.retry_after_ms or 0) / 1000)
            asyncio.get_running_loop().call_later(delay, self._go_on)

    def _go_on(self) -> None:
        if not self._held_back:
            self._hold_back(False)

    def _apply(self, event: Any, own: Stream) -> None:
        """The client itself reads the own stream: each event once, in order, whenever the application comes to it."""
        if event.seq != self._applied + 1:
            if event.seq > self._applied and not own.asked and not self._own_due:
                self._own_due = own.behind = True
                self.resync()
            return
        self._applied = event.seq
        self._touch(own)
        if isinstance(event, ChannelLeft):
            self.streams.drop(event.channel)
            self._held.pop(event.channel, None)
            for feed in self.feeds:
                feed.last.pop(event.channel, None)
            self._dirty.pop(event.channel, None)
        elif isinstance(event, ChannelJoined):
            self._joined(event, own)

    def _joined(self, event: ChannelJoined, own: Stream) -> None:
        joined = event.joined
        stream = self.streams.get(joined.channel)
        if stream is None:
            stream = self.streams.adopt_head(joined.channel, joined.epoch, joined.head)
            # The two streams are independent: what came of the channel before it was known to be ours did not count,
            # and the server may be holding it until it is named.
            stream.behind = True
            self._touch(stream)
            if self._wire.opened:
                self.resync()
        else:
            stream.learn_epoch(joined.epoch)
        self._held.pop(joined.channel, None)

    # ------------------------------------------------------------ catching up

    async def _learn_heads(self) -> None:
        """A device without a mark: every stream's head is where it begins, or is compared with what it has."""
        cursor: str | None = None
        while True:
            page = await self._wire.ask(Heads(cursor=cursor), HeadsReply)
            for head in page.moved:
                stream = self.streams.get(head.stream)
                if stream is None:
                    # The own stream's past is about channels that the heads tell anyway.
                    if head.stream == OWN_STREAM:
                        stream = self._adopt_own(head)
                    else:
                        stream = self.streams.adopt_head(head.stream, head.epoch, head.head)
                        stream.behind = stream.received < head.head
                    self._touch(stream)
                else:
                    self._compare(stream, head, must_name=False)
            if page.more is None:
                return
            cursor = page.more

    def note_moved(self, moved: list[Head]) -> None:
        """These streams are held by the server until they are named."""
        for head in moved:
            stream = self.streams.get(head.stream)
            if stream is not None:
                self._compare(stream, head, must_name=True)
            elif head.stream == OWN_STREAM:
                self._adopt_own(head).behind = True
            else:
                # Joined while away: the own stream will tell from where.
                self._held[head.stream] = head

    def _adopt_own(self, head: Head) -> Stream:
        self._applied, self._applied_epoch = head.head, head.epoch
        return self.streams.adopt(head.stream, head.epoch, head.head)

    def _compare(self, stream: Stream, head: Head, *, must_name: bool) -> None:
        stream.learn_epoch(head.epoch)
        if stream.epoch != head.epoch:
            self._reset(stream, "epoch_changed", head.epoch, head.head)
        elif stream.received > head.head and not must_name:
            # Heads are read a moment after the events before them were sent: not ahead, just newer.
            return
        if must_name or stream.received < head.head:
            stream.behind = True
            self._touch(stream)

    def resync(self) -> None:
        """Ask for what is missing of the streams that somebody has room for."""
        if not self._wire.identified:
            return
        if not self.streams.lagging:
            return
        wanted: list[Stream] = []
        for stream in self.streams.lagging:
            if stream.asked:
                continue
            if stream.name == OWN_STREAM:
                if self._own_due or not self._feeds_of(stream) or self._has_place(stream):
                    wanted.append(stream)
            elif self._wire.opened and self._has_place(stream):
                wanted.append(stream)
        for stream in wanted:
            stream.behind = False
            stream.asked = True
        for batch in batches(wanted):
            self._wire.transmit(Sync(positions=batch), partial(self._sync_answered, tuple(batch)))

    def _has_place(self, stream: Stream) -> bool:
        feeds = stream.feeds
        if feeds is None:
            feeds = self._feeds_of(stream)
        return bool(feeds) and all(len(feed.queue) <= feed.limit // 2 for feed in feeds)

    def _sync_answered(self, names: tuple[str, ...], reply: Reply | None) -> None:
        if not isinstance(reply, ErrorReply):
            return
        log.warning("the server refused a sync: %s (%s)", reply.code, reply.detail)
        for name in names:
            stream = self.streams.get(name)
            if stream is not None and stream.asked:
                stream.asked = False
                stream.behind = True
        self._own_synced.set()
        if reply.retry == Retry.LATER:
            delay = max(self._wire.retry_bound(), (reply.retry_after_ms or 0) / 1000)
            asyncio.get_running_loop().call_later(delay, self.resync)
        else:
            self._wire.abort("the server refused our positions")

    def on_syncing(self, frame: Syncing) -> None:
        """The server says which streams it will replay, and which it cannot."""
        self._wire.answer(frame.ref, frame)
        for name, refused in frame.refused.items():
            stream = self.streams.get(name)
            if stream is None:
                continue
            stream.asked = False
            if refused.code == "not_found":
                self.streams.drop(name)
                self._dirty.pop(name, None)
                self._save_soon()
            elif refused.code in _OTHER_HISTORY:
                self._reset(stream, refused.code, refused.epoch, refused.head or 0)
            else:
                log.warning("the server refused to replay %s: %s", name, refused.code)
                stream.behind = True
            if name == OWN_STREAM:
                self._own_synced.set()
        if frame.refused:
            self.resync()

    def on_synced(self, frame: Synced) -> None:
        """A replay is complete: what follows on the stream is live."""
        stream = self.streams.get(frame.stream)
        if stream is None:
            return
        stream.learn_epoch(frame.epoch)
        stream.asked = False
        self._touch(stream)
        if frame.stream == OWN_STREAM:
            self._applied_epoch = frame.epoch
            self._own_due = self._applied < frame.seq
            self._own_synced.set()
        if stream.received < frame.seq and not stream.behind:
            stream.behind = True
            stream.fruitless += 1
            if stream.fruitless >= FRUITLESS_SYNCS_MAX:
                self._wire.abort(f"{frame.stream} does not become complete")
                return
        if stream.behind:
            self.resync()

    def _reset(self, stream: Stream, reason: str, epoch: str | None, head: int) -> None:
        """Our history of the stream is not the server's: begin again, and tell the application in its place."""
        stream.behind = True
        stream.asked = False
        self._touch(stream)
        feeds = self._feeds_of(stream)
        if not feeds and stream.name != OWN_STREAM:
            # It stays where the application was: whoever asks for its events will be told.
            return
        self.streams.restart(stream, epoch, head, reason=reason)
        if stream.name == OWN_STREAM:
            self._applied, self._applied_epoch = stream.received, epoch
        event = HistoryReset(stream=stream.name, seq=stream.received, epoch=epoch, reason=reason, head=head)
        delivery = Delivery(stream, event, False, 0)
        for feed in feeds:
            feed.last.pop(stream.name, None)
            delivery.holders += 1
            feed.put(delivery)

    # ------------------------------------------------------------ the application's side of the queues

    def _taken(self, feed: Feed, delivery: Delivery) -> None:
        delivery.shared = True
        delivery.holders -= 1
        if delivery.holders == 0:
            self._move(delivery.stream, delivery.event)

    def _move(self, stream: Stream, event: Event) -> None:
        """The application has the event: the position follows."""
        if stream.dropped:
            return
        if event.seq > stream.taken or isinstance(event, HistoryReset):
            stream.taken = event.seq
            if isinstance(event, HistoryReset):
                stream.taken_epoch = event.epoch
            self.unacked[stream.name] = stream
            self._touch(stream)

    def _has_room(self, feed: Feed) -> None:
        # What was let go is named before the server goes on: it then goes on with that.
        self.resync()
        if (self._held_back or self._wire.paused) and all(len(one.queue) <= one.limit // 2 for one in self.feeds):
            if self._held_back:
                self._hold_back(False)
            self._wire.resume()

    def _feed_left(self, feed: Feed) -> None:
        """An iterator was let go: what only it had goes back, to be asked for again."""
        if feed not in self.feeds:
            return
        self.feeds.remove(feed)
        returned = [feed.handed] if feed.handed is not None else []
        returned += feed.queue
        feed.handed = None
        feed.queue.clear()
        feed.size = 0
        for delivery in returned:
            delivery.holders -= 1
            if delivery.holders > 0:
                continue
            stream = delivery.stream
            if delivery.shared:
                self._move(stream, delivery.event)
            elif not stream.dropped and stream.received > stream.taken:
                stream.rewind()
                self._touch(stream)
        for stream in self.streams:
            stream.feeds = None
        own = self.streams.get(OWN_STREAM)
        if own is not None and not self._feeds_of(own) and own.received != self._applied:
            # Nobody but the client reads it any more; the application comes back to it where it was.
            own.received, own.epoch = self._applied, self._applied_epoch
            own.behind = self._own_due
            self._touch(own)
        if self._wire.paused or self._held_back:
            self._has_room(feed)
        elif returned and self.feeds:
            self.resync()

    def seen_head(self, channel: str, epoch: str, head: int) -> None:
        """A history page told where the channel stands: for an unknown one, that is where it begins."""
        if self.streams.get(channel) is None and channel not in self._held:
            self._touch(self.streams.adopt(channel, epoch, head))

    # ------------------------------------------------------------ what is saved and acknowledged

    def send_ack(self) -> None:
        """Tell the server what this device has, if it is to be told."""
        unacked, self.unacked = self.unacked, {}
        if not self._auto_ack:
            return
        streams = [stream for stream in unacked.values() if not stream.dropped and stream.name != OWN_STREAM]
        for batch in batches(streams):
            positions = {name: known.taken for name in batch if (known := self.streams.get(name)) is not None}
            self._wire.transmit(Ack(positions=positions))

    def take_mark(self, mark: str) -> None:
        """Keep a newer mark, now that everything before it has been handled."""
        self.mark = mark
        self._mark_dirty = True
        self._save_soon()

    def _touch(self, stream: Stream) -> None:
        if self._remembers:
            self._dirty[stream.name] = stream
            self._save_soon()

    def _save_soon(self) -> None:
        if self._remembers and self._save_handle is None and not self.closing:
            self._save_handle = asyncio.get_running_loop().call_later(SAVE_SECONDS, self.save)

    def save(self) -> None:
        """Write positions, open flags and the mark together: each is only true with the others."""
        if self._save_handle is not None:
            self._save_handle.cancel()
            self._save_handle = None
        dirty, self._dirty = self._dirty, {}
        dropped, self.streams.dropped = self.streams.dropped, set()
        if dirty or dropped or self._mark_dirty:
            self._mark_dirty = False
            rows = [
                SavedStream(stream.name, stream.taken_epoch, stream.taken, stream.open)
                for stream in dirty.values()
                if not stream.dropped
            ]
            if OWN_STREAM in dirty:
                rows.append(SavedStream(_OWN_APPLIED, self._applied_epoch, self._applied, False))
            self._store.save(self.mark, rows, dropped)
