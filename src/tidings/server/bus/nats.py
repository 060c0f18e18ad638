"""The bus over NATS: nodes hear each other through subjects they are interested in.

What goes where, `P` being the cluster's prefix (`tidings`, unless two clusters share their servers):

| subject | carries | heard by |
|---|---|---|
| `P.s.<sid>` | `Published`, and `Signal` and `Crowd` of a channel | nodes with sessions or long polls on the stream |
| `P.u.<app>.<user>` | `Signal` of a user, `Arrived`; the question: are they online | nodes with sessions of the user |
| `P.w.<app>.<user>` | `Shown` | nodes with sessions that watch the user |
| `P.c` | `Joined`, `Left`, `AccessChanged`, `Revoked`, `Lost`, `Used` | every node |
| `P.n.<node>` | requests to one node | that node |
| `P.r.<node>.<n>` | answers | who asked |

Everything that decides who may see what goes to every node, whether it has sessions that it concerns or not: nodes
remember what they have read, and one that only answers REST must forget it, too. It also spares connecting a wait:
interest takes a moment to be known everywhere, and a `Joined` missed in that moment would be missed for good, whereas
an event missed is found by comparing heads. Such notices are as rare as changes of membership are.

The user's subject doubles as presence: NATS itself says that nobody is interested ("no responders"), so that a user who
is offline costs one message and no row anywhere, and a node that dies takes its users' presence with it.

NATS keeps the order of what one node publishes, across subjects, for each that hears it: `Left` comes before the
`member.removed` it was published with, everywhere. Nothing of our own comes back: local listeners hear it by a call.

Interest, losses and what heals them: docs/decisions/0014-nats.md.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec

from tidings.server.tasks import Tasks
from tidings.server.telemetry import Metrics, get_logger

from .base import (
    Arrived,
    Crowd,
    Listeners,
    Lost,
    Notice,
    Published,
    Shown,
    Signal,
    Unreachable,
)
from .nats_link import Address, Credentials, NatsLink

log = get_logger(__name__)

# How long interest is kept after the last session that needed it has gone, seconds: a phone that changes its network
# is back by then, and the servers need not be told twice.
UNFOLLOW_SECONDS: Final = 10.0
# How often interests that nobody needs are looked for, seconds.
SWEEP_SECONDS: Final = 1.0
# How long a server may take to confirm interests, seconds.
SETTLE_SECONDS: Final = 5.0
# How long the servers of one cluster may take to tell each other of an interest, seconds: it is milliseconds, and
# there is no way to ask. What was missed in that time is made good after it.
INTEREST_SECONDS: Final = 1.0
# How long to wait for the answers of nodes about who is online, seconds. Whoever is not at all is known in one round
# trip; this is for users whose sessions want to be seen as offline, and for nodes that are stalled.
ONLINE_SECONDS: Final = 0.25
# Users asked about at a time: 100 bytes each.
ONLINE_USERS_MAX: Final = 500
# Requests of other nodes worked on at a time: each is a long poll of somebody at most.
ANSWERS_MAX: Final = 10_000
# Room for what stands around a payload in a message.
_ENVELOPE_BYTES: Final = 256


class _Asked(msgspec.Struct, frozen=True, array_like=True):
    """Is the user shown as online, or (`devices`) which of their devices are connected? Nodes that do not know the
    second question answer the first."""

    app: int
    user: str
    devices: bool = False


class _Request(msgspec.Struct, frozen=True, array_like=True):
    topic: str
    payload: bytes


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Notice).decode
_decode_devices: Final = msgspec.msgpack.Decoder(list[str]).decode
_decode_asked: Final = msgspec.msgpack.Decoder(_Asked).decode
_decode_request: Final = msgspec.msgpack.Decoder(_Request).decode

NodeId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]{1,32}$")]


class _Interests:
    """Subjects of one kind that are listened to, by key, with how many need them."""

    __slots__ = ("_handler", "_link", "_loop", "_subject", "counts", "leaving", "numbers")

    def __init__(
        self, link: NatsLink, subject: Callable[..., bytes], handler: Callable[[bytes, bytes, bytes, bool], None]
    ) -> None:
        self._link = link
        self._subject = subject
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self.counts: dict[Hashable, int] = {}
        self.numbers: dict[Hashable, bytes] = {}
        # Needed by nobody -> when that began, oldest first.
        self.leaving: dict[Hashable, float] = {}

    def more(self, key: Hashable, *names: object) -> None:
        count = self.counts.get(key, 0)
        self.counts[key] = count + 1
        if not count and self.leaving.pop(key, None) is None:
            self.numbers[key] = self._link.subscribe(self._subject(*names), self._handler)

    def less(self, key: Hashable) -> None:
        left = self.counts[key] - 1
        if left:
            self.counts[key] = left
        else:
            del self.counts[key]
            self.leaving[key] = self._loop.time()

    def sweep(self, before: float) -> None:
        """Give up what has not been needed since `before`."""
        while self.leaving:
            key, since = next(iter(self.leaving.items()))
            if since > before:
                return
            del self.leaving[key]
            self._link.unsubscribe(self.numbers.pop(key))


class NatsBus:
    """The `Bus` port over NATS. Make it inside the running event loop, then `open` it."""

    def __init__(
        self,
        servers: Sequence[Address],
        *,
        node: str,
        cluster: str = "tidings",
        credentials: Callable[[], Credentials | None] = lambda: None,
        tls: ssl.SSLContext | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.node = node
        self._prefix = cluster.encode()
        self._metrics = metrics or Metrics()
        self._loop = asyncio.get_running_loop()
        self._listeners = Listeners()
        self._link = NatsLink(
            servers,
            name=f"tidings {node}",
            credentials=credentials,
            tls=tls,
            on_up=self._came_up,
            on_down=self._went_down,
            on_room=self._has_room,
        )
        self._streams = _Interests(self._link, self._stream_subject, self._heard)
        self._users = _Interests(self._link, self._user_subject, self._heard_of_user)
        self._watched = _Interests(self._link, self._watch_subject, self._heard)
        self._control = self._prefix + b".c"
        self._inbox = b"%b.r.%b." % (self._prefix, node.encode())
        self._link.subscribe(self._control, self._heard)
        self._link.subscribe(b"%b.n.%b" % (self._prefix, node.encode()), self._requested)
        self._link.subscribe(self._inbox + b"*", self._answered)
        self._serial = itertools.count(1)
        # What waits for an answer, by the last word of the inbox: called with the data, None for "nobody is there".
        self._waiting: dict[bytes, Callable[[bytes | None], None]] = {}
        self._shown: Callable[[int, str], bool] = lambda app, user: False
        self._devices: Callable[[int, str], list[str]] = lambda app, user: []
        self._topics: dict[str, Callable[[bytes], Awaitable[bytes]]] = {}
        self._tasks = Tasks("bus")
        # Whether something was dropped that others were to hear, since they were last told so.
        self._lossy = False
        self._again: asyncio.Handle = self._loop.call_soon(lambda: None)

    # ------------------------------------------------------------ life

    async def open(self, seconds: float) -> None:
        """Connect, trying for `seconds`. Raises BusUnavailable."""
        await self._link.open(seconds)
        self._tasks.spawn(self._sweep(), "sweep")

    async def close(self) -> None:
        self._again.cancel()
        await self._tasks.close()
        await self._link.close()

    @property
    def connected(self) -> bool:
        return self._link.up

    def _came_up(self, again: bool) -> None:
        self._metrics.bus_connected.set(1)
        # Of what was said before our interest was known everywhere we have not heard.
        self._again.cancel()
        self._again = self._loop.call_later(INTEREST_SECONDS, self._deliver, Lost())
        if again:
            self._metrics.bus_reconnects.inc()
            # Nobody was heard meanwhile, and nobody heard us.
            self._deliver(Lost())
            self._tell_loss()

    def _went_down(self) -> None:
        self._metrics.bus_connected.set(0)

    def _has_room(self) -> None:
        if self._lossy:
            self._tell_loss()

    def _tell_loss(self) -> None:
        self._lossy = not self._link.publish(self._control, _encode(Lost()))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            before = self._loop.time() - UNFOLLOW_SECONDS
            for interests in (self._streams, self._users, self._watched):
                interests.sweep(before)
            self._metrics.bus_interests.set(sum(len(one.numbers) for one in self._interests()))
            self._metrics.bus_round_trip.set(self._link.round_trip_seconds)

    def _interests(self) -> tuple[_Interests, ...]:
        return self._streams, self._users, self._watched

    # ------------------------------------------------------------ subjects

    def _stream_subject(self, sid: int) -> bytes:
        return b"%b.s.%d" % (self._prefix, sid)

    def _user_subject(self, app: int, user: str) -> bytes:
        return b"%b.u.%d.%b" % (self._prefix, app, _token(user))

    def _watch_subject(self, app: int, user: str) -> bytes:
        return b"%b.w.%d.%b" % (self._prefix, app, _token(user))

    # ------------------------------------------------------------ publishing

    def publish(self, notice: Notice) -> None:
        for listener in self._listeners.of[type(notice)]:
            listener(notice)
        data = _encode(notice)
        if len(data) > self._link.max_payload:
            if not isinstance(notice, Published):
                self._dropped()
                return
            # Whoever listens reads it from the log.
            data = _encode(Published(notice.sid, notice.seq, b""))
        if self._link.publish(self._subject(notice), data):
            self._metrics.bus_published.inc()
        else:
            self._dropped()

    def _subject(self, notice: Notice) -> bytes:
        if isinstance(notice, Published):
            return b"%b.s.%d" % (self._prefix, notice.sid)
        if isinstance(notice, Signal):
            if notice.sid is not None:
                return self._stream_subject(notice.sid)
            return self._user_subject(notice.app, notice.user or "")
        if isinstance(notice, Crowd):
            return self._stream_subject(notice.sid)
        if isinstance(notice, Arrived):
            return self._user_subject(notice.app, notice.user)
        if isinstance(notice, Shown):
            return self._watch_subject(notice.app, notice.user)
        return self._control

    def _dropped(self) -> None:
        self._lossy = True
        self._metrics.bus_dropped.inc()

    def listen(self, listener: Callable[[Any], None], *kinds: type[Notice]) -> None:
        self._listeners.add(listener, kinds)

    def _heard(self, subject: bytes, reply: bytes, data: bytes, nobody: bool) -> None:
        try:
            notice = _decode(data)
        except (msgspec.DecodeError, msgspec.ValidationError):
            # Of a newer node in the middle of an upgrade, perhaps. What it tells is found in the store.
            log.warning("bus_notice_unknown", size=len(data))
            return
        self._metrics.bus_received.inc()
        self._deliver(notice)

    def _deliver(self, notice: Notice) -> None:
        for listener in self._listeners.of[type(notice)]:
            try:
                listener(notice)
            except Exception as error:  # One listener's bug must not silence the others.
                log.error("notice_failed", notice=type(notice).__name__, exc_info=error)

    # ------------------------------------------------------------ interest

    def follow(self, sid: int) -> None:
        self._streams.more(sid, sid)

    def unfollow(self, sid: int) -> None:
        self._streams.less(sid)

    def attend(self, app: int, user: str) -> None:
        self._users.more((app, user), app, user)

    def unattend(self, app: int, user: str) -> None:
        self._users.less((app, user))

    def watch(self, app: int, user: str) -> None:
        self._watched.more((app, user), app, user)

    def unwatch(self, app: int, user: str) -> None:
        self._watched.less((app, user))

    async def settle(self) -> bool:
        return await self._link.settled(SETTLE_SECONDS)

    # ------------------------------------------------------------ asking who is online

    def answer_online(self, shown: Callable[[int, str], bool]) -> None:
        self._shown = shown

    def _heard_of_user(self, subject: bytes, reply: bytes, data: bytes, nobody: bool) -> None:
        if not reply:
            self._heard(subject, reply, data, nobody)
            return
        try:
            asked = _decode_asked(data)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return
        if asked.devices:
            self._link.publish(reply, _encode(self._devices(asked.app, asked.user)))
        else:
            self._link.publish(reply, b"1" if self._shown(asked.app, asked.user) else b"0")

    async def online(self, app: int, users: Iterable[str]) -> set[str]:
        found: set[str] = set()
        wanted = list(users)
        for start in range(0, len(wanted), ONLINE_USERS_MAX):
            await self._ask_online(app, wanted[start : start + ONLINE_USERS_MAX], found)
        return found

    async def _ask_online(self, app: int, users: list[str], found: set[str]) -> None:
        open_questions: set[bytes] = set()
        done = asyncio.Event()

        def heard(word: bytes, user: str, data: bytes | None) -> None:
            if data == b"1":
                found.add(user)
            elif data is not None:
                # This node does not show them. Another one may: only silence says that there is none.
                return
            self._waiting.pop(word, None)
            open_questions.discard(word)
            if not open_questions:
                done.set()

        for user in users:
            word = b"%d" % next(self._serial)
            if self._link.publish(self._user_subject(app, user), _encode(_Asked(app, user)), self._inbox + word):
                open_questions.add(word)
                self._waiting[word] = lambda data, word=word, user=user: heard(word, user, data)  # type: ignore[misc]
        if open_questions:
            try:
                async with asyncio.timeout(ONLINE_SECONDS):
                    await done.wait()
            except TimeoutError:
                pass
            finally:
                for word in open_questions:
                    self._waiting.pop(word, None)

    def answer_devices(self, devices: Callable[[int, str], list[str]]) -> None:
        self._devices = devices

    async def connected_devices(self, app: int, users: Iterable[str]) -> set[tuple[str, str]]:
        wanted = list(users)
        found = {(user, device) for user in wanted for device in self._devices(app, user)}
        for start in range(0, len(wanted), ONLINE_USERS_MAX):
            await self._ask_devices(app, wanted[start : start + ONLINE_USERS_MAX], found)
        return found

    async def _ask_devices(self, app: int, users: list[str], found: set[tuple[str, str]]) -> None:
        words: set[bytes] = set()
        silent = asyncio.Event()

        def heard(word: bytes, user: str, data: bytes | None) -> None:
            if data is None:
                # No node has sessions of theirs. Any other answer may be one of several.
                self._waiting.pop(word, None)
                words.discard(word)
                if not words:
                    silent.set()
                return
            try:
                found.update((user, device) for device in _decode_devices(data))
            except (msgspec.DecodeError, msgspec.ValidationError):
                return

        for user in users:
            word = b"%d" % next(self._serial)
            asked = _encode(_Asked(app, user, True))
            if self._link.publish(self._user_subject(app, user), asked, self._inbox + word):
                words.add(word)
                self._waiting[word] = lambda data, word=word, user=user: heard(word, user, data)  # type: ignore[misc]
        if words:
            try:
                async with asyncio.timeout(ONLINE_SECONDS):
                    await silent.wait()
            except TimeoutError:
                pass
            finally:
                for word in words:
                    self._waiting.pop(word, None)

    def _answered(self, subject: bytes, reply: bytes, data: bytes, nobody: bool) -> None:
        waiting = self._waiting.get(subject[len(self._inbox) :])
        if waiting is not None:
            waiting(None if nobody else data)

    # ------------------------------------------------------------ asking one node

    async def request(self, node: str, topic: str, payload: bytes, seconds: float) -> bytes:
        data = _encode(_Request(topic, payload))
        if len(data) > self._link.max_payload or not node.isalnum():
            raise Unreachable(node)
        word = b"%d" % next(self._serial)
        future: asyncio.Future[bytes | None] = self._loop.create_future()

        def heard(answer: bytes | None) -> None:
            if not future.done():
                future.set_result(answer)

        self._waiting[word] = heard
        try:
            if not self._link.publish(b"%b.n.%b" % (self._prefix, node.encode()), data, self._inbox + word):
                raise Unreachable(node)
            async with asyncio.timeout(seconds):
                answer = await future
        except TimeoutError:
            raise Unreachable(node) from None
        finally:
            del self._waiting[word]
        if answer is None:
            raise Unreachable(node)
        return answer

    def serve(self, topic: str, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._topics[topic] = answer

    def _requested(self, subject: bytes, reply: bytes, data: bytes, nobody: bool) -> None:
        try:
            request = _decode_request(data)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return
        serve = self._topics.get(request.topic)
        # Who gets no answer asks no more: better than a queue that nobody waits for.
        if serve is not None and reply and len(self._tasks) < ANSWERS_MAX:
            self._tasks.spawn(self._answer(serve, request.payload, reply), f"answer {request.topic}")

    async def _answer(self, serve: Callable[[bytes], Awaitable[bytes]], payload: bytes, reply: bytes) -> None:
        answer = await serve(payload)
        if len(answer) + _ENVELOPE_BYTES > self._link.max_payload or not self._link.publish(reply, answer):
            self._metrics.bus_dropped.inc()


def _token(user: str) -> bytes:
    """A user's id as one word of a subject: a dot would begin the next one, and stars are wildcards."""
    return quote(user, safe=":@+").replace(".", "%2E").encode()
