"""Streams in SQL: make one, append to it inside a unit, read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from .base import BACKEND, Row, Tx

# Streams that one statement appends to.
STREAMS_AT_ONCE: Final = 200
# Heads compared in one statement: a few milliseconds of a reader.
HEADS_AT_ONCE: Final = 5_000

MESSAGE_CREATED: Final = "message.created"

_by_seq = attrgetter("seq")

_STREAM = (
    "sid, app, kind, ref, epoch, head, counted, messages, floor, moved_at, last_message_at, access_version,"
    " key_wrapped, key_version, key_app_version"
)


@dataclass(slots=True, frozen=True)
class StreamRow:
    """A row of `streams`."""

    sid: int
    app: int
    kind: str
    ref: str
    epoch: str
    head: int
    counted: int
    messages: int
    floor: int
    moved_at: int
    last_message_at: int | None
    access_version: int
    key_wrapped: bytes
    key_version: int
    key_app_version: int


@dataclass(slots=True, frozen=True)
class EventRow:
    """A row of `events`."""

    seq: int
    type: str
    at: int
    by: str | None
    ref: str | None
    item: str
    sealed: bytes | None
    redacted: int


async def insert_stream(
    tx: Tx,
    *,
    sid: int,
    app: int,
    kind: str,
    ref: str,
    epoch: str,
    at: int,
    key_wrapped: bytes,
    key_version: int,
    key_app_version: int,
) -> None:
    """Make an empty stream. Its head is 0: the first event is number 1."""
    await tx.execute(
        "INSERT INTO streams(sid,app,kind,ref,epoch,moved_at,key_wrapped,key_version,key_app_version)"
        " VALUES (?,?,?,?,?,?,?,?,?)",
        sid,
        app,
        kind,
        ref,
        epoch,
        at,
        key_wrapped,
        key_version,
        key_app_version,
    )


async def stream(tx: Tx, sid: int) -> StreamRow | None:
    """The stream numbered `sid`."""
    row = await tx.one(f"SELECT {_STREAM} FROM streams WHERE sid=?", sid)
    return StreamRow(*row) if row else None


async def stream_of(tx: Tx, app: int, kind: str, ref: str) -> StreamRow | None:
    """The stream of a channel or user, by its public id."""
    row = await tx.one(
        f"SELECT {_STREAM} FROM streams WHERE app=? AND kind=? AND ref=?",
        app,
        kind,
        ref,
    )
    return StreamRow(*row) if row else None


async def append_event(
    tx: Tx,
    *,
    app: int,
    sid: int,
    type: str,
    at: int,
    now: int,
    by: str | None,
    ref: str | None,
    item: str,
    sealed: bytes | None,
) -> int:
    """Append one event under the stream's row; its seq. The row stays locked until the unit commits, so numbers
    cannot commit out of order.

    `at` is the event's time, `now` the present, both ms: work that is finished later tells of an earlier moment, but
    moves the stream now. `moved_at` never goes back: whoever asks what moved since would miss what came before.
    """
    row = await tx.one(
        "UPDATE streams SET head=head+1, moved_at=CASE WHEN moved_at<? THEN ? ELSE moved_at END"
        " WHERE sid=? AND app=? RETURNING head",
        now,
        now,
        sid,
        app,
    )
    if row is None:
        raise LookupError(f"stream {sid} is gone")
    seq: int = row[0]
    tx.took(sid, seq)
    await tx.execute(
        "INSERT INTO events(app,sid,seq,type,at,by,ref,item,sealed) VALUES (?,?,?,?,?,?,?,?,?)",
        app,
        sid,
        seq,
        type,
        at,
        by,
        ref,
        item,
        sealed,
    )
    await tx.execute("INSERT INTO outbox(app,sid,seq,type) VALUES (?,?,?,?)", app, sid, seq, type)
    return seq


async def append_events(
    tx: Tx,
    *,
    app: int,
    sid: int,
    type: str,
    at: int,
    by: str | None,
    events: Sequence[tuple[str | None, str, bytes]],
) -> int:
    """Append events (ref, item, sealed) of one type and moment under the stream's row; the seq of the first.

    As `append_event`, for as many round trips as one.
    """
    row = await tx.one(
        "UPDATE streams SET head=head+?, moved_at=CASE WHEN moved_at<? THEN ? ELSE moved_at END"
        " WHERE sid=? AND app=? RETURNING head",
        len(events),
        at,
        at,
        sid,
        app,
    )
    if row is None:
        raise LookupError(f"stream {sid} is gone")
    first: int = row[0] - len(events) + 1
    tx.took(sid, first)
    await tx.many(
        "INSERT INTO events(app,sid,seq,type,at,by,ref,item,sealed) VALUES (?,?,?,?,?,?,?,?,?)",
        [(app, sid, seq, type, at, by, *event) for seq, event in enumerate(events, first)],
    )
    await tx.many(
        "INSERT INTO outbox(app,sid,seq,type) VALUES (?,?,?,?)",
        [(app, sid, seq, type) for seq in range(first, first + len(events))],
    )
    return first


async def append_to_each(
    tx: Tx,
    *,
    app: int,
    type: str,
    at: int,
    now: int,
    by: str | None,
    ref: str | None,
    item: str,
    sealed: dict[int, bytes],
) -> dict[int, int]:
    """Append one event to each of many streams (sid → sealed); the seqs by sid. `at`, `now`: see `append_event`.

    The rows are locked in the order of the streams' names, as by whoever appends to them one after the other.
    """
    seqs: dict[int, int] = {}
    sids = list(sealed)
    for start in range(0, len(sids), STREAMS_AT_ONCE):
        chunk = sids[start : start + STREAMS_AT_ONCE]
        some = placeholders(chunk)
        if tx.for_update:
            await tx.all(f"SELECT sid FROM streams WHERE sid IN ({some}) ORDER BY ref{tx.for_update}", *chunk)
        rows = await tx.all(
            "UPDATE streams SET head=head+1, moved_at=CASE WHEN moved_at<? THEN ? ELSE moved_at END"
            f" WHERE app=? AND sid IN ({some}) RETURNING sid, head",
            now,
            now,
            app,
            *chunk,
        )
        seqs.update((sid, head) for sid, head in rows)
    if len(seqs) != len(sids):
        raise LookupError("a stream is gone")
    for sid, seq in seqs.items():
        tx.took(sid, seq)
    await tx.many(
        "INSERT INTO events(app,sid,seq,type,at,by,ref,item,sealed) VALUES (?,?,?,?,?,?,?,?,?)",
        [(app, sid, seqs[sid], type, at, by, ref, item, box) for sid, box in sealed.items()],
    )
    await tx.many(
        "INSERT INTO outbox(app,sid,seq,type) VALUES (?,?,?,?)", [(app, sid, seqs[sid], type) for sid in sids]
    )
    return seqs


async def touch_access(tx: Tx, sid: int) -> int:
    """Declare whatever was authorised on the stream out of date; the new access version."""
    row = await tx.one("UPDATE streams SET access_version=access_version+1 WHERE sid=? RETURNING access_version", sid)
    return int(row[0]) if row else 0


async def events_after(tx: Tx, app: int, sid: int, after: int, limit: int) -> list[EventRow]:
    """Up to `limit` events with seq > `after`, in order.

    Messages are events and rows of their own table at once: both are read, and merged by seq.
    """
    rows: list[Row] = await tx.all(
        "SELECT seq,type,at,by,ref,item,sealed,redacted FROM events WHERE app=? AND sid=? AND seq>?"
        " ORDER BY seq LIMIT ?",
        app,
        sid,
        after,
        limit,
    )
    created: list[Row] = await tx.all(
        "SELECT seq,sender,at,id,sealed,redacted FROM messages WHERE app=? AND sid=? AND seq>? ORDER BY seq LIMIT ?",
        app,
        sid,
        after,
        limit,
    )
    events = [EventRow(*row) for row in rows]
    events += [
        EventRow(seq, MESSAGE_CREATED, at, None if sender == BACKEND else sender, id, id, sealed, redacted)
        for seq, sender, at, id, sealed, redacted in created
    ]
    events.sort(key=_by_seq)
    return events[:limit]


async def write_audit(
    tx: Tx, *, app: int, id: str, at: int, actor: str, action: str, target: str, detail: str = "{}"
) -> None:
    """One line of the audit trail, in the transaction of what it tells of. Identifiers only, never content."""
    await tx.execute(
        "INSERT INTO audit(app,id,at,actor,action,target,detail) VALUES (?,?,?,?,?,?,?)",
        app,
        id,
        at,
        actor,
        action,
        target,
        detail,
    )


async def grown(tx: Tx, heads: dict[int, int]) -> dict[int, int]:
    """Those of the streams whose head is above the given one, and where it is. Of the many that have not grown, the
    database says nothing: a stream costs a fraction of a microsecond here and a look into an index there."""
    found: dict[int, int] = {}
    sids = list(heads)
    for start in range(0, len(sids), HEADS_AT_ONCE):
        chunk = sids[start : start + HEADS_AT_ONCE]
        known = [heads[sid] for sid in chunk]
        if tx.for_update:
            # PostgreSQL takes arrays.
            rows = await tx.all(
                "SELECT s.sid, s.head FROM unnest(CAST(? AS BIGINT[]), CAST(? AS BIGINT[])) AS k(sid, head)"
                " JOIN streams s ON s.sid=k.sid WHERE s.head>k.head",
                chunk,
                known,
            )
        else:
            rows = await tx.all(
                "SELECT s.sid, s.head FROM json_each(?) AS k JOIN json_each(?) AS h ON h.key=k.key"
                " JOIN streams s ON s.sid=k.value WHERE s.head>h.value",
                json.dumps(chunk),
                json.dumps(known),
            )
        found.update((sid, head) for sid, head in rows)
    return found


def placeholders(values: Any) -> str:
    """`?,?,?` for as many values as there are."""
    return ",".join("?" * len(values))


async def count_generation(tx: Tx) -> None:
    """Tell every node, through the store, that something has changed that it was not told of by the bus: each looks
    once a second (`Store.changed_elsewhere`)."""
    await tx.execute(
        "INSERT INTO meta(name,value) VALUES ('generation','1')"
        " ON CONFLICT (name) DO UPDATE SET value=CAST(CAST(meta.value AS BIGINT)+1 AS TEXT)"
    )
