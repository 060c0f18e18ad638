"""Load from processes of its own, so that the server's processor time is the server's alone.

    async with worker(drive, port, tokens) as link:
        await link.ask("begin")

`drive(link, …)` is a module-level `async def`; it runs in the other process under uvloop and answers on its own link.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from typing import Any

import uvloop

# A worker that says nothing for this long hangs.
ANSWER_SECONDS_MAX = 600.0
END_SECONDS_MAX = 10.0
PR_SET_PDEATHSIG = 1

_spawning = multiprocessing.get_context("spawn")


class WorkerFailed(Exception):
    """A load process ended or failed; `str()` has its traceback."""


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


class Link:
    """One end of the line between a scenario and its load process: Python objects, in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, value: Any = None) -> None:
        self._connection.send(value)

    async def receive(self, seconds: float = ANSWER_SECONDS_MAX) -> Any:
        """The next object. Raises WorkerFailed, TimeoutError."""
        loop = asyncio.get_running_loop()
        if not self._connection.poll():
            ready = asyncio.Event()
            number = self._connection.fileno()
            loop.add_reader(number, ready.set)
            try:
                async with asyncio.timeout(seconds):
                    await ready.wait()
            finally:
                loop.remove_reader(number)
                # Watching has made it non-blocking; what follows comes in several pieces.
                os.set_blocking(number, True)
        try:
            value = self._connection.recv()
        except EOFError:
            raise WorkerFailed("the load process ended") from None
        if isinstance(value, _Failure):
            raise WorkerFailed(value.text)
        return value

    async def ask(self, value: Any = None, seconds: float = ANSWER_SECONDS_MAX) -> Any:
        """Send and take the answer."""
        self.send(value)
        return await self.receive(seconds)


@asynccontextmanager
async def worker(drive: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> AsyncIterator[Link]:
    """Run `drive(link, *args)` in another process; ended with the block."""
    here, there = _spawning.Pipe()
    process = _spawning.Process(target=_main, args=(drive, there, args), daemon=True)
    process.start()
    there.close()
    try:
        yield Link(here)
    finally:
        with contextlib.suppress(OSError):
            here.close()
        await asyncio.to_thread(process.join, END_SECONDS_MAX)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)


def _main(drive: Callable[..., Coroutine[Any, Any, None]], there: Connection, args: tuple[Any, ...]) -> None:
    # Goes with the program that started it, however that ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    async def run() -> None:
        link = Link(there)
        try:
            await drive(link, *args)
        except WorkerFailed:
            pass  # The scenario has closed its end: that is how a worker is told to go.
        except Exception:
            with contextlib.suppress(OSError):
                link.send(_Failure(traceback.format_exc()))

    try:
        uvloop.run(run())
    except KeyboardInterrupt:
        pass
