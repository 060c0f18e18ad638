"""Members of one role: found by an index, whatever the number of the others."""

from __future__ import annotations

from typing import Any

import pytest

from tests import postgres
from tidings.server.services.membership import members_of
from tidings.server.store.base import Row, Tx

from .conftest import World
from .test_users import refused

OTHERS = 20_000


async def crowd(world: World) -> tuple[str, int]:
    """A channel with 20,000 members and, spread among them, nine moderators and its owner; its id and sid."""
    channel = await world.channel("alice", roles={"alice": "owner"})
    [(sid,)] = await world.rows("SELECT sid FROM streams WHERE ref=?", channel.id)
    numbers = (
        f"SELECT i FROM generate_series(1,{OTHERS}) AS n(i)"
        if postgres.kind == "postgres"
        else f"WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i+1 FROM n WHERE i<{OTHERS}) SELECT i FROM n"
    )
    await world.execute(
        "INSERT INTO members(app,sid,user,role,joined_at,joined_seq,moved_at)"
        " SELECT 1, ?, 'u'||(100000+i), CASE WHEN i%2000=7 AND i>2000 THEN 'moderator' ELSE 'member' END, 1, 0, 1"
        f" FROM ({numbers}) AS numbers",
        sid,
    )
    if postgres.kind == "postgres":
        await world.execute("ANALYZE members")
    return channel.id, sid


class Explaining:
    """A transaction that tells how its reads are made, beside making them."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self.plans: list[str] = []

    async def all(self, sql: str, *args: Any) -> list[Row]:
        word = "EXPLAIN" if postgres.kind == "postgres" else "EXPLAIN QUERY PLAN"
        self.plans.append("\n".join(str(row[-1]) for row in await self._tx.all(f"{word} {sql}", *args)))
        return await self._tx.all(sql, *args)


async def test_a_role_is_looked_up_and_its_pages_are_whole(world: World) -> None:
    alice = await world.user("alice")
    channel, _ = await crowd(world)
    found: list[str] = []
    pages = 0
    cursor = None
    while True:
        members, cursor = await world.members.list(alice, channel, role="moderator", cursor=cursor, limit=4)
        found += [member.user for member in members]
        pages += 1
        assert {member.role for member in members} == {"moderator"}
        if cursor is None:
            break
    assert found == [f"u{100000 + 2000 * n + 7}" for n in range(1, 10)]
    assert pages == 3
    owners, more = await world.members.list(alice, channel, role="owner", limit=4)
    assert ([member.user for member in owners], more) == (["alice"], None)


@pytest.mark.parametrize("after", ["", "u109000"])
async def test_members_of_a_role_come_from_the_index(world: World, after: str) -> None:
    await world.user("alice")
    _, sid = await crowd(world)
    explaining: list[Explaining] = []

    async def unit(tx: Tx) -> list[Row]:
        explaining.append(Explaining(tx))
        return await members_of(explaining[0], 1, sid, role="moderator", after=after, limit=3)  # type: ignore[arg-type]

    assert len(await world.store.read(unit)) == 3
    [plan] = explaining[0].plans
    assert "members_role" in plan, plan
    assert "Sort" not in plan, "the index has them in their order"
    assert "TEMP B-TREE" not in plan, "the index has them in their order"


async def test_the_last_owner_among_very_many_cannot_leave(world: World) -> None:
    alice = await world.user("alice")
    channel, _ = await crowd(world)
    await refused("conflict", world.members.leave(alice, channel), "user")
