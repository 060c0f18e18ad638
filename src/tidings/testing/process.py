"""A real server as a child process: started, killed, frozen, restarted and measured by tests and benchmarks.

    async with ServerProcess(data=tmp_path) as server:
        await talk_to(server.url)
        server.kill9()
        await server.restart()

No process is left behind. The server runs in a process group of its own, which is killed at the end of the block, when
the object is collected, and at the interpreter's exit; and the kernel kills it should the test program itself be
killed (`PR_SET_PDEATHSIG`). That request is made by a small launcher that then becomes the server (`exec` keeps both
the process id and the request): code between fork and exec in a program with threads may deadlock. The kernel ties the
request to the *thread* that started the server, so start it from one that lives as long as the server should: the
main thread.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import msgspec

from tidings.testing.chaos import LOOPBACK, reserve_port
from tidings.testing.datasets import DATA_VARIABLE

# `{port}` and `{data}` are filled in.
SERVE_COMMAND = (
    sys.executable, "-m", "tidings.server.cli", "serve", "--host", LOOPBACK, "--port", "{port}", "--data", "{data}",
)  # fmt: skip

READY_PATH = "/readyz"

# A server answers within 1.5 s of its start; a busy two-core machine may take several times as long.
READY_TIMEOUT_S = 20.0
READY_POLL_S = 0.02

# A graceful stop drains connections; what takes longer than this hangs.
STOP_TIMEOUT_S = 20.0

# How much of what the server said goes into the message of an error.
TAIL_BYTES = 4000

# If the starter died before the request was made, no signal would come: then go at once.
_LAUNCHER = """\
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != parent:
    sys.exit("the process that wanted a server is gone")
os.execvp(command[0], command)
"""

_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    """The server did not start, did not become ready or did not stop; `str()` has the end of what it said."""


class CpuTime(msgspec.Struct, frozen=True):
    """Processor seconds since the process started, all threads, ended ones included (not child processes).

    `user_s` and `system_s` count in clock ticks (10 ms) as in `/proc/<pid>/stat`; `total_s` is exact to the nanosecond.
    Subtract two readings.
    """

    user_s: float
    system_s: float
    total_s: float

    def __sub__(self, earlier: "CpuTime") -> "CpuTime":
        return CpuTime(self.user_s - earlier.user_s, self.system_s - earlier.system_s, self.total_s - earlier.total_s)


class Memory(msgspec.Struct, frozen=True):
    """Bytes of main memory as `/proc/<pid>/smaps_rollup` counts them. `private` is what would be freed by its end."""

    rss: int
    pss: int
    private: int


class ServerProcess:
    """One server on one loopback port with one data folder; the same over any number of restarts.

    `command` may hold `{port}` and `{data}`. `environment` is added to this process's own. Output goes to `stdout.log`
    and `stderr.log` in `logs` (default: the data folder's parent, named after the data folder), appended over restarts.
    Not safe to share between threads.
    """

    def __init__(
        self,
        data: Path,
        *,
        command: Sequence[str] = SERVE_COMMAND,
        environment: Mapping[str, str] | None = None,
        logs: Path | None = None,
        ready_path: str = READY_PATH,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self.data = data
        self._logs = logs if logs is not None else data.parent / f"{data.name}-logs"
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._ready_path = ready_path
        self._ready_timeout_s = ready_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._finaliser: weakref.finalize[..., ServerProcess] | None = None
        # Held for the object's life: nobody else is given the port while the server is down.
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.starts = 0

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def stdout_path(self) -> Path:
        return self._logs / "stdout.log"

    @property
    def stderr_path(self) -> Path:
        return self._logs / "stderr.log"

    @property
    def pid(self) -> int:
        """Raises `RuntimeError` if no server was started."""
        return self._started().pid

    @property
    def running(self) -> bool:
        return self._process is not None and _poll(self._process) is None

    @property
    def exit_code(self) -> int | None:
        """Of the last start; negative is the signal that ended it, None while it runs."""
        return _poll(self._started())

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Kill what is left and give the port back. The data and logs stay."""
        if self._process is not None:
            self.kill9()
            await self.wait_exit()
        self._reserved.close()

    async def start(self) -> float:
        """Start and wait until it is ready; the seconds that took. Raises `ServerFailed`, `RuntimeError` if it runs."""
        began = time.monotonic()
        self.launch()
        await self.wait_ready()
        return time.monotonic() - began

    def launch(self) -> None:
        """Start without waiting for anything. Raises `RuntimeError` if it runs."""
        if self.running:
            raise RuntimeError(f"the server runs already (pid {self.pid})")
        self.data.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        fill = {"{port}": str(self.port), "{data}": str(self.data)}
        command = [self._fill(part, fill) for part in self._command]
        with self.stdout_path.open("ab") as out, self.stderr_path.open("ab") as err:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                # The variable that names the data sets is ours: to the server it would be a misspelt setting.
                env={name: value for name, value in os.environ.items() if name != DATA_VARIABLE} | self._environment,
                process_group=0,
            )
        self._process = process
        if self._finaliser is not None:
            self._finaliser.detach()
        self._finaliser = weakref.finalize(self, _kill_group, process)
        self.starts += 1

    @staticmethod
    def _fill(part: str, fill: Mapping[str, str]) -> str:
        for name, value in fill.items():
            part = part.replace(name, value)
        return part

    async def wait_ready(self) -> None:
        """Wait until `ready_path` answers 200. Raises `ServerFailed` if the server ends or time runs out."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=5) as client:
            deadline = time.monotonic() + self._ready_timeout_s
            while time.monotonic() < deadline:
                if not self.running:
                    raise ServerFailed(f"the server ended with {self.exit_code} before it was ready\n{self.tail()}")
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(self._ready_path)).status_code == 200:
                        return
                await asyncio.sleep(READY_POLL_S)
        raise ServerFailed(f"the server was not ready within {self._ready_timeout_s} s\n{self.tail()}")

    def kill9(self) -> None:
        """SIGKILL to the server and whatever it started: returns at once, harmless if it has ended."""
        if self._process is not None:
            _kill_group(self._process)

    async def terminate(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to stop (SIGTERM) and wait; the exit code. Raises `ServerFailed`, and kills, after `timeout_s`."""
        self._signal(signal.SIGTERM)
        try:
            return await self.wait_exit(timeout_s)
        except TimeoutError:
            self.kill9()
            await self.wait_exit()
            raise ServerFailed(f"the server did not stop within {timeout_s} s\n{self.tail()}") from None

    async def restart(self, *, graceful: bool = False) -> float:
        """Stop it (by SIGKILL unless `graceful`), start it on the same port and data; the seconds until ready."""
        if self.running and graceful:
            await self.terminate()
        self.kill9()
        await self.wait_exit()
        return await self.start()

    async def wait_exit(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait until the process has ended; its exit code. Raises `TimeoutError`."""
        process = self._started()
        code = _poll(process)
        if code is None:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            watched = os.pidfd_open(process.pid)
            loop.add_reader(watched, ended.set)
            try:
                await asyncio.wait_for(ended.wait(), timeout_s)
            finally:
                loop.remove_reader(watched)
                os.close(watched)
            code = _poll(process)
            assert code is not None, "the kernel has said that it ended"
        return code

    def sigstop(self) -> None:
        """Freeze it: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def sigcont(self) -> None:
        self._signal(signal.SIGCONT)

    def cpu_time(self) -> CpuTime:
        """Raises `ProcessLookupError` once it has ended."""
        pid = self._alive()
        # The second field is the name in brackets, which may hold blanks and brackets itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user, system = int(fields[11]), int(fields[12])
        return CpuTime(user / _CLOCK_TICKS_PER_S, system / _CLOCK_TICKS_PER_S, cpu_seconds(pid))

    def memory(self) -> Memory:
        """Raises `ProcessLookupError` once it has ended."""
        kilobytes: dict[str, int] = {}
        for line in Path(f"/proc/{self._alive()}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            kilobytes[name] = int(rest.split()[0])
        private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
        return Memory(kilobytes["Rss"] * 1024, kilobytes["Pss"] * 1024, private * 1024)

    def tail(self) -> str:
        """The end of what the server wrote to both outputs."""
        parts = []
        for path in (self.stdout_path, self.stderr_path):
            said = path.read_bytes()[-TAIL_BYTES:].decode(errors="replace") if path.is_file() else ""
            parts.append(f"--- {path.name}\n{said}")
        return "\n".join(parts)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def _alive(self) -> int:
        process = self._started()
        if _poll(process) is not None:
            raise ProcessLookupError(f"the server (pid {process.pid}) has ended")
        return process.pid

    def _signal(self, number: signal.Signals) -> None:
        # Asked first whether it was reaped, so that a number given to somebody else is never signalled. What ends
        # between the two lines is not reaped, and the signal is lost on it.
        process = self._started()
        if _poll(process) is None:
            os.kill(process.pid, number)


def cpu_seconds(pid: int) -> float:
    """Processor seconds of a process so far, all threads, exact to the nanosecond. Raises `OSError` once it is gone."""
    # clock_getcpuclockid(3): the kernel's clock id of a whole process is ~pid << 3 | 2 (CPUCLOCK_SCHED).
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e9


def child_pids(parent: int) -> list[int]:
    """The processes that one has started and that have not ended, the oldest first."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Its state, its parent, and (the twentieth from there) when it began.
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append((int(fields[19]), pid))
    return [pid for _, pid in sorted(found)]


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code, None while it runs. All reaping goes through here: workers that outlived their leader go with it,
    and once the leader is reaped, the group's number may be somebody else's."""
    if process.returncode is None:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        _kill_group(process)
    return process.poll()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Only while the leader is not reaped is the group's number surely still ours; `returncode` is set by reaping alone.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
