"""Messages: said once, changed within the channel's rules, shown to those who may see them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tidings.server.errors import Refusal
from tidings.server.services.access import Actor
from tidings.server.services.messages import Draft, Edit
from tidings.server.services.rendering import decode_message
from tidings.server.services.sync import Sync
from tidings.server.store.base import Appended
from tidings.wire.requests import ChannelUpdate, MembersAdd
from tidings.wire.resources import ChannelFeatures, ChannelType

from .conftest import World


async def refused(code: str, awaitable: Any, field: str | None = None) -> None:
    with pytest.raises(Refusal) as caught:
        await awaitable
    assert (caught.value.code, caught.value.field) == (code, field)


async def test_a_retry_gets_its_first_result_whatever_has_happened_since(world: World) -> None:
    alice = await world.user("alice")
    await world.user("bob")
    await world.configure(ChannelType(name="plain", features=ChannelFeatures()))
    await world.channel("alice", "bob", id="c1", type="plain")
    draft = Draft(text="hello", mentions=["bob"])
    alice = world.acting("alice")
    first = await world.messages.send(alice, "c1", draft, "k1")
    retried: list[Appended] = []

    async def retry() -> None:
        again = await world.messages.send(alice, "c1", draft, "k1", retried.append)
        assert (again.message_id, again.seq, again.at, again.duplicate) == (first.message_id, first.seq, first.at, True)
        assert retried.pop() == again, "its sender is answered as ever"

    # The hot path leaves whatever it would refuse to the one that looks the key up.
    await world.channels.update(world.backend, "c1", ChannelUpdate(frozen=True))
    await retry()
    assert not world.messages.send_now(alice, "c1", draft, "k1", lambda _: None)
    await refused("frozen", world.messages.send(alice, "c1", draft, "k2"))
    await refused("frozen", world.messages.send(alice, "c1", Draft(text="another"), "k1"))
    await world.channels.update(world.backend, "c1", ChannelUpdate(frozen=False))

    await world.execute("DELETE FROM channel_types")
    await world.configure(ChannelType(name="plain", features=ChannelFeatures(mentions=False)))
    alice = world.acting("alice")
    await retry()
    await refused("feature_off", world.messages.send(alice, "c1", draft, "k2"), "mentions")

    await world.execute("DELETE FROM channel_types")
    reading = {"member": ["channel.read"]}
    await world.configure(ChannelType(name="plain", features=ChannelFeatures(), grants=reading))
    alice = world.acting("alice")
    await retry()
    assert not world.messages.send_now(alice, "c1", draft, "k1", lambda _: None)
    await refused("forbidden", world.messages.send(alice, "c1", draft, "k2"))

    await world.members.remove(world.backend, "c1", "alice")
    await refused("not_found", world.messages.send(alice, "c1", draft, "k1"), "channel")


async def test_an_edit_cannot_mention_where_mentions_are_off(world: World) -> None:
    await world.user("alice")
    await world.user("bob")
    await world.configure(ChannelType(name="quiet", features=ChannelFeatures(mentions=False)))
    alice = world.acting("alice")
    await world.channel("alice", "bob", id="c1", type="quiet")
    sent = await world.send(alice, "c1")
    edit = world.messages.edit
    await refused("feature_off", edit(alice, "c1", sent.message_id, Edit(mentions=["bob"])), "mentions")
    await edit(alice, "c1", sent.message_id, Edit(text="hello again", mentions=[]))
    assert await world.rows("SELECT 1 FROM mentions") == []


async def test_an_edit_shows_nothing_to_those_before_whose_time_the_message_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("alice", "bob", "carol"):
        await world.user(name)
    await world.configure(ChannelType(name="ward", features=ChannelFeatures(), history="since_join"))
    alice, bob, carol = (world.acting(name) for name in ("alice", "bob", "carol"))
    await world.channel("alice", "bob", id="c1", type="ward")
    old = await world.send(alice, "c1", "before")
    await world.messages.edit(alice, "c1", old.message_id, Edit(text="before, once"))
    assert world.events("c1")[-1]["data"]["text"] == "before, once", "everybody was there"
    await world.members.add(world.backend, "c1", MembersAdd(users=["carol"]))
    edited = await world.messages.edit(alice, "c1", old.message_id, Edit(text="before, twice", custom={"a": 1}))
    live = world.events("c1")[-1]["data"]
    assert (live["id"], live["seq"], live["edits"], live["content_omitted"]) == (old.message_id, old.seq, 2, True)
    assert not live.keys() & {"text", "custom", "mentions", "attachments"}
    assert b"before, twice" in edited[1]

    sync = Sync(world.store, world.access, world.keyring, world.bus, world.clock)

    async def caught_up(actor: Actor) -> list[Any]:
        page = await sync.events(actor, "c1", old.seq if actor is bob else (await floor(actor)), None, 100)
        events = [msgspec.json.decode(payload) for _, payload in page.events]
        return [event["data"] for event in events if event["type"] == "message.updated"]

    async def floor(actor: Actor) -> int:
        return (await sync.handle(actor, "c1")).floor

    assert [data.get("text") for data in await caught_up(bob)] == ["before, once", "before, twice"]
    assert [(data.get("text"), data["content_omitted"]) for data in await caught_up(carol)] == [(None, True)]
    assert b"before, twice" in await world.messages.one(bob, "c1", old.message_id)
    await refused("not_found", world.messages.one(carol, "c1", old.message_id), "id")

    new = await world.send(alice, "c1", "after")
    await world.messages.edit(alice, "c1", new.message_id, Edit(text="after, once"))
    assert world.events("c1")[-1]["data"]["text"] == "after, once"
    assert (await caught_up(carol))[-1]["text"] == "after, once"
    # In a large channel somebody is always new.
    monkeypatch.setattr("tidings.server.services.messages.WITHHELD_MEMBERS_MAX", 2)
    await world.messages.edit(alice, "c1", new.message_id, Edit(text="after, twice"))
    assert "text" not in world.events("c1")[-1]["data"]


async def test_replies_are_counted_and_paged_for_those_who_may_see_them(world: World) -> None:
    for user in ("alice", "bob", "carol"):
        await world.user(user)
    await world.configure(ChannelType(name="ward", features=ChannelFeatures(), history="since_join"))
    await world.channel("alice", "bob", id="c1", type="ward")
    alice, bob, carol = (world.acting(user) for user in ("alice", "bob", "carol"))

    async def say(key: str, reply_to: str | None = None) -> str:
        return (await world.messages.send(bob, "c1", Draft(text=key, reply_to=reply_to), key)).message_id

    async def counts(actor: Actor) -> dict[str, tuple[int, bool]]:
        read = [decode_message(data) for data in (await world.messages.history(actor, "c1")).messages]
        return {one.text: (one.reply_count, one.last_reply_at is not None) for one in read if one.reply_count}

    async def replies(actor: Actor, root: str, **where: int) -> tuple[list[str], bool, bool]:
        page = await world.messages.history(actor, "c1", replies_to=root, **where)
        return [decode_message(data).text for data in page.messages], page.has_before, page.has_after

    root, other = await say("root"), await say("other")
    answers = [await say(f"r{place}", root) for place in range(5)]
    await say("o0", other)
    assert await counts(alice) == {"root": (5, True), "other": (1, True)}
    assert await replies(alice, root) == (["r0", "r1", "r2", "r3", "r4"], False, False)
    assert await replies(alice, root, limit=2) == (["r3", "r4"], True, False)
    first = decode_message(await world.messages.one(alice, "c1", answers[0])).seq
    assert await replies(alice, root, after=first, limit=2) == (["r1", "r2"], True, True)

    # A deleted reply keeps its place and does not count; only its first deletion says whose reply it was.
    await world.messages.delete(bob, "c1", answers[1])
    await world.messages.delete(world.backend, "c1", answers[1], hard=True)
    assert await counts(alice) == {"root": (4, True), "other": (1, True)}
    assert (await replies(alice, root))[0] == ["r0", "", "r2", "r3", "r4"]
    await world.messages.delete(bob, "c1", other)
    one = decode_message(await world.messages.one(alice, "c1", other))
    assert (one.deleted_at is not None, one.reply_count) == (True, 1), "a thread outlives its message"
    tombstone = decode_message(await world.messages.one(alice, "c1", answers[1]))
    assert (tombstone.deleted_at is not None, tombstone.reply_to) == (True, root), "what is deleted was counted"
    deleted = [event["data"] for event in world.events("c1") if event["type"] == "message.deleted"]
    assert [data.get("reply_to") for data in deleted] == [root, None, None]

    # Who came later sees neither the message nor its replies, though some came after them.
    await world.members.add(world.backend, "c1", MembersAdd(users=["carol"]))
    await say("r5", root)
    await refused("not_found", world.messages.history(carol, "c1", replies_to=root), "id")
    assert await counts(carol) == {}
