"""Users: created by the app's backend or on their first connection, looked up, deactivated, deleted.

A user's id is used once: deletion leaves a tombstone under it, so that what they wrote can never become somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tidings.server.bus.base import AccessChanged, Notice
from tidings.server.clock import Clock, Ids
from tidings.server.domain.permissions import NONE, Permission
from tidings.server.errors import NotFound, Refusal
from tidings.server.store import log
from tidings.server.store.base import Row, Store, Tx
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.events import EventType
from tidings.wire.ids import time_of
from tidings.wire.requests import UserCreate, UserUpdate, UserUpsert
from tidings.wire.resources import User

from .access import Actor
from .apps import AppContext, Apps
from .change import Change, Changes
from .messages import check_custom
from .streams import NewStream, insert_new, new_stream, record_own, user_streams, with_keys

P = Permission

# What a user gets who was not given a role, and what anyone who may create users may give.
ORDINARY_ROLE: Final = "user"
# Channels left, and messages redacted, in one unit while a user is deleted: each costs about 0.1 ms of the writer's
# time, so that others wait 20 ms at most.
DELETION_BATCH: Final = 200
# Channels looked through for a deleted user's messages in one read: an index probe each.
SCAN_BATCH: Final = 2_000
# A marker in `meta` for every deletion under way, so that one cut short by a crash is finished at the next start.
DELETING: Final = "deleting:user:"

_COLUMNS: Final = (
    "id, sid, role, sealed, labels, created_at, updated_at, last_seen_at, deactivated_at, deleted_at, invisible"
)


class Profile(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is sealed of a user."""

    name: str | None = None
    avatar_url: str | None = None
    custom: dict[str, Any] = {}


@dataclass(slots=True, frozen=True)
class UserRow:
    """A row of `users`."""

    id: str
    sid: int
    role: str
    sealed: bytes | None
    labels: str
    created_at: int
    updated_at: int
    last_seen_at: int | None
    deactivated_at: int | None
    deleted_at: int | None
    invisible: int


def render_user(app: AppContext, row: UserRow, *, last_seen: bool) -> User:
    """A user as others see them; a tombstone for those who were deleted. Raises Tampered."""
    if row.deleted_at is not None:
        return User(
            id=row.id,
            role=row.role,
            created_at=time_of(row.created_at),
            updated_at=time_of(row.updated_at),
            deleted_at=time_of(row.deleted_at),
        )
    profile = open_profile(app, row)
    return User(
        id=row.id,
        name=profile.name,
        avatar_url=profile.avatar_url,
        role=row.role,
        custom=profile.custom,
        labels=msgspec.json.decode(row.labels, type=dict[str, str]),
        created_at=time_of(row.created_at),
        updated_at=time_of(row.updated_at),
        last_seen_at=None if row.last_seen_at is None or not last_seen else time_of(row.last_seen_at),
        deactivated_at=None if row.deactivated_at is None else time_of(row.deactivated_at),
    )


def open_profile(app: AppContext, row: UserRow) -> Profile:
    """Name, avatar and custom data of a user who is not deleted."""
    if row.sealed is None:
        return Profile()
    return msgspec.json.decode(app.cipher.open(row.sealed, _item(row.id)), type=Profile)


def _item(user: str) -> bytes:
    return b"user:" + user.encode()


async def user_row(tx: Tx, app: int, user: str, lock: str = "") -> UserRow | None:
    """A user's row; `lock`: `tx.for_update` where the row decides a write."""
    row = await tx.one(f"SELECT {_COLUMNS} FROM users WHERE app=? AND id=?{lock}", app, user)
    return UserRow(*row) if row else None


async def write_labels(tx: Tx, app: int, noun: str, id: str, labels: dict[str, str]) -> None:
    """Make the searchable labels of a user or channel these."""
    await tx.execute("DELETE FROM labels WHERE app=? AND noun=? AND id=?", app, noun, id)
    if labels:
        await tx.many(
            "INSERT INTO labels(app,noun,name,value,id) VALUES (?,?,?,?,?)",
            [(app, noun, name, value, id) for name, value in labels.items()],
        )


def check_app_role(actor: Actor, role: str, field: str) -> None:
    """Refuse an app role that does not exist, or that holds more than the actor may give.

    Anyone who may create users may give what ordinary users have; beyond that nobody gives what they lack, unless they
    decide what roles mean anyway (`role.manage`).
    """
    app = actor.app
    if role not in app.app_roles:
        raise Refusal("invalid_field", "There is no such app role.", field=field)
    _check_app_rank(actor, role, field)


def _check_app_rank(actor: Actor, role: str, field: str | None) -> None:
    roles = actor.app.app_roles
    if roles.get(role, NONE) & ~(actor.grants | roles[ORDINARY_ROLE]) and not actor.may(P.ROLE_MANAGE):
        raise Refusal("forbidden", "The user's role holds permissions that you lack.", field=field)


class Users:
    """Use-cases of users and their devices."""

    def __init__(self, store: Store, apps: Apps, changes: Changes, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._apps = apps
        self._keyring = apps.keyring
        self._changes = changes
        self._clock = clock
        self._ids = ids

    # ------------------------------------------------------------ making and changing

    async def create(self, actor: Actor, body: UserCreate) -> User:
        """Make a user. Raises Refusal: `already_exists`, `conflict` (the id belonged to a deleted user),
        `invalid_field`."""
        actor.check(P.USER_CREATE)
        app = actor.app
        check_app_role(actor, body.role, "role")
        check_custom(body.custom, "custom")
        now = self._clock.now_ms()
        user = body.id if body.id is not None else self._ids.new_id("u_")
        stream = new_stream(self._keyring, app, self._ids, now)
        profile = Profile(body.name, body.avatar_url, body.custom)

        async def unit(tx: Tx) -> Change[User]:
            row = await self._insert(tx, app, user, body.role, profile, body.labels, stream, now)
            if row is None:
                await self._refuse_taken(tx, app, user, "id")
                raise Refusal("already_exists", "There is a user with this id.", field="id")
            return Change(render_user(app, row, last_seen=True))

        return await self._changes.run(unit)

    async def upsert(self, actor: Actor, users: list[UserUpsert]) -> list[User]:
        """Create or change many users at once, all or none; in the order given. Who is as told already stays untouched.

        Raises Refusal naming the field, such as `users[3].role`.
        """
        actor.check(P.USER_CREATE)
        app = actor.app
        if len(users) > limits.BULK_MAX:
            raise Refusal(
                "invalid_field", f"At most {limits.BULK_MAX} users at once.", field="users", bound=limits.BULK_MAX
            )
        seen: set[str] = set()
        for number, body in enumerate(users):
            if body.id in seen:
                raise Refusal("invalid_field", "The same user is given twice.", field=f"users[{number}].id")
            seen.add(body.id)
            if body.role is not msgspec.UNSET:
                check_app_role(actor, body.role, f"users[{number}].role")
            if body.custom is not msgspec.UNSET:
                check_custom(body.custom, f"users[{number}].custom")
        now = self._clock.now_ms()
        streams = [new_stream(self._keyring, app, self._ids, now) for _ in users]
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx) -> Change[list[User]]:
            done: dict[int, User] = {}
            notices: list[Notice] = []
            # One order of locking for all, whatever the order of the request.
            for number, body in sorted(enumerate(users), key=lambda pair: pair[1].id):
                field = f"users[{number}]"
                profile = Profile(_or(body.name, None), _or(body.avatar_url, None), _or(body.custom, {}))
                row = await self._insert(
                    tx, app, body.id, _or(body.role, ORDINARY_ROLE), profile, _or(body.labels, {}), streams[number], now
                )
                if row is None:
                    actor.check(P.USER_UPDATE_ANY)
                    await self._refuse_taken(tx, app, body.id, f"{field}.id")
                    row = await user_row(tx, app.app, body.id, tx.for_update)
                    if row is None:
                        raise NotFound("user", field=f"{field}.id")
                    row, more = await self._change(
                        tx,
                        actor,
                        row,
                        UserUpdate(
                            name=body.name,
                            avatar_url=body.avatar_url,
                            role=body.role,
                            custom=body.custom,
                            labels=body.labels,
                        ),
                        now,
                        mark,
                        f"{field}.",
                    )
                    notices += more
                done[number] = render_user(app, row, last_seen=True)
            return Change([done[number] for number in range(len(users))], tuple(notices))

        return await with_keys(self._apps, app, lambda: self._changes.run(unit))

    async def update(self, actor: Actor, user_id: str, body: UserUpdate) -> User:
        """Change the named fields. Users may change themselves (`user.update_own`), but never their own role."""
        app = actor.app
        own = actor.user == user_id
        if not (own and actor.may(P.USER_UPDATE_OWN)):
            actor.check(P.USER_UPDATE_OWN if own else P.USER_UPDATE_ANY)
        if body.role is not msgspec.UNSET and not own:
            check_app_role(actor, body.role, "role")
        if body.custom is not msgspec.UNSET:
            check_custom(body.custom, "custom")
        now = self._clock.now_ms()
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx) -> Change[User]:
            row = await self._standing(tx, app, user_id)
            if own and body.role not in (msgspec.UNSET, row.role):
                raise Refusal("forbidden", "Nobody changes their own role.", field="role")
            row, notices = await self._change(tx, actor, row, body, now, mark, "")
            return Change(render_user(app, row, last_seen=True), tuple(notices))

        return await with_keys(self._apps, app, lambda: self._changes.run(unit))

    async def ensure(self, app: AppContext, user_id: str) -> None:
        """Make the user with the ordinary role if there is none of this id (`create_users_on_connect`).

        Raises Refusal `user_unknown` if the id belonged to a user who was deleted.
        """

        async def look(tx: Tx) -> Row | None:
            return await tx.one("SELECT deleted_at FROM users WHERE app=? AND id=?", app.app, user_id)

        found = await self._store.read(look)
        if found is None:
            now = self._clock.now_ms()
            stream = new_stream(self._keyring, app, self._ids, now)

            async def unit(tx: Tx) -> Change[Row | None]:
                row = await self._insert(tx, app, user_id, ORDINARY_ROLE, Profile(), {}, stream, now)
                return Change((None,) if row is not None else await look(tx))

            found = await self._changes.run(unit)
        if found is not None and found[0] is not None:
            raise Refusal("user_unknown", "The user was deleted.")

    async def record_seen(self, app: int, user: str, at_ms: int) -> None:
        """Remember when someone was last online; it only moves forward."""

        async def unit(tx: Tx) -> None:
            await tx.execute(
                "UPDATE users SET last_seen_at=? WHERE app=? AND id=? AND coalesce(last_seen_at,0)<?"
                " AND deleted_at IS NULL",
                at_ms,
                app,
                user,
                at_ms,
            )

        await self._store.run(unit)

    async def _insert(
        self,
        tx: Tx,
        app: AppContext,
        user: str,
        role: str,
        profile: Profile,
        labels: dict[str, str],
        stream: NewStream,
        now: int,
    ) -> UserRow | None:
        """Insert a user with their stream; None if the id is taken, also by somebody who does so at this moment."""
        row = UserRow(
            user,
            stream.sid,
            role,
            app.cipher.seal(encode(profile), _item(user)),
            encode(labels).decode(),
            now,
            now,
            None,
            None,
            None,
            0,
        )
        inserted = await tx.execute(
            "INSERT INTO users(app,id,sid,role,sealed,labels,created_at,updated_at) VALUES (?,?,?,?,?,?,?,?)"
            " ON CONFLICT DO NOTHING",
            app.app,
            user,
            stream.sid,
            role,
            row.sealed,
            row.labels,
            now,
            now,
        )
        if not inserted:
            return None
        await insert_new(tx, app, stream, "user", user, now)
        if labels:
            await write_labels(tx, app.app, "user", user, labels)
        return row

    async def _change(
        self, tx: Tx, actor: Actor, row: UserRow, body: UserUpdate, now: int, mark: str, prefix: str
    ) -> tuple[UserRow, list[Notice]]:
        """Apply an update to a row that is locked; the row after it and what to announce."""
        app = actor.app
        old = open_profile(app, row)
        new = Profile(_or(body.name, old.name), _or(body.avatar_url, old.avatar_url), _or(body.custom, old.custom))
        role = _or(body.role, row.role)
        old_labels = msgspec.json.decode(row.labels, type=dict[str, str])
        labels = _or(body.labels, old_labels)
        if (new, role, labels) == (old, row.role, old_labels):
            return row, []
        old_role = row.role
        if actor.user != row.id:
            _check_app_rank(actor, old_role, f"{prefix}role")
        row = UserRow(
            row.id,
            row.sid,
            role,
            row.sealed if new == old else app.cipher.seal(encode(new), _item(row.id)),
            encode(labels).decode(),
            row.created_at,
            now,
            row.last_seen_at,
            row.deactivated_at,
            row.deleted_at,
            row.invisible,
        )
        await tx.execute(
            "UPDATE users SET role=?, sealed=?, labels=?, updated_at=? WHERE app=? AND id=?",
            role,
            row.sealed,
            row.labels,
            now,
            app.app,
            row.id,
        )
        if labels != old_labels:
            await write_labels(tx, app.app, "user", row.id, labels)
        notices: list[Notice] = []
        for stream in await user_streams(tx, self._keyring, app, [row.id]):
            notices.append(
                await record_own(
                    tx,
                    app,
                    stream,
                    type=EventType.PROFILE_UPDATED,
                    at=now,
                    by=actor.user,
                    ref=row.id,
                    mark=mark,
                    data=render_user(app, row, last_seen=False),
                )
            )
        if role != old_role:
            notices.append(AccessChanged(app.app, user=row.id))
            await log.write_audit(
                tx,
                app=app.app,
                id=f"{mark}/{row.id}",
                at=now,
                actor=actor.via,
                action="user.role",
                target=f"user:{row.id}",
                detail=encode({"from": old_role, "to": role}).decode(),
            )
        return row, notices

    async def _standing(self, tx: Tx, app: AppContext, user: str) -> UserRow:
        """The locked row of a user who exists and is not deleted."""
        row = await user_row(tx, app.app, user, tx.for_update)
        if row is None:
            raise NotFound("user", field="id")
        if row.deleted_at is not None:
            raise Refusal("conflict", "The user is deleted.", field="id")
        return row

    @staticmethod
    async def _refuse_taken(tx: Tx, app: AppContext, user: str, field: str) -> None:
        row = await tx.one("SELECT deleted_at FROM users WHERE app=? AND id=?", app.app, user)
        if row is not None and row[0] is not None:
            raise Refusal("conflict", "The id belonged to a user who was deleted; it is never used again.", field=field)


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is msgspec.UNSET else value
