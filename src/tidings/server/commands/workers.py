"""Worker processes that share one port, and the thin parent that looks after them: `tidings serve --workers N`.

The parent serves nobody. It forks the workers, the first one alone, so that one process makes what there is only once
(the schema, the key file, the first app); starts one that dies anew; passes on SIGTERM and waits until all have
drained. It is to its workers what systemd is to a service: they tell it READY=1 and WATCHDOG=1 in the same words, over
a socket of its own, and it tells systemd. A parent that is killed takes its workers along: they drain.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from tidings.server.systemd import notify, watchdog_seconds
from tidings.server.telemetry import get_logger

__all__ = ["Supervisor"]

log = get_logger(__name__)

# A worker that dies is back at once; one that goes on dying is tried less and less often, up to this, seconds. Longer
# would keep a machine small after its database has come back.
BACKOFF_SECONDS: Final = 0.2
BACKOFF_SECONDS_MAX: Final = 10.0
# One that has lived so long after being ready has nothing to do with earlier deaths, seconds.
STEADY_SECONDS: Final = 30.0
# What a worker's end takes beyond the two drains that it allows itself (frames, then requests), seconds.
END_SECONDS: Final = 5.0
# What workers say is a word; more is not theirs.
SAID_BYTES_MAX: Final = 256

# prctl(2): which signal the kernel sends to a process whose parent has died.
_PR_SET_PDEATHSIG: Final = 1
# unix(7): who has sent a message, as the kernel knows it. (pid, user, group)
_CREDENTIALS: Final = struct.Struct("3i")
_HEARD: Final[tuple[int, ...]] = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@dataclass(slots=True)
class _Worker:
    """One place among the workers, and the process that has it now. `pid` 0: none."""

    number: int
    pid: int = 0
    starts: int = 0
    ready: bool = False
    ready_at: float = 0.0
    # When it was heard of last, and when it is to be started (again).
    heard_at: float = 0.0
    due: float = 0.0
    deaths: int = 0


@dataclass
class Supervisor:
    """Runs `work(number, first)` in `count` processes until asked to stop. `work` returns an exit status; `first`: this
    place is taken for the first time. Linux only, and for the main thread of a process without other threads."""

    count: int
    work: Callable[[int, bool], int]
    drain_seconds: float
    monotonic: Callable[[], float] = time.monotonic
    _workers: list[_Worker] = field(init=False)
    _opened: bool = False
    _stopping: bool = False
    _status: int = 0
    _give_up_at: float = 0.0

    def __post_init__(self) -> None:
        self._workers = [_Worker(number) for number in range(1, self.count + 1)]

    def run(self) -> int:
        """Until all have ended; the exit status: 0 when they were asked to and drained, else what is wrong."""
        if sys.platform != "linux":
            sys.stderr.write("tidings: several workers need Linux, whose kernel shares a port between processes.\n")
            return 1
        # Signs of life go to systemd as well while this loop turns.
        pace = watchdog_seconds()
        with _signals() as woken, _listen() as said, selectors.DefaultSelector() as selector:
            selector.register(woken, selectors.EVENT_READ)
            selector.register(said, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(self._patience(pace)):
                    self._read_signals(woken) if key.fileobj is woken else self._hear(said)
                self._reap()
                if pace is not None:
                    notify("WATCHDOG=1")
                    self._kill_silent(2 * pace)
                if self._stopping:
                    if not any(worker.pid for worker in self._workers):
                        log.info("workers_stopped", status=self._status)
                        return self._status
                    if self.monotonic() >= self._give_up_at:
                        self._kill_all()
                else:
                    self._start_due(said, woken)

    # ------------------------------------------------------------ what comes

    def _patience(self, pace: float | None) -> float | None:
        """How long to wait for signals and words, seconds; None: for ever."""
        waits = [] if pace is None else [pace]
        if self._stopping:
            waits.append(self._give_up_at - self.monotonic())
        else:
            waits += [worker.due - self.monotonic() for worker in self._startable()]
        return max(0.0, min(waits)) if waits else None

    def _read_signals(self, woken: socket.socket) -> None:
        if set(woken.recv(SAID_BYTES_MAX)) & {signal.SIGTERM, signal.SIGINT}:
            self._stop(0)

    def _hear(self, said: socket.socket) -> None:
        text, ancillary, _, _ = said.recvmsg(SAID_BYTES_MAX, socket.CMSG_SPACE(_CREDENTIALS.size))
        speakers = [_CREDENTIALS.unpack(data)[0] for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS]
        worker = next((worker for worker in self._workers if worker.pid and worker.pid in speakers), None)
        if worker is None:
            # Anybody on this machine may speak; only our own are listened to.
            return
        worker.heard_at = self.monotonic()
        if text == b"READY=1":
            worker.ready, worker.ready_at = True, worker.heard_at
            if worker.starts > 1:
                log.info("worker_back", worker=worker.number, pid=worker.pid)
            if not self._opened and all(worker.ready for worker in self._workers):
                self._opened = True
                log.info("workers_ready", count=self.count, pids=[worker.pid for worker in self._workers])
                notify("READY=1")

    def _reap(self) -> None:
        for worker in self._workers:
            if not worker.pid:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            code = os.waitstatus_to_exitcode(status)
            was, worker.pid = worker.ready, 0
            worker.ready = False
            if self._stopping:
                if code:
                    log.error("worker_failed_to_stop", worker=worker.number, pid=pid, code=code)
                    self._status = self._status or 1
            elif not self._opened:
                # It has said why. What keeps one from starting keeps the others.
                log.error("worker_failed_to_start", worker=worker.number, pid=pid, code=code)
                self._stop(code if code > 0 else 1)
            else:
                now = self.monotonic()
                worker.deaths = 1 if was and now - worker.ready_at >= STEADY_SECONDS else worker.deaths + 1
                wait = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS * 2 ** min(worker.deaths - 1, 16))
                worker.due = now + wait
                log.error("worker_died", worker=worker.number, pid=pid, code=code, starts_again_in=wait)

    # ------------------------------------------------------------ what is done

    def _startable(self) -> list[_Worker]:
        """Those that are to run and do not; only the first until it is ready."""
        absent = [worker for worker in self._workers if not worker.pid]
        return absent if self._opened or self._workers[0].ready else [one for one in absent if one.number == 1]

    def _start_due(self, said: socket.socket, woken: socket.socket) -> None:
        now = self.monotonic()
        for worker in self._startable():
            if worker.due <= now:
                self._start(worker, said, woken)

    def _start(self, worker: _Worker, said: socket.socket, woken: socket.socket) -> None:
        address = "@" + os.fsdecode(said.getsockname()[1:])
        worker.starts += 1
        worker.heard_at = self.monotonic()
        parent = os.getpid()
        # A signal between fork and the child's own handlers would be written to the parent's socket.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        worker.pid = os.fork()
        if worker.pid == 0:
            said.close()
            woken.close()
            _be_worker(parent, address, lambda: self.work(worker.number, worker.starts == 1))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        log.info("worker_started", worker=worker.number, pid=worker.pid)

    def _stop(self, status: int) -> None:
        if self._stopping:
            return
        self._stopping, self._status = True, status
        self._give_up_at = self.monotonic() + 2 * self.drain_seconds + END_SECONDS
        notify("STOPPING=1")
        for worker in self._workers:
            if worker.pid:
                # Not reaped yet, so the number is still its own.
                os.kill(worker.pid, signal.SIGTERM)

    def _kill_silent(self, seconds: float) -> None:
        """What systemd would do to the service: a worker whose event loop has stopped turning is started anew."""
        for worker in self._workers:
            if worker.pid and worker.ready and self.monotonic() - worker.heard_at > seconds:
                log.error("worker_stalled", worker=worker.number, pid=worker.pid, seconds=seconds)
                worker.heard_at = self.monotonic()
                os.kill(worker.pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        self._status = self._status or 1
        self._give_up_at = float("inf")
        for worker in self._workers:
            if worker.pid:
                log.error("worker_did_not_drain", worker=worker.number, pid=worker.pid)
                os.kill(worker.pid, signal.SIGKILL)


def _be_worker(parent: int, address: str, work: Callable[[], int]) -> NoReturn:
    """What a forked process does. It never returns into the parent's code."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        os.environ["NOTIFY_SOCKET"] = address
        if "WATCHDOG_USEC" in os.environ:
            os.environ["WATCHDOG_PID"] = str(os.getpid())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        # A parent that died before the kernel was asked would never be missed.
        if os.getppid() == parent:
            status = work()
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # Not sys.exit: what the parent has to do at its end is not ours.
            os._exit(status)


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket on which the numbers of signals arrive."""
    ours, theirs = socket.socketpair()
    before: dict[int, Any] = {}
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            for number in _HEARD:
                before[number] = signal.signal(number, _nothing)
            yield ours
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd)


def _nothing(number: int, frame: object) -> None:
    """The signal's number goes to the socket."""


@contextmanager
def _listen() -> Iterator[socket.socket]:
    """Where workers say how they are; each message carries the kernel's word for who has sent it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listening.setblocking(False)
        # In the abstract namespace nothing is left behind in a file system.
        listening.bind(f"\0tidings-{os.getpid()}-{os.urandom(8).hex()}")
        yield listening
