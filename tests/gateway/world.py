"""A node without sockets: the real core and gateway, with peers that keep what they are given."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests import postgres
from tidings.server.app import Core, open_core
from tidings.server.clock import ManualClock
from tidings.server.config import Config
from tidings.server.domain.limits import Limiter, Rate
from tidings.server.gateway.connection import Connection
from tidings.server.gateway.gateway import Gateway
from tidings.server.services.access import Actor, backend_actor
from tidings.server.services.messages import Draft
from tidings.server.store.base import Appended, Row, Tx
from tidings.wire.requests import ChannelCreate, MembersAdd, UserCreate
from tidings.wire.resources import ChannelType

# What a condition may take before a test gives up, seconds.
PATIENCE = 10.0

Frame = dict[str, Any]


class RecordingPeer(Connection):
    """A connection whose transport is a list."""

    __slots__ = ("_refs", "changed", "closed_with", "payloads")

    framed = False

    def __init__(self, gateway: Gateway, address: str = "192.0.2.1", header_token: str | None = None) -> None:
        super().__init__(gateway, address, header_token)
        self.payloads: list[bytes] = []
        self.changed = asyncio.Event()
        self.closed_with: int | None = None
        self._refs = itertools.count(1)

    # ------------------------------------------------------------ as a transport

    def write_one(self, payload: bytes) -> None:
        self.payloads.append(payload)
        self.changed.set()

    def end(self, code: int, reason: str) -> None:
        self.closed_with = code
        self.changed.set()

    # ------------------------------------------------------------ as a client

    @property
    def frames(self) -> list[Frame]:
        return [msgspec.json.decode(payload) for payload in self.payloads]

    def of(self, type: str) -> list[Frame]:
        return [frame for frame in self.frames if frame["type"] == type]

    def events(self, stream: str) -> list[int]:
        """The seqs that came on a stream, in the order they came."""
        return [frame["seq"] for frame in self.frames if frame.get("stream") == stream and "data" in frame]

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(PATIENCE):
            while not (found := condition()):
                self.changed.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self.changed.wait()
                except TimeoutError:
                    pass
        return found

    def say(self, type: str, **fields: Any) -> int:
        """Send a command without waiting; its ref."""
        ref = next(self._refs)
        self.receive(msgspec.json.encode({"type": type, "ref": ref, **fields}))
        return ref

    def reply(self, ref: int) -> Frame | None:
        return next((frame for frame in self.frames if frame.get("ref") == ref), None)

    async def ask(self, type: str, **fields: Any) -> Frame:
        """Send a command and wait for its reply."""
        ref = self.say(type, **fields)
        found: Frame = await self.until(lambda: self.reply(ref))
        return found

    async def quiet(self) -> None:
        """Everything that was committed and announced until now has been written to this peer."""
        await self.gateway.services.store.run(_nothing)
        ref = self.say("ping")
        await self.until(lambda: self.reply(ref))

    async def got(self, stream: str, seq: int) -> None:
        await self.until(lambda: seq in self.events(stream))


async def _nothing(tx: Tx) -> None:
    return None


@dataclass
class Node:
    """One app on one node."""

    core: Core
    gateway: Gateway
    clock: ManualClock
    config: Config
    backend: Actor
    app_id: str
    api_key: str
    tokens: dict[str, str] = field(default_factory=dict)
    sent: int = 0

    @property
    def services(self) -> Any:
        return self.core.services

    async def users(self, *names: str) -> None:
        for name in names:
            await self.core.services.users.create(self.backend, UserCreate(id=name))

    async def channel(self, name: str, *members: str, type: str = "group", **roles: str) -> str:
        await self.core.services.channels.create(
            self.backend, ChannelCreate(id=name, type=type, members=list(members), roles=roles)
        )
        return name

    async def add(self, channel: str, *users: str) -> None:
        await self.core.services.members.add(self.backend, channel, MembersAdd(users=list(users)))

    async def remove(self, channel: str, user: str) -> None:
        await self.core.services.members.remove(self.backend, channel, user)

    async def send(self, channel: str, text: str = "hello", **fields: Any) -> Appended:
        """A message of the backend."""
        self.sent += 1
        return await self.core.services.messages.send(
            self.backend, channel, Draft(text=text, **fields), f"k{self.sent}"
        )

    async def token(self, user: str, ttl_seconds: int = 3600) -> str:
        return (await self.core.services.auth.mint(self.backend, user, ttl_seconds)).token

    def peer(self) -> RecordingPeer:
        """A transport that is connected; the session is not yet."""
        made = RecordingPeer(self.gateway)
        self.gateway.opened(made)
        return made

    async def connect(self, user: str, device: str | None = None, *, wait: bool = True, **fields: Any) -> RecordingPeer:
        peer = self.peer()
        peer.say("connect", token=await self.token(user), device={"id": device or f"{user}-1"}, **fields)
        if wait:
            await peer.until(lambda: peer.of("connected") or peer.closed_with is not None)
        return peer

    async def head(self, channel: str) -> int:
        found: int = (await self.rows("SELECT head FROM streams WHERE ref=?", channel))[0][0]
        return found

    async def sid(self, channel: str) -> int:
        found: int = (await self.rows("SELECT sid FROM streams WHERE ref=?", channel))[0][0]
        return found

    async def rows(self, sql: str, *args: Any) -> list[Row]:
        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(sql, *args)

        return await self.core.services.store.read(unit)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """The hub hears nothing of what is announced meanwhile."""
        with self.instead(lambda notice: None):
            yield

    @contextmanager
    def instead(self, listener: Callable[[Any], None]) -> Iterator[None]:
        """Somebody else hears what the hub would."""
        of, real = self.core.bus._listeners.of, self.gateway.hub.notice
        heard = [kind for kind, listeners in of.items() if real in listeners]
        for kind in heard:
            of[kind][of[kind].index(real)] = listener
        try:
            yield
        finally:
            for kind in heard:
                of[kind][of[kind].index(listener)] = real

    async def unheard(self, sql: str, *args: Any) -> None:
        """Write to the store without a word, as another process does."""

        async def unit(tx: Tx) -> None:
            await tx.execute(sql, *args)

        await self.core.services.store.run(unit)

    async def define(self, definition: ChannelType) -> None:
        """Give the app a channel type of its own."""

        async def unit(tx: Tx) -> None:
            await tx.execute(
                "INSERT INTO channel_types(app,name,definition) VALUES (?,?,?)",
                self.backend.app.app,
                definition.name,
                msgspec.json.encode(definition).decode(),
            )

        await self.core.services.store.run(unit)
        self.core.services.apps.forget(self.backend.app.app)
        self.backend = backend_actor(await self.core.services.apps.get(self.app_id), "k1")


@asynccontextmanager
async def open_node(
    path: Path, *, beside: Node | None = None, limited: bool = False, **settings: Any
) -> AsyncIterator[Node]:
    """A node in a directory, drained on the way out. `beside` another one it has its app and clock."""
    config = Config(
        data_dir=path / "data",
        store=await postgres.store_setting() if beside is None else beside.config.store,
        key_file=path / "root.key",
        store_synchronous="off",
        allow_unsafe_store=True,
        store_readers=2,
        **settings,
    )
    rate = Rate(config.rest_rate_per_second, config.rest_burst) if limited else Rate(1_000_000, 1_000_000)
    clock = ManualClock() if beside is None else beside.clock
    async with open_core(config, clock=clock) as core:
        services = core.services
        api_key = (
            beside.api_key if beside is not None else (await services.admin.create_app("Test", "app_test")).api_key
        )
        app = await services.apps.get("app_test")
        gateway = Gateway(
            services,
            core.bus,
            config,
            clock,
            services.ids,
            core.metrics,
            Limiter(rate, shared=bool(core.bus.node)),
            rng=lambda: 0.5,
        )
        yield Node(core, gateway, clock, config, backend_actor(app, "k1"), "app_test", api_key)
        await gateway.drain(0)
