"""A connection: a session with a peer's place in the hub and the commands under way.

Transport-neutral: `gateway.endpoint` gives it a WebSocket, `gateway.http` a queue that HTTP requests read.
Commands take effect in the order in which they came. A send that can be decided from memory goes straight to the
store, and the next command need not wait for its commit; whatever has to wait for something holds back what follows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from tidings.server.bus.base import Revoked
from tidings.server.errors import Refusal
from tidings.server.services.access import Actor
from tidings.server.services.auth import Authenticated
from tidings.server.services.messages import Draft
from tidings.server.store.base import Appended, Stale
from tidings.server.telemetry import get_logger
from tidings.wire.codec import encode
from tidings.wire.commands import (
    Ack,
    AnyCommand,
    Connect,
    ErrorReply,
    MessageSent,
    Ping,
    Pong,
    SendMessage,
)
from tidings.wire.ids import time_of
from tidings.wire.problems import CATALOGUE

from .hub import Peer, Stream
from .session import Answer, Close, Run, Session, State

if TYPE_CHECKING:
    from .gateway import Gateway

log = get_logger(__name__)


class Connection(Peer):
    """One device's connection. Subclasses implement `write` and `end`."""

    transport_name = "socket"

    __slots__ = (
        "_again",
        "_busy",
        "_catching",
        "_in_store",
        "_pending",
        "_room",
        "_stale_actor",
        "_under",
        "actor",
        "address",
        "connected_at",
        "connected_at_ms",
        "ended",
        "entering",
        "gateway",
        "granted",
        "header_token",
        "last_mark",
        "sent_before",
        "session",
        "transport_paused",
        "typing",
        "visible",
        "watching",
        "withheld",
    )

    def __init__(self, gateway: Gateway, address: str, header_token: str | None) -> None:
        super().__init__(gateway.new_session_id())
        self.gateway = gateway
        self.address = address
        # From the `Authorization` header of the upgrade; the first frame may then leave the token out.
        self.header_token = header_token
        self.session = Session(gateway.session_limits, gateway.clock.monotonic())
        self.granted: Authenticated | None = None
        self.actor: Actor | None = None
        self.ended = False
        # By the steady clock, and by the one that other nodes have, too.
        self.connected_at = 0.0
        self.connected_at_ms = 0
        self.entering = False
        # Of streams that the client has asked for again: how far they had been sent before.
        self.sent_before: dict[int, int] = {}
        self.transport_paused = False
        # The client wants nothing but replies for now.
        self.withheld = False
        self.last_mark = ""
        self.visible = False
        # Channels this user is shown as typing in, by sid: when the last signal went out.
        self.typing: dict[int, float] = {}
        self.watching: set[tuple[int, str]] = set()
        self._pending: deque[AnyCommand] = deque()
        # Sends that were overtaken by a change of access and are to be decided again; sends in the store's queue, and
        # under which access version of their channel they are.
        self._again: deque[SendMessage] = deque()
        self._in_store = 0
        self._under: dict[str, int] = {}
        self._room: asyncio.Future[None] | None = None
        self._busy = False
        self._catching: asyncio.Task[None] | None = None
        self._stale_actor = False

    # ------------------------------------------------------------ from the transport

    def receive(self, data: bytes) -> None:
        """A complete text message has come."""
        action = self.session.receive(data, self.gateway.clock.monotonic())
        if type(action) is Run:
            command = action.command
            actor = self.actor
            if actor is not None and type(command) is not Ping:
                verdict = self.gateway.limiter.take((self.app, actor.via), self.session.heard_at)
                if not verdict.allowed:
                    self.gateway.rate_refused.inc()
                    self.session.answered()
                    self.refuse(
                        Refusal(
                            "rate_limited",
                            "Too many requests and commands with these credentials.",
                            retry_after_ms=verdict.retry_after_ms,
                        ),
                        command.ref,
                    )
                    return
            if self._busy or self._pending:
                # Bounded by the commands that may be in flight.
                self._pending.append(command)
            else:
                self._start(command)
        elif isinstance(action, Answer):
            if action.refusal.code == "rate_limited":
                self.gateway.rate_refused.inc()
            self.refuse(action.refusal, action.ref)
        elif isinstance(action, Close):
            self.close(action.refusal, action.ref)

    def control(self) -> None:
        """A ping or pong has come."""
        close = self.session.control(self.gateway.clock.monotonic())
        if close is not None:
            self.close(close.refusal)

    def tick(self, now: float) -> None:
        """Time has passed."""
        close = self.session.tick(now)
        if close is not None:
            self.close(close.refusal)

    def pause(self) -> None:
        """The transport holds more than it should: nothing more to write, nothing more to read."""
        self.transport_paused = True
        self.paused = True

    def resume(self) -> None:
        """The transport has room again."""
        self.transport_paused = False
        self.paused = self.entering or self.withheld
        self._make_room()
        self.fell_behind()

    def withhold(self, on: bool) -> None:
        """The client has enough for now, or goes on: meanwhile it is a slow reader, except that it gets its replies."""
        self.withheld = on
        self.paused = self.entering or self.transport_paused or on
        self.fell_behind()

    def gone(self) -> None:
        """The transport has ended, by whomever."""
        self.ended = True
        self.session.closed()
        self._make_room()
        self._pending.clear()
        if self._catching is not None:
            self._catching.cancel()
        self.gateway.forget(self)

    # ------------------------------------------------------------ commands

    def _start(self, command: AnyCommand) -> None:
        if not self._now(command):
            self._busy = True
            self.gateway.tasks.spawn(self._run(command), "commands")

    def _now(self, command: AnyCommand) -> bool:
        """Do at once what needs no waiting; False if the command has to be waited for."""
        if self._stale_actor or self._again or self.transport_paused:
            return False
        kind = type(command)
        if kind is SendMessage:
            return self._send_now(command)  # type: ignore[arg-type]
        if kind is Ping:
            self._pong(command.ref)
            return True
        if kind is Ack:
            self._ack(command)  # type: ignore[arg-type]
            return True
        return False

    async def _run(self, command: AnyCommand | None) -> None:
        """Commands that have to be waited for, one after the other, with what has come behind them."""
        try:
            while not self.ended:
                # Whoever does not read replies gets no more of them.
                while self.transport_paused and not self.ended:
                    await self._wait_for_room()
                # What is on its way to the store comes first, and of that, what has to be sent again.
                while (self._in_store or self._again) and not self.ended:
                    if self._in_store:
                        await self._wait_for_room()
                    elif self._again:
                        await self._execute(self._again.popleft())
                if command is not None and not self.ended:
                    await self._execute(command)
                command = None
                self._busy = False
                while self._pending and not self._busy and not self.ended:
                    following = self._pending.popleft()
                    if not self._now(following):
                        command = following
                        self._busy = True
                if not self._busy:
                    if not self._again:
                        return
                    self._busy = True
        finally:
            self._busy = False

    async def _wait_for_room(self) -> None:
        if self._room is None:
            self._room = asyncio.get_running_loop().create_future()
        await self._room

    def _make_room(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    async def _execute(self, command: AnyCommand) -> None:
        ref = command.ref
        try:
            if isinstance(command, Connect):
                await self.gateway.connect(self, command)
                return
            if self._stale_actor:
                await self._refresh()
            assert self.actor is not None, "commands run after `connect`"
            reply = await self.gateway.dispatch(self, self.actor, command)
        except Refusal as refusal:
            self._answered()
            if isinstance(command, Connect):
                self.gateway.metrics.auth_refused.labels(refusal.code).inc()
                self.close(refusal, ref)
            else:
                self.refuse(refusal, ref)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._answered()
            self.gateway.metrics.internal_errors.labels("socket").inc()
            log.error("command_failed", command=type(command).__name__, session=self.id, exc_info=error)
            internal = Refusal("internal", "Something went wrong on our side; it has been logged.")
            if isinstance(command, Connect):
                self.close(internal, ref)
            else:
                self.refuse(internal, ref)
        else:
            self._answered()
            if reply is not None and ref is not None:
                self.send(reply)

    def _answered(self) -> None:
        self.session.answered()

    def _send_now(self, command: SendMessage) -> bool:
        actor = self.actor
        if actor is None:
            return False
        ref, channel, heard_at = command.ref, command.channel, self.session.heard_at

        def done(outcome: Appended | Exception) -> None:
            self._in_store -= 1
            if type(outcome) is Appended:
                self.session.answered()
                self.sent(ref, channel, outcome)
                self.gateway.send_seconds.observe(self.gateway.clock.monotonic() - heard_at)
            elif isinstance(outcome, Stale):
                # Who may do what has changed meanwhile: decide again, in the order of sending, before what follows.
                self.gateway.access.forget_overtaken(actor.app.app, channel, self._under.get(channel, 0))
                self._again.append(command)
                if not self._busy and not self.ended:
                    self._busy = True
                    self.gateway.tasks.spawn(self._run(None), "send again")
            elif isinstance(outcome, Refusal):
                self.gateway.send_refused.inc()
                self.session.answered()
                self.refuse(outcome, ref)
            else:
                self.session.answered()
                self.gateway.metrics.internal_errors.labels("append").inc()
                log.error("append_failed", session=self.id, exc_info=outcome)
                self.refuse(Refusal("internal", "Something went wrong on our side; it has been logged."), ref)
            if not self._in_store:
                self._under.clear()
                self._make_room()

        try:
            # Sends of one channel that are on their way together were decided under the same access version, so that
            # either none or all that follow have to be decided again.
            version = self.gateway.messages.send_now(
                actor, channel, draft_of(command), command.key, done, self._under.get(channel, 0)
            )
        except Refusal as refusal:
            if self._in_store:
                return False
            self.session.answered()
            self.refuse(refusal, ref)
            return True
        if version:
            self._in_store += 1
            self._under[channel] = version
        return bool(version)

    def _pong(self, ref: int | None) -> bool:
        self.session.answered()
        if not self.behind:
            self.last_mark = self.gateway.sync.mark()
        self.send(encode(Pong(ref=ref, at=time_of(self.gateway.clock.now_ms()), mark=self.last_mark)))
        return True

    def _ack(self, command: Ack) -> None:
        self.session.answered()
        try:
            self.gateway.acknowledge(self, command.positions)
        except Refusal as refusal:
            self.refuse(refusal, command.ref)
            return
        if command.ref is not None:
            self.gateway.done(self, command.ref)

    async def _refresh(self) -> None:
        granted = self.granted
        assert granted is not None
        fresh = await self.gateway.services.auth.recheck(granted)
        if self.granted is granted:
            self.granted, self.actor = fresh, fresh.actor
        self._stale_actor = False

    # ------------------------------------------------------------ to the transport

    def send(self, payload: bytes) -> None:
        """Queue one frame."""
        if self.session.state is not State.CLOSED:
            self.gateway.hub.push(self, payload)

    def sent(self, ref: int | None, channel: str, stored: Appended) -> None:
        """Answer a `message.send`."""
        (self.gateway.repeated if stored.duplicate else self.gateway.stored).inc()
        if self.typing:
            self.gateway.wrote(self, channel)
        if ref is not None:
            self.send(
                encode(
                    MessageSent(
                        ref=ref,
                        channel=channel,
                        id=stored.message_id,
                        seq=stored.seq,
                        at=time_of(stored.at),
                        duplicate=stored.duplicate,
                    )
                )
            )

    def refuse(self, refusal: Refusal, ref: int | None) -> None:
        """Answer with a refusal."""
        self.send(render_error(refusal, ref))

    def close(self, refusal: Refusal, ref: int | None = None) -> None:
        """Say why, then end the connection with the refusal's close code."""
        if self.ended:
            return
        self.ended = True
        self.session.closed()
        self._make_room()
        self.gateway.hub.push(self, render_error(refusal, ref))
        self.gateway.hub.flush()
        self.gateway.counted_close(refusal.code)
        self.end(CATALOGUE[refusal.code].close or 4002, refusal.code)
        self.gateway.forget(self)

    def end(self, code: int, reason: str) -> None:
        """Close the transport with a close code."""
        raise NotImplementedError  # why: every transport has its own

    # ------------------------------------------------------------ from the hub

    def fell_behind(self) -> None:
        if self.entering or self.paused or not self.behind or self._catching is not None:
            return
        if all(position is None for position in self.behind.values()):
            return
        self._catching = self.gateway.tasks.spawn(self.gateway.catch_up(self), "catch-up")
        self._catching.add_done_callback(self._caught_up)

    def _caught_up(self, _task: asyncio.Task[None]) -> None:
        self._catching = None
        if self.session.state is State.OPEN:
            self.fell_behind()

    def hold(self, stream: Stream) -> None:
        """Send nothing more on the stream until its position is known."""
        self.sent_before[stream.sid] = self.sent_up_to(stream)
        self.behind[stream.sid] = None

    def sent_up_to(self, stream: Stream) -> int:
        """The highest seq of the stream that this device can have from here, or have had when it came."""
        position = self.behind.get(stream.sid, stream.head)
        if position is None:
            return stream.head
        return max(position, self.sent_before.get(stream.sid, 0))

    def unsubscribed(self, stream: Stream) -> None:
        self.sent_before.pop(stream.sid, None)
        if self.typing.pop(stream.sid, None) is not None:
            self.gateway.typing_ended(self, stream.sid)

    def revoked(self, notice: Revoked) -> None:
        session = self.session
        if session.state is State.CLOSED:
            return
        if notice.device is not None and notice.device != self.device:
            return
        granted = self.granted
        issued_at, jti = (granted.issued_at_ms, granted.jti) if granted is not None else (None, None)
        if notice.jti is not None and notice.jti != jti:
            return
        if notice.before_ms is not None and (issued_at is None or issued_at >= notice.before_ms):
            # Credentials that do not say when they were issued (a backend's key) are not a user's token.
            return
        self.close(Refusal(notice.code, "The credentials of this connection were withdrawn."))

    def access_changed(self) -> None:
        self._stale_actor = True
        # Not only at the next command: who may not be here any more is shown out now.
        self.gateway.doubts.about_credentials(self)


def draft_of(command: SendMessage) -> Draft:
    """The draft of a `message.send`."""
    return Draft(
        text=command.text,
        mentions=command.mentions,
        mention_all=command.mention_all,
        reply_to=command.reply_to,
        attachments=command.attachments,
        custom=command.custom,
        silent=command.silent,
    )


def render_error(refusal: Refusal, ref: int | None) -> bytes:
    """The `error` frame of a refusal."""
    return encode(
        ErrorReply(
            ref=ref,
            code=refusal.code,
            detail=refusal.detail,
            retry=refusal.problem.retry.value,
            field=refusal.field,
            bound=refusal.bound,
            retry_after_ms=refusal.retry_after_ms,
        )
    )
