"""Clients that cost as little as possible: hand-made frames over picows, nothing decoded that need not be.

What the SDK does on the wire, these do too (acknowledge at most once a second); what it does inside, they do not.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterable
from typing import Any

import picows
from picows import WSFrame, WSListener, WSMsgType, WSTransport

_TEXT = WSMsgType.TEXT
_CREATED = b'{"type":"message.created"'
_SENT = b'{"type":"message.sent"'
_CONNECTED = b'{"type":"connected"'
_ERROR = b'{"type":"error"'

# Handshakes under way at once in one process: more only queue in the server.
CONNECTING_MAX = 64


class Socket(WSListener):
    """One device's connection.

    `events`, `bytes`: message events received and their payload. `on_sent`, `on_other`: called for each
    acknowledgement, and for each other frame with its payload.
    """

    def __init__(self, on_sent: Callable[[bytes], None] | None = None) -> None:
        self.events = 0
        self.bytes = 0
        self.last: bytes | None = None
        self.on_sent = on_sent
        self.on_event: Callable[[], None] | None = None
        self.on_other: Callable[[bytes], None] | None = None
        self.connected: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Ends `until`: an error from the server, or the end of the connection.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda failed: failed.cancelled() or failed.exception())
        self.transport: WSTransport
        self._acknowledged: bytes | None = None

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        payload = frame.get_payload_as_bytes()
        if payload.startswith(_CREATED):
            self.events += 1
            self.last = payload
            self.bytes += len(payload)
            if self.on_event is not None:
                self.on_event()
        elif payload.startswith(_SENT):
            if self.on_sent is not None:
                self.on_sent(payload)
        elif not self.connected.done():
            if payload.startswith(_CONNECTED):
                self.connected.set_result(payload)
            else:
                self.connected.set_exception(RuntimeError(payload.decode()))
        elif payload.startswith(_ERROR):
            if not self.failed.done():
                self.failed.set_exception(RuntimeError(payload.decode()))
        elif self.on_other is not None:
            self.on_other(payload)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if not self.connected.done():
            self.connected.set_exception(ConnectionError("closed before `connected`"))
        if not self.failed.done():
            self.failed.set_exception(ConnectionError("the server has closed the connection"))

    async def until(self, event: asyncio.Event, seconds: float = 300.0) -> None:
        """Wait for an event that a frame will set. Raises what the server refuses, ConnectionError, TimeoutError."""
        waiting: asyncio.Future[Any] = asyncio.ensure_future(event.wait())
        both: set[asyncio.Future[Any]] = {waiting, self.failed}
        try:
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self.failed.done():
                self.failed.result()
            if not event.is_set():
                raise TimeoutError(f"nothing came in {seconds:g} s")
        finally:
            waiting.cancel()

    def send(self, payload: bytes) -> None:
        self.transport.send(_TEXT, payload)

    def acknowledge(self) -> None:
        """Acknowledge the newest event unless that is done already."""
        last = self.last
        if last is None or last is self._acknowledged:
            return
        self._acknowledged = last
        event = json.loads(last)
        self.send(b'{"type":"ack","positions":{"%s":%d}}' % (event["stream"].encode(), event["seq"]))


async def connect(port: int, token: str, device: str = "d1", source: str | None = None, **more: Any) -> Socket:
    """Connect and authenticate. `more`: further fields of the `connect` command. `source`: address to connect from."""
    hello = json.dumps({"type": "connect", "ref": 1, "token": token, "device": {"id": device}, **more})
    extra: dict[str, Any] = {} if source is None else {"local_addr": (source, 0)}
    _, listener = await picows.ws_connect(
        Socket, f"ws://127.0.0.1:{port}/v1/ws", websocket_handshake_timeout=60, **extra
    )
    assert isinstance(listener, Socket)
    listener.transport.underlying_transport.get_extra_info("socket").setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )
    listener.send(hello.encode())
    await listener.connected
    return listener


async def connect_all(port: int, tokens: Iterable[str], **more: Any) -> list[Socket]:
    """Connect many at once; in the order of the tokens."""
    gate = asyncio.Semaphore(CONNECTING_MAX)

    async def one(token: str) -> Socket:
        async with gate:
            return await connect(port, token, **more)

    return list(await asyncio.gather(*(one(token) for token in tokens)))


def acknowledge_all(sockets: list[Socket], seconds: float = 1.0) -> asyncio.Task[None]:
    """Acknowledge as the SDK does: each once a second, spread over it. Cancel the task to stop."""

    async def run() -> None:
        steps = 20
        while True:
            for step in range(steps):
                await asyncio.sleep(seconds / steps)
                for one in sockets[step::steps]:
                    one.acknowledge()

    return asyncio.create_task(run())


def message(ref: int, channel: str, key: str, text: str) -> bytes:
    """A `message.send` command. Names and text need no escaping here."""
    return b'{"type":"message.send","ref":%d,"channel":"%s","key":"%s","text":"%s"}' % (
        ref,
        channel.encode(),
        key.encode(),
        text.encode(),
    )


async def flood(sender: Socket, number: int, count: int, *, window: int, frame: Callable[[int], bytes]) -> int:
    """Send `count` messages, `frame(number)` each, counting on from `number`, `window` of them unacknowledged, until
    all are acknowledged; the last number. Raises what `sender.until` raises."""
    last = number + count
    done = asyncio.Event()
    unanswered = count

    def next_one() -> None:
        nonlocal number
        number += 1
        sender.send(frame(number))

    def answered(_: bytes) -> None:
        nonlocal unanswered
        unanswered -= 1
        if number < last:
            next_one()
        if unanswered == 0:
            done.set()

    sender.on_sent = answered
    for _ in range(min(window, count)):
        next_one()
    await sender.until(done)
    sender.on_sent = None
    return number
