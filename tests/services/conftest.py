"""A whole server below its doors: real store, real keys, real bus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from tests.postgres import open_store
from tidings.server.bus.base import Notice, Published
from tidings.server.bus.local import LocalBus
from tidings.server.clock import Ids, ManualClock
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.permissions import grants_of
from tidings.server.services.access import AccessService, Actor, backend_actor
from tidings.server.services.apps import AppContext, Apps
from tidings.server.services.change import Changes
from tidings.server.services.channels import Channels
from tidings.server.services.members import Members
from tidings.server.services.messages import Draft, Messages
from tidings.server.services.rotation import BOXES
from tidings.server.services.users import Users
from tidings.server.store.base import Appended, Row, Store, Tx
from tidings.wire.requests import ChannelCreate, UserCreate
from tidings.wire.resources import AppSettings, Channel, ChannelType

N = TypeVar("N")


@dataclass
class World:
    """One app and everything that serves it."""

    store: Store
    keyring: Keyring
    apps: Apps
    app: AppContext
    bus: LocalBus
    clock: ManualClock
    ids: Ids
    changes: Changes
    access: AccessService
    users: Users
    channels: Channels
    members: Members
    messages: Messages
    backend: Actor
    notices: list[Notice] = field(default_factory=list)
    sent: int = 0

    async def user(self, name: str, role: str = "user") -> Actor:
        """Create a user; them, acting."""
        await self.users.create(self.backend, UserCreate(id=name, role=role))
        return self.acting(name, role)

    def acting(self, name: str, role: str = "user") -> Actor:
        return Actor(self.app, name, self.app.app_roles[role], f"user:{name}")

    def key(self, *words: str) -> Actor:
        """A backend whose key has these scopes only."""
        return backend_actor(self.app, "narrow", grants_of(words))

    async def channel(self, *members: str, type: str = "group", id: str | None = None, **fields: Any) -> Channel:
        """A channel made by the backend."""
        made, _ = await self.channels.create(
            self.backend, ChannelCreate(id=id, type=type, members=list(members), **fields)
        )
        return made

    async def send(self, actor: Actor, channel: str, text: str = "hello", **fields: Any) -> Appended:
        self.sent += 1
        return await self.messages.send(actor, channel, Draft(text=text, **fields), f"k{self.sent}")

    async def rows(self, sql: str, *args: Any) -> list[Row]:
        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(sql, *args)

        return await self.store.read(unit)

    async def opens(self, *tables: str) -> int:
        """How many boxes these tables hold under the app's key; each opens by the name that key rotation has for it."""
        opened = 0
        for kind in BOXES:
            if kind.table in tables:
                columns = ", ".join(f"{kind.table}.{key}" for key in kind.keys)
                for *key, sealed in await self.rows(f"SELECT {columns}, sealed FROM {kind.table}"):
                    assert self.app.cipher.open(bytes(sealed), kind.item(*key))
                    opened += 1
        return opened

    async def execute(self, sql: str, *args: Any) -> None:
        async def unit(tx: Tx) -> int:
            return await tx.execute(sql, *args)

        await self.store.run(unit)

    async def configure(self, *types: ChannelType, **settings: Any) -> None:
        """Give the app channel types and settings of its own."""
        for definition in types:
            await self.execute(
                "INSERT INTO channel_types(app,name,definition) VALUES (?,?,?)",
                self.app.app,
                definition.name,
                msgspec.json.encode(definition).decode(),
            )
        if settings:
            await self.execute(
                "UPDATE apps SET settings=? WHERE app=?",
                msgspec.json.encode(AppSettings(**settings)).decode(),
                self.app.app,
            )
        self.apps.forget(self.app.app)
        self.app = await self.apps.get(self.app.id)
        self.backend = backend_actor(self.app, "k1")
        self.access.forget_app(self.app.app)

    def told(self, kind: type[N]) -> list[N]:
        """Notices of a kind, in the order they went out."""
        return [notice for notice in self.notices if isinstance(notice, kind)]

    def events(self, stream: str | None = None) -> list[dict[str, Any]]:
        """Events that went out, of one stream (by its public name) or all."""
        found = [msgspec.json.decode(notice.payload) for notice in self.told(Published)]
        return [event for event in found if stream is None or event["stream"] == stream]

    def own_events(self) -> list[dict[str, Any]]:
        return self.events("@me")


def app_rows(keyring: Keyring, app_id: str) -> list[tuple[Any, ...]]:
    """Rows of `app_keys` for a new app, loaded."""
    keys = [keyring.new_app_key(app_id), keyring.new_index_key(app_id)]
    for key in keys:
        keyring.load_app_key(app_id, key)
    return [(key.purpose.value, key.version, key.root_kid, key.wrapped) for key in keys]


async def insert_app(store: Store, keyring: Keyring, number: int, app_id: str) -> None:
    async def unit(tx: Tx) -> None:
        await tx.execute(
            "INSERT INTO apps(app,id,name,settings,created_at) VALUES (?,?,?,?,?)", number, app_id, "Test", "{}", 1
        )
        for row in app_rows(keyring, app_id):
            await tx.execute(
                "INSERT INTO app_keys(app,purpose,version,root_kid,wrapped,created_at) VALUES (?,?,?,?,?,?)",
                number,
                *row,
                1,
            )

    await store.run(unit)


async def build(path: Path) -> World:
    """A world in a directory. Whoever calls closes its store."""
    store = await open_store(path)
    keyring = Keyring(KeyFile(path / "root.key"))
    await insert_app(store, keyring, 1, "app_1")
    apps = Apps(store, keyring)
    app = await apps.get("app_1")
    clock = ManualClock()
    ids = Ids(clock)
    bus = LocalBus()
    changes = Changes(store, bus)
    access = AccessService(store, apps, keyring, changes)
    notices: list[Notice] = []
    bus.listen(notices.append)

    bus.listen(access.heard)
    return World(
        store=store,
        keyring=keyring,
        apps=apps,
        app=app,
        bus=bus,
        clock=clock,
        ids=ids,
        changes=changes,
        access=access,
        users=Users(store, apps, changes, clock, ids),
        channels=Channels(store, apps, access, changes, clock, ids),
        members=Members(store, apps, access, changes, clock, ids),
        messages=Messages(store, access, bus, clock, ids),
        backend=backend_actor(app, "k1"),
        notices=notices,
    )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await build(tmp_path)
    yield made
    await made.store.close()
