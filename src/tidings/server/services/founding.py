"""Making an app: its encryption keys, its first API key and its first signing key, in one transaction."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Final

from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import Keyring
from tidings.server.errors import Refusal
from tidings.server.store.base import Store, Tx
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.resources import AppSettings

from .api_keys import hash_secret, key_text
from .audit import Action, Line, line_id
from .change import Change, Changes

_ID: Final = re.compile(limits.ID_PATTERN)

# A row to hold while it is decided whether there is an app: no app, no row of `apps` to lock.
_ONE_AT_A_TIME: Final = (
    "INSERT INTO meta(name,value) VALUES ('first_app','') ON CONFLICT (name) DO UPDATE SET value=excluded.value"
)


class _NotFirst(Exception):
    """Somebody else has made the first app."""


@dataclass(slots=True, frozen=True)
class NewApp:
    """An app that was just made, with the secrets that are shown this once."""

    app_id: str
    name: str
    api_key: str
    api_key_id: str
    signing_kid: str
    signing_secret: str

    def __repr__(self) -> str:
        return f"NewApp(app_id={self.app_id!r}, api_key_id={self.api_key_id!r}, signing_kid={self.signing_kid!r})"


def signing_item(kid: str) -> bytes:
    """The item that a sealed HS256 secret is bound to."""
    return b"signing:" + kid.encode()


async def insert_api_key(
    tx: Tx, app: int, id: str, name: str, secret_hash: bytes, scopes: list[str], at: int, expires_at: int | None
) -> None:
    """One row of `api_keys`."""
    await tx.execute(
        "INSERT INTO api_keys(id,app,name,secret_hash,scopes,created_at,expires_at) VALUES (?,?,?,?,?,?,?)",
        id,
        app,
        name,
        secret_hash,
        encode(scopes).decode(),
        at,
        expires_at,
    )


async def insert_signing_key(
    tx: Tx, app: int, kid: str, algorithm: str, sealed: bytes | None, public_key: str | None, at: int
) -> int:
    """One row of `signing_keys`, active; 0 if the app has a key of that id."""
    return await tx.execute(
        "INSERT INTO signing_keys(app,kid,algorithm,sealed,public_key,status,created_at)"
        " VALUES (?,?,?,?,?,'active',?) ON CONFLICT (app,kid) DO NOTHING",
        app,
        kid,
        algorithm,
        sealed,
        public_key,
        at,
    )


def check_id(text: str, field: str) -> None:
    """Refuse what is no id, naming the field."""
    if not _ID.fullmatch(text):
        raise Refusal("invalid_field", "An id is 1-128 characters of A-Z a-z 0-9 _ . : @ + -.", field=field)


def check_name(name: str) -> None:
    """Refuse an empty name and one that is too long."""
    if not 1 <= len(name) <= limits.NAME_LENGTH_MAX:
        raise Refusal(
            "invalid_field",
            f"A name has 1 to {limits.NAME_LENGTH_MAX} characters.",
            field="name",
            bound=limits.NAME_LENGTH_MAX,
        )


class Founder:
    """Makes apps."""

    def __init__(self, store: Store, changes: Changes, keyring: Keyring, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._changes = changes
        self._keyring = keyring
        self._clock = clock
        self._ids = ids
        # A new app's keys are loaded before they are stored, to seal its first secret: one creation at a time.
        self._creating = asyncio.Lock()

    async def found(self, name: str, app_id: str | None, via: str) -> NewApp:
        """Make an app with its encryption keys, one API key for everything and one HS256 signing key, all or nothing.

        `via` names who asked, for the audit trail. Raises Refusal `already_exists` or `invalid_field`.
        """
        check_name(name)
        if app_id is not None:
            check_id(app_id, "id")
        async with self._creating:
            return await self._make(name, app_id or self._ids.new_id("app_"), via)

    async def found_first(self, name: str, via: str) -> NewApp | None:
        """Make an app if there is none; None if there is one. Of several nodes that start at once, one makes it."""

        async def any_app(tx: Tx) -> bool:
            return await tx.one("SELECT 1 FROM apps LIMIT 1") is not None

        async with self._creating:
            if await self._store.read(any_app):
                return None
            try:
                return await self._make(name, self._ids.new_id("app_"), via, first=True)
            except _NotFirst:
                return None

    async def _make(self, name: str, app_id: str, via: str, *, first: bool = False) -> NewApp:
        async def exists(tx: Tx) -> bool:
            return await tx.one("SELECT app FROM apps WHERE id=?", app_id) is not None

        taken = Refusal("already_exists", f"There is an app {app_id} already.", field="id")
        if await self._store.read(exists):
            raise taken
        now = self._clock.now_ms()
        key_id, key_secret = self._ids.new_id(""), self._ids.new_secret()
        kid, signing_secret = self._ids.new_id("sk_"), self._ids.new_secret()
        audit_id = line_id(self._ids)
        self._keyring.forget_app(app_id)
        keys = (self._keyring.new_app_key(app_id), self._keyring.new_index_key(app_id))
        try:
            for key in keys:
                self._keyring.load_app_key(app_id, key)
            sealed = self._keyring.app_cipher(app_id).seal(signing_secret.encode(), signing_item(kid))

            async def unit(tx: Tx) -> Change[None]:
                if first:
                    # Whoever comes second waits here for the first one's commit, and then sees its app.
                    await tx.execute(_ONE_AT_A_TIME)
                    if await tx.one("SELECT 1 FROM apps LIMIT 1") is not None:
                        raise _NotFirst
                row = await tx.one(
                    "INSERT INTO apps(id,name,settings,created_at) VALUES (?,?,?,?) ON CONFLICT (id) DO NOTHING"
                    " RETURNING app",
                    app_id,
                    name,
                    encode(AppSettings()).decode(),
                    now,
                )
                if row is None:
                    raise taken
                app = int(row[0])
                for key in keys:
                    self._keyring.check_root_key(key.root_kid)
                    await tx.execute(
                        "INSERT INTO app_keys(app,purpose,version,root_kid,wrapped,created_at) VALUES (?,?,?,?,?,?)",
                        app,
                        key.purpose.value,
                        key.version,
                        key.root_kid,
                        key.wrapped,
                        now,
                    )
                await insert_api_key(tx, app, key_id, "first key", hash_secret(key_secret), ["*"], now, None)
                await insert_signing_key(tx, app, kid, "HS256", sealed, None, now)
                await Line(app, audit_id, now, via, Action.APP_CREATED, f"app:{app_id}").write(tx)
                return Change(None)

            await self._changes.run(unit)
        except BaseException:
            # The keys were never stored: nothing may be sealed with them.
            self._keyring.forget_app(app_id)
            raise
        return NewApp(app_id, name, key_text(key_id, key_secret), key_id, kid, signing_secret)
