"""The hub: who listens to which stream on this node, and the one loop that writes to them.

An event is framed once and the same bytes object goes to every peer. A peer is *live* on a stream, or *behind* on it:
then it gets nothing from here and reads the log (`gateway.catchup`) until it has caught up with `Stream.head`, and is
live again in the same breath: between the comparison and the switch nothing is awaited, so nothing falls in between
and nothing comes twice. Slow peers are put behind too, so a peer costs bounded memory: one number per stream.

What a user may listen to is kept once, in a `Subscriber` that all of their peers share, and for a while after the last
of them has gone: coming and going costs the same whatever the number of channels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeAlias

from tidings.server.bus.base import AccessChanged, Joined, Left, Notice, Published, Revoked, Signal
from tidings.server.telemetry import get_logger

log = get_logger(__name__)

# How long a published seq of a stream nobody listened to is remembered, seconds: a connection that reads its
# memberships in that time learns of what was committed after its snapshot.
RECENT_SECONDS: Final = 5.0
# The public name of every user's own stream.
OWN: Final = "@me"
# How long after its commit an event is announced at the latest, seconds, if it is: then the log is read instead.
ANNOUNCED_SECONDS: Final = 1.0
# How long a user's streams are kept after their last peer has gone, seconds: a tunnel, a lift, a laptop carried to the
# next meeting, a server before this one that was restarted.
KEPT_SECONDS: Final = 600.0
# Streams kept for users without a peer, counted for each of them: 300 to 900 bytes each, 90 MB if nobody shares any.
KEPT_STREAMS_MAX: Final = 100_000

# How long an event that overtook another node's is kept for that one to come, seconds: announcements of two nodes that
# write to one stream cross all the time, by milliseconds. To read the log for each would be a read per message.
EARLY_SECONDS: Final = 0.1
# Of them in one stream. More at once is no crossing but a loss, and the log is cheaper.
EARLY_MAX: Final = 64

# A user: the app's number and the user's id.
Key: TypeAlias = tuple[int, str]
# A stream that a user may listen to, as a snapshot saw it: sid, name, epoch, head.
Membership: TypeAlias = tuple[int, str, str, int]


def frame(payload: bytes) -> bytes:
    """A WebSocket text frame, unmasked as a server's are (RFC 6455 §5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes((size,)) + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


class Interest(Protocol):
    """What a hub among several asks the others for: see `bus.base.Bus`."""

    def follow(self, sid: int) -> None:
        """Hear a stream."""

    def unfollow(self, sid: int) -> None:
        """Hear it no more."""

    def attend(self, app: int, user: str) -> None:
        """Hear what is for a user's sessions."""

    def unattend(self, app: int, user: str) -> None:
        """Hear it no more."""


class Subscriber:
    """A user as the hub sees them: what they may listen to, and the peers that do."""

    __slots__ = ("app", "idle_since", "known", "loading", "own", "peers", "streams", "told", "user")

    def __init__(self, app: int, user: str) -> None:
        self.app = app
        self.user = user
        self.peers: list[Peer] = []
        self.streams: dict[int, Stream] = {}
        self.own: Stream | None = None
        # Whether `streams` are all of theirs: read once, and kept by notices from then on.
        self.known = False
        # How many of the peers are reading the memberships, and the streams that notices told of meanwhile: of those
        # they know better than what was read.
        self.loading = 0
        self.told: set[int] | None = None
        # When the last peer has gone, seconds of the loop's clock.
        self.idle_since = 0.0


class Peer:
    """One connection as the hub sees it. Subclasses write bytes somewhere."""

    __slots__ = (
        "__weakref__",
        "app",
        "behind",
        "deaf",
        "device",
        "guarded",
        "guards",
        "id",
        "out",
        "paused",
        "subscriber",
        "user",
    )

    # Whether `write` takes joined frames; else every payload goes to `write_one`.
    framed = True

    def __init__(self, id: str) -> None:
        self.id = id
        self.app = 0
        self.user = ""
        self.device = ""
        # Payloads of this tick with their frames, written at its end: one alone by `write_one`, more joined by `write`.
        self.out: list[tuple[bytes, bytes]] = []
        # True while the transport holds more than it should: nothing more is given to it.
        self.paused = False
        # Streams this peer is not live on -> how far it has been sent; None until the client says what it has.
        self.behind: dict[int, int | None] = {}
        # While the hub knows the peer.
        self.subscriber: Subscriber | None = None
        # Streams of its user that this peer may not read: being a member is not always enough.
        self.deaf: set[int] | None = None
        # Whether being a member is not enough to hear a channel: then it is read from the log first, which asks.
        self.guarded = False
        # Grows whenever it has to be asked anew: an answer from before says nothing.
        self.guards = 0

    @property
    def streams(self) -> dict[int, Stream]:
        """What its user may listen to."""
        return {} if self.subscriber is None else self.subscriber.streams

    def write(self, data: bytes) -> None:
        """Hand frames to the transport. Must not raise and must not block."""
        raise NotImplementedError  # why: every transport has its own

    def write_one(self, payload: bytes) -> None:
        """Hand one payload to the transport, which frames it. Must not raise and must not block."""
        raise NotImplementedError  # why: every transport has its own

    def fell_behind(self) -> None:
        """The hub has put this peer behind on a stream: catch it up when it can take more."""
        raise NotImplementedError  # why: every transport has its own

    def subscribed(self, stream: Stream) -> None:
        """The peer's user has joined a channel: it is live from its head on."""

    def unsubscribed(self, stream: Stream) -> None:
        """The peer's user may not see the stream any more."""

    def revoked(self, notice: Revoked) -> None:
        """The user's tokens or device were revoked; the peer decides whether it is meant."""

    def access_changed(self) -> None:
        """What this user may do has changed: read it again before the next command."""


class Stream:
    """A stream that someone on this node listens to. `head` is the last seq that went through here, `early` what came
    before its turn."""

    __slots__ = ("app", "early", "epoch", "head", "name", "peers", "sid", "subscribers", "turn")

    def __init__(self, sid: int, app: int, name: str, epoch: str, head: int) -> None:
        self.sid = sid
        self.app = app
        self.name = name
        self.epoch = epoch
        self.head = head
        self.early: dict[int, Published] | None = None
        self.subscribers: dict[Subscriber, None] = {}
        # The peers of the subscribers, as they were in this turn of the hub: see `Hub.peers`.
        self.peers: list[Peer] = []
        self.turn = -1


class Hub:
    """Streams, peers and the write loop of one node. Everything happens on the event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        interest: Interest | None = None,
        on_flush: Callable[[int, int], None] | None = None,
        on_unsure: Callable[[Subscriber], None] = lambda subscriber: None,
    ) -> None:
        self._loop = loop
        # None where there are no other nodes.
        self._interest = interest
        self._on_flush = on_flush
        self._on_unsure = on_unsure
        self.streams: dict[int, Stream] = {}
        # Channels' streams by their public name; own streams (`@me`) are not here.
        self.named: dict[tuple[int, str], Stream] = {}
        self.users: dict[Key, Subscriber] = {}
        # Those of them that have no peer, the one that had none for longest first, and how many streams those have.
        self._idle: dict[Subscriber, None] = {}
        self._kept = 0
        # Those whose memberships are being read.
        self._loading: dict[Subscriber, None] = {}
        self._doubts = 0
        # Grows with every peer that comes or goes.
        self._turn = 0
        self._dirty: list[Peer] = []
        # Seqs published lately, in two generations.
        self._recent: dict[int, int] = {}
        self._recent_before: dict[int, int] = {}
        self._recent_turn = loop.time()
        self.deliveries = 0
        self.put_behind = 0

    # ------------------------------------------------------------ membership of peers

    def recent_head(self, sid: int) -> int:
        """The highest seq published on the stream in the last seconds, 0 if none was."""
        return self._recent.get(sid) or self._recent_before.get(sid, 0)

    def peers(self, stream: Stream) -> list[Peer]:
        """Who hears the stream. Gathered when somebody has come or gone since the last time, so that an event goes
        through a plain list and a peer comes without a visit to each of its streams."""
        if stream.turn != self._turn:
            sid = stream.sid
            stream.peers = [
                peer
                for subscriber in stream.subscribers
                for peer in subscriber.peers
                if peer.deaf is None or sid not in peer.deaf
            ]
            stream.turn = self._turn
        return stream.peers

    def peers_of(self, app: int, user: str) -> list[Peer]:
        """The peers of a user."""
        subscriber = self.users.get((app, user))
        return [] if subscriber is None else subscriber.peers

    def join(self, subscriber: Subscriber, sid: int, name: str, epoch: str, head: int) -> Stream:
        """Listen to a stream that stood at `head` in a snapshot taken at most `RECENT_SECONDS` ago."""
        stream = self.streams.get(sid)
        if stream is None:
            stream = Stream(sid, subscriber.app, name, epoch, max(head, self.recent_head(sid)))
            self.streams[sid] = stream
            if name != OWN:
                self.named[(stream.app, name)] = stream
            if self._interest is not None:
                self._interest.follow(sid)
        elif head > stream.head:
            # The snapshot knows more than came through here: whoever listens already must read it from the log.
            self._put_behind(stream, head)
        stream.subscribers[subscriber] = None
        stream.turn = -1
        if sid not in subscriber.streams:
            subscriber.streams[sid] = stream
            if not subscriber.peers:
                self._kept += 1
        if name == OWN:
            subscriber.own = stream
        return stream

    def listening(self, peer: Peer, name: str) -> Stream | None:
        """The stream of this name if the peer listens to it."""
        subscriber = peer.subscriber
        if subscriber is None:
            return None
        stream = subscriber.own if name == OWN else self.named.get((peer.app, name))
        if stream is None or stream.sid not in subscriber.streams:
            return None
        return None if peer.deaf is not None and stream.sid in peer.deaf else stream

    def leave(self, subscriber: Subscriber, sid: int) -> None:
        """The user may not listen to a stream any more."""
        stream = subscriber.streams.pop(sid, None)
        if stream is None:
            return
        if not subscriber.peers:
            self._kept -= 1
        self._unlisten(subscriber, stream)
        for peer in list(subscriber.peers):
            peer.behind.pop(sid, None)
            if peer.deaf is not None:
                peer.deaf.discard(sid)
            peer.unsubscribed(stream)

    def _unlisten(self, subscriber: Subscriber, stream: Stream) -> None:
        stream.subscribers.pop(subscriber, None)
        stream.turn = -1
        if not stream.subscribers:
            self.streams.pop(stream.sid, None)
            self.named.pop((stream.app, stream.name), None)
            self._remember(stream.sid, stream.head)
            if self._interest is not None:
                self._interest.unfollow(stream.sid)

    def deafen(self, peer: Peer, sid: int) -> None:
        """Send this peer nothing of a stream any more, whoever else of its user may hear it."""
        peer.behind.pop(sid, None)
        stream = peer.streams.get(sid)
        if stream is not None:
            if peer.deaf is None:
                peer.deaf = set()
            peer.deaf.add(sid)
            stream.turn = -1

    def undeafen(self, peer: Peer, sid: int) -> None:
        """The peer may read the stream again."""
        if peer.deaf is not None and sid in peer.deaf:
            peer.deaf.discard(sid)
            stream = peer.streams.get(sid)
            if stream is not None:
                stream.turn = -1

    def enter(self, peer: Peer) -> Subscriber:
        """Register a peer under its user: it hears what the user listens to. Unless that is `known`, read the
        memberships between `load` and `loaded`."""
        key = (peer.app, peer.user)
        subscriber = self.users.get(key)
        if subscriber is None:
            subscriber = self.users[key] = Subscriber(*key)
        elif not subscriber.peers:
            del self._idle[subscriber]
            self._kept -= len(subscriber.streams)
        if self._interest is not None and not subscriber.peers:
            self._interest.attend(*key)
        subscriber.peers.append(peer)
        peer.subscriber = subscriber
        self._turn += 1
        return subscriber

    def load(self, subscriber: Subscriber) -> int:
        """The user's memberships are being read from now on; what to give to `loaded`."""
        if not subscriber.loading:
            subscriber.told = set()
            self._loading[subscriber] = None
        subscriber.loading += 1
        return self._doubts

    def loaded(self, subscriber: Subscriber, memberships: Iterable[Membership] | None, began: int) -> None:
        """A snapshot since `load` had these memberships; None: it could not be read.

        What notices have told meanwhile stays as they told it.
        """
        if memberships is not None and not subscriber.known and subscriber.peers:
            told, streams = subscriber.told or (), subscriber.streams
            found = set()
            for sid, name, epoch, head in memberships:
                found.add(sid)
                if sid not in told:
                    self.join(subscriber, sid, name, epoch, head)
            for sid in [sid for sid in streams if sid not in found and sid not in told]:
                self.leave(subscriber, sid)
            subscriber.known = began == self._doubts
        subscriber.loading -= 1
        if not subscriber.loading:
            subscriber.told = None
            self._loading.pop(subscriber, None)

    def reconcile(self, subscriber: Subscriber, memberships: dict[int, Membership], joined: dict[int, int]) -> None:
        """A snapshot since `load` had these memberships: make good what was not heard, for peers that are there.

        `joined`: the heads at which channels were joined, of those that the subscriber does not listen to.
        """
        told = subscriber.told or set()
        for sid, (_, name, epoch, head) in memberships.items():
            if sid not in subscriber.streams and sid not in told and sid in joined:
                self._joined(Joined(subscriber.app, subscriber.user, sid, name, epoch, joined[sid]))
            self.recheck({sid: head})
        for sid in [sid for sid in subscriber.streams if sid not in memberships and sid not in told]:
            self.leave(subscriber, sid)

    def exit(self, peer: Peer) -> None:
        """Forget a peer: it gets nothing more. What its user listens to is kept for a while."""
        subscriber, peer.subscriber = peer.subscriber, None
        peer.out.clear()
        peer.behind.clear()
        if subscriber is None:
            return
        subscriber.peers.remove(peer)
        self._turn += 1
        if subscriber.peers:
            return
        if self._interest is not None:
            self._interest.unattend(subscriber.app, subscriber.user)
        subscriber.idle_since = self._loop.time()
        self._idle[subscriber] = None
        self._kept += len(subscriber.streams)
        if not subscriber.known:
            self._drop(subscriber)
        self.sweep()

    def hold(self, peer: Peer, heads: dict[int, int]) -> None:
        """Send nothing of streams that stand at these heads in a snapshot until the client says what it has."""
        unheard = {}
        for sid, head in heads.items():
            stream = peer.streams.get(sid)
            if stream is None:
                continue  # Left meanwhile, or joined and not announced yet.
            if head > stream.head:
                unheard[sid] = head
            peer.behind[sid] = None
        if unheard:
            # Mostly the announcement is under way; to send everybody to the log at once for that would be a storm.
            self._loop.call_later(ANNOUNCED_SECONDS, self.recheck, unheard)

    def sweep(self) -> None:
        """Forget users who have had no peer for too long, or are too many."""
        due = self._loop.time() - KEPT_SECONDS
        while self._idle:
            oldest = next(iter(self._idle))
            if oldest.idle_since > due and self._kept <= KEPT_STREAMS_MAX:
                return
            self._drop(oldest)

    def doubt(self) -> None:
        """Somebody may have joined or left without a word: nobody's memberships are known any more."""
        self._doubts += 1
        for subscriber in list(self._idle):
            self._drop(subscriber)
        for subscriber in self.users.values():
            subscriber.known = False

    def _drop(self, subscriber: Subscriber) -> None:
        del self._idle[subscriber]
        del self.users[(subscriber.app, subscriber.user)]
        self._kept -= len(subscriber.streams)
        for stream in subscriber.streams.values():
            self._unlisten(subscriber, stream)
        subscriber.streams.clear()

    # ------------------------------------------------------------ writing

    def push(self, peer: Peer, payload: bytes) -> None:
        """Queue one frame for a peer, written at the end of this tick."""
        if not peer.out:
            if not self._dirty:
                self._loop.call_soon(self.flush)
            self._dirty.append(peer)
        peer.out.append((payload, frame(payload)))

    def flush(self) -> None:
        """Write what has collected, one write per peer."""
        dirty, self._dirty = self._dirty, []
        frames = 0
        for peer in dirty:
            out = peer.out
            if not out:
                continue
            count = len(out)
            frames += count
            try:
                if count == 1:
                    # The common case: the transport writes it to the socket at once, header and all.
                    peer.write_one(out[0][0])
                elif peer.framed:
                    peer.write(b"".join([framed for _, framed in out]))
                else:
                    for payload, _ in out:
                        peer.write_one(payload)
            except Exception as error:
                # One broken transport must not keep the others from their frames.
                log.warning("write_failed", session=peer.id, error=type(error).__name__)
            finally:
                out.clear()
        if self._on_flush is not None:
            self._on_flush(len(dirty), frames)

    # ------------------------------------------------------------ the bus

    def notice(self, notice: Notice) -> None:
        """Take a notice from the bus."""
        kind = type(notice)
        if kind is Published:
            self._published(notice)  # type: ignore[arg-type]
        elif kind is Signal:
            self._signal(notice)  # type: ignore[arg-type]
        elif isinstance(notice, Joined):
            self._joined(notice)
        elif isinstance(notice, Left):
            self._left(notice)
        elif isinstance(notice, Revoked):
            for peer in list(self.peers_of(notice.app, notice.user)):
                peer.revoked(notice)
        elif isinstance(notice, AccessChanged):
            self._access_changed(notice)

    def _joined(self, notice: Joined) -> None:
        sid = notice.sid
        subscriber = self.users.get((notice.app, notice.user))
        if subscriber is None:
            return
        if subscriber.told is not None:
            subscriber.told.add(sid)
        if sid in subscriber.streams:
            return
        stream = self.join(subscriber, sid, notice.channel, notice.epoch, notice.head)
        for peer in subscriber.peers:
            if stream.head > notice.head or peer.guarded:
                peer.behind[sid] = notice.head
                peer.fell_behind()
            peer.subscribed(stream)

    def _left(self, notice: Left) -> None:
        sid = notice.sid
        if notice.user is None:
            stream = self.streams.get(sid)
            subscribers = [*(stream.subscribers if stream is not None else ()), *self._loading]
        else:
            one = self.users.get((notice.app, notice.user))
            subscribers = [] if one is None else [one]
        for subscriber in subscribers:
            if subscriber.told is not None:
                subscriber.told.add(sid)
            self.leave(subscriber, sid)

    def _published(self, notice: Published) -> None:
        sid, seq = notice.sid, notice.seq
        stream = self.streams.get(sid)
        if stream is None:
            self._remember(sid, seq)
            return
        if seq != stream.head + 1:
            if seq > stream.head:
                self._overtook(stream, notice)
            return
        self._deliver(stream, notice)
        if stream.early:
            self._deliver_early(stream)

    def _deliver_early(self, stream: Stream) -> None:
        while stream.early and (following := stream.early.pop(stream.head + 1, None)) is not None:
            self._deliver(stream, following)

    def _deliver(self, stream: Stream, notice: Published) -> None:
        """Write the stream's next event to all who are live on it."""
        sid, seq = stream.sid, notice.seq
        stream.head = seq
        peers = stream.peers if stream.turn == self._turn else self.peers(stream)
        entry = (notice.payload, frame(notice.payload))
        dirty = self._dirty
        if not dirty and peers:
            self._loop.call_soon(self.flush)
        delivered = 0
        for peer in peers:
            if peer.paused or (peer.behind and sid in peer.behind):
                if sid not in peer.behind:
                    peer.behind[sid] = seq - 1
                    self.put_behind += 1
                    peer.fell_behind()
                continue
            out = peer.out
            if not out:
                dirty.append(peer)
            out.append(entry)
            delivered += 1
        self.deliveries += delivered

    def _overtook(self, stream: Stream, notice: Published) -> None:
        """An event came before its predecessor. Between nodes that one is mostly under way."""
        early = stream.early
        if self._interest is None or (early is not None and len(early) >= EARLY_MAX):
            self._put_behind(stream, notice.seq)
            return
        if not early:
            early = stream.early = {}
            self._loop.call_later(EARLY_SECONDS, self._give_up, stream, early, stream.head)
        early[notice.seq] = notice

    def _give_up(self, stream: Stream, early: dict[int, Published], head: int) -> None:
        """What was waited for has not come in its time, or something has and more is missing."""
        if stream.early is not early or self.streams.get(stream.sid) is not stream:
            return
        self._deliver_early(stream)
        if not early:
            return
        if stream.head > head:
            self._loop.call_later(EARLY_SECONDS, self._give_up, stream, early, stream.head)
        else:
            self._put_behind(stream, max(early))

    def _put_behind(self, stream: Stream, head: int) -> None:
        """Something before `head` did not come through here: everyone live reads on from where they were."""
        last = stream.head
        # Not beyond: whoever is just joining has what was before `head`, and nothing of what came early.
        stream.head = head
        for seq in [seq for seq in stream.early or () if seq <= head]:
            del stream.early[seq]  # type: ignore[union-attr]
        for peer in self.peers(stream):
            if stream.sid not in peer.behind:
                peer.behind[stream.sid] = last
                peer.fell_behind()
        if stream.name == OWN:
            # Whoever joins or leaves is told on their own stream: we may not have heard of that either.
            for subscriber in stream.subscribers:
                self._on_unsure(subscriber)

    def recheck(self, heads: dict[int, int]) -> int:
        """Compare with what the store says: streams that grew without a word are read from the log. How many did."""
        grown = 0
        for sid, head in heads.items():
            stream = self.streams.get(sid)
            if stream is not None and head > stream.head:
                self._put_behind(stream, head)
                grown += 1
        return grown

    def heads(self, sids: Iterable[int]) -> dict[int, int]:
        """Where streams stand here, those of them that are listened to."""
        streams = self.streams
        return {sid: streams[sid].head for sid in sids if sid in streams}

    def ahead(self, heads: dict[int, int]) -> dict[int, int]:
        """Those of the heads that are further than what came through here."""
        streams = self.streams
        return {sid: head for sid, head in heads.items() if sid in streams and head > streams[sid].head}

    def _signal(self, notice: Signal) -> None:
        if notice.sid is not None:
            stream = self.streams.get(notice.sid)
            if stream is None:
                return
            peers = self.peers(stream)
        else:
            peers = self.peers_of(notice.app, notice.user or "")
        entry = (notice.payload, frame(notice.payload))
        dirty = self._dirty
        for peer in peers:
            # Best effort: a slow peer does without.
            if peer.paused or peer.id == notice.skip_session:
                continue
            if not peer.out:
                if not dirty:
                    self._loop.call_soon(self.flush)
                dirty.append(peer)
            peer.out.append(entry)

    def guard(self, peer: Peer, sids: Iterable[int]) -> None:
        """Send nothing more on these streams until the log was asked whether the peer may read them."""
        peer.guards += 1
        for sid in sids:
            stream = peer.streams.get(sid)
            if (
                stream is not None
                and stream.name != OWN
                and sid not in peer.behind
                and (peer.deaf is None or sid not in peer.deaf)
            ):
                peer.behind[sid] = stream.head
        peer.fell_behind()

    def _access_changed(self, notice: AccessChanged) -> None:
        if notice.sid is not None:
            stream = self.streams.get(notice.sid)
            if stream is not None:
                for peer in list(self.peers(stream)):
                    if peer.guarded:
                        self.guard(peer, (notice.sid,))
        if notice.user is not None:
            for peer in list(self.peers_of(notice.app, notice.user)):
                peer.access_changed()
        elif notice.sid is None:
            for (app, _), subscriber in list(self.users.items()):
                if app == notice.app:
                    for peer in list(subscriber.peers):
                        peer.access_changed()

    def _remember(self, sid: int, seq: int) -> None:
        now = self._loop.time()
        if now - self._recent_turn > RECENT_SECONDS:
            self._recent_before = self._recent if now - self._recent_turn < 2 * RECENT_SECONDS else {}
            self._recent = {}
            self._recent_turn = now
        if seq > self._recent.get(sid, 0):
            self._recent[sid] = seq
