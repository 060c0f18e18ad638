"""The connection below HTTP: who may hold one open, and how long a request may take to arrive.

uvicorn closes a connection that stays idle after a request. Before the first one, in the middle of a head and in the
middle of a body it waits for ever, and it counts nothing: strangers could hold every file descriptor with a byte each.
Here every connection that owes us bytes has a deadline, and each address a number of connections.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tidings.server.config import Config
from tidings.server.errors import Refusal
from tidings.wire.codec import encode

from .problems import headers_of

# A body of the largest size, 1 MB, over a link of 300 kbit/s; messages take a second of it. Longer bodies than that do
# not exist here, and everybody else holds a connection and a credential that was checked a while ago.
BODY_SECONDS: Final = 30.0


class _Watch:
    """Connections that owe us bytes, by deadline, and connections by address. One per server, in its event loop."""

    def __init__(self, config: Config, body_seconds: float) -> None:
        self.config = config
        self.head_seconds = config.auth_timeout_seconds
        self.body_seconds = body_seconds
        # In the order in which they were added, which is that of their deadlines: each has one duration for all.
        self.heads: dict[_Protocol, float] = {}
        self.bodies: dict[_Protocol, float] = {}
        self.by_address: dict[str, int] = {}
        self.count = 0
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, address: str) -> Refusal | None:
        """Count a connection, or say why it is refused."""
        bound = self.config.connections_max
        if self.count >= bound:
            return Refusal("too_many_connections", "This server is full.", bound=bound, retry_after_ms=5000)
        # Everybody comes from a proxy's address: counting there is the proxy's business.
        bound = self.config.connections_per_address
        if self.by_address.get(address, 0) >= bound and not self.config.trusts(address):
            return Refusal(
                "too_many_connections", "Too many connections from this address.", bound=bound, retry_after_ms=5000
            )
        self.count += 1
        self.by_address[address] = self.by_address.get(address, 0) + 1
        return None

    def leave(self, address: str) -> None:
        """A counted connection is gone, or is a WebSocket now, which the gateway counts."""
        self.count -= 1
        left = self.by_address[address] - 1
        if left:
            self.by_address[address] = left
        else:
            del self.by_address[address]

    def expect(self, protocol: _Protocol, *, body: bool) -> None:
        """From now on the connection owes us a head or a body; if it did before, its deadline stays."""
        waiting, seconds = (self.bodies, self.body_seconds) if body else (self.heads, self.head_seconds)
        if protocol in waiting:
            return
        (self.heads if body else self.bodies).pop(protocol, None)
        loop = protocol.loop
        waiting[protocol] = deadline = loop.time() + seconds
        self._wake_at(loop, deadline)

    def arrived(self, protocol: _Protocol) -> None:
        """The connection owes us nothing."""
        if self.heads.pop(protocol, None) is None:
            self.bodies.pop(protocol, None)

    def _sweep(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for waiting in (self.heads, self.bodies):
            while waiting:
                protocol, deadline = next(iter(waiting.items()))
                if deadline > now:
                    self._wake_at(loop, deadline)
                    break
                del waiting[protocol]
                protocol.too_late()

    def _wake_at(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = loop.call_at(deadline, self._sweep)


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with deadlines. `_whole`: everything that came so far is whole requests; `_head`: a head is."""

    watch: _Watch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._address = ""
        self._counted = self._whole = self._head = self._watched = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else "local"
        refusal = self.watch.enter(self._address)
        if refusal is not None:
            self._answer(refusal)
            return
        self._counted = self._watched = True
        self.watch.expect(self, body=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._counted:
            return  # Refused, or a WebSocket by now.
        # An answered request and bytes that begin no other: line ends would keep an idle connection open for ever.
        if self._whole and not self.cycle.response_complete:
            if self._watched:
                self._watched = False
                self.watch.arrived(self)
        else:
            self._watched = True
            self.watch.expect(self, body=self._head)

    def handle_websocket_upgrade(self) -> None:
        self._leave()
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        self._whole = self._head = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._whole, self._head = True, False
        super().on_message_complete()

    def too_late(self) -> None:
        """What was owed did not come in time."""
        self._watched = False
        if self.transport.is_closing():
            return
        cycle = self.cycle
        # Nothing to say to who has said nothing, and nothing that could be said in the middle of an answer.
        if self._head and cycle is not None and not cycle.response_started:
            self._answer(Refusal("request_timeout", "The request did not arrive in time."))
        else:
            self.transport.close()

    def _leave(self) -> None:
        if self._watched:
            self._watched = False
            self.watch.arrived(self)
        if self._counted:
            self._counted = False
            self.watch.leave(self._address)

    def _answer(self, refusal: Refusal) -> None:
        document = refusal.document()
        body = encode(document)
        lines = [b"HTTP/1.1 %d %b" % (document.status, document.title.encode())]
        lines += [b"%b: %b" % header for header in headers_of(document)]
        lines += [b"content-length: %d" % len(body), b"connection: close", b"", body]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


def http_protocol(config: Config, *, body_seconds: float = BODY_SECONDS) -> type[HttpToolsProtocol]:
    """The class for uvicorn's `http` setting. `body_seconds`: what a body may take after its head."""
    return type("HttpProtocol", (_Protocol,), {"watch": _Watch(config, body_seconds)})
