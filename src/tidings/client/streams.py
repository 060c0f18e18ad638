"""Where a client stands on each stream. Pure: no I/O, no clock.

The positions rule (docs/protocol): `seq == position + 1` applies and moves the position, `seq <= position` is a
duplicate, `seq > position + 1` is a gap: ask for what is missing with `sync` and ignore the stream until it comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ..wire import limits
from ..wire.commands import Position

if TYPE_CHECKING:
    from .subscriptions import Feed

OWN_STREAM = "@me"
# Positions in one frame: a frame of the greatest length minus the token, in bytes of JSON.
POSITIONS_BYTES_MAX = limits.FRAME_BYTES_MAX - limits.TOKEN_BYTES_MAX - 4096
# `,"name":{"seq":9007199254740991,"epoch":""}` around a name and an epoch.
_POSITION_OVERHEAD = 48
# A stream that is announced as synced but still has a gap, this often in a row, means that the server and we
# disagree: a new connection starts the conversation over.
FRUITLESS_SYNCS_MAX = 3

Start = Literal["now", "all"]
Verdict = Literal["apply", "duplicate", "gap", "ignore"]


class Stream:
    """One stream: `received` was put into the application's queue, `taken` was taken out of it.

    `behind`: something was announced that was not kept (nobody asked for it, or the queue was full): it will be asked
    for again. `asked`: a `sync` is under way. `fruitless`: syncs in a row that ended with a gap.
    """

    __slots__ = (
        "_lagging",
        "asked",
        "dropped",
        "epoch",
        "feeds",
        "fruitless",
        "name",
        "received",
        "taken",
        "taken_epoch",
    )

    def __init__(self, name: str, epoch: str | None, seq: int, lagging: set[Stream]) -> None:
        self.name = name
        self.epoch = epoch
        self.received = seq
        self.taken = seq
        # The history that `taken` belongs to: another one than `epoch` while a reset waits in the queue.
        self.taken_epoch = epoch
        self._lagging = lagging
        self.asked = False
        self.dropped = False
        self.fruitless = 0
        # Who gets the stream's events; None: to be looked up.
        self.feeds: tuple[Feed, ...] | None = None

    @property
    def behind(self) -> bool:
        """More was announced than was received: to be asked for."""
        return self in self._lagging

    @behind.setter
    def behind(self, value: bool) -> None:
        """A stream that was dropped is never behind."""
        if value and not self.dropped:
            self._lagging.add(self)
        else:
            self._lagging.discard(self)

    def learn_epoch(self, epoch: str) -> None:
        """Name the history that this stream's position belongs to, if that was not known."""
        if self.epoch is None:
            self.epoch = self.taken_epoch = epoch

    @property
    def passed(self) -> bool:
        """The connection is not where the application is."""
        return self.received != self.taken or self.epoch != self.taken_epoch

    def rewind(self) -> None:
        """What was received and not taken has gone back: it is to be asked for again."""
        self.received = self.taken
        self.epoch = self.taken_epoch
        self.behind = True

    @property
    def open(self) -> bool:
        """There is more than `taken`: a mark does not vouch for this stream."""
        return self.behind or self.asked or self.received != self.taken

    def judge(self, seq: int) -> Verdict:
        """What the positions rule says of an event with this seq. Changes nothing."""
        if seq == self.received + 1:
            return "apply"
        if seq <= self.received:
            return "duplicate"
        return "ignore" if self.asked or self.behind else "gap"

    def position(self) -> Position:
        """What is received, as a `sync` names it."""
        return Position(seq=self.received, epoch=self.epoch)


class Streams:
    """All streams of one client."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._by_name: dict[str, Stream] = {}
        self.get = self._by_name.get
        # Names that the store must forget.
        self.dropped: set[str] = set()
        # Those that are `behind`.
        self.lagging: set[Stream] = set()

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def adopt(self, name: str, epoch: str | None, seq: int) -> Stream:
        """Begin to follow a stream, from `seq` on."""
        stream = self._by_name[name] = Stream(name, epoch, seq, self.lagging)
        self.dropped.discard(name)
        return stream

    def adopt_live(self, name: str, seq: int) -> Stream:
        """Begin to follow a stream whose event `seq` has arrived out of the blue."""
        # The own stream's past is about channels that the heads tell anyway.
        return self.adopt(name, None, 0 if self._start == "all" and name != OWN_STREAM else seq - 1)

    def adopt_head(self, name: str, epoch: str | None, head: int) -> Stream:
        """Begin to follow a stream that stands at `head`: from here on, or from its beginning."""
        return self.adopt(name, epoch, 0 if self._start == "all" and name != OWN_STREAM else head)

    def drop(self, name: str) -> None:
        """The user is no longer a member: forget the position, so that nothing that follows is compared with it."""
        stream = self._by_name.pop(name, None)
        if stream is not None:
            stream.behind = False
            stream.dropped = True
        self.dropped.add(name)

    def restart(self, stream: Stream, epoch: str | None, head: int, *, reason: str) -> None:
        """The server refused the position: begin again where the start rule says.

        What has expired cannot be had from the beginning either, so then it is always the head.
        """
        again = self._start == "all" and reason != "cursor_expired" and stream.received > 0
        stream.epoch = epoch
        stream.received = 0 if again else head

    def lost_connection(self) -> None:
        """Replays under way have ended: what they had not brought must be asked for again."""
        for stream in self._by_name.values():
            if stream.asked:
                stream.asked = False
                stream.behind = True
            stream.fruitless = 0


def batches(streams: list[Stream]) -> Iterator[dict[str, Position]]:
    """The positions of these streams, in as many dictionaries as frames are needed."""
    batch: dict[str, Position] = {}
    size = 0
    for stream in streams:
        cost = len(stream.name.encode()) + len(stream.epoch or "") + _POSITION_OVERHEAD
        if batch and (len(batch) >= limits.SYNC_STREAMS_MAX or size + cost > POSITIONS_BYTES_MAX):
            yield batch
            batch, size = {}, 0
        batch[stream.name] = stream.position()
        size += cost
    if batch:
        yield batch
