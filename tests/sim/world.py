"""Nodes, devices and an operator in one seeded run: what happens, and what must hold of it."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import structlog

from tidings.server.app import compose
from tidings.server.clock import Ids
from tidings.server.config import Config
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.limits import Limiter, Rate
from tidings.server.errors import Refusal
from tidings.server.gateway.gateway import Gateway
from tidings.server.services import Services
from tidings.server.services.access import Actor, backend_actor
from tidings.server.store.migrations import SNAPSHOT
from tidings.server.store.sqlite import describe_tables
from tidings.server.telemetry import Metrics
from tidings.wire.requests import ChannelCreate, MembersAdd, UserCreate

from .bus import SimBus, SimNetwork
from .client import SimClient
from .store import SimDatabase, SimStore
from .virtual import VirtualClock, VirtualLoop

APP = "app_sim"
USERS = ("ann", "ben", "cat", "dan", "eve")
CHANNELS = ("ward", "desk", "home")
# Trouble and chatter, then quiet, virtual seconds.
STORM_SECONDS = 4.0
# All clients are where the store is within this long after the last trouble (issue "Beyond one machine").
CONVERGED_SECONDS = 30.0
# A removal holds on every node within a second (the same issue); a node that is cut off forgets once a second what it
# remembers, and finds out at the next look.
REMOVED_SECONDS = 2.5
# What can go wrong, each as often as its weight.
EVENTS = {
    "send": 60,
    "burst": 6,
    "cut": 8,
    "stall": 4,
    "leave": 3,
    "join": 4,
    "remove": 4,
    "part": 4,
    "drop": 3,
    "slow": 3,
    "kill": 2,
    "start": 4,
    "outage": 1,
    "shaky": 2,
}


@dataclass(slots=True)
class Template:
    """A database with an app, people and channels, and the keys that open it: every run starts from a copy."""

    image: bytes
    tokens: dict[str, str]
    key_file: Path
    folder: tempfile.TemporaryDirectory[str]


@dataclass(slots=True)
class SimNode:
    """One node: the real services and gateway on a simulated store and bus."""

    name: str
    services: Services
    gateway: Gateway
    store: SimStore
    bus: SimBus
    background: asyncio.Task[None]


@dataclass(slots=True)
class Verdict:
    """What a run has shown: empty `wrongs` is what is wanted."""

    seed: int
    wrongs: list[str]
    counts: Counter[str] = field(default_factory=Counter)


def make_template() -> Template:
    """Set up once, what every run begins with."""
    folder = tempfile.TemporaryDirectory(prefix="tidings-sim-")
    key_file = Path(folder.name) / "root.key"
    loop = VirtualLoop()

    async def make() -> Template:
        KeyFile(key_file, create=True)
        world = World(0, Template(b"", {}, key_file, folder), loop)
        world.database.connection.executescript(f"BEGIN;{SNAPSHOT.read_text()}COMMIT;")
        node = world.start_node("n0")
        await node.services.admin.create_app("Simulated", APP)
        backend = await world.backend(node)
        for user in USERS:
            await node.services.users.create(backend, UserCreate(id=user))
        for channel in CHANNELS:
            await node.services.channels.create(
                backend, ChannelCreate(id=channel, type="group", members=list(USERS[:4]))
            )
        tokens = {user: (await node.services.auth.mint(backend, user, 3600)).token for user in USERS}
        describe_tables(world.database.connection)
        image = world.database.connection.serialize()
        await world.close()
        return Template(image, tokens, key_file, folder)

    try:
        return loop.run_until_complete(make())
    finally:
        loop.close()


class World:
    """Everything of one run."""

    def __init__(self, seed: int, template: Template, loop: VirtualLoop, *, tracing: bool = False) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.tokens = template.tokens
        self.database = SimDatabase(template.image, self.rng) if template.image else SimDatabase.empty(self.rng)
        self.network = SimNetwork(self.rng)
        self.nodes: dict[str, SimNode] = {}
        self.clients: list[SimClient] = []
        self.wrongs: list[str] = []
        self.counts: Counter[str] = Counter()
        self._key_file = template.key_file
        self._tracing = tracing
        self._dead: set[Gateway] = set()
        self._started = 0
        self._sent = 0
        # key -> the channel, and what the sender was told.
        self.keys: dict[str, str] = {}
        self.acknowledged: dict[str, tuple[int, str]] = {}
        self.refusals: dict[str, str] = {}
        # (user, channel) -> when the removal was acknowledged and the head of the channel then.
        self.removed: dict[tuple[str, str], tuple[float, int]] = {}
        self._changing: set[tuple[str, str]] = set()
        self._operator: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ nodes

    def start_node(self, name: str) -> SimNode:
        store = SimStore(self.database)
        bus = SimBus(self.network, name)
        config = Config(data_dir=self._key_file.parent, key_file=self._key_file)
        metrics = Metrics()
        # Deterministic: identifiers are made from the run's own randomness.
        ids = Ids(self.clock, self.rng.randbytes)
        core = compose(
            config,
            store=store,
            bus=bus,
            keyring=Keyring(KeyFile(self._key_file, create=False)),
            clock=self.clock,
            ids=ids,
            metrics=metrics,
        )
        gateway = Gateway(
            core.services,
            bus,
            config,
            self.clock,
            ids,
            metrics,
            Limiter(Rate(1_000_000, 1_000_000)),
            rng=self.rng.random,
        )
        gateway.start()
        background = self.loop.create_task(core.services.receipts.run())  # owned by the node, cancelled with it
        node = SimNode(name, core.services, gateway, store, bus, background)
        self.nodes[name] = node
        self._started += 1
        return node

    def any_node(self) -> SimNode | None:
        """One that answers."""
        return self.rng.choice(list(self.nodes.values())) if self.nodes else None

    def is_dead(self, gateway: Gateway) -> bool:
        return gateway in self._dead

    def kill(self, node: SimNode) -> None:
        """`kill -9`: what is in memory is gone, lines break, nothing more is told."""
        del self.nodes[node.name]
        self._dead.add(node.gateway)
        node.store.dead = True
        node.bus.die()
        node.background.cancel()
        for connection in list(node.gateway.connections):
            connection.ended = True
        for client in self.clients:
            if client.line is not None and client.line.gateway is node.gateway:
                client.line.cut()
        for task in list(node.gateway.tasks._tasks):
            task.cancel()

    async def backend(self, node: SimNode) -> Actor:
        """The app's own backend, on a node."""
        return backend_actor(await node.services.apps.get(APP), "k1")

    async def close(self) -> None:
        for task in list(self._operator):
            task.cancel()
        for client in self.clients:
            client.wanted = False
        for node in list(self.nodes.values()):
            self.kill(node)
        await asyncio.sleep(1)  # why: virtual time, what was cancelled gets its turn
        self.database.connection.close()

    # ------------------------------------------------------------ what is told here

    def trace(self, what: str, who: str, detail: Any = "") -> None:
        if self._tracing:
            print(f"{self.loop.now:9.4f} {what:8} {who:6} {detail}")

    def wrong(self, what: str) -> None:
        self.trace("WRONG", "", what)
        self.wrongs.append(f"at {self.loop.now:.4f}: {what}")

    def invoked(self, client: SimClient, channel: str, key: str) -> None:
        self.keys[key] = channel

    def sent(self, client: SimClient, key: str, seq: int, id: str) -> None:
        before = self.acknowledged.setdefault(key, (seq, id))
        if before != (seq, id):
            self.wrong(f"{key} was answered with {before} and {(seq, id)}")
        # G7: what is acknowledged is there.
        rows = self.database.rows(
            "SELECT m.seq, m.id FROM messages m JOIN streams s ON s.sid=m.sid WHERE s.ref=? AND m.key=?",
            self.keys[key],
            key,
        )
        if rows != [(seq, id)]:
            self.wrong(f"{key} is acknowledged as {(seq, id)} and stored as {rows}")

    def refused(self, client: SimClient, key: str, code: str) -> None:
        self.refusals[key] = code

    def written(self, client: SimClient, payload: bytes) -> None:
        """A node has given bytes to a line: nothing of a channel after its removal was acknowledged (G8)."""
        if not self.removed or b'"seq"' not in payload:
            return
        frame = msgspec.json.decode(payload)
        gone = self.removed.get((client.user, frame.get("stream") or frame.get("channel") or ""))
        if gone is None or "data" not in frame:
            return
        at, head = gone
        if frame["seq"] > head and self.loop.now > at + REMOVED_SECONDS:
            self.wrong(
                f"{client.device} was sent {frame['stream']} {frame['seq']} {self.loop.now - at:.1f} s after the "
                f"removal at {head} was acknowledged"
            )

    def removals(self, user: str, channel: str) -> list[int]:
        """Where the user was removed from the channel, by the log."""
        return [
            seq
            for (seq,) in self.database.rows(
                "SELECT e.seq FROM events e JOIN streams s ON s.sid=e.sid"
                " WHERE s.ref=? AND e.type='member.removed' AND e.ref=? ORDER BY e.seq",
                channel,
                user,
            )
        ]

    # ------------------------------------------------------------ the run

    async def play(self) -> None:
        """The storm, then the quiet, then the look."""
        rng = self.rng
        for number in range(rng.randint(1, 3)):
            self.start_node(f"n{number}")
        for user in USERS[: rng.randint(2, len(USERS))]:
            for number in range(rng.randint(1, 2)):
                self.clients.append(SimClient(self, user, f"{user}-{number}"))
        for client in self.clients:
            client.start()
        kinds, weights = list(EVENTS), list(EVENTS.values())
        pace = rng.choice((0.02, 0.05, 0.1))
        while self.loop.now < STORM_SECONDS:
            await asyncio.sleep(rng.random() * 2 * pace)
            kind = rng.choices(kinds, weights)[0]
            self.counts[kind] += 1
            getattr(self, f"_{kind}")()
        self._calm()
        await self._converge()
        self._look()

    def _calm(self) -> None:
        network, database = self.network, self.database
        self.trace("calm", "")
        network.drops = network.repeats = 0.0
        network.slow = database.down = database.shaky = False
        for node in self.nodes.values():
            node.bus.heal()
        if not self.nodes:
            self._start()
        for client in self.clients:
            if client.line is not None:
                client.line.unstall()

    # -- things that happen

    def _send(self) -> None:
        client = self.rng.choice(self.clients)
        self._sent += 1
        client.send(self.rng.choice(CHANNELS), f"{client.device}.{self._sent}")

    def _burst(self) -> None:
        for _ in range(self.rng.randint(5, 20)):
            self._send()

    def _cut(self) -> None:
        self.rng.choice(self.clients).cut()

    def _stall(self) -> None:
        line = self.rng.choice(self.clients).line
        if line is not None:
            line.stall()
            self.loop.call_later(self.rng.random() * 3, line.unstall)

    def _kill(self) -> None:
        node = self.any_node()
        if node is not None:
            self.trace("kill", node.name)
            self.kill(node)

    def _start(self) -> None:
        if len(self.nodes) < 3:
            node = self.start_node(f"n{self._started}")
            self.trace("start", node.name)

    def _part(self) -> None:
        node = self.any_node()
        if node is not None and node.bus.connected:
            self.trace("part", node.name)
            node.bus.cut()
            self.loop.call_later(self.rng.random() * 6, node.bus.heal)

    def _drop(self) -> None:
        self.network.drops, self.network.repeats = self.rng.choice(((0.0, 0.0), (0.2, 0.2), (0.9, 0.0)))

    def _slow(self) -> None:
        self.network.slow = not self.network.slow

    def _outage(self) -> None:
        self.database.down = True
        self.loop.call_later(self.rng.random(), self._recover)

    def _recover(self) -> None:
        self.database.down = False

    def _shaky(self) -> None:
        self.database.shaky = not self.database.shaky

    def _leave(self) -> None:
        self._change("leave")

    def _remove(self) -> None:
        self._change("remove")

    def _join(self) -> None:
        self._change("join")

    def _change(self, how: str) -> None:
        """An operator changes who is in a channel, on whichever node; one change of a membership at a time."""
        node = self.any_node()
        who = (self.rng.choice(USERS), self.rng.choice(CHANNELS))
        if node is None or who in self._changing:
            return
        self._changing.add(who)
        task = self.loop.create_task(self._changed(node, how, *who))  # owned by the world
        self._operator.add(task)
        task.add_done_callback(self._operator.discard)

    async def _changed(self, node: SimNode, how: str, user: str, channel: str) -> None:
        try:
            backend = await self.backend(node)
            if how == "join":
                # From here on it may be theirs again.
                self.removed.pop((user, channel), None)
                await node.services.members.add(backend, channel, MembersAdd(users=[user]))
            else:
                await node.services.members.remove(backend, channel, user)
                head = self.database.rows("SELECT head FROM streams WHERE ref=?", channel)[0][0]
                self.trace("removed", user, (channel, head))
                self.removed[user, channel] = (self.loop.now, head)
        except Refusal:
            pass
        finally:
            self._changing.discard((user, channel))

    # -- what must hold

    async def _converge(self) -> None:
        deadline = self.loop.now + CONVERGED_SECONDS
        while self.loop.now < deadline:
            await asyncio.sleep(0.5)  # why: virtual time; the next look
            if not self._operator and not self._behind():
                return
        for what in self._behind():
            self.wrong(f"not converged {CONVERGED_SECONDS:.0f} s after the last trouble: {what}")

    def _behind(self) -> list[str]:
        """Who is not where the store is."""
        heads = dict(self.database.rows("SELECT ref, head FROM streams WHERE kind='channel'"))
        members = set(
            self.database.rows(
                "SELECT m.user, s.ref FROM members m JOIN streams s ON s.sid=m.sid WHERE s.kind='channel'"
            )
        )
        found = []
        for client in self.clients:
            if not client.connected:
                found.append(f"{client.device} is not connected")
                continue
            if client.outbox:
                found.append(f"{client.device} has unanswered messages: {sorted(client.outbox)[:3]}")
            for channel in CHANNELS:
                position = client.pos.get(channel)
                if (client.user, channel) in members:
                    if position is None or position[0] != heads[channel]:
                        found.append(f"{client.device} is at {position} of {channel}, which ends at {heads[channel]}")
                elif position is not None and position[1] is not None:
                    # Without an epoch it is an event that came within the time in which a removal reaches all nodes,
                    # after the news of it: the beginning of nothing.
                    found.append(f"{client.device} still has {channel} at {position}, and is no member")
        return found

    def _look(self) -> None:
        """Compare everything that was shown and told with the log."""
        log: dict[str, dict[int, str]] = {}
        stored: Counter[str] = Counter()
        for channel, seq, key in self.database.rows(
            "SELECT s.ref, m.seq, m.key FROM messages m JOIN streams s ON s.sid=m.sid"
        ):
            log.setdefault(channel, {})[seq] = f"message.created {key}"
            stored[key] += 1
        for channel, seq, kind in self.database.rows(
            "SELECT s.ref, e.seq, e.type FROM events e JOIN streams s ON s.sid=e.sid WHERE s.kind='channel'"
        ):
            log.setdefault(channel, {})[seq] = f"{kind} "
        for channel, head in self.database.rows("SELECT ref, head FROM streams WHERE kind='channel'"):
            if sorted(log.get(channel, {})) != list(range(1, head + 1)):
                self.wrong(f"the log of {channel} is not 1 to {head}")
        for key, count in stored.items():
            if count > 1:
                self.wrong(f"{key} is stored {count} times")
        for key in self.acknowledged:
            if not stored[key]:
                self.wrong(f"{key} was acknowledged and is lost")
        for client in self.clients:
            for channel, shown in client.shown.items():
                if channel == "@me":
                    continue
                first, last = client.since[channel] + 1, client.pos[channel][0]
                wanted = {seq: log[channel][seq] for seq in range(first, last + 1)}
                if shown != wanted:
                    missing = sorted(set(wanted) - set(shown))[:5]
                    self.wrong(f"{client.device} shows {channel} differently from the log; missing {missing}")
        self.counts["stored"] = sum(stored.values())
        self.counts["shown"] = sum(len(shown) for client in self.clients for shown in client.shown.values())
        self.counts["acknowledged"] = len(self.acknowledged)


def run(seed: int, template: Template, *, tracing: bool = False) -> Verdict:
    """One run; the same seed gives the same run (with the same PYTHONHASHSEED)."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)

    async def played() -> Verdict:
        world = World(seed, template, loop, tracing=tracing)
        try:
            await world.play()
        finally:
            await world.close()
        return Verdict(seed, world.wrongs, world.counts)

    try:
        return loop.run_until_complete(played())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
