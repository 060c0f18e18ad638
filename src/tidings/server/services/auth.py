"""Credentials to actors: who is asking, and what do they hold.

Two kinds of credentials come through one door. An API key is the app's backend, with the key's scopes, or, with
`user.act_as`, a user in whose name the backend acts. A JWT is a user, if it verifies, the user exists and is active,
and neither the token nor the user's earlier tokens were revoked.

The door has a part that never waits: whatever it needs (the app, the key's or user's row, the verdict on a token's
`jti`) is remembered until a notice on the bus says that it changed. A reconnect storm therefore costs no reads.

Words that are as wide as the widest user: `user.act_as` and `token.mint` let their holder be anyone in the app.

Revocation: `revoke` without a `jti` voids every token whose `iat` lies before the next full second. `iat` counts whole
seconds, so a token issued later in the same second is void too: ours (`mint`) are dated to the next second then, an
identity provider must issue the new one after it. A token without `iat` cannot be told from an old one and is void
once its user has a mark.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar

import msgspec

from tidings.server.bus.base import AccessChanged, Bus, Lost, Notice, Revoked
from tidings.server.clock import Clock, Ids
from tidings.server.domain.permissions import NONE, Grants, Permission, grants_of
from tidings.server.errors import Forbidden, NotFound, Refusal, StoreUnavailable
from tidings.server.store.base import Row, Store, Tx
from tidings.server.store.log import placeholders
from tidings.wire.ids import time_of
from tidings.wire.resources import Token

from .access import Actor
from .api_keys import PREFIX, matches, parse_key
from .apps import AppContext, Apps
from .audit import Action, line_id, line_of
from .change import Change, Changes
from .founding import signing_item
from .signing import AppKeys, JwksSource, KeyStatus, SigningKey
from .tokens import Pending, TokenRefused, TokenVerifier, Verified
from .tokens import mint as sign

P = Permission
K = TypeVar("K")
V = TypeVar("V")

# About 300 bytes each: 15 MB at most. A miss costs one read.
USERS_MAX: Final = 50_000
JTIS_MAX: Final = 50_000
API_KEYS_MAX: Final = 10_000
# Prepared key lists, one per app in use.
APP_KEYS_MAX: Final = 1_024
# How exact an API key's last use is: one write a minute and key, however busy it is.
LAST_USED_MS: Final = 60_000
# A revoked `jti` is remembered as long as its token could live: `token_ttl_seconds_max` is at most 365 days, and a day
# covers leeways. Without that setting a token may live for ever, and so does the mark (2**53 - 1 ms).
REVOKED_KEPT_MS: Final = 366 * 86_400_000
FOR_EVER_MS: Final = 2**53 - 1
# Sessions whose credentials are looked at again with one read: a few milliseconds of a reader.
RECHECK_BATCH: Final = 500
# Sessions that one person ends one by one; each mark is a row that may stay for a year.
REVOKED_PER_USER_MAX: Final = 1_000


class EnsuresUsers(Protocol):
    """What creates users that come with a valid token, where the app wants that."""

    async def ensure(self, app: AppContext, user_id: str) -> None:
        """Make the user if there is none of that id."""
        ...


@dataclass(slots=True, frozen=True)
class Authenticated:
    """Who asks, and until when. Times in ms; `key_id` is the API key's id or the `kid` that verified the token."""

    actor: Actor
    expires_at_ms: int | None
    issued_at_ms: int | None = None
    jti: str | None = None
    key_id: str = ""


@dataclass(slots=True, frozen=True)
class _UserState:
    """A row of `users`, as far as it decides who may come in."""

    role: str
    deactivated: bool
    deleted: bool
    tokens_after: int


@dataclass(slots=True)
class _KeyState:
    """A row of `api_keys`. `touched_at`: when its last use was last written."""

    id: str
    app: int
    app_id: str
    secret_hash: bytes
    grants: Grants
    expires_at: int | None
    touched_at: int


class Auth:
    """The door. One per process; belongs to the event loop. `close` waits for what it still writes."""

    def __init__(
        self,
        store: Store,
        apps: Apps,
        changes: Changes,
        users: EnsuresUsers,
        verifier: TokenVerifier,
        bus: Bus,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._store = store
        self._apps = apps
        self._changes = changes
        self._users = users
        self._verifier = verifier
        self._clock = clock
        self._ids = ids
        self._states: dict[tuple[int, str], _UserState] = {}
        # By (app, user, jti): whether it was revoked.
        self._jtis: dict[tuple[int, str, str], bool] = {}
        self._api_keys: dict[str, _KeyState] = {}
        self._app_keys: dict[int, tuple[AppContext, AppKeys]] = {}
        self._writes: set[asyncio.Task[None]] = set()
        # Grows with everything forgotten: what was read before that must not be remembered after it.
        self._forgotten = 0
        bus.listen(self._heard, Lost, Revoked, AccessChanged)

    # ------------------------------------------------------------ the door

    def authenticate_now(
        self,
        credential: str,
        *,
        app_hint: str | None = None,
        on_behalf_of: str | None = None,
        device: str | None = None,
        session: str | None = None,
    ) -> Authenticated | None:
        """As `authenticate`, from memory alone; None when that takes a read or a fetch."""
        if credential.startswith(PREFIX):
            return self._api_key_now(credential, app_hint, on_behalf_of, device, session)
        app_id = self._app_of(credential, app_hint)
        app = self._apps.cached(app_id)
        if app is None:
            return None
        try:
            verified = self._verifier.verify(self._keys_of(app), credential)
        except TokenRefused as error:
            raise Refusal(error.code, _sentence(error.detail)) from None
        if isinstance(verified, Pending):
            return None
        return self._user_now(app, verified, on_behalf_of, device, session)

    async def authenticate(
        self,
        credential: str,
        *,
        app_hint: str | None = None,
        on_behalf_of: str | None = None,
        device: str | None = None,
        session: str | None = None,
    ) -> Authenticated:
        """Who holds this credential: an API key or a user's token.

        `app_hint`: the app that the request names beside the token; a token of another app is refused.
        `on_behalf_of`: the user in whose name an API key acts. Raises Refusal with `unauthenticated`, a `token_…` code,
        `key_invalid`, `user_unknown` or `user_deactivated`; Forbidden when a key may not act for users.
        """
        if not credential:
            raise Refusal("unauthenticated", "Send an API key or a user's token as a bearer token.")
        if credential.startswith(PREFIX):
            found = self._api_key_now(credential, app_hint, on_behalf_of, device, session)
            if found is not None:
                return found
            key = await self._load_api_key(credential)
            app = await self._apps.get(key.app_id)
            state = None if on_behalf_of is None else await self._state(app, on_behalf_of)
            return self._api_key_actor(key, app, app_hint, on_behalf_of, state, device, session)
        app_id = self._app_of(credential, app_hint)
        try:
            app = await self._apps.get(app_id)
        except NotFound:
            # Whether the app exists is nobody's business who has no token for it.
            raise Refusal("token_key_unknown", "No key of this app verifies the token.") from None
        try:
            verified = await self._verifier.verify_async(self._keys_of(app), credential)
        except TokenRefused as error:
            raise Refusal(error.code, _sentence(error.detail)) from None
        authenticated = self._user_now(app, verified, on_behalf_of, device, session)
        if authenticated is not None:
            return authenticated
        state, revoked = await self._load_user(app, verified.user_id, verified.jti)
        if state is None and app.settings.create_users_on_connect and not revoked:
            await self._users.ensure(app, verified.user_id)
            state, revoked = await self._load_user(app, verified.user_id, verified.jti)
        return _user_actor(app, verified, state, revoked, device, session)

    async def refresh(self, actor: Actor) -> Actor:
        """The same actor as things stand now: role, scopes, the app's settings and roles.

        Raises what `authenticate` would: `user_unknown`, `user_deactivated`, `key_invalid`.
        """
        app = await self._apps.get(actor.app.id)
        if actor.via.startswith("key:"):
            key = await self._key_state(actor.via[len("key:") :])
            state = None if actor.user is None else await self._state(app, actor.user)
            return self._actor_of_key(actor, app, key, state)
        if actor.user is None:
            return replace(actor, app=app)
        grants, role = _grants_of_user(app, await self._state(app, actor.user))
        return replace(actor, app=app, grants=grants, role=role)

    def _actor_of_key(self, actor: Actor, app: AppContext, key: _KeyState, state: _UserState | None) -> Actor:
        self._check_api_key(key)
        if actor.user is None:
            return replace(actor, app=app, grants=key.grants)
        if not key.grants & _ACT_AS:
            raise Forbidden(P.USER_ACT_AS.value)
        grants, role = _grants_of_user(app, state)
        return replace(actor, app=app, grants=grants, role=role)

    async def recheck(self, authenticated: Authenticated) -> Authenticated:
        """`refresh` for a long connection, with its token: refuses also when the token, or the key that verified it,
        no longer counts. Raises Refusal."""
        [found] = await self.recheck_all([authenticated])
        if isinstance(found, Refusal):
            raise found
        return found

    async def recheck_all(self, many: Sequence[Authenticated]) -> list[Authenticated | Refusal]:
        """`recheck` for many connections: what each is now, or why it no longer counts. Those of an app are read
        together, `RECHECK_BATCH` at a time.

        Raises StoreUnavailable: then nothing is known of any of them.
        """
        found: list[Authenticated | Refusal] = [_invalid_key()] * len(many)
        for start in range(0, len(many), RECHECK_BATCH):
            some = many[start : start + RECHECK_BATCH]
            states, revoked = await self._load_users(some)
            for place, one in enumerate(some, start):
                try:
                    found[place] = await self._rechecked(one, states, revoked)
                except StoreUnavailable:
                    raise
                except Refusal as refusal:
                    found[place] = refusal
        return found

    async def _rechecked(
        self, one: Authenticated, states: dict[tuple[int, str], _UserState], revoked: set[tuple[int, str]]
    ) -> Authenticated:
        actor, user = one.actor, one.actor.user
        app = await self._apps.get(actor.app.id)
        state = None if user is None else states.get((app.app, user))
        if actor.via.startswith("key:"):
            key = await self._key_state(actor.via[len("key:") :])
            actor = self._actor_of_key(actor, app, key, state)
        elif user is None:
            actor = replace(actor, app=app)
        else:
            grants, role = _grants_of_user(app, state)
            for row in app.signing:
                if row[0] == one.key_id and row[4] != "active":
                    raise Refusal("token_key_unknown", "The key that signed the token is retired.")
            gone = one.jti is not None and (app.app, revoked_name(user, one.jti)) in revoked
            _check_token(state, gone, one.issued_at_ms)
            actor = replace(actor, app=app, grants=grants, role=role)
        return replace(one, actor=actor)

    # ------------------------------------------------------------ minting and revoking

    async def mint(self, actor: Actor, user_id: str, ttl_seconds: int) -> Token:
        """A token for a user, signed with the app's newest active HS256 key, with a `jti` of its own.

        Needs `token.mint`. Raises NotFound for an unknown user (unless the app creates users on connect),
        `user_deactivated`, `invalid_field` for a life beyond the app's maximum, `conflict` without an HS256 key.
        """
        actor.check(P.TOKEN_MINT)
        app = await self._apps.get(actor.app.id)
        state = await self._state(app, user_id)
        if (state is None and not app.settings.create_users_on_connect) or (state is not None and state.deleted):
            raise NotFound("user", field="user")
        if state is not None and state.deactivated:
            raise Refusal("user_deactivated", "The user is deactivated.")
        longest = app.settings.token_ttl_seconds_max
        if ttl_seconds < 1 or (longest is not None and ttl_seconds > longest):
            raise Refusal(
                "invalid_field", "The token would live longer than the app allows.", field="ttl_seconds", bound=longest
            )
        keys = self._keys_of(app)
        # Rows stand in the order of their creation only by chance: the newest is the one that rotation added last.
        active = [row for row in app.signing if row[1] == "HS256" and row[4] == "active"]
        if not active:
            raise Refusal("conflict", "The app has no active HS256 key to sign with.")
        kid = max(active, key=lambda row: (row[5], row[0]))[0]
        key = next(key for key in keys.keys if key.kid == kid)
        now = self._clock.now_ms()
        issued_at = now // 1000 * 1000
        if state is not None and issued_at < state.tokens_after:
            issued_at += 1000 * -((issued_at - state.tokens_after) // 1000)
        jti = self._ids.new_id("t_")
        try:
            token = sign(keys, key, user_id, ttl_seconds, issued_at, jti=jti)
        except ValueError as error:
            raise Refusal("invalid_field", _sentence(str(error)), field="user") from None
        line = line_of(
            actor,
            Action.TOKEN_MINTED,
            f"user:{user_id}",
            line_id(self._ids),
            now,
            jti=jti,
            ttl_seconds=ttl_seconds,
        )

        async def unit(tx: Tx) -> Change[None]:
            await line.write(tx)
            return Change(None)

        await self._changes.run(unit)
        return Token(token=token, expires_at=time_of(issued_at + ttl_seconds * 1000))

    async def revoke(self, actor: Actor, user_id: str, jti: str | None = None) -> None:
        """Void the user's tokens issued until now, or the one with that `jti`; their connections end.

        Needs `token.revoke`; users may void their own. Raises NotFound for an unknown user.
        """
        if actor.user != user_id:
            actor.check(P.TOKEN_REVOKE)
        app, now = actor.app, self._clock.now_ms()
        # Nothing bounds how long an app's tokens live unless it says so; then none outlives the setting's own bound.
        kept_until = FOR_EVER_MS if app.settings.token_ttl_seconds_max is None else now + REVOKED_KEPT_MS
        detail = {} if jti is None else {"jti": jti}
        # Everything between `user/` and what follows the slash in ASCII: the marks of this user's tokens.
        own_marks = (revoked_name(user_id, ""), f"{user_id}0")
        line = line_of(actor, Action.TOKENS_REVOKED, f"user:{user_id}", line_id(self._ids), now, **detail)

        async def unit(tx: Tx) -> Change[None]:
            if jti is not None:
                found = await tx.one("SELECT id FROM users WHERE app=? AND id=?", app.app, user_id)
                notice = Revoked(app.app, user_id, "token_revoked", jti=jti)
                marks = await tx.one(
                    "SELECT COUNT(*) FROM revoked_tokens WHERE app=? AND jti>? AND jti<?", app.app, *own_marks
                )
                if marks is not None and marks[0] >= REVOKED_PER_USER_MAX:
                    raise Refusal(
                        "bound_exceeded",
                        "So many of the user's tokens were revoked one by one: revoke all of them instead.",
                        bound=REVOKED_PER_USER_MAX,
                    )
                await tx.execute("DELETE FROM revoked_tokens WHERE app=? AND expires_at<?", app.app, now)
                await tx.execute(
                    "INSERT INTO revoked_tokens(app,jti,expires_at) VALUES (?,?,?)"
                    " ON CONFLICT (app,jti) DO UPDATE SET expires_at=excluded.expires_at",
                    app.app,
                    revoked_name(user_id, jti),
                    kept_until,
                )
            else:
                # A mark that lies ahead was set within this second (or before the clock was set back); tokens that we
                # minted since are dated to it, and must go too.
                found = await tx.one(
                    "UPDATE users SET tokens_after=CASE WHEN tokens_after>? THEN tokens_after+1000 ELSE ? END"
                    " WHERE app=? AND id=? RETURNING tokens_after",
                    now,
                    (now // 1000 + 1) * 1000,
                    app.app,
                    user_id,
                )
                await tx.execute("DELETE FROM revoked_tokens WHERE app=? AND jti>? AND jti<?", app.app, *own_marks)
                notice = Revoked(app.app, user_id, "token_revoked", before_ms=int(found[0]) if found else now)
            if found is None:
                raise NotFound("user", field="user")
            await line.write(tx)
            return Change(None, (notice,))

        await self._changes.run(unit)

    async def close(self) -> None:
        """Wait for the uses of keys that are still being written."""
        await asyncio.gather(*self._writes, return_exceptions=True)

    # ------------------------------------------------------------ API keys

    def _api_key_now(
        self, credential: str, app_hint: str | None, on_behalf_of: str | None, device: str | None, session: str | None
    ) -> Authenticated | None:
        parsed = parse_key(credential)
        if parsed is None:
            raise _invalid_key()
        key = self._api_keys.get(parsed[0])
        if key is None:
            return None
        if not matches(parsed[1], key.secret_hash):
            raise _invalid_key()
        app = self._apps.cached(key.app_id)
        if app is None:
            return None
        state = None
        if on_behalf_of is not None:
            state = self._states.get((key.app, on_behalf_of))
            if state is None:
                return None
        return self._api_key_actor(key, app, app_hint, on_behalf_of, state, device, session)

    def _api_key_actor(
        self,
        key: _KeyState,
        app: AppContext,
        app_hint: str | None,
        on_behalf_of: str | None,
        state: _UserState | None,
        device: str | None,
        session: str | None,
    ) -> Authenticated:
        now = self._check_api_key(key)
        if app_hint is not None and app_hint != app.id:
            raise _invalid_key()
        if now - key.touched_at >= LAST_USED_MS:
            key.touched_at = now
            self._write_last_used(key.id, now)
        grants, role = key.grants, None
        if on_behalf_of is not None:
            if not grants & _ACT_AS:
                raise Forbidden(P.USER_ACT_AS.value)
            grants, role = _grants_of_user(app, state)
        actor = Actor(app, on_behalf_of, grants, f"key:{key.id}", device, session, role)
        return Authenticated(actor, key.expires_at, key_id=key.id)

    def _check_api_key(self, key: _KeyState) -> int:
        now = self._clock.now_ms()
        if key.expires_at is not None and key.expires_at <= now:
            raise _invalid_key()
        return now

    async def _load_api_key(self, credential: str) -> _KeyState:
        parsed = parse_key(credential)
        if parsed is None:
            raise _invalid_key()
        key = await self._key_state(parsed[0])
        if not matches(parsed[1], key.secret_hash):
            raise _invalid_key()
        return key

    async def _key_state(self, key_id: str) -> _KeyState:
        """The key that was neither deleted nor revoked. Raises Refusal `key_invalid`."""
        known = self._api_keys.get(key_id)
        if known is not None:
            return known

        async def unit(tx: Tx) -> Row | None:
            return await tx.one(
                "SELECT k.id, k.app, a.id, k.secret_hash, k.scopes, k.expires_at, k.last_used_at FROM api_keys k"
                " JOIN apps a ON a.app=k.app WHERE k.id=? AND k.revoked_at IS NULL",
                key_id,
            )

        forgotten = self._forgotten
        row = await self._store.read(unit)
        if row is None:
            raise _invalid_key()
        id, app, app_id, secret_hash, scopes, expires_at, last_used_at = row
        grants = grants_of(msgspec.json.decode(scopes, type=list[str]))
        key = _KeyState(id, app, app_id, bytes(secret_hash), grants, expires_at, last_used_at or 0)
        if forgotten == self._forgotten:
            _keep(self._api_keys, key_id, key, API_KEYS_MAX)
        return key

    def _write_last_used(self, key_id: str, now: int) -> None:
        async def unit(tx: Tx) -> None:
            await tx.execute("UPDATE api_keys SET last_used_at=? WHERE id=?", now, key_id)

        async def write() -> None:
            try:
                await self._store.run(unit)
            except Refusal:
                pass  # A store that cannot commit has louder ways to say so; the next use a minute on is written.

        task = asyncio.get_running_loop().create_task(write())  # owned by the set that close() waits for
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    # ------------------------------------------------------------ users

    def _user_now(
        self, app: AppContext, verified: Verified, on_behalf_of: str | None, device: str | None, session: str | None
    ) -> Authenticated | None:
        if on_behalf_of is not None and on_behalf_of != verified.user_id:
            raise Forbidden(P.USER_ACT_AS.value)
        state = self._states.get((app.app, verified.user_id))
        if state is None:
            return None
        revoked = False
        if verified.jti is not None:
            known = self._jtis.get((app.app, verified.user_id, verified.jti))
            if known is None:
                return None
            revoked = known
        return _user_actor(app, verified, state, revoked, device, session)

    async def _state(self, app: AppContext, user_id: str) -> _UserState | None:
        known = self._states.get((app.app, user_id))
        return known if known is not None else (await self._load_user(app, user_id, None))[0]

    async def _load_user(self, app: AppContext, user_id: str, jti: str | None) -> tuple[_UserState | None, bool]:
        async def unit(tx: Tx) -> tuple[Row | None, Row | None]:
            row = await tx.one(
                "SELECT role, deactivated_at, deleted_at, tokens_after FROM users WHERE app=? AND id=?",
                app.app,
                user_id,
            )
            mark = None
            if jti is not None:
                mark = await tx.one(
                    "SELECT expires_at FROM revoked_tokens WHERE app=? AND jti=?", app.app, revoked_name(user_id, jti)
                )
            return row, mark

        forgotten = self._forgotten
        row, mark = await self._store.glance(unit)
        state = None
        if row is not None:
            state = _user_state(row)
        if forgotten == self._forgotten:
            if state is not None:
                _keep(self._states, (app.app, user_id), state, USERS_MAX)
            if jti is not None:
                _keep(self._jtis, (app.app, user_id, jti), mark is not None, JTIS_MAX)
        return state, mark is not None

    async def _load_users(
        self, many: Sequence[Authenticated]
    ) -> tuple[dict[tuple[int, str], _UserState], set[tuple[int, str]]]:
        """The users of those who ask, and which of their tokens were revoked one by one, by their stored names: a
        statement of each kind for every app."""
        users: dict[int, set[str]] = {}
        names: dict[int, set[str]] = {}
        for one in many:
            app, user = one.actor.app.app, one.actor.user
            if user is not None:
                users.setdefault(app, set()).add(user)
                if one.jti is not None:
                    names.setdefault(app, set()).add(revoked_name(user, one.jti))

        async def unit(tx: Tx) -> tuple[list[tuple[int, Row]], set[tuple[int, str]]]:
            rows: list[tuple[int, Row]] = []
            marks: set[tuple[int, str]] = set()
            for app, ids in users.items():
                rows += [
                    (app, row)
                    for row in await tx.all(
                        "SELECT id, role, deactivated_at, deleted_at, tokens_after FROM users"
                        f" WHERE app=? AND id IN ({placeholders(ids)})",
                        app,
                        *ids,
                    )
                ]
            for app, stored in names.items():
                for row in await tx.all(
                    f"SELECT jti FROM revoked_tokens WHERE app=? AND jti IN ({placeholders(stored)})", app, *stored
                ):
                    marks.add((app, row[0]))
            return rows, marks

        forgotten = self._forgotten
        rows, marks = await (self._store.glance(unit) if len(many) == 1 else self._store.read(unit))
        states = {(app, row[0]): _user_state(row[1:]) for app, row in rows}
        if forgotten == self._forgotten:
            for key, state in states.items():
                _keep(self._states, key, state, USERS_MAX)
            for one in many:
                app, user, jti = one.actor.app.app, one.actor.user, one.jti
                if user is not None and jti is not None:
                    _keep(self._jtis, (app, user, jti), (app, revoked_name(user, jti)) in marks, JTIS_MAX)
        return states, marks

    # ------------------------------------------------------------ forgetting

    @property
    def forgotten(self) -> int:
        """Grows whenever something may have changed that decides who may come in: what was found out about a
        credential holds, but for its expiry, while this stays the same."""
        return self._forgotten

    def forget_all(self) -> None:
        """Another process has written: nothing remembered is certain."""
        self._forgotten += 1
        self._states.clear()
        self._jtis.clear()
        self._api_keys.clear()

    def _heard(self, notice: Notice) -> None:
        if isinstance(notice, Lost):
            self.forget_all()
        elif isinstance(notice, Revoked):
            self._forget_user(notice.app, notice.user)
            if notice.jti is not None:
                self._jtis.pop((notice.app, notice.user, notice.jti), None)
        elif isinstance(notice, AccessChanged):
            if notice.user is not None:
                self._forget_user(notice.app, notice.user)
            elif notice.sid is None:
                self._forgotten += 1
                self._apps.forget(notice.app)
                for id in [id for id, key in self._api_keys.items() if key.app == notice.app]:
                    del self._api_keys[id]

    def _forget_user(self, app: int, user: str) -> None:
        self._forgotten += 1
        self._states.pop((app, user), None)

    # ------------------------------------------------------------ verifying keys

    def _app_of(self, token: str, app_hint: str | None) -> str:
        """The app whose keys decide. A hint is enough: the verifier refuses a token whose claim names another app."""
        if app_hint is not None:
            return app_hint
        try:
            app_id = self._verifier.app_of(token)
        except TokenRefused as error:
            raise Refusal(error.code, _sentence(error.detail)) from None
        if app_id is None:
            raise Refusal(
                "token_claims", "The token does not say which app it is for: add the claim app, or name the app."
            )
        return app_id

    def _keys_of(self, app: AppContext) -> AppKeys:
        known = self._app_keys.get(app.app)
        if known is not None and known[0] is app:
            return known[1]
        keys = verifying_keys(app)
        self._app_keys.pop(app.app, None)
        _keep(self._app_keys, app.app, (app, keys), APP_KEYS_MAX)
        return keys


_ACT_AS: Final = grants_of({P.USER_ACT_AS.value})


def verifying_keys(app: AppContext) -> AppKeys:
    """What verifies tokens of the app's users: its signing keys, its identity providers' key sets, its settings."""
    settings = app.settings
    keys = []
    for kid, algorithm, sealed, public_key, status, _ in app.signing:
        material: Any = public_key if sealed is None else app.cipher.open(bytes(sealed), signing_item(kid))
        keys.append(SigningKey(kid, algorithm, material, KeyStatus(status)))
    sources = tuple(
        JwksSource(url, tuple(msgspec.json.decode(algorithms, type=list[str])), cache_seconds)
        for _, url, algorithms, cache_seconds, _ in app.providers
    )
    return AppKeys(
        app.id,
        tuple(keys),
        sources,
        settings.token_leeway_seconds,
        settings.token_ttl_seconds_max,
        settings.token_audience,
        settings.token_issuer,
    )


def revoked_name(user_id: str, jti: str) -> str:
    """What a revoked token is stored under. With its user, so that nobody can revoke a token of somebody else by
    guessing its `jti`; a slash cannot occur in a user id."""
    return f"{user_id}/{jti}"


def _user_actor(
    app: AppContext,
    verified: Verified,
    state: _UserState | None,
    revoked: bool,
    device: str | None,
    session: str | None,
) -> Authenticated:
    if verified.jti is not None and verified.issued_at is None:
        # How long a revoked jti must be remembered follows from when its token was issued.
        raise Refusal("token_claims", "A token with a jti needs an iat.")
    user_id = verified.user_id
    grants, role = _grants_of_user(app, state)
    _check_token(state, revoked, verified.issued_at)
    actor = Actor(app, user_id, grants, f"user:{user_id}", device, session, role)
    return Authenticated(actor, verified.expires_at, verified.issued_at, verified.jti, verified.key_id)


def _user_state(row: Row) -> _UserState:
    """From `role, deactivated_at, deleted_at, tokens_after`."""
    return _UserState(str(row[0]), row[1] is not None, row[2] is not None, int(row[3]))


def _check_token(state: _UserState | None, revoked: bool, issued_at: int | None) -> None:
    tokens_after = 0 if state is None else state.tokens_after
    if revoked or (tokens_after and (issued_at is None or issued_at < tokens_after)):
        raise Refusal("token_revoked", "The token was revoked: get a fresh one.")


def _grants_of_user(app: AppContext, state: _UserState | None) -> tuple[Grants, str]:
    """What an active user's role grants, and the role. Raises Refusal for anybody else."""
    if state is None or state.deleted:
        raise Refusal("user_unknown", "There is no such user in this app.")
    if state.deactivated:
        raise Refusal("user_deactivated", "The user is deactivated.")
    return app.app_roles.get(state.role, NONE), state.role


def _invalid_key() -> Refusal:
    return Refusal("key_invalid", "The API key is unknown, revoked or expired.")


def _sentence(detail: str) -> str:
    return f"{detail[0].upper()}{detail[1:]}."


def _keep(cache: dict[K, V], key: K, value: V, bound: int) -> None:
    """Remember, forgetting the oldest beyond the bound."""
    if len(cache) >= bound and key not in cache:
        del cache[next(iter(cache))]
    cache[key] = value
