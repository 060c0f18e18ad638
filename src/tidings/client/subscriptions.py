"""Queues between the connection and the application: bounded, and each entry acknowledged.

A `Feed` is the queue, held by the client; an `Events` is what the application iterates. When the application lets go
of its `Events`, the feed gives back what was not taken.
"""

from __future__ import annotations

from asyncio import Future, get_running_loop
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from .errors import TidingsError
from .events import Event, Source
from .streams import Stream

# Events that wait in one iterator: a few hundred kilobytes, a second of a busy day.
QUEUE_MAX = 1_000
# Replies to commands come on the same connection as events, so while a command waits for its reply the connection is
# read on. When a queue has grown to so many bytes of frames the server is asked to hold events back …
HOLD_BYTES = 1 << 20
# … and what was under way by then still comes: the buffers of two usual systems hold about ten megabytes. What comes
# beyond this is let go, and asked for again when there is room.
KEPT_BYTES_MAX = 32 << 20
# Signals that wait: they are about now, so that the oldest go first.
SIGNALS_MAX = 1_000

T = TypeVar("T")


class Delivery:
    """One event on its way. `holders`: feeds that have it and have not taken it; `shared`: some feed took it."""

    __slots__ = ("event", "holders", "live", "shared", "size", "stream")

    def __init__(self, stream: Stream, event: Event, live: bool, size: int) -> None:
        self.stream = stream
        self.event = event
        self.live = live
        # Bytes of its frame.
        self.size = size
        self.holders = 0
        self.shared = False


class Feed:
    """A bounded queue of deliveries for one iterator over all channels (`only` None) or over some."""

    __slots__ = ("closed", "error", "handed", "last", "limit", "only", "queue", "size", "waiter")

    def __init__(self, only: frozenset[str] | None, limit: int) -> None:
        self.only = only
        self.limit = limit
        self.queue: deque[Delivery] = deque()
        # Bytes of what is queued.
        self.size = 0
        self.handed: Delivery | None = None
        self.waiter: Future[None] | None = None
        # Highest seq offered per stream: another feed's return must not bring this one anything twice.
        self.last: dict[str, int] = {}
        self.closed = False
        self.error: TidingsError | None = None

    def wants(self, name: str) -> bool:
        """Whether this feed is offered the events of a stream."""
        return self.only is None or name in self.only

    def put(self, delivery: Delivery) -> None:
        """Queue a delivery and wake who waits for it."""
        self.queue.append(delivery)
        self.size += delivery.size
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def end(self, error: TidingsError | None) -> None:
        """Nothing more will come: what is queued may still be taken, then the iterator ends or raises."""
        self.closed = True
        self.error = error
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)
        self.waiter = None


class Events:
    """An iterator over durable events, each of them once and in order per stream.

    Asking for the next event acknowledges the previous one: only then does the stored position move. A program that
    dies while it handles an event is given that event again after its restart (at least once into the application);
    while it lives, the client sorts out duplicates by `seq`. To recognise a repetition across restarts, remember
    `(event.stream, event.seq)` in the same transaction as the event's effects.

    A slow consumer slows down the connection, never the memory: when `queue_size` events wait, the client stops
    reading, and the server keeps the rest in its log. (While a command waits for its reply it reads on, and more may
    wait: see KEPT_BYTES_MAX.) When the iterator is let go (a `break`, an exception), what was
    not acknowledged goes to the next iterator that asks. `async with` acknowledges the last event at the end of the
    block, unless it ends with an exception; `taken()` does so at any time.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        taken: Callable[[Feed, Delivery], None],
        given: Callable[[Event, Source], None] | None,
        room: Callable[[Feed], None],
        left: Callable[[Feed], None],
    ) -> None:
        self._feed = feed
        self._on_taken = taken
        self._on_given = given
        self._on_room = room
        self._on_left = left

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        feed = self._feed
        if feed.handed is not None:
            self.taken()
        while not feed.queue:
            if feed.closed:
                if feed.error is not None:
                    raise feed.error
                raise StopAsyncIteration
            self._on_room(feed)
            if feed.queue:
                break
            feed.waiter = get_running_loop().create_future()
            await feed.waiter
        delivery = feed.handed = feed.queue.popleft()
        feed.size -= delivery.size
        if len(feed.queue) == feed.limit // 2:
            self._on_room(feed)
        if self._on_given is not None:
            self._on_given(delivery.event, "live" if delivery.live else "catchup")
        return delivery.event

    def taken(self) -> None:
        """Acknowledge the event that was given last."""
        delivery = self._feed.handed
        if delivery is not None:
            self._feed.handed = None
            self._on_taken(self._feed, delivery)

    @property
    def waiting(self) -> int:
        """Events in the queue now."""
        return len(self._feed.queue)

    def leave(self) -> None:
        """Stop. What was not acknowledged goes to the next iterator."""
        self._on_left(self._feed)

    async def aclose(self) -> None:
        """The same, as asynchronous iterators name it."""
        self.leave()

    async def __aenter__(self) -> Events:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.taken()
        await self.aclose()

    def __del__(self) -> None:
        # `async for … break` does not close an iterator; letting go of it does.
        self._on_left(self._feed)


class Latest(Generic[T]):
    """An iterator over things that are only worth knowing now: beyond the bound the oldest are forgotten."""

    def __init__(self, *, left: Callable[[Latest[T]], None], wants: Callable[[T], bool] | None = None) -> None:
        self._items: deque[T] = deque(maxlen=SIGNALS_MAX)
        self._waiter: Future[None] | None = None
        self._closed = False
        self._left = left
        self._wants = wants

    def put(self, item: T) -> None:
        """Offer an item; it is kept if the iterator wants it."""
        if self._wants is None or self._wants(item):
            self._items.append(item)
            self._wake()

    def end(self) -> None:
        """Nothing more will come: the iterator ends when what waits was taken."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def __aiter__(self) -> Latest[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()

    async def aclose(self) -> None:
        """Stop listening."""
        self._left(self)
        self.end()
