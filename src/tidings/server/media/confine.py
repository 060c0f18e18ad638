"""What a process that reads strangers' files gives away before it reads the first byte. Linux; for one thread.

Two kinds of measures. `bounds` holds everywhere: time, memory, no file written, no core, no new privileges, gone when
its parent is. `isolate` takes what this kernel offers: no network (an empty namespace, or at least no sockets), no
files but programs and libraries (Landlock), none of the calls with which other processes are read. Each is tried by
itself, and a kernel or container that refuses one is no error: `isolate` tells what holds.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["bounds", "die_with", "isolate"]

# Standard streams, the file, libraries, and the pipes of one tool at a time.
OPEN_FILES_MAX: Final = 64
# Of 0 (as everybody) to 19: previews wait for the server, never the other way round.
NICENESS: Final = 10

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWIPC: Final = 0x08000000

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> bool:
    """Whether it succeeded. The kernel reads whole words, and wants those that mean nothing to be 0."""
    words = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return bool(_libc.prctl(ctypes.c_int(option), *words) == 0)


def die_with(parent: int) -> None:
    """Be killed when `parent`, the process that has started this one, ends. Exits at once where it already has."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def bounds(*, cpu_seconds: int, memory_bytes: int) -> None:
    """Take the bounds that every Linux has. None of them can be lifted again, and what is started inherits them."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    os.nice(NICENESS)
    # Where the machine runs out of memory, this process ends and not the server.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # The soft limit says SIGXCPU, which tells the parent why; the hard one is for a process that ignores it.
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES_MAX)
    # Results go through a pipe: nothing is written to a disk.
    _limit(resource.RLIMIT_FSIZE, 0)


def isolate(readable: Sequence[str] = (), *, tools: bool = False, threads: bool = False) -> frozenset[str]:
    """Cut off network, files and other processes, as far as the kernel lets; the names of what holds.

    Files beneath `readable`, the system's programs and libraries and this Python stay readable, and nothing is
    writable. Without `tools` no program is started any more; without `threads` either, no thread and no process (where
    this one is not root's, whom that limit does not bind).
    """
    holds = set()
    if not (tools or threads):
        _limit(resource.RLIMIT_NPROC, 0)
    # With a user namespace of its own anybody may have a network namespace; else only root may.
    everything = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
    if _libc.unshare(everything) == 0 or _libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC) == 0:
        holds.add("network")
    if _landlock([*_SYSTEM, *_python_folders(), *readable]):
        holds.add("files")
    if _seccomp(programs=tools):
        holds.add("calls")
    return frozenset(holds)


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit; one that is lower already stays."""
    _, ceiling = resource.getrlimit(which)
    wanted = soft if hard is None else hard
    top = wanted if ceiling == resource.RLIM_INFINITY else min(wanted, ceiling)
    resource.setrlimit(which, (min(soft, top), top))


# --- files: https://docs.kernel.org/userspace-api/landlock.html -----------------------------------

# Programs, libraries and fonts.
_SYSTEM: Final = (
    *("/usr", "/lib", "/lib64", "/bin", "/nix/store"),
    *("/etc/ld.so.cache", "/etc/fonts", "/dev/null", "/dev/urandom"),
)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Rights of files that each version of the interface knows, as a mask of the lowest bits.
_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NET_RIGHTS: Final = 0b11
_SCOPES: Final = 0b11


def _python_folders() -> list[str]:
    """Where this interpreter, its packages and this package are: something may be imported late."""
    own = str(Path(__file__).resolve().parents[3])
    folders = [sys.prefix, sys.base_prefix, own, *(path for path in sys.path if path.endswith("-packages"))]
    return [folder for folder in folders if folder not in {"", "/"}]


def _landlock(readable: Sequence[str]) -> bool:
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << _RIGHTS[min(version, 5)]) - 1
    attributes = struct.pack("QQQ", files, _NET_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    length = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _libc.syscall(_LANDLOCK_CREATE, attributes, length, 0)
    if rules < 0:
        return False
    try:
        for path in readable:
            try:
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                rights = _EXECUTE | _READ_FILE | (_READ_DIR if Path(path).is_dir() else 0)
                # A memfd needs no rule and takes none; for anything else a missing rule only means less.
                _libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, handle), 0)
            finally:
                os.close(handle)
        return bool(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0)
    finally:
        os.close(rules)


# --- calls ----------------------------------------------------------------------------------------

# By machine: the word that the kernel has for it, and the numbers of what nothing here needs: sockets, memory of other
# processes, keys of the kernel, programs in the kernel, mounts, and io_uring, which would go around this filter.
_MACHINES: Final = {
    "x86_64": (0xC000003E, (41, 53, 101, 155, 165, 248, 249, 250, 298, 310, 311, 321, 323, 425, 426, 427, 434, 438)),
    "aarch64": (0xC00000B7, (198, 199, 117, 41, 40, 217, 218, 219, 241, 270, 271, 280, 282, 425, 426, 427, 434, 438)),
}
# And those that start a program.
_STARTING: Final = {"x86_64": (59, 322), "aarch64": (221, 281)}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
# Numbers of the x32 interface begin here: the same calls by another name.
_X32: Final = 0x40000000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(*, programs: bool) -> bool:
    machine = platform.machine() if sys.maxsize > 2**32 else ""
    if machine not in _MACHINES:
        return False
    audit, useless = _MACHINES[machine]
    refused = useless if programs else (*useless, *_STARTING[machine])
    # Offset 4 of what the filter sees is the machine, offset 0 the number. A jump counts from the next instruction.
    count = len(refused)
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, count + 3, audit),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, count + 1, 0, _X32),
        *((_EQUAL, count - at, 0, number) for at, number in enumerate(refused)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    program = _Program(len(steps), code)
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))
