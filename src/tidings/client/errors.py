"""What can go wrong, as one tree.

TidingsError
├── Refused              the server answered with an entry of its catalogue (`code`, `retry`)
│   └── ConnectionRefused    … to the connection itself: the client has stopped and will not come back
├── NotConnected         no connection at the moment
│   └── OutcomeUnknown   the connection broke after the command was sent: it may or may not have taken effect
├── Timeout              the time given by the caller ran out (also a TimeoutError)
├── Closed               the client was closed
├── OutboxFull           as many messages wait as the outbox may hold
├── StoreError           the local store cannot be used
│   ├── StoreInUse       another process has it open
│   └── StoreMismatch    it belongs to another app, user or device
└── ProtocolError        the server said something that the protocol does not allow
"""

from __future__ import annotations

from ..wire.commands import ErrorReply
from ..wire.problems import CATALOGUE, Retry


class TidingsError(Exception):
    """Base of everything this SDK raises on purpose."""


class Refused(TidingsError):
    """The server refused. Act on `code` and `retry`; `detail` is for people.

    `retry`: a word of `tidings.wire.problems.Retry`. `retry_after`: seconds, when the server said so.
    `bound`: the limit that was hit, in the unit that `detail` names. `field`: a path such as `attachments[2].url`.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        field: str | None = None,
        bound: int | None = None,
        retry: str | None = None,
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        entry = CATALOGUE.get(code)
        self.code = code
        self.detail = detail or (entry.title if entry else code)
        self.field = field
        self.bound = bound
        self.retry = retry or (entry.retry.value if entry else Retry.NEVER.value)
        self.retry_after = retry_after
        self.status = status if status is not None else (entry.status if entry else None)
        super().__init__(f"{code}: {self.detail}" + (f" (field {field})" if field else ""))

    @classmethod
    def of(cls, reply: ErrorReply) -> Refused:
        """The refusal that an `error` frame carries."""
        return cls(
            reply.code,
            reply.detail,
            field=reply.field,
            bound=reply.bound,
            retry=reply.retry,
            retry_after=None if reply.retry_after_ms is None else reply.retry_after_ms / 1000,
        )


class ConnectionRefused(Refused):
    """The server will not have this connection, now or later. `close_code`: the WebSocket's, when there was one."""

    close_code: int | None = None


class NotConnected(TidingsError):
    """There is no connection at the moment."""


class OutcomeUnknown(NotConnected):
    """The connection broke between a command and its reply, and repeating the command might do it twice."""


class Timeout(TidingsError, TimeoutError):
    """The caller's time ran out. A message that was being sent stays in the outbox and is still sent."""


class Closed(TidingsError):
    """The client was closed."""


class OutboxFull(TidingsError):
    """`outbox_max` messages wait already. Nothing was stored: show it, or try again when some were sent."""


class StoreError(TidingsError):
    """The local store cannot be read or written."""


class StoreInUse(StoreError):
    """Another process (or another client of this one) has the store open."""


class StoreMismatch(StoreError):
    """The store belongs to another app, user or device. Give each identity its own file."""


class ProtocolError(TidingsError):
    """The server sent what the protocol does not allow. The client drops the connection and comes back."""
