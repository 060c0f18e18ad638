"""A C loop of `send()` behind WebSocket handshakes: the cheapest server there could be."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import hashlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from .server import WORK
from .workers import Link

SOURCE = Path(__file__).with_name("sendloop.c")
# RFC 6455, section 1.3: appended to the client's key before hashing.
_ACCEPT_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONNECTED = b'{"type":"connected","session":"c","user":"c"}'


def build() -> Path:
    """Compile the loop; the path of the shared object. Ends the program when there is no C compiler."""
    code = SOURCE.read_bytes()
    WORK.mkdir(exist_ok=True)
    target = WORK / f"sendloop-{hashlib.sha256(code).hexdigest()[:16]}.so"
    if not target.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            sys.exit("bench: the fan-out scenario compares with a C loop and needs a C compiler (`apt install gcc`).")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", target, SOURCE], check=True)
    return target


async def drive(link: Link, library: Path, connections: int) -> None:
    """Accept this many WebSockets, then answer `(payload, rounds, interval_ns)` with the thread's processor seconds."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)
    link.send(listener.getsockname()[1])
    loop = asyncio.get_running_loop()
    accepted = []
    for _ in range(connections):
        peer, _ = await loop.sock_accept(listener)
        # As the server's sockets are.
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setblocking(False)
        accepted.append(peer)
        request = b""
        while b"\r\n\r\n" not in request:
            request += await loop.sock_recv(peer, 4096)
        key = next(
            line.partition(b":")[2].strip()
            for line in request.split(b"\r\n")
            if line.lower().startswith(b"sec-websocket-key:")
        )
        accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_SUFFIX).digest())
        await loop.sock_sendall(
            peer,
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
            + accept
            + b"\r\n\r\n"
            + frame(_CONNECTED),
        )
    link.send("ready")
    send_rounds = ctypes.CDLL(str(library), use_errno=True).send_rounds
    send_rounds.restype = ctypes.c_longlong
    send_rounds.argtypes = [
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_longlong,
    ]
    numbers = (ctypes.c_int * connections)(*(peer.fileno() for peer in accepted))
    while True:
        payload, rounds, interval_ns = await link.receive()
        data = frame(payload)
        nanoseconds = send_rounds(numbers, connections, data, len(data), rounds, interval_ns)
        if nanoseconds < 0:
            raise OSError(ctypes.get_errno(), "send")
        link.send(nanoseconds / 1e9)


def frame(payload: bytes) -> bytes:
    """An unmasked text frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes((size,)) + payload
    return b"\x81\x7e" + size.to_bytes(2, "big") + payload
