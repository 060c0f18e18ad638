"""The root key file: made once, readable by its owner only, never half written, and clear about what is wrong."""

import base64
import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tidings.server.crypto import keyfile
from tidings.server.crypto.base import RootKeyMissing, RootKeyProvider, Tampered, Wrapped
from tidings.server.crypto.keyfile import KeyFile, KeyFileError

AAD = b"app_clinic"
PLAIN = b"k" * 32

# Waits for a line on stdin so that all processes are past their imports when the race begins.
STARTER = """
import sys
from pathlib import Path
from tidings.server.crypto.keyfile import KeyFile
print("ready", flush=True)
sys.stdin.readline()
root = KeyFile(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    print(root.add_version(), flush=True)
sealed = root.wrap(b"k" * 32, b"app_clinic")
print(sealed.kid, sealed.box.hex(), flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "root.key"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def race(path: Path, *, processes: int, rotations: int) -> list[list[str]]:
    """Start real processes that use `path` at the same moment; gives back the lines each printed."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(path), str(rotations)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = [process.communicate(timeout=60)[0].splitlines() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * processes
    return lines


class TestFirstRun:
    def test_it_makes_one_key_for_its_owner_only_and_leaves_no_temporary_file(self, path: Path) -> None:
        before = os.umask(0)
        try:
            root = KeyFile(path, now=lambda: datetime(2026, 1, 31, 9, 30, tzinfo=UTC))
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()} == {
            "root.key": 0o600,
            "root.key.lock": 0o600,
        }
        document = json.loads(path.read_text())
        [(kid, version)] = document["keys"].items()
        assert document["current"] == kid == root.current_kid
        assert root.kids() == (kid,)
        assert version["created"] == "2026-01-31T09:30:00Z"
        assert len(base64.b64decode(version["key"], validate=True)) == 32

    def test_a_second_start_finds_the_same_key(self, path: Path) -> None:
        sealed = KeyFile(path).wrap(PLAIN, AAD)
        assert KeyFile(path).unwrap(sealed, AAD) == PLAIN

    def test_the_directory_is_made_for_its_owner_only(self, tmp_path: Path) -> None:
        KeyFile(tmp_path / "data" / "root.key")
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700

    def test_processes_that_start_at_once_end_with_the_same_key(self, tmp_path: Path) -> None:
        for attempt in range(3):
            path = tmp_path / f"{attempt}.key"
            lines = race(path, processes=3, rotations=0)
            root = KeyFile(path, create=False)
            assert len(root.kids()) == 1
            for line in lines:
                kid, box = line[-1].split()
                assert root.unwrap(Wrapped(kid=kid, box=bytes.fromhex(box)), AAD) == PLAIN

    def test_where_there_is_data_a_missing_file_is_not_replaced(self, path: Path) -> None:
        with pytest.raises(KeyFileError, match="does not exist: put back the one that belongs to this data"):
            KeyFile(path, create=False)
        assert not path.exists()

    def test_a_crash_while_writing_leaves_the_old_file_whole(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = KeyFile(path)
        before = path.read_bytes()

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        for step in ("fsync", "rename"):
            with monkeypatch.context() as broken:
                broken.setattr(os, step, fail)
                with pytest.raises(KeyFileError, match=r"cannot write the key file .*No space left"):
                    root.add_version()
            assert path.read_bytes() == before
            assert not list(path.parent.glob("*.tmp"))

    def test_the_file_and_then_its_directory_are_synced(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The order that makes it survive a power cut: content, name, directory."""
        steps: list[str] = []
        fsync, rename = os.fsync, os.rename

        def watched_fsync(fd: int) -> None:
            steps.append("sync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
            fsync(fd)

        def watched_rename(source: Path, target: Path) -> None:
            steps.append("rename")
            rename(source, target)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "rename", watched_rename)
        KeyFile(path)
        assert steps == ["sync file", "rename", "sync directory"]


class TestRefusals:
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o620, 0o610])
    def test_a_file_open_to_others_is_refused_with_the_command_that_helps(self, path: Path, mode: int) -> None:
        KeyFile(path)
        path.chmod(mode)
        with pytest.raises(KeyFileError, match=f"mode {mode:04o}.*`chmod 600 {path}`"):
            KeyFile(path)
        path.chmod(0o600)
        KeyFile(path)

    def test_read_only_for_the_owner_is_fine(self, path: Path) -> None:
        KeyFile(path)
        path.chmod(0o400)
        KeyFile(path)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda d: d.pop("current"), "`current`"),
            (lambda d: d.update(current="rk_other"), "`current` names 'rk_other'"),
            (lambda d: d.update(current=5), r"\$\.current"),
            (lambda d: d.update(format="something"), r"\$\.format"),
            (lambda d: d.update(version=2), r"\$\.version"),
            (lambda d: d.update(surprise=1), "`surprise`"),
            (lambda d: d.update(keys=[]), r"\$\.keys"),
            (lambda d: d["keys"][d["current"]].pop("key"), "`key`"),
            (lambda d: d["keys"][d["current"]].update(created="yesterday"), r"\$\.keys\[\.\.\.\]\.created"),
            (lambda d: d["keys"][d["current"]].update(key="!"), r"`keys\.rk_\w+\.key` is not base64"),
            (lambda d: d["keys"][d["current"]].update(key="AAAA"), r"`keys\.rk_\w+\.key` has 3 bytes instead of 32"),
        ],
    )
    def test_a_malformed_file_is_refused_naming_the_field_and_showing_no_key(
        self, path: Path, change: Callable[[dict[str, Any]], object], named: str
    ) -> None:
        root = KeyFile(path)
        key = json.loads(path.read_text())["keys"][root.current_kid]["key"]
        rewrite(path, change)
        with pytest.raises(KeyFileError, match=f"root.key is malformed: .*{named}") as refusal:
            KeyFile(path)
        assert key not in str(refusal.value)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": "\xff"}', b"SQLite format 3\0"])
    def test_something_else_in_its_place_is_refused(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyFileError, match="malformed"):
            KeyFile(path)
        assert path.read_bytes() == content

    def test_a_huge_file_a_directory_and_a_pipe_are_refused(self, tmp_path: Path) -> None:
        huge, directory, pipe = (tmp_path / name for name in ("huge", "directory", "pipe"))
        huge.write_bytes(b" " * (keyfile.KEY_FILE_BYTES_MAX + 1))
        huge.chmod(0o600)
        directory.mkdir(mode=0o700)
        os.mkfifo(pipe, 0o600)
        for path, wrong in ((huge, "larger than"), (directory, "not a regular file"), (pipe, "not a regular file")):
            with pytest.raises(KeyFileError, match=wrong):
                KeyFile(path)

    def test_a_changed_box_or_another_aad_is_refused(self, path: Path) -> None:
        root = KeyFile(path)
        sealed = root.wrap(PLAIN, AAD)
        with pytest.raises(Tampered):
            root.unwrap(sealed, b"app_other")
        for cut in range(len(sealed.box)):
            with pytest.raises(Tampered):
                root.unwrap(Wrapped(kid=sealed.kid, box=sealed.box[:cut]), AAD)
        for bit in range(8 * len(sealed.box)):
            changed = bytearray(sealed.box)
            changed[bit // 8] ^= 1 << (bit % 8)
            with pytest.raises(Tampered):
                root.unwrap(Wrapped(kid=sealed.kid, box=bytes(changed)), AAD)


class TestVersions:
    def test_a_new_version_seals_and_the_old_ones_still_open(self, path: Path) -> None:
        root: RootKeyProvider = KeyFile(path)
        old = root.wrap(PLAIN, AAD)
        kid = root.add_version()
        new = root.wrap(PLAIN, AAD)
        assert root.current_kid == new.kid == kid != old.kid
        assert root.kids() == (old.kid, kid)
        assert root.unwrap(old, AAD) == root.unwrap(new, AAD) == PLAIN

    def test_a_box_does_not_open_under_another_version(self, path: Path) -> None:
        root = KeyFile(path)
        old = root.wrap(PLAIN, AAD)
        with pytest.raises(Tampered):
            root.unwrap(Wrapped(kid=root.add_version(), box=old.box), AAD)

    def test_what_another_process_added_is_found(self, path: Path) -> None:
        server, command = KeyFile(path), KeyFile(path)
        kid = command.add_version()
        assert server.unwrap(command.wrap(PLAIN, AAD), AAD) == PLAIN
        assert server.current_kid == server.wrap(PLAIN, AAD).kid == kid

    def test_nothing_new_is_sealed_by_a_version_that_another_process_replaced(self, path: Path) -> None:
        """Else the key would be lost when that version is retired after everything stored was rewrapped."""
        server, command = KeyFile(path), KeyFile(path)
        kid = command.add_version()
        assert server.wrap(PLAIN, AAD).kid == kid

    def test_rotations_in_several_processes_at_once_lose_no_version(self, path: Path) -> None:
        KeyFile(path)
        lines = race(path, processes=3, rotations=5)
        root = KeyFile(path)
        added = [line for output in lines for line in output[:-1]]
        assert len(root.kids()) == 16
        assert set(added) <= set(root.kids())
        for output in lines:
            kid, box = output[-1].split()
            assert root.unwrap(Wrapped(kid=kid, box=bytes.fromhex(box)), AAD) == PLAIN

    def test_a_retired_version_is_gone_and_the_error_says_what_is_held(self, path: Path) -> None:
        root = KeyFile(path)
        old = root.wrap(PLAIN, AAD)
        kid = root.add_version()
        root.retire(old.kid)
        assert root.kids() == (kid,)
        assert old.kid not in path.read_text()
        with pytest.raises(RootKeyMissing, match=rf"{old.kid} is not in .*it holds {kid}.*put back") as missing:
            root.unwrap(old, AAD)
        assert missing.value.kid == old.kid

    def test_the_current_version_and_an_unknown_one_cannot_be_retired(self, path: Path) -> None:
        root = KeyFile(path)
        root.add_version()
        with pytest.raises(KeyFileError, match="rotate first"):
            root.retire(root.current_kid)
        with pytest.raises(KeyFileError, match="no root key rk_other"):
            root.retire("rk_other")
        assert len(root.kids()) == 2

    def test_a_running_server_keeps_opening_when_the_file_vanishes(self, path: Path) -> None:
        root = KeyFile(path)
        sealed = root.wrap(PLAIN, AAD)
        path.unlink()
        assert root.unwrap(sealed, AAD) == PLAIN
        with pytest.raises(KeyFileError, match="does not exist"):
            root.wrap(PLAIN, AAD)
        with pytest.raises(KeyFileError, match="does not exist"):
            root.add_version()

    def test_a_symbolic_link_stays_one_through_a_rotation(self, tmp_path: Path) -> None:
        real, link = tmp_path / "real.key", tmp_path / "link.key"
        KeyFile(real)
        link.symlink_to(real)
        kid = KeyFile(link).add_version()
        assert link.is_symlink()
        assert KeyFile(real).current_kid == kid

    def test_a_writer_that_does_not_let_go_is_reported(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = KeyFile(path)
        monkeypatch.setattr(keyfile, "LOCK_WAIT_SECONDS_MAX", 0.05)
        with open(path.with_name("root.key.lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(KeyFileError, match="another process has held"):
                root.add_version()
        root.add_version()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_a_rotation_by_root_leaves_the_file_to_the_account_that_owns_it(self, path: Path) -> None:
        root = KeyFile(path)
        path.with_name("root.key.lock").unlink()
        os.chown(path, 65534, 65534)
        root.add_version()
        for name in ("root.key", "root.key.lock"):
            assert path.with_name(name).stat().st_uid == 65534
            assert stat.S_IMODE(path.with_name(name).stat().st_mode) == 0o600
