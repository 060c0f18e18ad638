"""A child that a file has taken over, or that a file has sent into the woods: started in place of the real one.

`python hostile.py WHAT [ARGUMENT]`, with the job on its standard input as the real one has it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from tidings.server.media import child, confine
from tidings.server.media.facts import EXIT_MEMORY, Job, Looked, PreviewImage


def write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def webp(length: int) -> bytes:
    return b"RIFF" + (length - 8).to_bytes(4, "little") + b"WEBP" + b"x" * (length - 12)


def lie(job: Job, about: str) -> Looked:
    """An answer that no honest child gives."""
    good = tuple(PreviewImage(one.name, "image/webp", 1, 1, webp(100)) for one in job.wanted)
    first = good[0]
    page = b"<html><script>alert(1)</script>"
    change = msgspec.structs.replace
    return {
        "nothing": Looked(width=1, height=1, previews=good),
        "a page": Looked(previews=(change(first, data=page), *good[1:])),
        "its type": Looked(previews=(change(first, media_type="text/html"), *good[1:])),
        "its length": Looked(previews=(change(first, data=webp(100) + page), *good[1:])),
        "its name": Looked(previews=(change(first, name="../../etc"), *good[1:])),
        "how many": Looked(previews=good * 2),
        "its size": Looked(previews=(change(first, width=100_000), *good[1:])),
        "its side": Looked(previews=(change(first, height=0), *good[1:])),
        "the sides": Looked(width=-1),
        "the pages": Looked(pages=2**60),
        "the waveform": Looked(waveform=b"x" * 101),
        "the thumbhash": Looked(thumbhash=b"x" * 100),
    }[about]


def doors(job: Job) -> Looked:
    """Try what the real child may not do; the answer's numbers say what was possible."""
    confine.bounds(cpu_seconds=5, memory_bytes=job.limits.memory_bytes)
    holds = confine.isolate()
    tried = 0

    def attempt(bit: int, what: object) -> None:
        nonlocal tried
        try:
            what()  # type: ignore[operator]
        except (OSError, ValueError):
            return
        tried |= 1 << bit

    import socket

    attempt(0, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    attempt(1, lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    attempt(2, lambda: Path("/etc/passwd").read_text())
    attempt(3, lambda: os.listdir("/"))
    attempt(4, lambda: Path("written").write_text("x" * 10_000))
    attempt(5, lambda: os.write(os.memfd_create("x"), b"x"))
    attempt(6, lambda: Path(f"/proc/{job.parent}/environ").read_bytes())
    attempt(7, lambda: os.kill(job.parent, 0) if "files" in holds and scoped() else fail())
    attempt(8, lambda: subprocess.run(["/usr/bin/true"], stdin=0))
    held = sum(1 << bit for bit, name in enumerate(("network", "files", "calls")) if name in holds)
    return Looked(width=tried, height=held, pages=os.getpriority(os.PRIO_PROCESS, 0))


def fail() -> None:
    raise OSError("not tried")


def scoped() -> bool:
    """Whether this kernel's Landlock keeps signals in."""
    return bool(confine._libc.syscall(444, None, 0, 1) >= 6)


def tell(path: str, *numbers: int) -> None:
    """Write it, whole or not at all, and wait."""
    Path(path + ".new").write_text(" ".join(map(str, numbers)))
    os.rename(path + ".new", path)
    threading.Event().wait()


def refuse() -> None:
    """A kernel, or a container, that has none of what `isolate` tries."""

    class Refusing:
        def __getattr__(self, name: str) -> object:
            if name in {"unshare", "syscall"}:
                return lambda *_: -1
            return getattr(real, name)

    real = confine._libc
    confine._libc = Refusing()  # type: ignore[assignment]
    confine._seccomp = lambda **_: False


def main() -> None:
    if sys.argv[1:] == ["refused"]:
        refuse()
        child.main()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    match sys.argv[1:]:
        case ["environment", path]:
            said = {
                "environment": dict(os.environ),
                "folder": os.getcwd(),
                "files": os.listdir("."),
                "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
                "file": job.fd,
                "read_only": fcntl.fcntl(job.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY,
                "leads": os.getpgid(0) == os.getsid(0) == os.getpid(),
            }
            with open(path, "wb") as file:
                file.write(msgspec.json.encode(said))
            write(msgspec.msgpack.encode(Looked()))
        case ["spin"]:
            confine.bounds(cpu_seconds=job.limits.cpu_seconds, memory_bytes=job.limits.memory_bytes)
            while True:
                pass
        case ["spin", "deaf"]:
            signal.signal(signal.SIGXCPU, signal.SIG_IGN)
            while True:
                pass
        case ["wait"]:
            threading.Event().wait()
        case ["eat"]:
            confine.bounds(cpu_seconds=job.limits.cpu_seconds, memory_bytes=job.limits.memory_bytes)
            eaten = []
            try:
                while True:
                    eaten.append(bytearray(8 << 20))
            except MemoryError:
                os._exit(EXIT_MEMORY)
        case ["flood"]:
            while True:
                write(b"x" * 65_536)
        case ["die", number]:
            os.kill(os.getpid(), int(number))
        case ["say", hexadecimal]:
            write(bytes.fromhex(hexadecimal))
        case ["lie", about]:
            write(msgspec.msgpack.encode(lie(job, about)))
        case ["doors"]:
            write(msgspec.msgpack.encode(doors(job)))
        case ["with a grandchild", path]:
            # As ffmpeg is started; `path` gets the numbers of both.
            me = os.getpid()
            other = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: confine.die_with(me))
            confine.die_with(job.parent)
            tell(path, me, other.pid)
        case ["with a loose grandchild", path]:
            # One that does not end by itself.
            tell(path, os.getpid(), subprocess.Popen(["sleep", "100"]).pid)
        case other:
            raise SystemExit(f"not known: {other}")


if __name__ == "__main__":
    main()
