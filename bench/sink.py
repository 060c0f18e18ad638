"""An HTTP/1.1 server that takes whatever is posted and answers 201: `python -m bench.sink [certificate key]`.

Prints its port, and ends with its standard input. As little work as asyncio allows: it shares the machine with what is
measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import uvloop

ANSWER = b"HTTP/1.1 201 Created\r\nlocation: https://push.example/m/1\r\ncontent-length: 0\r\n\r\n"


class Taker(asyncio.Protocol):
    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by descent.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            _, _, rest = head.partition(b"\r\ncontent-length: ")
            whole = end + 4 + int(rest.partition(b"\r\n")[0] or 0)
            if len(self._buffer) < whole:
                return
            self._buffer = self._buffer[whole:]
            assert self._transport is not None
            self._transport.write(ANSWER)


@contextlib.asynccontextmanager
async def sink(certificate: Path | None = None, key: Path | None = None) -> AsyncIterator[int]:
    """A sink in a process of its own; its port on 127.0.0.1."""
    files = [str(path) for path in (certificate, key) if path is not None]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.sink", *files, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        process.stdin.close()
        await process.wait()


async def main(files: list[str]) -> None:
    context = None
    if files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
    server = await asyncio.get_running_loop().create_server(Taker, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
