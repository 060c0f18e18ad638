"""Two ways to carry frames: a WebSocket, and plain HTTP for networks that block WebSockets.

Both give the same: frames in order to `on_frame`, then one call of `on_closed`. Neither knows what a frame means.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec
import picows

from ..wire import limits
from ..wire.problems import CATALOGUE
from .errors import NotConnected, Refused

log = logging.getLogger("tidings.client")

# A history page of 200 messages of the greatest length is 16 MB; nothing that a server says is longer.
FRAME_IN_BYTES_MAX = 32 << 20
# A mobile network needs a few round trips for TCP, TLS and the upgrade; beyond this it is not going to work.
HANDSHAKE_SECONDS_MAX = 10.0
# How long after a close frame of ours the server may take to answer it.
CLOSE_SECONDS_MAX = 2.0
# The server answers a poll after at most POLL_WAIT_MAX seconds; the rest is for the way there and back.
POLL_SECONDS_MAX = limits.POLL_WAIT_MAX + 10.0
# A command post that failed is repeated as often as this before the session counts as lost.
POST_ATTEMPTS_MAX = 3
# Commands in one post, so that it stays well below the size that proxies allow.
POST_COMMANDS_MAX = 64

OnFrame = Callable[[bytes], None]
# Close code (None when the connection just broke) and reason.
OnClosed = Callable[[int | None, str], None]


class Transport(Protocol):
    """One open connection. `send` never waits; after `on_closed` it does nothing."""

    name: str

    def send(self, frame: bytes) -> None:
        """Queue a frame; one that is sent to a closed connection is lost."""

    def pause(self) -> None:
        """Stop reading: what the server sends stays in the network until `resume`."""

    def resume(self) -> None:
        """Read on."""

    def close(self) -> None:
        """Say goodbye and close. `on_closed` follows."""

    def abort(self) -> None:
        """Close without a word: the peer is thought to be dead. `on_closed` follows."""


def websocket_url(url: str) -> str:
    """The socket's address under a server's base URL. Raises ValueError on another scheme than http(s) or ws(s)."""
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise ValueError(f"not a server address: {url!r} (expected http://host:port or https://host)")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/v1/ws", "", ""))


def http_url(url: str) -> str:
    """The base of the HTTP interface under a server's URL, without a slash at the end."""
    parts = urlsplit(url)
    scheme = {"http": "http", "https": "https", "ws": "http", "wss": "https"}.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise ValueError(f"not a server address: {url!r} (expected http://host:port or https://host)")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


# ---------------------------------------------------------------- WebSocket


class SocketBlocked(NotConnected):
    """The host answers, but not with a WebSocket: something between us does not let it through."""


# Looked up once: every event passes here.
_TEXT = picows.WSMsgType.TEXT


class _Socket(picows.WSListener):
    """A picows listener that is a Transport."""

    name = "websocket"

    def __init__(self, on_frame: OnFrame, on_closed: OnClosed) -> None:
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._transport: Any = None
        self._reading = True
        self._closed = False
        self._code: int | None = None
        self._reason = ""
        self._parts: list[bytes] = []
        self._parts_size = 0

    def on_ws_connected(self, transport: Any) -> None:
        self._transport = transport

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        kind = frame.msg_type
        if kind == _TEXT and frame.fin:
            self._on_frame(frame.get_payload_as_bytes())
        elif kind == picows.WSMsgType.CLOSE:
            payload = frame.get_payload_as_bytes()
            if len(payload) >= 2:
                (self._code,) = struct.unpack_from("!H", payload)
                self._reason = payload[2:].decode(errors="replace")
            transport.send(picows.WSMsgType.CLOSE, payload)
            transport.disconnect()
        elif kind in (picows.WSMsgType.TEXT, picows.WSMsgType.BINARY, picows.WSMsgType.CONTINUATION):
            self._gather(frame)

    def _gather(self, frame: Any) -> None:
        part = frame.get_payload_as_bytes()
        self._parts_size += len(part)
        if self._parts_size > FRAME_IN_BYTES_MAX:
            self.abort()
            return
        self._parts.append(part)
        if frame.fin:
            whole = b"".join(self._parts)
            self._parts, self._parts_size = [], 0
            self._on_frame(whole)

    def on_ws_disconnected(self, transport: Any) -> None:
        self._closed = True
        self._on_closed(self._code, self._reason)

    def pause_writing(self) -> None:
        """Commands are bounded by the outbox and by the in-flight limits, so that nothing needs to stop here."""

    def resume_writing(self) -> None:
        """See pause_writing."""

    def send(self, frame: bytes) -> None:
        if not self._closed:
            self._transport.send(picows.WSMsgType.TEXT, frame)

    def pause(self) -> None:
        if self._reading and not self._closed:
            self._reading = False
            self._transport.underlying_transport.pause_reading()

    def resume(self) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._transport.underlying_transport.resume_reading()

    def close(self) -> None:
        if self._closed:
            return
        self.resume()  # A transport that does not read never sees the other side's goodbye.
        self._transport.send_close(picows.WSCloseCode.OK, b"")
        asyncio.get_running_loop().call_later(CLOSE_SECONDS_MAX, self.abort)

    def abort(self) -> None:
        if not self._closed:
            self._transport.disconnect(graceful=False)


async def open_websocket(
    url: str, first: bytes, *, on_frame: OnFrame, on_closed: OnClosed, headers: dict[str, str] | None = None
) -> Transport:
    """Open the socket and send the first frame.

    Raises SocketBlocked when the host answered but the upgrade failed, NotConnected when it could not be reached.
    """
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
            transport, socket = await picows.ws_connect(
                lambda: _Socket(on_frame, on_closed),
                websocket_url(url),
                extra_headers=headers,
                max_frame_size=FRAME_IN_BYTES_MAX,
                websocket_handshake_timeout=HANDSHAKE_SECONDS_MAX,
                logger_name=_quiet,
            )
    except picows.WSError as error:
        raise SocketBlocked(f"the WebSocket upgrade failed: {error}") from error
    except TimeoutError as error:
        raise SocketBlocked("the WebSocket upgrade was not answered") from error
    except OSError as error:
        raise NotConnected(f"cannot reach {url}: {error}") from error
    if not isinstance(socket, _Socket):
        # picows has let go of the listener: the line was cut in the tick in which the handshake ended.
        raise NotConnected(f"the connection to {url} broke at once")
    transport.send(picows.WSMsgType.TEXT, first)
    return socket


# picows reports every connection at INFO; the client's own state says it better.
_quiet = logging.getLogger("tidings.client.socket")
_quiet.setLevel(logging.WARNING)


# ---------------------------------------------------------------- HTTP


class _Opened(msgspec.Struct):
    session: str
    frames: list[msgspec.Raw] = []


class _Numbered(msgspec.Struct):
    n: int
    frame: msgspec.Raw


class _Polled(msgspec.Struct):
    frames: list[_Numbered]
    next: int | None = None


_opened = msgspec.json.Decoder(_Opened)
_polled = msgspec.json.Decoder(_Polled)


class HttpTransport:
    """The same frames over long polls and posts.

    `after` in a poll acknowledges what came before, so that the server may forget it: a poll whose answer was lost
    is simply repeated. Posts go one at a time, because the order of commands is their meaning.
    """

    name = "http"

    def __init__(self, url: str, token: str | None, on_frame: OnFrame, on_closed: OnClosed) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._base = http_url(url) + "/v1/realtime"
        self._http = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(POLL_SECONDS_MAX, connect=10.0))
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._session = ""
        self._waiting: list[bytes] = []
        self._wake = asyncio.Event()
        self._reading = asyncio.Event()
        self._reading.set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self, first: bytes) -> None:
        """Begin the session. Raises Refused when the server said no, NotConnected when it could not be reached."""
        try:
            response = await self._http.post(self._base, content=first, headers={"Content-Type": "application/json"})
        except httpx.HTTPError as error:
            await self._http.aclose()
            raise NotConnected(f"cannot reach {self._base}: {error!r}") from error
        if response.status_code != 200:
            await self._http.aclose()
            raise refusal_of(response)
        try:
            opened = _opened.decode(response.content)
        except msgspec.DecodeError as error:
            await self._http.aclose()
            raise NotConnected(f"{self._base} is not a Tidings server: {error}") from error
        self._session = opened.session
        # owned by the transport: `_live` reports its own end
        self._task = asyncio.create_task(self._live(opened.frames), name="tidings-http")

    def authorize(self, token: str) -> None:
        """Use a fresh token for the requests from now on."""
        self._http.headers["Authorization"] = f"Bearer {token}"

    def send(self, frame: bytes) -> None:
        """See Transport."""
        if not self._closed:
            self._waiting.append(frame)
            self._wake.set()

    def pause(self) -> None:
        """See Transport."""
        self._reading.clear()

    def resume(self) -> None:
        """See Transport."""
        self._reading.set()

    def close(self) -> None:
        """See Transport."""
        if self._task is not None:
            self._task.cancel()

    abort = close

    async def _live(self, frames: list[msgspec.Raw]) -> None:
        """Owns the poller and the poster: when one ends the other does, and then `on_closed` is called."""
        code: int | None = None
        reason = ""
        try:
            for frame in frames:
                self._on_frame(bytes(frame))
            async with asyncio.TaskGroup() as both:
                both.create_task(self._poll())  # owned by the group
                both.create_task(self._post())  # owned by the group
        except* Refused as errors:
            refused = next(error for error in errors.exceptions if isinstance(error, Refused))
            entry = CATALOGUE.get(refused.code)
            code, reason = (entry.close if entry else None), refused.code
        except* NotConnected as errors:
            reason = str(errors.exceptions[0])
        finally:
            self._closed = True
            try:
                await self._http.aclose()
            finally:
                self._on_closed(code, reason)

    async def _poll(self) -> None:
        after = 0
        failures = 0
        while True:
            await self._reading.wait()
            try:
                response = await self._http.get(
                    f"{self._base}/{self._session}/poll", params={"after": after, "wait": limits.POLL_WAIT_MAX}
                )
            except httpx.HTTPError as error:
                failures += 1
                if failures >= POST_ATTEMPTS_MAX:
                    raise NotConnected(f"polling failed: {error!r}") from error
                await asyncio.sleep(0.2 * failures)
                continue
            if response.status_code != 200:
                raise refusal_of(response)
            failures = 0
            try:
                polled = _polled.decode(response.content)
            except msgspec.DecodeError as error:
                raise NotConnected(f"a poll was answered with something else: {error}") from error
            for numbered in polled.frames:
                # A repeated poll may bring frames again.
                if numbered.n > after:
                    after = numbered.n
                    self._on_frame(bytes(numbered.frame))

    async def _post(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            batch = self._waiting[:POST_COMMANDS_MAX]
            if not batch:
                self._wake.clear()
                continue
            body = batch[0] if len(batch) == 1 else b"[%b]" % b",".join(batch)
            try:
                response = await self._http.post(
                    f"{self._base}/{self._session}/commands",
                    content=body,
                    headers={"Content-Type": "application/json"},
                )
            except httpx.ConnectError as error:
                # It never left: safe to repeat.
                failures += 1
                if failures >= POST_ATTEMPTS_MAX:
                    raise NotConnected(f"sending failed: {error!r}") from error
                await asyncio.sleep(0.2 * failures)
                continue
            except httpx.HTTPError as error:
                # It may have arrived. What must not be doubled is repeated by its owner, with its key.
                raise NotConnected(f"sending failed: {error!r}") from error
            if response.status_code >= 400:
                raise refusal_of(response)
            failures = 0
            del self._waiting[: len(batch)]


async def open_http(url: str, token: str | None, first: bytes, *, on_frame: OnFrame, on_closed: OnClosed) -> Transport:
    """Begin an HTTP session. Raises Refused or NotConnected."""
    transport = HttpTransport(url, token, on_frame, on_closed)
    await transport.open(first)
    return transport


class _Problem(msgspec.Struct):
    code: str
    detail: str = ""
    retry: str | None = None
    field: str | None = None
    bound: int | None = None
    retry_after_ms: int | None = None


_problem = msgspec.json.Decoder(_Problem)


def refusal_of(response: httpx.Response) -> Refused:
    """The refusal that an HTTP answer carries; one of another server in between (a proxy's 502) becomes one, too."""
    retry_after = _retry_after(response)
    try:
        problem = _problem.decode(response.content)
    except msgspec.DecodeError:
        code = {401: "unauthenticated", 404: "not_found", 429: "rate_limited"}.get(
            response.status_code, "unavailable" if response.status_code >= 500 else "invalid"
        )
        return Refused(code, f"HTTP {response.status_code}", status=response.status_code, retry_after=retry_after)
    if problem.retry_after_ms is not None:
        retry_after = problem.retry_after_ms / 1000
    return Refused(
        problem.code,
        problem.detail,
        field=problem.field,
        bound=problem.bound,
        retry=problem.retry,
        retry_after=retry_after,
        status=response.status_code,
    )


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; its date form is not used by this API."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return None
