"""`tidings worker`: do jobs without serving."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tidings.server.config import Config
from tidings.server.errors import StoreUnavailable

from .datadir import check_restored, share
from .terminal import ConfigOption, DataDirOption, StoreOption, settings

if TYPE_CHECKING:
    from tidings.server.app import Core

# How late it notices that settings, keys or roles have changed, seconds.
LOOK_SECONDS: Final = 1.0


def worker(
    *,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
) -> None:
    """Do what happens behind the scenes, webhooks, push and housekeeping, until SIGTERM or Ctrl-C.

    Servers do it themselves unless their setting `jobs` is off. Any number of workers and servers may work on one
    store: each job is claimed by one of them, and falls to another within 15 seconds if that one is killed. With
    PostgreSQL they may be on any machine; with the embedded store a worker runs beside the server, on its data
    directory.

    For example:

        tidings worker --config /etc/tidings.toml

        tidings worker --store postgres://tidings@db.internal/tidings --data-dir /var/lib/tidings
    """
    run(settings(config, data_dir, store=store))


def run(config: Config) -> None:
    """Work until asked to stop. Raises what keeps it from starting."""
    import uvloop

    from tidings.server.telemetry import setup_logging

    check_restored(config.data_dir)
    setup_logging(level=config.log_level, format=config.log_format, development=config.development)
    with share(config.data_dir):
        uvloop.run(_work(config))


async def _work(config: Config) -> None:
    from tidings.server.app import jobs, open_core
    from tidings.server.systemd import notify
    from tidings.server.tasks import Tasks
    from tidings.server.telemetry import get_logger

    log = get_logger(__name__)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    # A name of its own among the nodes: with the server's it would be taken for it.
    async with open_core(replace(config, node="")) as core:
        tasks = Tasks("worker")
        working = tasks.spawn(jobs(core, pressure=False).run(), "jobs")
        tasks.spawn(_look(core), "changes")
        waiting = tasks.spawn(stop.wait(), "stop")
        log.info("worker.started")
        notify("READY=1")
        try:
            await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            notify("STOPPING=1")
            await tasks.close()
        log.info("worker.stopped")
        if not stop.is_set():
            raise SystemExit(1)


async def _look(core: Core) -> None:
    """Read apps anew when another process has written."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            changed = await core.services.store.changed_elsewhere()
        except StoreUnavailable:
            changed = True
        if changed:
            core.services.apps.forget_all()
