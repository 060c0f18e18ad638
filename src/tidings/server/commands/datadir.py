"""Who uses a data directory: an advisory lock that one server holds for its life, and the mark of a broken-off restore.

Commands that go through SQLite need no lock: SQLite has its own, and a running server notices what others commit. The
lock is for what SQLite cannot see: a second server with caches of its own, or files replaced under a running one.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tidings.server.errors import TidingsError

SERVER_LOCK: Final = "server.lock"
# One rotation at a time: two would each retire what the other still needs.
ROTATION_LOCK: Final = "rotation.lock"
# Shared by commands that seal something; held alone by whoever must know that nobody is about to.
COMMANDS_LOCK: Final = "commands.lock"
# Stands while a restore exchanges the database; holds the name of the directory that the old one was moved to.
RESTORING: Final = "restore.unfinished"
# The note in a lock is one line; more is not ours.
NOTE_BYTES_MAX: Final = 512


class DataDirInUse(TidingsError):
    """Another process holds the lock."""


class RestoreUnfinished(TidingsError):
    """A restore was interrupted between taking the old database away and putting the new one in its place."""


@contextmanager
def hold(data_dir: Path, note: str, *, lock: str = SERVER_LOCK) -> Iterator[None]:
    """Hold a lock of the data directory, making the directory if there is none. It ends with the process.

    `note` tells whoever is refused who is there. Raises DataDirInUse, OSError.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not truncated before it is ours: the note in it belongs to whoever holds it.
    fd = os.open(data_dir / lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = os.pread(fd, NOTE_BYTES_MAX, 0).decode(errors="replace").strip() or "another process"
            raise DataDirInUse(f"{data_dir} is in use by {held}.") from None
        os.ftruncate(fd, 0)
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        os.pwrite(fd, f"{note}, pid {os.getpid()}, since {since}\n".encode(), 0)
        try:
            yield
        finally:
            # The file stays: removing it would let a third process lock another file of the same name.
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


@contextmanager
def share(data_dir: Path) -> Iterator[None]:
    """Say that this process works on the data: a key that it may be about to use is not taken away meanwhile.

    Waits for whoever holds the lock alone, which takes as long as rotating a key without a server. Raises OSError.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(data_dir / COMMANDS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


@contextmanager
def alone(data_dir: Path, note: str) -> Iterator[bool]:
    """Whether no server and no other command has the data open; if so, none can open it until this ends."""
    with ExitStack() as held:
        try:
            held.enter_context(hold(data_dir, note))
            held.enter_context(hold(data_dir, note, lock=COMMANDS_LOCK))
        except DataDirInUse:
            held.close()
            yield False
            return
        yield True


def check_restored(data_dir: Path) -> None:
    """Refuse a data directory whose database was being exchanged when the restore ended. Raises RestoreUnfinished."""
    try:
        moved_to = (data_dir / RESTORING).read_text().strip()
    except FileNotFoundError:
        return
    raise RestoreUnfinished(
        f"A restore into {data_dir} was interrupted: run the same `tidings restore` again. What was there before is in "
        f"{data_dir / moved_to}."
    )


def fsync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_private(path: Path) -> bool:
    """Whether only its owner can use the file."""
    return not stat.S_IMODE(path.stat().st_mode) & 0o077
