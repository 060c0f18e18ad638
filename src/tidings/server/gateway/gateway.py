"""The gateway: connections of one node, what their commands do, and how they catch up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, assert_never

import msgspec

from tidings.server.bus.base import AccessChanged, Bus, Joined, Left, Published, Revoked, Signal
from tidings.server.clock import Clock, Ids
from tidings.server.config import Config
from tidings.server.domain.limits import Limiter
from tidings.server.domain.permissions import Permission
from tidings.server.errors import Forbidden, NotFound, Refusal, StoreUnavailable
from tidings.server.services import Services
from tidings.server.services.access import Actor
from tidings.server.services.apps import AppContext
from tidings.server.services.messages import Edit
from tidings.server.services.sync import OWN_STREAM, StreamHandle, check_position, make_mark, read_mark
from tidings.server.services.users import SEEN_BATCH
from tidings.server.store.base import Stale
from tidings.server.tasks import Tasks
from tidings.server.telemetry import Metrics, get_logger
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.commands import (
    Ack,
    AddReaction,
    AnyCommand,
    Authenticate,
    Authenticated,
    Connect,
    Connected,
    DeleteMessage,
    DeviceInfo,
    Done,
    EditMessage,
    GoingAway,
    Heads,
    HeadsReply,
    History,
    Hold,
    Limits,
    MarkUnread,
    Ping,
    Pong,
    Position,
    PresenceReply,
    Read,
    ReadReply,
    RemoveReaction,
    SendMessage,
    SetPresence,
    StreamRefused,
    Sync,
    Synced,
    Syncing,
    Typing,
    TypingSignal,
    WatchPresence,
)
from tidings.wire.ids import time_of
from tidings.wire.resources import Head

from .connection import Connection, draft_of
from .crowds import Crowds
from .doubts import Doubts
from .hub import Hub, Subscriber
from .nodes import Nodes
from .presence import PresenceBoard
from .session import SessionLimits, State

if TYPE_CHECKING:
    from .http import HttpConnection

log = get_logger(__name__)

# Events read from the log at a time: 200 KB of common messages, a few milliseconds of a reader.
CATCH_UP_PAGE: Final = 500
# Large messages come in smaller pages: this many at least, and about so many bytes, a quarter of a slow reader's bound.
CATCH_UP_PAGE_MIN: Final = 16
CATCH_UP_BYTES: Final = 262_144
# How long to wait for a store that cannot be read, seconds.
CATCH_UP_RETRY_SECONDS: Final = 0.25
# Connections that read the log at the same time; the others wait, so that a reconnect storm shares the readers fairly.
CATCH_UPS_MAX: Final = 8
# How often connections are looked at for silence and expiry, seconds: half the precision of the shortest limit.
TICK_SECONDS: Final = 0.5
# A typing signal per user and channel in this time; it is shown for TYPING_SHOWN_MS.
TYPING_SECONDS: Final = 2.0
TYPING_SHOWN_MS: Final = 6_000
# How often what idle streams should hold is compared with the store, seconds.
RECHECK_SECONDS: Final = 1.0
SEEN_SECONDS: Final = 1.0
# The mark of somebody of whom nothing is known to have arrived: everything has moved since.
NO_MARK: Final = make_mark(0)


class HistoryPage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag_field="type", tag="history"):
    """`wire.commands.HistoryReply` with messages that are encoded already."""

    ref: int | None = None
    channel: str
    messages: list[msgspec.Raw]
    epoch: str
    head: int
    has_before: bool = False
    has_after: bool = False


class Gateway:
    """Everything that connections share."""

    def __init__(
        self,
        services: Services,
        bus: Bus,
        config: Config,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        limiter: Limiter,
        *,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.services = services
        self.access = services.access
        self.messages = services.messages
        self.sync = services.sync
        self.bus = bus
        self.config = config
        self.clock = clock
        self.metrics = metrics
        # Shared with REST: nobody gets twice the rate by using both.
        self.limiter = limiter
        self._ids = ids
        self._rng = rng
        # Bound once: they are counted with every message.
        self.stored = metrics.sends.labels("stored")
        self.repeated = metrics.sends.labels("repeated")
        self.send_refused = metrics.sends.labels("refused")
        self.send_seconds = metrics.send_seconds
        self.rate_refused = metrics.rate_limited.labels("socket")
        metrics.measure(self._measure)
        self.tasks = Tasks("gateway")
        # None on the only node there is.
        self.nodes = Nodes(self) if bus.node else None
        self.doubts = Doubts(self)
        self.hub = Hub(
            asyncio.get_running_loop(),
            interest=self.nodes,
            on_flush=self._flushed,
            on_unsure=self.doubts.about_memberships,
        )
        self.crowds = Crowds(self)
        self.presence = PresenceBoard(
            services.store, self.hub, bus, clock, self.tasks, grace_seconds=config.presence_grace_seconds
        )
        bus.answer_devices(lambda app, user: [peer.device for peer in self.hub.peers_of(app, user) if peer.device])
        self.connections: set[Connection] = set()
        self.by_address: dict[str, int] = {}
        # Sessions without a socket, by id.
        self.http_sessions: dict[str, HttpConnection] = {}
        self.draining = False
        self._catch_ups = asyncio.Semaphore(CATCH_UPS_MAX)
        # Devices that connected since they were last written.
        self._devices: dict[tuple[int, str, str], tuple[AppContext, DeviceInfo]] = {}
        self._seen_devices: dict[tuple[int, str, str], Connection] = {}
        self.session_limits = SessionLimits(
            auth_timeout_seconds=config.auth_timeout_seconds,
            heartbeat_seconds=config.heartbeat_seconds,
            commands_per_second=config.session_rate_per_second,
            commands_burst=config.session_burst,
            in_flight_max=config.session_queue_max,
            frame_bytes_max=config.frame_bytes_max,
        )
        bus.listen(self.hub.notice, Published, Signal, Joined, Left, Revoked, AccessChanged)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Begin to look after connections."""
        self.tasks.spawn(self._tick(), "tick")
        self.tasks.spawn(self._write_seen(), "seen")
        self.tasks.spawn(self._recheck(), "recheck")
        if self.nodes is not None:
            self.nodes.start()
            self.tasks.spawn(self.presence.keep_asking(), "presence")

    async def drain(self, seconds: float) -> None:
        """Tell every client when to come back, spread over `reconnect_spread_seconds`, and close them."""
        self.draining = True
        self.metrics.draining.value = 1
        self.sync.wake_all()
        spread = self.config.reconnect_spread_seconds
        for connection in list(self.connections):
            wait = int(1000 * spread * self._rng())
            connection.send(encode(GoingAway(reason="going_away", reconnect_in_ms=wait)))
        self.hub.flush()
        # What was accepted is answered before the line is cut.
        deadline = self.clock.monotonic() + seconds
        while self.clock.monotonic() < deadline and any(
            connection.session.in_flight > 0 for connection in self.connections
        ):
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.close(Refusal("going_away", "The server is restarting."))
        await self._write_seen_once()
        self.presence.close()
        await self.tasks.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = self.clock.monotonic()
            for connection in list(self.connections):
                connection.tick(now)
            self.hub.sweep()

    async def _recheck(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            try:
                if await self.services.store.changed_elsewhere():
                    await self.changed_elsewhere()
            except Refusal as refusal:
                log.warning("recheck_failed", code=refusal.code)

    async def changed_elsewhere(self) -> None:
        """Another process has written to the store: trust nothing remembered, and read what streams have grown."""
        await self.doubts.everything()

    def device(self, app: int, user: str, device: str) -> Connection | None:
        """The session of a device here."""
        return self._seen_devices.get((app, user, device))

    # ------------------------------------------------------------ connections

    def new_session_id(self) -> str:
        """An id for a session. Among several nodes it names the one that has it."""
        return self._ids.new_id(f"s_{self.bus.node}_" if self.bus.node else "s_")

    def admit(self, address: str) -> Refusal | None:
        """Whether a connection from this address may be accepted."""
        if self.draining:
            return Refusal("going_away", "The server is restarting.", retry_after_ms=1000)
        if len(self.connections) >= self.config.connections_max:
            return Refusal(
                "too_many_connections", "This server is full.", bound=self.config.connections_max, retry_after_ms=5000
            )
        if self.by_address.get(address, 0) >= self.config.connections_per_address:
            return Refusal(
                "too_many_connections",
                "Too many connections from this address.",
                bound=self.config.connections_per_address,
                retry_after_ms=5000,
            )
        return None

    def opened(self, connection: Connection) -> None:
        """A transport is connected; the session is not yet."""
        self.connections.add(connection)
        self.by_address[connection.address] = self.by_address.get(connection.address, 0) + 1
        self.metrics.connections.inc()

    def forget(self, connection: Connection) -> None:
        """A transport has ended. Idempotent."""
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        self.http_sessions.pop(connection.id, None)
        left = self.by_address.get(connection.address, 1) - 1
        if left:
            self.by_address[connection.address] = left
        else:
            self.by_address.pop(connection.address, None)
        self.metrics.connections.dec()
        if connection.last_mark:
            # It was connected, and counted as a session.
            self.metrics.sessions.labels(connection.transport_name).dec()
        if connection.user:
            for sid in connection.typing:
                self.typing_ended(connection, sid)
            self.hub.exit(connection)
            self.presence.vanished(connection)
            key = (connection.app, connection.user, connection.device)
            if self._seen_devices.get(key) is connection:
                del self._seen_devices[key]

    def counted_close(self, code: str) -> None:
        """A connection was closed by us, for this reason."""
        self.metrics.closes.labels(code).inc()

    def _flushed(self, peers: int, frames: int) -> None:
        if peers:
            metrics, hub = self.metrics, self.hub
            metrics.flush_frames.observe(frames / peers)
            metrics.deliveries.value = hub.deliveries
            metrics.slow_readers.value = hub.put_behind

    def _measure(self) -> None:
        """Set the gauges that are read from what is there."""
        behind = paused = furthest = 0
        users = set()
        for connection in self.connections:
            if connection.user:
                users.add((connection.app, connection.user))
            paused += connection.transport_paused
            lag = -1
            for sid, position in connection.behind.items():
                stream = connection.streams.get(sid)
                if stream is not None and position is not None:
                    lag = max(lag, stream.head - position)
            behind += lag >= 0
            furthest = max(furthest, lag)
        metrics = self.metrics
        metrics.behind.value, metrics.behind_events.value, metrics.paused.value = behind, furthest, paused
        metrics.users.value, metrics.streams.value = len(users), len(self.hub.streams)

    # ------------------------------------------------------------ connect

    async def connect(self, connection: Connection, command: Connect) -> None:
        """Authenticate, subscribe, answer, and stream what is missing. Raises Refusal."""
        if self.draining:
            raise Refusal("going_away", "The server is restarting.", retry_after_ms=1000)
        token = command.token or connection.header_token
        if not token:
            raise Refusal("unauthenticated", "`connect` needs a token.", field="token")
        since = None if command.since is None else read_mark(command.since)
        auth = self.services.auth
        device = command.device
        credentials = {"app_hint": command.app, "device": device.id, "session": connection.id}
        forgotten = auth.forgotten
        granted = await auth.authenticate(token, **credentials)
        actor = granted.actor
        if actor.user is None:
            raise Refusal(
                "unauthenticated",
                "A connection is a user's: connect with a user's token, not an API key.",
                field="token",
            )
        if connection.ended:
            return
        self._devices[(actor.app.app, actor.user, device.id)] = (actor.app, device)
        connection.granted, connection.actor = granted, actor
        connection.app, connection.user, connection.device = actor.app.app, actor.user, device.id
        # From here on the hub tells us what changes; what it sends waits until the client knows where it stands.
        connection.entering = connection.paused = True
        subscriber = self.hub.enter(connection)
        mark = self.sync.mark()
        moved = None
        try:
            if not subscriber.known:
                await self.load(subscriber, actor)
            if since is not None and not connection.ended:
                moved = await self.sync.moved(actor, since, mark, len(subscriber.streams))
                if subscriber.own is not None and moved.own_head > subscriber.own.head and not connection.ended:
                    # Whoever joins or leaves is told on their own stream: there is something that we have not heard.
                    subscriber.known = False
                    await self.load(subscriber, actor)
        except BaseException:
            self.hub.exit(connection)
            connection.user = ""
            raise
        if connection.ended:
            return
        # What was revoked before the hub knew us was not told to us: if anybody's credentials have changed since we
        # looked, ask again, now that nothing can be missed.
        if auth.forgotten != forgotten:
            granted = auth.authenticate_now(token, **credentials) or await auth.authenticate(token, **credentials)
            actor = granted.actor
        if connection.ended or actor.user is None:
            return
        connection.granted, connection.actor = granted, actor
        connection.session.connected(
            self.clock.monotonic(),
            expires_at=self._expiry(granted.expires_at_ms),
            issued_at_ms=granted.issued_at_ms,
            jti=granted.jti,
        )
        connection.connected_at, connection.connected_at_ms = self.clock.monotonic(), self.clock.now_ms()
        key = (actor.app.app, actor.user, device.id)
        older = self._seen_devices.get(key)
        self._seen_devices[key] = connection
        if older is not None and older is not connection:
            older.close(Refusal("replaced", "This device has connected again."))
        if self.nodes is not None:
            self.nodes.arrived(connection)
        heads: list[Head] = []
        if moved is not None:
            # Held until the client says what it has of them. What moves after this snapshot comes by itself: of those
            # streams the client has what was before.
            heads = [head for head in moved.heads if head.stream not in command.positions]
            self.hub.hold(connection, moved.at)
        refused: dict[str, StreamRefused] = {}
        for name in command.positions:
            stream = self.hub.listening(connection, name)
            if stream is not None:
                connection.behind[stream.sid] = None
            else:
                refused[name] = StreamRefused("not_found", "There is no such stream, or you may not see it.")
        connection.guarded = actor.app.blind_roles
        if connection.behind:
            # What is still on its way may not arrive: the next connection has to begin where this one did. `pong` tells
            # a newer mark once nothing is missing.
            mark = command.since or NO_MARK
        connection.last_mark = mark
        connection.entering = False
        connection.paused = connection.transport_paused or connection.withheld
        connection.send(
            encode(
                Connected(
                    ref=command.ref,
                    session=connection.id,
                    user=actor.user,
                    device=device.id,
                    server_time=time_of(self.clock.now_ms()),
                    mark=mark,
                    heartbeat_seconds=max(1, int(self.config.heartbeat_seconds)),
                    expires_at=None if granted.expires_at_ms is None else time_of(granted.expires_at_ms),
                    limits=Limits(
                        frame_bytes=self.config.frame_bytes_max,
                        text_length=limits.TEXT_LENGTH_MAX,
                        custom_bytes=limits.CUSTOM_BYTES_MAX,
                        commands_per_second=self.config.session_rate_per_second,
                        commands_burst=int(self.config.session_burst),
                        in_flight=self.config.session_queue_max,
                    ),
                    moved=heads,
                    # The client takes the rest with `heads`, from the same mark.
                    more=None if moved is None else moved.more,
                )
            )
        )
        self.metrics.sessions.labels(connection.transport_name).inc()
        connection.visible = command.presence == "online"
        self.presence.appeared(connection)
        connection.session.answered()
        if connection.guarded:
            self.hub.guard(connection, list(connection.streams))
        if command.positions:
            refused.update(
                await self._resume(
                    connection, actor, {name: at for name, at in command.positions.items() if name not in refused}
                )
            )
            if refused:
                connection.send(encode(Syncing(streams=[], refused=refused)))
        connection.fell_behind()

    async def load(self, subscriber: Subscriber, actor: Actor, *, heard: bool = False) -> None:
        """Read what a user may listen to; peers of theirs that come meanwhile do the same, and the first one counts.

        `heard`: peers are there that have been listening, and are told what they have not heard of.
        """
        began = self.hub.load(subscriber)
        memberships = None
        try:
            memberships = await self.sync.memberships(actor)
            if heard or len(subscriber.peers) > 1:
                by_sid = {membership[0]: membership for membership in memberships}
                new = [sid for sid in by_sid if sid not in subscriber.streams]
                self.hub.reconcile(subscriber, by_sid, await self.sync.joined_at(subscriber.app, subscriber.user, new))
        finally:
            self.hub.loaded(subscriber, memberships, began)

    def _expiry(self, expires_at_ms: int | None) -> float | None:
        if expires_at_ms is None:
            return None
        return self.clock.monotonic() + (expires_at_ms - self.clock.now_ms()) / 1000

    # ------------------------------------------------------------ catching up

    async def _resume(
        self, connection: Connection, actor: Actor, positions: dict[str, Position]
    ) -> dict[str, StreamRefused]:
        """Put streams where the client says it is; why some of them cannot go on from there."""
        refused: dict[str, StreamRefused] = {}
        for name, position in positions.items():
            try:
                handle = await self.sync.handle(actor, name)
            except Refusal as refusal:
                refused[name] = StreamRefused(refusal.code, refusal.detail)
                continue
            subscriber = connection.subscriber
            if subscriber is not None and handle.sid not in subscriber.streams:
                # The store says that it is theirs to read, and we have not heard that they have joined it.
                try:
                    subscriber.known = False
                    await self.load(subscriber, actor, heard=True)
                except Refusal as refusal:
                    refused[name] = StreamRefused(refusal.code, refusal.detail)
                    continue
            stream = connection.streams.get(handle.sid)
            if stream is None:
                refused[name] = StreamRefused("not_found", "There is no such stream, or you may not see it.")
                continue
            if position.seq > stream.head:
                # It may have come through another node, and is on its way here: only the store knows.
                try:
                    self.hub.recheck(await self.sync.heads_of([handle.sid]))
                except Refusal as refusal:
                    refused[name] = StreamRefused(refusal.code, refusal.detail)
                    continue
                if connection.streams.get(handle.sid) is not stream:
                    refused[name] = StreamRefused("not_found", "There is no such stream, or you may not see it.")
                    continue
            problem = check_position(handle, stream.head, position)
            if problem is not None:
                refused[name] = StreamRefused(problem.code, problem.detail, handle.epoch, stream.head)
                continue
            connection.behind[handle.sid] = position.seq
            self.hub.undeafen(connection, handle.sid)
        return refused

    async def catch_up(self, connection: Connection) -> None:
        """Stream what the connection is behind on, page by page, as fast as it takes it, and switch it to live."""
        handles: dict[int, StreamHandle] = {}
        behind = connection.behind
        size = CATCH_UP_PAGE_MIN * 4
        guards = connection.guards
        while connection.session.state is State.OPEN and not connection.paused:
            if connection.guards != guards:
                # Who may read what has changed, perhaps while it was asked.
                guards = connection.guards
                handles.clear()
            sid = next((sid for sid, position in behind.items() if position is not None), None)
            if sid is None:
                return
            stream = connection.streams.get(sid)
            position = behind[sid]
            if stream is None or position is None:
                behind.pop(sid, None)
                continue
            if position >= stream.head and (sid in handles or not connection.guarded):
                # Nothing is awaited between this comparison and the switch: what comes next is live.
                del behind[sid]
                connection.sent_before.pop(sid, None)
                connection.send(encode(Synced(stream=stream.name, epoch=stream.epoch, seq=stream.head)))
                continue
            try:
                handle = handles.get(sid)
                if handle is None:
                    assert connection.actor is not None
                    handle = handles[sid] = await self.sync.handle(connection.actor, stream.name)
                    continue
                async with self._catch_ups:
                    page = await self.sync.read(handle, position, size)
            except (NotFound, Forbidden):
                if connection.guards != guards:
                    continue
                # They may not read it any more: they do not listen to it either.
                self.hub.deafen(connection, sid)
                continue
            except Stale:
                # Who may do what has changed since: ask again whether they may.
                handles.pop(sid, None)
                continue
            except StoreUnavailable:
                await asyncio.sleep(CATCH_UP_RETRY_SECONDS)
                continue
            except Exception as error:
                # A row that cannot be read must not keep the other streams waiting, nor be tried for ever.
                self.metrics.internal_errors.labels("catch-up").inc()
                log.error("catch_up_failed", stream=stream.name, after=position, exc_info=error)
                if sid in behind:
                    behind[sid] = None
                    refused = StreamRefused("internal", "The stream cannot be read here; it has been logged.")
                    connection.send(encode(Syncing(streams=[], refused={stream.name: refused})))
                continue
            # The world has moved while we read: a removed member gets nothing of the page.
            if connection.streams.get(sid) is not stream or behind.get(sid) != position or connection.guards != guards:
                continue
            if not page.events:
                # The announcement came before the snapshot shows it, or nothing is left to show: look again shortly.
                await asyncio.sleep(0.05)
                continue
            # A commit can be read before it is announced: what is above the head comes live, and must not come twice.
            events = [event for event in page.events if event[0] <= stream.head]
            if not events:
                await asyncio.sleep(0.05)
                continue
            sent = 0
            for _, payload in events:
                connection.send(payload)
                sent += len(payload)
            # Pages of about the same number of bytes, whatever the size of the messages.
            if sent > CATCH_UP_BYTES:
                size = max(CATCH_UP_PAGE_MIN, size // 2)
            elif sent < CATCH_UP_BYTES // 2:
                size = min(CATCH_UP_PAGE, size * 2)
            behind[sid] = events[-1][0]
            self.metrics.catch_up_events.inc(len(events))
            # Others get their turn with this connection's next stream.
            behind[sid] = behind.pop(sid)
            self.hub.flush()
            await asyncio.sleep(0)

    # ------------------------------------------------------------ commands

    async def dispatch(self, connection: Connection, actor: Actor, command: AnyCommand) -> bytes | None:
        """Do what a command asks; its encoded reply. Raises Refusal."""
        self.metrics.commands.labels(command.__struct_config__.tag).inc()  # type: ignore[arg-type]
        ref = command.ref
        services = self.services
        match command:
            case SendMessage():
                await self.messages.send(
                    actor,
                    command.channel,
                    draft_of(command),
                    command.key,
                    then=lambda stored: connection.sent(ref, command.channel, stored),
                )
                return None
            case EditMessage():
                seq, _ = await self.messages.edit(
                    actor,
                    command.channel,
                    command.id,
                    Edit(command.text, command.mentions, command.attachments, command.custom),
                )
                return encode(Done(ref=ref, seq=seq))
            case DeleteMessage():
                return encode(
                    Done(
                        ref=ref,
                        seq=await self.messages.delete(actor, command.channel, command.id, hard=command.hard),
                    )
                )
            case AddReaction() | RemoveReaction():
                add = isinstance(command, AddReaction)
                changed = await self.messages.react(actor, command.channel, command.id, command.emoji, add=add)
                return encode(Done(ref=ref, seq=changed))
            case History():
                page = await self.messages.history(
                    actor,
                    command.channel,
                    before=command.before,
                    after=command.after,
                    around=command.around,
                    limit=command.limit,
                )
                return encode(
                    HistoryPage(
                        ref=ref,
                        channel=command.channel,
                        messages=[msgspec.Raw(message) for message in page.messages],
                        epoch=page.epoch,
                        head=page.head,
                        has_before=page.has_before,
                        has_after=page.has_after,
                    )
                )
            case Sync():
                return await self._sync(connection, actor, command)
            case Heads():
                moved, more, mark = await self.sync.heads(actor, command.since, command.cursor, command.limit)
                # Not newer than what is known to have arrived.
                mark = connection.last_mark if connection.behind else mark
                return encode(HeadsReply(ref=ref, mark=mark, moved=moved, more=more))
            case Hold():
                connection.withhold(command.on)
                return encode(Done(ref=ref))
            case Read():
                unread = await services.receipts.read(actor, command.channel, command.seq)
                return encode(
                    ReadReply(
                        ref=ref,
                        channel=command.channel,
                        read=unread.read,
                        unread=unread.unread,
                        mentions=unread.mentions,
                    )
                )
            case MarkUnread():
                unread = await services.receipts.mark_unread(actor, command.channel, command.seq)
                return encode(
                    ReadReply(
                        ref=ref,
                        channel=command.channel,
                        read=unread.read,
                        unread=unread.unread,
                        mentions=unread.mentions,
                    )
                )
            case Typing():
                await self._typing(connection, actor, command)
                return encode(Done(ref=ref))
            case SetPresence():
                connection.visible = command.status == "online"
                if connection.visible:
                    self.presence.appeared(connection)
                else:
                    self.presence.hide(connection)
                return encode(Done(ref=ref))
            case WatchPresence():
                return encode(PresenceReply(ref=ref, users=await self.presence.watch(connection, actor, command.users)))
            case Authenticate():
                return await self._authenticate(connection, actor, command)
            case Ping():
                return encode(Pong(ref=ref, at=time_of(self.clock.now_ms()), mark=connection.last_mark))
            case Ack():
                self.acknowledge(connection, command.positions)
                return encode(Done(ref=ref))
            case Connect():
                raise Refusal("conflict", "This connection is connected already.")
            case _:
                assert_never(command)

    async def _sync(self, connection: Connection, actor: Actor, command: Sync) -> bytes | None:
        # Hold the streams first: what is announced while positions are checked must not overtake them.
        for name in command.positions:
            stream = self.hub.listening(connection, name)
            if stream is not None:
                connection.hold(stream)
        refused = await self._resume(connection, actor, command.positions)
        streams = [name for name in command.positions if name not in refused]
        connection.send(encode(Syncing(ref=command.ref, streams=streams, refused=refused)))
        connection.fell_behind()
        return None

    async def _authenticate(self, connection: Connection, actor: Actor, command: Authenticate) -> bytes:
        granted = await self.services.auth.authenticate(
            command.token, app_hint=actor.app.id, on_behalf_of=None, device=actor.device, session=connection.id
        )
        fresh = granted.actor
        if fresh.user != actor.user or fresh.app.app != actor.app.app or granted.expires_at_ms is None:
            raise Refusal(
                "token_claims", "The token is another user's: open another connection for them.", field="token"
            )
        connection.granted, connection.actor = granted, fresh
        connection.session.authorised(
            expires_at=self._expiry(granted.expires_at_ms), issued_at_ms=granted.issued_at_ms, jti=granted.jti
        )
        return encode(Authenticated(ref=command.ref, expires_at=time_of(granted.expires_at_ms)))

    def acknowledge(self, connection: Connection, positions: dict[str, int]) -> None:
        """This device has everything up to these seqs. Refused as a whole when one is ahead of what was sent."""
        merged = []
        for name, seq in positions.items():
            stream = self.hub.listening(connection, name)
            if stream is None:
                # Left meanwhile, or never theirs: there is nothing to acknowledge.
                continue
            bound = connection.sent_up_to(stream)
            if seq > bound:
                raise Refusal(
                    "position_ahead",
                    "More was acknowledged than was sent.",
                    field=f"positions.{name}",
                    bound=bound,
                )
            if name != OWN_STREAM:
                merged.append((stream, seq))
        receipts = self.services.receipts
        for stream, seq in merged:
            # Without the permission only the device's own position is kept.
            access = None if connection.actor is None else self.access.cached(connection.actor, stream.name)
            receipts.acknowledge(
                tell=access is None or access.may(Permission.RECEIPT_SEND),
                app=connection.app,
                user=connection.user,
                device=connection.device,
                sid=stream.sid,
                channel=stream.name,
                seq=seq,
            )

    def done(self, connection: Connection, ref: int) -> None:
        """Answer that it is done."""
        connection.send(encode(Done(ref=ref)))

    # ------------------------------------------------------------ typing

    async def _typing(self, connection: Connection, actor: Actor, command: Typing) -> None:
        access = await self.access.channel(actor, command.channel, Permission.TYPING_SEND)
        if not access.channel.type.definition.features.typing:
            raise Refusal("feature_off", "Typing is switched off in this type of channel.")
        sid, now = access.channel.sid, self.clock.monotonic()
        last = connection.typing.get(sid)
        if not command.on:
            if last is not None:
                del connection.typing[sid]
                self.typing_ended(connection, sid)
            return
        if last is not None and now - last < TYPING_SECONDS:
            return
        connection.typing[sid] = now
        if access.channel.member_count > limits.RECEIPTS_MEMBERS_MAX:
            # Told one by one it would cost the square of the membership, and nobody reads a hundred names.
            self.crowds.joined(connection, sid)
            return
        self.bus.publish(
            Signal(
                connection.app,
                encode(TypingSignal(channel=command.channel, user=connection.user, expires_in_ms=TYPING_SHOWN_MS)),
                sid=sid,
                skip_session=connection.id,
            )
        )

    def wrote(self, connection: Connection, channel: str) -> None:
        """The connection's user has sent a message. Where names are told, readers see by it that they type no more;
        a number says it itself."""
        stream = self.hub.listening(connection, channel)
        if stream is not None and self.crowds.left(connection, stream.sid):
            connection.typing.pop(stream.sid, None)

    def typing_ended(self, connection: Connection, sid: int) -> None:
        """Tell the channel that the connection's user types no more."""
        if self.crowds.left(connection, sid):
            return
        stream = self.hub.streams.get(sid)
        if stream is not None:
            self.bus.publish(
                Signal(
                    connection.app,
                    encode(TypingSignal(channel=stream.name, user=connection.user, on=False, expires_in_ms=0)),
                    sid=sid,
                    skip_session=connection.id,
                )
            )

    # ------------------------------------------------------------ last seen

    async def _write_seen(self) -> None:
        while True:
            await asyncio.sleep(SEEN_SECONDS)
            await self._write_seen_once()

    async def _write_seen_once(self) -> None:
        """Devices that connected and users that were there, in one batch: a reconnect storm costs a few commits."""
        seen = self.presence.take_seen()
        devices, self._devices = self._devices, {}
        users = self.services.users
        by_app: dict[int, tuple[AppContext, list[tuple[str, DeviceInfo]]]] = {}
        for (number, user, _), (app, device) in devices.items():
            by_app.setdefault(number, (app, []))[1].append((user, device))
        # One after the other: a reconnect storm must not fill the writer's queue with them.
        for app, connected in by_app.values():
            for start in range(0, len(connected), SEEN_BATCH):
                await _tried(users.register_devices(app, connected[start : start + SEEN_BATCH]))
        last = [(number, user, at) for (number, user), at in seen.items()]
        for start in range(0, len(last), SEEN_BATCH):
            await _tried(users.record_seen(last[start : start + SEEN_BATCH]))


async def _tried(writing: Coroutine[Any, Any, None]) -> None:
    try:
        await writing
    except Exception as error:
        log.warning("seen_not_written", error=type(error).__name__)
