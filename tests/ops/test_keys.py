"""Keys change while the server reads and sends; interrupted rotations are finished; nothing needed is taken away."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.ops.conftest import Place, furnish, start_tidings, texts, tidings
from tidings.server.app import Core, open_core
from tidings.server.clock import Ids, ManualClock, SystemClock
from tidings.server.crypto.base import RootKeyMissing
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.permissions import EVERYTHING
from tidings.server.services.access import Actor
from tidings.server.services.messages import Draft
from tidings.server.services.rotation import RETIRE_AFTER_MS, Rotation, Told
from tidings.wire.commands import DeviceInfo
from tidings.wire.requests import ChannelCreate, UserCreate, UserUpdate


def rows(place: Place, sql: str, *args: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(place.data / "tidings.db")) as connection:
        return connection.execute(sql, args).fetchall()


def rotation(place: Place, core: Core, clock: SystemClock | ManualClock | None = None) -> Rotation:
    """As another process would have it: with keys of its own in memory."""
    root = KeyFile(place.data / "root.key", create=False)
    clock = clock or SystemClock()
    return Rotation(core.services.store, Keyring(root), root, clock, Ids(clock))


async def backend(core: Core) -> Actor:
    return Actor(await core.services.apps.get("app_clinic"), None, EVERYTHING, "key:test")


def versions(place: Place) -> list[int]:
    return [version for (version,) in rows(place, "SELECT version FROM app_keys WHERE purpose='data' ORDER BY 1")]


def behind(place: Place, version: int) -> int:
    """How much still stands under another version."""
    count = rows(place, "SELECT COUNT(*) FROM streams WHERE key_app_version<>?", version)[0][0]
    for table in ("users", "devices", "signing_keys"):
        sql = f"SELECT COUNT(*) FROM {table} WHERE sealed IS NOT NULL AND substr(sealed,2,2)<>?"
        count += rows(place, sql, version.to_bytes(2))[0][0]
    return int(count)


async def test_keys_rotate_under_load_without_a_failed_read_or_send(place: Place) -> None:
    """Services in this process write and read all the time while other processes rotate both kinds of keys."""
    async with open_core(place.config) as core:
        services, actor = core.services, await backend(core)
        for user in ("alice", "bob"):
            await services.users.create(actor, UserCreate(id=user, name=f"{user} the first"))
        await services.channels.create(actor, ChannelCreate(id="c1", members=["alice", "bob"]))
        alice = Actor(actor.app, "alice", actor.app.app_roles["user"], "user:alice")
        first = await services.messages.send(alice, "c1", Draft(text="hello"), "first")
        sent: list[str] = []
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                number = len(sent)
                app = (await backend(core)).app
                await services.messages.send(alice, "c1", Draft(text=f"m{number}"), f"k{number}")
                sent.append(f"m{number}")
                await services.users.update(actor, "alice", UserUpdate(name=f"Alice {number}"))
                assert (await services.users.get(actor, "alice")).name == f"Alice {number}"
                await services.users.create(actor, UserCreate(id=f"u{number}", name=f"User {number}"))
                await services.users.register_devices(app, [("bob", DeviceInfo(id=f"d{number % 5}", name="Phone"))])
                assert all(device.name == "Phone" for device in await services.users.devices(actor, "bob"))
                await services.channels.create(actor, ChannelCreate(id=f"c-{number}", members=["alice"], name="n"))
                # A few dozen changes a second are load enough, and leave the other process its half of the machine.
                await asyncio.sleep(0.01)  # why: bounds the load
                # As the running server does once a second when another process has written.
                if number % 10 == 9 and await services.store.changed_elsewhere():
                    services.access.forget_all()
                    services.apps.forget_all()
                    services.auth.forget_all()

        writing = asyncio.create_task(write())
        for command in ("rotate-app --all", "rotate-root", "rotate-app --all"):
            done = await tidings("keys", *command.split(), "--data-dir", place.data)
            assert done.status == 0, done.err
            assert not writing.done() or writing.result() is None
        stop.set()
        await writing
        # The fingerprint behind the key is still the same: the retry stores nothing.
        again = await services.messages.send(alice, "c1", Draft(text="hello"), "first")
        assert (again.message_id, again.duplicate) == (first.message_id, True)
    assert len(sent) > 10
    done = await tidings("keys", "rotate-app", "--all", "--data-dir", place.data)
    assert (done.status, behind(place, versions(place)[-1]), len(versions(place))) == (0, 0, 1), done.err
    await place.server.start()
    async with place.rest("alice") as rest:
        assert await texts(rest) == ["hello", *sent]
    async with place.rest() as rest:
        assert (await rest.users.get("u3")).name == "User 3"


async def _many_streams(place: Place, count: int) -> None:
    async with open_core(place.config) as core:
        actor = await backend(core)
        await asyncio.gather(
            *(core.services.users.create(actor, UserCreate(id=f"u{n}", name=f"User {n}")) for n in range(count))
        )


async def test_a_killed_rotation_goes_on_where_it_stopped(place: Place) -> None:
    await _many_streams(place, 3_000)
    process = await start_tidings("keys", "rotate-app", "app_clinic", "--data-dir", place.data)
    async with asyncio.timeout(40):
        while not rows(place, "SELECT 1 FROM streams WHERE key_app_version=2 LIMIT 1"):
            assert process.returncode is None
            await asyncio.sleep(0.001)  # why: between two looks at the condition
    process.kill()
    await process.wait()
    assert behind(place, 2) > 0
    listed = json.loads((await tidings("keys", "list", "--json", "--data-dir", place.data)).out)
    assert listed["apps"][0]["rotating"] is True
    # The rest can be read by a server meanwhile, under either key.
    async with open_core(place.config) as core:
        actor = await backend(core)
        for user in ("u0", "u2999"):
            assert (await core.services.users.get(actor, user)).name == f"User {user[1:]}"
    done = await tidings("keys", "rotate-app", "app_clinic", "--data-dir", place.data)
    assert (done.status, "Finished the interrupted rotation" in done.err) == (0, True), done.err
    assert (versions(place), behind(place, 2)) == ([2], 0)
    async with open_core(place.config) as core:
        assert (await core.services.users.get(await backend(core), "u1500")).name == "User 1500"


async def test_the_old_key_stays_while_a_server_might_use_it(place: Place) -> None:
    await place.server.start()
    await furnish(place)
    done = await tidings("keys", "rotate-app", "--all", "--data-dir", place.data)
    assert (done.status, versions(place), behind(place, 2)) == (0, [1, 2], 0), done.err
    assert "keys retire" in done.err
    done = await tidings("keys", "retire", "--all", "--data-dir", place.data)
    assert (done.status, versions(place)) == (0, [1, 2])
    await place.server.terminate()
    done = await tidings("keys", "retire", "--all", "--data-dir", place.data)
    assert (done.status, versions(place)) == (0, [2])
    await place.server.start()
    async with place.rest() as rest:
        assert (await rest.users.get("alice")).name == "Alice Roe"


async def test_an_hour_later_it_goes_although_a_server_runs_but_never_while_needed(place: Place) -> None:
    async with open_core(place.config) as core:
        actor = await backend(core)
        clock = ManualClock(1_900_000_000_000)
        other = rotation(place, core, clock)
        await other.rotate_app("app_clinic", alone=False)
        # Sealed by a server that has not noticed yet: its keyring still holds version 1 only.
        await core.services.users.create(actor, UserCreate(id="late", name="Late"))
        clock.advance(RETIRE_AFTER_MS / 1000)
        assert await other.retire("app_clinic", alone=False) == ((), (1,))
        again = await rotation(place, core, clock).rotate_app("app_clinic", alone=False)
        assert (again.version, again.retired) == (3, ())
        clock.advance(RETIRE_AFTER_MS / 1000)
        assert await other.retire("app_clinic", alone=False) == ((1, 2), ())
        assert (await core.services.users.get(actor, "late")).name == "Late"


async def test_the_old_root_key_is_removed_when_nothing_is_wrapped_by_it(place: Place, tmp_path: Path) -> None:
    (before,) = KeyFile(place.data / "root.key").kids()
    kept = (place.data / "root.key").read_bytes()
    assert (await tidings("backup", tmp_path / "b", "--data-dir", place.data)).status == 0
    await place.server.start()
    await furnish(place)
    done = await tidings("keys", "rotate-root", "--data-dir", place.data)
    assert (done.status, before in done.err) == (0, True), done.err
    (after,) = KeyFile(place.data / "root.key").kids()
    assert after != before
    assert {kid for (kid,) in rows(place, "SELECT root_kid FROM app_keys")} == {after}
    async with place.rest() as rest:
        await rest.users.create("carol", name="Carol")
    await place.server.restart(graceful=True)
    async with place.rest() as rest:
        assert (await rest.users.get("carol")).name == "Carol"
    await place.server.terminate()
    done = await tidings("restore", tmp_path / "b", "--data-dir", place.data, "--force")
    assert (done.status, f"needs root key {before}" in done.err) == (1, True)
    (place.data / "root.key").write_bytes(kept)
    assert (await tidings("restore", tmp_path / "b", "--data-dir", place.data, "--force")).status == 0


async def test_the_old_root_key_can_be_kept(place: Place) -> None:
    (before,) = KeyFile(place.data / "root.key").kids()
    done = await tidings("keys", "rotate-root", "--keep-old", "--data-dir", place.data)
    assert done.status == 0, done.err
    assert len(KeyFile(place.data / "root.key").kids()) == 2
    listed = json.loads((await tidings("keys", "list", "--json", "--data-dir", place.data)).out)
    assert [(key["current"], key["wraps"]) for key in listed["root_keys"]] == [(False, 0), (True, 2)]
    assert before == listed["root_keys"][0]["id"]


async def test_a_root_rotation_that_died_is_finished_and_not_begun_anew(place: Place) -> None:
    KeyFile(place.data / "root.key").add_version()
    current = KeyFile(place.data / "root.key").current_kid
    done = await tidings("keys", "rotate-root", "--data-dir", place.data)
    assert (done.status, "Finished the interrupted" in done.err) == (0, True), done.err
    assert KeyFile(place.data / "root.key").kids() == (current,)
    assert {kid for (kid,) in rows(place, "SELECT root_kid FROM app_keys")} == {current}


async def test_an_app_made_while_its_root_key_is_retired_is_refused_rather_than_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_core(place.config) as core:
        real = core.keyring.new_index_key

        def slow(app_id: str) -> Any:
            made = real(app_id)
            root = KeyFile(place.data / "root.key")
            old = root.current_kid
            root.add_version()
            root.retire(old)
            return made

        monkeypatch.setattr(core.keyring, "new_index_key", slow)
        with pytest.raises(RootKeyMissing, match="try again"):
            await core.services.admin.create_app("Unlucky", "app_2")
    assert rows(place, "SELECT id FROM apps") == [("app_clinic",)]


async def test_progress_is_told_and_two_rotations_exclude_each_other(place: Place) -> None:
    told: list[tuple[str, int, int]] = []
    async with open_core(place.config) as core:
        await rotation(place, core).rotate_app(
            "app_clinic", alone=True, told=Told(lambda what, done, total: told.append((what, done, total)))
        )
    assert ("app_clinic: signing keys", 1, 1) in told
    from tidings.server.commands.datadir import ROTATION_LOCK, hold

    with hold(place.data, "a rotation of keys", lock=ROTATION_LOCK):
        done = await tidings("keys", "rotate-app", "--all", "--data-dir", place.data)
    assert (done.status, "in use by a rotation of keys" in done.err) == (1, True)
    done = await tidings("keys", "rotate-app", "--data-dir", place.data)
    assert (done.status, "Name one app, or say --all" in done.err) == (1, True)


async def test_a_key_file_for_several_nodes_is_made_once_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    done = await tidings("keys", "create", path)
    assert done.status == 0, done.err
    made = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert KeyFile(path, create=False).current_kid in done.err
    again = await tidings("keys", "create", path)
    assert (again.status, path.read_bytes()) == (1, made)
    assert "exists already" in again.err
