"""The same session for networks that block WebSockets: commands by POST, frames by long poll or server-sent events.

`POST /v1/realtime` takes a `connect` command and opens a session; its frames are numbered from 1 and kept until the
client says that it has them (`after` in a poll, `Last-Event-ID` on an event stream), up to a bound: a client that
does not fetch is a slow reader like any other, and reads from the log later. A poll whose answer was lost is repeated.

A session lives on the node that opened it, and its id names that node. Requests that come to another one, as they do
behind a load balancer, are authenticated there and passed on through the bus: who asks, never with what credentials.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, get, post
from litestar.params import FromPath, FromQuery
from litestar.response import Response, Stream
from msgspec import Meta

from tidings.server.bus.base import Unreachable
from tidings.server.errors import Refusal
from tidings.wire import limits
from tidings.wire.codec import decode_command, decode_connect, encode
from tidings.wire.commands import Connect

from .connection import Connection
from .endpoint import client_address
from .gateway import Gateway
from .session import State, refusal_of

# A session that nobody reads ends after this long, seconds: longer than a tunnel, shorter than a closed laptop.
IDLE_SECONDS: Final = 30.0
# Commands in one POST.
COMMANDS_MAX: Final = 100
# Frames in one answer to a poll, bytes: what a phone takes in a second or two.
POLL_BYTES: Final = 262_144
# A comment on a quiet event stream keeps proxies from closing it, seconds.
STREAM_COMMENT_SECONDS: Final = 15.0

# How long another node may take beyond what it was asked to wait, seconds.
PASSED_ON_SECONDS: Final = 5.0
# Apps of sessions on other nodes remembered: 200 bytes each.
APPS_OF_SESSIONS_MAX: Final = 10_000

_JSON: Final = "application/json"


class Numbered(msgspec.Struct, frozen=True):
    """A frame with its number in the session."""

    n: int
    frame: msgspec.Raw


class Polled(msgspec.Struct, frozen=True):
    """An answer to a poll. `next` is what to give as `after`."""

    frames: list[Numbered]
    next: int


class Opened(msgspec.Struct, frozen=True):
    session: str
    frames: list[msgspec.Raw]


class _Passed(msgspec.Struct, array_like=True, frozen=True):
    """A request passed on to the node that has the session. `app` and `user` are who asks, authenticated.

    With `commands` it is a POST of those, else a poll. `have`: what the client surely has.
    """

    session: str
    app: int
    user: str
    commands: bytes | None = None
    have: int = 0
    after: int = 0
    wait: float = 0.0


class _Done(msgspec.Struct, array_like=True, frozen=True):
    """What became of it: frames, or a refusal's code, detail, field, bound and time to wait."""

    frames: list[tuple[int, bytes]] = []
    refusal: tuple[str, str, str | None, int | None, int | None] | None = None


class HttpConnection(Connection):
    """A connection whose transport is a queue that requests read."""

    __slots__ = ("_bytes", "_kept", "_next", "_seen_at", "_wake", "ended_with", "readers")

    framed = False
    transport_name = "http"

    def __init__(self, gateway: Gateway, address: str, header_token: str | None) -> None:
        super().__init__(gateway, address, header_token)
        self._kept: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._next = 1
        self._wake = asyncio.Event()
        self._seen_at = gateway.clock.monotonic()
        # Requests that wait for frames at the moment.
        self.readers = 0
        self.ended_with: Refusal | None = None

    def write_one(self, payload: bytes) -> None:
        self._kept.append((self._next, payload))
        self._next += 1
        self._bytes += len(payload)
        self._wake.set()
        if self._bytes > self.gateway.config.outbox_bytes_max:
            self.pause()

    def end(self, code: int, reason: str) -> None:
        self.ended_with = Refusal(reason, "The session was closed by the server.")
        self._wake.set()

    def tick(self, now: float) -> None:
        if not self.readers and now - self._seen_at > IDLE_SECONDS:
            self.close(Refusal("heartbeat_timeout", "Nobody has read from this session."))
            self.gateway.http_sessions.pop(self.id, None)
            return
        super().tick(now)

    def heard(self) -> None:
        """The client has made a request."""
        now = self.gateway.clock.monotonic()
        self._seen_at = now
        self.session.heard_at = now

    def take_first(self) -> list[msgspec.Raw]:
        """The frames of the opening, which need no numbers: whoever misses them opens another session."""
        self.gateway.hub.flush()
        frames = [msgspec.Raw(data) for _, data in self._kept]
        self._kept.clear()
        self._bytes = 0
        self._next = 1
        self._wake.clear()
        return frames

    def acknowledge(self, after: int) -> None:
        """The client has everything up to `after`. Raises Refusal when it never got that."""
        if after >= self._next:
            raise Refusal("position_ahead", f"This session has sent {self._next - 1} frames.", field="after")
        if after < (self._kept[0][0] if self._kept else self._next) - 1:
            raise Refusal("session_unknown", "Those frames are gone: open a new session.", field="after")
        while self._kept and self._kept[0][0] <= after:
            self._bytes -= len(self._kept.popleft()[1])
        if self.transport_paused and self._bytes < self.gateway.config.outbox_bytes_max // 4:
            self.resume()

    async def wait(self, after: int, seconds: float) -> list[tuple[int, bytes]]:
        """Frames after `after`, waiting up to `seconds` for the first. Raises the refusal the session ended with."""
        self.readers += 1
        try:
            deadline = self.gateway.clock.monotonic() + seconds
            while True:
                found: list[tuple[int, bytes]] = []
                size = 0
                for number, data in self._kept:
                    if number > after:
                        found.append((number, data))
                        size += len(data)
                        if size > POLL_BYTES:
                            break
                if found:
                    return found
                if self.ended_with is not None:
                    raise self.ended_with
                left = deadline - self.gateway.clock.monotonic()
                if left <= 0:
                    return []
                self._wake.clear()
                try:
                    async with asyncio.timeout(left):
                        await self._wake.wait()
                except TimeoutError:
                    return []
        finally:
            self.readers -= 1
            self.heard()


class Here:
    """A session of this node."""

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection

    async def commands(self, body: bytes) -> None:
        """Take commands: all of them or, raising Refusal, none."""
        if body[:1] == b"[" or body.lstrip()[:1] == b"[":
            try:
                items = msgspec.json.decode(body, type=Annotated[list[msgspec.Raw], Meta(max_length=COMMANDS_MAX)])
            except (msgspec.DecodeError, RecursionError) as error:
                raise refusal_of(error) from None
        else:
            items = [msgspec.Raw(body)]
        # All or nothing: a command that cannot be read must not be found out after others have taken effect.
        for place, item in enumerate(items):
            try:
                if isinstance(decode_command(item), Connect):
                    raise Refusal("conflict", "This session is connected already.", field=f"[{place}]")
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                found = refusal_of(error)
                raise Refusal(found.code, found.detail, field=f"[{place}].{found.field or ''}".rstrip(".")) from None
        for item in items:
            self._connection.receive(bytes(item))

    async def poll(self, have: int, after: int, wait: float) -> list[tuple[int, bytes]]:
        """Frames after `after`, of a client that surely has those up to `have`. Raises Refusal."""
        self._connection.acknowledge(have)
        return await self._connection.wait(after, wait)


class Elsewhere:
    """A session of another node."""

    def __init__(self, gateway: Gateway, node: str, session: str, app: int, user: str) -> None:
        self._gateway = gateway
        self._node = node
        self._who = (session, app, user)

    async def commands(self, body: bytes) -> None:
        """As for a session that is here."""
        await self._pass_on(_Passed(*self._who, commands=body))

    async def poll(self, have: int, after: int, wait: float) -> list[tuple[int, bytes]]:
        """As for a session that is here."""
        return (await self._pass_on(_Passed(*self._who, have=have, after=after, wait=wait))).frames

    async def _pass_on(self, passed: _Passed) -> _Done:
        payload = msgspec.msgpack.encode(passed)
        try:
            answer = await self._gateway.bus.request(self._node, "http", payload, passed.wait + PASSED_ON_SECONDS)
        except Unreachable:
            # The node has stopped, and the session with it; or it may as well have.
            raise _unknown() from None
        done = msgspec.msgpack.decode(answer, type=_Done)
        if done.refusal is not None:
            code, detail, field, bound, retry_after_ms = done.refusal
            raise Refusal(code, detail, field=field, bound=bound, retry_after_ms=retry_after_ms)
        return done


def serve_other_nodes(gateway: Gateway) -> None:
    """Answer requests for sessions of this node that came to another one."""

    async def answer(payload: bytes) -> bytes:
        try:
            passed = msgspec.msgpack.decode(payload, type=_Passed)
            connection = gateway.http_sessions.get(passed.session)
            if connection is None or (connection.app, connection.user) != (passed.app, passed.user):
                raise _unknown()
            connection.heard()
            frames: list[tuple[int, bytes]] = []
            if passed.commands is not None:
                await Here(connection).commands(passed.commands)
            else:
                frames = await Here(connection).poll(passed.have, passed.after, passed.wait)
            return msgspec.msgpack.encode(_Done(frames))
        except Refusal as refusal:
            told = (refusal.code, refusal.detail, refusal.field, refusal.bound, refusal.retry_after_ms)
            return msgspec.msgpack.encode(_Done(refusal=told))

    async def app_of(payload: bytes) -> bytes:
        connection = gateway.http_sessions.get(payload.decode())
        return b"" if connection is None or connection.actor is None else connection.actor.app.id.encode()

    gateway.bus.serve("http", answer)
    gateway.bus.serve("http.app", app_of)


def _unknown() -> Refusal:
    return Refusal("session_unknown", "There is no such session: open a new one.")


def http_routes(gateway: Gateway) -> list[Any]:
    """The Litestar handlers of the fall-back, for the REST application to mount."""
    serve_other_nodes(gateway)
    apps: dict[str, str] = {}

    async def app_of(node: str, session: str) -> str | None:
        """The app of a session on another node: tokens need not name theirs."""
        found = apps.get(session)
        if found is None:
            try:
                found = (await gateway.bus.request(node, "http.app", session.encode(), PASSED_ON_SECONDS)).decode()
            except Unreachable:
                found = ""
            if not found:
                raise _unknown()
            if len(apps) >= APPS_OF_SESSIONS_MAX:
                apps.clear()
            apps[session] = found
        return found

    async def authorised(request: Request[Any, Any, Any], session: str) -> Here | Elsewhere:
        """The session, for its own user only: knowing its id is not enough."""
        connection = gateway.http_sessions.get(session)
        node = _node_of(session)
        elsewhere = connection is None and bool(node) and node != gateway.bus.node
        hint = request.headers.get("tidings-app")
        if hint is None and connection is not None and connection.actor is not None:
            hint = connection.actor.app.id
        elif hint is None and elsewhere and _bearer(request):
            hint = await app_of(node, session)
        granted = await gateway.services.auth.authenticate(_bearer(request) or "", app_hint=hint)
        actor = granted.actor
        if elsewhere and actor.user is not None:
            return Elsewhere(gateway, node, session, actor.app.app, actor.user)
        if connection is None or connection.user != actor.user or connection.app != actor.app.app:
            raise _unknown()
        connection.heard()
        return Here(connection)

    @post("/v1/realtime", status_code=200)
    async def open_session(request: Request[Any, Any, Any]) -> Response[bytes]:
        address = client_address(
            gateway, request.client.host if request.client else "local", request.headers.get("x-forwarded-for")
        )
        refusal = gateway.admit(address)
        if refusal is not None:
            raise refusal
        try:
            command = decode_connect(await _body(request, gateway))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise refusal_of(error) from None
        connection = HttpConnection(gateway, address, _bearer(request))
        gateway.opened(connection)
        connection.session.state = State.CONNECTING
        connection.session.in_flight += 1
        try:
            await gateway.connect(connection, command)
        except BaseException:
            gateway.forget(connection)
            raise
        if connection.ended_with is not None:
            raise connection.ended_with
        gateway.http_sessions[connection.id] = connection
        return Response(encode(Opened(connection.id, connection.take_first())), media_type=_JSON)

    @post("/v1/realtime/{session:str}/commands", status_code=202)
    async def commands(request: Request[Any, Any, Any], session: FromPath[str]) -> Response[bytes]:
        found = await authorised(request, session)
        await found.commands(await _body(request, gateway))
        return Response(b"{}", media_type=_JSON, status_code=202)

    @get("/v1/realtime/{session:str}/poll", status_code=200)
    async def poll(
        request: Request[Any, Any, Any],
        session: FromPath[str],
        after: FromQuery[int] = 0,
        wait: FromQuery[float] = float(limits.POLL_WAIT_MAX),
    ) -> Response[bytes]:
        found = await authorised(request, session)
        frames = await found.poll(_number(after), after, min(max(0.0, wait), limits.POLL_WAIT_MAX))
        return Response(
            encode(
                Polled(
                    [Numbered(number, msgspec.Raw(data)) for number, data in frames],
                    frames[-1][0] if frames else after,
                )
            ),
            media_type=_JSON,
        )

    @get("/v1/realtime/{session:str}/events", status_code=200)
    async def events(request: Request[Any, Any, Any], session: FromPath[str], after: FromQuery[int] = 0) -> Stream:
        found = await authorised(request, session)
        given = request.headers.get("last-event-id", "")
        start = int(given) if given.isascii() and given.isdigit() and len(given) < 16 else _number(after)
        # What cannot be gone on from is refused before the stream begins.
        first = await found.poll(start, start, 0)

        async def lines() -> AsyncIterator[bytes]:
            have = position = start
            waiting = first
            yield b": tidings\n\n"
            while True:
                try:
                    frames, waiting = waiting or await found.poll(have, position, STREAM_COMMENT_SECONDS), []
                except Refusal as refusal:
                    yield b"event: end\ndata: " + encode(refusal.document()) + b"\n\n"
                    return
                if not frames:
                    yield b": still here\n\n"
                    continue
                for number, data in frames:
                    yield b"id: %d\ndata: %b\n\n" % (number, data)
                position = frames[-1][0]
                # A stream has no acknowledgements: what was written before the newest page is taken as received.
                have = frames[0][0] - 1

        return Stream(
            lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )

    return [open_session, commands, poll, events]


def _node_of(session: str) -> str:
    """The node that a session's id names; empty where there is only one."""
    parts = session.split("_")
    return parts[1] if len(parts) == 3 and parts[1].isalnum() else ""


def _bearer(request: Request[Any, Any, Any]) -> str | None:
    authorization = request.headers.get("authorization", "")
    return authorization[7:].strip() if authorization[:7].lower() == "bearer " else None


def _number(after: int) -> int:
    if after < 0:
        raise Refusal("invalid_field", "`after` is a frame's number.", field="after", bound=0)
    return after


async def _body(request: Request[Any, Any, Any], gateway: Gateway) -> bytes:
    bound = gateway.config.frame_bytes_max * 4
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > bound:
            raise Refusal("too_large", f"The body may have {bound} bytes.", bound=bound)
        parts.append(part)
    return b"".join(parts)
