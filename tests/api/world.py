"""A whole server behind its HTTP door, in this process: real services, a real store, real keys. Two apps, a cast."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from litestar import Litestar

from tests.postgres import open_store
from tidings.server.app import compose
from tidings.server.bus.local import LocalBus
from tidings.server.clock import Ids, ManualClock
from tidings.server.config import Config
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring
from tidings.server.rest import create_rest_app
from tidings.server.services import Services
from tidings.server.store.base import Tx
from tidings.server.telemetry import Metrics

# A bound that no test meets by accident.
PLENTY = 1_000_000


@dataclass
class World:
    """The server, and who may knock: `as_(name)` gives the headers of a credential."""

    services: Services
    rest: Litestar
    clock: ManualClock
    metrics: Metrics
    http: httpx.AsyncClient
    app_id: str = ""
    other_app_id: str = ""
    credentials: dict[str, dict[str, str]] = field(default_factory=dict)
    draining: bool = False
    counter: Any = field(default_factory=lambda: itertools.count(1))

    def as_(self, who: str) -> dict[str, str]:
        return self.credentials[who]

    async def call(
        self,
        who: str | None,
        method: str,
        path: str,
        json: Any = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> httpx.Response:
        sent = {**(self.credentials[who] if who else {}), **(headers or {})}
        return await self.http.request(method, path, json=json, headers=sent, **more)

    async def ok(self, who: str, method: str, path: str, json: Any = None, **more: Any) -> Any:
        reply = await self.call(who, method, path, json, **more)
        assert reply.status_code < 300, f"{method} {path}: {reply.status_code} {reply.text}"
        return reply.json() if reply.content else None

    async def user(self, name: str, role: str = "user", *, app: str = "backend") -> None:
        """Create a user and give them a token."""
        await self.ok(app, "PUT", "/v1/users", {"users": [{"id": name, "role": role}]})
        token = (await self.ok(app, "POST", f"/v1/users/{name}/tokens", {}))["token"]
        own = self.app_id if app == "backend" else self.other_app_id
        self.credentials[name] = {"authorization": f"Bearer {token}", "tidings-app": own}

    async def key(self, name: str, *scopes: str) -> None:
        """An API key with these scopes."""
        made = await self.ok("backend", "POST", "/v1/app/keys", {"name": name, "scopes": list(scopes)})
        self.credentials[name] = {"authorization": f"Bearer {made['secret']}"}

    async def channel(self, *members: str, type: str = "group", **fields: Any) -> str:
        made = await self.ok("backend", "POST", "/v1/channels", {"type": type, "members": list(members), **fields})
        return str(made["id"])

    async def execute(self, sql: str, *args: Any) -> None:
        """Change the database behind the server's back."""

        async def unit(tx: Tx) -> int:
            return await tx.execute(sql, *args)

        await self.services.store.run(unit)

    async def send(self, who: str, channel: str, text: str = "hello", **fields: Any) -> Any:
        body = {"text": text, "key": f"k{next(self.counter)}", **fields}
        return await self.ok(who, "POST", f"/v1/channels/{channel}/messages", body)


@asynccontextmanager
async def open_world(path: Path, **settings: Any) -> AsyncIterator[World]:
    config = Config(**{"rest_rate_per_second": float(PLENTY), "rest_burst": PLENTY, "data_dir": path} | settings)
    clock = ManualClock()
    ids = Ids(clock)
    keyring = Keyring(KeyFile(path / "root.key"))
    store = await open_store(path)
    bus = LocalBus()
    metrics = Metrics()
    core = compose(config, store=store, bus=bus, keyring=keyring, clock=clock, ids=ids, metrics=metrics)
    services = core.services
    world: World
    rest = create_rest_app(services, config, metrics=metrics, draining=lambda: world.draining)
    transport = httpx.ASGITransport(rest, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://tidings.test") as http:
        world = World(services, rest, clock, metrics, http)
        first = await services.admin.create_app("Clinic", app_id="clinic")
        second = await services.admin.create_app("Market", app_id="market")
        world.app_id, world.other_app_id = first.app_id, second.app_id
        world.credentials["backend"] = {"authorization": f"Bearer {first.api_key}"}
        world.credentials["other_backend"] = {"authorization": f"Bearer {second.api_key}"}
        world.credentials["bad_token"] = {"authorization": "Bearer tk_nokey_nosecretnosecretnosecret"}
        try:
            yield world
        finally:
            await core.close()
