"""`tidings serve`: run the server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tidings.server.config import Config, ConfigError, load_config


def serve(
    *,
    config: Annotated[Path | None, Parameter(help="TOML file with settings.")] = None,
    host: Annotated[str | None, Parameter(help="Address to listen on.")] = None,
    port: Annotated[int | None, Parameter(help="Port to listen on.")] = None,
    data_dir: Annotated[Path | None, Parameter(name=["--data-dir", "--data"], help="Directory for all data.")] = None,
    development: Annotated[bool | None, Parameter(help="Conveniences for development; loopback only.")] = None,
) -> None:
    """Run the server until SIGTERM or Ctrl-C.

    Everything is kept under the data directory, made on first start together with a first app, whose API key and
    signing secret are shown once. Every setting can also be given in a file or as `TIDINGS_…` in the environment; see
    docs/reference/configuration.md.
    """
    overrides: dict[str, Any] = {
        name: value
        for name, value in {"host": host, "port": port, "data_dir": data_dir, "development": development}.items()
        if value is not None
    }
    try:
        settings = load_config(file=config, overrides=overrides)
    except ConfigError as error:
        sys.exit(str(error))
    raise SystemExit(_run(settings))


def _run(config: Config) -> int:
    import uvloop

    from tidings.server.errors import TidingsError
    from tidings.server.telemetry import setup_logging

    setup_logging(level=config.log_level, format=config.log_format, development=config.development)
    try:
        uvloop.run(_serve(config))
    except (TidingsError, OSError) as error:
        sys.stderr.write(f"tidings: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _serve(config: Config) -> None:
    from tidings.server.app import Server, open_core

    async with open_core(config) as core:
        from tidings.server.store.base import Tx

        async def any_app(tx: Tx) -> bool:
            return await tx.one("SELECT 1 FROM apps LIMIT 1") is not None

        new = None
        if not await core.services.store.read(any_app):
            new = await core.services.admin.create_app("First app", via="serve")
        server = Server(config, core)

        def ready() -> None:
            if sys.stderr.isatty() or new is not None:
                sys.stderr.write(f"Tidings is at {config.url}\n")
                if new is not None:
                    sys.stderr.write(f"app {new.app_id}\nAPI key {new.api_key}\nsigning secret {new.signing_secret}\n")

        await server.serve(ready=ready)
        await asyncio.sleep(0)
