"""What every bus must do, told through the port alone.

An adapter is a `BusSite`: a place where nodes can be opened. `test_bus.py` lists them; no case below knows which one it
runs on. Where there can be one node only, the nodes of a case are the same bus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import pytest

from tidings.server.bus.base import (
    AccessChanged,
    Arrived,
    Bus,
    Crowd,
    Joined,
    Left,
    Lost,
    Notice,
    Published,
    Revoked,
    Shown,
    Signal,
    Unreachable,
    Used,
)

# What a condition may take before a test gives up, seconds.
PATIENCE = 10.0
APP = 1

TO_EVERYBODY: list[Notice] = [
    Joined(APP, "alice", 7, "c", "e1", 12),
    Left(APP, "alice", 7, "c"),
    Left(APP, None, 7, "c"),
    AccessChanged(APP),
    AccessChanged(APP, sid=7, channel="c"),
    AccessChanged(APP, user="alice"),
    Revoked(APP, "alice", "token_revoked", before_ms=1_700_000_000_000),
    Revoked(APP, "alice", "token_revoked", jti="j", device="d"),
    Lost(),
    Used("a", [(APP, "user:alice", 3.5), (APP, "key:k1", 1.0)]),
]


class BusSite(Protocol):
    """Where buses live."""

    # Whether the nodes are different ones.
    apart: bool

    async def open(self) -> Bus:
        """Another node's bus. Closed by the site in the end."""
        ...


class Ear:
    """Keeps what a node hears."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.heard: list[Notice] = []
        bus.listen(self.heard.append)

    def count(self, notice: Notice) -> int:
        return self.heard.count(notice)

    async def hears(self, *notices: Notice) -> None:
        await until(lambda: all(notice in self.heard for notice in notices), lambda: self.heard)


async def until(condition: Callable[[], Any], what: Callable[[], object] = lambda: "") -> Any:
    """Wait for a condition; its value."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not (found := condition()):
                await asyncio.sleep(0.005)  # why: looking again, not waiting for the thing itself
            return found
    except TimeoutError:
        raise AssertionError(f"it did not come to this: {what()}") from None


async def through(sender: Bus, *ears: Ear) -> None:
    """Everything that `sender` has published until now has come to these nodes."""
    mark = AccessChanged(APP, user=f"mark{id(object())}{len(ears[0].heard)}")
    sender.publish(mark)
    for ear in ears:
        await ear.hears(mark)


class BusContract:
    """The cases. Subclasses give the fixture `site`."""

    async def test_local_listeners_hear_at_once_and_in_order(self, site: BusSite) -> None:
        bus = await site.open()
        first, second = Ear(bus), Ear(bus)
        said: list[Notice] = [Published(7, n, b"%d" % n) for n in range(1, 50)]
        said.append(Left(APP, "alice", 7, "c"))
        for notice in said:
            bus.publish(notice)
            assert first.heard[-1] is notice
        assert first.heard == second.heard == said

    async def test_nothing_of_ones_own_comes_back(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        for bus in (a, b):
            bus.follow(7)
            bus.attend(APP, "alice")
            await bus.settle()
        here, there = Ear(a), Ear(b)
        said = [Published(7, 1, b"x"), Signal(APP, b"s", user="alice"), *TO_EVERYBODY]
        for notice in said:
            a.publish(notice)
        b.publish(Published(7, 2, b"y"))
        await there.hears(*said)
        await here.hears(Published(7, 2, b"y"))
        assert [here.count(notice) for notice in said] == [1] * len(said)

    async def test_a_follower_hears_events_with_the_same_bytes_in_their_order(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        b.follow(7)
        assert await b.settle()
        there = Ear(b)
        said: list[Notice] = [Published(7, n, bytes(range(256)) * n + b"\r\nMSG x 1 3\r\n") for n in range(1, 30)]
        for notice in said:
            a.publish(notice)
        await there.hears(said[-1])
        assert there.heard == said

    async def test_what_concerns_access_reaches_every_node_unasked(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        there = Ear(b)
        for notice in TO_EVERYBODY:
            a.publish(notice)
        await there.hears(*TO_EVERYBODY)
        assert there.heard == TO_EVERYBODY

    async def test_what_one_node_says_is_heard_in_its_order_whatever_it_is_about(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        b.follow(7)
        b.follow(8)
        b.attend(APP, "alice")
        await b.settle()
        there = Ear(b)
        said: list[Notice] = []
        for n in range(1, 40):
            said += [
                Left(APP, "alice", 7, "c"),
                Published(7, n, b"removed"),
                Published(8, n, b"left"),
                Signal(APP, b"%d" % n, user="alice"),
                AccessChanged(APP, sid=7, channel="c"),
            ]
        for notice in said:
            a.publish(notice)
        await there.hears(said[-2])
        await through(a, there)
        assert there.heard[:-1] == said

    async def test_a_followed_stream_is_heard_until_it_is_given_up_as_often_as_it_was_asked_for(
        self, site: BusSite
    ) -> None:
        a, b = await site.open(), await site.open()
        b.follow(7)
        b.follow(7)
        b.unfollow(7)
        await b.settle()
        there = Ear(b)
        a.publish(Published(7, 1, b"x"))
        await there.hears(Published(7, 1, b"x"))

    async def test_signals_find_channels_and_users_whatever_their_ids_look_like(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        names = ["alice", "a.b", "a..b", "*", ">", "a>", "%2E", "a%2Eb", "x y", "é", "a:b@c+d-e_f", "n" * 128]
        for name in names:
            b.attend(APP, name)
        b.follow(7)
        await b.settle()
        there = Ear(b)
        said: list[Notice] = [Signal(APP, name.encode(), user=name, skip_session="s_1") for name in names]
        said += [Signal(APP, b"typing", sid=7), Crowd("n", 7, 12), Arrived(APP, "a.b", "phone", "s_2", 5)]
        for notice in said:
            a.publish(notice)
        await there.hears(*said)
        assert there.heard == said

    async def test_who_watches_a_user_hears_them_come_and_go(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        b.watch(APP, "alice")
        await b.settle()
        there = Ear(b)
        said = [Shown(APP, "alice"), Shown(APP, "alice", last_seen_ms=17)]
        for notice in said:
            a.publish(notice)
        await there.hears(*said)

    async def test_after_settling_nothing_that_is_said_later_is_missed(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        there = Ear(b)
        for sid in range(100, 200):
            b.follow(sid)
            assert await b.settle()
            a.publish(Published(sid, 1, b"x"))
        await there.hears(*[Published(sid, 1, b"x") for sid in range(100, 200)])


class ApartContract(BusContract):
    """What holds between nodes that are different ones."""

    async def test_nobody_hears_a_stream_or_user_they_have_not_asked_for(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()
        b.follow(8)
        b.attend(APP, "bob")
        b.attend(2, "alice")
        await b.settle()
        there = Ear(b)
        a.publish(Published(7, 1, b"x"))
        a.publish(Signal(APP, b"x", sid=7))
        a.publish(Crowd("n", 7, 12))
        a.publish(Signal(APP, b"x", user="alice"))
        a.publish(Shown(APP, "bob"))
        await through(a, there)
        assert len(there.heard) == 1

    async def test_who_is_online_elsewhere_is_known_by_asking(self, site: BusSite) -> None:
        a, b, c = await site.open(), await site.open(), await site.open()
        for bus, users in ((b, ["alice", "hidden", "both"]), (c, ["both", "carol.x"])):
            for user in users:
                bus.attend(APP, user)
            await bus.settle()
        b.answer_online(lambda app, user: app == APP and user == "alice")
        c.answer_online(lambda app, user: app == APP and user in ("both", "carol.x"))
        asked = ["alice", "hidden", "both", "carol.x", "nobody"]
        assert await a.online(APP, asked) == {"alice", "both", "carol.x"}
        assert await a.online(2, asked) == set()
        # One's own sessions are one's own business.
        c.answer_online(lambda app, user: True)
        assert await c.online(APP, ["carol.x"]) == set()

    async def test_the_devices_of_a_user_are_found_on_every_node(self, site: BusSite) -> None:
        a, b, c = await site.open(), await site.open(), await site.open()
        for bus in (a, b, c):
            for user in ("both", "own"):
                bus.attend(APP, user)
            await bus.settle()
        a.answer_devices(lambda app, user: ["laptop"] if (app, user) == (APP, "own") else [])
        b.answer_devices(lambda app, user: ["phone", "watch"] if (app, user) == (APP, "both") else [])
        c.answer_devices(lambda app, user: ["tablet"] if (app, user) == (APP, "both") else [])
        found = {("own", "laptop"), ("both", "phone"), ("both", "watch"), ("both", "tablet")}
        assert await a.connected_devices(APP, ["both", "own", "nobody"]) == found
        assert await a.connected_devices(2, ["both", "own"]) == set()

    async def test_many_who_are_offline_cost_one_round_trip(self, site: BusSite) -> None:
        a, _ = await site.open(), await site.open()
        began = asyncio.get_running_loop().time()
        assert await a.online(APP, [f"u{n}" for n in range(2_000)]) == set()
        # Four batches: had each waited for silence, it would be a second.
        assert asyncio.get_running_loop().time() - began < 0.9

    async def test_a_node_answers_what_it_is_asked(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()

        async def reverse(payload: bytes) -> bytes:
            await asyncio.sleep(0)
            return payload[::-1]

        b.serve("reverse", reverse)
        await b.settle()
        big = bytes(range(256)) * 2_000
        found = await asyncio.gather(*(a.request(b.node, "reverse", b"%d" % n + big, 5) for n in range(20)))
        assert found == [(b"%d" % n + big)[::-1] for n in range(20)]

    async def test_a_node_that_is_not_there_or_does_not_answer_is_unreachable(self, site: BusSite) -> None:
        a, b = await site.open(), await site.open()

        async def never(payload: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        b.serve("never", never)
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable):
            await a.request("nobody", "never", b"", 60)
        # Said by the bus, not found out by waiting.
        assert asyncio.get_running_loop().time() - began < PATIENCE
        with pytest.raises(Unreachable):
            await a.request(b.node, "never", b"", 0.05)
        with pytest.raises(Unreachable):
            await a.request("no.such node\r\n", "never", b"", 0.05)
