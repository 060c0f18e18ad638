"""Apps in memory: settings, keys, roles and channel types, compiled for the hot path.

An `AppContext` is immutable; a change makes a new one. Sessions and requests hold on to the context they came with
only as long as one command takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from tidings.server.crypto.keyring import AppCipher, KeyPurpose, Keyring, WrappedKey, WrappedStreamKey
from tidings.server.domain.permissions import (
    BUILT_IN,
    NONE,
    PUBLIC_GRANTS,
    Grants,
    Permission,
    bit,
    grants_of,
)
from tidings.server.errors import NotFound
from tidings.server.store.base import Store, Tx
from tidings.wire.resources import AppSettings, ChannelFeatures, ChannelType

BUILT_IN_TYPES: dict[str, ChannelType] = {
    "direct": ChannelType(
        name="direct",
        features=ChannelFeatures(),
        default_role="member",
        creator_role="member",
        members_max=2,
        direct=True,
        built_in=True,
    ),
    "group": ChannelType(name="group", features=ChannelFeatures(), built_in=True),
    "public": ChannelType(name="public", features=ChannelFeatures(), public=True, built_in=True),
}


@dataclass(slots=True, frozen=True)
class CompiledType:
    """A channel type with its grants as masks."""

    definition: ChannelType
    grants: dict[str, Grants]
    # What everyone in the app may do in channels of this type.
    everyone: Grants


class PresendDefinition(msgspec.Struct, frozen=True):
    """How an app is asked about messages before they are stored; see `tidings.wire.presend`."""

    url: str
    timeout_ms: int
    on_failure: str
    channel_types: list[str]
    include_backend: bool
    enabled: bool


@dataclass(slots=True, frozen=True)
class PresendRule:
    """The hook of an app that wants to be asked. `version` grows with every change."""

    definition: PresendDefinition
    sealed: bytes
    version: int

    def applies(self, channel_type: str, *, backend: bool) -> bool:
        """Whether it is asked about a message in a channel of this type; `backend`: that no user sends."""
        types = self.definition.channel_types
        return (not types or channel_type in types) and (not backend or self.definition.include_backend)


@dataclass(slots=True, frozen=True)
class AppContext:
    """One app, as everything that serves it needs it."""

    app: int
    id: str
    name: str
    created_at: int
    settings: AppSettings
    app_roles: dict[str, Grants]
    channel_roles: dict[str, Grants]
    relation_roles: dict[str, Grants]
    types: dict[str, CompiledType]
    # Whether there are roles in a channel that may not read it: then membership alone says nothing, and everyone's
    # access is looked at before they hear a channel live.
    blind_roles: bool
    # Signing keys, identity providers: rows as stored, made into a verifier's input by `services.tokens`.
    signing: tuple[tuple[Any, ...], ...]
    providers: tuple[tuple[Any, ...], ...]
    cipher: AppCipher
    presend: PresendRule | None = None


class Apps:
    """Loads apps once and keeps them."""

    def __init__(self, store: Store, keyring: Keyring) -> None:
        self._store = store
        self.keyring = keyring
        self._by_id: dict[str, AppContext] = {}
        self._by_number: dict[int, AppContext] = {}
        # Grows with everything forgotten: what was read before that must not be remembered after it.
        self._forgotten = 0

    def cached(self, app_id: str) -> AppContext | None:
        """The app if it is in memory."""
        return self._by_id.get(app_id)

    async def get(self, app_id: str) -> AppContext:
        """The app by its public id. Raises NotFound."""
        found = self._by_id.get(app_id)
        if found is None:
            found = await self._load("id", app_id)
        return found

    async def numbered(self, app: int) -> AppContext:
        """The app by its number. Raises NotFound."""
        found = self._by_number.get(app)
        if found is None:
            found = await self._load("app", app)
        return found

    def forget(self, app: int) -> None:
        """Read the app anew at its next use: its settings, keys, roles or types have changed."""
        self._forgotten += 1
        found = self._by_number.pop(app, None)
        if found is not None:
            self._by_id.pop(found.id, None)

    def forget_all(self) -> None:
        """Read every app anew at its next use."""
        self._forgotten += 1
        self._by_id.clear()
        self._by_number.clear()

    async def _load(self, column: str, value: str | int) -> AppContext:
        async def unit(tx: Tx) -> tuple[Any, ...] | None:
            row = await tx.one(
                f"SELECT app,id,name,settings,created_at FROM apps WHERE {column}=?",
                value,
            )
            if row is None:
                return None
            app = row[0]
            return (
                row,
                await tx.all("SELECT purpose,version,root_kid,wrapped FROM app_keys WHERE app=?", app),
                await tx.all("SELECT scope,name,grants FROM roles WHERE app=?", app),
                await tx.all("SELECT name,definition FROM channel_types WHERE app=?", app),
                await tx.all(
                    "SELECT kid,algorithm,sealed,public_key,status,created_at FROM signing_keys WHERE app=?", app
                ),
                await tx.all(
                    "SELECT id,jwks_url,algorithms,cache_seconds,created_at FROM identity_providers WHERE app=?", app
                ),
                await tx.one("SELECT definition,sealed,updated_at FROM presend_hooks WHERE app=?", app),
            )

        forgotten = self._forgotten
        found = await self._store.read(unit)
        if found is None:
            raise NotFound("app")
        (app, app_id, name, settings, created_at), keys, roles, types, signing, providers, presend = found
        for purpose, version, root_kid, wrapped in keys:
            self.keyring.load_app_key(
                app_id,
                WrappedKey(purpose=KeyPurpose(purpose), version=version, root_kid=root_kid, wrapped=wrapped),
            )
        context = compile_app(
            app=app,
            app_id=app_id,
            name=name,
            created_at=created_at,
            settings=msgspec.json.decode(settings, type=AppSettings),
            roles=roles,
            types=[msgspec.json.decode(definition, type=ChannelType) for _, definition in types],
            signing=tuple(signing),
            providers=tuple(providers),
            cipher=self.keyring.app_cipher(app_id),
            presend=_presend(presend),
        )
        if forgotten == self._forgotten:
            self._by_id[app_id] = self._by_number[app] = context
        return context

    def stream_key(self, wrapped: bytes, version: int, app_version: int) -> WrappedStreamKey:
        """A stream row's three key columns as the keyring takes them."""
        return WrappedStreamKey(version=version, app_key_version=app_version, wrapped=wrapped)


def compile_app(
    *,
    app: int,
    app_id: str,
    name: str,
    created_at: int,
    settings: AppSettings,
    roles: list[tuple[str, str, str]],
    types: list[ChannelType],
    signing: tuple[tuple[Any, ...], ...],
    providers: tuple[tuple[Any, ...], ...],
    cipher: AppCipher,
    presend: PresendRule | None = None,
) -> AppContext:
    """Turn words into masks: the app's own roles and types over the built-in ones."""
    masks: dict[str, dict[str, Grants]] = {
        scope: {role: grants_of({word.value for word in words}) for role, words in built_in.items()}
        for scope, built_in in BUILT_IN.items()
    }
    for scope, role, grants in roles:
        masks[scope][role] = grants_of(msgspec.json.decode(grants, type=list[str]))
    compiled = {}
    for definition in [*BUILT_IN_TYPES.values(), *types]:
        own = {role: grants_of(words) for role, words in definition.grants.items()}
        compiled[definition.name] = CompiledType(
            definition,
            {**masks["channel"], **own},
            grants_of({word.value for word in PUBLIC_GRANTS}) if definition.public else NONE,
        )
    return AppContext(
        app,
        app_id,
        name,
        created_at,
        settings,
        masks["app"],
        masks["channel"],
        masks["relation"],
        compiled,
        any(not grants & bit(Permission.CHANNEL_READ) for one in compiled.values() for grants in one.grants.values()),
        signing,
        providers,
        cipher,
        presend,
    )


def _presend(row: tuple[Any, ...] | None) -> PresendRule | None:
    if row is None:
        return None
    definition = msgspec.json.decode(row[0], type=PresendDefinition)
    return PresendRule(definition, row[1], row[2]) if definition.enabled else None
