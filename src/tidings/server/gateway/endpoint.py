"""The WebSocket endpoint: picows behind uvicorn's port.

uvicorn parses the HTTP request; when it asks for an upgrade, uvicorn's `ws` class takes over the transport. Ours is
picows' protocol, fed with the request once and then reading the socket itself. Control frames, fragments and limits are
handled here; text goes to the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import picows
from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, WSUpgradeResponse
from picows.picows import WSAutoPingStrategy, WSProtocol  # type: ignore[attr-defined]

from tidings.server.errors import Refusal
from tidings.server.telemetry import get_logger

from .connection import Connection
from .gateway import Gateway

log = get_logger(__name__)

PATH: Final = "/v1/ws"
# How long a client gets to answer our close frame before the line is cut, seconds.
CLOSE_SECONDS: Final = 2.0
# Bytes of a read buffer to begin with: a connection that only listens never needs more.
READ_BUFFER_BYTES: Final = 2_048
# Fragments of one message: a client that needs more sends bytes one by one.
FRAGMENTS_MAX: Final = 64

_TEXT: Final = WSMsgType.TEXT
_CONTINUATION: Final = WSMsgType.CONTINUATION
_quiet: Final = logging.LoggerAdapter(logging.getLogger("tidings.picows"), {})


class SocketConnection(Connection):
    """A connection over a WebSocket."""

    __slots__ = ("_raw", "_send", "_transport")

    def __init__(self, gateway: Gateway, address: str, header_token: str | None, transport: WSTransport) -> None:
        super().__init__(gateway, address, header_token)
        self._transport = transport
        self._raw: Any = transport.underlying_transport
        self._send = transport.send

    def write(self, data: bytes) -> None:
        self._raw.write(data)

    def write_one(self, payload: bytes) -> None:
        # Straight to the socket when nothing waits before it: the loop's own queue would cost half as much again.
        self._send(_TEXT, payload)

    def pause(self) -> None:
        super().pause()
        # Who does not read what is sent must not make us write more.
        if not self._raw.is_closing():
            self._raw.pause_reading()

    def resume(self) -> None:
        if not self._raw.is_closing():
            self._raw.resume_reading()
        super().resume()

    def end(self, code: int, reason: str) -> None:
        transport = self._transport
        if self.transport_paused:
            # A close frame would wait behind what is not read.
            transport.disconnect(False)
            return
        transport.send_close(code, reason.encode())  # type: ignore[arg-type]
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, transport.disconnect, False)


class SocketListener(WSListener):
    """Frames of one socket, in order."""

    def __init__(self, gateway: Gateway, address: str, header_token: str | None) -> None:
        self._gateway = gateway
        self._address = address
        self._token = header_token
        self._connection: SocketConnection | None = None
        self._fragments: list[bytes] | None = None
        self._size = 0

    def on_ws_connected(self, transport: WSTransport) -> None:
        connection = SocketConnection(self._gateway, self._address, self._token, transport)
        self._connection = connection
        # Above this the connection is a slow reader, and reads from the log what it has not taken.
        transport.underlying_transport.set_write_buffer_limits(
            high=self._gateway.config.outbox_bytes_max, low=self._gateway.config.outbox_bytes_max // 4
        )
        self._gateway.opened(connection)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        connection = self._connection
        if connection is None:
            return
        kind = frame.msg_type
        if frame.rsv1 or frame.rsv2 or frame.rsv3:
            # RFC 6455 5.2: no extension was agreed on that would give them a meaning.
            connection.close(Refusal("invalid", "Reserved bits are set in a frame."))
            return
        if kind == _TEXT and frame.fin and self._fragments is None:
            connection.receive(frame.get_payload_as_bytes())
            return
        if kind in (_TEXT, _CONTINUATION):
            self._fragment(connection, frame)
        elif kind == WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())
            connection.control()
        elif kind == WSMsgType.PONG:
            connection.control()
        elif kind == WSMsgType.CLOSE:
            if not transport.is_close_frame_sent:
                transport.send_close(WSCloseCode.OK)
            transport.disconnect()
        else:
            connection.close(Refusal("invalid", "Frames are JSON text; binary frames are not used."))

    def _fragment(self, connection: Connection, frame: WSFrame) -> None:
        first = frame.msg_type == _TEXT
        if first != (self._fragments is None):
            connection.close(Refusal("invalid", "The fragments of a message are out of order."))
            return
        if self._fragments is None:
            self._fragments, self._size = [], 0
        self._size += frame.payload_size
        self._fragments.append(frame.get_payload_as_bytes())
        bound = self._gateway.config.frame_bytes_max
        if self._size > bound or len(self._fragments) > FRAGMENTS_MAX:
            self._fragments = None
            connection.close(
                Refusal("too_large", f"A message may have {bound} bytes in {FRAGMENTS_MAX} fragments.", bound=bound)
            )
            return
        if frame.fin:
            whole, self._fragments = b"".join(self._fragments), None
            connection.receive(whole)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if self._connection is not None:
            self._connection.gone()

    def pause_writing(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume_writing(self) -> None:
        if self._connection is not None:
            self._connection.resume()


def socket_protocol(gateway: Gateway) -> Callable[..., WSProtocol]:
    """The class that uvicorn is to hand upgraded connections to."""

    def listener_for(address: str) -> Callable[[WSUpgradeRequest], Any]:
        def listener(request: WSUpgradeRequest) -> Any:
            path = request.path.decode("latin-1").split("?", 1)[0]
            if path != PATH:
                return _refuse(HTTPStatus.NOT_FOUND, b"WebSockets are at " + PATH.encode())
            came_from = client_address(gateway, address, request.headers.get("x-forwarded-for"))
            refusal = gateway.admit(came_from)
            if refusal is not None:
                return _refuse(HTTPStatus(refusal.problem.status), refusal.code.encode())
            authorization = request.headers.get("authorization", "")
            token = authorization[7:].strip() if authorization[:7].lower() == "bearer " else None
            return SocketListener(gateway, came_from, token)

        return listener

    class SocketProtocol(WSProtocol):  # type: ignore[misc]
        """picows' protocol with uvicorn's constructor."""

        __slots__ = ("_peer",)

        def __init__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
            self._peer = ""
            super().__init__(
                None,
                None,
                False,
                self._listener,
                _quiet,
                True,
                gateway.config.auth_timeout_seconds,
                False,
                0,
                0,
                WSAutoPingStrategy.PING_WHEN_IDLE,
                False,
                gateway.config.frame_bytes_max,
                None,
                READ_BUFFER_BYTES,
            )

        def _listener(self, request: WSUpgradeRequest) -> Any:
            return listener_for(self._peer)(request)

        def connection_made(self, transport: Any) -> None:
            peer = transport.get_extra_info("peername")
            self._peer = str(peer[0]) if peer else "local"
            super().connection_made(transport)

        def data_received(self, data: bytes) -> None:
            """The request that uvicorn has read, through the buffer that the protocol reads from."""
            while data:
                buffer = self.get_buffer(len(data))
                size = min(len(buffer), len(data))
                buffer[:size] = data[:size]
                self.buffer_updated(size)
                data = data[size:]

    return SocketProtocol


def client_address(gateway: Gateway, peer: str, forwarded: str | None) -> str:
    """The address a client is counted under: the peer's, or behind a trusted proxy the last one it vouches for."""
    if forwarded and gateway.config.behind_proxy and gateway.config.trusts(peer):
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        for hop in reversed(hops):
            if not gateway.config.trusts(hop):
                return hop
    return peer


def _refuse(status: HTTPStatus, body: bytes) -> picows.WSUpgradeResponseWithListener:
    return picows.WSUpgradeResponseWithListener(WSUpgradeResponse.create_error_response(status, body), None)
