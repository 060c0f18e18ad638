"""Catching up over plain REST: what moved, and what exactly is missing."""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from msgspec import Meta

from tidings.server.services.sync import EventPage
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.ids import Seq
from tidings.wire.replies import EventsPage, SyncPage
from tidings.wire.resources import Head

from .operation import Call, PageSize, Paging, Query, Reply, operation
from .polling import poll

Wait = Annotated[
    int,
    Meta(
        ge=0,
        le=limits.POLL_WAIT_MAX,
        description="Seconds to wait for news if there is none: a long poll. 0 answers at once",
    ),
]


class SyncQuery(Paging, frozen=True, kw_only=True):
    since: Annotated[str, Meta(max_length=64, description="`mark` of an earlier answer")] | None = None
    wait: Wait = 0


def seal_mark(mark: str, moved: list[Head]) -> str:
    """A mark that also knows what was told.

    Marks lie some seconds in the past on purpose, so what moved just now is listed again for a while. A long poll that
    took the repetition for news would spin: this tells the two apart, and nothing is kept for it here.
    """
    return f"{mark}.{hashlib.blake2s(encode(moved), digest_size=8).hexdigest()}"


@operation("sync.heads", "GET", "/v1/sync", "Ask what moved", reply=SyncPage, query=SyncQuery)
async def heads(call: Call[SyncQuery, None]) -> SyncPage:
    """The caller's streams that moved since the mark, all of them without one. Compare each `head` with what you have,
    and fetch the difference as events. A stream may be listed again although it did not move."""
    sync, query = call.services.sync, call.query
    _ = call.user
    since, _, told = (query.since or "").partition(".")

    async def read() -> SyncPage:
        moved, more, mark = await sync.heads(call.actor, since or None, query.cursor, query.limit)
        # What stands on later pages is not in the digest: then the mark says nothing of what was told.
        plain = more is not None or query.cursor is not None
        return SyncPage(mark=mark if plain else seal_mark(mark, moved), moved=moved, next=more)

    def has_news(page: SyncPage) -> bool:
        return bool(page.moved) and page.mark.partition(".")[2] != told

    if query.wait == 0 or not since or query.cursor is not None:
        return await read()
    sids = [sid for sid, _, _, _ in await sync.memberships(call.actor)]
    return await poll(call, sids, query.wait, read, has_news)


class EventsQuery(Query, frozen=True, kw_only=True):
    after: Annotated[Seq, Meta(description="What you have: everything up to and including this seq")] = 0
    epoch: Annotated[str, Meta(max_length=64, description="Of which history; refused if it was replaced")] | None = None
    limit: PageSize = limits.PAGE_DEFAULT
    wait: Wait = 0


async def _events(call: Call[EventsQuery, None], stream: str) -> Reply:
    query, sync = call.query, call.services.sync
    sid = (await sync.handle(call.actor, stream)).sid

    async def read() -> EventPage:
        # Through the actor each time: who was removed while waiting gets nothing.
        return await sync.events(call.actor, stream, query.after, query.epoch, query.limit)

    page = await poll(call, (sid,), query.wait, read, lambda found: bool(found.events))
    body = b'{"events":[%b],"epoch":%b,"head":%d}' % (
        b",".join([payload for _, payload in page.events]),
        encode(page.epoch),
        page.head,
    )
    return Reply(200, body)


_STREAM_PROBLEMS: Final = ("epoch_changed", "cursor_expired", "position_ahead")


@operation(
    "sync.channel_events",
    "GET",
    "/v1/channels/{channel}/events",
    "Read a channel's events",
    reply=EventsPage,
    query=EventsQuery,
    problems=_STREAM_PROBLEMS,
)
async def channel_events(call: Call[EventsQuery, None]) -> Reply:
    """Everything after a position, in order and without a gap. With `wait` a long poll."""
    return await _events(call, call.path["channel"])


@operation(
    "sync.own_events",
    "GET",
    "/v1/me/events",
    "Read one's own events",
    reply=EventsPage,
    query=EventsQuery,
    problems=(*_STREAM_PROBLEMS, "not_found"),
)
async def own_events(call: Call[EventsQuery, None]) -> Reply:
    """The user's own stream, `@me`: channels joined and left, settings, profile."""
    _ = call.user
    return await _events(call, "@me")


OPERATIONS: Final = (heads, channel_events, own_events)
