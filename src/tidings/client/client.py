"""The client: one device of one user, kept connected.

A task of its own connects, and connects again. Frames are handled as they arrive, without a task switch:
`_on_frame` decodes one and hands it to the handler of its class. What the application sees goes through the bounded
queues of `subscriptions`; what it writes goes through the `outbox`.
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
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar, overload

import msgspec

from ..wire import codec
from ..wire.commands import (
    Ack,
    Authenticate,
    Authenticated,
    Command,
    Connect,
    Connected,
    DeviceInfo,
    ErrorReply,
    GoingAway,
    Heads,
    HeadsReply,
    Ping,
    Pong,
    Position,
    PresenceReply,
    PresenceSignal,
    ReceiptsSignal,
    Reply,
    SendMessage,
    SetPresence,
    Sync,
    Synced,
    Syncing,
    Typing,
    TypingSignal,
    UnreadSignal,
    WatchPresence,
)
from ..wire.problems import CATALOGUE, Retry
from ..wire.resources import Head, Presence
from .backoff import STABLE_AFTER_SECONDS, FullJitter
from .channel import COMMAND_SECONDS, TYPING_SECONDS, Channel
from .errors import (
    Closed,
    ConnectionRefused,
    NotConnected,
    OutcomeUnknown,
    ProtocolError,
    Refused,
    StoreError,
    StoreMismatch,
    TidingsError,
    Timeout,
)
from .events import (
    EVENT_CLASSES,
    ChannelJoined,
    ChannelLeft,
    Event,
    HistoryReset,
    SendFailed,
    Signal,
    Source,
    decode_frame,
)
from .outbox import OUTBOX_MAX, Outbox, Outgoing
from .store import FileStore, MemoryStore, SavedStream, Store
from .streams import FRUITLESS_SYNCS_MAX, OWN_STREAM, Start, Stream, Streams, batches
from .subscriptions import OVERFLOW_FACTOR, QUEUE_MAX, Delivery, Events, Feed, Latest
from .transport import (
    HttpTransport,
    SocketBlocked,
    Transport,
    open_http,
    open_websocket,
)

log = logging.getLogger("tidings.client")

T = TypeVar("T")
R = TypeVar("R", bound=Reply)

TokenProvider = Callable[[], Awaitable[str]]

# How often a client looks at its clocks: heartbeats are seconds, acknowledgements at most one a second.
TICK_SECONDS = 0.25
ACK_SECONDS = 1.0
# Positions reach the disk this long after they moved: a crash repeats at most that much to the application.
SAVE_SECONDS = 0.1
# The server waits 5 s for our first frame; its answer has the way there and back on top.
CONNECTED_SECONDS_MAX = 10.0
# A fresh token is fetched when this part of the old one's life is left, but at most REFRESH_SECONDS_MAX before its end.
REFRESH_FRACTION = 0.2
REFRESH_SECONDS_MAX = 300.0
# How long a network that blocks WebSockets is believed to go on doing so.
BLOCKED_SECONDS = 600.0
# Commands waiting for their replies, until the server tells its bound.
IN_FLIGHT_DEFAULT = 16
# How long closing waits for the goodbye, and for the outbox's last replies.
CLOSE_SECONDS = 3.0

_OWN_EVENTS: Final = (ChannelJoined, ChannelLeft)


class State(StrEnum):
    """Where the connection is. `waiting`: between two attempts. `closed`: for good (`Client.error` says why)."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    CLOSED = "closed"


class StateChange(msgspec.Struct, frozen=True, kw_only=True):
    """`retry_in`: seconds to the next attempt, when `waiting`. `transport`: `websocket` or `http`, when connected."""

    state: State
    reason: str = ""
    retry_in: float | None = None
    transport: str | None = None


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


class _Ending(msgspec.Struct):
    """Why a connection ended."""

    code: int | None = None
    reason: str = ""
    refused: Refused | None = None
    reconnect_in: float | None = None


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
        self._url = url
        self._token = token
        self._token_provider = token_provider
        self._device = DeviceInfo(id=device, platform=platform)
        self._app = app
        self._transport_wanted = transport
        self._auto_ack = auto_ack
        self._presence: Literal["online", "invisible"] = presence
        self._observer = observer
        self._clock = clock
        self._random = random or random_module.Random()
        make_backoff = backoff or (lambda random: FullJitter(random=random))
        self._backoff = make_backoff(self._random)
        self._store: Store = FileStore(store, on_error=self._store_failed) if store is not None else MemoryStore()
        self._remembers = store is not None
        self._streams = Streams(start)
        self._start = start
        self._outbox = Outbox(
            self._store,
            limit=outbox_max,
            transmit=self._transmit_message,
            forget=lambda ref: self._pending.pop(ref, None) and None,
            sent=self._message_sent,
            failed=self._message_failed,
            backoff=lambda: make_backoff(self._random),
            clock=clock,
        )

        self._main: asyncio.Task[None] | None = None
        self._closing = False
        self._error: TidingsError | None = None
        self._change = StateChange(state=State.CONNECTING)
        self._watchers: weakref.WeakSet[Latest[StateChange]] = weakref.WeakSet()
        self._signals: weakref.WeakSet[Latest[Signal]] = weakref.WeakSet()
        self._callbacks: list[tuple[type[Any], Callable[[Any], Any]]] = []
        self._callback_tasks: list[asyncio.Task[None]] = []
        self._feeds: list[Feed] = []

        # The connection.
        self._user: str | None = None
        self._session: Connected | None = None
        self._transport: Transport | None = None
        self._opened = False
        self._paused = False
        self._ended: asyncio.Future[_Ending] | None = None
        self._greeted: asyncio.Future[Connected] | None = None
        self._own_synced: asyncio.Event = asyncio.Event()
        self._held: dict[str, Head] = {}
        self._refusal: Refused | None = None
        self._going_away: float | None = None
        self._next_ref = 0
        self._pending: dict[int, Callable[[Reply | None], None]] = {}
        self._command_slots = asyncio.Semaphore(IN_FLIGHT_DEFAULT)
        self._blocked_until = float("-inf")
        self._auth_failures = 0
        self._fresh_token_due = False
        self._tick_handle: asyncio.TimerHandle | None = None
        self._last_frame = 0.0
        self._next_ping = 0.0
        self._next_refresh: float | None = None
        self._refresh_task: asyncio.Task[None] | None = None
        # The server's clock minus ours, seconds.
        self._server_ahead = 0.0
        self._typing_at: dict[str, float] = {}
        self._watched: list[str] = []

        # What is to be saved and acknowledged.
        self._mark: str | None = None
        self._mark_dirty = False
        self._dirty: dict[str, Stream] = {}
        self._save_handle: asyncio.TimerHandle | None = None
        self._unacked: dict[str, Stream] = {}
        self._next_ack = 0.0

        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Connected: self._on_connected,
            Pong: self._on_pong,
            Synced: self._on_synced,
            Syncing: self._on_syncing,
            ErrorReply: self._on_error,
            GoingAway: self._on_going_away,
            TypingSignal: self._on_signal,
            PresenceSignal: self._on_signal,
            ReceiptsSignal: self._on_signal,
            UnreadSignal: self._on_signal,
            **dict.fromkeys(EVENT_CLASSES, self._on_event),
        }

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
        if self._main is not None or self._closing:
            raise Closed("a client is opened once")
        identity = {"device": self._device.id}
        if self._app is not None:
            identity["app"] = self._app
        if self._token is not None and (subject := _subject_of(self._token)) is not None:
            # Told by the server in a moment; known before it, another user's positions are not even sent.
            identity["user"] = subject
        saved = await self._store.open(identity)
        self._mark = saved.mark
        for row in saved.streams:
            stream = self._streams.adopt(row.name, row.epoch, row.seq)
            stream.behind = row.open
        self._outbox.restore(saved.outbox)
        # owned by the client: `_run` reports its own end
        self._main = asyncio.create_task(self._run(), name=f"tidings-client-{self._device.id}")
        self._tick_handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    async def close(self) -> None:
        """Say goodbye and save. Messages that still wait stay in a durable outbox; in memory they are lost."""
        if self._closing:
            return
        self._closing = True
        for task in self._callback_tasks:
            task.cancel()
        if self._main is not None:
            if self._opened and self._unacked:
                self._send_ack()
            if self._transport is not None:
                self._resume()
                self._transport.close()
            ended = self._ended
            if ended is not None and not ended.done():
                await asyncio.wait([ended], timeout=CLOSE_SECONDS)
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)
        await asyncio.gather(*self._callback_tasks, return_exceptions=True)
        self._finish(None)
        self._save()
        await self._store.close()

    def _finish(self, error: TidingsError | None) -> None:
        """The client stops here: tell everyone who waits for it."""
        if self._change.state is State.CLOSED:
            return
        self._error = error
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        self._set_state(State.CLOSED, str(error) if error else "closed")
        self._outbox.close()
        self._lose_pending()
        for feed in self._feeds:
            feed.end(error)
        for watcher in list(self._watchers):
            watcher.end()
        for signals in list(self._signals):
            signals.end()

    # ------------------------------------------------------------ state

    @property
    def state(self) -> State:
        """Where the connection is now; `states()` tells every change."""
        return self._change.state

    @property
    def error(self) -> TidingsError | None:
        """Why the client has stopped for good, when it has."""
        return self._error

    @property
    def user(self) -> str | None:
        """The user's id, known from the first connection on."""
        return self._user

    @property
    def transport(self) -> str | None:
        """`websocket` or `http`, while connected."""
        return self._transport.name if self._transport is not None else None

    @property
    def session(self) -> Connected | None:
        """What the server said when it connected us last."""
        return self._session

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
        watcher: Latest[StateChange] = Latest(left=self._watchers.discard)
        watcher.put(self._change)
        if self._change.state is State.CLOSED:
            watcher.end()
        else:
            self._watchers.add(watcher)
        return watcher

    async def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until connected. Raises ConnectionRefused (there will be no connection), Closed, Timeout."""
        if self._change.state is State.CONNECTED:
            return
        try:
            async with asyncio.timeout(timeout):
                async for change in self.states():
                    if change.state is State.CONNECTED:
                        return
        except TimeoutError:
            raise Timeout(f"not connected within {timeout} s ({self._change.reason or self.state})") from None
        raise self._error or Closed("the client was closed")

    def _set_state(
        self, state: State, reason: str = "", *, retry_in: float | None = None, transport: str | None = None
    ) -> None:
        change = StateChange(state=state, reason=reason, retry_in=retry_in, transport=transport)
        if change == self._change:
            return
        self._change = change
        log.debug("%s: %s %s", self._device.id, state, reason)
        for watcher in list(self._watchers):
            watcher.put(self._change)

    # ------------------------------------------------------------ what the application reads

    def events(self, *channels: str, queue_size: int = QUEUE_MAX) -> Events:
        """Durable events of all streams, or of these channels (`@me`: the user's own stream).

        See `Events` for what is promised. Several iterators may run: each gets every event, and a position moves when
        all of them have taken it. Events of channels that nobody iterates are not lost: they wait in the server's log.
        """
        if queue_size < 2:
            raise ValueError("queue_size must be at least 2")
        feed = Feed(frozenset(channels) if channels else None, queue_size)
        self._feeds.append(feed)
        if self._change.state is State.CLOSED:
            feed.end(self._error)
        for stream in self._streams:
            stream.feeds = None
        # The other side calls back on a client that may be gone.
        iterator = Events(
            feed,
            taken=self._taken,
            given=self._observe_event if self._observer is not None else None,
            room=self._has_room,
            left=self._feed_left,
        )
        self._resync()
        return iterator

    @overload
    def signals(self) -> Latest[Signal]: ...

    @overload
    def signals(self, kind: type[T]) -> Latest[T]: ...

    def signals(self, kind: type[Any] | None = None) -> Latest[Any]:
        """Typing, presence, receipts, unread counts, failed messages: best effort, all of them or of one class."""
        signals: Latest[Any] = Latest(
            left=self._signals.discard, wants=None if kind is None else lambda item: isinstance(item, kind)
        )
        if self._change.state is State.CLOSED:
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
        known = self._streams.get(stream)
        return known.taken if known is not None else None

    async def heads(self, *, timeout: float = COMMAND_SECONDS) -> list[Head]:
        """Where all of the user's streams stand, with unread counts."""
        heads: list[Head] = []
        cursor: str | None = None
        while True:
            reply = await self._command(Heads(cursor=cursor), HeadsReply, timeout=timeout)
            heads += reply.moved
            if reply.more is None:
                return heads
            cursor = reply.more

    # ------------------------------------------------------------ what the application says

    async def watch_presence(self, users: list[str], *, timeout: float = COMMAND_SECONDS) -> list[Presence]:
        """Be told (by signals) when these users come and go; replaces the list before. Answers where they are now."""
        self._watched = list(users)
        return (await self._command(WatchPresence(users=users), PresenceReply, timeout=timeout)).users

    async def set_presence(self, status: Literal["online", "invisible"], *, timeout: float = COMMAND_SECONDS) -> None:
        """Be seen as online, or not at all."""
        self._presence = status
        await self._command(SetPresence(status=status), None, timeout=timeout)

    async def _send(self, channel: str, *, key: str | None, **content: Any) -> Outgoing:
        if self._change.state is State.CLOSED or self._closing:
            raise self._error or Closed("the client was closed")
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
        if not self._opened:
            return
        now = self._clock()
        if command.on:
            if now - self._typing_at.get(command.channel, float("-inf")) < TYPING_SECONDS:
                return
            self._typing_at[command.channel] = now
        elif self._typing_at.pop(command.channel, None) is None:
            return
        self._transmit(command)

    @overload
    async def _command(self, command: Command, kind: type[R], *, timeout: float, repeatable: bool = True) -> R: ...

    @overload
    async def _command(self, command: Command, kind: None, *, timeout: float, repeatable: bool = True) -> Reply: ...

    async def _command(
        self, command: Command, kind: type[Any] | None, *, timeout: float, repeatable: bool = True
    ) -> Any:
        """Send a command and wait for its reply, over reconnects when it may be repeated."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self.wait_connected()
                    try:
                        return await self._ask(command, kind)
                    except OutcomeUnknown:
                        if not repeatable:
                            raise
                    except NotConnected:
                        pass
                    await asyncio.sleep(0)  # Let the connection's owner notice that it is gone.
        except TimeoutError as error:
            if isinstance(error, Timeout):
                raise
            raise Timeout(f"no answer to {type(command).__name__} within {timeout} s") from None

    async def _ask(self, command: Command, kind: type[Any] | None) -> Any:
        """Send a command on this connection and wait for its reply."""
        async with self._command_slots:
            future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

            def answer(reply: Reply | None) -> None:
                if not future.done():
                    future.set_result(reply)

            ref = self._transmit(command, answer)
            if ref is None:
                raise NotConnected("there is no connection")
            try:
                reply = await future
            finally:
                self._pending.pop(ref, None)
        if reply is None:
            raise OutcomeUnknown("the connection broke before the answer came")
        if isinstance(reply, ErrorReply):
            raise Refused.of(reply)
        if kind is not None and not isinstance(reply, kind):
            raise ProtocolError(f"{type(command).__name__} was answered with {type(reply).__name__}")
        return reply

    def _transmit(self, command: Command, answer: Callable[[Reply | None], None] | None = None) -> int | None:
        """Put a command on the wire; its ref when there is a connection. `answer` is called once."""
        if self._transport is None:
            return None
        self._next_ref = ref = self._next_ref + 1
        if answer is None:
            self._transport.send(codec.encode(command))
            return ref
        self._pending[ref] = answer
        # The reply comes behind the events that wait in the network: it must be read on.
        self._resume()
        self._transport.send(codec.encode(msgspec.structs.replace(command, ref=ref)))
        return ref

    def _transmit_message(self, command: SendMessage, answer: Callable[[Reply | None], None]) -> int | None:
        return self._transmit(command, answer) if self._session is not None and self._identified else None

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

    # ------------------------------------------------------------ connecting

    _identified = False

    async def _run(self) -> None:
        """The client's one owned task: connect, live, wait, again."""
        try:
            while not self._closing:
                self._set_state(State.CONNECTING)
                began = self._clock()
                ending = await self._live_once()
                if self._closing:
                    return
                lived = self._clock() - began if self._session is not None else 0.0
                self._session = None
                fatal = self._fatal(ending)
                if fatal is not None:
                    self._finish(fatal)
                    return
                delay = self._delay(ending, lived)
                self._set_state(State.WAITING, ending.reason, retry_in=delay)
                await asyncio.sleep(delay)
        except asyncio.CancelledError:
            raise
        except TidingsError as error:
            self._finish(error)
        except Exception as error:
            log.exception("the client stopped on an error of its own")
            failure = ProtocolError(f"internal error of the client: {error!r}")
            failure.__cause__ = error
            self._finish(failure)

    async def _live_once(self) -> _Ending:
        """One connection from its beginning to its end."""
        try:
            token = await self._current_token()
        except Exception as error:
            log.warning("the token provider failed: %r", error)
            return _Ending(reason=f"token provider: {error!r}")
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._greeted = loop.create_future()
        self._refusal = None
        self._going_away = None
        self._opened = False
        self._paused = False
        self._identified = False
        self._held = {}
        self._own_synced.clear()
        first = codec.encode(
            Connect(
                token=token,
                app=self._app,
                device=self._device,
                since=self._mark,
                presence=self._presence,
                client="tidings-python",
            )
        )
        try:
            self._transport = await self._open_transport(token, first)
        except Refused as error:
            return _Ending(reason=error.code, refused=error)
        except NotConnected as error:
            return _Ending(reason=str(error))
        ended = self._ended
        try:
            self._last_frame = self._clock()
            watched: list[asyncio.Future[Any]] = [self._greeted, ended]
            await asyncio.wait(watched, timeout=CONNECTED_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
            if self._greeted.done():
                await self._open_until(ended, self._greeted.result())
            elif not ended.done():
                if self._transport.name == "websocket" and self._transport_wanted == "auto":
                    # An upgrade that is followed by silence: some proxies do that.
                    self._blocked_until = self._clock() + BLOCKED_SECONDS
                return _Ending(reason="the server did not answer the connection")
            return await ended
        except (NotConnected, Refused, ProtocolError) as error:
            return _Ending(reason=str(error))
        finally:
            if not ended.done():
                self._transport.abort()
                await asyncio.wait([ended], timeout=CLOSE_SECONDS)
            self._transport = None
            self._opened = False
            self._next_refresh = None
            self._lose_pending()
            self._streams.lost_connection()

    async def _open_until(self, ended: asyncio.Future[_Ending], connected: Connected) -> None:
        """Open the session; when the connection ends meanwhile, so does the opening."""
        # owned by this method, which awaits it
        opening = asyncio.create_task(self._open_session(connected), name="tidings-opening")
        ended.add_done_callback(lambda _: opening.cancel())
        try:
            await opening
        except asyncio.CancelledError:
            if not ended.done() or self._closing:
                opening.cancel()
                raise

    async def _open_transport(self, token: str, first: bytes) -> Transport:
        wanted = self._transport_wanted
        if wanted == "websocket" or (wanted == "auto" and self._clock() >= self._blocked_until):
            try:
                return await open_websocket(self._url, first, on_frame=self._on_frame, on_closed=self._on_closed)
            except SocketBlocked as error:
                if wanted == "websocket":
                    raise
                log.info("%s; trying HTTP", error)
        try:
            transport = await open_http(self._url, token, first, on_frame=self._on_frame, on_closed=self._on_closed)
        except Refused as error:
            if wanted == "auto" and error.code in ("not_found", "method_not_allowed", "invalid"):
                # Not our server's word on us: it (or what stands before it) has no such door. Try the socket again.
                self._blocked_until = float("-inf")
                raise NotConnected(f"neither WebSocket nor HTTP gets through: {error}") from error
            raise
        if wanted == "auto":
            # It is the socket that is blocked, not the server that is away.
            self._blocked_until = max(self._blocked_until, self._clock() + BLOCKED_SECONDS)
        return transport

    async def _open_session(self, connected: Connected) -> None:
        """Between `connected` and being connected: learn what moved, name the streams that are held."""
        identity = {"user": connected.user}
        if self._app is not None:
            identity["app"] = self._app
        if self._user is not None and self._user != connected.user:
            raise StoreMismatch(f"the token is of {connected.user!r}, this client is {self._user!r}")
        await self._store.identify(identity)
        self._user = connected.user
        self._identified = True
        self._auth_failures = 0
        self._outbox.in_flight_max = max(1, connected.limits.in_flight // 2)
        self._command_slots = asyncio.Semaphore(max(1, connected.limits.in_flight - self._outbox.in_flight_max - 4))
        self._outbox.pump()
        since, more = self._mark, connected.more
        while more is not None:
            page = await self._ask(Heads(since=since, cursor=more), HeadsReply)
            self._note_moved(page.moved)
            more = page.more
        if since is None:
            await self._learn_heads()
        # The own stream first: it tells which channels were joined and left meanwhile.
        own = self._streams.get(OWN_STREAM)
        if own is not None and own.behind:
            self._resync()
            while own.asked:
                self._own_synced.clear()
                await self._own_synced.wait()
        for name, head in self._held.items():
            if self._streams.get(name) is None:
                stream = self._streams.adopt_head(name, head.epoch, head.head)
                stream.behind = True
                self._touch(stream)
        self._held = {}
        self._opened = True
        self._take_mark(connected.mark)
        self._resync()
        if self._watched:
            self._transmit(WatchPresence(users=self._watched), lambda reply: None)
        self._set_state(State.CONNECTED, transport=self.transport)

    async def _learn_heads(self) -> None:
        """A device without a mark: every stream's head is where it begins, or is compared with what it has."""
        cursor: str | None = None
        while True:
            page = await self._ask(Heads(cursor=cursor), HeadsReply)
            for head in page.moved:
                stream = self._streams.get(head.stream)
                if stream is None:
                    # The own stream's past is about channels that the heads tell anyway.
                    if head.stream == OWN_STREAM:
                        stream = self._streams.adopt(head.stream, head.epoch, head.head)
                    else:
                        stream = self._streams.adopt_head(head.stream, head.epoch, head.head)
                        stream.behind = stream.received < head.head
                    self._touch(stream)
                else:
                    self._compare(stream, head, must_name=False)
            if page.more is None:
                return
            cursor = page.more

    def _note_moved(self, moved: list[Head]) -> None:
        """These streams are held by the server until they are named."""
        for head in moved:
            stream = self._streams.get(head.stream)
            if stream is not None:
                self._compare(stream, head, must_name=True)
            elif head.stream == OWN_STREAM:
                self._streams.adopt(head.stream, head.epoch, head.head).behind = True
            else:
                # Joined while away: the own stream will tell from where.
                self._held[head.stream] = head

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

    def _on_closed(self, code: int | None, reason: str) -> None:
        refused = self._refusal
        if refused is None and code is not None and code >= 4000:
            entry = CATALOGUE.get(reason) or next((one for one in CATALOGUE.values() if one.close == code), None)
            refused = Refused(entry.code if entry else "internal", retry=entry.retry.value if entry else None)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(
                _Ending(
                    code=code,
                    reason=reason or (refused.code if refused else "the connection broke"),
                    refused=refused,
                    reconnect_in=self._going_away,
                )
            )
        self._transport = None
        if self._change.state is State.CONNECTED and not self._closing:
            self._set_state(State.WAITING, reason)
        self._lose_pending()

    def _fatal(self, ending: _Ending) -> TidingsError | None:
        """Does this end mean that the client must not come back?"""
        refused, code = ending.refused, ending.code
        if refused is None:
            return None
        final = 4500 <= code < 5000 if code is not None and code >= 4000 else refused.retry == Retry.NEVER
        if refused.code in ("cursor_invalid", "cursor_expired"):
            # The server does not know our mark any more: connect without it and compare all heads.
            self._mark = None
            return None
        if refused.retry == Retry.AUTH and refused.code != "auth_timeout":
            # A token that cannot be replaced is not worth a second try.
            final = final or self._token_provider is None
            self._fresh_token_due = True
        if not final:
            return None
        error = ConnectionRefused(
            refused.code,
            refused.detail,
            field=refused.field,
            bound=refused.bound,
            retry=refused.retry,
            status=refused.status,
        )
        error.close_code = code
        return error

    def _delay(self, ending: _Ending, lived: float) -> float:
        """Seconds until the next attempt."""
        if lived >= STABLE_AFTER_SECONDS:
            self._backoff.reset()
        if self._fresh_token_due:
            self._auth_failures += 1
            if self._auth_failures == 1:
                return 0.0
        delay = self._backoff.next()
        if ending.reconnect_in is not None:
            # The server spreads its clients itself; a little of ours keeps two of them apart.
            return ending.reconnect_in + min(delay, 0.5)
        if ending.refused is not None and ending.refused.retry_after is not None:
            delay += ending.refused.retry_after
        return delay

    async def _current_token(self) -> str:
        if self._token_provider is not None and (self._token is None or self._fresh_token_due):
            self._token = await self._token_provider()
            self._fresh_token_due = False
        assert self._token is not None
        return self._token

    async def _refresh(self) -> None:
        """Give the living connection a fresh token."""
        assert self._token_provider is not None
        try:
            self._token = token = await self._token_provider()
            if isinstance(self._transport, HttpTransport):
                self._transport.authorize(token)
            reply = await self._ask(Authenticate(token=token), Authenticated)
        except asyncio.CancelledError:
            raise
        except NotConnected:
            return
        except Exception as error:
            # The old token is good for a while yet; at its end the server closes with 4401, and we come back.
            log.warning("refreshing the token failed: %r", error)
            self._fresh_token_due = True
            if self._session is not None:
                self._next_refresh = self._clock() + self._backoff.bound() + 1.0
            return
        self._fresh_token_due = False
        self._plan_refresh(reply.expires_at.timestamp() - time.time() - self._server_ahead)

    def _plan_refresh(self, seconds_left: float) -> None:
        if self._token_provider is not None:
            lead = min(REFRESH_SECONDS_MAX, max(seconds_left, 0.0) * REFRESH_FRACTION)
            self._next_refresh = self._clock() + max(0.0, seconds_left - lead)

    # ------------------------------------------------------------ frames

    def _on_frame(self, data: bytes) -> None:
        self._last_frame = self._clock()
        try:
            frame: Any = decode_frame(data)
        except msgspec.DecodeError:
            # A frame type of a newer server, without a place in a stream: nothing depends on it.
            log.debug("a frame that this version does not know was skipped")
            return
        handler = self._handlers.get(type(frame))
        if handler is not None:
            handler(frame)
            return
        ref = frame.ref
        answer = self._pending.pop(ref, None) if ref is not None else None
        if answer is not None:
            answer(frame)

    def _on_event(self, event: Any) -> None:
        name: str = event.stream
        seq: int = event.seq
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams.adopt_live(name, seq)
            # Its epoch comes with the answer: without one, a restored backup could go unnoticed.
            self._transmit(Sync(positions={name: Position(seq=stream.received)}))
        if seq != stream.received + 1:
            if stream.judge(seq) == "gap":
                stream.behind = True
                self._touch(stream)
                self._resync()
            return
        feeds = stream.feeds
        if feeds is None:
            feeds = stream.feeds = tuple(feed for feed in self._feeds if feed.wants(name))
        if feeds:
            for feed in feeds:
                waiting = len(feed.queue)
                if waiting >= feed.limit:
                    if waiting >= feed.limit * OVERFLOW_FACTOR:
                        # Not kept; asked for again when there is room. Until then the stream stands still.
                        stream.behind = True
                        self._touch(stream)
                        return
                    if not self._pending and self._opened:
                        self._pause()
            stream.received = seq
            stream.fruitless = 0
            self._deliver(stream, event, seq, feeds)
            if self._remembers:
                # Open until it is taken: a mark that is saved meanwhile must not vouch for it.
                self._touch(stream)
        elif name == OWN_STREAM:
            # The client itself is interested in this one.
            stream.received = stream.taken = seq
            self._touch(stream)
        else:
            if not stream.behind:
                stream.behind = True
                self._touch(stream)
            return
        if isinstance(event, _OWN_EVENTS):
            self._on_own_event(event, stream)

    def _deliver(self, stream: Stream, event: Any, seq: int, feeds: tuple[Feed, ...]) -> None:
        delivery = Delivery(stream, event, not stream.asked, 0)
        name = stream.name
        for feed in feeds:
            if feed.last.get(name, 0) < seq:
                feed.last[name] = seq
                delivery.holders += 1
                feed.put(delivery)
        if not delivery.holders:
            self._move(stream, event)

    def _on_own_event(self, event: ChannelJoined | ChannelLeft, own: Stream) -> None:
        if isinstance(event, ChannelLeft):
            self._streams.drop(event.channel)
            self._held.pop(event.channel, None)
            for feed in self._feeds:
                feed.last.pop(event.channel, None)
            self._dirty.pop(event.channel, None)
            self._touch(own)
            return
        joined = event.joined
        stream = self._streams.get(joined.channel)
        if stream is None:
            stream = self._streams.adopt_head(joined.channel, joined.epoch, joined.head)
            # From a replay: the server may be holding the channel until it is named.
            stream.behind = own.asked or stream.received < joined.head
            self._touch(stream)
            if stream.behind and self._opened:
                self._resync()
        else:
            stream.learn_epoch(joined.epoch)
        self._held.pop(joined.channel, None)

    def _on_connected(self, frame: Connected) -> None:
        self._session = frame
        now = self._clock()
        self._plan_ping(now)
        self._next_ack = now
        if frame.expires_at is not None:
            # Both times are the server's: its clock need not be ours.
            self._server_ahead = frame.server_time.timestamp() - time.time()
            self._plan_refresh((frame.expires_at - frame.server_time).total_seconds())
        self._note_moved(frame.moved)
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_result(frame)

    def _on_pong(self, frame: Pong) -> None:
        if self._opened:
            self._take_mark(frame.mark)

    def _on_error(self, frame: ErrorReply) -> None:
        answer = self._pending.pop(frame.ref, None) if frame.ref is not None else None
        if answer is not None:
            answer(frame)
        elif self._session is None:
            self._refusal = Refused.of(frame)
        else:
            log.warning("the server refused a command that nobody waits for: %s (%s)", frame.code, frame.detail)

    def _on_going_away(self, frame: GoingAway) -> None:
        self._going_away = frame.reconnect_in_ms / 1000

    def _on_signal(self, frame: Signal) -> None:
        for signals in list(self._signals):
            signals.put(frame)

    # ------------------------------------------------------------ catching up

    def _resync(self) -> None:
        """Ask for what is missing of the streams that somebody has room for."""
        if self._transport is None or not self._identified:
            return
        if not self._streams.lagging:
            return
        wanted: list[Stream] = []
        for stream in self._streams.lagging:
            if stream.asked:
                continue
            if stream.name == OWN_STREAM or (self._opened and self._has_place(stream)):
                wanted.append(stream)
        for stream in wanted:
            stream.behind = False
            stream.asked = True
        for batch in batches(wanted):
            self._transmit(Sync(positions=batch), partial(self._sync_answered, tuple(batch)))

    def _has_place(self, stream: Stream) -> bool:
        feeds = stream.feeds
        if feeds is None:
            feeds = stream.feeds = tuple(feed for feed in self._feeds if feed.wants(stream.name))
        return bool(feeds) and all(len(feed.queue) <= feed.limit // 2 for feed in feeds)

    def _sync_answered(self, names: tuple[str, ...], reply: Reply | None) -> None:
        if not isinstance(reply, ErrorReply):
            return
        log.warning("the server refused a sync: %s (%s)", reply.code, reply.detail)
        for name in names:
            stream = self._streams.get(name)
            if stream is not None and stream.asked:
                stream.asked = False
                stream.behind = True
        self._own_synced.set()
        if reply.retry == Retry.LATER:
            delay = max(self._backoff.bound(), (reply.retry_after_ms or 0) / 1000)
            asyncio.get_running_loop().call_later(delay, self._resync)
        else:
            self._abort("the server refused our positions")

    def _on_syncing(self, frame: Syncing) -> None:
        if frame.ref is not None:
            answer = self._pending.pop(frame.ref, None)
            if answer is not None:
                answer(frame)
        for name, refused in frame.refused.items():
            stream = self._streams.get(name)
            if stream is None:
                continue
            stream.asked = False
            if refused.code == "not_found":
                self._streams.drop(name)
                self._dirty.pop(name, None)
                self._save_soon()
            elif CATALOGUE.get(refused.code) is not None and refused.code in (
                "epoch_changed",
                "cursor_expired",
                "position_ahead",
            ):
                self._reset(stream, refused.code, refused.epoch, refused.head or 0)
            else:
                log.warning("the server refused to replay %s: %s", name, refused.code)
                stream.behind = True
            if name == OWN_STREAM:
                self._own_synced.set()
        if frame.refused:
            self._resync()

    def _on_synced(self, frame: Synced) -> None:
        stream = self._streams.get(frame.stream)
        if stream is None:
            return
        stream.learn_epoch(frame.epoch)
        stream.asked = False
        self._touch(stream)
        if frame.stream == OWN_STREAM:
            self._own_synced.set()
        if stream.received < frame.seq and not stream.behind:
            stream.behind = True
            stream.fruitless += 1
            if stream.fruitless >= FRUITLESS_SYNCS_MAX:
                self._abort(f"{frame.stream} does not become complete")
                return
        if stream.behind:
            self._resync()

    def _reset(self, stream: Stream, reason: str, epoch: str | None, head: int) -> None:
        """Our history of the stream is not the server's: begin again, and tell the application in its place."""
        self._streams.restart(stream, epoch, head, reason=reason)
        stream.behind = True
        stream.asked = False
        event = HistoryReset(stream=stream.name, seq=stream.received, epoch=epoch, reason=reason, head=head)
        delivery = Delivery(stream, event, False, 0)
        for feed in self._feeds:
            feed.last.pop(stream.name, None)
            if feed.wants(stream.name):
                delivery.holders += 1
                feed.put(delivery)
        if not delivery.holders:
            self._move(stream, event)
        self._touch(stream)

    def _abort(self, reason: str) -> None:
        log.warning("dropping the connection: %s", reason)
        if self._transport is not None:
            self._transport.abort()

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
            self._unacked[stream.name] = stream
            self._touch(stream)

    def _has_room(self, feed: Feed) -> None:
        if self._paused and all(len(one.queue) <= one.limit // 2 for one in self._feeds):
            self._resume()
        self._resync()

    def _feed_left(self, feed: Feed) -> None:
        """An iterator was let go: what only it had goes back, to be asked for again."""
        if feed not in self._feeds:
            return
        self._feeds.remove(feed)
        returned = [feed.handed] if feed.handed is not None else []
        returned += feed.queue
        feed.handed = None
        feed.queue.clear()
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
        for stream in self._streams:
            stream.feeds = None
        if self._paused:
            self._has_room(feed)
        elif returned and self._feeds:
            self._resync()

    def _observe_event(self, event: Event, source: Source) -> None:
        assert self._observer is not None
        self._observer(Observed(kind="event", event=event, source=source))

    def _seen_head(self, channel: str, epoch: str, head: int) -> None:
        """A history page told where the channel stands: for an unknown one, that is where it begins."""
        if self._streams.get(channel) is None and channel not in self._held:
            self._touch(self._streams.adopt(channel, epoch, head))

    def _pause(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause()

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            # Silence while we did not listen is nobody's fault.
            self._last_frame = self._clock()
            self._transport.resume()

    def _lose_pending(self) -> None:
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer(None)

    # ------------------------------------------------------------ clocks

    def _tick(self) -> None:
        self._tick_handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        session = self._session
        if self._transport is None or session is None:
            return
        now = self._clock()
        if not self._paused and now - self._last_frame > 2 * session.heartbeat_seconds:
            self._abort("nothing was heard for two heartbeats")
            return
        if now >= self._next_ping:
            self._plan_ping(now)
            self._transmit(Ping())
        if self._opened and self._unacked and now >= self._next_ack:
            self._next_ack = now + ACK_SECONDS
            self._send_ack()
        if self._next_refresh is not None and now >= self._next_refresh:
            self._next_refresh = None
            # owned by the client; `_refresh` handles its errors
            self._refresh_task = asyncio.create_task(self._refresh(), name="tidings-refresh")
        self._outbox.repeat_unanswered()

    def _plan_ping(self, now: float) -> None:
        assert self._session is not None
        self._next_ping = now + self._session.heartbeat_seconds * self._random.uniform(0.7, 1.0)

    def _send_ack(self) -> None:
        unacked, self._unacked = self._unacked, {}
        if not self._auto_ack:
            return
        streams = [stream for stream in unacked.values() if not stream.dropped and stream.name != OWN_STREAM]
        for batch in batches(streams):
            positions = {name: known.taken for name in batch if (known := self._streams.get(name)) is not None}
            self._transmit(Ack(positions=positions))

    def _take_mark(self, mark: str) -> None:
        self._mark = mark
        self._mark_dirty = True
        self._save_soon()

    def _touch(self, stream: Stream) -> None:
        if self._remembers:
            self._dirty[stream.name] = stream
            self._save_soon()

    def _save_soon(self) -> None:
        if self._remembers and self._save_handle is None and not self._closing:
            self._save_handle = asyncio.get_running_loop().call_later(SAVE_SECONDS, self._save)

    def _save(self) -> None:
        """Write positions, open flags and the mark together: each is only true with the others."""
        if self._save_handle is not None:
            self._save_handle.cancel()
            self._save_handle = None
        dirty, self._dirty = self._dirty, {}
        dropped, self._streams.dropped = self._streams.dropped, set()
        if dirty or dropped or self._mark_dirty:
            self._mark_dirty = False
            rows = [
                SavedStream(stream.name, stream.taken_epoch, stream.taken, stream.open)
                for stream in dirty.values()
                if not stream.dropped
            ]
            self._store.save(self._mark, rows, dropped)

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
