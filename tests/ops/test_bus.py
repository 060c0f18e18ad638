"""A server with a bus: refused without one, and serving on when it goes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from tests.ops.conftest import tidings
from tidings.testing.nats import NatsProcess
from tidings.testing.process import ServerProcess


async def test_a_server_serves_on_while_its_bus_is_away_and_says_so(tmp_path: Path) -> None:
    async with NatsProcess(tmp_path / "nats") as nats:
        environment = {"TIDINGS_BUS": nats.url, "TIDINGS_NODE": "a"}
        async with (
            ServerProcess(tmp_path / "data", logs=tmp_path / "logs", environment=environment) as server,
            httpx.AsyncClient(base_url=server.url, trust_env=False) as http,
        ):

            async def told() -> tuple[bool, bool]:
                ready = await http.get("/readyz")
                assert ready.status_code == 200
                metrics = (await http.get("/metrics")).text
                return "bus" not in ready.json(), "tidings_bus_connected 1.0" in metrics

            async def becomes(connected: bool) -> None:
                async with asyncio.timeout(20):
                    while await told() != (connected, connected):
                        await asyncio.sleep(0.05)  # why: looking again, not waiting for the thing itself

            await becomes(True)
            nats.kill9()
            await nats.wait_exit()
            await becomes(False)
            await nats.start()
            await becomes(True)
            assert await server.terminate() == 0


async def test_a_server_that_the_bus_does_not_let_in_does_not_start(tmp_path: Path) -> None:
    async with NatsProcess(tmp_path / "nats", arguments=("--auth", "t0ken")) as nats:
        creds = tmp_path / "bus.creds"
        creds.write_text("0ther")
        config = tmp_path / "tidings.toml"
        config.write_text(f'bus = "{nats.url}"\nbus_credentials = "bus.creds"\n')
        done = await tidings("serve", "--port", "0", "--data-dir", tmp_path / "data", "--config", config)
        assert done.status == 1
        assert "refuses us: Authorization Violation" in done.err
        assert "0ther" not in done.err + done.out
