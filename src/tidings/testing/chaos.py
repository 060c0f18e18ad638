"""A TCP proxy on loopback that misbehaves on command, for tests of clients and servers on a bad network.

    async with ChaosProxy(server_port, seed=7) as proxy:
        client = connect(port=proxy.port)
        proxy.set(latency_s=0.05, jitter_s=0.02)
        proxy.cut()                      # every connection dies with a reset
        proxy.set(stall_down=True)       # open, but nothing comes back any more
        proxy.heal()

`up` is from the client to the target, `down` the way back. All randomness comes from `seed`. Faults may be switched at
any time and apply to what is on its way, too. TCP itself stays honest: within one direction of one connection bytes are
delayed, held or cut off, never lost in the middle, changed or reordered.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

Direction = Literal["up", "down"]

LOOPBACK = "127.0.0.1"

# One read: as much as an event loop hands out at once.
CHUNK_BYTES = 1 << 16

# Chunks held per direction of one connection: beyond it the sender feels back-pressure, as on a full link.
CHUNKS_HELD_MAX = 64

# A capped link moves its bytes in slices of this long, so that a cap or a cut takes effect within one slice.
SLICE_S = 0.05

# How long a connection whose reply is to be dropped waits for that reply before it is cut anyway:
# by then the target has had the request for long enough to act on it.
REPLY_WAIT_S = 1.0

# SO_LINGER on with zero seconds: close() throws away what is unsent and sends a reset.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Faults(msgspec.Struct, frozen=True):
    """What is wrong with the network now; the default is nothing.

    `latency_s` + up to `jitter_s` (uniform) is added to each chunk, per direction. `bytes_per_s` caps each
    direction of each connection. `stall_up`, `stall_down`: a black hole; what arrives is held, ends of streams
    included, until healed. `cut_mean_s`: each connection is reset after a random time with this mean (exponential).
    `drop_reply_share`: this share of the chunks going up has its reply dropped as by `ChaosProxy.drop_reply`.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None
    stall_up: bool = False
    stall_down: bool = False
    cut_mean_s: float | None = None
    drop_reply_share: float = 0.0


@dataclass(slots=True)
class ProxyStats:
    """What happened since the start. `unreachable`: accepted, but the target was not there. `bytes_*` as received."""

    accepted: int = 0
    unreachable: int = 0
    cuts: int = 0
    random_cuts: int = 0
    replies_dropped: int = 0
    half_closes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class _PlannedDrop:
    remaining: int
    matching: Callable[[bytes], bool]


class _Flow:
    """One direction of one connection: what was read waits in `held` until it is due."""

    def __init__(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.direction: Direction = direction
        self.reader = reader
        self.writer = writer
        # (when due, bytes or b"" for the end, whether the reply to it is to be dropped)
        self.held: asyncio.Queue[tuple[float, bytes, bool]] = asyncio.Queue(CHUNKS_HELD_MAX)
        self.ended = False

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            # uvloop raises RuntimeError for a transport that was cut meanwhile.
            with contextlib.suppress(RuntimeError):
                if self.writer.can_write_eof():
                    self.writer.write_eof()


class _Link:
    """One client's connection and the one made for it to the target."""

    def __init__(self, up: _Flow, down: _Flow) -> None:
        self.up = up
        self.down = down
        self.cut = asyncio.Event()
        self.muted = False
        self.reply_came = asyncio.Event()

    def reset(self) -> None:
        for flow in (self.up, self.down):
            _reset(flow.writer)
        self.cut.set()


class ChaosProxy:
    """Listens on a free loopback port (`port`) and forwards to `target_port` on `target_host`.

    Several ports: each connection goes to one drawn from them, and on to the next where nobody listens, as a load
    balancer would have it. They may be changed at any time and count for connections to come.
    """

    def __init__(self, target_port: int, *others: int, target_host: str = LOOPBACK, seed: int = 0) -> None:
        self.target_ports = [target_port, *others]
        self.stats = ProxyStats()
        self._target_host = target_host
        self._random = random.Random(seed)
        self._faults = Faults()
        self._changed = asyncio.Event()
        self._links: dict[_Link, None] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._planned_drops: list[_PlannedDrop] = []
        self._server: asyncio.Server | None = None
        # Bound, but never listening: it keeps the port ours while new connections are refused.
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]

    async def __aenter__(self) -> Self:
        await self.accept_connections()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse_connections()
        handlers = list(self._handlers)
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
        self._reserved.close()

    @property
    def target_port(self) -> int:
        """Of the only target, or the first."""
        return self.target_ports[0]

    @target_port.setter
    def target_port(self, port: int) -> None:
        self.target_ports = [port]

    @property
    def faults(self) -> Faults:
        return self._faults

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def set(self, **changes: float | bool | None) -> None:
        """Change some faults (`Faults`), leave the others as they are. Raises `TypeError` for an unknown one."""
        self._faults = msgspec.structs.replace(self._faults, **changes)
        self._wake()

    def heal(self) -> None:
        """No faults from now on; what was held flows. Connections that were cut stay cut, refusal stays."""
        self._faults = Faults()
        self._planned_drops.clear()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def refuse_connections(self) -> None:
        """New connections are refused by the operating system (ECONNREFUSED); the open ones stay."""
        if self._server is not None:
            # Not wait_closed(): from Python 3.12 on that waits for the open connections, too.
            self._server.close()
            self._server = None

    async def accept_connections(self) -> None:
        """Take new connections (again), on the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._handle, LOOPBACK, self.port, limit=CHUNK_BYTES)

    def cut(self, count: int | None = None) -> int:
        """Reset all connections, or `count` random ones, on both sides. Returns how many."""
        links = list(self._links)
        chosen = links if count is None else self._random.sample(links, min(count, len(links)))
        for link in chosen:
            self._cut(link)
        return len(chosen)

    def drop_reply(self, nth: int = 1, *, matching: Callable[[bytes], bool] = lambda chunk: True) -> None:
        """Let the `nth` chunk going up from now on (of those that are `matching`) through, but not its reply.

        From the moment it was forwarded nothing goes down any more; when the target begins to reply, or after
        `REPLY_WAIT_S`, the connection is reset on both sides. So the target has acted, and the client cannot know.
        A chunk is what one read brings: a small request is one. Masked WebSocket frames cannot be matched by text.
        """
        if nth < 1:
            raise ValueError(f"nth counts from 1, not {nth}")
        self._planned_drops.append(_PlannedDrop(nth, matching))

    def half_close(self, direction: Direction) -> int:
        """End one direction of every connection: its receiver sees the end of the stream, the other way goes on.

        Returns how many. What is sent that way later is swallowed.
        """
        flows = [link.up if direction == "up" else link.down for link in self._links]
        for flow in flows:
            flow.end()
        self.stats.half_closes += len(flows)
        return len(flows)

    def _cut(self, link: _Link) -> None:
        self.stats.cuts += 1
        link.reset()
        self._links.pop(link, None)

    async def _handle(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        self.stats.accepted += 1
        try:
            target = await self._reach()
            if target is None:
                self.stats.unreachable += 1
                _reset(client_writer)
                return
            reader, writer = target
            link = _Link(_Flow("up", client_reader, writer), _Flow("down", reader, client_writer))
            self._links[link] = None
            try:
                await self._run(link)
            finally:
                self._links.pop(link, None)
                for flow in (link.up, link.down):
                    flow.writer.close()
        except asyncio.CancelledError:
            # The proxy is closing: asyncio's own callback on this task would report a cancellation as an error.
            _reset(client_writer)

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to one of the targets, None when nobody listens anywhere."""
        ports = self.target_ports
        for port in ports if len(ports) == 1 else self._random.sample(ports, len(ports)):
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(self._target_host, port, limit=CHUNK_BYTES)
        return None

    async def _run(self, link: _Link) -> None:
        pumps = [
            asyncio.create_task(work)  # owned by this method: gathered below
            for flow in (link.up, link.down)
            for work in (self._receive(link, flow), self._forward(link, flow))
        ]
        ending = asyncio.create_task(self._wait_cut(link))  # owned by this method: waited for below
        watchers = [ending, asyncio.create_task(self._cut_at_random(link))]  # owned by this method: cancelled below
        through = asyncio.gather(*pumps)
        try:
            waiting: set[asyncio.Future[Any]] = {through, ending}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if through.done() and not through.cancelled() and through.exception() is not None:
                # One side is gone without a goodbye: pass that on as it is.
                link.reset()
        finally:
            through.cancel()
            for task in (*pumps, *watchers):
                task.cancel()
            results = await asyncio.gather(through, *pumps, *watchers, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result

    async def _wait_cut(self, link: _Link) -> None:
        await link.cut.wait()

    async def _receive(self, link: _Link, flow: _Flow) -> None:
        loop = asyncio.get_running_loop()
        while True:
            chunk = await flow.reader.read(CHUNK_BYTES)
            dropping = False
            if flow.direction == "up":
                self.stats.bytes_up += len(chunk)
                dropping = bool(chunk) and self._choose_drop(chunk)
            else:
                self.stats.bytes_down += len(chunk)
                if link.muted:
                    link.reply_came.set()
                    if not chunk:
                        return
                    continue
            faults = self._faults
            # Jitter only ever delays: `held` is a queue, so no chunk overtakes the one in front of it.
            due = loop.time() + faults.latency_s + self._random.uniform(0, faults.jitter_s)
            await flow.held.put((due, chunk, dropping))
            if not chunk:
                return

    def _choose_drop(self, chunk: bytes) -> bool:
        dropping = self._faults.drop_reply_share > 0 and self._random.random() < self._faults.drop_reply_share
        for planned in list(self._planned_drops):
            if planned.matching(chunk):
                planned.remaining -= 1
                if planned.remaining == 0:
                    self._planned_drops.remove(planned)
                    dropping = True
        return dropping

    async def _forward(self, link: _Link, flow: _Flow) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk, dropping = await flow.held.get()
            if (delay := due - loop.time()) > 0:
                await asyncio.sleep(delay)
            await self._wait_flowing(flow.direction)
            if not chunk:
                flow.end()
                return
            # From before the last byte leaves: the reply cannot overtake the decision.
            link.muted = link.muted or dropping
            await self._write(flow, chunk)
            if dropping:
                self.stats.replies_dropped += 1
                try:
                    await asyncio.wait_for(link.reply_came.wait(), REPLY_WAIT_S)
                except TimeoutError:
                    pass
                self._cut(link)
                return

    async def _write(self, flow: _Flow, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest and not flow.ended:
            rate = self._faults.bytes_per_s
            size = len(rest) if rate is None else max(1, min(len(rest), int(rate * SLICE_S)))
            if rate is not None:
                await asyncio.sleep(size / rate)
                await self._wait_flowing(flow.direction)
            if flow.ended:
                return
            flow.writer.write(rest[:size])
            await flow.writer.drain()
            rest = rest[size:]

    async def _wait_flowing(self, direction: Direction) -> None:
        while self._faults.stall_up if direction == "up" else self._faults.stall_down:
            await self._changed.wait()

    async def _cut_at_random(self, link: _Link) -> None:
        while True:
            changed, mean = self._changed, self._faults.cut_mean_s
            wait = None if mean is None else self._random.expovariate(1 / mean)
            try:
                await asyncio.wait_for(changed.wait(), wait)
            except TimeoutError:
                self.stats.random_cuts += 1
                self._cut(link)
                return


def reserve_port() -> socket.socket:
    """A socket bound to a free loopback port that never listens.

    While it is open nobody else is given the port, connections to it are refused, and a server that sets SO_REUSEADDR
    (asyncio and uvicorn do) may still bind it and listen, as often as it likes.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((LOOPBACK, 0))
    return reserved


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:
        pass  # It is closed already, which is what is wanted.
    writer.transport.abort()
