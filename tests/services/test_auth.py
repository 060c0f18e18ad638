"""The door: which credentials let whom in, and what it costs."""

from collections.abc import AsyncIterator
from pathlib import Path

import jwt
import pytest

from tests.services.admin_world import NOW, World, open_world
from tidings.server.bus.base import Revoked
from tidings.server.domain.permissions import EVERYTHING, grants_of
from tidings.server.errors import Forbidden, NotFound, Refusal
from tidings.server.services.auth import RECHECK_BATCH
from tidings.wire.ids import time_of
from tidings.wire.requests import ApiKeyCreate, AppUpdate, SigningKeyCreate, UserUpdate
from tidings.wire.resources import AppSettings


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        yield opened


async def refused(world: World, credential: str, **more: str) -> str:
    with pytest.raises(Refusal) as caught:
        await world.auth.authenticate(credential, **more)
    return caught.value.code


async def test_an_api_key_is_the_apps_backend(world: World) -> None:
    who = await world.auth.authenticate(world.key)
    assert (who.actor.app.id, who.actor.user, who.actor.grants) == ("app_clinic", None, EVERYTHING)
    assert who.actor.via == f"key:{world.new.api_key_id}"


async def test_a_users_token_is_the_user_with_their_roles_grants(world: World) -> None:
    await world.add_user("alice", "guest")
    who = await world.auth.authenticate(await world.token("alice"), device="phone", session="s1")
    assert (who.actor.user, who.actor.device, who.actor.session) == ("alice", "phone", "s1")
    assert who.actor.grants == (await world.app()).app_roles["guest"]
    assert who.actor.via == "user:alice"


async def test_a_backend_acts_for_a_user_with_that_users_grants(world: World) -> None:
    await world.add_user("alice")
    who = await world.auth.authenticate(world.key, on_behalf_of="alice")
    assert who.actor.user == "alice"
    assert who.actor.grants == (await world.app()).app_roles["user"]
    assert who.actor.via == f"key:{world.new.api_key_id}"


async def test_whoever_is_known_comes_in_without_a_read(world: World) -> None:
    await world.add_user("alice")
    token = await world.token("alice", jti="j1")
    assert world.auth.authenticate_now(token) is None
    await world.auth.authenticate(token)
    await world.auth.authenticate(world.key)
    reads = world.store.reads
    assert world.auth.authenticate_now(token) is not None
    assert world.auth.authenticate_now(world.key) is not None
    assert await world.auth.authenticate(world.key, on_behalf_of="alice") is not None
    assert world.store.reads == reads


async def test_wrong_keys_are_refused_alike(world: World) -> None:
    assert await refused(world, world.key[:-1] + ("A" if world.key[-1] != "A" else "B")) == "key_invalid"
    assert await refused(world, "tk_" + "a" * 26 + "_" + "b" * 43) == "key_invalid"
    assert await refused(world, "tk_nonsense") == "key_invalid"
    assert await refused(world, world.key, app_hint="app_other") == "key_invalid"


async def test_nobody_acts_for_unknown_users_or_through_a_token(world: World) -> None:
    assert await refused(world, world.key, on_behalf_of="ghost") == "user_unknown"
    await world.add_user("alice")
    with pytest.raises(Forbidden):
        await world.auth.authenticate(await world.token("alice"), on_behalf_of="ghost")


async def test_unknown_users_are_refused_unless_the_app_creates_them(world: World) -> None:
    token = await world.token("ghost")
    assert await refused(world, token) == "user_unknown"
    settings = AppSettings(create_users_on_connect=True)
    await world.admin.update_app(await world.backend(), AppUpdate(settings=settings))
    assert (await world.auth.authenticate(token)).actor.user == "ghost"


async def test_deleted_and_deactivated_users_stay_out(world: World) -> None:
    backend = await world.backend()
    settings = AppSettings(create_users_on_connect=True)
    await world.admin.update_app(backend, AppUpdate(settings=settings))
    await world.add_user("alice")
    await world.add_user("bob")
    alice, bob = await world.token("alice"), await world.token("bob")
    before = await world.auth.authenticate(alice)
    await world.auth.authenticate(bob)
    await world.users.deactivate(backend, "alice")
    await world.users.delete(backend, "bob")
    assert await refused(world, alice) == "user_deactivated"
    assert await refused(world, world.key, on_behalf_of="alice") == "user_deactivated"
    assert await refused(world, bob) == "user_unknown"
    with pytest.raises(Refusal, match="user_deactivated"):
        await world.auth.refresh(before.actor)


async def test_a_key_lets_in_only_as_long_as_it_is_valid(world: World) -> None:
    backend = await world.backend()
    until = time_of(NOW + 60_000)
    made = await world.admin.create_api_key(backend, ApiKeyCreate(name="short", scopes=["app.read"], expires_at=until))
    assert made.secret is not None
    who = await world.auth.authenticate(made.secret)
    assert who.actor.grants == grants_of({"app.read"})
    assert who.expires_at_ms == NOW + 60_000
    with pytest.raises(Forbidden):
        await world.auth.authenticate(made.secret, on_behalf_of="alice")
    world.clock.advance(60)
    assert await refused(world, made.secret) == "key_invalid"
    with pytest.raises(Refusal, match="key_invalid"):
        await world.auth.refresh(who.actor)


async def test_a_revoked_key_is_refused_at_once(world: World) -> None:
    other = await world.admin.create_api_key(await world.backend(), ApiKeyCreate(name="other"))
    assert other.secret is not None
    who = await world.auth.authenticate(other.secret)
    await world.admin.revoke_api_key(await world.backend(), other.id)
    assert await refused(world, other.secret) == "key_invalid"
    with pytest.raises(Refusal, match="key_invalid"):
        await world.auth.refresh(who.actor)
    assert (await world.auth.authenticate(world.key)).actor.user is None


async def test_the_last_use_of_a_key_is_written_once_a_minute(world: World) -> None:
    async def last_used() -> object:
        await world.auth.close()
        return (await world.rows("SELECT last_used_at FROM api_keys"))[0][0]

    await world.auth.authenticate(world.key)
    assert await last_used() == NOW
    world.clock.advance(59)
    await world.auth.authenticate(world.key)
    assert await last_used() == NOW
    world.clock.advance(1)
    await world.auth.authenticate(world.key)
    assert await last_used() == NOW + 60_000


async def test_revoking_ends_every_token_until_now_and_none_after(world: World) -> None:
    await world.add_user("alice")
    backend = await world.backend()
    old = (await world.auth.mint(backend, "alice", 3600)).token
    who = await world.auth.authenticate(old)
    await world.auth.revoke(backend, "alice")
    assert await refused(world, old) == "token_revoked"
    # Within the same second: the app's own tokens cannot be told from old ones, ours are dated past the mark.
    assert await refused(world, await world.token("alice")) == "token_revoked"
    again = (await world.auth.mint(backend, "alice", 3600)).token
    await world.auth.authenticate(again)
    await world.auth.revoke(backend, "alice")
    assert await refused(world, again) == "token_revoked"
    world.clock.advance(2)
    assert (await world.auth.authenticate(await world.token("alice"))).actor.user == "alice"
    told = [notice for notice in world.notices if isinstance(notice, Revoked)]
    assert [(notice.user, notice.code) for notice in told] == [("alice", "token_revoked")] * 2
    assert told[0].before_ms is not None
    assert told[0].before_ms > (who.issued_at_ms or 0)


async def test_one_token_can_be_revoked_by_its_jti(world: World) -> None:
    await world.add_user("alice")
    await world.add_user("bob")
    backend = await world.backend()
    one, two = await world.token("alice", jti="j1"), await world.token("alice", jti="j2")
    bobs = await world.token("bob", jti="j1")
    who = await world.auth.authenticate(one)
    await world.auth.revoke(backend, "alice", "j1")
    # Somebody else makes the door learn alice's row anew, without looking at the token's mark.
    await world.auth.authenticate(world.key, on_behalf_of="alice")
    assert await refused(world, one) == "token_revoked"
    with pytest.raises(Refusal, match="token_revoked"):
        await world.auth.recheck(who)
    assert (await world.auth.authenticate(two)).jti == "j2"
    assert (await world.auth.authenticate(bobs)).actor.user == "bob"


async def test_many_are_looked_at_together_and_each_gets_their_own_answer(world: World) -> None:
    backend = await world.backend()
    users = ["fine", "all", "one", "off", "gone", *(f"more{n}" for n in range(RECHECK_BATCH))]
    asking = []
    for user in users:
        await world.add_user(user)
        asking.append(await world.auth.authenticate(await world.token(user, jti="j1")))
    asking.append(await world.auth.authenticate(await world.token("one", jti="j2")))
    asking.append(await world.auth.authenticate(world.key))
    asking.append(await world.auth.authenticate(world.key, on_behalf_of="off"))
    await world.auth.revoke(backend, "all")
    await world.auth.revoke(backend, "one", "j1")
    await world.users.deactivate(backend, "off")
    await world.users.delete(backend, "gone")
    world.auth.forget_all()
    world.apps.forget_all()
    reads = world.store.reads
    found = await world.auth.recheck_all(asking)
    # The app, the key, and two batches.
    assert world.store.reads - reads <= 4
    codes = [answer.code if isinstance(answer, Refusal) else None for answer in found]
    assert codes[:5] == [None, "token_revoked", "token_revoked", "user_deactivated", "user_unknown"]
    assert codes[5:] == [None] * (RECHECK_BATCH + 2) + ["user_deactivated"]
    assert [answer.actor.user for answer in found if not isinstance(answer, Refusal)][:2] == ["fine", "more0"]


async def test_people_revoke_their_own_tokens_and_nobody_elses(world: World) -> None:
    await world.add_user("alice", "guest")
    await world.add_user("bob")
    alice = await world.acting("alice")
    with pytest.raises(Forbidden):
        await world.auth.revoke(alice, "bob")
    await world.auth.revoke(alice, "alice")
    with pytest.raises(NotFound):
        await world.auth.revoke(await world.backend(), "ghost")


async def test_a_token_without_iat_is_void_once_its_user_has_a_mark(world: World) -> None:
    await world.add_user("alice")
    claims = {"app": "app_clinic", "sub": "alice", "exp": NOW // 1000 + 3600}
    token = jwt.encode(claims, world.new.signing_secret, "HS256", headers={"kid": world.new.signing_kid})
    await world.auth.authenticate(token)
    await world.auth.revoke(await world.backend(), "alice")
    world.clock.advance(5)
    assert await refused(world, token) == "token_revoked"
    with_jti = jwt.encode({**claims, "jti": "x"}, world.new.signing_secret, "HS256")
    assert await refused(world, with_jti) == "token_claims"


async def test_a_retired_signing_key_lets_nobody_in_and_its_successor_does(world: World) -> None:
    await world.add_user("alice")
    backend = await world.backend()
    old = await world.token("alice")
    who = await world.auth.authenticate(old)
    made = await world.admin.create_signing_key(backend, SigningKeyCreate(algorithm="HS256"))
    world.clock.advance(1)
    assert (await world.auth.authenticate(old)).key_id == world.new.signing_kid
    await world.admin.retire_signing_key(backend, world.new.signing_kid)
    assert await refused(world, old) == "token_key_unknown"
    with pytest.raises(Refusal, match="token_key_unknown"):
        await world.auth.recheck(who)
    minted = await world.auth.mint(backend, "alice", 60)
    assert (await world.auth.authenticate(minted.token)).key_id == made.kid


async def test_minting_keeps_to_the_apps_bounds(world: World) -> None:
    await world.add_user("alice")
    settings = AppSettings(token_ttl_seconds_max=600)
    await world.admin.update_app(await world.backend(), AppUpdate(settings=settings))
    backend = await world.backend()
    with pytest.raises(Refusal) as caught:
        await world.auth.mint(backend, "alice", 601)
    assert (caught.value.field, caught.value.bound) == ("ttl_seconds", 600)
    with pytest.raises(NotFound):
        await world.auth.mint(backend, "ghost", 60)
    with pytest.raises(Forbidden):
        await world.auth.mint(await world.backend("app.read"), "alice", 60)


async def test_a_change_of_role_is_seen_by_the_next_request(world: World) -> None:
    await world.add_user("alice")
    token = await world.token("alice")
    before = await world.auth.authenticate(token)
    await world.users.update(await world.backend(), "alice", UserUpdate(role="guest"))
    after = await world.auth.authenticate(token)
    assert after.actor.grants == (await world.app()).app_roles["guest"] != before.actor.grants
    assert (await world.auth.refresh(before.actor)).grants == after.actor.grants


async def test_what_another_process_wrote_is_seen_after_forgetting(world: World) -> None:
    await world.add_user("alice")
    token = await world.token("alice")
    await world.auth.authenticate(token)
    await world.auth.authenticate(world.key)
    await world.write("UPDATE users SET deactivated_at=1")
    await world.write("UPDATE api_keys SET revoked_at=1")
    world.auth.forget_all()
    assert await refused(world, token) == "user_deactivated"
    assert await refused(world, world.key) == "key_invalid"


async def test_secrets_are_not_stored_as_they_are(world: World, tmp_path: Path) -> None:
    secret = world.new.api_key.split("_", 2)[2]
    for path in tmp_path.glob("tidings.db*"):
        content = path.read_bytes()
        assert secret.encode() not in content
        assert world.new.signing_secret.encode() not in content
    assert secret not in repr(world.new)


async def test_an_unknown_app_looks_like_an_unknown_key(world: World) -> None:
    token = await world.token("alice")
    assert await refused(world, token, app_hint="app_other") == "token_key_unknown"
