"""Users: made once, changed by whom it may concern, gone for good."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tidings.server.bus.base import AccessChanged, Left, Published, Revoked
from tidings.server.crypto.base import CryptoError
from tidings.server.errors import Refusal
from tidings.server.services import users as users_module
from tidings.server.services.messages import Edit
from tidings.wire.commands import DeviceInfo
from tidings.wire.limits import CUSTOM_BYTES_MAX, DEVICES_PER_USER_MAX
from tidings.wire.requests import ChannelCreate, UserCreate, UserUpdate, UserUpsert

from .conftest import World


async def refused(code: str, awaitable: Any, field: str | None = None) -> Refusal:
    """What was asked must be refused with this code and field."""
    with pytest.raises(Refusal) as caught:
        await awaitable
    assert (caught.value.code, caught.value.field) == (code, field)
    return caught.value


async def test_a_user_reads_back_as_made_and_nothing_personal_lies_open(world: World) -> None:
    made = await world.users.create(
        world.backend,
        UserCreate(id="alice", name="Alice Canary", custom={"mrn": "canary-17"}, labels={"ward": "b"}),
    )
    assert (made.id, made.name, made.role, made.custom, made.labels) == (
        "alice",
        "Alice Canary",
        "user",
        {"mrn": "canary-17"},
        {"ward": "b"},
    )
    assert await world.users.get(world.backend, "alice") == made
    assert (await world.users.create(world.backend, UserCreate())).id.startswith("u_")
    for (sealed,) in await world.rows("SELECT sealed FROM users"):
        assert b"anary" not in sealed


async def test_what_is_wrong_with_a_new_user_is_named(world: World) -> None:
    await world.user("alice")
    create = world.users.create
    await refused("already_exists", create(world.backend, UserCreate(id="alice")), "id")
    await refused("invalid_field", create(world.backend, UserCreate(role="king")), "role")
    await refused("invalid_field", create(world.backend, UserCreate(custom={"x": "y" * CUSTOM_BYTES_MAX})), "custom")
    await refused("forbidden", create(world.acting("alice"), UserCreate(id="bob")))
    assert await world.rows("SELECT id FROM users") == [("alice",)]


async def test_nobody_gives_a_role_that_holds_more_than_they_have(world: World) -> None:
    key = world.key("user.create", "user.update_any")
    await world.users.create(key, UserCreate(id="alice"))
    await refused("forbidden", world.users.create(key, UserCreate(id="eve", role="admin")), "role")
    await refused("forbidden", world.users.update(key, "alice", UserUpdate(role="moderator")), "role")
    await world.user("root", "admin")
    await refused("forbidden", world.users.update(key, "root", UserUpdate(role="guest")), "role")
    # Not even administrators: a moderator reads messages, they do not. But they may take it away.
    root = world.acting("root", "admin")
    await refused("forbidden", world.users.update(root, "alice", UserUpdate(role="moderator")), "role")
    await world.users.update(world.backend, "alice", UserUpdate(role="moderator"))
    await refused("forbidden", world.users.deactivate(world.acting("alice", "moderator"), "root"), "id")
    assert (await world.users.update(root, "alice", UserUpdate(role="user"))).role == "user"


async def test_many_users_are_upserted_in_one_go_or_not_at_all(world: World) -> None:
    await world.user("bob")
    told = len(world.notices)
    shown = await world.users.upsert(
        world.backend, [UserUpsert(id="zoe", name="Zoe"), UserUpsert(id="bob", name="Bob"), UserUpsert(id="alice")]
    )
    assert [(user.id, user.name) for user in shown] == [("zoe", "Zoe"), ("bob", "Bob"), ("alice", None)]
    assert [event["type"] for event in world.own_events()] == ["profile.updated"]
    # Told the same again, nothing is written and nothing announced.
    told = len(world.notices)
    assert await world.users.upsert(world.backend, [UserUpsert(id="bob", name="Bob")]) == [shown[1]]
    assert len(world.notices) == told
    await refused(
        "invalid_field",
        world.users.upsert(world.backend, [UserUpsert(id="new"), UserUpsert(id="bob", role="king")]),
        "users[1].role",
    )
    await refused(
        "invalid_field",
        world.users.upsert(world.backend, [UserUpsert(id="new"), UserUpsert(id="new")]),
        "users[1].id",
    )
    await world.users.delete(world.backend, "zoe")
    await refused(
        "conflict", world.users.upsert(world.backend, [UserUpsert(id="new"), UserUpsert(id="zoe")]), "users[1].id"
    )
    await refused("not_found", world.users.get(world.backend, "new"), "id")


async def test_an_upsert_of_existing_users_needs_the_permission_to_change_them(world: World) -> None:
    await world.user("bob")
    key = world.key("user.create")
    await refused("forbidden", world.users.upsert(key, [UserUpsert(id="new"), UserUpsert(id="bob", name="x")]))
    assert [user.id for user in await world.users.upsert(key, [UserUpsert(id="new")])] == ["new"]


async def test_users_change_themselves_but_not_their_role_and_nobody_else(world: World) -> None:
    alice, _ = await world.user("alice"), await world.user("bob")
    changed = await world.users.update(alice, "alice", UserUpdate(name="Ally", custom={"pronouns": "she"}))
    assert (changed.name, changed.custom) == ("Ally", {"pronouns": "she"})
    # What is not named stays; null empties.
    changed = await world.users.update(alice, "alice", UserUpdate(name=None))
    assert (changed.name, changed.custom) == (None, {"pronouns": "she"})
    events = world.own_events()
    assert [(event["type"], event["seq"], event["data"]["id"]) for event in events] == [
        ("profile.updated", 1, "alice"),
        ("profile.updated", 2, "alice"),
    ]
    await refused("forbidden", world.users.update(alice, "alice", UserUpdate(role="admin")), "role")
    assert (await world.users.update(alice, "alice", UserUpdate(role="user"))).role == "user"
    await refused("forbidden", world.users.update(alice, "bob", UserUpdate(name="B")))
    await refused("not_found", world.users.update(world.backend, "nobody", UserUpdate(name="B")), "id")


async def test_another_role_is_announced_and_audited(world: World) -> None:
    await world.user("alice")
    await world.users.update(world.backend, "alice", UserUpdate(role="moderator"))
    assert world.told(AccessChanged)[-1].user == "alice"
    assert await world.rows("SELECT actor, action, target FROM audit") == [
        ("key:k1", "user.role_changed", "user:alice")
    ]


async def test_pages_of_users_hold_everyone_once_and_cursors_cannot_be_made_up(world: World) -> None:
    for number in range(7):
        await world.users.create(
            world.backend, UserCreate(id=f"u{number}", role="guest" if number % 2 else "user", labels={"n": "x"})
        )
        if number % 3 == 0:
            world.clock.advance(1)
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = await world.users.query(world.backend, limit=2, cursor=cursor)
        seen += [user.id for user in page]
        if cursor is None:
            break
    assert seen == [f"u{number}" for number in range(7)]
    _, cursor = await world.users.query(world.backend, limit=2)
    assert cursor is not None
    flipped = ("A" if cursor[5] != "A" else "B").join([cursor[:5], cursor[6:]])
    for wrong in (flipped, "nonsense", "é", "", cursor + "A"):
        await refused("cursor_invalid", world.users.query(world.backend, limit=2, cursor=wrong), "cursor")
    # A cursor belongs to its list.
    await refused("cursor_invalid", world.users.query(world.backend, role="guest", cursor=cursor), "cursor")


async def test_users_are_found_by_id_role_label_and_state(world: World) -> None:
    await world.users.create(world.backend, UserCreate(id="a", labels={"ward": "b", "floor": "2"}))
    await world.users.create(world.backend, UserCreate(id="b", role="guest", labels={"ward": "b"}))
    await world.users.create(world.backend, UserCreate(id="c"))
    await world.users.deactivate(world.backend, "c")
    await world.users.create(world.backend, UserCreate(id="d"))
    await world.users.delete(world.backend, "d")

    async def found(**filters: Any) -> list[str]:
        return [user.id for user in (await world.users.query(world.backend, **filters))[0]]

    assert await found() == ["a", "b", "c"]
    assert await found(label={"ward": "b"}) == ["a", "b"]
    assert await found(label={"ward": "b", "floor": "2"}) == ["a"]
    assert await found(role="guest") == ["b"]
    assert await found(active=True) == ["a", "b"]
    assert await found(active=False) == ["c"]
    assert await found(ids=["d", "a", "nobody"]) == ["a", "d"]
    assert await found(ids=[]) == []


async def test_guests_see_people_and_tombstones(world: World) -> None:
    guest = await world.user("guest", "guest")
    await world.users.create(world.backend, UserCreate(id="alice", name="Alice", labels={"a": "b"}))
    assert (await world.users.get(guest, "alice")).name == "Alice"
    await world.users.delete(world.backend, "alice")
    stone = await world.users.get(guest, "alice")
    assert stone.deleted_at is not None
    assert (stone.name, stone.labels) == (None, {})
    blind = world.key("channel.create")
    await refused("forbidden", world.users.get(blind, "guest"))
    await refused("forbidden", world.users.query(blind))


async def test_last_seen_is_shown_to_those_who_share_a_channel(world: World) -> None:
    alice, _, carol = await world.user("alice"), await world.user("bob"), await world.user("carol")
    await world.channel("alice", "bob")
    await world.users.record_seen([(world.app.app, "bob", 2_000_000)])
    await world.users.record_seen([(world.app.app, "bob", 1_000_000)])
    seen = (await world.users.get(alice, "bob")).last_seen_at
    assert seen is not None
    assert seen.timestamp() == 2_000
    assert (await world.users.get(carol, "bob")).last_seen_at is None
    assert (await world.users.query(alice, ids=["bob"]))[0][0].last_seen_at == seen
    await world.configure(last_seen=False)
    assert (await world.users.get(world.acting("alice"), "bob")).last_seen_at is None
    assert (await world.users.get(world.backend, "bob")).last_seen_at == seen


async def test_deactivation_ends_connections_once_and_can_be_taken_back(world: World) -> None:
    moderator, _ = await world.user("mo", "moderator"), await world.user("bob")
    assert (await world.users.deactivate(moderator, "bob")).deactivated_at is not None
    await world.users.deactivate(moderator, "bob")
    assert [(notice.user, notice.code) for notice in world.told(Revoked)] == [("bob", "user_deactivated")]
    assert (await world.users.reactivate(moderator, "bob")).deactivated_at is None
    await refused("forbidden", world.users.deactivate(world.acting("bob"), "mo"))
    assert [row[0] for row in await world.rows("SELECT action FROM audit ORDER BY at, action")] == [
        "user.deactivated",
        "user.reactivated",
    ]


async def test_ensure_makes_a_user_once_and_never_a_deleted_one(world: World) -> None:
    await asyncio.gather(*(world.users.ensure(world.app, "new") for _ in range(5)))
    assert (await world.users.get(world.backend, "new")).role == "user"
    assert await world.rows("SELECT count(*) FROM users") == [(1,)]
    await world.users.delete(world.backend, "new")
    await refused("user_unknown", world.users.ensure(world.app, "new"))


@pytest.mark.parametrize("batch", [2, 200])
async def test_a_deleted_user_leaves_everywhere_and_keeps_their_name_taken(
    world: World, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(users_module, "DELETION_BATCH", batch)
    alice, bob = await world.user("alice"), await world.user("bob")
    channels = [(await world.channel("alice", "bob")).id for _ in range(3)]
    direct, _ = await world.channels.create(bob, ChannelCreate(type="direct", members=["alice"]))
    await world.send(alice, channels[0], "kept")
    await world.users.register_devices(world.app, [("alice", DeviceInfo("phone", name="A phone"))])
    world.notices.clear()
    await world.users.delete(world.backend, "alice")
    assert [(notice.user, notice.code) for notice in world.told(Revoked)] == [("alice", "user_unknown")]
    for channel in [*channels, direct.id]:
        kinds = [
            type(notice)
            for notice in world.notices
            if (isinstance(notice, Left) and notice.channel == channel)
            or (isinstance(notice, Published) and b'"stream":"%b"' % channel.encode() in notice.payload)
        ]
        assert kinds == [Left, Published]
        assert [(event["type"], event["data"]) for event in world.events(channel)] == [
            ("member.removed", {"user": "alice", "reason": "deleted"})
        ]
        assert (await world.channels.get(bob, channel)).member_count == 1
    page = await world.messages.history(bob, channels[0])
    assert b'"kept"' in page.messages[0]
    assert b'"user":"alice"' in page.messages[0]
    for table in ("members", "devices", "device_positions"):
        assert await world.rows(f"SELECT 1 FROM {table} WHERE user='alice'") == []
    assert await world.rows("SELECT 1 FROM meta WHERE value LIKE '{%'") == []
    assert await world.rows("SELECT sealed, tokens_after FROM users WHERE id='alice'") == [(None, world.clock.now_ms())]
    await refused("conflict", world.users.create(world.backend, UserCreate(id="alice")), "id")
    await refused("conflict", world.users.update(world.backend, "alice", UserUpdate(name="x")), "id")
    world.notices.clear()
    await world.users.delete(world.backend, "alice")
    assert world.notices == []


async def test_the_own_stream_of_a_deleted_user_cannot_be_read_by_anyone(world: World) -> None:
    await world.user("alice")
    await world.users.update(world.backend, "alice", UserUpdate(name="Canary"))
    await world.users.delete(world.backend, "alice")
    [(sid, wrapped, version, app_version)] = await world.rows(
        "SELECT sid, key_wrapped, key_version, key_app_version FROM streams WHERE kind='user' AND ref='alice'"
    )
    with pytest.raises(CryptoError):
        world.keyring.cipher(world.app.id, str(sid), world.apps.stream_key(wrapped, version, app_version))


@pytest.mark.parametrize("batch", [2, 200])
async def test_messages_of_a_deleted_user_are_destroyed_if_the_app_wants_it(
    world: World, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    await world.configure(deleted_user_messages="redact")
    monkeypatch.setattr(users_module, "DELETION_BATCH", batch)
    monkeypatch.setattr(users_module, "SCAN_BATCH", 2)
    alice, bob = await world.user("alice"), await world.user("bob")
    channels = [(await world.channel("alice", "bob")).id for _ in range(3)]
    quiet = await world.channel("bob")
    for channel in channels:
        for _ in range(3):
            await world.send(alice, channel, "mine")
        await world.send(bob, channel, "yours")
    # Also where they are no member any more.
    await world.members.leave(alice, channels[0])
    world.notices.clear()
    await world.users.delete(world.backend, "alice")
    for channel in channels:
        page = await world.messages.history(bob, channel)
        assert [b"mine" in message or b"yours" in message for message in page.messages] == [False, False, False, True]
        deleted = [event["data"] for event in world.events(channel) if event["type"] == "message.deleted"]
        assert len(deleted) == 3
        assert all(data["hard"] for data in deleted)
    assert world.events(quiet.id) == []
    assert await world.rows("SELECT 1 FROM meta WHERE value LIKE '{%'") == []
    assert await world.rows("SELECT count(*) FROM messages m WHERE m.sender='alice' AND m.sealed IS NOT NULL") == [(0,)]


async def test_what_a_deleted_user_had_deleted_before_is_destroyed_too(world: World) -> None:
    await world.configure(deleted_user_messages="redact")
    alice, bob = await world.user("alice"), await world.user("bob")
    await world.channel("alice", "bob", id="c1")
    sent = await world.send(alice, "c1", "canary")
    await world.messages.edit(alice, "c1", sent.message_id, Edit(text="canary, edited"))
    await world.messages.delete(alice, "c1", sent.message_id)
    assert [one.text for one in await world.messages.versions(world.backend, "c1", sent.message_id)] != []
    await world.users.delete(world.backend, "alice")
    assert await world.messages.versions(world.backend, "c1", sent.message_id) == []
    last = world.events("c1")[-1]
    assert (last["type"], last["data"]["id"], last["data"]["hard"]) == ("message.deleted", sent.message_id, True)
    assert b"deleted_at" in (await world.messages.history(bob, "c1")).messages[0]


async def test_a_deletion_that_was_cut_short_is_finished_at_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.configure(deleted_user_messages="redact")
    monkeypatch.setattr(users_module, "DELETION_BATCH", 1)
    alice, bob = await world.user("alice"), await world.user("bob")
    channels = [(await world.channel("alice", "bob")).id for _ in range(3)]
    for channel in channels:
        await world.send(alice, channel)

    async def crash(*_: Any) -> None:
        raise ConnectionError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(world.users, "_finish_deletion", crash)
        with pytest.raises(ConnectionError):
            await world.users.delete(world.backend, "alice")
    assert len(await world.rows("SELECT 1 FROM members WHERE user='alice'")) == 2
    assert await world.users.resume_deletions() == 1
    assert await world.users.resume_deletions() == 0
    assert await world.rows("SELECT 1 FROM members WHERE user='alice'") == []
    for channel in channels:
        assert b"deleted_at" in (await world.messages.history(bob, channel)).messages[0]


async def test_devices_are_remembered_up_to_a_bound_and_forgotten_with_their_positions(world: World) -> None:
    alice, bob = await world.user("alice"), await world.user("bob")
    for number in range(DEVICES_PER_USER_MAX + 1):
        world.clock.advance(1)
        await world.users.register_devices(world.app, [("alice", DeviceInfo(f"d{number}", "ios", f"Phone {number}"))])
        await world.execute(
            "INSERT INTO device_positions(app,user,device,sid,seq,at) VALUES (1,'alice',?,1,1,1)", f"d{number}"
        )
    shown = await world.users.devices(alice, "alice")
    assert len(shown) == DEVICES_PER_USER_MAX
    assert (shown[0].id, shown[0].name, shown[-1].id) == (
        f"d{DEVICES_PER_USER_MAX}",
        f"Phone {DEVICES_PER_USER_MAX}",
        "d1",
    )
    assert await world.rows("SELECT 1 FROM device_positions WHERE device='d0'") == []
    # A device that comes again without a name keeps it.
    world.clock.advance(1)
    await world.users.register_devices(world.app, [("alice", DeviceInfo("d1"))])
    first = (await world.users.devices(world.backend, "alice"))[0]
    assert (first.id, first.name, first.platform) == ("d1", "Phone 1", "ios")
    await world.users.remove_device(alice, "alice", "d1")
    assert world.told(Revoked)[-1].device == "d1"
    await refused("not_found", world.users.remove_device(alice, "alice", "d1"), "device")
    await refused("forbidden", world.users.devices(bob, "alice"))
    await refused("forbidden", world.users.remove_device(bob, "alice", "d2"))
