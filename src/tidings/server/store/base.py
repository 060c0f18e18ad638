"""The store's port: streams that are appended to, and units of reads and writes that commit whole.

Doors, from hot to broad:

* `append` takes one message and shares its transaction and its fsync with everyone else's (group commit);
* `run` runs a unit, an `async def unit(tx)`, atomically: all of it commits, with the events it appended, or nothing;
* `read` runs a unit on a consistent snapshot, with nothing to commit; `glance` does so for a few rows.

A unit awaits only the methods of its `tx` and touches no shared state: an embedded adapter runs it in its writer
thread, a networked one on a connection. It may be run again after a serialisation failure, so it must not have
effects of its own. SQL inside units is a portable subset with `?` placeholders, kept in this package.

Order: appends to one stream are numbered in the order they were handed over. `done` of appends and `then` of units are
called on the event loop, in the order of their commits, as far as they touch the same rows. Whatever is announced from
them is therefore announced in the order of `seq`. Whether a unit commits before an append that was handed over beside
it, is open: whoever needs to know waits for the first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]

# Flags of a message.
SYSTEM: Final = 1
SILENT: Final = 2
COUNTS: Final = 4
MENTIONS_ALL: Final = 8

# The sender column of messages that no user sent. `!` cannot occur in a user id.
BACKEND: Final = "!app"
# The user column of mentions of everyone.
EVERYONE: Final = "*"


class Stale(Exception):
    """The append was authorised under an access version that has passed: authorise again and retry."""


class Tx(Protocol):
    """One transaction. Placeholders are `?`; rows are tuples."""

    @property
    def for_update(self) -> str:
        """What to put behind a SELECT whose rows decide a write: ` FOR UPDATE`, or nothing where writers queue."""
        ...

    @property
    def for_key_share(self) -> str:
        """What to put behind a SELECT whose rows must stay until the commit, though others may rely on them and change
        them, too: ` FOR KEY SHARE`, or nothing where writers queue."""
        ...

    @property
    def claiming(self) -> str:
        """What to put behind a SELECT that takes rows which nobody else is taking: ` FOR UPDATE SKIP LOCKED`, or
        nothing where writers queue."""
        ...

    async def all(self, sql: str, *args: Any) -> list[Row]:
        """Every row of the query."""
        ...

    async def one(self, sql: str, *args: Any) -> Row | None:
        """The first row of the query, None when there is none."""
        ...

    async def execute(self, sql: str, *args: Any) -> int:
        """Run a statement; how many rows it changed."""
        ...

    async def many(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement once per row of arguments."""
        ...

    def took(self, sid: int, seq: int) -> None:
        """Note that the unit has appended event `seq`: where several commit at once, they are told in that order."""
        ...


class Append(msgspec.Struct):
    """One message on its way into a stream. `sealed` is the ciphertext of its content under item `message_id`.

    `done` is called once on the event loop: with `Appended` after the commit, or with the exception that kept it
    out (`Stale`, a `Refusal`): then nothing of it is stored.
    """

    app: int
    sid: int
    access_version: int
    sender: str
    key: str
    digest: bytes
    message_id: str
    sealed: bytes
    at: int
    flags: int
    reply_to: str | None
    mentions: tuple[str, ...]
    done: Callable[[Appended | Exception], None]


class Appended(msgspec.Struct, frozen=True):
    """A stored message. `duplicate`: the key was used before with the same body, and this is the first result."""

    message_id: str
    seq: int
    at: int
    duplicate: bool = False


Unit: TypeAlias = Callable[[Tx], Awaitable[T]]


class Store(Protocol):
    """What services know of a database."""

    def append(self, item: Append) -> None:
        """Queue a message for the next group commit; the outcome goes to `item.done`. Never blocks, never raises."""
        ...

    async def run(self, unit: Unit[T], then: Callable[[T], None] | None = None) -> T:
        """Run a unit that may write. `then` is called with its result after the commit, in commit order, before
        this returns. Raises what the unit raised (nothing is stored then) or StoreUnavailable."""
        ...

    async def read(self, unit: Unit[T]) -> T:
        """Run a unit that only reads, on a snapshot that holds every write acknowledged before the call."""
        ...

    async def glance(self, unit: Unit[T]) -> T:
        """As `read`, for a handful of rows that are found by their keys: an embedded adapter reads them at once, which
        costs less than handing over to another thread and holds up the event loop for as long."""
        ...

    async def changed_elsewhere(self) -> bool:
        """Whether another process has committed since the last call (an operator's command, say)."""
        ...

    async def close(self) -> None:
        """Finish what is queued, then let go of the database."""
        ...


def new_sid(now_ms: int, random_bits: int) -> int:
    """A stream's number: time first, so that new streams lie together on disk; 63 bits, 21 of them random."""
    return ((now_ms & ((1 << 42) - 1)) << 21) | (random_bits & ((1 << 21) - 1))
