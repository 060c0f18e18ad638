"""Writes the operation log while clients run; the format is in `tidings.testing.history`."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tidings.testing.history import (
    Call,
    DeviceFinal,
    DeviceStart,
    Entry,
    Fail,
    FinalLog,
    Info,
    Invoke,
    LogEvent,
    Observe,
    Ok,
    Receipt,
    Source,
    Which,
    encode_entry,
)


class Operation:
    """One invoked call whose outcome is still open. The first outcome counts, a second one raises `RuntimeError`."""

    def __init__(self, recorder: "Recorder", op_id: str) -> None:
        self._recorder = recorder
        self.id = op_id
        self.settled = False

    def ok(
        self,
        *,
        message_id: str = "",
        seq: int = 0,
        epoch: str = "",
        first: int = 0,
        last: int | None = None,
        shown: Iterable[int] = (),
    ) -> None:
        at = self._settle()
        self._recorder.append(Ok(self.id, at, message_id, seq, epoch, first, last, tuple(shown)))

    def fail(self, code: str = "") -> None:
        """The server refused for good: it must never appear. A lost connection is `info`, not `fail`."""
        self._recorder.append(Fail(self.id, self._settle(), code))

    def info(self, reason: str = "") -> None:
        self._recorder.append(Info(self.id, self._settle(), reason))

    def _settle(self) -> int:
        if self.settled:
            raise RuntimeError(f"operation {self.id} has an outcome already")
        self.settled = True
        return self._recorder.now()


class Recorder:
    """Appends entries, from any thread or task; nothing here waits.

    `path` None keeps the log in memory (`entries`), else it goes to that file as JSONL. `name` makes operation ids
    unique when several programs write files of their own that are checked together. `clock` gives nanoseconds of a
    monotonic clock shared by all of them.
    """

    def __init__(
        self, path: Path | None = None, *, name: str = "r", clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.now = clock
        self.path = path
        self._name = name
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._memory: list[Entry] = []
        self._file = path.open("ab") if path is not None else None

    def append(self, entry: Entry) -> None:
        if self._file is None:
            self._memory.append(entry)
            return
        line = encode_entry(entry)
        with self._lock:
            self._file.write(line)

    @property
    def entries(self) -> list[Entry]:
        """What a recorder in memory holds, in order. Raises `RuntimeError` for one that writes a file."""
        if self._file is not None:
            raise RuntimeError(f"this recorder writes to {self.path}; read the file")
        return list(self._memory)

    def invoke(self, process: str, call: Call) -> Operation:
        """Note that `call` is about to be made; call it before the first byte leaves."""
        operation = Operation(self, f"{self._name}/{next(self._numbers)}")
        self.append(Invoke(operation.id, self.now(), process, call))
        return operation

    @contextmanager
    def operation(self, process: str, call: Call) -> Iterator[Operation]:
        """`invoke`, and `info` at the end unless the block said what came out (an exception does not)."""
        operation = self.invoke(process, call)
        try:
            yield operation
        except BaseException as error:
            if not operation.settled:
                operation.info(type(error).__name__)
            raise
        if not operation.settled:
            operation.info("no outcome")

    def device_start(self, *, device: str, user: str, channel: str, position: int) -> None:
        self.append(DeviceStart(self.now(), device, user, channel, position))

    def observe(
        self,
        *,
        device: str,
        user: str,
        channel: str,
        epoch: str,
        seq: int,
        event_type: str,
        message_id: str = "",
        key: str = "",
        sender: str = "",
        digest: str = "",
        source: Source = "live",
    ) -> None:
        self.append(
            Observe(self.now(), device, user, channel, epoch, seq, event_type, message_id, key, sender, digest, source)
        )

    def receipt(self, *, device: str, channel: str, user: str, which: Which, position: int) -> None:
        """`device` saw that `user`'s position is now `position`."""
        self.append(Receipt(self.now(), device, channel, user, which, position))

    def device_final(self, *, device: str, user: str, channel: str, position: int, state: str = "") -> None:
        self.append(DeviceFinal(self.now(), device, user, channel, position, state))

    def final_log(self, channel: str, events: Iterable[LogEvent], *, epoch: str) -> None:
        self.append(FinalLog(channel, epoch, tuple(events)))

    def flush(self) -> None:
        """Hand what is buffered to the operating system, so that a reader of the file sees it."""
        if self._file is not None:
            with self._lock:
                self._file.flush()

    def close(self) -> None:
        """Close the file; harmless when there is none or it is closed."""
        if self._file is not None:
            with self._lock:
                self._file.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
