"""A connection to NATS: its client protocol, as far as the bus needs it, and coming back whenever it is lost.

https://docs.nats.io/reference/reference-protocols/nats-protocol: lines of text over TCP. The server greets with
`INFO`, the client answers `CONNECT`; then `PUB`, `SUB`, `UNSUB` one way, `MSG`, `HMSG` the other, `PING` and `PONG`
both. Why not the official client: docs/decisions/0015-own-nats-client.md.

Nothing here waits for the network but `open`, `settled` and `close`. What is written in one turn of the event loop
leaves in one write. While the connection is away or its buffer is full, publishing says so by returning False, and
subscriptions are kept and made anew.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import random
import re
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidings.server.errors import BusUnavailable
from tidings.server.telemetry import get_logger

log = get_logger(__name__)

# What a message's subject, reply subject and data are given to; `nobody`: there is no subscriber to what was asked.
OnMessage: TypeAlias = Callable[[bytes, bytes, bytes, bool], None]

DEFAULT_PORT: Final = 4222
# Bytes waiting for a server that does not take them before notices are dropped: half a second at 100,000 small
# messages a second. Gaps are read from the store, which beats a buffer without end.
PENDING_BYTES_MAX: Final = 8 << 20
# How often the connection is tried, and how long silence may last, seconds: a node that is cut off must know within
# seconds, because from then on it does not trust what it remembers.
PING_SECONDS: Final = 1.0
SILENCE_SECONDS: Final = 3.0
# One server's time to be connected, seconds, TLS included.
DIAL_SECONDS: Final = 3.0
# Between tries, seconds, doubling, each drawn from [0, it]: when a server dies, its nodes must not come back as one.
RETRY_SECONDS: Final = 0.1
RETRY_SECONDS_MAX: Final = 2.0
# Lines of the protocol have at most 4,096 bytes by default, INFO grows with the number of servers.
LINE_BYTES_MAX: Final = 65_536

_M: Final = ord("M")
_H: Final = ord("H")


class NatsRefused(BusUnavailable):
    """The server does not let us in: trying again will not help."""


@dataclass(slots=True, frozen=True)
class Address:
    """Where a server listens; `tls` when the connection must be encrypted whether or not the server insists."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(slots=True, frozen=True)
class Credentials:
    """What the servers are shown: user and password, a token, or the signature of their nonce by the seed of an nkey,
    with the JWT that vouches for it, if there is one."""

    user: str | None = None
    password: str | None = None
    token: str | None = None
    jwt: str | None = None
    seed: bytes | None = None


def read_address(url: str) -> Address:
    """An address from `nats://host:port` or `tls://host:port`. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        raise ValueError(f"{url!r} is not like nats://host:4222 or tls://host:4222")
    return Address(parts.hostname, parts.port or DEFAULT_PORT, parts.scheme == "tls")


def read_credentials(path: Path) -> Credentials:
    """Credentials from a file: what `nsc` writes (`.creds`, `.nk`), or one line with `user:password` or a token.

    Raises OSError, ValueError.
    """
    text = path.read_text(encoding="ascii")
    if "-----BEGIN" not in text:
        first = text.strip().splitlines()[0].strip() if text.strip() else ""
        if not first:
            raise ValueError(f"{path} is empty")
        if re.fullmatch(r"SU[A-Z2-7]{56}", first):
            return Credentials(seed=_read_seed(first, path))
        user, colon, password = first.partition(":")
        return Credentials(user=user, password=password) if colon else Credentials(token=first)
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("-----"):
            inside = "BEGIN" in line
        elif inside and line.strip():
            found.append(line.strip())
    if len(found) < 2:
        raise ValueError(f"{path} does not hold a JWT and a seed")
    return Credentials(jwt=found[0], seed=_read_seed(found[1], path))


def _read_seed(text: str, path: Path) -> bytes:
    # An nkey: two bytes of kind, 32 of seed, two of checksum, in base 32 without padding.
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except ValueError:
        raw = b""
    if len(raw) != 36:
        raise ValueError(f"{path} does not hold an nkey seed")
    return raw[2:34]


def public_nkey(seed: bytes) -> str:
    """The name under which a user's seed is known: its kind, the public key and a CRC-16 (XMODEM), in base 32."""
    raw = b"\xa0" + Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


class Info(msgspec.Struct):
    """What we use of a server's greeting."""

    max_payload: int = 1 << 20
    tls_required: bool = False
    nonce: str | None = None
    connect_urls: list[str] = []
    server_name: str = ""


class _Wire(asyncio.Protocol):
    """The protocol on one TCP connection."""

    def __init__(self, link: NatsLink) -> None:
        self._link = link
        loop = asyncio.get_running_loop()
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self.greeted: asyncio.Future[Info] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.heard_at = loop.time()
        self.full = False
        self._rest = b""
        # Who waits for the answers to pings, in their order: True when it came, False when it never will.
        self._pongs: deque[Callable[[bool], None]] = deque()
        self.refused = ""

    # ------------------------------------------------------------ from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=PENDING_BYTES_MAX, low=PENDING_BYTES_MAX // 4)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError("closed before its greeting"))
            self.greeted.exception()
        if not self.closed.done():
            self.closed.set_result(None)
        while self._pongs:
            self._pongs.popleft()(False)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self._link.has_room()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        if self._rest:
            data = self._rest + data
        handlers = self._link.handlers
        at, end = 0, len(data)
        while at < end:
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                if end - at > LINE_BYTES_MAX:
                    self.abort("a line without end")
                    return
                break
            kind = data[at]
            if kind in (_M, _H):
                # MSG <subject> <sid> [reply] <size>, HMSG <subject> <sid> [reply] <size of headers> <size>
                words = data[at:line_end].split()
                start = line_end + 2
                stop = start + int(words[-1])
                if stop + 2 > end:
                    break
                at = stop + 2
                handler = handlers.get(words[2])
                if handler is None:
                    continue
                if kind == _M:
                    handler(words[1], words[3] if len(words) == 5 else b"", data[start:stop], False)
                else:
                    # We send no headers. What comes with some is the server's word that nobody is there.
                    handler(words[1], b"", b"", data[start : start + 12] == b"NATS/1.0 503")
            else:
                self._line(data[at:line_end])
                at = line_end + 2
        self._rest = data[at:] if at < end else b""

    def _line(self, line: bytes) -> None:
        if line == b"PONG":
            if self._pongs:
                self._pongs.popleft()(True)
        elif line == b"PING":
            self.write(b"PONG\r\n")
        elif line.startswith(b"INFO "):
            info = msgspec.json.decode(line[5:], type=Info)
            self._link.learn(info)
            if not self.greeted.done():
                self.greeted.set_result(info)
        elif line.startswith(b"-ERR"):
            self.refused = line[4:].strip().strip(b"'").decode(errors="replace")
            # Names of subjects are identifiers; what else NATS says holds none of ours.
            log.warning("bus_error", says=self.refused)

    # ------------------------------------------------------------ to the transport

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def ping(self, then: Callable[[bool], None]) -> bytes:
        """The line that asks, for the caller to write; `then` hears whether everything before it was taken."""
        self._pongs.append(then)
        return b"PING\r\n"

    def abort(self, why: str) -> None:
        log.warning("bus_connection_aborted", why=why)
        if self.transport is not None:
            self.transport.abort()


class NatsLink:
    """Keeps one connection to one of several servers, for ever. Everything happens on the event loop.

    `on_up(again)` is called when it is usable, with all subscriptions in place; `on_down()` when it was lost;
    `on_room()` when publishing works again after the buffer was full.
    """

    def __init__(
        self,
        servers: Sequence[Address],
        *,
        name: str,
        credentials: Callable[[], Credentials | None] = lambda: None,
        tls: ssl.SSLContext | None = None,
        on_up: Callable[[bool], None] = lambda again: None,
        on_down: Callable[[], None] = lambda: None,
        on_room: Callable[[], None] = lambda: None,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._servers = list(servers)
        self._name = name
        self._credentials = credentials
        self._tls = tls
        self._on_up = on_up
        self._on_down = on_down
        self._on_room = on_room
        self._rng = rng
        self._wire: _Wire | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._ups = 0
        # By the number that MSG lines name.
        self.handlers: dict[bytes, OnMessage] = {}
        self._subjects: dict[bytes, bytes] = {}
        self._last = 0
        # Lines of this turn of the loop, and who waits until they are taken.
        self._out: list[bytes] = []
        self._settling: list[asyncio.Future[bool]] = []
        self._scheduled = False
        self.max_payload = 1 << 20
        self.round_trip_seconds = 0.0
        self.reconnects = 0

    # ------------------------------------------------------------ life

    @property
    def up(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._wire is not None

    @property
    def held_up(self) -> bool:
        """Whether the server takes nothing at the moment."""
        return self._wire is not None and self._wire.full

    async def open(self, seconds: float) -> None:
        """Connect, trying for `seconds`. Raises NatsRefused, BusUnavailable with what each server said."""
        deadline = self._loop.time() + seconds
        trouble: dict[str, str] = {}
        delay = RETRY_SECONDS
        while True:
            wire = await self._dial_any(trouble)
            if wire is not None:
                self._ready(wire)
                self._keeping = self._loop.create_task(self._keep(wire))  # owned by this link, ended by close()
                return
            if self._loop.time() >= deadline:
                said = "; ".join(f"{address}: {why}" for address, why in trouble.items())
                raise BusUnavailable(f"No NATS server can be reached after {seconds:g} s. {said}")
            await asyncio.sleep(delay * (0.5 + self._rng() / 2))
            delay = min(2 * delay, RETRY_SECONDS_MAX)

    async def close(self) -> None:
        """Write what is left, then hang up."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self._write_out()
        wire, self._wire = self._wire, None
        if wire is not None and wire.transport is not None:
            wire.transport.close()
            try:
                async with asyncio.timeout(1):
                    await wire.closed
            except TimeoutError:
                wire.transport.abort()
        self._give_up()

    async def _keep(self, wire: _Wire) -> None:
        while True:
            await self._watch(wire)
            self._wire = None
            self._out.clear()
            self._give_up()
            log.warning("bus_disconnected")
            self._on_down()
            delay = RETRY_SECONDS
            while True:
                await asyncio.sleep(delay * self._rng())
                delay = min(2 * delay, RETRY_SECONDS_MAX)
                try:
                    found = await self._dial_any({})
                except NatsRefused as error:
                    # Credentials may be in the middle of being changed: what was good once may be again.
                    log.error("bus_refused", says=error.args[0])
                    continue
                if found is not None:
                    wire = found
                    self.reconnects += 1
                    self._ready(wire)
                    break

    def _ready(self, wire: _Wire) -> None:
        self._wire = wire
        again = self._ups > 0
        self._ups += 1
        log.info("bus_connected", again=again)
        self._on_up(again)

    async def _watch(self, wire: _Wire) -> None:
        """Until the connection is lost, by whatever."""
        while not wire.closed.done():
            await asyncio.wait([wire.closed], timeout=PING_SECONDS)
            now = self._loop.time()
            if wire.closed.done():
                return
            if now - wire.heard_at > SILENCE_SECONDS:
                wire.abort("it is silent")
                return

            def pong(answered: bool, asked_at: float = now) -> None:
                if answered:
                    self.round_trip_seconds = self._loop.time() - asked_at

            wire.write(wire.ping(pong))

    # ------------------------------------------------------------ dialling

    async def _dial_any(self, trouble: dict[str, str]) -> _Wire | None:
        servers = sorted(self._servers, key=lambda _: self._rng())
        for address in servers:
            try:
                async with asyncio.timeout(DIAL_SECONDS):
                    return await self._dial(address)
            except NatsRefused:
                raise
            except TimeoutError:
                trouble[str(address)] = "no answer"
            except (OSError, ValueError, msgspec.DecodeError) as error:
                trouble[str(address)] = str(error) or type(error).__name__
        return None

    async def _dial(self, address: Address) -> _Wire:
        wire = _Wire(self)
        try:
            transport, _ = await self._loop.create_connection(lambda: wire, address.host, address.port)
            info = await wire.greeted
            if address.tls or info.tls_required:
                context = self._tls or ssl.create_default_context()
                secured = await self._loop.start_tls(transport, wire, context, server_hostname=address.host)
                if secured is None:
                    raise ConnectionError("closed while TLS was agreed on")
                wire.connection_made(secured)
            self.max_payload = info.max_payload
            taken: asyncio.Future[bool] = self._loop.create_future()
            subjects = dict(self._subjects)
            lines = [self._connect_line(info), *(_sub(number, subject) for number, subject in subjects.items())]
            lines.append(wire.ping(taken.set_result))
            wire.write(b"".join(lines))
            answered = await taken
            if wire.refused and not answered:
                if "authori" in wire.refused.lower() or "authenti" in wire.refused.lower():
                    raise NatsRefused(f"The NATS server at {address} refuses us: {wire.refused}.")
                raise ConnectionError(wire.refused)
            if not answered:
                raise ConnectionError("closed while connecting")
            # What was subscribed to and given up meanwhile. From here to `_ready` nothing is awaited.
            late = [_sub(number, subject) for number, subject in self._subjects.items() if number not in subjects]
            late += [b"UNSUB %b\r\n" % number for number in subjects if number not in self._subjects]
            wire.write(b"".join(late))
            return wire
        except BaseException:
            if wire.transport is not None:
                wire.transport.abort()
            raise

    def _connect_line(self, info: Info) -> bytes:
        credentials = self._credentials()
        options: dict[str, Any] = {
            "verbose": False,
            "pedantic": False,
            "lang": "tidings",
            "version": "1",
            "protocol": 1,
            "name": self._name,
            "echo": False,
            "headers": True,
            "no_responders": True,
        }
        if credentials is not None:
            if credentials.seed is not None:
                signature = Ed25519PrivateKey.from_private_bytes(credentials.seed).sign((info.nonce or "").encode())
                if credentials.jwt is not None:
                    options["jwt"] = credentials.jwt
                else:
                    options["nkey"] = public_nkey(credentials.seed)
                options["sig"] = base64.urlsafe_b64encode(signature).decode().rstrip("=")
            elif credentials.token is not None:
                options["auth_token"] = credentials.token
            else:
                options["user"], options["pass"] = credentials.user, credentials.password
        return b"CONNECT %b\r\n" % msgspec.json.encode(options)

    def learn(self, info: Info) -> None:
        """The servers that a server knows of, to come back to when it dies."""
        known = {str(address) for address in self._servers}
        tls = all(address.tls for address in self._servers)
        for found in info.connect_urls:
            try:
                address = read_address(f"{'tls' if tls else 'nats'}://{found}")
            except ValueError:
                continue
            if str(address) not in known and len(known) < 64:
                known.add(str(address))
                self._servers.append(address)

    # ------------------------------------------------------------ speaking

    def subscribe(self, subject: bytes, handler: OnMessage) -> bytes:
        """Hear what is published on a subject; the number for `unsubscribe`. In place after `settled`."""
        self._last += 1
        number = b"%d" % self._last
        self.handlers[number] = handler
        self._subjects[number] = subject
        if self._wire is not None:
            self._put(_sub(number, subject))
        return number

    def unsubscribe(self, number: bytes) -> None:
        """Hear no more of it."""
        del self.handlers[number], self._subjects[number]
        if self._wire is not None:
            self._put(b"UNSUB %b\r\n" % number)

    def publish(self, subject: bytes, data: bytes, reply: bytes = b"") -> bool:
        """Hand over a message; False if it is dropped: there is no connection, or it takes nothing at the moment."""
        wire = self._wire
        if wire is None or wire.full:
            return False
        out = self._out
        if not out:
            self._schedule()
        if reply:
            out.append(b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(data), data))
        else:
            out.append(b"PUB %b %d\r\n%b\r\n" % (subject, len(data), data))
        return True

    async def settled(self, seconds: float) -> bool:
        """Wait until the server has taken everything said until now: True; or the connection or time is gone."""
        if self._wire is None:
            return False
        future: asyncio.Future[bool] = self._loop.create_future()
        self._settling.append(future)
        self._schedule()
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            return False

    def has_room(self) -> None:
        """The transport takes bytes again."""
        self._on_room()

    def _put(self, line: bytes) -> None:
        if not self._out:
            self._schedule()
        self._out.append(line)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._write_out)

    def _write_out(self) -> None:
        self._scheduled = False
        wire, out = self._wire, self._out
        if wire is None:
            out.clear()
            return
        if self._settling:
            waiting, self._settling = self._settling, []

            def taken(answered: bool) -> None:
                _settle(waiting, answered)

            out.append(wire.ping(taken))
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            wire.write(data)

    def _give_up(self) -> None:
        waiting, self._settling = self._settling, []
        _settle(waiting, False)


def _sub(number: bytes, subject: bytes) -> bytes:
    return b"SUB %b %b\r\n" % (subject, number)


def _settle(waiting: list[asyncio.Future[bool]], answered: bool) -> None:
    for future in waiting:
        if not future.done():
            future.set_result(answered)
