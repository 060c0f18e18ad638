"""A server with a bus: refused without one, and serving on when it goes."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from tests.ops.conftest import tidings
from tests.postgres import fresh_database
from tidings.client import Client, MessageCreated, Rest
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


async def test_two_servers_over_one_database_are_one_to_their_users(tmp_path: Path) -> None:
    database = await fresh_database()
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(NatsProcess(tmp_path / "nats"))
        environment = {
            "TIDINGS_BUS": nats.url,
            "TIDINGS_STORE": database,
            "TIDINGS_ALLOW_UNSAFE_STORE": "true",
            "TIDINGS_KEY_FILE": str(tmp_path / "root.key"),
        }
        nodes = []
        for name in ("a", "b"):
            server = ServerProcess(tmp_path / name, environment=environment | {"TIDINGS_NODE": name})
            nodes.append(await stack.enter_async_context(server))
        shown = re.search(r"API key +(tk_\S+)", nodes[0].stderr_path.read_text())
        assert shown is not None
        here, there = [await stack.enter_async_context(Rest(node.url, api_key=shown[1])) for node in nodes]
        await here.users.upsert([{"id": "alice"}, {"id": "bob"}])
        await here.channels.create("c", members=["alice", "bob"])
        tokens = {user: (await here.users.token(user)).token for user in ("alice", "bob")}
        alice = await stack.enter_async_context(Client(nodes[0].url, token=tokens["alice"], device="a", start="all"))
        bob = await stack.enter_async_context(Client(nodes[1].url, token=tokens["bob"], device="b", start="all"))
        for number in range(20):
            await (alice if number % 2 else bob).channel("c").send(f"{number}")
        heard: dict[Client, list[str]] = {alice: [], bob: []}
        async with asyncio.timeout(20):
            for client, texts in heard.items():
                async for event in client.events("c"):
                    if isinstance(event, MessageCreated):
                        texts.append(event.message.text)
                        if len(texts) == 20:
                            break
        assert heard[alice] == heard[bob]
        # What one decides the other knows.
        await there.users.deactivate("bob")
        as_bob = httpx.AsyncClient(
            base_url=nodes[0].url, headers={"Authorization": f"Bearer {tokens['bob']}"}, trust_env=False
        )
        await stack.enter_async_context(as_bob)
        async with asyncio.timeout(20):
            while (await as_bob.get("/v1/channels/c")).status_code != 403:
                await asyncio.sleep(0.02)  # why: looking again, not waiting for the thing itself


async def test_the_doctor_looks_at_each_server_of_the_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ("--json", "--port", "0", "--data-dir", tmp_path / "data")

    async def examined(*servers: str, environment: dict[str, str] | None = None) -> list[tuple[str, str, str]]:
        for name, value in {"TIDINGS_BUS": ",".join(servers), **(environment or {})}.items():
            monkeypatch.setenv(name, value)
        done = await tidings("doctor", *where)
        return [(item["status"], item["found"], item["do"]) for item in json.loads(done.out) if item["name"] == "bus"]

    strict_config = tmp_path / "nats.conf"
    strict_config.write_text(
        "authorization: {users: [{user: other, password: secret}, "
        '{user: tidings, password: secret, permissions: {publish: "else.>"}}]}\n'
    )
    async with (
        NatsProcess(tmp_path / "nats") as nats,
        NatsProcess(tmp_path / "strict", arguments=("-c", str(strict_config))) as strict,
    ):
        monkeypatch.setenv("TIDINGS_ALLOW_UNSAFE_STORE", "true")
        monkeypatch.setenv("TIDINGS_STORE", await fresh_database())
        found = await examined(nats.url)
        assert len(found) == 2, found
        one, few = found
        assert (one[0], "ms there and back" in one[1]) == ("ok", True)
        assert (few[0], "one server" in few[1]) == ("warn", True)
        good, gone = await examined(nats.url, "nats://127.0.0.1:1")
        assert (good[0], gone[0], "127.0.0.1:1: No NATS server can be reached" in gone[1]) == ("ok", "fail", True)
        assert "the setting bus" in gone[2]
        refused, *_ = await examined(strict.url)
        assert (refused[0], "refuses us" in refused[1], "bus_credentials" in refused[2]) == ("fail", True, True)
        credentials = tmp_path / "credentials"
        credentials.write_text("tidings:secret")
        credentials.chmod(0o600)
        deaf, *_ = await examined(strict.url, environment={"TIDINGS_BUS_CREDENTIALS": str(credentials)})
        assert (deaf[0], "does not arrive" in deaf[1]) == ("fail", True)
