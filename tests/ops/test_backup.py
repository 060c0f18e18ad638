"""Backups are whole and taken while the server runs; a restore is noticed by every client."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.ops.conftest import Place, furnish, send, texts, tidings
from tidings.client import Client, HistoryReset, MessageCreated
from tidings.server.commands import backup as subject
from tidings.server.commands.datadir import RestoreUnfinished, check_restored


async def test_a_backup_under_load_holds_everything_acknowledged_before_it(place: Place, tmp_path: Path) -> None:
    await place.server.start()
    await furnish(place)
    sent: list[str] = []
    enough = asyncio.Event()

    async def write() -> None:
        async with place.rest("alice") as rest:
            while True:
                text = f"message {len(sent)}"
                await send(rest, text, f"k{len(sent)}")
                sent.append(text)
                if len(sent) == 20:
                    enough.set()

    writing = asyncio.create_task(write())
    await asyncio.wait_for(enough.wait(), 30)
    before = len(sent)
    done = await tidings("backup", tmp_path / "b", "--verify", "--data-dir", place.data)
    after = len(sent)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    assert (done.status, after > before) == (0, True), done.err
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["manifest.json", "tidings.db"]
    assert {(path.stat().st_mode & 0o777) for path in (tmp_path / "b").iterdir()} == {0o600}

    await place.server.terminate()
    done = await tidings("restore", tmp_path / "b", "--data-dir", place.data, "--force")
    assert done.status == 0, done.err
    await place.server.start()
    async with place.rest("alice") as rest:
        restored = await texts(rest)
    assert restored[:before] == sent[:before]
    assert restored == [f"message {number}" for number in range(len(restored))]


async def test_the_key_file_is_left_out_unless_asked_for(place: Place, tmp_path: Path) -> None:
    done = await tidings("backup", tmp_path / "b", "--include-keys", "--data-dir", place.data)
    assert (done.status, (tmp_path / "b" / "root.key").read_bytes()) == (0, (place.data / "root.key").read_bytes())
    assert "guard this copy" in done.err
    elsewhere = tmp_path / "elsewhere"
    done = await tidings("restore", tmp_path / "b", "--data-dir", elsewhere)
    assert (done.status, (elsewhere / "root.key").read_bytes()) == (0, (place.data / "root.key").read_bytes())

    assert "root.key" not in {path.name for path in _backup(place, tmp_path / "without").iterdir()}
    done = await tidings("restore", tmp_path / "without", "--data-dir", tmp_path / "third")
    assert (done.status, "needs root key rk_" in done.err) == (1, True)
    assert not (tmp_path / "third" / "tidings.db").exists()


def _backup(place: Place, at: Path) -> Path:
    subject.make_backup(place.config, at)
    return at


async def test_nothing_is_overwritten(place: Place, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    done = await tidings("backup", tmp_path / "b", "--data-dir", place.data)
    assert (done.status, "exists already" in done.err, list((tmp_path / "b").iterdir())) == (1, True, [])
    backup = _backup(place, tmp_path / "b2")
    database = (place.data / "tidings.db").read_bytes()
    done = await tidings("restore", backup, "--data-dir", place.data)
    assert (done.status, "--force" in done.err) == (1, True)
    assert (place.data / "tidings.db").read_bytes() == database
    done = await tidings("restore", backup, "--data-dir", place.data, "--force")
    assert done.status == 0, done.err
    (aside,) = place.data.glob("before-restore-*")
    assert (aside / "tidings.db").read_bytes() == database


async def test_no_restore_under_a_running_server(place: Place, tmp_path: Path) -> None:
    backup = _backup(place, tmp_path / "b")
    await place.server.start()
    done = await tidings("restore", backup, "--data-dir", place.data, "--force")
    assert (done.status, f"in use by a server at {place.server.url}" in done.err) == (1, True)
    assert place.server.running


async def test_after_a_restore_a_client_with_cursors_starts_over(place: Place, tmp_path: Path) -> None:
    await place.server.start()
    await furnish(place)
    async with place.rest("alice") as alice, place.rest() as rest:
        await send(alice, "before", "k1")
        token = (await rest.users.token("bob")).token

        def bob() -> Client:
            return Client(place.server.url, token=token, device="d", store=tmp_path / "bob.db", start="all")

        async with bob() as client:
            events = client.events("c1")
            await client.wait_connected(20)
            assert (await tidings("backup", tmp_path / "b", "--data-dir", place.data)).status == 0
            await send(alice, "after", "k2")
            async with asyncio.timeout(20):
                async for event in events:
                    if isinstance(event, MessageCreated) and event.message.text == "after":
                        seen = event.seq
                        break
    await place.server.terminate()
    done = await tidings("restore", tmp_path / "b", "--data-dir", place.data, "--force")
    assert (done.status, "epoch_changed" in done.err) == (0, True), done.err
    await place.server.start()
    # Nothing has been written since: only the restore itself can tell a client with a mark that there is something new.
    async with bob() as client, asyncio.timeout(20):
        async for event in client.events("c1"):
            if isinstance(event, HistoryReset):
                assert event.reason == "epoch_changed"
                break
            assert not isinstance(event, MessageCreated)
        # The number that "after" had is given out again, for another message.
        async with place.rest("alice") as alice:
            assert await send(alice, "instead", "k3") == seen
        page = await client.channel("c1").page()
    assert [message.text for message in page.messages] == ["before", "instead"]


async def test_a_backup_that_was_changed_is_refused(place: Place, tmp_path: Path) -> None:
    backup = _backup(place, tmp_path / "b")
    content = bytearray((backup / "tidings.db").read_bytes())
    content[len(content) // 2] ^= 1
    (backup / "tidings.db").write_bytes(content)
    with pytest.raises(subject.BackupFailed, match="checksum"):
        subject.restore_backup(place.config, backup, force=True)
    assert sorted(path.name for path in place.data.glob("tidings.db*restor*")) == []
    (backup / "manifest.json").write_text("{}")
    with pytest.raises(subject.BackupFailed, match="malformed"):
        subject.restore_backup(place.config, backup, force=True)


async def test_verifying_notices_rows_that_do_not_open(place: Place, tmp_path: Path) -> None:
    with closing(sqlite3.connect(place.data / "tidings.db")) as connection, connection:
        ((sealed,),) = connection.execute("SELECT sealed FROM signing_keys").fetchall()
        connection.execute("UPDATE signing_keys SET sealed=?", (sealed[:-1] + bytes([sealed[-1] ^ 1]),))
    done = await tidings("backup", tmp_path / "b", "--verify", "--data-dir", place.data)
    assert (done.status, "does not open" in done.err, (tmp_path / "b").exists()) == (1, True, False)
    assert not list(tmp_path.glob(".b*"))


async def test_an_interrupted_exchange_is_finished_by_the_next_run(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = _backup(place, tmp_path / "b")
    original = (place.data / "tidings.db").read_bytes()
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "tidings.db.restoring":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        subject.restore_backup(place.config, backup, force=True)
    monkeypatch.undo()
    with pytest.raises(RestoreUnfinished, match="run the same"):
        check_restored(place.data)
    done = await tidings("serve", "--port", "0", "--data-dir", place.data)
    assert (done.status, "was interrupted" in done.err) == (1, True)
    subject.restore_backup(place.config, backup)
    check_restored(place.data)
    kept = [path.read_bytes() for path in place.data.glob("before-restore-*/tidings.db")]
    assert original in kept
    await place.server.start()


async def test_every_stream_gets_another_epoch(place: Place, tmp_path: Path) -> None:
    await place.server.start()
    await furnish(place)
    await place.server.terminate()

    def streams() -> dict[int, tuple[str, int]]:
        with closing(sqlite3.connect(place.data / "tidings.db")) as connection:
            rows = connection.execute("SELECT sid, epoch, head FROM streams")
            return {sid: (epoch, head) for sid, epoch, head in rows}

    before = streams()
    backup = _backup(place, tmp_path / "b")
    assert json.loads((backup / "manifest.json").read_text())["schema_revision"]
    done = subject.restore_backup(place.config, backup, force=True)
    after = streams()
    assert done.streams == len(before) == 3
    assert {sid: head for sid, (_, head) in after.items()} == {sid: head for sid, (_, head) in before.items()}
    assert not {epoch for epoch, _ in after.values()} & {epoch for epoch, _ in before.values()}
    assert len({epoch for epoch, _ in after.values()}) == 3
