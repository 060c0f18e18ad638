"""`tidings serve --workers`: several nodes behind one port, that drain, die and come back one by one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests import postgres
from tests.checks.house import ROOMY, House, first_app, wait_until
from tests.nats import nats
from tests.ops.conftest import tidings
from tidings.testing.chaos import LOOPBACK, reserve_port
from tidings.testing.nats import NatsProcess
from tidings.testing.process import ServerProcess, child_pids

__all__ = ["nats"]

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKERS = 2


class Workers:
    """The service, a house that talks to whichever worker answers, and a port for each of them."""

    def __init__(self, server: ServerProcess, house: House, ports: list[int]) -> None:
        self.server, self.house, self.ports = server, house, ports

    @property
    def pids(self) -> list[int]:
        return child_pids(self.server.pid)

    def said(self, event: str) -> list[dict[str, object]]:
        lines = self.server.stderr_path.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in found if line["event"] == event]

    async def metric(self, port: int, name: str) -> float:
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://{LOOPBACK}:{port}/metrics")).text
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(tmp_path_factory: pytest.TempPathFactory, nats: NatsProcess) -> AsyncIterator[Workers]:
    """They are left running, with as many workers as before."""
    store = await postgres.fresh_database()
    environment = {
        **ROOMY,
        "TIDINGS_STORE": store,
        "TIDINGS_ALLOW_UNSAFE_STORE": "true",
        "TIDINGS_BUS": nats.url,
        "TIDINGS_CLUSTER": f"workers{os.getpid()}",
        "TIDINGS_WORKERS": str(WORKERS),
        "TIDINGS_WORKER_PORT": str(_adjacent_ports()),
        "TIDINGS_LOG_FORMAT": "json",
        "TIDINGS_RECONNECT_SPREAD_SECONDS": "0",
    }
    first = int(environment["TIDINGS_WORKER_PORT"])
    async with ServerProcess(Path(tmp_path_factory.mktemp("workers")) / "data", environment=environment) as server:
        house = House(server, *await first_app(server), store_url=store)
        made = Workers(server, house, [first, first + 1])
        await wait_until(lambda: made.said("workers_ready"), "all workers were ready")
        try:
            yield made
        finally:
            await house.close()


def _adjacent_ports() -> int:
    """The first of two free ports on end."""
    while True:
        with reserve_port() as one, socket.socket() as next_one:
            port: int = one.getsockname()[1]
            try:
                next_one.bind((LOOPBACK, port + 1))
            except OSError:
                continue
            return port


async def test_clients_are_spread_over_workers_that_tell_one_another(workers: Workers) -> None:
    house = workers.house
    await house.hang_up()
    names = [f"u{number}" for number in range(16)]
    await house.users(*names)
    channel = await house.channel(*names)
    wires = [await house.wire(name) for name in names]
    each = [await workers.metric(port, "tidings_connections") for port in workers.ports]
    assert sum(each) == len(names)
    assert min(each) >= 1
    last = (await wires[0].send(channel, "to all", key="1"))["seq"]
    for wire in wires:
        await wire.until_seq(channel, last)
    # The panel is for people: once, whoever else starts.
    assert workers.server.stderr_path.read_text().count("Tidings is ready") == 1


async def test_a_killed_worker_is_replaced_and_its_clients_go_on(workers: Workers) -> None:
    house = workers.house
    await house.users("ann", "bob")
    channel = await house.channel("ann", "bob")
    wires = [await house.wire("ann", device=f"d{number}") for number in range(8)]
    victim = workers.pids[0]
    os.kill(victim, signal.SIGKILL)
    await wait_until(lambda: len(workers.said("worker_back")) == 1, "another one took its place")
    await wait_until(lambda: any(wire.closed for wire in wires), "its connections ended")
    assert victim not in workers.pids
    assert len(workers.pids) == WORKERS
    staying = [wire for wire in wires if wire.closed is None]
    # With eight connections the other worker has some, but for one time in 256.
    again = await house.wire("bob")
    last = (await again.send(channel, "who is there?", key="1"))["seq"]
    for wire in staying:
        await wire.until_seq(channel, last)


async def test_one_that_drains_takes_no_new_connections_and_the_other_serves_on(workers: Workers) -> None:
    for _ in range(2):
        pid, back = workers.pids[0], len(workers.said("worker_back"))
        os.kill(pid, signal.SIGTERM)
        served = 0
        while len(workers.said("worker_back")) == back:
            async with httpx.AsyncClient(base_url=workers.server.url, trust_env=False, timeout=5) as client:
                try:
                    # Always a new connection.
                    answer = await client.get("/healthz")
                except httpx.TransportError:
                    # It waited to be accepted in the moment in which the worker stopped.
                    continue
                assert answer.status_code == 200
                served += 1
        assert served > 0
        assert [line["code"] for line in workers.said("worker_died")][-1] == 0


async def test_workers_that_cannot_start_leave_nothing_running(tmp_path: Path) -> None:
    with reserve_port() as nobody:
        port = nobody.getsockname()[1]
        arguments = ["--workers", "2", "--port", "0", "--data-dir", tmp_path, "--bus", f"nats://{LOOPBACK}:{port}"]
        done = await tidings("serve", *arguments, "--store", f"postgres://nobody@{LOOPBACK}:{port}/none")
    assert done.status == 1
    assert "worker_failed_to_start" in done.err


async def test_a_port_that_others_listen_on_is_not_shared_with_them(workers: Workers, tmp_path: Path) -> None:
    arguments = ["--workers", "2", "--port", str(workers.server.port), "--data-dir", tmp_path / "other"]
    done = await tidings("serve", *arguments, "--store", "postgres://a@b/c", "--bus", "nats://x:1")
    assert done.status == 1
    assert "in use" in done.err


@pytest.mark.parametrize("missing", ["--store", "--bus"])
async def test_without_a_store_and_a_bus_to_share_both_are_named(missing: str, tmp_path: Path) -> None:
    given = {"--store": "postgres://a@b/c", "--bus": "nats://x:1"}
    del given[missing]
    done = await tidings(
        "serve", "--workers", "2", "--data-dir", tmp_path, *[w for pair in given.items() for w in pair]
    )
    assert done.status == 2
    assert "store = postgres://" in done.err
    assert "bus = nats://" in done.err


async def test_all_of_it_ends_when_it_is_asked_to_or_its_parent_dies(workers: Workers) -> None:
    house, pids = workers.house, workers.pids
    await house.users("zoe")
    wire = await house.wire("zoe")
    assert await workers.server.terminate() == 0
    await wire.until(lambda: any(frame.get("code") == "going_away" for frame in wire.frames), "it was told to go")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    await workers.server.start()
    await wait_until(lambda: len(workers.said("workers_ready")) == 2, "all workers were ready again")
    pids = workers.pids
    os.kill(workers.server.pid, signal.SIGKILL)
    await wait_until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "the workers have ended")
