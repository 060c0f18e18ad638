"""The composition root: the one place that names concrete adapters; start-up, serving and drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from tidings.server.bus.base import AccessChanged, Bus, Left, Lost, Notice, Published, Revoked
from tidings.server.bus.local import LocalBus
from tidings.server.clock import Clock, Ids, SystemClock
from tidings.server.config import Config, is_loopback
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.limits import Limiter, Rate
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.errors import StoreUnavailable, UnsafeStore
from tidings.server.gateway.endpoint import socket_protocol
from tidings.server.gateway.gateway import Gateway
from tidings.server.gateway.http import http_routes
from tidings.server.jobs.health import probe_store
from tidings.server.jobs.housekeeping import housekeeping_kind, start_housekeeping
from tidings.server.jobs.push import push_kinds
from tidings.server.jobs.relay import Reader, Relay
from tidings.server.jobs.webhooks import webhook_kinds
from tidings.server.jobs.worker import Kind, Pressure, Worker
from tidings.server.posting import Poster
from tidings.server.push.lazy import LazyProviders
from tidings.server.services import Services
from tidings.server.services.access import AccessService
from tidings.server.services.admin import Admin
from tidings.server.services.apps import Apps
from tidings.server.services.auth import Auth
from tidings.server.services.change import Changes
from tidings.server.services.channels import Channels
from tidings.server.services.jobs import Jobs as JobsService
from tidings.server.services.jwks import JwksCache
from tidings.server.services.members import Members
from tidings.server.services.messages import Messages
from tidings.server.services.notifications import Notifications
from tidings.server.services.presend import Presend, PresendHooks
from tidings.server.services.push import Push, PushReader
from tidings.server.services.push_test import PushTester
from tidings.server.services.queue import Queue
from tidings.server.services.receipts import Receipts
from tidings.server.services.sync import Sync
from tidings.server.services.tokens import TokenVerifier
from tidings.server.services.trace import Trace
from tidings.server.services.users import Users
from tidings.server.services.webhooks import WebhookReader, Webhooks
from tidings.server.store.base import Store
from tidings.server.store.sqlite import SqliteStore
from tidings.server.systemd import notify, watchdog, watchdog_seconds
from tidings.server.tasks import Tasks
from tidings.server.telemetry import Metrics, get_logger, watch_event_loop
from tidings.wire.codec import encode

if TYPE_CHECKING:
    from tidings.server.bus.nats_link import Credentials
    from tidings.server.outbound import GuardedClient
    from tidings.server.store.migrations import Plan
    from tidings.server.tracing import Tracing

log = get_logger(__name__)

DATABASE: Final = "tidings.db"
# Connections waiting to be accepted: a reconnect storm of a few thousand must not be refused by the kernel.
BACKLOG: Final = 4_096
# How long a starting node waits for its bus, seconds: servers that are started together with it are there by then, and
# supervisors that start it again wait about as long.
BUS_START_SECONDS: Final = 15.0
# Of a name that is drawn: 60 random bits, each node's own.
NODE_CHARACTERS: Final = 12


@dataclass(slots=True, frozen=True)
class Core:
    """Store, bus and use-cases: everything but the doors. What commands that work on the data use too."""

    services: Services
    bus: Bus
    keyring: Keyring
    changes: Changes
    metrics: Metrics
    jwks: JwksCache
    queue: Queue
    push: Push
    providers: LazyProviders
    poster: Poster
    keep_days: int
    tracing: Tracing | None = None

    async def close(self) -> None:
        """Let go of what it holds, the store last."""
        await self.services.auth.close()
        await self.jwks.aclose()
        await self.push.close()
        await self.providers.aclose()
        await self.poster.aclose()
        await self.bus.close()
        await self.services.store.close()
        if self.tracing is not None:
            await self.tracing.close()


@asynccontextmanager
async def open_core(
    config: Config, *, clock: Clock | None = None, metrics: Metrics | None = None, on_bus: bool = True
) -> AsyncIterator[Core]:
    """Open the store and everything that works on it; closes it on the way out. Not `on_bus`: a command, whose notices
    reach no node.

    Raises UnsafeStore, KeyFileError, StoreCorrupt, StoreUnavailable with what to do about it.
    """
    clock = clock or SystemClock()
    metrics = metrics or Metrics()
    # First: where its libraries are missing there is nothing to be closed yet.
    tracing = _tracing(config)
    opened = await open_store(config, observe=_observer(metrics), on_bus=on_bus)
    store = opened.store
    try:
        # A database without its key file must not get a new one: nothing in it could be read with that.
        keyring = Keyring(KeyFile(config.key_file, create=opened.fresh))
    except BaseException:
        await store.close()
        raise
    ids = Ids(clock)
    try:
        bus = await open_bus(config, ids, metrics) if on_bus else LocalBus()
    except BaseException:
        await store.close()
        raise
    core = compose(
        config, store=store, bus=bus, keyring=keyring, clock=clock, ids=ids, metrics=metrics, tracing=tracing
    )
    try:
        yield core
    finally:
        await core.close()


def compose(
    config: Config,
    *,
    store: Store,
    bus: Bus,
    keyring: Keyring,
    clock: Clock,
    ids: Ids,
    metrics: Metrics,
    tracing: Tracing | None = None,
) -> Core:
    """The use-cases over a store and a bus, whichever they are."""
    if tracing is not None:
        store, bus = tracing.store(store), tracing.bus(bus)
    changes = Changes(store, bus)
    apps = Apps(store, keyring)
    policy = OutboundPolicy(hosts=tuple(config.jwks_allow_hosts))
    access = AccessService(store, apps, keyring, changes)
    sync = Sync(store, access, keyring, bus, clock)
    bus.listen(_forgetter(apps, access, sync), AccessChanged, Left, Lost, Revoked)
    users = Users(store, apps, changes, clock, ids)
    jwks = JwksCache(lambda: _outbound_client(policy), monotonic=clock.monotonic)
    auth = Auth(store, apps, changes, users, TokenVerifier(clock, jwks), bus, clock, ids)
    queue = Queue(store, clock, ids)
    outbound = OutboundPolicy(hosts=tuple(config.outbound_allow_hosts))
    providers = LazyProviders(outbound, clock)
    poster = Poster(outbound)
    presend = Presend(poster, clock, ids, metrics)
    push = Push(store, apps, bus, providers, clock, ids, metrics)
    services = Services(
        store=store,
        clock=clock,
        ids=ids,
        apps=apps,
        access=access,
        auth=auth,
        admin=Admin(store, apps, changes, keyring, clock, ids, policy),
        users=users,
        channels=Channels(store, apps, access, changes, clock, ids),
        members=Members(store, apps, access, changes, clock, ids),
        messages=Messages(store, access, bus, clock, ids, presend),
        receipts=Receipts(store, access, bus, clock),
        sync=sync,
        jobs=JobsService(store, queue, clock, ids),
        trace=Trace(store, bus),
        webhooks=Webhooks(store, apps, poster, clock, ids, metrics),
        presend_hooks=PresendHooks(store, apps, changes, presend, poster, clock, ids),
        push_tester=PushTester(store, apps, bus, push, clock, ids),
        notifications=Notifications(store, apps, access, changes, providers, clock, ids),
        bus=bus,
    )
    return Core(
        services,
        bus,
        keyring,
        changes,
        metrics,
        jwks,
        queue,
        push,
        providers,
        poster,
        config.delivery_log_days,
        tracing,
    )


def _tracing(config: Config) -> Tracing | None:
    """Where the setting is off, its libraries are not even loaded."""
    if not config.tracing:
        return None
    from tidings.server.tracing import start_tracing

    return start_tracing(config.node)


async def open_bus(config: Config, ids: Ids, metrics: Metrics) -> Bus:
    """The bus that the configuration names, connected.

    Raises BusUnavailable: a node that could not hear the others would be worse than none. It waits a little for servers
    that are just being started beside it.
    """
    if not config.bus_servers:
        return LocalBus()
    import ssl

    from tidings.server.bus.nats import NatsBus
    from tidings.server.bus.nats_link import read_address, read_credentials

    servers = [read_address(url) for url in config.bus_servers]
    if any(not server.tls and not is_loopback(server.host) for server in servers):
        log.warning("bus_may_be_plain", advice="tls:// in the setting bus, unless the network between is private")
    path = config.bus_credentials

    def credentials() -> Credentials | None:
        return None if path is None else read_credentials(path)

    bus = NatsBus(
        servers,
        node=config.node or ids.new_id("")[:NODE_CHARACTERS],
        cluster=config.cluster,
        credentials=credentials,
        tls=ssl.create_default_context(cafile=None if config.bus_ca is None else str(config.bus_ca)),
        metrics=metrics,
    )
    try:
        await bus.open(BUS_START_SECONDS)
    except BaseException:
        await bus.close()
        raise
    return bus


def _outbound_client(policy: OutboundPolicy) -> GuardedClient:
    from tidings.server.outbound import GuardedClient

    return GuardedClient(policy)


@dataclass(slots=True, frozen=True)
class OpenedStore:
    """A store, its schema brought up. `fresh`: nothing is in it yet, so a key file may be made for it."""

    store: Store
    fresh: bool


async def open_store(
    config: Config, *, observe: Callable[[int, float], None] | None = None, on_bus: bool = True
) -> OpenedStore:
    """Open the store that the configuration names. Raises UnsafeStore, StoreUnavailable, StoreCorrupt, SchemaTooNew,
    DataMoved."""
    if config.store_synchronous != "full" and not config.allow_unsafe_store:
        raise UnsafeStore(
            f"store_synchronous = {config.store_synchronous!r} loses acknowledged messages at a power cut. "
            "Set it to 'full', or say allow_unsafe_store = true if that is what you want."
        )
    config.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if config.embedded:
        return _open_sqlite(config, observe)
    return await _open_postgres(config, observe, on_bus)


def _open_sqlite(config: Config, observe: Callable[[int, float], None] | None) -> OpenedStore:
    from tidings.server.store.migrations import migrate
    from tidings.server.store.transferring import check_source

    check_source(config.data_dir)
    path = config.data_dir / DATABASE
    fresh = not path.exists()
    migrate(path)
    fresh = fresh or (not config.key_file.exists() and _is_empty(path))
    store = SqliteStore(path, readers=config.store_readers, synchronous=config.store_synchronous, observe=observe)
    return OpenedStore(store, fresh)


async def _open_postgres(config: Config, observe: Callable[[int, float], None] | None, on_bus: bool) -> OpenedStore:
    from tidings.server.store.migrations.postgres import migrate
    from tidings.server.store.postgres import PostgresStore, check_safety, connect
    from tidings.server.store.transferring import check_target

    connection = await connect(config.store)
    try:
        await check_safety(connection, allow=config.allow_unsafe_store)
        await migrate(connection)
        await check_target(connection)
        keys = await connection.fetchval("SELECT count(*) FROM app_keys")
    finally:
        await connection.close()
    store = await PostgresStore.open(
        config.store,
        connections=config.store_connections,
        append_connections=config.store_append_connections,
        statement_seconds=config.store_statement_seconds,
        asynchronous=config.store_synchronous != "full",
        allow_unsafe=config.allow_unsafe_store,
        on_bus=on_bus,
        observe=observe,
    )
    return OpenedStore(store, not keys)


async def migrate_store(config: Config, *, plan: bool) -> tuple[str, Plan]:
    """Bring the schema of the store up to this version, or (`plan`) only find out what that would do: the store's name
    for people, and what was or would be done. Raises SchemaTooNew, SchemaUnknown, StoreUnavailable, StoreCorrupt."""
    from tidings.server.store import migrations

    if config.embedded:
        path = config.data_dir / DATABASE
        return str(path), migrations.plan(path) if plan else migrations.migrate(path)
    from tidings.server.store.migrations import postgres
    from tidings.server.store.postgres import connect, redact

    connection = await connect(config.store)
    try:
        work = postgres.plan(connection) if plan else postgres.migrate(connection)
        return redact(config.store), await work
    finally:
        await connection.close()


def _is_empty(path: Path) -> bool:
    from tidings.server.store.sqlite import connect

    connection = connect(path)
    try:
        return not connection.execute("SELECT 1 FROM app_keys LIMIT 1").fetchall()
    finally:
        connection.close()


def _observer(metrics: Metrics) -> Callable[[int, float], None]:
    def observe(batch: int, seconds: float) -> None:
        metrics.batch_size.observe(batch)
        metrics.commit_seconds.observe(seconds)

    return observe


def _forgetter(apps: Apps, access: AccessService, sync: Sync) -> Callable[[Notice], None]:
    """What is remembered about access goes before anybody else hears of the change."""

    def listen(notice: Notice) -> None:
        if isinstance(notice, AccessChanged) and notice.channel is None and notice.user is None:
            apps.forget(notice.app)
        elif isinstance(notice, Lost):
            apps.forget_all()
        elif isinstance(notice, Revoked) and notice.code == "user_unknown":
            sync.forget(notice.app, notice.user)
        access.heard(notice)

    return listen


@dataclass(slots=True, frozen=True)
class Jobs:
    """What happens behind the scenes: events become jobs, and jobs are done."""

    store: Store
    clock: Clock
    relay: Relay
    worker: Worker

    async def run(self) -> None:
        """Until cancelled."""
        tasks = Tasks("jobs")
        try:
            with contextlib.suppress(StoreUnavailable):
                await start_housekeeping(self.store, self.clock)
            await asyncio.wait(
                {tasks.spawn(self.relay.run(), "relay"), tasks.spawn(self.worker.run(), "worker")},
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            await tasks.close()


def jobs(core: Core, *, pressure: bool) -> Jobs:
    """Everything that is done behind the scenes. `pressure`: beside people's messages, for which it makes room."""
    services = core.services
    readers: list[Reader] = [PushReader(), WebhookReader()]
    kinds: list[Kind] = [*push_kinds(core.push), *webhook_kinds(services.webhooks)]
    kinds.append(housekeeping_kind(services.store, services.clock, core.keep_days))
    sent = 0

    def count(_notice: object) -> None:
        nonlocal sent
        sent += 1

    if pressure:
        core.bus.listen(count, Published)
    room = Pressure(lambda: sent) if pressure else None
    worker = Worker(core.queue, kinds, services.clock, core.metrics, pressure=room)
    return Jobs(
        services.store,
        services.clock,
        Relay(services.store, readers, core.bus, services.clock, core.metrics, wake=worker.wake),
        worker,
    )


class Server:
    """One node: core, gateway and HTTP on one port."""

    def __init__(self, config: Config, core: Core) -> None:
        from tidings.server.rest import create_rest_app
        from tidings.server.rest.asyncapi import asyncapi_document
        from tidings.server.rest.http_protocol import http_protocol
        from tidings.server.rest.web import sdk_routes

        self.config = config
        self.core = core
        services = core.services
        rate = Rate(config.rest_rate_per_second, config.rest_burst)
        limiter = Limiter(rate, shared=bool(core.bus.node))
        core.metrics.info.labels(version("tidings")).value = 1
        if config.tls_cert is not None:
            core.metrics.certificate_expires.value = _expiry(config.tls_cert)
        made = Gateway if core.tracing is None else core.tracing.gateway
        self.gateway = made(services, core.bus, config, services.clock, services.ids, core.metrics, limiter)
        self._tasks = Tasks("server")
        self.rest = create_rest_app(
            services,
            config=config,
            metrics=core.metrics,
            limiter=limiter,
            asyncapi=lambda: encode(asyncapi_document(config.url)),
            draining=lambda: self.gateway.draining,
            route_handlers=[*http_routes(self.gateway), *sdk_routes(), *self._demo()],
        )
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self.rest if core.tracing is None else core.tracing.rest(self.rest),
                host=config.host,
                port=config.port,
                http=http_protocol(config),
                ws=socket_protocol(self.gateway),  # type: ignore[arg-type]
                loop="none",
                lifespan="off",
                access_log=False,
                # Whose word about a client's address counts is ours to say; see Config.trusts.
                proxy_headers=False,
                log_config=None,
                server_header=False,
                date_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=int(config.drain_seconds) + 1,
                ssl_certfile=None if config.tls_cert is None else str(config.tls_cert),
                ssl_keyfile=None if config.tls_key is None else str(config.tls_key),
            )
        )

    def _demo(self) -> list[Any]:
        if not self.config.demo_on:
            return []
        from tidings.server.rest.web import demo_routes
        from tidings.server.services.example import Example

        services = self.core.services
        return demo_routes(
            Example(
                services.admin,
                services.apps,
                services.users,
                services.channels,
                services.messages,
                services.notifications,
                services.auth,
            )
        )

    async def serve(self, *, ready: Callable[[], None] | None = None) -> None:
        """Serve until asked to stop (SIGTERM, SIGINT), then drain."""
        config = self.config
        # What is loaded by now stays for good: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        listener = listen(config.host, config.port, shared=config.workers > 1)
        listeners = [listener]
        if config.worker_port:
            listeners.append(listen(config.host, config.worker_port))
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
        self.gateway.start()
        receipts = self._tasks.spawn(self.core.services.receipts.run(), "receipts")
        if config.jobs:
            self._tasks.spawn(jobs(self.core, pressure=True).run(), "jobs")
        self._tasks.spawn(
            probe_store(self.core.services.store, self.core.metrics, self.core.services.clock), "store's health"
        )
        self._tasks.spawn(self._finish_deletions(), "deletions")
        self._tasks.spawn(watch_event_loop(self.core.metrics, self.core.services.clock), "event loop")
        if (seconds := watchdog_seconds()) is not None:
            self._tasks.spawn(watchdog(seconds), "watchdog")
        serving = self._tasks.spawn(self._uvicorn.serve(sockets=listeners), "http")

        def started() -> None:
            notify("READY=1")
            if ready is not None:
                ready()

        self._uvicorn.when_started(started)
        waiting = self._tasks.spawn(stop.wait(), "stop")
        await asyncio.wait({serving, waiting, receipts}, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        log.info("draining", connections=len(self.gateway.connections))
        listener.close()
        await self.gateway.drain(config.drain_seconds)
        self._uvicorn.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.drain_seconds):
                await serving
        await self._tasks.close()
        log.info("stopped")

    async def _finish_deletions(self) -> None:
        """Deletions that a crash cut short go on where they were."""
        finished = await self.core.services.users.resume_deletions()
        finished += await self.core.services.channels.resume_deletions()
        if finished:
            log.info("deletions_resumed", count=finished)


def _expiry(certificate: Path) -> float:
    """When it expires, Unix time. The file has been looked at before: `load_config`."""
    from cryptography import x509

    return x509.load_pem_x509_certificates(certificate.read_bytes())[0].not_valid_after_utc.timestamp()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the server that owns it hears them."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ready: Callable[[], None] | None = None

    def when_started(self, ready: Callable[[], None] | None) -> None:
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self._ready is not None:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket. `shared`: others of this user may listen there too, and the kernel spreads connections over
    them. Raises OSError."""
    listener = _bind(host, port, shared=shared)
    try:
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def load_all() -> None:
    """Load what a node among others will need, before there are processes that would each do it: they share it."""
    import asyncpg  # noqa: F401
    import uvloop  # noqa: F401

    import tidings.server.bus.nats
    import tidings.server.rest.asyncapi
    import tidings.server.rest.http_protocol
    import tidings.server.store.postgres  # noqa: F401


def reserve(host: str, port: int) -> socket.socket:
    """A socket that keeps a port for those who will share it, without listening. Raises OSError where anybody listens
    there already: the kernel would let strangers of the same user share."""
    _bind(host, port).close()
    return _bind(host, port, shared=True)


def _bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    os.set_inheritable(bound.fileno(), False)
    return bound
