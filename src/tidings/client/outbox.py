"""Messages on their way out: stored before they are sent, sent once, in order per channel.

A message keeps its client key for life, so that the server recognises a repetition (`duplicate`) and stores nothing.
Per channel one message is under way at a time: were two, a refusal "later" of the first would let the second overtake
it. Channels do not wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from ..wire import codec
from ..wire.commands import ErrorReply, MessageSent, Reply, SendMessage
from ..wire.ids import Time
from ..wire.problems import Retry
from .backoff import FullJitter
from .errors import Closed, OutboxFull, Refused, StoreError, TidingsError, Timeout
from .store import SavedMessage, Store

log = logging.getLogger("tidings.client")

# Messages that may wait: a day offline of somebody who writes one a minute, with room to spare.
OUTBOX_MAX = 10_000
# A reply that has not come after this long is not going to: the message is sent again, with its key.
REPLY_SECONDS_MAX = 15.0

_decode_command = msgspec.json.Decoder(SendMessage).decode


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """The server has stored the message. `duplicate`: it had it already, from an earlier attempt with the same key."""

    channel: str
    id: str
    seq: int
    at: Time
    key: str
    duplicate: bool = False


class Outgoing:
    """A message in the outbox. `state`: queued → sent or failed (then `error` says why)."""

    __slots__ = ("_done", "command", "created_ms", "error", "n", "ref", "result", "since", "stored")

    def __init__(self, n: int, command: SendMessage, created_ms: int) -> None:
        self.n = n
        self.command = command
        self.created_ms = created_ms
        self.result: Sent | None = None
        self.error: TidingsError | None = None
        self.stored = False
        # While under way: its reference on this connection, and since when (monotonic seconds).
        self.ref: int | None = None
        self.since = 0.0
        self._done: asyncio.Future[Sent] | None = None

    @property
    def state(self) -> Literal["queued", "sent", "failed"]:
        """Where the message is."""
        return "sent" if self.result is not None else "failed" if self.error is not None else "queued"

    @property
    def channel(self) -> str:
        """The channel's id."""
        return self.command.channel

    @property
    def key(self) -> str:
        """The client key, which it keeps for life."""
        return self.command.key

    @property
    def text(self) -> str:
        """What it says."""
        return self.command.text

    async def sent(self, timeout: float | None = None) -> Sent:
        """Wait until the server has stored the message.

        Raises Refused when it will not, Timeout after `timeout` seconds (the message stays in the outbox), Closed when
        the client is closed first (a durable outbox sends it next time).
        """
        if self.result is not None:
            return self.result
        if self.error is not None:
            raise self.error
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
            # Whoever waited may have gone by the time it fails.
            self._done.add_done_callback(lambda future: future.cancelled() or future.exception())
        if timeout is None:
            return await asyncio.shield(self._done)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._done)
        except TimeoutError:
            raise Timeout(f"not sent within {timeout} s; it stays in the outbox") from None

    def _settle(self, result: Sent | None, error: TidingsError | None) -> None:
        self.result, self.error = result, error
        if self._done is not None and not self._done.done():
            if result is not None:
                self._done.set_result(result)
            else:
                assert error is not None
                self._done.set_exception(error)

    def _give_up_waiting(self, error: TidingsError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class _Lane:
    """The messages of one channel, oldest first; `not_before`: monotonic seconds."""

    __slots__ = ("backoff", "not_before", "waiting")

    def __init__(self, backoff: FullJitter) -> None:
        self.waiting: deque[Outgoing] = deque()
        self.backoff = backoff
        self.not_before = 0.0


class Outbox:
    """The client's outbox. Iterate it to see what waits, oldest first per channel.

    `transmit` sends a command on the connection and calls back with its reply (None: the connection was lost first);
    it answers None while there is no connection, otherwise the reference.
    """

    def __init__(
        self,
        store: Store,
        *,
        limit: int,
        transmit: Callable[[SendMessage, Callable[[Reply | None], None]], int | None],
        forget: Callable[[int], None],
        sent: Callable[[Outgoing], None],
        failed: Callable[[Outgoing, TidingsError], None],
        backoff: Callable[[], FullJitter],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._limit = limit
        self._transmit = transmit
        self._forget = forget
        self._on_sent = sent
        self._on_failed = failed
        self._backoff = backoff
        self._clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._flying: set[Outgoing] = set()
        self._count = 0
        self._next = 1
        self._timer: asyncio.TimerHandle | None = None
        # Messages under way at a time; the server tells its bound when connected.
        self.in_flight_max = 16

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Outgoing]:
        return iter([outgoing for lane in self._lanes.values() for outgoing in lane.waiting])

    def restore(self, saved: list[SavedMessage]) -> None:
        """What an earlier run of the program left."""
        for message in saved:
            outgoing = Outgoing(message.n, _decode_command(message.command), message.created_ms)
            outgoing.stored = True
            self._queue(outgoing)
            self._next = max(self._next, message.n + 1)

    async def add(self, command: SendMessage) -> Outgoing:
        """Store a message and send it as soon as possible. Raises OutboxFull, StoreError."""
        if self._count >= self._limit:
            raise OutboxFull(f"{self._count} messages wait already (outbox_max={self._limit})")
        outgoing = Outgoing(self._next, command, int(time.time() * 1000))
        self._next += 1
        # Its place is taken before it is on disk, so that the order of calls is the order of messages.
        self._queue(outgoing)
        try:
            await self._store.add(
                SavedMessage(outgoing.n, command.channel, command.key, codec.encode(command), outgoing.created_ms)
            )
        except BaseException as error:
            if isinstance(error, StoreError) and "UNIQUE" in str(error):
                error = StoreError(f"a message with the key {command.key!r} waits in the outbox already")
            self._remove(outgoing)
            self._store.remove(outgoing.n)  # A cancelled caller: the row may have been written.
            self.pump()
            raise error from None
        outgoing.stored = True
        self.pump()
        return outgoing

    def pump(self) -> None:
        """Send what may be sent now."""
        now = self._clock()
        soonest = 0.0
        for lane in list(self._lanes.values()):
            if len(self._flying) >= self.in_flight_max:
                return
            head = lane.waiting[0]
            if head.ref is not None or not head.stored:
                continue
            if lane.not_before > now:
                soonest = min(soonest or lane.not_before, lane.not_before)
                continue
            if not self._send(head, now):
                return
        if soonest and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(soonest - now, self._again)

    def _again(self) -> None:
        self._timer = None
        self.pump()

    def _send(self, outgoing: Outgoing, now: float) -> bool:
        ref = self._transmit(outgoing.command, lambda reply: self._replied(outgoing, reply))
        if ref is None:
            return False
        outgoing.ref = ref
        outgoing.since = now
        self._flying.add(outgoing)
        return True

    def repeat_unanswered(self) -> None:
        """Send again whose replies have not come in time. Call now and then."""
        now = self._clock()
        for outgoing in [one for one in self._flying if now - one.since > REPLY_SECONDS_MAX]:
            log.warning("no reply to a message for %.0f s: sending it again", REPLY_SECONDS_MAX)
            assert outgoing.ref is not None
            self._forget(outgoing.ref)
            self._landed(outgoing)
        self.pump()

    def _landed(self, outgoing: Outgoing) -> None:
        outgoing.ref = None
        self._flying.discard(outgoing)

    def _replied(self, outgoing: Outgoing, reply: Reply | None) -> None:
        self._landed(outgoing)
        lane = self._lanes.get(outgoing.channel)
        match reply:
            case None:
                return  # The connection is lost; `pump` sends it again on the next one.
            case MessageSent():
                self._remove(outgoing)
                self._store.remove(outgoing.n)
                if lane is not None:
                    lane.backoff.reset()
                outgoing._settle(
                    Sent(
                        channel=reply.channel,
                        id=reply.id,
                        seq=reply.seq,
                        at=reply.at,
                        key=outgoing.key,
                        duplicate=reply.duplicate,
                    ),
                    None,
                )
                self._on_sent(outgoing)
            case ErrorReply() if reply.retry == Retry.LATER and lane is not None:
                delay = lane.backoff.next()
                if reply.retry_after_ms is not None:
                    delay = max(delay, reply.retry_after_ms / 1000)
                lane.not_before = self._clock() + delay
            case ErrorReply() if reply.retry == Retry.AUTH and lane is not None:
                # The connection is about to get a fresh token, or to end.
                lane.not_before = self._clock() + lane.backoff.next()
            case ErrorReply():
                self._fail(outgoing, Refused.of(reply))
            case _:
                self._fail(outgoing, Refused("internal", f"unexpected reply {type(reply).__name__}"))
        self.pump()

    def _fail(self, outgoing: Outgoing, error: TidingsError) -> None:
        self._remove(outgoing)
        self._store.remove(outgoing.n)
        outgoing._settle(None, error)
        self._on_failed(outgoing, error)

    def _queue(self, outgoing: Outgoing) -> None:
        lane = self._lanes.get(outgoing.channel)
        if lane is None:
            lane = self._lanes[outgoing.channel] = _Lane(self._backoff())
        lane.waiting.append(outgoing)
        self._count += 1

    def _remove(self, outgoing: Outgoing) -> None:
        lane = self._lanes.get(outgoing.channel)
        if lane is None or outgoing not in lane.waiting:
            return
        lane.waiting.remove(outgoing)
        self._count -= 1
        if not lane.waiting:
            del self._lanes[outgoing.channel]

    def close(self) -> None:
        """Nobody will send any more in this run: whoever waits is told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for outgoing in self:
            outgoing._give_up_waiting(Closed("the client was closed before the message was sent"))
