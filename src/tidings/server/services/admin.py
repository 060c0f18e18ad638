"""Running an app: keys, roles, channel types, relations, the audit trail.

Two rules hold throughout:

* Every change writes a line of the audit trail in its own transaction.
* Nobody gives away what they do not hold. A key, role, type or relation may add only words that its maker's own
  grants contain; keeping or taking away what others have been given is always allowed. So a key with few scopes
  cannot make a wider one, and an administrator who may not read messages cannot define a role that may.

Changes to roles, types and relations announce `AccessChanged(app)`: everything remembered about the app is dropped and
whatever is authorised after the answer is authorised anew. They do not move the access version of the app's channels
(there may be millions), so a message whose sending was decided before the change may still commit just after it.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.errors import Refusal
from tidings.server.store.base import Store, Tx
from tidings.server.store.log import write_audit
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.resources import AppSettings

from .api_keys import hash_secret, key_text
from .apps import Apps
from .change import Change, Changes

_ID: Final = re.compile(limits.ID_PATTERN)


class Action(StrEnum):
    """What the audit trail can tell, in one list."""

    APP_CREATED = "app.created"
    APP_UPDATED = "app.updated"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    SIGNING_KEY_CREATED = "signing_key.created"
    SIGNING_KEY_RETIRED = "signing_key.retired"
    PROVIDER_CREATED = "identity_provider.created"
    PROVIDER_DELETED = "identity_provider.deleted"
    ROLE_PUT = "role.put"
    ROLE_DELETED = "role.deleted"
    TYPE_PUT = "channel_type.put"
    TYPE_DELETED = "channel_type.deleted"
    RELATION_PUT = "relation.put"
    RELATION_DELETED = "relation.deleted"
    TOKEN_MINTED = "token.minted"  # noqa: S105 - an action's name, not a secret
    TOKENS_REVOKED = "token.revoked"


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


class Admin:
    """Use-cases of whoever runs an app."""

    def __init__(
        self,
        store: Store,
        apps: Apps,
        changes: Changes,
        keyring: Keyring,
        clock: Clock,
        ids: Ids,
        policy: OutboundPolicy | None = None,
    ) -> None:
        """`policy`: what identity providers' URLs may name beyond public https addresses."""
        self._store = store
        self._apps = apps
        self._changes = changes
        self._keyring = keyring
        self._clock = clock
        self._ids = ids
        self._policy = policy or OutboundPolicy()
        # A new app's keys are loaded before they are stored, to seal its first secret: one creation at a time.
        self._creating = asyncio.Lock()

    # ------------------------------------------------------------ apps

    async def create_app(self, name: str, app_id: str | None = None, via: str = "cli") -> NewApp:
        """Make an app with its encryption keys, one API key for everything and one HS256 signing key, all or nothing.

        `via` names who asked, for the audit trail. Raises Refusal `already_exists` or `invalid_field`.
        """
        _check_name(name)
        if app_id is not None:
            _check_id(app_id, "id")
        async with self._creating:
            return await self._create_app(name, app_id or self._ids.new_id("app_"), via)

    async def _create_app(self, name: str, app_id: str, via: str) -> NewApp:
        async def exists(tx: Tx) -> bool:
            return await tx.one("SELECT app FROM apps WHERE id=?", app_id) is not None

        taken = Refusal("already_exists", f"There is an app {app_id} already.", field="id")
        if await self._store.read(exists):
            raise taken
        now = self._clock.now_ms()
        key_id, key_secret = self._ids.new_id(""), self._ids.new_secret()
        kid, signing_secret = self._ids.new_id("sk_"), self._ids.new_secret()
        audit_id = self._ids.new_id("au_")
        self._keyring.forget_app(app_id)
        keys = (self._keyring.new_app_key(app_id), self._keyring.new_index_key(app_id))
        try:
            for key in keys:
                self._keyring.load_app_key(app_id, key)
            sealed = self._keyring.app_cipher(app_id).seal(signing_secret.encode(), signing_item(kid))

            async def unit(tx: Tx) -> Change[None]:
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
                await write_audit(
                    tx, app=app, id=audit_id, at=now, actor=via, action=Action.APP_CREATED, target=f"app:{app_id}"
                )
                return Change(None)

            await self._changes.run(unit)
        except BaseException:
            # The keys were never stored: nothing may be sealed with them.
            self._keyring.forget_app(app_id)
            raise
        return NewApp(app_id, name, key_text(key_id, key_secret), key_id, kid, signing_secret)


# ---------------------------------------------------------------- rows


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


# ---------------------------------------------------------------- checks


def _check_id(text: str, field: str) -> None:
    if not _ID.fullmatch(text):
        raise Refusal("invalid_field", "An id is 1-128 characters of A-Z a-z 0-9 _ . : @ + -.", field=field)


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= limits.NAME_LENGTH_MAX:
        raise Refusal(
            "invalid_field",
            f"A name has 1 to {limits.NAME_LENGTH_MAX} characters.",
            field="name",
            bound=limits.NAME_LENGTH_MAX,
        )
