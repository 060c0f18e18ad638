"""Unread counts, computed from positions: they cannot drift, and they cost the same in any channel.

Streams and messages carry how many counted messages (neither system nor silent) stand at or before them. What is unread
is a difference of two of those, minus what was deleted since, which a partial index knows. Sending marks the channel
read up to the own message, so nothing of one's own ever stands after the read position.

The expressions below stand in a SELECT over `members m` joined with `streams s`; they hold no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidings.server.store.base import COUNTS, EVERYONE, Row, Tx

# A channel that its member has hidden stays hidden until another message comes: `hidden` holds the number of messages
# at the time, plus one. So a new message costs nothing, however many have hidden the channel.
HIDDEN: Final = "(m.hidden > s.messages)"

_DELETED: Final = (
    "(SELECT count(*) FROM messages d WHERE d.app=m.app AND d.sid=m.sid AND d.seq>{after}"
    f" AND d.deleted_at IS NOT NULL AND (d.flags & {COUNTS})<>0 AND d.sender<>m.user)"
)
# With a mark (`marked_from`), everything from there on is unread, apart from one's own: those lie between the mark and
# the read position, since sending removes the mark.
_MARKED: Final = (
    "s.counted"
    " - coalesce((SELECT p.counted FROM messages p WHERE p.app=m.app AND p.sid=m.sid AND p.seq<m.marked_from"
    " ORDER BY p.seq DESC LIMIT 1), 0)"
    " - (SELECT count(*) FROM messages o WHERE o.app=m.app AND o.sid=m.sid AND o.seq>=m.marked_from AND o.seq<=m.read"
    f" AND o.sender=m.user AND (o.flags & {COUNTS})<>0)"
    " - " + _DELETED.format(after="m.marked_from-1")
)
# Messages that count, are not deleted, not one's own, and stand after what was read.
UNREAD: Final = (
    f"(CASE WHEN m.marked_from IS NULL THEN s.counted - m.read_counted - {_DELETED.format(after='m.read')}"
    f" ELSE {_MARKED} END)"
)
# Messages by others after what was read that mention the user or everyone. Deleted messages mention nobody.
MENTIONED: Final = (
    "(SELECT count(DISTINCT n.seq) FROM mentions n"
    " JOIN messages q ON q.app=n.app AND q.sid=n.sid AND q.seq=n.seq"
    f" WHERE n.app=m.app AND n.sid=m.sid AND n.user IN (m.user, '{EVERYONE}')"
    " AND n.seq>=coalesce(m.marked_from, m.read+1) AND q.sender<>m.user)"
)

_OF: Final = (
    f"SELECT m.read, m.delivered, {UNREAD}, {MENTIONED}, m.marked_from FROM members m"
    " JOIN streams s ON s.sid=m.sid WHERE m.app=? AND m.sid=? AND m.user=?"
)


@dataclass(slots=True, frozen=True)
class Counts:
    """Where a member stands in a channel, and what is new to them."""

    read: int
    delivered: int
    unread: int
    mentions: int
    marked_from: int | None


async def unread_of(tx: Tx, app: int, sid: int, user: str) -> Counts | None:
    """A member's positions and exact counts in a channel; None for those who are not members."""
    row: Row | None = await tx.one(_OF, app, sid, user)
    return Counts(*row) if row else None
