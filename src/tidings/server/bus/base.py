"""The bus's port: what nodes tell each other after a commit.

Everything on the bus is a hint. A durable event that gets lost here is noticed by the gap in `seq`, or when heads are
compared with the store, and read from there; a notice about membership or revocation that gets lost is made good when
what is remembered is forgotten: after a loss that a node has noticed (`Lost`), and every second while it is cut off. So
an adapter may drop, repeat and delay, and must only never invent.

Nodes hear what they have asked for: `follow` a stream, `attend` to a user, `watch` a user's presence. Each may be
asked for several times and must be given up as often. Notices that decide what is remembered about access
(`Joined`, `Left`, `AccessChanged`, `Revoked`, `Lost`) and `Used` come to every node without asking.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeAlias, get_args

import msgspec


class Published(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Stream `sid` has grown by the event `seq`; `payload` is its encoding, the same bytes for every reader.

    An empty payload comes from a bus that could not carry it: then the log is to be read.

    `trace`: the W3C `traceparent` of its cause where traces are kept, so that they go on on the nodes that hear of it.
    """

    sid: int
    seq: int
    payload: bytes
    trace: str = ""


class Joined(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A user is a member of a channel from `head` on (the seq before their own `member.added`)."""

    app: int
    user: str
    sid: int
    channel: str
    epoch: str
    head: int


class MembersMoved(msgspec.Struct, frozen=True, array_like=True):
    """What came and went did to a channel: its access version is `version` since then, with nothing else between it and
    the one before, it has `member_count` members, and `users` are those who came or went."""

    version: int
    member_count: int
    users: list[str]


class Left(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A user may not see the channel any more; `user` None: nobody may (it was deleted)."""

    app: int
    user: str | None
    sid: int
    channel: str


class AccessChanged(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """What was remembered about who may do what is out of date: in a channel (`sid`), of a user, or of the app.

    `moved`: in the channel only members came or went, so that what is known of the others holds on.
    """

    app: int
    sid: int | None = None
    channel: str | None = None
    user: str | None = None
    moved: MembersMoved | None = None


class Revoked(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Connections of the user end with `code`: all of them, those whose token has `jti`, or was issued before."""

    app: int
    user: str
    code: str
    before_ms: int | None = None
    jti: str | None = None
    device: str | None = None


class Signal(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A best-effort frame for the sessions in a channel, or of a user; never stored.

    `skip_session`: the session that caused it and is not told.
    """

    app: int
    payload: bytes
    sid: int | None = None
    user: str | None = None
    skip_session: str | None = None


class Crowd(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """So many users type in a channel at sessions of this node: for nodes with sessions in it. Best effort; told again
    while it lasts, and forgotten when it is not."""

    node: str
    sid: int
    count: int


class Arrived(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """A device of the user has connected at `at_ms`: its sessions from before, wherever they are, end."""

    app: int
    user: str
    device: str
    session: str
    at_ms: int


class Shown(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The user is online, or has gone offline at `last_seen_ms`: for who watches them."""

    app: int
    user: str
    last_seen_ms: int | None = None


class Used(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """What a node has let through: units taken from the buckets of credentials, `(app, credential, units)`."""

    node: str
    taken: list[tuple[int, str, float]]


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Notices may have been lost, of anything: what is remembered does not count, and heads are to be compared."""


Notice: TypeAlias = Published | Joined | Left | AccessChanged | Revoked | Signal | Crowd | Arrived | Shown | Used | Lost


class Listeners:
    """Who hears what on this node: a list for each kind of notice, so that a message costs only those who want it."""

    __slots__ = ("of",)

    def __init__(self) -> None:
        self.of: dict[type[Notice], list[Callable[[Any], None]]] = {kind: [] for kind in get_args(Notice)}

    def add(self, listener: Callable[[Any], None], kinds: Iterable[type[Notice]]) -> None:
        """Call `listener` with notices of these kinds from now on, of every kind if none is named."""
        for kind in kinds or self.of:
            self.of[kind].append(listener)


class Unreachable(Exception):
    """A node did not answer: it is gone, cut off, or too busy."""


class Bus(Protocol):
    """Announces what has been committed to every node that needs it, this one included."""

    @property
    def node(self) -> str:
        """This node's id among the others, empty when there can be no others."""
        ...

    @property
    def connected(self) -> bool:
        """Whether other nodes can be heard and told now. While not, nothing remembered about access is certain."""
        ...

    def publish(self, notice: Notice) -> None:
        """Tell everyone. Notices published here reach this node's listeners in order and before this returns.

        Never waits and never raises: what other nodes cannot be told now is dropped and counted.
        """
        ...

    def listen(self, listener: Callable[[Any], None], *kinds: type[Notice]) -> None:
        """Call `listener` with every notice of these kinds, or of all if none is named, on the event loop."""
        ...

    def follow(self, sid: int) -> None:
        """Hear `Published`, `Signal` and `Crowd` of a stream."""
        ...

    def unfollow(self, sid: int) -> None:
        """One `follow` less."""
        ...

    def attend(self, app: int, user: str) -> None:
        """Hear `Signal` and `Arrived` of a user, and be asked about them."""
        ...

    def unattend(self, app: int, user: str) -> None:
        """One `attend` less."""
        ...

    def watch(self, app: int, user: str) -> None:
        """Hear `Shown` of a user."""
        ...

    def unwatch(self, app: int, user: str) -> None:
        """One `watch` less."""
        ...

    async def settle(self) -> bool:
        """Wait until what was asked for before is in place; whether it is. After that, and a comparison of heads with
        the store, nothing of a followed stream has been missed."""
        ...

    async def online(self, app: int, users: Iterable[str]) -> set[str]:
        """Which of the users are shown as online on other nodes. Best effort; returns within a bounded time."""
        ...

    def answer_online(self, shown: Callable[[int, str], bool]) -> None:
        """Answer what `online` asks on other nodes about users that this one attends to."""
        ...

    async def connected_devices(self, app: int, users: Iterable[str]) -> set[tuple[str, str]]:
        """(user, device) of every device that is connected, on any node, this one included. Best effort; returns within
        a bounded time."""
        ...

    def answer_devices(self, devices: Callable[[int, str], list[str]]) -> None:
        """Answer which devices of a user are connected to this node."""
        ...

    async def request(self, node: str, topic: str, payload: bytes, seconds: float) -> bytes:
        """Ask one node something. Raises Unreachable when there is no such node or it takes longer than `seconds`."""
        ...

    def serve(self, topic: str, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        """Answer requests of other nodes. `answer` must not raise."""
        ...

    async def close(self) -> None:
        """Give up every interest and say goodbye."""
        ...
