"""A server without doors: store, bus, keys and the services that administer an app and let people in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.postgres import open_store
from tidings.server.bus.base import Notice
from tidings.server.bus.local import LocalBus
from tidings.server.clock import Ids, ManualClock
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.domain.permissions import grants_of
from tidings.server.outbound import GuardedClient
from tidings.server.services.access import AccessService, Actor
from tidings.server.services.admin import Admin
from tidings.server.services.apps import AppContext, Apps
from tidings.server.services.auth import Auth, verifying_keys
from tidings.server.services.change import Changes
from tidings.server.services.channels import Channels
from tidings.server.services.founding import NewApp
from tidings.server.services.jwks import JwksCache
from tidings.server.services.members import Members
from tidings.server.services.messages import Messages
from tidings.server.services.tokens import SigningKey, TokenVerifier, mint
from tidings.server.services.users import Users
from tidings.server.store.base import Row, Tx
from tidings.wire.requests import UserCreate

NOW = 1_790_000_000_000


@dataclass
class World:
    store: Any
    bus: LocalBus
    clock: ManualClock
    apps: Apps
    admin: Admin
    auth: Auth
    new: NewApp
    users: Users
    access: AccessService
    channels: Channels
    members: Members
    messages: Messages
    notices: list[Notice] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.new.api_key

    async def app(self) -> AppContext:
        return await self.apps.get(self.new.app_id)

    async def acting(self, user: str) -> Actor:
        """A user, as the door lets them in."""
        return (await self.auth.authenticate(self.key, on_behalf_of=user)).actor

    async def backend(self, *words: str) -> Actor:
        """The app's backend, with these scopes or all of them."""
        return Actor(await self.app(), None, grants_of(words or ("*",)), "key:test")

    async def rows(self, sql: str, *args: object) -> list[Row]:
        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(sql, *args)

        return await self.store.read(unit)

    async def write(self, sql: str, *args: object) -> None:
        async def unit(tx: Tx) -> None:
            await tx.execute(sql, *args)

        await self.store.run(unit)

    async def add_user(self, id: str, role: str = "user") -> None:
        await self.users.create(await self.backend(), UserCreate(id=id, role=role))

    async def token(self, user: str, *, ttl: int = 3600, jti: str | None = None, **claims: object) -> str:
        """A token as the app's own identity system would sign it."""
        keys = verifying_keys(await self.app())
        key = SigningKey(self.new.signing_kid, "HS256", self.new.signing_secret)
        return mint(keys, key, user, ttl, self.clock.now_ms(), jti=jti, claims=claims)


@asynccontextmanager
async def open_world(folder: Path) -> AsyncIterator[World]:
    clock = ManualClock(NOW)
    store = await open_store(folder, counting=True)
    bus = LocalBus()
    keyring = Keyring(KeyFile(folder / "root.key"))
    apps = Apps(store, keyring)
    changes = Changes(store, bus)
    ids = Ids(clock)
    access = AccessService(store, apps, keyring, changes)
    channels = Channels(store, apps, access, changes, clock, ids)

    members = Members(store, apps, access, changes, clock, ids)
    messages = Messages(store, access, bus, clock, ids)
    bus.listen(access.heard)
    client = GuardedClient(OutboundPolicy())
    users = Users(store, apps, changes, clock, ids)
    admin = Admin(store, apps, changes, keyring, clock, ids, OutboundPolicy(hosts=("idp.internal",)))
    jwks = JwksCache(client)
    auth = Auth(store, apps, changes, users, TokenVerifier(clock, jwks), bus, clock, ids)
    new = await admin.create_app("Clinic", "app_clinic")
    world = World(store, bus, clock, apps, admin, auth, new, users, access, channels, members, messages)
    bus.listen(world.notices.append)
    try:
        yield world
    finally:
        await auth.close()
        await jwks.aclose()
        await client.aclose()
        await store.close()
