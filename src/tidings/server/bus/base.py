"""The bus's port: what nodes tell each other after a commit.

Everything on the bus is a hint. A durable event that gets lost here is noticed by the gap in `seq` and read from the
store; a notice about membership or revocation that gets lost is made good by the next authorisation. So an adapter may
drop, repeat and delay, and must only never invent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec


class Published(msgspec.Struct, frozen=True):
    """Stream `sid` has grown by the event `seq`; `payload` is its encoding, the same bytes for every reader."""

    sid: int
    seq: int
    payload: bytes


class Joined(msgspec.Struct, frozen=True):
    """A user is a member of a channel from `head` on (the seq before their own `member.added`)."""

    app: int
    user: str
    sid: int
    channel: str
    epoch: str
    head: int


class Left(msgspec.Struct, frozen=True):
    """A user may not see the channel any more; `user` None: nobody may (it was deleted)."""

    app: int
    user: str | None
    sid: int
    channel: str


class AccessChanged(msgspec.Struct, frozen=True):
    """What was remembered about who may do what is out of date: in a channel (`sid`), of a user, or of the app."""

    app: int
    sid: int | None = None
    channel: str | None = None
    user: str | None = None


class Revoked(msgspec.Struct, frozen=True):
    """Connections of the user end with `code`: all of them, those whose token has `jti`, or was issued before."""

    app: int
    user: str
    code: str
    before_ms: int | None = None
    jti: str | None = None
    device: str | None = None


class Signal(msgspec.Struct, frozen=True):
    """A best-effort frame for the sessions in a channel, or of a user; never stored.

    `skip_session`: the session that caused it and is not told.
    """

    app: int
    payload: bytes
    sid: int | None = None
    user: str | None = None
    skip_session: str | None = None


Notice: TypeAlias = Published | Joined | Left | AccessChanged | Revoked | Signal


class Bus(Protocol):
    """Announces what has been committed to every node, this one included."""

    def publish(self, notice: Notice) -> None:
        """Tell everyone. Notices published here reach this node's listeners in order and before this returns."""
        ...

    def listen(self, listener: Callable[[Notice], None]) -> None:
        """Call `listener` with every notice from now on, on the event loop."""
        ...
