"""`tidings serve`: run the server."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Annotated, Final

from cyclopts import Parameter

from tidings.server.config import Config

from .datadir import check_restored, hold
from .terminal import ConfigOption, DataDirOption, StoreOption, settings

# Allocations between collections. Nearly everything is freed by reference counts: at 8,000 messages a second this is a
# young collection every second or so. What the start loads stays for good, and is hardly looked through before that.
GC_THRESHOLDS: Final = (50_000, 20, 50)


def serve(
    *,
    config: ConfigOption = None,
    host: Annotated[str | None, Parameter(help="Address to listen on.")] = None,
    port: Annotated[int | None, Parameter(help="Port to listen on.")] = None,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    bus: Annotated[
        str | None, Parameter(help="NATS servers between several nodes: nats://a:4222,nats://b:4222.")
    ] = None,
    node: Annotated[str | None, Parameter(help="This node's name among them: letters and digits.")] = None,
    workers: Annotated[int | None, Parameter(help="Processes that share the port; PostgreSQL and NATS only.")] = None,
    development: Annotated[bool | None, Parameter(help="Conveniences for development; loopback only.")] = None,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Everything is kept under the data directory, made on first start together with a first app, whose API key and
    signing secret are shown once. Every setting can also be given in a file or as `TIDINGS_…` in the environment; see
    docs/reference/configuration.md.

    For example:

        tidings serve

        tidings serve --port 9000 --data-dir /var/lib/tidings

        tidings serve --config /etc/tidings.toml

        tidings serve --store postgres://tidings@db.internal/tidings

        tidings serve --workers 4 --store postgres://tidings@db.internal/tidings --bus nats://nats-1:4222,nats://nats-2:4222
    """
    run(
        settings(
            config,
            data_dir,
            host=host,
            port=port,
            store=store,
            bus=bus,
            node=node,
            workers=workers,
            development=development,
        )
    )


def run(config: Config) -> None:
    """Serve until asked to stop. Raises what keeps it from starting."""
    gc.set_threshold(*GC_THRESHOLDS)
    check_restored(config.data_dir)
    with hold(config.data_dir, f"a server at {config.url}"):
        from tidings.server.telemetry import setup_logging

        setup_logging(level=config.log_level, format=config.log_format, development=config.development)
        if config.workers > 1:
            _run_workers(config)
        else:
            _run_one(config)


def _run_one(config: Config, *, panel: bool = True) -> None:
    import uvloop

    uvloop.run(_serve(config, panel=panel))


def _run_workers(config: Config) -> None:
    """Raises what keeps the port from being taken; SystemExit with the status when a worker could not start."""
    # Loaded once, before there are workers: they share the memory of it, and one that is started again has it already.
    from tidings.server.app import load_all, reserve
    from tidings.server.telemetry import setup_logging

    from .terminal import guarded
    from .workers import Supervisor

    with reserve(config.host, config.port) as kept:
        port = kept.getsockname()[1]

        def work(number: int, first: bool) -> int:
            panel = number == 1 and first
            setup_logging(
                level=config.log_level,
                format=config.log_format,
                development=config.development,
                fields={"worker": number},
            )
            return guarded(lambda: _run_one(config.of_worker(number, port), panel=panel))

        load_all()
        gc.collect()
        gc.freeze()
        status = Supervisor(config.workers, work, config.drain_seconds).run()
    if status:
        raise SystemExit(status)


async def _serve(config: Config, *, panel: bool) -> None:
    from tidings.server.app import Server, open_core

    async with open_core(config) as core:
        # So that a newcomer has one to talk to.
        new = await core.services.admin.create_first_app("First app", via="serve")
        server = Server(config, core)

        def ready() -> None:
            if (panel and sys.stderr.isatty()) or new is not None:
                from .panels import welcome

                welcome(config, new)

        await server.serve(ready=ready)
        await asyncio.sleep(0)
