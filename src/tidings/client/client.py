"""The client: one device of one user, kept connected.

This is the application's side. `connection` makes the connection and keeps it; `following` catches up and hands events
to the bounded queues of `subscriptions`; what the application writes goes through the `outbox`.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import logging
import random as random_module
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import msgspec

from ..wire.commands import (
    Connect,
    Connected,
    DeviceInfo,
    Heads,
    HeadsReply,
    PresenceReply,
    PresenceSignal,
    ReceiptsSignal,
    Reply,
    SendMessage,
    SetPresence,
    Synced,
    Syncing,
    Typing,
    TypingSignal,
    UnreadSignal,
    WatchPresence,
)
from ..wire.resources import Head, Presence, Receipt
from .backoff import FullJitter
from .channel import COMMAND_SECONDS, TYPING_SECONDS, Channel
from .connection import Connection, Hooks, State, StateChange, TokenProvider
from .errors import (
    Closed,
    NotConnected,
    Refused,
    StoreError,
    StoreMismatch,
    TidingsError,
    Timeout,
)
from .events import (
    EVENT_CLASSES,
    Event,
    SendFailed,
    Signal,
    Source,
)
from .following import Following
from .outbox import OUTBOX_MAX, Outbox, Outgoing
from .store import FileStore, MemoryStore, Store
from .streams import Start
from .subscriptions import QUEUE_MAX, Events, Latest

log = logging.getLogger("tidings.client")

T = TypeVar("T")

# Others see "delivered" within about a second; more often would be traffic that nobody looks at.
ACK_SECONDS = 1.0
# Members whose positions are remembered, so that none is told to go back: 200 bytes each, 2 MB.
RECEIPTS_KEPT_MAX = 10_000


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What an observer is told: `event` given to the application, `invoke`, `ok` and `fail` of a message sent."""

    kind: Literal["event", "invoke", "ok", "fail"]
    event: Event | None = None
    source: Source | None = None
    channel: str | None = None
    key: str | None = None
    text: str | None = None
    seq: int | None = None
    id: str | None = None
    duplicate: bool = False
    error: TidingsError | None = None


Observer = Callable[[Observed], None]


class Client:
    """One device of one user, kept connected.

        async with Client(url, token_provider=fetch_token, device="phone-1", store="chat.db") as chat:
            await chat.channel("ch_1").send("Good morning")
            async for event in chat.events():
                ...

    Entering does not wait for a connection: messages may be written at once and leave when there is one.
    `wait_connected()` waits for it and raises ConnectionRefused when there will never be one.

    token, token_provider: one of them. The provider is asked for a fresh token before the old one expires and when the
        server no longer takes it.
    device: this device's id, the same after every restart; two clients with the same one replace each other.
    store: a file for positions and for messages that wait (one per app, user and device), None to keep them in memory.
    start: what a channel that is not in the store begins with: `now`, or `all` of its events.
    transport: `auto` takes HTTP where a WebSocket does not get through.
    auto_ack: tell the server what this device has (others see `delivered`).
    observer: called with what happens, for tests and audits. It must be quick and must not raise.
    clock, random: monotonic seconds and randomness, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        token_provider: TokenProvider | None = None,
        device: str,
        app: str | None = None,
        store: str | Path | None = None,
        start: Start = "now",
        transport: Literal["auto", "websocket", "http"] = "auto",
        auto_ack: bool = True,
        presence: Literal["online", "invisible"] = "online",
        platform: str | None = None,
        outbox_max: int = OUTBOX_MAX,
        observer: Observer | None = None,
        backoff: Callable[[random_module.Random], FullJitter] | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: random_module.Random | None = None,
    ) -> None:
        if (token is None) == (token_provider is None):
            raise ValueError("give either token or token_provider")
        self._token = token
        self._device = DeviceInfo(id=device, platform=platform)
        self._app = app
        self._presence: Literal["online", "invisible"] = presence
        self._observer = observer
        self._clock = clock
        source = random or random_module.Random()
        make_backoff = backoff or (lambda random: FullJitter(random=random))
        self._store: Store = FileStore(store, on_error=self._store_failed) if store is not None else MemoryStore()
        self._connection = Connection(
            Hooks(
                begin=self._begin,
                greeted=lambda connected: self._following.note_moved(connected.moved),
                enter=self._enter,
                entered=self._entered,
                take_mark=lambda mark: self._following.take_mark(mark),
                forget_mark=lambda: self._following.forget_mark(),
                ticked=self._ticked,
                lost=lambda: self._following.lost(),
                finish=self._finish,
            ),
            url,
            token=token,
            token_provider=token_provider,
            transport=transport,
            name=device,
            backoff=make_backoff(source),
            clock=clock,
            random=source,
        )
        self._following = Following(
            self._connection,
            self._store,
            start=start,
            remembers=store is not None,
            auto_ack=auto_ack,
            observe=self._observe_event if observer is not None else None,
        )
        self._outbox = Outbox(
            self._store,
            limit=outbox_max,
            transmit=self._transmit_message,
            forget=self._connection.forget,
            sent=self._message_sent,
            failed=self._message_failed,
            backoff=lambda: make_backoff(source),
            clock=clock,
        )
        self._connection.handle(
            {
                **dict.fromkeys(EVENT_CLASSES, self._following.on_event),
                Syncing: self._following.on_syncing,
                Synced: self._following.on_synced,
                ReceiptsSignal: self._on_receipts,
                **dict.fromkeys((TypingSignal, PresenceSignal, UnreadSignal), self._on_signal),
            }
        )

        self._main: asyncio.Task[None] | None = None
        self._user: str | None = None
        self._signals: weakref.WeakSet[Latest[Signal]] = weakref.WeakSet()
        # How far members are known to be, the last ones told of; by (channel, epoch, user).
        self._receipts: OrderedDict[tuple[str, str | None, str], tuple[int, int]] = OrderedDict()
        self._callbacks: list[tuple[type[Any], Callable[[Any], Any]]] = []
        self._callback_tasks: list[asyncio.Task[None]] = []
        self._typing_at: dict[str, float] = {}
        self._watched: list[str] = []
        self._next_ack = 0.0

    # ------------------------------------------------------------ life

    async def __aenter__(self) -> Client:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Read the store and begin to connect. Raises StoreInUse, StoreMismatch, StoreError."""
        if self._main is not None or self._connection.closing:
            raise Closed("a client is opened once")
        identity = {"device": self._device.id}
        if self._app is not None:
            identity["app"] = self._app
        if self._token is not None and (subject := _subject_of(self._token)) is not None:
            # Told by the server in a moment; known before it, another user's positions are not even sent.
            identity["user"] = subject
        saved = await self._store.open(identity)
        self._following.restore(saved)
        self._outbox.restore(saved.outbox)
        # owned by the client: `run` reports its own end
        self._main = asyncio.create_task(self._connection.run(), name=f"tidings-client-{self._device.id}")
        self._connection.start_clock()

    async def close(self) -> None:
        """Say goodbye and save. Messages that still wait stay in a durable outbox; in memory they are lost."""
        connection, following = self._connection, self._following
        if connection.closing:
            return
        connection.closing = following.closing = True
        for task in self._callback_tasks:
            task.cancel()
        if self._main is not None:
            if connection.opened and following.unacked:
                following.send_ack()
            await connection.say_goodbye()
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)
        await asyncio.gather(*self._callback_tasks, return_exceptions=True)
        self._finish(None)
        following.save()
        await self._store.close()

    def _finish(self, error: TidingsError | None) -> None:
        """The client stops here: tell everyone who waits for it."""
        if not self._connection.stop(error):
            return
        self._outbox.close()
        self._following.end(error)
        self._connection.end_watchers()
        for signals in list(self._signals):
            signals.end()

    # ------------------------------------------------------------ state

    @property
    def state(self) -> State:
        """Where the connection is now; `states()` tells every change."""
        return self._connection.change.state

    @property
    def error(self) -> TidingsError | None:
        """Why the client has stopped for good, when it has."""
        return self._connection.error

    @property
    def user(self) -> str | None:
        """The user's id, known from the first connection on."""
        return self._user

    @property
    def transport(self) -> str | None:
        """`websocket` or `http`, while connected."""
        return self._connection.transport

    @property
    def session(self) -> Connected | None:
        """What the server said when it connected us last."""
        return self._connection.session

    @property
    def outbox(self) -> Outbox:
        """The messages that wait to be sent."""
        return self._outbox

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until nothing waits in the outbox. Raises Timeout, or why the client has stopped."""
        try:
            async with asyncio.timeout(timeout):
                for outgoing in self._outbox:
                    try:
                        await outgoing.sent()
                    except Refused:
                        pass
        except TimeoutError:
            raise Timeout(f"{len(self._outbox)} messages still wait after {timeout} s") from None

    def states(self) -> Latest[StateChange]:
        """An iterator over the connection's states, beginning with the present one."""
        return self._connection.states()

    async def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until connected. Raises ConnectionRefused (there will be no connection), Closed, Timeout."""
        await self._connection.wait_connected(timeout)

    # ------------------------------------------------------------ what the application reads

    def events(self, *channels: str, queue_size: int = QUEUE_MAX) -> Events:
        """Durable events of all streams, or of these channels (`@me`: the user's own stream).

        See `Events` for what is promised. Several iterators may run: each gets every event, and a position moves when
        all of them have taken it. Events that nobody iterates are not lost, those of `@me` included: they wait in the
        server's log, and the next iterator begins with them.
        """
        if queue_size < 2:
            raise ValueError("queue_size must be at least 2")
        return self._following.subscribe(frozenset(channels) if channels else None, queue_size)

    @overload
    def signals(self) -> Latest[Signal]: ...

    @overload
    def signals(self, kind: type[T]) -> Latest[T]: ...

    def signals(self, kind: type[Any] | None = None) -> Latest[Any]:
        """Typing, presence, receipts, unread counts, failed messages: best effort, all of them or of one class."""
        signals: Latest[Any] = Latest(
            left=self._signals.discard, wants=None if kind is None else lambda item: isinstance(item, kind)
        )
        if self.state is State.CLOSED:
            signals.end()
        else:
            self._signals.add(signals)
        return signals

    def on(self, kind: type[T], callback: Callable[[T], Any]) -> None:
        """Call `callback` (plain or async) with every event or signal of a class, one at a time, in order.

        An event counts as taken when its callbacks have returned. An exception is logged, and the next event comes.
        """
        first = not self._callbacks
        self._callbacks.append((kind, callback))
        if first:
            self._callback_tasks = [
                # owned by the client, which cancels it
                asyncio.create_task(self._call_back(self.events()), name="tidings-callbacks"),
                # owned by the client, which cancels it
                asyncio.create_task(self._call_back(self.signals()), name="tidings-callbacks-signals"),
            ]

    async def _call_back(self, items: AsyncIterator[Any]) -> None:
        try:
            async for item in items:
                for kind, callback in list(self._callbacks):
                    if isinstance(item, kind):
                        try:
                            answer = callback(item)
                            if inspect.isawaitable(answer):
                                await answer
                        except Exception:
                            log.exception("a callback for %s failed", type(item).__name__)
        except TidingsError:
            pass  # The client has stopped; `error` and `states()` say so.

    def channel(self, id: str) -> Channel:
        """A channel by its id; nothing is asked, so it need not exist."""
        return Channel(self, id)

    def position(self, stream: str) -> int | None:
        """The seq of the last event of a stream that the application has taken; None when it is not followed."""
        known = self._following.streams.get(stream)
        return known.taken if known is not None else None

    async def heads(self, *, timeout: float = COMMAND_SECONDS) -> list[Head]:
        """Where all of the user's streams stand, with unread counts."""
        heads: list[Head] = []
        cursor: str | None = None
        while True:
            reply = await self._connection.command(Heads(cursor=cursor), HeadsReply, timeout=timeout)
            heads += reply.moved
            if reply.more is None:
                return heads
            cursor = reply.more

    # ------------------------------------------------------------ what the application says

    async def watch_presence(self, users: list[str], *, timeout: float = COMMAND_SECONDS) -> list[Presence]:
        """Be told (by signals) when these users come and go; replaces the list before. Answers where they are now."""
        self._watched = list(users)
        return (await self._connection.command(WatchPresence(users=users), PresenceReply, timeout=timeout)).users

    async def set_presence(self, status: Literal["online", "invisible"], *, timeout: float = COMMAND_SECONDS) -> None:
        """Be seen as online, or not at all."""
        self._presence = status
        await self._connection.command(SetPresence(status=status), None, timeout=timeout)

    async def _send(self, channel: str, *, key: str | None, **content: Any) -> Outgoing:
        if self.state is State.CLOSED or self._connection.closing:
            raise self.error or Closed("the client was closed")
        if self._main is None:
            raise NotConnected("open the client first: `async with Client(…) as chat`")
        try:
            # The bounds of the wire are checked here: what can never be accepted must not enter the outbox.
            command = msgspec.convert(
                {"type": "message.send", "channel": channel, "key": key or uuid.uuid4().hex, **content}, SendMessage
            )
        except msgspec.ValidationError as error:
            message, _, path = str(error).partition(" - at ")
            raise Refused("invalid_field", message, field=path.strip("`$.") or None) from None
        if self._observer is not None:
            self._observer(Observed(kind="invoke", channel=channel, key=command.key, text=command.text))
        try:
            return await self._outbox.add(command)
        except TidingsError as error:
            if self._observer is not None:
                self._observer(Observed(kind="fail", channel=channel, key=command.key, text=command.text, error=error))
            raise

    def _typing(self, command: Typing) -> None:
        if not self._connection.opened:
            return
        now = self._clock()
        if command.on:
            if now - self._typing_at.get(command.channel, float("-inf")) < TYPING_SECONDS:
                return
            self._typing_at[command.channel] = now
        elif self._typing_at.pop(command.channel, None) is None:
            return
        self._connection.transmit(command)

    def _transmit_message(self, command: SendMessage, answer: Callable[[Reply | None], None]) -> int | None:
        # Without a mark this device is about to learn the heads, which are where its streams begin: a message that was
        # sent before that would lie behind them, and its own sender would not be told of it.
        ready = self._connection.identified and self._following.mark is not None
        return self._connection.transmit(command, answer) if ready else None

    def _message_sent(self, outgoing: Outgoing) -> None:
        result = outgoing.result
        if self._observer is not None and result is not None:
            self._observer(
                Observed(
                    kind="ok",
                    channel=result.channel,
                    key=result.key,
                    text=outgoing.text,
                    seq=result.seq,
                    id=result.id,
                    duplicate=result.duplicate,
                )
            )

    def _message_failed(self, outgoing: Outgoing, error: TidingsError) -> None:
        if self._observer is not None:
            self._observer(
                Observed(kind="fail", channel=outgoing.channel, key=outgoing.key, text=outgoing.text, error=error)
            )
        self._on_signal(
            SendFailed(
                channel=outgoing.channel,
                key=outgoing.key,
                text=outgoing.text,
                code=error.code if isinstance(error, Refused) else "internal",
                detail=str(error),
            )
        )

    def _on_receipts(self, signal: ReceiptsSignal) -> None:
        """Positions only move forward: what one server tells may be older than what another one has told before it."""
        stream = self._following.streams.get(signal.channel)
        known, moved = self._receipts, []
        for receipt in signal.receipts:
            key = (signal.channel, None if stream is None else stream.epoch, receipt.user)
            before = known.get(key, (0, 0))
            known[key] = max(before[0], receipt.delivered), max(before[1], receipt.read)
            known.move_to_end(key)
            # A zero means that it did not move.
            delivered = receipt.delivered if receipt.delivered >= before[0] else 0
            read = receipt.read if receipt.read >= before[1] else 0
            if delivered or read:
                moved.append(Receipt(user=receipt.user, delivered=delivered, read=read))
        while len(known) > RECEIPTS_KEPT_MAX:
            known.popitem(last=False)
        if moved:
            self._on_signal(ReceiptsSignal(channel=signal.channel, receipts=moved))

    def _on_signal(self, signal: Signal) -> None:
        for signals in list(self._signals):
            signals.put(signal)

    def _observe_event(self, event: Event, source: Source) -> None:
        assert self._observer is not None
        self._observer(Observed(kind="event", event=event, source=source))

    # ------------------------------------------------------------ the connection's side

    def _begin(self, token: str) -> Connect:
        self._following.begin()
        return Connect(
            token=token,
            app=self._app,
            device=self._device,
            since=self._following.mark,
            presence=self._presence,
            client="tidings-python",
        )

    async def _enter(self, connected: Connected) -> None:
        """Between `connected` and being connected: whose it is, what moved, which streams are held."""
        identity = {"user": connected.user}
        if self._app is not None:
            identity["app"] = self._app
        if self._user is not None and self._user != connected.user:
            raise StoreMismatch(f"the token is of {connected.user!r}, this client is {self._user!r}")
        await self._store.identify(identity)
        self._user = connected.user
        self._connection.identify()
        # Half of what the server allows is for messages, a few for the client itself, the rest for commands.
        self._outbox.in_flight_max = max(1, connected.limits.in_flight // 2)
        self._connection.limit_commands(connected.limits.in_flight - self._outbox.in_flight_max - 4)
        self._outbox.pump()
        await self._following.catch_up(connected)

    def _entered(self, connected: Connected) -> None:
        self._next_ack = self._clock()
        self._following.take_mark(connected.mark)
        self._following.resync()
        self._outbox.pump()
        if self._watched:
            self._connection.transmit(WatchPresence(users=self._watched), lambda reply: None)

    def _ticked(self, now: float) -> None:
        if self._connection.opened and self._following.unacked and now >= self._next_ack:
            self._next_ack = now + ACK_SECONDS
            self._following.send_ack()
        self._outbox.repeat_unanswered()

    def _store_failed(self, error: StoreError) -> None:
        log.error("%s", error)


def _subject_of(token: str) -> str | None:
    """The `sub` claim of a JWT, unverified: only compared with what the store says; the server has the last word."""
    try:
        payload = token.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        subject = claims["sub"]
    except (IndexError, ValueError, KeyError, TypeError, msgspec.DecodeError):
        return None
    return subject if isinstance(subject, str) else None
