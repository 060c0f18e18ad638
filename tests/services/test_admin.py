"""Running an app: what may be changed, by whom, and what is told of it."""

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from tests.services.admin_world import NOW, World, open_world
from tidings.server.bus.base import AccessChanged
from tidings.server.domain.permissions import EVERYTHING
from tidings.server.domain.permissions import Permission as P
from tidings.server.errors import Forbidden, Refusal
from tidings.server.services import admin as bounds
from tidings.server.services.access import Actor
from tidings.wire.ids import time_of
from tidings.wire.requests import (
    ApiKeyCreate,
    AppUpdate,
    ChannelCreate,
    ChannelTypePut,
    IdentityProviderCreate,
    SigningKeyCreate,
)
from tidings.wire.resources import AppSettings, Relation


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        yield opened


async def refused(doing: Awaitable[object]) -> tuple[str, str | None]:
    """Code and field of the refusal."""
    with pytest.raises(Refusal) as caught:
        await doing
    return caught.value.code, caught.value.field


# ---------------------------------------------------------------- apps


async def test_an_app_is_made_once_and_leaves_nothing_behind_when_refused(world: World) -> None:
    assert await refused(world.admin.create_app("Again", "app_clinic")) == ("already_exists", "id")
    assert await refused(world.admin.create_app("", "app_new")) == ("invalid_field", "name")
    assert await refused(world.admin.create_app("Odd", "no/slash")) == ("invalid_field", "id")
    assert len(await world.rows("SELECT * FROM apps")) == 1
    # The app that was there still opens its secrets.
    await world.add_user("alice")
    assert (await world.auth.authenticate(await world.token("alice"))).actor.user == "alice"


async def test_two_apps_share_nothing(world: World) -> None:
    other = await world.admin.create_app("Other")
    context = await world.apps.get(other.app_id)
    actor = Actor(context, None, EVERYTHING, "key:other")
    [key] = await world.admin.list_api_keys(actor)
    assert key.id == other.api_key_id
    assert await refused(world.admin.revoke_api_key(actor, world.new.api_key_id)) == ("not_found", None)
    assert await refused(world.admin.retire_signing_key(actor, world.new.signing_kid)) == ("not_found", None)
    await world.admin.put_role(actor, "app", "nurse", ["user.read"])
    assert "nurse" not in (await world.app()).app_roles


async def test_settings_hold_for_the_next_request(world: World) -> None:
    settings = AppSettings(token_leeway_seconds=0)
    shown = await world.admin.update_app(await world.backend(), AppUpdate(name="Clinic 2", settings=settings))
    assert (shown.name, shown.settings) == ("Clinic 2", settings)
    assert await world.admin.get_app(await world.backend("app.read")) == shown


# ---------------------------------------------------------------- API keys


async def test_a_key_is_shown_once_and_listed_without_its_secret(world: World) -> None:
    backend = await world.backend()
    made = await world.admin.create_api_key(backend, ApiKeyCreate(name="billing", scopes=["app.read", "app.read"]))
    assert made.secret is not None
    assert made.secret.startswith(f"tk_{made.id}_")
    listed = {key.name: key for key in await world.admin.list_api_keys(backend)}
    assert (listed["billing"].scopes, listed["billing"].secret) == (["app.read"], None)
    await world.admin.revoke_api_key(backend, made.id)
    listed = {key.name: key for key in await world.admin.list_api_keys(backend)}
    assert listed["billing"].revoked_at == time_of(NOW)


async def test_no_key_makes_a_wider_one(world: World) -> None:
    narrow = await world.backend("key.manage", "app.read")
    for scopes in (["*"], ["app.read", "audit.read"]):
        body = ApiKeyCreate(name="wide", scopes=scopes)
        assert await refused(world.admin.create_api_key(narrow, body)) == ("forbidden", "scopes")
    await world.admin.create_api_key(narrow, ApiKeyCreate(name="as wide", scopes=["app.read"]))
    with pytest.raises(Forbidden):
        await world.admin.create_api_key(await world.backend("app.read"), ApiKeyCreate(name="x", scopes=["app.read"]))
    # A signing key or a provider lets in anybody: that takes more than looking after keys.
    with pytest.raises(Forbidden):
        await world.admin.create_signing_key(narrow, SigningKeyCreate(algorithm="HS256"))
    with pytest.raises(Forbidden):
        await world.admin.create_provider(narrow, IdentityProviderCreate(jwks_url="https://idp.example.com/keys"))


async def test_wrong_words_are_named_with_their_place_and_a_guess(world: World) -> None:
    body = ApiKeyCreate(name="typo", scopes=["app.read", "mesage.send"])
    with pytest.raises(Refusal) as caught:
        await world.admin.create_api_key(await world.backend(), body)
    assert caught.value.field == "scopes[1]"
    assert "message.send?" in caught.value.detail


async def test_keys_are_bounded_and_revoking_makes_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "API_KEYS_MAX", 2)
    backend = await world.backend()
    second = await world.admin.create_api_key(backend, ApiKeyCreate(name="second"))
    assert await refused(world.admin.create_api_key(backend, ApiKeyCreate(name="third"))) == ("bound_exceeded", None)
    await world.admin.revoke_api_key(backend, second.id)
    await world.admin.create_api_key(backend, ApiKeyCreate(name="third"))
    past = ApiKeyCreate(name="late", expires_at=time_of(NOW))
    assert await refused(world.admin.create_api_key(backend, past)) == ("invalid_field", "expires_at")


# ---------------------------------------------------------------- signing keys, identity providers


async def test_signing_keys_must_suit_their_algorithm(world: World) -> None:
    backend = await world.backend()
    create = world.admin.create_signing_key
    assert await refused(create(backend, SigningKeyCreate(algorithm="RS256"))) == ("invalid_field", "public_key")
    wrong = SigningKeyCreate(algorithm="RS256", public_key="not a key")
    assert await refused(create(backend, wrong)) == ("invalid_field", "public_key")
    both = SigningKeyCreate(algorithm="ES256", public_key="x", secret="s" * 32)
    assert await refused(create(backend, both)) == ("invalid_field", "secret")
    twice = SigningKeyCreate(algorithm="HS256", kid=world.new.signing_kid)
    assert await refused(create(backend, twice)) == ("already_exists", "kid")
    given = await create(backend, SigningKeyCreate(algorithm="HS256", kid="own", secret="0123456789abcdef" * 2))
    assert given.secret is None
    listed = {key.kid: key for key in await world.admin.list_signing_keys(backend)}
    assert (listed["own"].status, listed["own"].secret) == ("active", None)


async def test_providers_urls_lead_outside_or_to_listed_hosts(world: World) -> None:
    backend = await world.backend()
    for url in ("http://idp.example.com/keys", "https://127.0.0.1/keys", "https://169.254.169.254/x", "ftp://x/y"):
        body = IdentityProviderCreate(jwks_url=url)
        assert await refused(world.admin.create_provider(backend, body)) == ("invalid_field", "jwks_url")
    made = await world.admin.create_provider(backend, IdentityProviderCreate(jwks_url="http://idp.internal/keys"))
    assert await world.admin.list_providers(backend) == [made]
    assert len((await world.app()).providers) == 1
    await world.admin.delete_provider(backend, made.id)
    assert (await world.app()).providers == ()
    assert await refused(world.admin.delete_provider(backend, made.id)) == ("not_found", None)


# ---------------------------------------------------------------- roles


async def test_a_role_is_put_in_place_of_a_built_in_one_and_taken_away_again(world: World) -> None:
    backend = await world.backend()
    await world.add_user("alice")
    token = await world.token("alice")
    built_in = (await world.auth.authenticate(token)).actor.grants
    await world.admin.put_role(backend, "app", "user", ["user.read", "user.read"])
    assert (await world.auth.authenticate(token)).actor.grants == (await world.app()).app_roles["user"] != built_in
    shown = {(role.scope, role.name): role for role in await world.admin.list_roles(backend)}
    assert (shown["app", "user"].grants, shown["app", "user"].built_in) == (["user.read"], False)
    assert shown["channel", "member"].built_in
    await world.admin.delete_role(backend, "app", "user")
    assert (await world.auth.authenticate(token)).actor.grants == built_in
    assert await refused(world.admin.delete_role(backend, "app", "user")) == ("not_found", None)


async def test_roles_in_channels_hold_only_channels_words(world: World) -> None:
    backend = await world.backend()
    for scope in ("channel", "relation"):
        for word in ("audit.read", "*"):
            put = world.admin.put_role(backend, scope, "x", ["channel.read", word])  # type: ignore[arg-type]
            assert await refused(put) == ("invalid_field", "grants[1]")
    await world.admin.put_role(backend, "app", "all", ["*"])
    assert (await world.app()).app_roles["all"] == EVERYTHING


async def test_nobody_grants_a_role_what_they_lack(world: World) -> None:
    backend = await world.backend()
    await world.add_user("root", "admin")
    root = await world.acting("root")
    # An administrator does not read messages, and cannot make a role that does.
    assert await refused(world.admin.put_role(root, "app", "spy", ["channel.read"])) == ("forbidden", "grants")
    assert await refused(world.admin.put_role(root, "relation", "spy", ["channel.read"])) == ("forbidden", "grants")
    await world.admin.put_role(root, "app", "lookout", ["audit.read", "app.read"])
    # What others gave may stay, and be taken away.
    await world.admin.put_role(backend, "app", "helper", ["channel.read", "message.send"])
    await world.admin.put_role(root, "app", "helper", ["channel.read"])
    assert await refused(world.admin.put_role(root, "app", "helper", ["message.send"])) == ("forbidden", "grants")
    # Nor can they bring back a built-in role that others have narrowed.
    await world.admin.put_role(backend, "channel", "member", ["member.read"])
    assert await refused(world.admin.delete_role(root, "channel", "member")) == ("forbidden", "name")


# ---------------------------------------------------------------- channel types


async def test_types_are_checked_and_built_in_ones_stay(world: World) -> None:
    backend = await world.backend()
    put = world.admin.put_type
    assert await refused(put(backend, "direct", ChannelTypePut())) == ("conflict", "name")
    assert await refused(world.admin.delete_type(backend, "group")) == ("conflict", "name")
    unknown = ChannelTypePut(default_role="patient")
    assert await refused(put(backend, "visit", unknown)) == ("invalid_field", "default_role")
    wrong = ChannelTypePut(grants={"patient": ["channel.read", "audit.read"]})
    assert await refused(put(backend, "visit", wrong)) == ("invalid_field", "grants.patient[1]")
    made = await put(
        backend, "visit", ChannelTypePut(grants={"patient": ["channel.read"]}, default_role="patient", public=True)
    )
    assert await world.admin.get_type(backend, "visit") == made
    assert [type.name for type in await world.admin.list_types(backend)] == ["direct", "group", "public", "visit"]
    assert (await world.app()).types["visit"].grants["patient"]
    await world.admin.delete_type(backend, "visit")
    assert await refused(world.admin.get_type(backend, "visit")) == ("not_found", None)


async def test_types_that_are_in_use_and_roles_that_types_give_stay(world: World) -> None:
    backend = await world.backend()
    await world.admin.put_role(backend, "channel", "patient", ["channel.read"])
    await world.admin.put_type(backend, "visit", ChannelTypePut(default_role="patient"))
    assert (await refused(world.admin.delete_role(backend, "channel", "patient")))[0] == "conflict"
    app = backend.app.app
    await world.write("INSERT INTO channels(app,id,sid,type,created_at,updated_at) VALUES (?,'c1',1,'visit',0,0)", app)
    assert (await refused(world.admin.delete_type(backend, "visit")))[0] == "conflict"


async def test_a_type_opens_nothing_that_its_maker_may_not_see(world: World) -> None:
    backend, root = await world.backend(), await world.backend("app.update", "member.read")
    put = world.admin.put_type
    assert await refused(put(root, "open", ChannelTypePut(public=True))) == ("forbidden", "public")
    wide = ChannelTypePut(grants={"reader": ["channel.read", "message.send"]})
    assert await refused(put(root, "open", wide)) == ("forbidden", "grants.reader")
    await put(backend, "visit", ChannelTypePut(history="since_join", grants={"member": ["member.read"]}))
    assert await refused(put(root, "visit", ChannelTypePut(history="since_join"))) == ("forbidden", "grants.member")
    narrowed = ChannelTypePut(history="all", grants={"member": ["member.read"]})
    assert await refused(put(root, "visit", narrowed)) == ("forbidden", "history")


# ---------------------------------------------------------------- relations


async def test_a_relation_opens_the_channels_of_the_other_and_ending_it_closes_them(world: World) -> None:
    backend = await world.backend()
    for user in ("doctor", "patient"):
        await world.add_user(user)
    await world.channels.create(backend, ChannelCreate(id="c1", members=["patient"]))
    doctor = await world.acting("doctor")
    assert await refused(world.access.channel(doctor, "c1", P.CHANNEL_READ)) == ("not_found", "channel")
    relation = Relation(kind="panel", user="doctor", other="patient")
    await world.admin.put_relation(backend, relation)
    await world.admin.put_relation(backend, relation)
    await world.access.channel(doctor, "c1", P.MESSAGE_SEND)
    assert await world.admin.list_relations(backend, user="doctor") == ([relation], None)
    told = [notice for notice in world.notices if isinstance(notice, AccessChanged)]
    assert told[-1] == AccessChanged(backend.app.app, user="doctor"), "nobody else is concerned"
    await world.admin.delete_relation(backend, relation)
    assert await refused(world.access.channel(doctor, "c1", P.CHANNEL_READ)) == ("not_found", "channel")
    assert await refused(world.admin.delete_relation(backend, relation)) == ("not_found", None)
    actions = [entry.action for entry in (await world.admin.audit(backend, target="user:doctor"))[0]]
    assert actions == ["relation.deleted", "relation.put"]


async def test_relations_are_between_people_who_exist_in_words_that_their_maker_holds(world: World) -> None:
    await world.add_user("root", "admin")
    await world.add_user("patient")
    backend, root = await world.backend(), await world.acting("root")
    put = world.admin.put_relation
    assert await refused(put(backend, Relation(kind="aunt", user="root", other="patient"))) == ("invalid_field", "kind")
    assert await refused(put(backend, Relation(kind="panel", user="root", other="x"))) == ("not_found", "other")
    assert await refused(put(backend, Relation(kind="panel", user="x", other="root"))) == ("not_found", "user")
    assert await refused(put(backend, Relation(kind="panel", user="root", other="root"))) == ("invalid_field", "other")
    # An administrator who reads no messages does not put themselves onto a panel.
    assert await refused(put(root, Relation(kind="panel", user="root", other="patient"))) == ("forbidden", "kind")


async def test_long_lists_come_in_pages_and_cursors_fit_one_list(world: World) -> None:
    backend = await world.backend()
    await world.add_user("doctor")
    for number in range(5):
        await world.add_user(f"p{number}")
        await world.admin.put_relation(backend, Relation(kind="panel", user="doctor", other=f"p{number}"))
    found, cursor = await world.admin.list_relations(backend, limit=2)
    while cursor is not None:
        page, cursor = await world.admin.list_relations(backend, limit=2, cursor=cursor)
        found += page
    assert [relation.other for relation in found] == ["p0", "p1", "p2", "p3", "p4"]
    _, cursor = await world.admin.list_relations(backend, limit=2)
    assert await refused(world.admin.audit(backend, cursor=cursor)) == ("cursor_invalid", "cursor")


# ---------------------------------------------------------------- the audit trail


async def test_every_change_is_in_the_trail_in_pages_newest_first(world: World) -> None:
    backend = await world.backend()
    await world.admin.put_role(backend, "app", "nurse", ["user.read"])
    world.clock.advance(1)
    made = await world.admin.create_api_key(backend, ApiKeyCreate(name="x"))
    world.clock.advance(1)
    await world.admin.revoke_api_key(backend, made.id)
    found, cursor = await world.admin.audit(backend, limit=1)
    while cursor is not None:
        page, cursor = await world.admin.audit(backend, limit=1, cursor=cursor)
        found += page
    assert [entry.action for entry in found] == ["key.revoked", "key.created", "role.put", "app.created"]
    assert {entry.actor for entry in found} == {"key:test", "cli"}
    [entry] = (await world.admin.audit(backend, action="role.put"))[0]
    assert (entry.target, entry.detail) == ("role:app/nurse", {"grants": ["user.read"]})
    [entry] = (await world.admin.audit(backend, since_ms=NOW + 1000, until_ms=NOW + 2000))[0]
    assert entry.action == "key.created"
    with pytest.raises(Forbidden):
        await world.admin.audit(await world.backend("app.read"))


async def test_a_refused_change_leaves_no_line_and_a_key_for_a_user_names_both(world: World) -> None:
    await world.add_user("root", "admin")
    root = await world.acting("root")
    lines = await world.rows("SELECT COUNT(*) FROM audit")
    await refused(world.admin.put_role(root, "app", "spy", ["channel.read"]))
    assert await world.rows("SELECT COUNT(*) FROM audit") == lines
    await world.admin.put_role(root, "app", "clerk", ["user.read"])
    [entry] = (await world.admin.audit(await world.backend(), action="role.put"))[0]
    assert (entry.actor, entry.detail["for_user"]) == (f"key:{world.new.api_key_id}", "root")


CALLS = {
    "get_app": lambda a, w: a.get_app(w),
    "update_app": lambda a, w: a.update_app(w, AppUpdate(name="x")),
    "list_api_keys": lambda a, w: a.list_api_keys(w),
    "revoke_api_key": lambda a, w: a.revoke_api_key(w, "x"),
    "list_signing_keys": lambda a, w: a.list_signing_keys(w),
    "create_signing_key": lambda a, w: a.create_signing_key(w, SigningKeyCreate(algorithm="HS256")),
    "retire_signing_key": lambda a, w: a.retire_signing_key(w, "x"),
    "list_providers": lambda a, w: a.list_providers(w),
    "delete_provider": lambda a, w: a.delete_provider(w, "x"),
    "list_roles": lambda a, w: a.list_roles(w),
    "put_role": lambda a, w: a.put_role(w, "app", "x", []),
    "delete_role": lambda a, w: a.delete_role(w, "app", "x"),
    "put_type": lambda a, w: a.put_type(w, "x", ChannelTypePut()),
    "delete_type": lambda a, w: a.delete_type(w, "x"),
    "put_relation": lambda a, w: a.put_relation(w, Relation(kind="panel", user="x", other="y")),
    "delete_relation": lambda a, w: a.delete_relation(w, Relation(kind="panel", user="x", other="y")),
    "list_relations": lambda a, w: a.list_relations(w),
    "audit": lambda a, w: a.audit(w),
}


@pytest.mark.parametrize("call", CALLS)
async def test_ordinary_users_administer_nothing(world: World, call: str) -> None:
    await world.add_user("alice")
    alice = await world.acting("alice")
    with pytest.raises(Forbidden):
        await CALLS[call](world.admin, alice)
