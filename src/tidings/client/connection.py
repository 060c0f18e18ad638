"""The connection: made, kept alive, renewed, and made again.

A task of the client's runs `run`: connect, live, wait, again, until a refusal says that there is no use. Frames are
handled as they arrive, without a task switch: `on_frame` decodes one and hands it to the handler of its class. What
the frames mean is the owner's business.
"""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeVar, overload

import msgspec

from ..wire import codec
from ..wire.commands import (
    Authenticate,
    Authenticated,
    Command,
    Connect,
    Connected,
    ErrorReply,
    GoingAway,
    Ping,
    Pong,
    Reply,
)
from ..wire.problems import CATALOGUE, Retry
from .backoff import STABLE_AFTER_SECONDS, FullJitter
from .errors import (
    Closed,
    ConnectionRefused,
    NotConnected,
    OutcomeUnknown,
    ProtocolError,
    Refused,
    TidingsError,
    Timeout,
)
from .events import decode_frame
from .subscriptions import Latest
from .transport import HttpTransport, SocketBlocked, Transport, open_http, open_websocket

log = logging.getLogger("tidings.client")

R = TypeVar("R", bound=Reply)

TokenProvider = Callable[[], Awaitable[str]]

# How often a client looks at its clocks: heartbeats are seconds, acknowledgements at most one a second.
TICK_SECONDS = 0.25
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


class Ending(msgspec.Struct):
    """Why a connection ended."""

    code: int | None = None
    reason: str = ""
    refused: Refused | None = None
    reconnect_in: float | None = None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the connection tells its owner, in this order: begin, greeted, enter, entered, …, lost; at last finish."""

    # A connection is about to be made with this token: the first frame.
    begin: Callable[[str], Connect]
    # The server has accepted us; called before any frame that follows is handled.
    greeted: Callable[[Connected], None]
    # What must be done before the connection counts as open. Raises what ends the connection, or the client.
    enter: Callable[[Connected], Awaitable[None]]
    entered: Callable[[Connected], None]
    # A newer mark; the server does not know the mark that we gave.
    take_mark: Callable[[str], None]
    forget_mark: Callable[[], None]
    # Some time has passed on a living connection; monotonic seconds.
    ticked: Callable[[float], None]
    lost: Callable[[], None]
    # There will not be another connection.
    finish: Callable[[TidingsError | None], None]


class Connection:
    """One connection after another, for one device. Not open until `run` runs."""

    def __init__(
        self,
        hooks: Hooks,
        url: str,
        *,
        token: str | None,
        token_provider: TokenProvider | None,
        transport: Literal["auto", "websocket", "http"],
        name: str,
        backoff: FullJitter,
        clock: Callable[[], float],
        random: random_module.Random,
    ) -> None:
        self._hooks = hooks
        self._url = url
        self._token = token
        self._token_provider = token_provider
        self._transport_wanted = transport
        self._name = name
        self._backoff = backoff
        self._clock = clock
        self._random = random
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Connected: self._on_connected,
            Pong: self._on_pong,
            ErrorReply: self._on_error,
            GoingAway: self._on_going_away,
        }

        self.closing = False
        self.error: TidingsError | None = None
        self.change = StateChange(state=State.CONNECTING)
        self._watchers: weakref.WeakSet[Latest[StateChange]] = weakref.WeakSet()

        self.session: Connected | None = None
        self.identified = False
        self.opened = False
        self.paused = False
        self.frame_bytes = 0
        self._transport: Transport | None = None
        self._ended: asyncio.Future[Ending] | None = None
        self._greeted: asyncio.Future[Connected] | None = None
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

    # ------------------------------------------------------------ state

    @property
    def transport(self) -> str | None:
        """`websocket` or `http`, while connected."""
        return self._transport.name if self._transport is not None else None

    @property
    def waiting(self) -> bool:
        """Some command waits for its reply."""
        return bool(self._pending)

    def handle(self, handlers: Mapping[type[Any], Callable[[Any], None]]) -> None:
        """Hand frames of these classes to these functions. Others answer commands."""
        self._handlers.update(handlers)

    def forget(self, ref: int) -> None:
        """Nobody waits for this reply any more."""
        self._pending.pop(ref, None)

    def retry_bound(self) -> float:
        """The longest pause before a retry at present, seconds."""
        return self._backoff.bound()

    def limit_commands(self, count: int) -> None:
        """At most so many commands of the application wait for their replies at a time."""
        self._command_slots = asyncio.Semaphore(max(1, count))

    def start_clock(self) -> None:
        """Begin to watch heartbeats and tokens."""
        self._tick_handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    async def say_goodbye(self) -> None:
        """Close politely; wait for the other side for CLOSE_SECONDS at most."""
        if self._transport is not None:
            self.resume()
            self._transport.close()
        ended = self._ended
        if ended is not None and not ended.done():
            await asyncio.wait([ended], timeout=CLOSE_SECONDS)

    def stop(self, error: TidingsError | None) -> bool:
        """No more connections, because of `error` or of `close`; false when that was known."""
        if self.change.state is State.CLOSED:
            return False
        self.error = error
        if self._tick_handle is not None:
            self._tick_handle.cancel()
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        self.set_state(State.CLOSED, str(error) if error else "closed")
        self.lose_pending()
        return True

    def end_watchers(self) -> None:
        """Let the iterators over states end."""
        for watcher in list(self._watchers):
            watcher.end()

    def states(self) -> Latest[StateChange]:
        """An iterator over the connection's states, beginning with the present one."""
        watcher: Latest[StateChange] = Latest(left=self._watchers.discard)
        watcher.put(self.change)
        if self.change.state is State.CLOSED:
            watcher.end()
        else:
            self._watchers.add(watcher)
        return watcher

    async def wait_connected(self, timeout: float | None = None) -> None:
        """Wait until connected. Raises ConnectionRefused (there will be no connection), Closed, Timeout."""
        if self.change.state is State.CONNECTED:
            return
        try:
            async with asyncio.timeout(timeout):
                async for change in self.states():
                    if change.state is State.CONNECTED:
                        return
        except TimeoutError:
            raise Timeout(f"not connected within {timeout} s ({self.change.reason or self.change.state})") from None
        raise self.error or Closed("the client was closed")

    def set_state(
        self, state: State, reason: str = "", *, retry_in: float | None = None, transport: str | None = None
    ) -> None:
        """Go into a state and tell who watches, if it is another one; `retry_in`: seconds."""
        change = StateChange(state=state, reason=reason, retry_in=retry_in, transport=transport)
        if change == self.change:
            return
        self.change = change
        log.debug("%s: %s %s", self._name, state, reason)
        for watcher in list(self._watchers):
            watcher.put(self.change)

    # ------------------------------------------------------------ commands

    @overload
    async def command(self, command: Command, kind: type[R], *, timeout: float, repeatable: bool = True) -> R: ...

    @overload
    async def command(self, command: Command, kind: None, *, timeout: float, repeatable: bool = True) -> Reply: ...

    async def command(
        self, command: Command, kind: type[Any] | None, *, timeout: float, repeatable: bool = True
    ) -> Any:
        """Send a command and wait for its reply, over reconnects when it may be repeated."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self.wait_connected()
                    try:
                        return await self.ask(command, kind)
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

    async def ask(self, command: Command, kind: type[Any] | None) -> Any:
        """Send a command on this connection and wait for its reply."""
        async with self._command_slots:
            future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

            def answer(reply: Reply | None) -> None:
                if not future.done():
                    future.set_result(reply)

            ref = self.transmit(command, answer)
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

    def transmit(self, command: Command, answer: Callable[[Reply | None], None] | None = None) -> int | None:
        """Put a command on the wire; its ref when there is a connection. `answer` is called once."""
        if self._transport is None:
            return None
        self._next_ref = ref = self._next_ref + 1
        if answer is None:
            self._transport.send(codec.encode(command))
            return ref
        self._pending[ref] = answer
        # The reply comes behind the events that wait in the network: it must be read on.
        self.resume()
        self._transport.send(codec.encode(msgspec.structs.replace(command, ref=ref)))
        return ref

    # ------------------------------------------------------------ connecting

    async def run(self) -> None:
        """The client's one owned task: connect, live, wait, again."""
        try:
            while not self.closing:
                self.set_state(State.CONNECTING)
                began = self._clock()
                ending = await self._live_once()
                if self.closing:
                    return
                lived = self._clock() - began if self.session is not None else 0.0
                self.session = None
                fatal = self._fatal(ending)
                if fatal is not None:
                    self._hooks.finish(fatal)
                    return
                delay = self._delay(ending, lived)
                self.set_state(State.WAITING, ending.reason, retry_in=delay)
                await asyncio.sleep(delay)
        except asyncio.CancelledError:
            raise
        except TidingsError as error:
            self._hooks.finish(error)
        except Exception as error:
            log.exception("the client stopped on an error of its own")
            failure = ProtocolError(f"internal error of the client: {error!r}")
            failure.__cause__ = error
            self._hooks.finish(failure)

    async def _live_once(self) -> Ending:
        """One connection from its beginning to its end."""
        try:
            token = await self._current_token()
        except Exception as error:
            log.warning("the token provider failed: %r", error)
            return Ending(reason=f"token provider: {error!r}")
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._greeted = loop.create_future()
        self._refusal = None
        self._going_away = None
        self.opened = False
        self.paused = False
        self.identified = False
        first = codec.encode(self._hooks.begin(token))
        try:
            self._transport = await self._open_transport(token, first)
        except Refused as error:
            return Ending(reason=error.code, refused=error)
        except NotConnected as error:
            return Ending(reason=str(error))
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
                return Ending(reason="the server did not answer the connection")
            return await ended
        except (NotConnected, Refused, ProtocolError) as error:
            return Ending(reason=str(error))
        finally:
            if not ended.done():
                self._transport.abort()
                await asyncio.wait([ended], timeout=CLOSE_SECONDS)
            self._transport = None
            self.opened = False
            self._next_refresh = None
            self.lose_pending()
            self._hooks.lost()

    async def _open_until(self, ended: asyncio.Future[Ending], connected: Connected) -> None:
        """Open the session; when the connection ends meanwhile, so does the opening."""
        # owned by this method, which awaits it
        opening = asyncio.create_task(self._open_session(connected), name="tidings-opening")
        ended.add_done_callback(lambda _: opening.cancel())
        try:
            await opening
        except asyncio.CancelledError:
            if not ended.done() or self.closing:
                opening.cancel()
                raise

    async def _open_transport(self, token: str, first: bytes) -> Transport:
        wanted = self._transport_wanted
        if wanted == "websocket" or (wanted == "auto" and self._clock() >= self._blocked_until):
            try:
                return await open_websocket(self._url, first, on_frame=self.on_frame, on_closed=self._on_closed)
            except SocketBlocked as error:
                if wanted == "websocket":
                    raise
                log.info("%s; trying HTTP", error)
        try:
            transport = await open_http(self._url, token, first, on_frame=self.on_frame, on_closed=self._on_closed)
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
        """Between `connected` and being connected."""
        await self._hooks.enter(connected)
        self.opened = True
        self._hooks.entered(connected)
        self.set_state(State.CONNECTED, transport=self.transport)

    def identify(self) -> None:
        """The owner has agreed whose connection this is: commands may be sent."""
        self.identified = True
        self._auth_failures = 0

    def _on_closed(self, code: int | None, reason: str) -> None:
        refused = self._refusal
        if refused is None and code is not None and code >= 4000:
            entry = CATALOGUE.get(reason) or next((one for one in CATALOGUE.values() if one.close == code), None)
            refused = Refused(entry.code if entry else "internal", retry=entry.retry.value if entry else None)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(
                Ending(
                    code=code,
                    reason=reason or (refused.code if refused else "the connection broke"),
                    refused=refused,
                    reconnect_in=self._going_away,
                )
            )
        self._transport = None
        if self.change.state is State.CONNECTED and not self.closing:
            self.set_state(State.WAITING, reason)
        self.lose_pending()

    def _fatal(self, ending: Ending) -> TidingsError | None:
        """Does this end mean that the client must not come back?"""
        refused, code = ending.refused, ending.code
        if refused is None:
            return None
        final = 4500 <= code < 5000 if code is not None and code >= 4000 else refused.retry == Retry.NEVER
        if refused.code in ("cursor_invalid", "cursor_expired"):
            # The server does not know our mark any more: connect without it and compare all heads.
            self._hooks.forget_mark()
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

    def _delay(self, ending: Ending, lived: float) -> float:
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
            reply = await self.ask(Authenticate(token=token), Authenticated)
        except asyncio.CancelledError:
            raise
        except NotConnected:
            return
        except Exception as error:
            # The old token is good for a while yet; at its end the server closes with 4401, and we come back.
            log.warning("refreshing the token failed: %r", error)
            self._fresh_token_due = True
            if self.session is not None:
                self._next_refresh = self._clock() + self._backoff.bound() + 1.0
            return
        self._fresh_token_due = False
        self._plan_refresh(reply.expires_at.timestamp() - time.time() - self._server_ahead)

    def _plan_refresh(self, seconds_left: float) -> None:
        if self._token_provider is not None:
            lead = min(REFRESH_SECONDS_MAX, max(seconds_left, 0.0) * REFRESH_FRACTION)
            self._next_refresh = self._clock() + max(0.0, seconds_left - lead)

    # ------------------------------------------------------------ frames

    def on_frame(self, data: bytes) -> None:
        """Handle one frame from the server; one that nobody knows is skipped."""
        self._last_frame = self._clock()
        self.frame_bytes = len(data)
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
        self.answer(frame.ref, frame)

    def answer(self, ref: int | None, reply: Reply) -> bool:
        """Give a reply to who waits for it; whether somebody did."""
        answer = self._pending.pop(ref, None) if ref is not None else None
        if answer is None:
            return False
        answer(reply)
        return True

    def _on_connected(self, frame: Connected) -> None:
        self.session = frame
        now = self._clock()
        self._plan_ping(now)
        if frame.expires_at is not None:
            # Both times are the server's: its clock need not be ours.
            self._server_ahead = frame.server_time.timestamp() - time.time()
            self._plan_refresh((frame.expires_at - frame.server_time).total_seconds())
        self._hooks.greeted(frame)
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_result(frame)

    def _on_pong(self, frame: Pong) -> None:
        if self.opened:
            self._hooks.take_mark(frame.mark)

    def _on_error(self, frame: ErrorReply) -> None:
        if self.answer(frame.ref, frame):
            return
        if self.session is None:
            self._refusal = Refused.of(frame)
        elif self._going_away is None:
            # Else it is the goodbye that was announced.
            log.warning("the server refused a command that nobody waits for: %s (%s)", frame.code, frame.detail)

    def _on_going_away(self, frame: GoingAway) -> None:
        self._going_away = frame.reconnect_in_ms / 1000

    def abort(self, reason: str) -> None:
        """Drop the connection because of `reason`; `run` makes another one."""
        log.warning("dropping the connection: %s", reason)
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Leave frames in the network, and so the rest in the server's log."""
        if not self.paused and self._transport is not None:
            self.paused = True
            self._transport.pause()

    def resume(self) -> None:
        """Read on."""
        if self.paused and self._transport is not None:
            self.paused = False
            # Silence while we did not listen is nobody's fault.
            self._last_frame = self._clock()
            self._transport.resume()

    def lose_pending(self) -> None:
        """Tell who waits for a reply that none will come."""
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer(None)

    # ------------------------------------------------------------ clocks

    def _tick(self) -> None:
        self._tick_handle = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        session = self.session
        if self._transport is None or session is None:
            return
        now = self._clock()
        if not self.paused and now - self._last_frame > 2 * session.heartbeat_seconds:
            self.abort("nothing was heard for two heartbeats")
            return
        if now >= self._next_ping:
            self._plan_ping(now)
            self.transmit(Ping())
        self._hooks.ticked(now)
        if self._next_refresh is not None and now >= self._next_refresh:
            self._next_refresh = None
            # owned by the client; `_refresh` handles its errors
            self._refresh_task = asyncio.create_task(self._refresh(), name="tidings-refresh")

    def _plan_ping(self, now: float) -> None:
        assert self.session is not None
        self._next_ping = now + self.session.heartbeat_seconds * self._random.uniform(0.7, 1.0)
