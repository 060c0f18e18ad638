"""A disk whose power can be cut: what was not flushed to it is gone, as when a machine goes dark.

An ext4 file system on a loop device, shut down with `EXT4_IOC_SHUTDOWN` without flushing its log (`fs/ext4/ext4.h`, the
way of the kernel's own xfstests): from that moment on nothing more is written, and what programs had written but not
synced is lost. After `mend` it is mounted again, which replays the journal as after a real cut.

Linux, root, loop devices and mkfs.ext4 are needed: `why_not` says which of them is missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

# _IOR('X', 125, __u32), and its argument: do not even flush the journal.
EXT4_IOC_SHUTDOWN: Final = 0x8004587D
NO_LOG_FLUSH: Final = 2
# Enough for a database's own files and a few seconds of messages.
MEBIBYTES: Final = 384
# A file system is busy until the last process that had a file open is gone.
UNMOUNT_SECONDS: Final = 20.0


def why_not() -> str:
    """Why disks cannot be cut here; empty where they can."""
    if os.geteuid() != 0:
        return "cutting a disk's power needs root"
    for program in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"{program} is missing (Debian: e2fsprogs, mount)"
    try:
        with Disk():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        return f"no loop device can be mounted here: {said.decode(errors='replace').strip()}"


class Disk:
    """A file system of its own at `path`. Blocking; leaves nothing behind."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tidings-disk-"))
        # Open to the account that PostgreSQL runs under.
        self._folder.chmod(0o755)
        self._image = self._folder / "image"
        self.path = self._folder / "mounted"

    def __enter__(self) -> Self:
        try:
            with self._image.open("wb") as image:
                image.truncate(MEBIBYTES * 1024 * 1024)
            _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
            self.path.mkdir()
            self._mount()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.path.ismount(self.path):
            # Whatever still holds a file keeps it; it is out of everybody's way.
            _run("umount", "--lazy", str(self.path))
        shutil.rmtree(self._folder, ignore_errors=True)

    def settle(self) -> None:
        """Everything that was written until now is on the disk, as on a machine that has been on for a while."""
        _run("sync", "--file-system", str(self.path))

    def cut(self) -> None:
        """Cut the power: nothing reaches the disk from here on."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def mend(self) -> None:
        """The power is back: mounted again as it was at the cut. Whoever used it must have ended."""
        deadline = time.monotonic() + UNMOUNT_SECONDS
        while True:
            try:
                _run("umount", str(self.path))
                break
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # why: the pace of a loop that looks at a condition
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.path))


def _run(program: str, *arguments: str) -> None:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    subprocess.run([program, *arguments], check=True, capture_output=True, env=environment)
