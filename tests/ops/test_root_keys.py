"""A new root key reaches nodes that each have a key file of their own, while all of them read and write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import postgres
from tidings.server.app import Core, open_core
from tidings.server.config import Config
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.domain.permissions import EVERYTHING
from tidings.server.services.access import Actor
from tidings.wire.requests import UserCreate

from .conftest import Done, Place, tidings


async def _backend(core: Core, app: str) -> Actor:
    return Actor(await core.services.apps.get(app), None, EVERYTHING, "key:test")


async def _all_work(cores: list[Core], made: list[str]) -> None:
    """Every node makes an app and a user in it, and every node reads everything afresh, as if it had just started."""
    for core in cores:
        number = len(made)
        made.append(f"app_{number}")
        await core.services.admin.create_app(f"Number {number}", made[-1])
        await core.services.users.create(await _backend(core, made[-1]), UserCreate(id="ann", name=f"Ann {number}"))
    for core in cores:
        core.services.access.forget_all()
        core.services.apps.forget_all()
        for number, app in enumerate(made):
            found = await core.services.users.get(await _backend(core, app), "ann")
            assert found.name == f"Ann {number}"


async def test_a_new_root_key_goes_round_while_every_node_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three commands on one node, and the file copied after each: every node is at work before and after each copy."""
    url = await postgres.fresh_database()
    monkeypatch.setenv("TIDINGS_STORE", url)
    monkeypatch.setenv("TIDINGS_ALLOW_UNSAFE_STORE", "true")
    here, there = tmp_path / "a", tmp_path / "b"
    here.mkdir(mode=0o700)
    there.mkdir(mode=0o700)
    (before,) = KeyFile(here / "root.key").kids()
    shutil.copy2(here / "root.key", there / "root.key")

    async def keys(*command: str) -> Done:
        return await tidings("keys", *command, "--data-dir", here)

    async with (
        open_core(Config(data_dir=here, store=url, allow_unsafe_store=True)) as a,
        open_core(Config(data_dir=there, store=url, allow_unsafe_store=True)) as b,
    ):
        made: list[str] = []
        await _all_work([a, b], made)
        refused = await keys("rotate-root")
        assert (refused.status, "tidings keys prepare-root" in refused.err) == (1, True), refused.err
        assert KeyFile(here / "root.key").kids() == (before,)

        for command in ("prepare-root", "rotate-root"):
            done = await keys(command)
            assert done.status == 0, done.err
            await _all_work([a, b], made)
            shutil.copy2(here / "root.key", there / "root.key")
            await _all_work([a, b], made)
        # The other node wrapped with the old key before it got the file: this shows, and is mended.
        refused = await keys("retire-root")
        assert (refused.status, f"still wrapped by {before}" in refused.err) == (1, True), refused.err
        for command in ("rotate-root", "retire-root"):
            done = await keys(command)
            assert done.status == 0, done.err
        await _all_work([a, b], made)
        shutil.copy2(here / "root.key", there / "root.key")
        await _all_work([a, b], made)
    listed = json.loads((await keys("list", "--json")).out)
    assert [(key["state"], key["wraps"]) for key in listed["root_keys"]] == [("current", 2 * len(made))]
    assert listed["root_keys"][0]["id"] != before


async def test_a_prepared_key_wraps_nothing_and_is_made_once(place: Place) -> None:
    (before,) = KeyFile(place.data / "root.key").kids()
    for _ in range(2):
        done = await tidings("keys", "prepare-root", "--data-dir", place.data)
        assert done.status == 0, done.err
    root = KeyFile(place.data / "root.key")
    assert (root.kids(), root.current_kid, root.prepared_kid()) == ((before, root.kids()[1]), before, root.kids()[1])
    assert f"The root key {root.prepared_kid()} is in" in done.err
    listed = json.loads((await tidings("keys", "list", "--json", "--data-dir", place.data)).out)
    assert [(key["state"], key["wraps"]) for key in listed["root_keys"]] == [("current", 2), ("prepared", 0)]
    # There is nothing old to take away, and a prepared key is not that.
    done = await tidings("keys", "retire-root", "--data-dir", place.data)
    assert (done.status, "There is no old root key" in done.err) == (0, True), done.err
    prepared = root.prepared_kid()
    done = await tidings("keys", "rotate-root", "--data-dir", place.data)
    assert done.status == 0, done.err
    assert KeyFile(place.data / "root.key").kids() == (prepared,)


async def test_where_all_read_one_file_a_rotation_over_postgresql_is_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await postgres.fresh_database()
    monkeypatch.setenv("TIDINGS_STORE", url)
    monkeypatch.setenv("TIDINGS_ALLOW_UNSAFE_STORE", "true")
    async with open_core(Config(data_dir=tmp_path / "a", store=url, allow_unsafe_store=True)) as core:
        made: list[str] = []
        await _all_work([core], made)
        (before,) = KeyFile(tmp_path / "a" / "root.key").kids()
        done = await tidings("keys", "rotate-root", "--one-file", "--data-dir", tmp_path / "a")
        assert (done.status, f"Removed from {tmp_path}/a/root.key: {before}" in done.err.replace("\n", "")) == (0, True)
        await _all_work([core], made)
