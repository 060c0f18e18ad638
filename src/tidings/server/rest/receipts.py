"""Read positions and unread counts."""

from __future__ import annotations

from typing import Final

from tidings.wire.replies import Page
from tidings.wire.requests import ReadMark
from tidings.wire.resources import Receipt, ReceiptCounts, Unread, UnreadTotal

from .operation import Call, Paging, operation

_CHANNEL: Final = "/v1/channels/{channel}"


@operation(
    "receipts.read",
    "POST",
    _CHANNEL + "/read",
    "Mark as read",
    reply=Unread,
    body=ReadMark,
    problems=("position_ahead", "conflict"),
)
async def read(call: Call[None, ReadMark]) -> Unread:
    """Everything up to and including `seq`. Positions never go back."""
    return await call.services.receipts.read(call.actor, call.path["channel"], call.body.seq)


@operation(
    "receipts.mark_unread",
    "POST",
    _CHANNEL + "/unread",
    "Mark as unread",
    reply=Unread,
    body=ReadMark,
    problems=("position_ahead", "conflict"),
)
async def mark_unread(call: Call[None, ReadMark]) -> Unread:
    """Counts everything from the message at `seq` on as unread until the channel is read again."""
    return await call.services.receipts.mark_unread(call.actor, call.path["channel"], call.body.seq)


@operation(
    "receipts.list",
    "GET",
    _CHANNEL + "/receipts",
    "List receipts",
    reply=Page[Receipt],
    query=Paging,
    problems=("feature_off",),
)
async def find(call: Call[Paging, None]) -> Page[Receipt]:
    """How far each member is."""
    query = call.query
    found, more = await call.services.receipts.list(
        call.actor, call.path["channel"], limit=query.limit, cursor=query.cursor
    )
    return Page(found, more)


@operation(
    "receipts.of_message",
    "GET",
    _CHANNEL + "/messages/{message}/receipts",
    "Count a message's receipts",
    reply=ReceiptCounts,
    problems=("feature_off",),
)
async def of_message(call: Call[None, None]) -> ReceiptCounts:
    """How many of the other members it has reached, and how many have read it. Who joined later is not counted. In
    channels with more than 1,000 members the counts may be ten seconds old: `as_of` says when they were taken."""
    return await call.services.receipts.of_message(call.actor, call.path["channel"], call.path["message"])


@operation(
    "receipts.unread",
    "GET",
    "/v1/unread",
    "Count what is unread",
    reply=UnreadTotal,
    query=Paging,
)
async def unread(call: Call[Paging, None]) -> UnreadTotal:
    """Sums over the caller's channels that are neither hidden, archived nor muted, and the channels that have any."""
    return await call.services.receipts.unread_total(call.actor, limit=call.query.limit, cursor=call.query.cursor)


OPERATIONS: Final = (read, mark_unread, find, of_message, unread)
