"""Appending in PostgreSQL: a batch of messages in one statement, which is its own transaction.

What one round trip does, in this order: lock the streams' rows, by number, so that no two batches wait for each other
in a circle; compare access versions under the lock; look up keys; number what is left, per stream, from the locked
head; write messages, outbox, mentions, heads and the senders' positions. The rules are those of `append_batch` in
`sqlite.py`.

The key lookup sees the database as it was when the statement began, the locked rows as they are. So a repeat that
another node stored in between is not seen, and inserting it breaks the unique key: the whole statement fails, nothing
is stored, and the batch is tried again behind a lock that was taken *before* the statement began (LOCK). Why it is one
statement: docs/decisions/0012.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from tidings.server.errors import Refusal

from .base import COUNTS, EVERYONE, MENTIONS_ALL, Append, Appended, Stale

Outcome: TypeAlias = Appended | Exception

# Takes the locks of a batch ahead of its statement; the transaction then holds them.
LOCK: Final = "SELECT 1 FROM streams WHERE sid=ANY($1::bigint[]) ORDER BY sid FOR UPDATE"

# `n` is an item's place in the batch. MATERIALIZED: each part is computed once, and the locks come first of all.
APPEND: Final = f"""
WITH v AS MATERIALIZED (
  SELECT * FROM unnest(
    $1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::bytea[], $7::text[], $8::bytea[],
    $9::bigint[], $10::bigint[], $11::text[]
  ) WITH ORDINALITY AS v(app, sid, version, sender, key, digest, id, sealed, at, flags, reply_to, n)
), heads AS MATERIALIZED (
  SELECT sid, app, head, counted, messages, access_version FROM streams
  WHERE sid=ANY($14::bigint[]) ORDER BY sid FOR UPDATE
), known AS MATERIALIZED (
  SELECT v.n, m.seq, m.id, m.at, m.digest FROM v CROSS JOIN LATERAL (
    SELECT seq, id, at, digest FROM messages
    WHERE app=v.app AND sid=v.sid AND sender=v.sender AND key=v.key LIMIT 1
  ) m
), taken AS MATERIALIZED (
  SELECT v.*, h.head + row_number() OVER place AS seq,
    h.counted + count(*) FILTER (WHERE v.flags & {COUNTS} <> 0) OVER place AS counted
  FROM v JOIN heads h ON h.sid=v.sid AND h.app=v.app AND h.access_version=v.version
  WHERE v.n NOT IN (SELECT n FROM known)
  WINDOW place AS (PARTITION BY v.sid ORDER BY v.n)
), stored AS (
  INSERT INTO messages(app,sid,seq,id,sender,key,digest,content_seq,counted,flags,reply_to,at,sealed)
  SELECT app, sid, seq, id, sender, key, digest, seq, counted, flags, reply_to, at, sealed FROM taken
), queued AS (
  INSERT INTO outbox(app,sid,seq,type) SELECT app, sid, seq, 'message.created' FROM taken ORDER BY n
), named AS (
  INSERT INTO mentions(app,sid,"user",seq)
  SELECT t.app, t.sid, w.who, t.seq FROM unnest($12::bigint[], $13::text[]) AS w(n, who) JOIN taken t ON t.n=w.n
  ON CONFLICT DO NOTHING
), moved AS (
  UPDATE streams s SET head=l.seq, counted=l.counted, messages=l.messages, last_message_at=l.at,
    moved_at=greatest(s.moved_at, l.at)
  FROM (
    SELECT DISTINCT ON (t.sid) t.sid, t.seq, t.counted, t.at,
      h.messages + count(*) OVER (PARTITION BY t.sid) AS messages
    FROM taken t JOIN heads h ON h.sid=t.sid ORDER BY t.sid, t.seq DESC
  ) l WHERE s.sid=l.sid
), senders AS MATERIALIZED (
  SELECT m.app, m.sid, m."user", l.seq, l.counted, l.at FROM (
    SELECT DISTINCT ON (app, sid, sender) app, sid, sender, seq, counted, at FROM taken
    WHERE left(sender, 1) <> '!' ORDER BY app, sid, sender, seq DESC
  ) l JOIN members m ON m.app=l.app AND m.sid=l.sid AND m."user"=l.sender
  ORDER BY m.app, m.sid, m."user" FOR UPDATE OF m
), positions AS (
  UPDATE members m SET delivered=l.seq, read=l.seq, read_counted=l.counted, marked_from=NULL,
    moved_at=greatest(m.moved_at, l.at)
  FROM senders l WHERE m.app=l.app AND m.sid=l.sid AND m."user"=l."user"
)
SELECT n, seq, NULL AS id, NULL AS at, NULL AS digest FROM taken
UNION ALL SELECT n, seq, id, at, digest FROM known
"""


class Batch:
    """Messages for one statement, and those that wait for its outcome because they repeat a key that is in it."""

    __slots__ = ("copies", "items")

    def __init__(self, items: Sequence[Append]) -> None:
        self.items: list[Append] = []
        # Place of the first item with a key → what came after it with the same.
        self.copies: dict[int, list[Append]] = {}
        places: dict[tuple[int, int, str, str], int] = {}
        for item in items:
            place = places.setdefault((item.app, item.sid, item.sender, item.key), len(self.items))
            if place == len(self.items):
                self.items.append(item)
            else:
                self.copies.setdefault(place, []).append(item)

    def arguments(self) -> list[Any]:
        """What APPEND takes."""
        items = self.items
        mentions = [(n, user) for n, item in enumerate(items, 1) for user in item.mentions]
        mentions += [(n, EVERYONE) for n, item in enumerate(items, 1) if item.flags & MENTIONS_ALL]
        return [
            [item.app for item in items],
            [item.sid for item in items],
            [item.access_version for item in items],
            [item.sender for item in items],
            [item.key for item in items],
            [item.digest for item in items],
            [item.message_id for item in items],
            [item.sealed for item in items],
            [item.at for item in items],
            [item.flags for item in items],
            [item.reply_to for item in items],
            [n for n, _ in mentions],
            [user for _, user in mentions],
            self.sids(),
        ]

    def sids(self) -> list[int]:
        """The streams, each once."""
        return list({item.sid: None for item in self.items})

    def outcomes(self, rows: Sequence[Sequence[Any]]) -> tuple[list[tuple[Append, Outcome]], dict[int, int]]:
        """What became of each message, from the statement's answer, and the first number taken of each stream.

        A message that the answer does not name was authorised under another access version, or its stream is gone.
        """
        found = {row[0]: row for row in rows}
        told: list[tuple[Append, Outcome]] = []
        firsts: dict[int, int] = {}
        for place, item in enumerate(self.items):
            row = found.get(place + 1)
            copies = self.copies.get(place, ())
            if row is None:
                told.append((item, Stale()))
                told += [(copy, Stale()) for copy in copies]
                continue
            _, seq, message_id, at, digest = row
            if message_id is None:
                message_id, at, digest = item.message_id, item.at, item.digest
                told.append((item, Appended(message_id, seq, at)))
                firsts[item.sid] = min(seq, firsts.get(item.sid, seq))
            else:
                told.append((item, _repeated(item, message_id, seq, at, digest)))
            told += [(copy, _repeated(copy, message_id, seq, at, digest)) for copy in copies]
        return told, firsts


def _repeated(item: Append, message_id: str, seq: int, at: int, digest: bytes) -> Outcome:
    if digest != item.digest:
        return Refusal("key_reused", "This key was used for another message in this channel.", field="key")
    return Appended(message_id, seq, at, True)
