"""The door: which credentials let whom in, and what it costs."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.services.admin_world import World, open_world
from tidings.server.domain.permissions import EVERYTHING
from tidings.server.errors import Forbidden, Refusal


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
    assert await refused(world, await world.token("ghost")) == "user_unknown"
    assert world.ensured == []


async def test_an_unknown_app_looks_like_an_unknown_key(world: World) -> None:
    token = await world.token("alice")
    assert await refused(world, token, app_hint="app_other") == "token_key_unknown"
