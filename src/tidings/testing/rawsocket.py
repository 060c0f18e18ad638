"""A WebSocket client that does what it is told, for testing how a server takes abuse (RFC 6455).

Nothing is checked before it leaves: any opcode, reserved bits, with or without mask, fragments in any order, a length
that lies. Not for ordinary use: it answers no ping and joins no fragments.

    async with await RawSocket.open(port) as raw:
        await raw.handshake("/v1/socket")
        await raw.send_frame(TEXT, b"hello", mask=None)     # a client must mask
        assert (await raw.read_close()).code == 1002
"""

import asyncio
import base64
import hashlib
import os
import socket
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import msgspec

CONTINUATION = 0x0
TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

# RFC 6455, section 1.3: appended to the client's key before hashing.
_ACCEPT_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

# A server's answer to a handshake is a few hundred bytes; more is not an answer.
HANDSHAKE_BYTES_MAX = 1 << 16

# What a test waits for a reply before it calls the server silent.
REPLY_TIMEOUT_S = 5.0


class HandshakeRefused(Exception):
    """The server did not switch protocols; `status`, `headers` (names in lower case) and `body` are its answer."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"the server answered {status} instead of 101")
        self.status = status
        self.headers = headers
        self.body = body


class Frame(msgspec.Struct, frozen=True):
    """One frame as it came. `rsv` is the three reserved bits as a number from 0 to 7."""

    opcode: int
    payload: bytes
    fin: bool = True
    rsv: int = 0
    masked: bool = False


class Closed(msgspec.Struct, frozen=True):
    """How the server ended it: a close frame's code and reason, or code None when it just hung up (`reset`: by RST)."""

    code: int | None
    reason: str = ""
    reset: bool = False


def encode_frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x11\x22\x33\x44",
    declared_length: int | None = None,
    length_bytes: int | None = None,
) -> bytes:
    """The bytes of one frame.

    `mask` None leaves the mask out, four bytes are used as they are. `declared_length` is written instead of the
    payload's own length. `length_bytes` 1, 2 or 8 forces the form of the length, be it the shortest or not.
    """
    length = len(payload) if declared_length is None else declared_length
    if length_bytes is None:
        length_bytes = 1 if length < 126 else 2 if length < 1 << 16 else 8
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    masked = 0 if mask is None else 0x80
    match length_bytes:
        case 1:
            head = struct.pack("!BB", first, masked | length)
        case 2:
            head = struct.pack("!BBH", first, masked | 126, length)
        case 8:
            head = struct.pack("!BBQ", first, masked | 127, length)
        case _:
            raise ValueError(f"a length takes 1, 2 or 8 bytes, not {length_bytes}")
    if mask is None:
        return head + payload
    return head + mask + _apply_mask(payload, mask)


def _apply_mask(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    stream = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(size, "big")


def encode_close(code: int | None = 1000, reason: str = "") -> bytes:
    """The payload of a close frame; empty for `code` None."""
    return b"" if code is None else struct.pack("!H", code) + reason.encode()


class RawSocket:
    """One TCP connection of which the test decides every byte. Reads raise `TimeoutError` after `REPLY_TIMEOUT_S`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, *, host: str = "127.0.0.1", receive_buffer: int | None = None) -> Self:
        """Connect. A small `receive_buffer` (bytes) makes a reader that is slow as soon as it stops reading."""
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (host, port))
            return cls(*await asyncio.open_connection(sock=connection, limit=receive_buffer or 1 << 16))
        except BaseException:
            connection.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    async def handshake(self, path: str, *, headers: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """Ask for a WebSocket at `path` and return the answer's headers (names in lower case).

        `headers` are added to or replace the usual ones; None leaves one out. Raises `HandshakeRefused`, and
        `ConnectionError` if the server hangs up.
        """
        key = base64.b64encode(os.urandom(16)).decode()
        asked: dict[str, str | None] = {
            "Host": "127.0.0.1",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": key,
            "Sec-WebSocket-Version": "13",
        }
        asked.update(headers or {})
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in asked.items() if value is not None)]
        await self.send_bytes("\r\n".join([*lines, "", ""]).encode())
        status, answered = await self._read_head()
        if status != 101:
            size = int(answered.get("content-length", "0"))
            body = await asyncio.wait_for(self.reader.readexactly(min(size, HANDSHAKE_BYTES_MAX)), REPLY_TIMEOUT_S)
            raise HandshakeRefused(status, answered, body)
        used = asked["Sec-WebSocket-Key"] or ""
        expected = base64.b64encode(
            hashlib.sha1(used.encode() + _ACCEPT_SUFFIX, usedforsecurity=False).digest()
        ).decode()
        if answered.get("sec-websocket-accept") != expected:
            raise ConnectionError("the server's Sec-WebSocket-Accept does not fit the key")
        return answered

    async def _read_head(self) -> tuple[int, dict[str, str]]:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = await asyncio.wait_for(self.reader.readline(), REPLY_TIMEOUT_S)
            head += line
            if not line or len(head) > HANDSHAKE_BYTES_MAX:
                raise ConnectionError(f"no complete answer to the handshake: {head[:200]!r}")
        first, *rest = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in rest if line)
        return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def send_bytes(self, data: bytes) -> None:
        """Send these bytes, and wait while the server does not take them. Raises `ConnectionError`."""
        self.writer.write(data)
        await self.writer.drain()

    async def send_frame(
        self,
        opcode: int,
        payload: bytes = b"",
        *,
        fin: bool = True,
        rsv: int = 0,
        mask: bytes | None = b"\x11\x22\x33\x44",
        declared_length: int | None = None,
        length_bytes: int | None = None,
    ) -> None:
        """Send one frame as `encode_frame` makes it."""
        await self.send_bytes(
            encode_frame(
                opcode,
                payload,
                fin=fin,
                rsv=rsv,
                mask=mask,
                declared_length=declared_length,
                length_bytes=length_bytes,
            )
        )

    async def send_json(self, value: object) -> None:
        """One well-formed text frame."""
        await self.send_frame(TEXT, msgspec.json.encode(value))

    async def read_frame(self, timeout_s: float = REPLY_TIMEOUT_S) -> Frame:
        """The next frame, whatever it is. Raises `asyncio.IncompleteReadError` at the end, `ConnectionResetError`."""
        async with asyncio.timeout(timeout_s):
            first, second = await self.reader.readexactly(2)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            mask = await self.reader.readexactly(4) if second & 0x80 else None
            payload = await self.reader.readexactly(length)
        if mask is not None:
            payload = _apply_mask(payload, mask)
        return Frame(first & 0x0F, payload, bool(first & 0x80), first >> 4 & 7, mask is not None)

    async def read_close(self, timeout_s: float = REPLY_TIMEOUT_S) -> Closed:
        """Read on until the server ends it, passing over other frames."""
        try:
            async with asyncio.timeout(timeout_s):
                while (frame := await self.read_frame(timeout_s)).opcode != CLOSE:
                    pass
        except asyncio.IncompleteReadError:
            return Closed(None)
        except ConnectionResetError:
            return Closed(None, reset=True)
        if len(frame.payload) < 2:
            return Closed(1005)
        return Closed(struct.unpack("!H", frame.payload[:2])[0], frame.payload[2:].decode())

    def pause_reading(self) -> None:
        """Take nothing more from the kernel: the server's sends will back up (`read_frame` goes on where it was)."""
        transport = self.writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()

    def resume_reading(self) -> None:
        transport = self.writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.resume_reading()

    def abort(self) -> None:
        """Close at once, without a goodbye."""
        self.writer.transport.abort()
