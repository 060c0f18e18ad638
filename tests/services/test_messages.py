"""Messages: said once, changed within the channel's rules, shown to those who may see them."""

from __future__ import annotations

from typing import Any

import pytest

from tidings.server.errors import Refusal
from tidings.server.services.messages import Draft, Edit
from tidings.wire.requests import ChannelUpdate
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
