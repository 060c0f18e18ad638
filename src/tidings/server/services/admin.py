"""Running an app: keys, roles, channel types, relations, the audit trail.

Two rules hold throughout:
* Every change writes a line of the audit trail in its own transaction.
* Nobody gives away what they do not hold. A key, role, type or relation may add only words that its maker's own
  grants contain; keeping or taking away what others have been given is always allowed. So a key with few scopes
  cannot make a wider one, and an administrator who may not read messages cannot define a role that may.

Changes to roles and types announce `AccessChanged(app)`, those to relations name the user. None moves the access
version of channels (there may be millions): a message whose sending was decided before may still commit just after.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec

from tidings.server.bus.base import AccessChanged
from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import Keyring
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.domain.permissions import (
    BUILT_IN,
    PUBLIC_GRANTS,
    Grants,
    Permission,
    bit,
    grants_of,
)
from tidings.server.errors import NotFound, Refusal
from tidings.server.store.base import Row, Store, Tx
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.ids import ms_of, time_of
from tidings.wire.requests import (
    ApiKeyCreate,
    AppUpdate,
    ChannelTypePut,
    IdentityProviderCreate,
    SigningKeyCreate,
)
from tidings.wire.resources import (
    ApiKey,
    App,
    AppSettings,
    AuditEntry,
    ChannelFeatures,
    ChannelType,
    IdentityProvider,
    Relation,
    Role,
    SigningKeyInfo,
)

from .access import Actor
from .api_keys import hash_secret, key_text
from .apps import BUILT_IN_TYPES, Apps
from .audit import Action, Line, entry_of, line_id, line_of, lines_before
from .change import Change, Changes
from .founding import Founder, NewApp, check_id, check_name, insert_api_key, insert_signing_key, signing_item
from .granting import check_held, check_room, check_words, lock_rules, role_mask, words_in_order
from .notifications import check_push_settings
from .paging import make_cursor, read_cursor
from .signing import JwksSource, SigningKey

P = Permission

# Keys that work at once: a few backends, each with an old and a new one.
API_KEYS_MAX: Final = 100
# A rotation needs two, a migration between identity systems a few.
SIGNING_KEYS_MAX: Final = 20
PROVIDERS_MAX: Final = 10
# Revoked and retired keys that stay in the lists; the audit trail remembers all of them.
FORMER_KEYS_KEPT: Final = 100
# Roles and types are the words of a product's design; they are compiled into masks each time an app is loaded.
ROLES_MAX: Final = 200
TYPES_MAX: Final = 100
# A large panel; each relation is one row.
RELATIONS_PER_USER_MAX: Final = 10_000

Scope: TypeAlias = Literal["app", "channel", "relation"]
SCOPES: Final[tuple[Scope, ...]] = ("app", "channel", "relation")


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
        self._founder = Founder(store, changes, keyring, clock, ids)

    # ------------------------------------------------------------ apps

    async def create_app(self, name: str, app_id: str | None = None, via: str = "cli") -> NewApp:
        """Make an app with its encryption keys, one API key for everything and one HS256 signing key, all or nothing.

        `via` names who asked, for the audit trail. Raises Refusal `already_exists` or `invalid_field`.
        """
        return await self._founder.found(name, app_id, via)

    async def create_first_app(self, name: str, via: str = "cli") -> NewApp | None:
        """Make an app if there is none; None if there is one. Of several nodes that start at once, one makes it."""
        return await self._founder.found_first(name, via)

    async def get_app(self, actor: Actor) -> App:
        """The app itself. Needs `app.read`."""
        actor.check(P.APP_READ)
        app = await self._apps.get(actor.app.id)
        return App(id=app.id, name=app.name, settings=app.settings, created_at=time_of(app.created_at))

    async def update_app(self, actor: Actor, update: AppUpdate) -> App:
        """Change name or settings (which are replaced as a whole). Needs `app.update`."""
        actor.check(P.APP_UPDATE)
        changed = {}
        if isinstance(update.name, str):
            check_name(update.name)
            changed["name"] = update.name
        if isinstance(update.settings, AppSettings):
            check_push_settings(update.settings.push)
            changed["settings"] = encode(update.settings).decode()
        if changed:
            app = actor.app.app
            line = self._line(actor, Action.APP_UPDATED, f"app:{actor.app.id}", fields=sorted(changed))

            async def unit(tx: Tx) -> Change[None]:
                for column, value in changed.items():
                    await tx.execute(f"UPDATE apps SET {column}=? WHERE app=?", value, app)
                await line.write(tx)
                return Change(None, (AccessChanged(app),))

            await self._changes.run(unit)
        context = await self._apps.get(actor.app.id)
        return App(id=context.id, name=context.name, settings=context.settings, created_at=time_of(context.created_at))

    # ------------------------------------------------------------ API keys

    async def list_api_keys(self, actor: Actor) -> list[ApiKey]:
        """The app's API keys, without their secrets, oldest first; revoked ones too. Needs `key.manage`."""
        actor.check(P.KEY_MANAGE)
        rows = await self._rows(
            "SELECT id,name,scopes,created_at,expires_at,revoked_at,last_used_at FROM api_keys WHERE app=?"
            " ORDER BY created_at, id",
            actor.app.app,
        )
        return [
            ApiKey(
                id=id,
                name=name,
                scopes=msgspec.json.decode(scopes, type=list[str]),
                created_at=time_of(created_at),
                expires_at=_time_or_none(expires_at),
                revoked_at=_time_or_none(revoked_at),
                last_used_at=_time_or_none(last_used_at),
            )
            for id, name, scopes, created_at, expires_at, revoked_at, last_used_at in rows
        ]

    async def create_api_key(self, actor: Actor, new: ApiKeyCreate) -> ApiKey:
        """Make an API key; the answer shows the whole key, once. Needs `key.manage` and every word it gets."""
        actor.check(P.KEY_MANAGE)
        check_name(new.name)
        scopes = list(dict.fromkeys(new.scopes))
        if not scopes:
            raise Refusal("invalid_field", "A key needs at least one scope.", field="scopes", bound=1)
        check_held(actor, check_words(scopes, "scopes"), "scopes")
        app, now = actor.app.app, self._clock.now_ms()
        expires_at = None if new.expires_at is None else ms_of(new.expires_at)
        if expires_at is not None and expires_at <= now:
            raise Refusal("invalid_field", "The key would have expired already.", field="expires_at")
        id, secret = self._ids.new_id(""), self._ids.new_secret()
        line = self._line(actor, Action.KEY_CREATED, f"key:{id}", scopes=scopes)

        async def unit(tx: Tx) -> Change[None]:
            await check_room(
                tx,
                "SELECT COUNT(*) FROM api_keys WHERE app=? AND revoked_at IS NULL AND COALESCE(expires_at,?)>=?",
                app,
                now,
                now,
                bound=API_KEYS_MAX,
                what="API keys",
            )
            await tx.execute(
                "DELETE FROM api_keys WHERE app=? AND revoked_at IS NOT NULL AND id NOT IN (SELECT id FROM api_keys"
                " WHERE app=? AND revoked_at IS NOT NULL ORDER BY revoked_at DESC LIMIT ?)",
                app,
                app,
                FORMER_KEYS_KEPT,
            )
            await insert_api_key(tx, app, id, new.name, hash_secret(secret), scopes, now, expires_at)
            await line.write(tx)
            return Change(None)

        await self._changes.run(unit)
        return ApiKey(
            id=id,
            name=new.name,
            scopes=scopes,
            created_at=time_of(now),
            expires_at=_time_or_none(expires_at),
            secret=key_text(id, secret),
        )

    async def revoke_api_key(self, actor: Actor, key_id: str) -> None:
        """End an API key, at once; a key may end itself. Needs `key.manage`. Raises NotFound."""
        actor.check(P.KEY_MANAGE)
        app, now = actor.app.app, self._clock.now_ms()
        line = self._line(actor, Action.KEY_REVOKED, f"key:{key_id}")

        async def unit(tx: Tx) -> Change[None]:
            done = await tx.execute(
                "UPDATE api_keys SET revoked_at=? WHERE app=? AND id=? AND revoked_at IS NULL", now, app, key_id
            )
            if not done:
                raise NotFound("API key")
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)

    # ------------------------------------------------------------ signing keys

    async def list_signing_keys(self, actor: Actor) -> list[SigningKeyInfo]:
        """The keys that verify users' tokens, oldest first; retired ones too. Needs `key.manage`."""
        actor.check(P.KEY_MANAGE)
        rows = await self._rows(
            "SELECT kid,algorithm,status,created_at,public_key FROM signing_keys WHERE app=? ORDER BY created_at, kid",
            actor.app.app,
        )
        return [
            SigningKeyInfo(
                kid=kid, algorithm=algorithm, status=status, created_at=time_of(created_at), public_key=public_key
            )
            for kid, algorithm, status, created_at, public_key in rows
        ]

    async def create_signing_key(self, actor: Actor, new: SigningKeyCreate) -> SigningKeyInfo:
        """Add a key that verifies users' tokens, beside the active ones. A secret made here is shown once.

        Needs `key.manage`, and `token.mint`, since whoever has the key signs tokens of any user.
        """
        actor.check(P.KEY_MANAGE)
        actor.check(P.TOKEN_MINT)
        secret, public_key = new.secret, new.public_key
        made = new.algorithm == "HS256" and secret is None
        if made:
            secret = self._ids.new_secret()
        wanted, unwanted = ("secret", "public_key") if new.algorithm == "HS256" else ("public_key", "secret")
        material = {"secret": secret, "public_key": public_key}
        if material[unwanted] is not None:
            raise Refusal("invalid_field", f"{new.algorithm} takes no {unwanted}.", field=unwanted)
        if material[wanted] is None:
            raise Refusal("invalid_field", f"{new.algorithm} needs the public key, in PEM.", field=wanted)
        kid = new.kid or self._ids.new_id("sk_")
        try:
            SigningKey(kid, new.algorithm, str(material[wanted]))
        except ValueError as error:
            raise Refusal("invalid_field", f"{error}.", field=wanted) from None
        context = await self._apps.get(actor.app.id)
        sealed = None if secret is None else context.cipher.seal(secret.encode(), signing_item(kid))
        app, now = actor.app.app, self._clock.now_ms()
        line = self._line(actor, Action.SIGNING_KEY_CREATED, f"signing_key:{kid}", algorithm=new.algorithm)

        async def unit(tx: Tx) -> Change[None]:
            await check_room(
                tx,
                "SELECT COUNT(*) FROM signing_keys WHERE app=? AND status='active'",
                app,
                bound=SIGNING_KEYS_MAX,
                what="active signing keys",
            )
            if not await insert_signing_key(tx, app, kid, new.algorithm, sealed, public_key, now):
                raise Refusal("already_exists", f"There is a key {kid} already.", field="kid")
            await tx.execute(
                "DELETE FROM signing_keys WHERE app=? AND status='retired' AND kid NOT IN (SELECT kid FROM"
                " signing_keys WHERE app=? AND status='retired' ORDER BY created_at DESC LIMIT ?)",
                app,
                app,
                FORMER_KEYS_KEPT,
            )
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)
        return SigningKeyInfo(
            kid=kid,
            algorithm=new.algorithm,
            status="active",
            created_at=time_of(now),
            public_key=public_key,
            secret=secret if made else None,
        )

    async def retire_signing_key(self, actor: Actor, kid: str) -> None:
        """Stop a key from verifying: tokens it signed are refused from now on. Rotate by adding the new key first.

        Needs `key.manage`. Raises NotFound.
        """
        actor.check(P.KEY_MANAGE)
        app = actor.app.app
        line = self._line(actor, Action.SIGNING_KEY_RETIRED, f"signing_key:{kid}")

        async def unit(tx: Tx) -> Change[None]:
            if not await tx.execute(
                "UPDATE signing_keys SET status='retired' WHERE app=? AND kid=? AND status='active'", app, kid
            ):
                raise NotFound("signing key")
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)

    # ------------------------------------------------------------ identity providers

    async def list_providers(self, actor: Actor) -> list[IdentityProvider]:
        """The app's identity providers. Needs `key.manage`."""
        actor.check(P.KEY_MANAGE)
        rows = await self._rows(
            "SELECT id,jwks_url,algorithms,cache_seconds,created_at FROM identity_providers WHERE app=?"
            " ORDER BY created_at, id",
            actor.app.app,
        )
        return [
            IdentityProvider(
                id=id,
                jwks_url=url,
                algorithms=msgspec.json.decode(algorithms),
                cache_seconds=cache_seconds,
                created_at=time_of(created_at),
            )
            for id, url, algorithms, cache_seconds, created_at in rows
        ]

    async def create_provider(self, actor: Actor, new: IdentityProviderCreate) -> IdentityProvider:
        """Believe the keys at a URL. Needs `key.manage` and `token.mint`: the provider can let anybody in.

        The URL must be https at a public address, or a host that the operator listed; each fetch judges it again.
        """
        actor.check(P.KEY_MANAGE)
        actor.check(P.TOKEN_MINT)
        # Here and not above: it brings an HTTP client, which a start can do without.
        from tidings.server.outbound import OutboundRefused, check_url

        try:
            check_url(new.jwks_url, self._policy)
            JwksSource(new.jwks_url, tuple(new.algorithms), new.cache_seconds)
        except OutboundRefused as error:
            raise Refusal("invalid_field", f"{_upper(error.detail)}.", field="jwks_url") from None
        except ValueError as error:
            raise Refusal("invalid_field", f"{_upper(str(error))}.", field="algorithms") from None
        app, now, id = actor.app.app, self._clock.now_ms(), self._ids.new_id("idp_")
        algorithms = list(dict.fromkeys(new.algorithms))
        line = self._line(actor, Action.PROVIDER_CREATED, f"identity_provider:{id}", algorithms=algorithms)

        async def unit(tx: Tx) -> Change[None]:
            await check_room(
                tx,
                "SELECT COUNT(*) FROM identity_providers WHERE app=?",
                app,
                bound=PROVIDERS_MAX,
                what="identity providers",
            )
            await tx.execute(
                "INSERT INTO identity_providers(app,id,jwks_url,algorithms,cache_seconds,created_at)"
                " VALUES (?,?,?,?,?,?)",
                app,
                id,
                new.jwks_url,
                encode(algorithms).decode(),
                new.cache_seconds,
                now,
            )
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)
        return IdentityProvider(
            id=id,
            jwks_url=new.jwks_url,
            algorithms=algorithms,
            cache_seconds=new.cache_seconds,
            created_at=time_of(now),
        )

    async def delete_provider(self, actor: Actor, provider_id: str) -> None:
        """Believe its keys no more, from now on. Needs `key.manage`. Raises NotFound."""
        actor.check(P.KEY_MANAGE)
        app = actor.app.app
        line = self._line(actor, Action.PROVIDER_DELETED, f"identity_provider:{provider_id}")

        async def unit(tx: Tx) -> Change[None]:
            if not await tx.execute("DELETE FROM identity_providers WHERE app=? AND id=?", app, provider_id):
                raise NotFound("identity provider")
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)

    # ------------------------------------------------------------ roles

    async def list_roles(self, actor: Actor) -> list[Role]:
        """Every role, the app's own and the built-in ones that it has not put its own in place of. Needs `app.read`."""
        actor.check(P.APP_READ)
        rows = await self._rows("SELECT scope,name,grants FROM roles WHERE app=?", actor.app.app)
        found = {
            (scope, name): Role(scope=scope, name=name, grants=words_in_order(BUILT_IN[scope][name]), built_in=True)
            for scope in SCOPES
            for name in BUILT_IN[scope]
        }
        for scope, name, grants in rows:
            found[scope, name] = Role(scope=scope, name=name, grants=msgspec.json.decode(grants))
        return [found[key] for key in sorted(found, key=lambda key: (SCOPES.index(key[0]), key[1]))]

    async def put_role(self, actor: Actor, scope: Scope, name: str, grants: list[str]) -> Role:
        """Make a role or change what it grants; a built-in name may be given another meaning.

        Needs `role.manage` and every word that is added. Channel and relation roles hold only channels' words.
        """
        actor.check(P.ROLE_MANAGE)
        _check_scope(scope)
        check_id(name, "name")
        words = list(dict.fromkeys(grants))
        mask = check_words(words, "grants", channel_only=scope != "app")
        app = actor.app.app
        line = self._line(actor, Action.ROLE_PUT, f"role:{scope}/{name}", grants=words)

        async def unit(tx: Tx) -> Change[None]:
            await lock_rules(tx, app)
            row = await tx.one("SELECT grants FROM roles WHERE app=? AND scope=? AND name=?", app, scope, name)
            check_held(actor, Grants(mask & ~role_mask(row, scope, name)), "grants")
            if row is None:
                await check_room(
                    tx, "SELECT COUNT(*) FROM roles WHERE app=?", app, bound=ROLES_MAX, what="roles of its own"
                )
            await tx.execute(
                "INSERT INTO roles(app,scope,name,grants) VALUES (?,?,?,?)"
                " ON CONFLICT (app,scope,name) DO UPDATE SET grants=excluded.grants",
                app,
                scope,
                name,
                encode(words).decode(),
            )
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)
        return Role(scope=scope, name=name, grants=words)

    async def delete_role(self, actor: Actor, scope: Scope, name: str) -> None:
        """Remove a role of the app's own; a built-in one of that name comes back. Whoever holds a removed role keeps
        its name and gets nothing from it.

        Needs `role.manage`, and the words that come back. Raises NotFound, or `conflict` while a type of channels
        gives the role to its members.
        """
        actor.check(P.ROLE_MANAGE)
        _check_scope(scope)
        app = actor.app.app
        line = self._line(actor, Action.ROLE_DELETED, f"role:{scope}/{name}")

        async def unit(tx: Tx) -> Change[None]:
            await lock_rules(tx, app)
            row = await tx.one("SELECT grants FROM roles WHERE app=? AND scope=? AND name=?", app, scope, name)
            if row is None:
                raise NotFound("role")
            check_held(actor, Grants(role_mask(None, scope, name) & ~role_mask(row, scope, name)), "name")
            if scope == "channel" and name not in BUILT_IN[scope]:
                for (definition,) in await tx.all("SELECT definition FROM channel_types WHERE app=?", app):
                    type = msgspec.json.decode(definition, type=ChannelType)
                    if name in (type.default_role, type.creator_role) and name not in type.grants:
                        raise Refusal("conflict", f"Channels of the type {type.name} give this role to members.")
            await tx.execute("DELETE FROM roles WHERE app=? AND scope=? AND name=?", app, scope, name)
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)

    # ------------------------------------------------------------ channel types

    async def list_types(self, actor: Actor) -> list[ChannelType]:
        """Every channel type, built-in ones first. Needs `user.read`, `channel.create` or `app.read`."""
        _check_reads_types(actor)
        app = await self._apps.get(actor.app.id)
        types = [compiled.definition for compiled in app.types.values()]
        return sorted(types, key=lambda type: (not type.built_in, type.name))

    async def get_type(self, actor: Actor, name: str) -> ChannelType:
        """One channel type. Needs `user.read`, `channel.create` or `app.read`. Raises NotFound."""
        _check_reads_types(actor)
        compiled = (await self._apps.get(actor.app.id)).types.get(name)
        if compiled is None:
            raise NotFound("channel type")
        return compiled.definition

    async def put_type(self, actor: Actor, name: str, put: ChannelTypePut) -> ChannelType:
        """Make a type of channels or replace its definition. Built-in types cannot be changed.

        Needs `app.update`, and the words that the type adds: in its roles, to everyone by being public, or
        `channel.read` when members shall see what was before they joined.
        """
        actor.check(P.APP_UPDATE)
        check_id(name, "name")
        _check_own_type(name)
        grants = {role: list(dict.fromkeys(words)) for role, words in put.grants.items()}
        masks = {role: check_words(words, f"grants.{role}", channel_only=True) for role, words in grants.items()}
        for role in grants:
            check_id(role, "grants")
        definition = ChannelType(
            name=name,
            features=ChannelFeatures(**msgspec.structs.asdict(put.features)),
            grants=grants,
            default_role=put.default_role,
            creator_role=put.creator_role,
            members_max=put.members_max,
            public=put.public,
            history=put.history,
        )
        app = actor.app.app
        line = self._line(actor, Action.TYPE_PUT, f"channel_type:{name}")

        async def unit(tx: Tx) -> Change[None]:
            await lock_rules(tx, app)
            own: dict[str, str] = dict(
                await tx.all("SELECT name,grants FROM roles WHERE app=? AND scope='channel'", app)
            )
            for field, role in (("default_role", put.default_role), ("creator_role", put.creator_role)):
                if role not in grants and role not in own and role not in BUILT_IN["channel"]:
                    raise Refusal("invalid_field", f"There is no channel role {role}.", field=field)
            row = await tx.one("SELECT definition FROM channel_types WHERE app=? AND name=?", app, name)
            before = None if row is None else msgspec.json.decode(row[0], type=ChannelType)
            if before is None:
                await check_room(
                    tx, "SELECT COUNT(*) FROM channel_types WHERE app=?", app, bound=TYPES_MAX, what="channel types"
                )
            for role in {*masks, *(before.grants if before else ())}:
                general = role_mask((own[role],) if role in own else None, "channel", role)
                had = grants_of(before.grants[role]) if before and role in before.grants else general
                check_held(actor, Grants(masks.get(role, general) & ~had), f"grants.{role}")
            if put.public and not (before and before.public):
                check_held(actor, grants_of({word.value for word in PUBLIC_GRANTS}), "public")
            if before and before.history == "since_join" and put.history == "all":
                check_held(actor, Grants(bit(P.CHANNEL_READ)), "history")
            await tx.execute(
                "INSERT INTO channel_types(app,name,definition) VALUES (?,?,?)"
                " ON CONFLICT (app,name) DO UPDATE SET definition=excluded.definition",
                app,
                name,
                encode(definition).decode(),
            )
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)
        return definition

    async def delete_type(self, actor: Actor, name: str) -> None:
        """Remove a type that no channel has. Needs `app.update`. Raises NotFound or `conflict`."""
        actor.check(P.APP_UPDATE)
        _check_own_type(name)
        app = actor.app.app
        line = self._line(actor, Action.TYPE_DELETED, f"channel_type:{name}")

        async def unit(tx: Tx) -> Change[None]:
            await lock_rules(tx, app)
            # Before looking for channels: whoever makes one holds the type's row, and is waited for here.
            if not await tx.execute("DELETE FROM channel_types WHERE app=? AND name=?", app, name):
                raise NotFound("channel type")
            # Deleted channels count: their history is still read under the rules of their type.
            if await tx.one("SELECT id FROM channels WHERE app=? AND type=? LIMIT 1", app, name) is not None:
                raise Refusal("conflict", "There are channels of this type.")
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)

    # ------------------------------------------------------------ relations

    async def put_relation(self, actor: Actor, relation: Relation) -> Relation:
        """Let `user` stand in the relation `kind` to `other`, which grants the words of the relation role `kind` in
        every channel that `other` is in. Putting it again changes nothing.

        Needs `role.manage` and the words of the role: who may not read messages cannot let people read them.
        """
        actor.check(P.ROLE_MANAGE)
        context = await self._apps.get(actor.app.id)
        if relation.kind not in context.relation_roles:
            raise Refusal("invalid_field", f"There is no relation role {relation.kind}.", field="kind")
        if relation.user == relation.other:
            raise Refusal("invalid_field", "Nobody is related to themselves.", field="other")
        check_held(actor, context.relation_roles[relation.kind], "kind")
        app = actor.app.app
        line = self._relation_line(actor, Action.RELATION_PUT, relation)

        async def unit(tx: Tx) -> Change[None]:
            for field, user in (("user", relation.user), ("other", relation.other)):
                if (
                    await tx.one("SELECT id FROM users WHERE app=? AND id=? AND deleted_at IS NULL", app, user)
                ) is None:
                    raise NotFound("user", field=field)
            await check_room(
                tx,
                "SELECT COUNT(*) FROM relations r WHERE r.app=? AND r.user=?",
                app,
                relation.user,
                bound=RELATIONS_PER_USER_MAX,
                what="relations of a user",
            )
            done = await tx.execute(
                "INSERT INTO relations(app,user,other,kind) VALUES (?,?,?,?) ON CONFLICT DO NOTHING",
                app,
                relation.user,
                relation.other,
                relation.kind,
            )
            if not done:
                return Change(None)
            await line.write(tx)
            return Change(None, (AccessChanged(app, user=relation.user),))

        await self._changes.run(unit)
        return relation

    async def delete_relation(self, actor: Actor, relation: Relation) -> None:
        """End a relation, and what it granted. Needs `role.manage`. Raises NotFound."""
        actor.check(P.ROLE_MANAGE)
        app = actor.app.app
        line = self._relation_line(actor, Action.RELATION_DELETED, relation)

        async def unit(tx: Tx) -> Change[None]:
            if not await tx.execute(
                "DELETE FROM relations WHERE app=? AND user=? AND other=? AND kind=?",
                app,
                relation.user,
                relation.other,
                relation.kind,
            ):
                raise NotFound("relation")
            await line.write(tx)
            return Change(None, (AccessChanged(app, user=relation.user),))

        await self._changes.run(unit)

    async def list_relations(
        self,
        actor: Actor,
        *,
        user: str | None = None,
        other: str | None = None,
        kind: str | None = None,
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
    ) -> tuple[list[Relation], str | None]:
        """Relations in order of user, other and kind, and the cursor of the next page. Needs `app.read`."""
        actor.check(P.APP_READ)
        listing = ["relations", user, other, kind]
        conditions: list[str] = ["r.app=?"]
        values: list[Any] = [actor.app.app]
        for condition, value in (("r.user=?", user), ("r.other=?", other), ("r.kind=?", kind)):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        if cursor is not None:
            conditions.append("(r.user,r.other,r.kind)>(?,?,?)")
            values += read_cursor(actor.app, listing, cursor, tuple[str, str, str])
        rows = await self._rows(
            "SELECT r.user,r.other,r.kind FROM relations r WHERE "
            + " AND ".join(conditions)
            + " ORDER BY r.user,r.other,r.kind LIMIT ?",
            *values,
            limit + 1,
        )
        page = [Relation(user=user, other=other, kind=kind) for user, other, kind in rows[:limit]]
        return page, (make_cursor(actor.app, listing, list(rows[limit - 1])) if len(rows) > limit else None)

    # ------------------------------------------------------------ the audit trail

    async def audit(
        self,
        actor: Actor,
        *,
        by: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
    ) -> tuple[list[AuditEntry], str | None]:
        """The audit trail, newest first, and the cursor of the next page. Needs `audit.read`, and shows no content.

        `by` (`key:…`, `user:…`, `cli`), `action` and `target` match whole values.
        """
        actor.check(P.AUDIT_READ)
        listing = ["audit", by, action, target, since_ms, until_ms]
        before = None if cursor is None else read_cursor(actor.app, listing, cursor, tuple[int, str])

        async def unit(tx: Tx) -> list[Row]:
            return await lines_before(
                tx,
                actor.app.app,
                actor=by,
                action=action,
                target=target,
                since=since_ms,
                until=until_ms,
                before=before,
                limit=limit + 1,
            )

        rows = await self._store.read(unit)
        page = [entry_of(row) for row in rows[:limit]]
        return page, (make_cursor(actor.app, listing, list(rows[limit - 1][:2])) if len(rows) > limit else None)

    # ------------------------------------------------------------ inside

    async def _rows(self, sql: str, *values: Any) -> list[Row]:
        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(sql, *values)

        return await self._store.read(unit)

    def _line(self, actor: Actor, action: Action, target: str, **detail: Any) -> Line:
        return line_of(actor, action, target, line_id(self._ids), self._clock.now_ms(), **detail)

    def _relation_line(self, actor: Actor, action: Action, relation: Relation) -> Line:
        return self._line(actor, action, f"user:{relation.user}", kind=relation.kind, other=relation.other)


# ---------------------------------------------------------------- rows


# ---------------------------------------------------------------- checks


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise Refusal("invalid_field", f"A scope is one of {', '.join(SCOPES)}.", field="scope")


def _check_own_type(name: str) -> None:
    if name in BUILT_IN_TYPES:
        raise Refusal("conflict", f"The type {name} is built in and cannot be changed.", field="name")


def _check_reads_types(actor: Actor) -> None:
    """What a type's channels can do decides what a client shows, so whoever takes part in the app may know it."""
    if not (actor.may(P.USER_READ) or actor.may(P.CHANNEL_CREATE)):
        actor.check(P.APP_READ)


# ---------------------------------------------------------------- forms


def _upper(detail: str) -> str:
    return detail[0].upper() + detail[1:]


def _time_or_none(ms: int | None) -> datetime | None:
    return None if ms is None else time_of(ms)
