"""Several nodes over one store and one bus: everything that holds on one holds among them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.nats import cluster, nats
from tidings.server.bus.base import Crowd, Joined, Notice, Published
from tidings.server.bus.nats import NatsBus
from tidings.server.errors import NotFound, Refusal
from tidings.server.gateway import crowds
from tidings.server.gateway import nodes as nodes_module
from tidings.server.gateway.http import http_routes
from tidings.server.gateway.hub import Stream
from tidings.server.rest import create_rest_app
from tidings.server.services import channels as channels_module
from tidings.server.services.access import backend_actor
from tidings.server.services.messages import Draft
from tidings.testing.chaos import ChaosProxy
from tidings.testing.nats import NatsProcess
from tidings.wire import limits
from tidings.wire.requests import ChannelCreate, ChannelTypePut, MemberUpdate

from .world import PATIENCE, Node, RecordingPeer, open_node

__all__ = ["cluster", "nats"]

# Long enough to come back within it, short enough to wait for its end, seconds.
GRACE = 0.05


def bus_of(node: Node) -> NatsBus:
    bus = node.core.bus
    assert isinstance(bus, NatsBus)
    return bus


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):
            await asyncio.sleep(0.005)  # why: looking again, not waiting for the thing itself
    return found


def deaf(node: Node, monkeypatch: pytest.MonkeyPatch, lost: Callable[[Notice], bool] = lambda notice: True) -> None:
    """Let the bus lose what other nodes tell this one."""
    bus = bus_of(node)
    deliver = bus._deliver
    monkeypatch.setattr(bus, "_deliver", lambda notice: None if lost(notice) else deliver(notice))


class Cluster:
    """Nodes `a`, `b` … in one directory."""

    def __init__(self, path: Path, url: str, name: str, stack: AsyncExitStack) -> None:
        self._path, self._url, self._name, self._stack = path, url, name, stack
        self.nodes: list[Node] = []

    async def node(self, *, url: str | None = None, **settings: Any) -> Node:
        made = await self._stack.enter_async_context(
            open_node(
                self._path,
                beside=self.nodes[0] if self.nodes else None,
                bus=url or self._url,
                cluster=self._name,
                node="abcdef"[len(self.nodes)],
                presence_grace_seconds=GRACE,
                **settings,
            )
        )
        if made.config.embedded:
            # Every commit of another node looks like an operator's command to SQLite. A store for nodes tells them
            # apart; here it must not do the bus's work.
            made.core.services.store.changed_elsewhere = _nothing_changed
        if self.nodes:
            # Keys of messages are the backend's own on each node.
            made.sent = 1_000 * len(self.nodes)
        self.nodes.append(made)
        return made

    async def settle(self) -> None:
        """Every node's interests are in place, and what was told before has been heard."""
        for node in self.nodes:
            nodes = node.gateway.nodes
            assert nodes is not None
            await until(lambda nodes=nodes: nodes._settling is None)
            await node.core.bus.settle()


async def _nothing_changed() -> bool:
    return False


@asynccontextmanager
async def open_cluster(path: Path, url: str, name: str) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(path, url, name, stack)


@pytest.fixture
async def nodes(tmp_path: Path, nats: NatsProcess, cluster: str) -> AsyncIterator[Cluster]:
    async with open_cluster(tmp_path, nats.url, cluster) as made:
        yield made


@pytest.fixture
async def a(nodes: Cluster) -> Node:
    """Alice, Bob and Carol; the channel `c` has Alice and Bob."""
    node = await nodes.node()
    await node.users("alice", "bob", "carol")
    await node.channel("c", "alice", "bob")
    return node


@pytest.fixture
async def b(nodes: Cluster, a: Node) -> Node:
    return await nodes.node()


# ---------------------------------------------------------------- events


async def test_members_on_all_nodes_hear_the_same_events_as_the_same_bytes(nodes: Cluster, a: Node, b: Node) -> None:
    c = await nodes.node()
    peers = [await a.connect("alice"), await b.connect("bob"), await c.connect("alice", "phone")]
    await nodes.settle()
    start = await a.head("c")
    senders = itertools.cycle([a, b, c])
    for _ in range(30):
        await next(senders).send("c")
    for peer in peers:
        await peer.got("c", start + 30)
        assert peer.events("c") == list(range(start + 1, start + 31))
    created = [[payload for payload in peer.payloads if b"message.created" in payload] for peer in peers]
    assert created[0] == created[1] == created[2]


@pytest.mark.parametrize("order", [(3, 1, 2), (2, 3, 1), (1, 3, 2), (3, 2, 1, 3)])
async def test_events_that_overtook_one_another_on_their_way_are_shown_in_order_without_a_read(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    bob = await b.connect("bob")
    await nodes.settle()
    start = await a.head("c")
    came = await kept_back(a, b, monkeypatch)
    for number in order:
        b.gateway.hub.notice(came[start + number])
    await bob.got("c", start + 3)
    assert bob.events("c") == [start + 1, start + 2, start + 3]
    assert b.core.metrics.catch_up_events.value == 0


async def test_what_others_overtook_and_does_not_come_is_read_from_the_log(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    bob = await b.connect("bob")
    await nodes.settle()
    start = await a.head("c")
    came = await kept_back(a, b, monkeypatch)
    b.gateway.hub.notice(came[start + 3])
    await bob.got("c", start + 3)
    # It comes after all: nobody hears it again.
    b.gateway.hub.notice(came[start + 1])
    await bob.quiet()
    assert bob.events("c") == [start + 1, start + 2, start + 3]


async def test_an_event_that_came_too_early_is_not_shown_to_who_was_removed_before_it(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: the event before it is the removal itself, whose notice comes with it."""
    bob = await b.connect("bob")
    await nodes.settle()
    deaf(b, monkeypatch)
    told: list[Notice] = []
    a.core.bus.listen(told.append)
    await a.remove("c", "bob")
    await a.send("c", "secret")
    secret = next(notice for notice in told if type(notice) is Published and b"secret" in notice.payload)
    b.gateway.hub.notice(secret)
    for notice in told[: told.index(secret)]:
        b.gateway.hub.notice(notice)
    await bob.until(lambda: bob.of("channel.left"))
    await bob.quiet()
    assert not [payload for payload in bob.payloads if b"secret" in payload]


async def kept_back(a: Node, b: Node, monkeypatch: pytest.MonkeyPatch) -> dict[int, Published]:
    """Three messages to `c`, of which node b has not heard: what would have told it."""
    deaf(b, monkeypatch, lambda notice: type(notice) is Published)
    told: list[Notice] = []
    a.core.bus.listen(told.append)
    for _ in range(3):
        await a.send("c")
    sid = await a.sid("c")
    return {notice.seq: notice for notice in told if type(notice) is Published and notice.sid == sid}


async def test_a_node_with_nobody_in_a_channel_hears_nothing_of_it(nodes: Cluster, a: Node, b: Node) -> None:
    heard: list[Notice] = []
    b.core.bus.listen(heard.append)
    await a.connect("alice")
    await b.connect("carol")
    await nodes.settle()
    await a.send("c")
    await a.add("c", "carol")
    await until(lambda: any(type(notice) is Joined for notice in heard))
    # From here on it does.
    await nodes.settle()
    await a.send("c", "last")
    await until(lambda: any(type(notice) is Published and b"last" in notice.payload for notice in heard))
    assert not any(type(notice) is Published and b"hello" in notice.payload for notice in heard)


async def test_nothing_falls_between_while_clients_connect_to_one_node_and_send_on_another(
    nodes: Cluster, a: Node, b: Node
) -> None:
    """D13 across nodes: streams are followed anew each time, and what was said before that was known is made good."""
    going = True

    async def send() -> None:
        while going:
            await a.send("c")

    sending = asyncio.create_task(send())
    for number in range(60):
        since = await a.head("c")
        peer = await b.connect("bob", f"d{number}", positions={"c": {"seq": since}})
        await peer.until(lambda peer=peer: len(peer.events("c")) > 5)
        seqs = peer.events("c")
        assert seqs == list(range(since + 1, since + 1 + len(seqs)))
        peer.gone()
        # Nobody is left: the next one begins anew.
        b.gateway.hub.doubt()
        await asyncio.sleep(0)
    going = False
    await sending


async def test_what_was_said_before_interest_was_known_is_found_in_the_store(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = bus_of(b).settle
    sent = asyncio.Event()

    async def late() -> bool:
        # As if it took the servers so long: what is sent meanwhile is not heard here.
        await sent.wait()
        return await settle()

    monkeypatch.setattr(bus_of(b), "settle", late)
    deaf(b, monkeypatch, lambda notice: type(notice) is Published)
    peer = await b.connect("bob")
    await a.send("c")
    last = await a.head("c")
    await peer.quiet()
    assert last not in peer.events("c")
    sent.set()
    await peer.got("c", last)
    assert b.core.metrics.bus_healed.value >= 1


async def test_a_last_event_that_was_lost_is_found_at_the_streams_next_turn(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = await b.connect("bob")
    await nodes.settle()
    deaf(b, monkeypatch, lambda notice: type(notice) is Published)
    await a.send("c")
    last = await a.head("c")
    await peer.quiet()
    assert last not in peer.events("c")
    assert b.gateway.nodes is not None
    for _ in range(nodes_module.TURNS_MIN):
        await b.gateway.nodes.turn()
    await peer.got("c", last)
    assert peer.events("c") == [last]


async def test_a_running_node_finds_what_was_lost_within_seconds(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    b.gateway.start()
    peer = await b.connect("bob")
    await nodes.settle()
    deaf(b, monkeypatch, lambda notice: type(notice) is Published)
    began = asyncio.get_running_loop().time()
    await a.send("c")
    await peer.got("c", await a.head("c"))
    assert asyncio.get_running_loop().time() - began < 5


async def test_a_turn_costs_a_bounded_number_of_streams_however_many_there_are(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [await a.channel(f"r{number}", "bob") for number in range(30)]
    peer = await b.connect("bob")
    await nodes.settle()
    deaf(b, monkeypatch, lambda notice: type(notice) is Published)
    for name in names:
        await a.send(name)
    monkeypatch.setattr(nodes_module, "TURN_STREAMS_MAX", 7)
    monkeypatch.setattr(nodes_module, "IN_FLIGHT_SECONDS", 0.0)
    asked: list[int] = []
    grown = b.services.sync.grown

    async def counted(heads: dict[int, int]) -> Any:
        asked.append(len(heads))
        return await grown(heads)

    monkeypatch.setattr(b.services.sync, "grown", counted)
    assert b.gateway.nodes is not None
    b.gateway.nodes._again.clear()
    b.gateway.nodes._round.clear()
    streams = len(b.gateway.hub.streams)
    for _ in range(-(-streams // 7)):
        await b.gateway.nodes.turn()
    assert max(asked) <= 7
    assert sum(asked) == streams
    for name in names:
        await peer.until(lambda name=name: peer.events(name))


async def test_eighty_thousand_streams_have_had_their_turn_within_three(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nodes.settle()
    assert b.gateway.nodes is not None
    b.gateway.nodes._again.clear()
    b.gateway.nodes._round.clear()
    compared: set[int] = set()

    async def none_has(heads: dict[int, int]) -> dict[int, int]:
        compared.update(heads)
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(b.services.sync, "grown", none_has)
        patched.setattr(b.gateway.hub, "streams", {sid: Stream(sid, 1, f"r{sid}", "e", 1) for sid in range(80_000)})
        for _ in range(3):
            await b.gateway.nodes.turn()
        assert len(compared) == 80_000


# ---------------------------------------------------------------- access


async def test_nothing_reaches_a_member_on_another_node_from_their_removal_on(nodes: Cluster, a: Node, b: Node) -> None:
    bob = await b.connect("bob")
    await nodes.settle()
    await a.send("c")
    await bob.got("c", await a.head("c"))
    had = bob.events("c")
    await a.remove("c", "bob")
    await a.send("c", "secret")
    await b.send("c", "secret")
    await bob.until(lambda: bob.of("channel.left"))
    await bob.quiet()
    assert bob.events("c") == had


@pytest.mark.parametrize("way", ["live", "history", "message", "versions", "events", "members", "send"])
async def test_nothing_reaches_a_removed_member_even_if_nobody_tells_their_node(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    bob = await b.connect("bob")
    actor = bob.actor
    assert actor is not None
    await b.services.messages.history(actor, "c")
    await nodes.settle()
    deaf(b, monkeypatch)
    await a.remove("c", "bob")
    secret = await a.send("c", "secret")
    assert b.gateway.access.cached(actor, "c") is not None, "what is remembered is out of date"
    services = b.services
    match way:
        case "live":
            # The number that is due has not come: the stream is read from the log, and reading asks the store who may.
            assert b.gateway.nodes is not None
            for _ in range(nodes_module.TURNS_MIN):
                await b.gateway.nodes.turn()
            await until(lambda: not bob.behind)
            await bob.quiet()
        case "history":
            with pytest.raises(NotFound):
                await services.messages.history(actor, "c")
        case "message":
            with pytest.raises(NotFound):
                await services.messages.one(actor, "c", secret.message_id)
        case "versions":
            with pytest.raises(NotFound):
                await services.messages.versions(actor, "c", secret.message_id)
        case "events":
            with pytest.raises(NotFound):
                await services.sync.events(actor, "c", 0, None, 10)
        case "members":
            with pytest.raises(NotFound):
                await services.members.list(actor, "c")
        case _:
            with pytest.raises(NotFound):
                await services.messages.send(actor, "c", Draft(text="x"), "k")
    assert not [payload for payload in bob.payloads if b"secret" in payload]


async def test_who_joins_by_another_node_hears_the_channel_from_their_joining_on(
    nodes: Cluster, a: Node, b: Node
) -> None:
    carol = await b.connect("carol")
    await nodes.settle()
    await a.send("c", "before")
    before = await a.head("c")
    await a.add("c", "carol")
    await a.send("c")
    await carol.got("c", before + 2)
    assert carol.events("c") == [before + 1, before + 2]
    await a.send("c")
    await carol.got("c", before + 3)
    assert (await carol.ask("message.send", channel="c", key="mine", text="hi"))["type"] == "message.sent"


async def test_a_joining_that_was_not_heard_is_made_good(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    carol = await b.connect("carol")
    await nodes.settle()
    with monkeypatch.context() as lossy:
        deaf(b, lossy)
        await a.add("c", "carol")
        await a.send("c")
        await a.core.bus.settle()
    joined = await a.head("c") - 1
    assert b.gateway.nodes is not None
    for _ in range(nodes_module.TURNS_MIN):
        # Her own stream has grown: there is something that was not heard.
        await b.gateway.nodes.turn()
    await carol.got("c", joined + 1)
    assert carol.events("c") == [joined, joined + 1]
    await nodes.settle()
    await a.send("c")
    await carol.got("c", joined + 2)


@pytest.mark.parametrize("how", ["all", "jti", "device", "deactivated", "deleted"])
async def test_who_is_revoked_on_one_node_is_shown_out_on_the_others(
    nodes: Cluster, a: Node, b: Node, how: str
) -> None:
    token = await b.token("bob")
    bob, alice = b.peer(), await b.connect("alice")
    bob.say("connect", token=token, device={"id": "phone"})
    await bob.until(lambda: bob.of("connected"))
    await b.gateway._write_seen_once()
    assert bob.granted is not None
    users = a.services.users
    match how:
        case "all":
            await a.services.auth.revoke(a.backend, "bob")
        case "jti":
            await a.services.auth.revoke(a.backend, "bob", bob.granted.jti)
        case "device":
            await users.remove_device(a.backend, "bob", "phone")
        case "deactivated":
            await users.deactivate(a.backend, "bob")
        case _:
            await users.delete(a.backend, "bob")
    await bob.until(lambda: bob.closed_with is not None)
    assert alice.closed_with is None
    if how != "device":
        # The token that was good a moment ago does not come in any more.
        again = b.peer()
        again.say("connect", token=token, device={"id": "other"})
        await again.until(lambda: again.closed_with is not None)


async def test_changes_of_roles_reach_what_other_nodes_remember(nodes: Cluster, a: Node, b: Node) -> None:
    bob = await b.connect("bob")
    assert (await bob.ask("message.send", channel="c", key="1", text="x"))["type"] == "message.sent"
    assert bob.actor is not None
    await a.services.members.update(a.backend, "c", "bob", MemberUpdate(role="reader"))
    await until(lambda: b.gateway.access.cached(bob.actor, "c") is None)
    assert (await bob.ask("message.send", channel="c", key="2", text="x"))["code"] == "forbidden"


async def types_of(node: Node) -> list[str]:
    return [name for (name,) in await node.rows("SELECT name FROM channel_types")]


async def test_a_type_that_was_deleted_elsewhere_makes_no_channel_though_it_is_remembered(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a.services.admin.put_type(a.backend, "visit", ChannelTypePut())
    await nodes.settle()
    remembered = backend_actor(await b.services.apps.get(b.app_id), "k1")
    assert "visit" in remembered.app.types
    deaf(b, monkeypatch)
    await a.services.admin.delete_type(a.backend, "visit")
    with pytest.raises(Refusal) as caught:
        await b.services.channels.create(remembered, ChannelCreate(id="v", type="visit", members=["alice"]))
    assert (caught.value.code, caught.value.field) == ("invalid_field", "type")
    assert not await a.rows("SELECT id FROM channels WHERE id='v'")


async def test_a_type_is_not_deleted_while_a_channel_of_it_is_being_made(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    if a.config.embedded:
        pytest.skip("SQLite's writers queue: nothing comes between")
    await a.services.admin.put_type(a.backend, "visit", ChannelTypePut())
    maker = backend_actor(await a.services.apps.get(a.app_id), "k1")
    insert_new, stop = channels_module.insert_new, 4711

    async def stopping(tx: Any, *args: Any) -> None:
        await tx.one("SELECT 1 FROM pg_advisory_xact_lock(?)", stop)
        await insert_new(tx, *args)

    async def waiting(kinds: str) -> bool:
        return bool(await a.rows(f"SELECT 1 FROM pg_locks WHERE NOT granted AND locktype IN ({kinds})"))

    monkeypatch.setattr(channels_module, "insert_new", stopping)
    holder = await asyncpg.connect(a.config.store)
    try:
        await holder.execute("SELECT pg_advisory_lock($1)", stop)
        # In the middle of the transaction that makes the channel …
        making = asyncio.create_task(
            b.services.channels.create(maker, ChannelCreate(id="v", type="visit", members=["alice"]))
        )
        async with asyncio.timeout(PATIENCE):
            while not await waiting("'advisory'"):
                await asyncio.sleep(0.005)  # why: looking again, not waiting for the thing itself
            # … another node is asked to delete its type: it waits, or else is done.
            deleting = asyncio.create_task(a.services.admin.delete_type(a.backend, "visit"))
            while not deleting.done() and not await waiting("'transactionid','tuple'"):
                await asyncio.sleep(0.005)  # why: looking again, not waiting for the thing itself
    finally:
        await holder.close()
    await making
    with pytest.raises(Refusal) as caught:
        await deleting
    assert caught.value.code == "conflict"
    assert await types_of(a) == ["visit"]


async def test_of_a_type_and_a_channel_of_it_never_only_the_channel_is_left(nodes: Cluster, a: Node, b: Node) -> None:
    for number in range(20):
        name = f"visit-{number}"
        await a.services.admin.put_type(a.backend, name, ChannelTypePut())
        maker = backend_actor(await a.services.apps.get(a.app_id), "k1")
        outcomes = await asyncio.gather(
            a.services.admin.delete_type(a.backend, name),
            *(
                b.services.channels.create(maker, ChannelCreate(id=f"{name}-{n}", type=name, members=["alice"]))
                for n in range(3)
            ),
            return_exceptions=True,
        )
        deleted = outcomes[0] is None
        assert all(outcome is None or isinstance(outcome, tuple | Refusal) for outcome in outcomes), outcomes
        made = await a.rows("SELECT id FROM channels WHERE type=?", name)
        assert (name in await types_of(a)) is not deleted
        assert not (deleted and made)
        assert deleted or made


async def test_what_an_app_defines_on_one_node_counts_on_the_others(nodes: Cluster, a: Node, b: Node) -> None:
    before = await b.services.apps.get(b.app_id)
    await a.services.admin.put_role(a.backend, "app", "auditor", ["audit.read"])
    await until(lambda: b.services.apps.cached(b.app_id) is not before)
    assert "auditor" in (await b.services.apps.get(b.app_id)).app_roles


# ---------------------------------------------------------------- cut off from the bus


@pytest.fixture
async def proxy(nats: NatsProcess) -> AsyncIterator[ChaosProxy]:
    async with ChaosProxy(nats.port) as made:
        yield made


@pytest.fixture
async def far(nodes: Cluster, a: Node, proxy: ChaosProxy) -> Node:
    """A node whose way to the bus can be cut."""
    return await nodes.node(url=f"nats://127.0.0.1:{proxy.port}")


async def cut_off(node: Node, proxy: ChaosProxy) -> None:
    await proxy.refuse_connections()
    proxy.cut()
    await until(lambda: not node.core.bus.connected)


async def test_a_node_that_is_cut_off_trusts_nothing_it_remembers(
    nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy
) -> None:
    alice, bob, carol = await far.connect("alice"), await far.connect("bob"), await far.connect("carol")
    actor = bob.actor
    assert actor is not None
    await far.services.messages.history(actor, "c")
    await nodes.settle()
    await cut_off(far, proxy)
    await a.remove("c", "bob")
    await a.services.users.deactivate(a.backend, "carol")
    await a.channel("new", "alice")
    await a.send("c", "secret")
    await a.send("new")
    assert far.gateway.nodes is not None
    await far.gateway.nodes.turn()
    # What came meanwhile is read from the store, by who still may.
    await alice.got("c", await a.head("c"))
    await alice.got("new", await a.head("new"))
    await carol.until(lambda: carol.closed_with is not None)
    await bob.until(lambda: bob.of("channel.left"))
    await bob.quiet()
    assert not [payload for payload in bob.payloads if b"secret" in payload]
    assert "c" not in {stream.name for stream in bob.streams.values()}
    with pytest.raises(Refusal):
        await far.services.auth.refresh(carol.actor)


async def test_a_node_that_is_cut_off_asks_about_all_its_sessions_together(
    nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nodes.settle()
    peers = [await far.connect(user, f"d{n}") for user in ("alice", "bob", "carol") for n in range(10)]
    await cut_off(far, proxy)
    await a.services.auth.revoke(a.backend, "carol")
    asked: list[int] = []
    recheck_all = far.services.auth.recheck_all

    async def counted(many: Any) -> Any:
        asked.append(len(many))
        return await recheck_all(many)

    monkeypatch.setattr(far.services.auth, "recheck_all", counted)
    assert far.gateway.nodes is not None
    await far.gateway.nodes.turn()
    for peer in peers[20:]:
        await peer.until(lambda peer=peer: peer.closed_with is not None)
        assert peer.of("error")[0]["code"] == "token_revoked"
    await until(lambda: sum(asked) == 30)
    assert asked == [30]
    assert not [peer for peer in peers[:20] if peer.ended]


async def test_what_a_node_decides_while_it_is_cut_off_is_told_to_the_others_through_the_store(
    nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy
) -> None:
    bob, carol = await a.connect("bob"), await a.connect("carol")
    await nodes.settle()
    await cut_off(far, proxy)
    before = await generation(a)
    await far.send("c")
    assert await generation(a) == before, "only what decides about access is worth everybody's looking again"
    await far.services.users.deactivate(far.backend, "carol")
    await far.remove("c", "bob")
    assert await generation(a) == before + 2
    # What a running node does once a second when the store says so.
    await a.gateway.changed_elsewhere()
    await carol.until(lambda: carol.closed_with is not None)
    await bob.until(lambda: bob.of("channel.left"))
    with pytest.raises(NotFound):
        await a.services.messages.history(bob.actor, "c")
    # What it said just before it noticed may have reached nobody.
    assert far.gateway.nodes is not None
    for _ in range(3):
        await far.gateway.nodes.turn()
    assert await generation(a) == before + 3


async def generation(node: Node) -> int:
    found = await node.rows("SELECT value FROM meta WHERE name='generation'")
    return int(found[0][0]) if found else 0


async def test_a_node_that_finds_the_bus_again_has_missed_nothing_and_is_heard_of(
    nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy
) -> None:
    alice, bob = await a.connect("alice"), await far.connect("bob")
    await nodes.settle()
    await cut_off(far, proxy)
    start = await a.head("c")
    await a.send("c", "from here")
    await far.send("c", "from there")
    await proxy.accept_connections()
    await until(lambda: far.core.bus.connected)
    for node in (a, far):
        # What `start` does every second.
        nodes_of = node.gateway.nodes
        assert nodes_of is not None
        await until(lambda nodes_of=nodes_of: nodes_of._lost)
        await nodes_of.turn()
    for peer in (alice, bob):
        await peer.got("c", start + 2)
        assert peer.events("c") == [start + 1, start + 2]
    await a.send("c")
    await bob.got("c", start + 3)
    await far.send("c")
    await alice.got("c", start + 4)


async def test_a_running_node_goes_on_delivering_from_the_store_while_the_bus_is_away(
    nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy
) -> None:
    far.gateway.start()
    bob = await far.connect("bob")
    await nodes.settle()
    await cut_off(far, proxy)
    for _ in range(2):
        await a.send("c")
        await bob.got("c", await a.head("c"))


async def test_readiness_tells_that_the_bus_is_away(nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy) -> None:
    async with door(far) as http:
        assert (await http.get("/readyz")).json() == {"status": "ok"}
        await cut_off(far, proxy)
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "bus": "cut_off"})


# ---------------------------------------------------------------- signals and presence


async def test_how_many_type_in_a_large_channel_is_added_up_across_nodes(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECEIPTS_MEMBERS_MAX", 1)
    monkeypatch.setattr(crowds, "CROWD_SECONDS", 0.01)
    await a.add("c", "carol")
    alice, bob, carol = await a.connect("alice"), await b.connect("bob"), await b.connect("carol")
    await nodes.settle()

    def counted(peer: RecordingPeer) -> list[int]:
        return [frame["count"] for frame in peer.of("typing")]

    await alice.ask("typing", channel="c")
    for peer in (alice, bob, carol):
        await peer.until(lambda peer=peer: counted(peer) == [1])
    await bob.ask("typing", channel="c")
    await carol.ask("typing", channel="c")
    for peer in (alice, bob, carol):
        await peer.until(lambda peer=peer: counted(peer)[-1] == 3)
    await bob.ask("typing", channel="c", on=False)
    for peer in (alice, bob, carol):
        await peer.until(lambda peer=peer: counted(peer)[-1] == 2)
    # What the other node says no more counts no more: its typing lapses here whether it can say so or not.
    deaf(a, monkeypatch, lambda notice: isinstance(notice, Crowd))
    a.clock.advance(crowds.CROWD_SHOWN_MS / 1000)
    for peer in (alice, bob, carol):
        await peer.until(lambda peer=peer: counted(peer)[-1] == 0)
    await until(lambda: not len(a.gateway.crowds) and not len(b.gateway.crowds))


async def test_typing_and_receipts_are_told_across_nodes(nodes: Cluster, a: Node, b: Node) -> None:
    alice, bob = await a.connect("alice"), await b.connect("bob")
    await nodes.settle()
    await alice.ask("typing", channel="c", on=True)
    await bob.until(lambda: bob.of("typing"))
    assert alice.of("typing") == []
    await a.send("c")
    head = await a.head("c")
    await bob.got("c", head)
    other = await a.connect("bob", "tablet")
    await nodes.settle()
    await bob.ask("read", channel="c", seq=head)
    await b.services.receipts.flush()
    await alice.until(lambda: alice.of("receipts"))
    await other.until(lambda: other.of("unread"))


def told(peer: RecordingPeer) -> list[tuple[str, str]]:
    return [(frame["user"], frame["status"]) for frame in peer.of("presence")]


async def watch(node: Node, user: str, whom: str) -> tuple[RecordingPeer, str]:
    peer = await node.connect(user)
    reply = await peer.ask("presence.watch", users=[whom])
    return peer, reply["users"][0]["status"]


async def test_who_is_online_on_another_node_is_online(nodes: Cluster, a: Node, b: Node) -> None:
    alice, status = await watch(a, "alice", "bob")
    assert status == "offline"
    bob = await b.connect("bob")
    await alice.until(lambda: told(alice))
    reply = await alice.ask("presence.watch", users=["bob"])
    assert reply["users"][0]["status"] == "online"
    bob.gone()
    await alice.until(lambda: len(told(alice)) == 2)
    assert told(alice) == [("bob", "online"), ("bob", "offline")]
    assert (await alice.ask("presence.watch", users=["bob"]))["users"][0]["status"] == "offline"


async def test_a_user_with_sessions_on_two_nodes_leaves_with_the_last_of_them(nodes: Cluster, a: Node, b: Node) -> None:
    c = await nodes.node()
    alice, _ = await watch(a, "alice", "bob")
    first = await b.connect("bob", "phone")
    second = await c.connect("bob", "laptop")
    await nodes.settle()
    first.gone()
    await until(lambda: (b.backend.app.app, "bob") not in b.gateway.presence._online)
    await until(lambda: len(b.gateway.tasks) == 0)
    await alice.quiet()
    assert told(alice) == [("bob", "online")]
    second.gone()
    await alice.until(lambda: len(told(alice)) == 2)
    assert told(alice)[1] == ("bob", "offline")


async def test_who_wants_to_be_unseen_is_unseen_on_every_node(nodes: Cluster, a: Node, b: Node) -> None:
    await b.connect("bob", presence="invisible")
    await nodes.settle()
    alice, status = await watch(a, "alice", "bob")
    assert status == "offline"
    await alice.quiet()
    assert told(alice) == []


async def test_a_node_that_dies_takes_its_users_offline(nodes: Cluster, a: Node, far: Node, proxy: ChaosProxy) -> None:
    await far.connect("bob")
    await nodes.settle()
    alice, status = await watch(a, "alice", "bob")
    assert status == "online"
    # Nobody says goodbye.
    await cut_off(far, proxy)
    await a.gateway.presence.ask_again()
    assert told(alice) == []
    await a.gateway.presence.ask_again()
    await alice.until(lambda: told(alice) == [("bob", "offline")])
    await proxy.accept_connections()
    await until(lambda: far.core.bus.connected)
    await until(lambda: asked_again(a, alice))


def asked_again(node: Node, peer: RecordingPeer) -> bool:
    node.gateway.tasks.spawn(node.gateway.presence.ask_again(), "ask")
    return told(peer) == [("bob", "offline"), ("bob", "online")]


# ---------------------------------------------------------------- devices and rates


async def test_a_device_that_connects_to_another_node_replaces_itself(nodes: Cluster, a: Node, b: Node) -> None:
    old, other = await a.connect("bob", "phone"), await a.connect("bob", "laptop")
    await nodes.settle()
    a.clock.advance(0.01)
    new = await b.connect("bob", "phone")
    await old.until(lambda: old.closed_with is not None)
    assert [frame["code"] for frame in old.of("error")] == ["replaced"]
    await new.quiet()
    assert (new.closed_with, other.closed_with) == (None, None)


async def test_of_a_device_that_connects_twice_at_once_exactly_one_session_stays(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_module, "CERTAIN_SECONDS", 0.1)
    for number in range(10):
        both = await asyncio.gather(a.connect("bob", f"d{number}"), b.connect("bob", f"d{number}"))
        await until(lambda both=both: any(peer.closed_with is not None for peer in both))
        await nodes.settle()
        await until(lambda: True)
        assert sum(peer.closed_with is None for peer in both) == 1


async def test_a_session_of_a_minute_ago_is_replaced_whatever_the_clocks_say(nodes: Cluster, a: Node, b: Node) -> None:
    old = await a.connect("bob", "phone")
    await nodes.settle()
    a.clock.advance(60)
    # The other node's clock is an hour behind.
    a.clock.set_wall(a.clock.now_ms() - 3_600_000)
    await b.connect("bob", "phone")
    await old.until(lambda: old.closed_with is not None)


async def test_two_nodes_together_hold_a_rate(nodes: Cluster, tmp_path: Path) -> None:
    pair = [await nodes.node(limited=True, rest_rate_per_second=20.0, rest_burst=40) for _ in range(2)]
    clock, key = pair[0].clock, (1, "user:alice")

    def ask(count: int) -> int:
        return sum(node.gateway.limiter.take(key, clock.monotonic()).allowed for node in pair for _ in range(count))

    async def share() -> None:
        for node in pair:
            assert node.gateway.nodes is not None
            node.gateway.nodes.share()
        for node in pair:
            await node.core.bus.settle()
        for node in pair:
            await node.core.bus.settle()

    ask(40)
    let_through = 0
    for _ in range(80):
        await share()
        clock.advance(0.25)
        let_through += ask(10)
    # Twenty seconds at twenty a second. Two nodes by themselves would be twice that.
    assert 0.85 * 400 <= let_through <= 1.15 * 400


# ---------------------------------------------------------------- HTTP


@asynccontextmanager
async def door(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    rest = create_rest_app(
        node.core.services,
        config=node.config,
        metrics=node.core.metrics,
        draining=lambda: False,
        route_handlers=http_routes(node.gateway),
    )
    transport = httpx.ASGITransport(rest, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://tidings.test") as http:
        yield http


async def test_an_http_session_is_served_by_whatever_node_its_requests_come_to(
    nodes: Cluster, a: Node, b: Node
) -> None:
    headers = {"Authorization": f"Bearer {await a.token('bob')}"}
    async with door(a) as here, door(b) as there:
        opened = (
            await here.post("/v1/realtime", headers=headers, json={"type": "connect", "device": {"id": "web"}})
        ).json()
        path = f"/v1/realtime/{opened['session']}"
        await nodes.settle()
        said = {"type": "message.send", "ref": 7, "channel": "c", "key": "k", "text": "hi"}
        answer = await there.post(f"{path}/commands", headers=headers, json=[said])
        assert answer.status_code == 202
        frames: list[dict[str, Any]] = []
        after = 0
        while len(frames) < 2:
            page = (await there.get(f"{path}/poll?after={after}&wait=5", headers=headers)).json()
            frames += [entry["frame"] for entry in page["frames"]]
            after = page["next"]
        assert {frame["type"] for frame in frames} == {"message.sent", "message.created"}
        # A poll whose answer was lost is repeated; one beyond what there is, refused: by the node that knows.
        again = (await there.get(f"{path}/poll?after=0&wait=0", headers=headers)).json()
        assert again["frames"] == [] or again["frames"][0]["n"] >= 1
        ahead = await there.get(f"{path}/poll?after=99&wait=0", headers=headers)
        assert (ahead.status_code, ahead.json()["code"]) == (422, "position_ahead")
        bad = await there.post(f"{path}/commands", headers=headers, json=[{"type": "nothing"}])
        assert bad.status_code == 400 or bad.status_code == 422
        # Another user does not get at it, here as there.
        others = {"Authorization": f"Bearer {await b.token('alice')}"}
        for http in (here, there):
            assert (await http.get(f"{path}/poll", headers=others)).json()["code"] == "session_unknown"
        # An event stream, too; its end is the session's.
        streaming = asyncio.create_task(there.get(f"{path}/events?after={after}", headers=headers))
        connection = a.gateway.http_sessions[opened["session"]]
        await until(lambda: connection.readers)
        await a.send("c", "streamed")
        await until(lambda: not connection._kept or connection._kept[-1][0] > after)
        await until(lambda: connection.readers)
        connection.close(Refusal("going_away", "Enough."))
        lines = (await asyncio.wait_for(streaming, PATIENCE)).text
        assert "streamed" in lines
        assert "going_away" in lines


async def test_a_session_of_a_node_that_is_gone_is_unknown(nodes: Cluster, a: Node, b: Node) -> None:
    headers = {"Authorization": f"Bearer {await a.token('bob')}", "Tidings-App": a.app_id}
    async with door(b) as http:
        for session in ("s_zzz_abc", "s_a_abcdefghijklmnop", "s_.._x", "s_abc"):
            answer = await http.get(f"/v1/realtime/{session}/poll?wait=0", headers=headers)
            assert answer.json()["code"] == "session_unknown", session


async def test_a_long_poll_hears_what_was_sent_on_another_node(nodes: Cluster, a: Node, b: Node) -> None:
    headers = {"Authorization": f"Bearer {await a.token('bob')}"}
    head = await a.head("c")
    async with door(b) as http:
        polling = asyncio.create_task(http.get(f"/v1/channels/c/events?after={head}&wait=25", headers=headers))
        await until(lambda: b.services.sync.polls)
        await b.core.bus.settle()
        await a.send("c")
        page = (await asyncio.wait_for(polling, PATIENCE)).json()
        assert [event["seq"] for event in page["events"]] == [head + 1]


async def test_a_long_poll_finds_what_was_lost_and_is_not_ended_by_being_asked_about(
    nodes: Cluster, a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Authorization": f"Bearer {await a.token('bob')}"}
    head = await a.head("c")
    assert b.gateway.nodes is not None
    async with door(b) as http:
        polling = asyncio.create_task(http.get(f"/v1/channels/c/events?after={head}&wait=25", headers=headers))
        await until(lambda: b.services.sync.polls)
        deaf(b, monkeypatch)
        for _ in range(3):
            await b.gateway.nodes.turn()
            await asyncio.sleep(0)
        assert not polling.done()
        await a.send("c")
        await b.gateway.nodes.turn()
        page = (await asyncio.wait_for(polling, PATIENCE)).json()
        assert [event["seq"] for event in page["events"]] == [head + 1]
