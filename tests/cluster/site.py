"""A cluster of real processes: nodes, a PostgreSQL, three NATS servers, and what lies between them, to be broken.

async with open_site(folder) as site:
    house = site.house                       # talks to any node, as through a load balancer
    site.nodes[1].server.kill9()
    await site.nodes[2].cut_off_from_bus()
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.checks.house import PATIENCE_S, ROOMY, House, first_app
from tidings.testing.chaos import ChaosProxy
from tidings.testing.nats import NatsProcess, nats_cluster
from tidings.testing.postgres import PostgresProcess
from tidings.testing.process import ServerProcess

# Of PostgreSQL, for each node: small, as its core is shared by all.
STORE_CONNECTIONS, APPEND_CONNECTIONS = 4, 2


@dataclass
class Node:
    """A node, and the proxies through which alone it reaches the database and the bus."""

    name: str
    server: ServerProcess
    store: ChaosProxy
    bus: list[ChaosProxy]

    @property
    def port(self) -> int:
        return self.server.port

    async def cut_off_from_bus(self, *, silent: bool = False) -> None:
        """`silent`: connections stay and carry nothing, as when a cable is pulled; else they are refused."""
        for proxy in self.bus:
            await _cut(proxy, silent)

    async def cut_off_from_store(self, *, silent: bool = False) -> None:
        await _cut(self.store, silent)

    async def mend(self) -> None:
        for proxy in (self.store, *self.bus):
            proxy.heal()
            await proxy.accept_connections()

    async def status(self) -> dict[str, str]:
        """What its readiness says."""
        async with httpx.AsyncClient(base_url=self.server.url, trust_env=False, timeout=PATIENCE_S) as client:
            answer: dict[str, str] = (await client.get("/readyz")).json()
            return answer

    async def until_status(self, wanted: dict[str, str]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.status() != wanted:
                await asyncio.sleep(0.05)  # why: the pace of a loop that looks at a condition


async def _cut(proxy: ChaosProxy, silent: bool) -> None:
    if silent:
        proxy.set(stall_up=True, stall_down=True)
    else:
        await proxy.refuse_connections()
        proxy.cut()


@dataclass
class Site:
    """All of it."""

    house: House
    nodes: list[Node]
    postgres: PostgresProcess
    nats: list[NatsProcess]
    key_file: Path


@contextmanager
def passable_folder() -> Iterator[Path]:
    """Not below pytest's own folders: PostgreSQL is not root, and must pass."""
    folder = Path(tempfile.mkdtemp(prefix="tidings-site-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def open_site(nodes: int = 3, **settings: str) -> AsyncIterator[Site]:
    """`settings`: environment variables of every node. PostgreSQL writes every commit to the disk, as in production."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(passable_folder())
        postgres = stack.enter_context(PostgresProcess(folder / "postgres"))
        nats = await stack.enter_async_context(nats_cluster(folder, 3, advertise=False))
        made: list[Node] = []
        for number in range(nodes):
            made.append(await _node(stack, folder, number, postgres, nats, settings))
        # The first one alone: it makes the schema, the key file and the first app.
        await made[0].server.start()
        app = await first_app(made[0].server)
        await asyncio.gather(*(node.server.start() for node in made[1:]))
        ports = [node.port for node in made]
        balancer = await stack.enter_async_context(ChaosProxy(*ports))
        house = House(made[0].server, *app, store_url=postgres.url(), url=f"http://127.0.0.1:{balancer.port}")
        house.ports = ports
        stack.push_async_callback(house.close)
        yield Site(house, made, postgres, nats, folder / "root.key")


async def _node(
    stack: AsyncExitStack,
    folder: Path,
    number: int,
    postgres: PostgresProcess,
    nats: list[NatsProcess],
    settings: dict[str, str],
) -> Node:
    store = await stack.enter_async_context(ChaosProxy(postgres.port))
    # Each begins with a server of its own, and knows the others.
    ours = [nats[(number + place) % len(nats)] for place in range(len(nats))]
    bus = [await stack.enter_async_context(ChaosProxy(server.port)) for server in ours]
    name = "abcdefgh"[number]
    environment = {
        **ROOMY,
        "TIDINGS_STORE": postgres.url().replace(f":{postgres.port}/", f":{store.port}/"),
        "TIDINGS_STORE_CONNECTIONS": str(STORE_CONNECTIONS),
        "TIDINGS_STORE_APPEND_CONNECTIONS": str(APPEND_CONNECTIONS),
        "TIDINGS_BUS": ",".join(f"nats://127.0.0.1:{proxy.port}" for proxy in bus),
        "TIDINGS_KEY_FILE": str(folder / "root.key"),
        "TIDINGS_NODE": name,
        "TIDINGS_LOG_FORMAT": "json",
        # Nobody is told to stay away for long: the rest of the test waits for them.
        "TIDINGS_RECONNECT_SPREAD_SECONDS": "1",
        **settings,
    }
    server = ServerProcess(folder / f"node-{name}", environment=environment)
    stack.push_async_callback(server.close)
    return Node(name, server, store, bus)
