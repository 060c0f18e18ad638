"""Unread counts against a model that simply counts."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidings.server.services.counting import MENTIONED, UNREAD, unread_of
from tidings.server.services.messages import Edit
from tidings.server.store.base import Tx
from tidings.wire.requests import MembersAdd

from .conftest import World, build

USERS = ["ann", "ben", "cat"]


@dataclass
class Said:
    """A message as the model knows it."""

    id: str
    seq: int
    sender: str | None
    counts: bool
    mentions: set[str]
    deleted: bool = False


@dataclass
class Model:
    """What has been said, and from where on everything is new to whom."""

    said: list[Said] = field(default_factory=list)
    new_from: dict[str, int] = field(default_factory=dict)

    def unread(self, user: str) -> int:
        return sum(message.counts for message in self._new(user))

    def mentions(self, user: str) -> int:
        return sum(bool(message.mentions & {user, "*"}) for message in self._new(user))

    def _new(self, user: str) -> list[Said]:
        return [
            message
            for message in self.said
            if message.seq >= self.new_from[user] and message.sender != user and not message.deleted
        ]


async def set_read(world: World, sid: int, user: str, seq: int) -> None:
    """Move a read position forward, and take a mark away, as a receipt does."""
    await world.execute(
        "UPDATE members SET read=CASE WHEN read<? THEN ? ELSE read END, marked_from=NULL WHERE sid=? AND user=?",
        seq,
        seq,
        sid,
        user,
    )
    await world.execute(
        "UPDATE members SET read_counted=coalesce((SELECT counted FROM messages x WHERE x.app=members.app"
        " AND x.sid=members.sid AND x.seq<=members.read ORDER BY x.seq DESC LIMIT 1),0) WHERE sid=? AND user=?",
        sid,
        user,
    )


STEPS = st.one_of(
    st.tuples(
        st.just("send"),
        st.sampled_from([*USERS, None]),
        st.sampled_from(["plain", "plain", "silent", "mention", "everyone", "both"]),
    ),
    st.tuples(st.just("delete"), st.integers(0, 40), st.booleans()),
    st.tuples(st.just("edit"), st.integers(0, 40), st.sampled_from(USERS)),
    st.tuples(st.just("read"), st.sampled_from(USERS), st.integers(0, 60)),
    st.tuples(st.just("mark"), st.sampled_from(USERS), st.integers(1, 60)),
    st.tuples(st.just("rejoin"), st.sampled_from(USERS), st.just(0)),
)


async def play(steps: list[tuple[str, Any, Any]], path: Path) -> None:
    world = await build(path)
    try:
        for name in USERS:
            await world.user(name)
        channel = (await world.channel(*USERS)).id
        [(sid, head)] = await world.rows("SELECT sid, head FROM streams WHERE ref=?", channel)
        model = Model(new_from=dict.fromkeys(USERS, head + 1))
        for kind, what, how in steps:
            if kind == "send":
                actor = world.backend if what is None else world.acting(what)
                fields: dict[str, Any] = {}
                if how == "silent":
                    fields["silent"] = True
                if how in ("mention", "both"):
                    fields["mentions"] = ["ann", "ben"]
                if how in ("everyone", "both") and what is None:
                    fields["mention_all"] = True
                sent = await world.send(actor, channel, **fields)
                mentioned = set(fields.get("mentions", ())) | ({"*"} if "mention_all" in fields else set())
                model.said.append(Said(sent.message_id, sent.seq, what, how != "silent", mentioned))
                if what is not None:
                    model.new_from[what] = sent.seq + 1
            elif kind == "delete" and model.said:
                said = model.said[what % len(model.said)]
                await world.messages.delete(world.backend, channel, said.id, hard=how)
                said.deleted = True
            elif kind == "edit" and model.said:
                said = model.said[what % len(model.said)]
                if not said.deleted:
                    await world.messages.edit(world.backend, channel, said.id, Edit(text="edited", mentions=[how]))
                    said.mentions = {how} | (said.mentions & {"*"})
            elif kind == "read":
                [(head, read)] = await world.rows(
                    "SELECT s.head, m.read FROM streams s JOIN members m ON m.sid=s.sid WHERE s.sid=? AND m.user=?",
                    sid,
                    what,
                )
                await set_read(world, sid, what, min(how, head))
                model.new_from[what] = max(read, min(how, head)) + 1
            elif kind == "mark":
                [(head,)] = await world.rows("SELECT head FROM streams WHERE sid=?", sid)
                await world.execute(
                    "UPDATE members SET marked_from=? WHERE sid=? AND user=?", min(how, head), sid, what
                )
                model.new_from[what] = min(how, head)
            elif kind == "rejoin":
                await world.members.remove(world.backend, channel, what)
                await world.members.add(world.backend, channel, MembersAdd(users=[what]))
                [(joined,)] = await world.rows("SELECT joined_seq FROM members WHERE sid=? AND user=?", sid, what)
                model.new_from[what] = joined + 1
            for user in USERS:

                async def unit(tx: Tx, user: str = user) -> Any:
                    return await unread_of(tx, world.app.app, sid, user)

                counts = await world.store.read(unit)
                assert (counts.unread, counts.mentions) == (model.unread(user), model.mentions(user)), (user, kind)
                shown = (await world.channels.get(world.acting(user), channel)).membership
                assert shown is not None
                assert (shown.unread, shown.mentions) == (counts.unread, counts.mentions)
    finally:
        await world.store.close()


@settings(max_examples=40, deadline=None)
# What a random walk seldom meets: one's own deleted message, an edit that mentions whom `everyone` did, after a mark.
@example([("send", "ann", "plain"), ("send", "ben", "plain"), ("delete", 0, False), ("mark", "ann", 1)])
@example([("send", "ann", "plain"), ("read", "ann", 60), ("send", None, "both"), ("mark", "ann", 1)])
@example([("send", "ann", "mention"), ("send", "ben", "mention"), ("mark", "ann", 1), ("mark", "ben", 1)])
@example([("send", "ben", "plain"), ("rejoin", "ann", 0), ("send", "ben", "plain"), ("delete", 1, True)])
@given(st.lists(STEPS, max_size=25))
def test_counts_are_exact_whatever_happens(steps: list[tuple[str, Any, Any]]) -> None:
    with tempfile.TemporaryDirectory() as path:
        asyncio.run(play(steps, Path(path)))


@pytest.mark.sqlite
async def test_counting_touches_no_more_rows_in_a_long_channel(world: World) -> None:
    """The deletions are found through their own small index, whatever lies between."""
    alice = await world.user("alice")
    channel = await world.channel("alice")
    [(sid,)] = await world.rows("SELECT sid FROM streams WHERE ref=?", channel.id)
    await world.execute(
        "WITH RECURSIVE n(i) AS (VALUES (10) UNION ALL SELECT i+1 FROM n WHERE i<20009)"
        " INSERT INTO messages(app,sid,seq,id,sender,key,digest,content_seq,counted,flags,at)"
        " SELECT 1, ?, i, 'm'||i, 'bob', i, '', i, i-9, 4, 1 FROM n",
        sid,
    )
    await world.execute("UPDATE streams SET counted=20000, messages=20000, head=20009 WHERE sid=?", sid)
    await world.execute("UPDATE messages SET deleted_at=1 WHERE sid=? AND seq IN (50, 15000)", sid)
    shown = (await world.channels.get(alice, channel.id)).membership
    assert shown is not None
    assert shown.unread == 19_998
    for expression in (UNREAD, MENTIONED):
        plan = await world.rows(
            f"EXPLAIN QUERY PLAN SELECT {expression} FROM members m JOIN streams s ON s.sid=m.sid"
            " WHERE m.app=1 AND m.sid=? AND m.user='alice'",
            sid,
        )
        steps = [step for *_, step in plan]
        assert not [step for step in steps if step.startswith("SCAN")], steps
        for step in steps:
            if step.startswith("SEARCH d "):
                assert "COVERING INDEX messages_deleted" in step
