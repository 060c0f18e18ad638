"""Messages: said once, changed within the channel's rules, shown to those who may see them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tidings.server.errors import Refusal
from tidings.server.services.access import Actor
from tidings.server.services.messages import Draft, Edit
from tidings.server.services.sync import Sync
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
    retried = []

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
