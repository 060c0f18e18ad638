"""Presence: seen by those who share a channel, late to say that somebody left, silent about who wants to be unseen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tidings.server.config import Config

from .world import Node, RecordingPeer, open_node

# Long enough to come back within it, short enough to wait for its end, seconds.
GRACE = 0.05


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with open_node(tmp_path, presence_grace_seconds=GRACE) as made:
        await made.users("alice", "bob", "carol")
        await made.channel("c", "alice", "bob")
        yield made


async def watching(node: Node, user: str, *whom: str) -> RecordingPeer:
    peer = await node.connect(user)
    await peer.ask("presence.watch", users=list(whom))
    return peer


def told(peer: RecordingPeer) -> list[tuple[str, str]]:
    return [(frame["user"], frame["status"]) for frame in peer.of("presence")]


async def test_watching_is_answered_with_how_things_stand(node: Node) -> None:
    alice = await node.connect("alice")
    reply = await alice.ask("presence.watch", users=["bob"])
    assert [(entry["user"], entry["status"]) for entry in reply["users"]] == [("bob", "offline")]
    await node.connect("bob")
    reply = await alice.ask("presence.watch", users=["bob", "bob"])
    assert [(entry["user"], entry["status"]) for entry in reply["users"]] == [("bob", "online")]


async def test_only_people_who_share_a_channel_are_told_of(node: Node) -> None:
    alice = await node.connect("alice")
    await node.connect("carol")
    reply = await alice.ask("presence.watch", users=["carol", "nobody"])
    assert reply["users"] == []
    (await node.connect("carol", "second")).gone()
    await alice.quiet()
    assert told(alice) == []


async def test_a_watcher_hears_of_coming_once_whatever_the_devices(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    await node.connect("bob", "phone")
    await node.connect("bob", "laptop")
    await alice.quiet()
    assert told(alice) == [("bob", "online")]


async def test_leaving_is_told_after_the_grace_period_and_by_the_last_device(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    phone, laptop = await node.connect("bob", "phone"), await node.connect("bob", "laptop")
    phone.gone()
    laptop.gone()
    await alice.quiet()
    assert told(alice) == [("bob", "online")]
    await alice.until(lambda: len(told(alice)) == 2)
    assert told(alice)[-1] == ("bob", "offline")
    assert alice.of("presence")[-1]["last_seen_at"]


async def test_coming_back_within_the_grace_period_is_no_news(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    (await node.connect("bob", "phone")).gone()
    assert node.gateway.presence._leaving
    await node.connect("bob", "phone")
    assert not node.gateway.presence._leaving
    await alice.quiet()
    assert told(alice) == [("bob", "online")]


async def test_a_device_that_stays_keeps_its_user_online(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    phone = await node.connect("bob", "phone")
    await node.connect("bob", "laptop")
    phone.gone()
    await alice.quiet()
    assert not node.gateway.presence._leaving
    assert told(alice) == [("bob", "online")]


async def test_an_invisible_connection_is_never_seen(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    bob = await node.connect("bob", presence="invisible")
    reply = await alice.ask("presence.watch", users=["bob"])
    assert reply["users"][0]["status"] == "offline"
    bob.gone()
    await alice.quiet()
    assert told(alice) == []


async def test_going_invisible_is_told_at_once_and_back_again(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    bob = await node.connect("bob")
    await bob.ask("presence.set", status="invisible")
    await alice.quiet()
    assert told(alice) == [("bob", "online"), ("bob", "offline")]
    await bob.ask("presence.set", status="online")
    await alice.quiet()
    assert told(alice)[-1] == ("bob", "online")


async def test_a_new_list_replaces_the_old_one(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    await alice.ask("presence.watch", users=[])
    await node.connect("bob")
    await alice.quiet()
    assert told(alice) == []
    assert node.gateway.presence._watchers == {}


async def test_a_watcher_who_left_is_forgotten(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    alice.gone()
    assert node.gateway.presence._watchers == {}
    await node.connect("bob")
    assert told(alice) == []


async def test_a_slow_watcher_does_without(node: Node) -> None:
    alice = await watching(node, "alice", "bob")
    alice.pause()
    await node.connect("bob")
    alice.resume()
    await alice.quiet()
    assert told(alice) == []


async def test_the_last_time_seen_is_written_with_devices_in_one_go(node: Node) -> None:
    await node.connect("bob", "phone")
    await node.gateway._write_seen_once()
    [(seen,)] = await node.rows("SELECT last_seen_at FROM users WHERE id='bob'")
    assert seen == node.clock.now_ms()
    assert await node.rows("SELECT id FROM devices WHERE devices.user='bob'") == [("phone",)]


def test_the_default_grace_period_is_longer_than_a_reconnect() -> None:
    assert Config().presence_grace_seconds >= 2
