"""The hub: who listens to which stream on this node, and the one loop that writes to them.

An event is framed once and the same bytes object goes to every peer. A peer is *live* on a stream, or *behind* on it:
then it gets nothing from here and reads the log (`gateway.catchup`) until it has caught up with `Stream.head`, and is
live again in the same breath: between the comparison and the switch nothing is awaited, so nothing falls in between
and nothing comes twice. Slow peers are put behind too, so a peer costs bounded memory: one number per stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from tidings.server.bus.base import AccessChanged, Joined, Left, Notice, Published, Revoked, Signal
from tidings.server.telemetry import get_logger

log = get_logger(__name__)

# How long a published seq of a stream nobody listened to is remembered, seconds: a connection that reads its
# memberships in that time learns of what was committed after its snapshot.
RECENT_SECONDS: Final = 5.0
# The public name of every user's own stream.
OWN: Final = "@me"


def frame(payload: bytes) -> bytes:
    """A WebSocket text frame, unmasked as a server's are (RFC 6455 §5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes((size,)) + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


class Peer:
    """One connection as the hub sees it. Subclasses write bytes somewhere."""

    __slots__ = (
        "__weakref__",
        "app",
        "behind",
        "device",
        "guarded",
        "id",
        "left_while_entering",
        "out",
        "own",
        "paused",
        "streams",
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
        self.streams: dict[int, Stream] = {}
        self.own: Stream | None = None
        # Whether being a member is not enough to hear a channel: then it is read from the log first, which asks.
        self.guarded = False
        # Streams that stopped being theirs while their memberships were being read.
        self.left_while_entering: set[int] = set()

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
    """A stream that someone on this node listens to. `head` is the last seq that went through here."""

    __slots__ = ("app", "epoch", "head", "name", "peers", "sid")

    def __init__(self, sid: int, app: int, name: str, epoch: str, head: int) -> None:
        self.sid = sid
        self.app = app
        self.name = name
        self.epoch = epoch
        self.head = head
        self.peers: set[Peer] = set()


class Hub:
    """Streams, peers and the write loop of one node. Everything happens on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, on_flush: Callable[[int, int], None] | None = None) -> None:
        self._loop = loop
        self._on_flush = on_flush
        self.streams: dict[int, Stream] = {}
        # Channels' streams by their public name; own streams (`@me`) are not here.
        self.named: dict[tuple[int, str], Stream] = {}
        self.users: dict[tuple[int, str], set[Peer]] = {}
        # Peers between `enter` and the end of their snapshot.
        self.entering: set[Peer] = set()
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

    def join(self, peer: Peer, sid: int, name: str, epoch: str, head: int) -> Stream:
        """Listen to a stream that stood at `head` in a snapshot taken at most `RECENT_SECONDS` ago."""
        stream = self.streams.get(sid)
        if stream is None:
            stream = Stream(sid, peer.app, name, epoch, max(head, self.recent_head(sid)))
            self.streams[sid] = stream
            if name != OWN:
                self.named[(stream.app, name)] = stream
        elif head > stream.head:
            # The snapshot knows more than came through here: whoever listens already must read it from the log.
            self._put_behind(stream, head)
        stream.peers.add(peer)
        peer.streams[sid] = stream
        if name == OWN:
            peer.own = stream
        return stream

    def listening(self, peer: Peer, name: str) -> Stream | None:
        """The stream of this name if the peer listens to it."""
        stream = peer.own if name == OWN else self.named.get((peer.app, name))
        return stream if stream is not None and peer in stream.peers else None

    def leave(self, peer: Peer, sid: int) -> None:
        """Stop listening to a stream."""
        stream = peer.streams.pop(sid, None)
        peer.behind.pop(sid, None)
        if stream is None:
            return
        stream.peers.discard(peer)
        if not stream.peers:
            self.streams.pop(sid, None)
            self.named.pop((stream.app, stream.name), None)
            self._remember(sid, stream.head)

    def enter(self, peer: Peer) -> None:
        """Register a peer under its user, before its memberships are read: `settled` says that they are in place."""
        self.entering.add(peer)
        self.users.setdefault((peer.app, peer.user), set()).add(peer)

    def settled(self, peer: Peer) -> None:
        """The peer's memberships are in place."""
        self.entering.discard(peer)
        peer.left_while_entering.clear()

    def exit(self, peer: Peer) -> None:
        """Forget a peer: it gets nothing more."""
        self.entering.discard(peer)
        for sid in list(peer.streams):
            self.leave(peer, sid)
        key = (peer.app, peer.user)
        peers = self.users.get(key)
        if peers is not None:
            peers.discard(peer)
            if not peers:
                del self.users[key]
        peer.out.clear()

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
            for peer in list(self.users.get((notice.app, notice.user), ())):
                if notice.sid not in peer.streams:
                    stream = self.join(peer, notice.sid, notice.channel, notice.epoch, notice.head)
                    if stream.head > notice.head or peer.guarded:
                        peer.behind[notice.sid] = notice.head
                        peer.fell_behind()
                    peer.subscribed(stream)
        elif isinstance(notice, Left):
            if notice.user is None:
                stream_left = self.streams.get(notice.sid)
                peers: Iterable[Peer] = [*(stream_left.peers if stream_left is not None else ()), *self.entering]
            else:
                peers = list(self.users.get((notice.app, notice.user), ()))
            for peer in peers:
                # Whoever is just entering has an older snapshot, in which the stream is still theirs.
                if peer in self.entering:
                    peer.left_while_entering.add(notice.sid)
                left = peer.streams.get(notice.sid)
                if left is not None:
                    self.leave(peer, notice.sid)
                    peer.unsubscribed(left)
        elif isinstance(notice, Revoked):
            for peer in list(self.users.get((notice.app, notice.user), ())):
                peer.revoked(notice)
        elif isinstance(notice, AccessChanged):
            self._access_changed(notice)

    def _published(self, notice: Published) -> None:
        sid, seq = notice.sid, notice.seq
        stream = self.streams.get(sid)
        if stream is None:
            self._remember(sid, seq)
            return
        if seq != stream.head + 1:
            if seq > stream.head:
                self._put_behind(stream, seq)
            return
        stream.head = seq
        peers = stream.peers
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

    def _put_behind(self, stream: Stream, head: int) -> None:
        """Something before `head` did not come through here: everyone live reads on from where they were."""
        last = stream.head
        stream.head = head
        for peer in stream.peers:
            if stream.sid not in peer.behind:
                peer.behind[stream.sid] = last
                peer.fell_behind()

    def recheck(self, heads: dict[int, int]) -> None:
        """Compare with what the store says: streams that grew without a word are read from the log."""
        for sid, head in heads.items():
            stream = self.streams.get(sid)
            if stream is not None and head > stream.head:
                self._put_behind(stream, head)

    def _signal(self, notice: Signal) -> None:
        if notice.sid is not None:
            stream = self.streams.get(notice.sid)
            if stream is None:
                return
            peers: Iterable[Peer] = stream.peers
        else:
            peers = self.users.get((notice.app, notice.user or ""), ())
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
        for sid in sids:
            stream = peer.streams.get(sid)
            if stream is not None and stream.name != OWN and sid not in peer.behind:
                peer.behind[sid] = stream.head
        peer.fell_behind()

    def _access_changed(self, notice: AccessChanged) -> None:
        if notice.sid is not None:
            stream = self.streams.get(notice.sid)
            if stream is not None:
                for peer in list(stream.peers):
                    if peer.guarded:
                        self.guard(peer, (notice.sid,))
        if notice.user is not None:
            for peer in list(self.users.get((notice.app, notice.user), ())):
                peer.access_changed()
        elif notice.sid is None:
            for (app, _), peers in list(self.users.items()):
                if app == notice.app:
                    for peer in list(peers):
                        peer.access_changed()

    def _remember(self, sid: int, seq: int) -> None:
        now = self._loop.time()
        if now - self._recent_turn > RECENT_SECONDS:
            self._recent_before = self._recent if now - self._recent_turn < 2 * RECENT_SECONDS else {}
            self._recent = {}
            self._recent_turn = now
        if seq > self._recent.get(sid, 0):
            self._recent[sid] = seq
