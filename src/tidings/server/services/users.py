"""Users: created by the app's backend or on their first connection, looked up, deactivated, deleted.

A user's id is used once: deletion leaves a tombstone under it, so that what they wrote never becomes somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tidings.server.bus.base import AccessChanged, Left, Notice, Revoked
from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import StreamCipher, WrappedStreamKey
from tidings.server.domain.permissions import NONE, Grants, Permission
from tidings.server.errors import NotFound, Refusal
from tidings.server.store import log
from tidings.server.store.base import Row, Store, Tx
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.commands import DeviceInfo
from tidings.wire.events import EventType, MessageDeleted
from tidings.wire.ids import time_of
from tidings.wire.requests import UserCreate, UserUpdate, UserUpsert
from tidings.wire.resources import Device, User

from .access import Actor
from .apps import AppContext, Apps
from .audit import Action, line_of
from .change import Change, Changes, record
from .granting import check_held
from .membership import Place, delete_member
from .messages import check_custom, redact_messages
from .paging import make_cursor, read_cursor
from .streams import NewStream, insert_new, new_stream, record_own, shred, user_streams, with_keys
from .waking import forget_device, forget_user

P = Permission

# What a user gets who was not given a role, and what anyone who may create users may give.
ORDINARY_ROLE: Final = "user"
# Channels left, and messages redacted, in one unit while a user is deleted: each costs about 0.1 ms of the writer's
# time, so that others wait 20 ms at most.
DELETION_BATCH: Final = 200
# Channels looked through for a deleted user's messages in one read: an index probe each.
SCAN_BATCH: Final = 2_000
# Rows written in one unit about who connected: 5 µs each, so that others wait 3 ms at most.
SEEN_BATCH: Final = 500
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
    return msgspec.json.decode(app.cipher.open(row.sealed, user_item(row.id)), type=Profile)


def user_item(user: str) -> bytes:
    """What a user's profile is bound to under the app's key."""
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
    """Refuse an app role that does not exist, or that holds more than the actor may give: anyone who may create users
    may give what ordinary users have, and beyond that nobody gives what they lack."""
    roles = actor.app.app_roles
    if role not in roles:
        raise Refusal("invalid_field", "There is no such app role.", field=field)
    check_held(actor, Grants(roles[role] & ~roles[ORDINARY_ROLE]), field)


def _check_app_rank(actor: Actor, role: str, field: str | None) -> None:
    """Refuse to change, lock out or delete users whose role holds more than the actor has, unless the actor decides
    what roles mean anyway (`role.manage`)."""
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

        def renew() -> None:
            nonlocal stream
            stream = new_stream(self._keyring, app, self._ids, now)

        return await with_keys(self._apps, app, lambda: self._changes.run(unit), renew=renew)

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

        def renew() -> None:
            nonlocal streams
            streams = [new_stream(self._keyring, app, self._ids, now) for _ in users]

        return await with_keys(self._apps, app, lambda: self._changes.run(unit), renew=renew)

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

            def renew() -> None:
                nonlocal stream
                stream = new_stream(self._keyring, app, self._ids, now)

            found = await with_keys(self._apps, app, lambda: self._changes.run(unit), renew=renew)
        if found is not None and found[0] is not None:
            raise Refusal("user_unknown", "The user was deleted.")

    async def record_seen(self, seen: list[tuple[int, str, int]]) -> None:
        """Remember when people (app, user) were last online (ms); it only moves forward. About `SEEN_BATCH` at most."""

        async def unit(tx: Tx) -> None:
            await tx.many(
                "UPDATE users SET last_seen_at=? WHERE app=? AND id=? AND coalesce(last_seen_at,0)<?"
                " AND deleted_at IS NULL",
                [(at, app, user, at) for app, user, at in seen],
            )

        await self._store.run(unit)

    # ------------------------------------------------------------ reading

    async def get(self, actor: Actor, user_id: str) -> User:
        """A user, or the tombstone of one who was deleted. Everybody may look at themselves."""
        if actor.user != user_id:
            actor.check(P.USER_READ)
        app = actor.app

        async def unit(tx: Tx) -> User:
            row = await user_row(tx, app.app, user_id)
            if row is None:
                raise NotFound("user", field="id")
            return render_user(app, row, last_seen=await self._shows_last_seen(tx, actor, row))

        return await with_keys(self._apps, app, lambda: self._store.read(unit))

    async def query(
        self,
        actor: Actor,
        *,
        ids: list[str] | None = None,
        role: str | None = None,
        active: bool | None = None,
        label: dict[str, str] | None = None,
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
    ) -> tuple[list[User], str | None]:
        """A page of users, the oldest first, and the cursor of the next one.

        `active`: only those who are (True) or are not (False) deactivated. `label`: all of these names with these
        values. Deleted users are left out unless named in `ids`. Raises Refusal `cursor_invalid`.
        """
        actor.check(P.USER_READ)
        app = actor.app
        if ids is not None and len(ids) > limits.PAGE_MAX:
            raise Refusal(
                "invalid_field", f"At most {limits.PAGE_MAX} ids at once.", field="ids", bound=limits.PAGE_MAX
            )
        listing = ["users", ids, role, active, label]
        limit = max(1, min(limit, limits.PAGE_MAX))
        where = ["u.app=?"]
        args: list[Any] = [app.app]
        if ids is not None:
            where.append(f"u.id IN ({log.placeholders(ids)})" if ids else "1=0")
            args += ids
        else:
            where.append("u.deleted_at IS NULL")
        if role is not None:
            where.append("u.role=?")
            args.append(role)
        if active is not None:
            where.append("u.deactivated_at IS NULL" if active else "u.deactivated_at IS NOT NULL")
        for name, value in (label or {}).items():
            where.append(
                "EXISTS (SELECT 1 FROM labels l WHERE l.app=u.app AND l.noun='user' AND l.name=? AND l.value=?"
                " AND l.id=u.id)"
            )
            args += [name, value]
        if cursor is not None:
            created_at, last = read_cursor(app, listing, cursor, tuple[int, str])
            where.append("(u.created_at>? OR (u.created_at=? AND u.id>?))")
            args += [created_at, created_at, last]

        async def unit(tx: Tx) -> tuple[list[User], str | None]:
            found = [
                UserRow(*row)
                for row in await tx.all(
                    f"SELECT {_COLUMNS} FROM users u WHERE {' AND '.join(where)} ORDER BY u.created_at, u.id LIMIT ?",
                    *args,
                    limit + 1,
                )
            ]
            shown = [
                render_user(app, row, last_seen=await self._shows_last_seen(tx, actor, row)) for row in found[:limit]
            ]
            last = found[limit - 1] if len(found) > limit else None
            return shown, None if last is None else make_cursor(app, listing, [last.created_at, last.id])

        return await with_keys(self._apps, app, lambda: self._store.read(unit))

    @staticmethod
    async def _shows_last_seen(tx: Tx, actor: Actor, row: UserRow) -> bool:
        """Backends and administrators see when someone was last online; people see it of those they share a channel
        with, if the app shows it at all."""
        if row.last_seen_at is None:
            return False
        if actor.user is None or actor.user == row.id or actor.may(P.USER_UPDATE_ANY):
            return True
        if not actor.app.settings.last_seen or row.invisible:
            return False
        shared = await tx.one(
            "SELECT 1 FROM members a JOIN members b ON b.app=a.app AND b.sid=a.sid AND b.user=?"
            " WHERE a.app=? AND a.user=? LIMIT 1",
            actor.user,
            actor.app.app,
            row.id,
        )
        return shared is not None

    # ------------------------------------------------------------ ending

    async def deactivate(self, actor: Actor, user_id: str) -> User:
        """Lock a user out; everything of theirs stays. Their connections end, their tokens are refused."""
        return await self._activate(actor, user_id, active=False)

    async def reactivate(self, actor: Actor, user_id: str) -> User:
        """Let a deactivated user in again."""
        return await self._activate(actor, user_id, active=True)

    async def _activate(self, actor: Actor, user_id: str, *, active: bool) -> User:
        actor.check(P.USER_DEACTIVATE)
        app = actor.app
        now = self._clock.now_ms()
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx) -> Change[User]:
            row = await self._standing(tx, app, user_id)
            _check_app_rank(actor, row.role, "id")
            if (row.deactivated_at is None) == active:
                return Change(render_user(app, row, last_seen=True))
            await tx.execute(
                "UPDATE users SET deactivated_at=?, updated_at=? WHERE app=? AND id=?",
                None if active else now,
                now,
                app.app,
                user_id,
            )
            action = Action.USER_REACTIVATED if active else Action.USER_DEACTIVATED
            await line_of(actor, action, f"user:{user_id}", mark, now).write(tx)
            notices: list[Notice] = [AccessChanged(app.app, user=user_id)]
            if not active:
                notices.append(Revoked(app.app, user_id, "user_deactivated"))
            after = await user_row(tx, app.app, user_id)
            return Change(render_user(app, after or row, last_seen=True), tuple(notices))

        return await with_keys(self._apps, app, lambda: self._changes.run(unit))

    async def delete(self, actor: Actor, user_id: str) -> None:
        """Delete a user for ever. A tombstone keeps the id from being used again.

        At once, in one transaction: profile, labels, devices, positions and relations are gone, the key of their own
        stream is destroyed, tokens are void, connections end. They leave their channels in units of `DELETION_BATCH`,
        the first of them in that same transaction. With the app's setting `deleted_user_messages` on `redact` their
        messages are destroyed likewise, unit by unit, each announced to its channel. All is done when this returns;
        what a crash cuts short, `resume_deletions` finishes. Deleting a deleted user changes nothing.
        """
        actor.check(P.USER_DELETE)
        app = actor.app
        now = self._clock.now_ms()
        job = _Deletion(
            mark=self._ids.new_id("e_"), at=now, by=actor.user, redact=app.settings.deleted_user_messages == "redact"
        )

        async def unit(tx: Tx) -> Change[int | None]:
            row = await user_row(tx, app.app, user_id, tx.for_update)
            if row is None:
                raise NotFound("user", field="id")
            if row.deleted_at is not None:
                return Change(None)
            _check_app_rank(actor, row.role, "id")
            await tx.execute(
                "UPDATE users SET deleted_at=?, updated_at=?, tokens_after=?, sealed=NULL, labels='{}',"
                " last_seen_at=NULL WHERE app=? AND id=?",
                now,
                now,
                now,
                app.app,
                user_id,
            )
            await tx.execute("DELETE FROM labels WHERE app=? AND noun='user' AND id=?", app.app, user_id)
            await tx.execute("DELETE FROM devices WHERE app=? AND devices.user=?", app.app, user_id)
            await tx.execute("DELETE FROM device_positions WHERE app=? AND device_positions.user=?", app.app, user_id)
            await forget_user(tx, app.app, user_id)
            await tx.execute("DELETE FROM relations WHERE app=? AND relations.user=?", app.app, user_id)
            await tx.execute("DELETE FROM relations WHERE app=? AND other=?", app.app, user_id)
            await shred(tx, row.sid)
            await tx.execute(
                "INSERT INTO meta(name,value) VALUES (?,?)", _job_name(app.app, user_id), encode(job).decode()
            )
            await line_of(actor, Action.USER_DELETED, f"user:{user_id}", job.mark, now).write(tx)
            notices: list[Notice] = [
                AccessChanged(app.app, user=user_id),
                Revoked(app.app, user_id, "user_unknown"),
                *await self._leave_some(tx, app, user_id, job, now),
            ]
            return Change(row.sid, tuple(notices))

        sid = await with_keys(self._apps, app, lambda: self._changes.run(unit))
        if sid is not None:
            self._keyring.forget_stream(app.id, str(sid))
            await self._finish_deletion(app, user_id, job)

    async def resume_deletions(self) -> int:
        """Finish deletions that a crash has cut short, at start; how many there were."""

        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(
                "SELECT name, value FROM meta WHERE name>=? AND name<? ORDER BY name", DELETING, DELETING + "\x7f"
            )

        found = await self._store.read(unit)
        for name, value in found:
            number, _, user = name.removeprefix(DELETING).partition(":")
            app = await self._apps.numbered(int(number))
            await self._finish_deletion(app, user, msgspec.json.decode(value, type=_Deletion))
        return len(found)

    async def _finish_deletion(self, app: AppContext, user: str, job: _Deletion) -> None:
        async def leave(tx: Tx) -> Change[bool]:
            # Work resumed after a crash: the streams move now, whatever time the deletion has.
            notices = await self._leave_some(tx, app, user, job, self._clock.now_ms())
            return Change(bool(notices), tuple(notices))

        async def done(tx: Tx) -> None:
            await tx.execute("DELETE FROM meta WHERE name=?", _job_name(app.app, user))

        while await with_keys(self._apps, app, lambda: self._changes.run(leave)):
            pass
        if job.redact:
            await self._redact_all(app, user, job)
        await self._store.run(done)

    async def _leave_some(self, tx: Tx, app: AppContext, user: str, job: _Deletion, now: int) -> list[Notice]:
        """End up to `DELETION_BATCH` memberships of a deleted user; what to announce, nothing when all are ended."""
        rows = await tx.all(
            "SELECT s.sid, s.ref, s.epoch, s.key_wrapped, s.key_version, s.key_app_version FROM members m"
            " JOIN streams s ON s.sid=m.sid WHERE m.app=? AND m.user=? ORDER BY m.sid LIMIT ?",
            app.app,
            user,
            DELETION_BATCH,
        )
        notices: list[Notice] = []
        for sid, channel, epoch, wrapped, version, app_version in rows:
            if not wrapped:
                # The channel is being deleted: nobody is left to be told.
                await tx.execute("DELETE FROM members WHERE app=? AND sid=? AND members.user=?", app.app, sid, user)
                notices.append(Left(app.app, user, sid, channel))
                continue
            place = Place(sid, channel, epoch, self._cipher(app, sid, wrapped, version, app_version))
            notices += await delete_member(
                tx, app, place, user, None, "deleted", at=job.at, by=job.by, mark=job.mark, now=now
            )
        return notices

    async def _redact_all(self, app: AppContext, user: str, job: _Deletion) -> None:
        """Destroy every message of a deleted user. Channels are looked through by an index probe each."""
        after = ""
        while True:

            async def scan(tx: Tx, after: str = after) -> tuple[list[Row], str | None]:
                rows = await tx.all(
                    "SELECT s.ref, s.sid, CASE WHEN EXISTS (SELECT 1 FROM messages m WHERE m.app=s.app AND m.sid=s.sid"
                    " AND m.sender=?) THEN 1 ELSE 0 END FROM streams s WHERE s.app=? AND s.kind='channel' AND s.ref>?"
                    " ORDER BY s.ref LIMIT ?",
                    user,
                    app.app,
                    after,
                    SCAN_BATCH,
                )
                return [row for row in rows if row[2]], rows[-1][0] if rows else None

            found, last = await self._store.read(scan)
            for channel, sid, _ in found:
                key: str | None = ""
                while key is not None:
                    key = await self._redact_some(app, user, channel, sid, key, job)
            if last is None:
                return
            after = last

    async def _redact_some(
        self, app: AppContext, user: str, channel: str, sid: int, after: str, job: _Deletion
    ) -> str | None:
        """Destroy up to `DELETION_BATCH` messages with keys after `after`; the last key, None at the end."""
        now = self._clock.now_ms()

        async def unit(tx: Tx) -> Change[str | None]:
            stream = await log.stream(tx, sid)
            if stream is None or not stream.key_wrapped:
                return Change(None)
            rows = await tx.all(
                "SELECT key, seq, id, CASE WHEN deleted_at IS NULL THEN reply_to END FROM messages"
                " WHERE app=? AND sid=? AND sender=? AND key>?"
                " AND redacted<2 ORDER BY key LIMIT ?",
                app.app,
                sid,
                user,
                after,
                DELETION_BATCH,
            )
            if not rows:
                return Change(None)
            cipher = self._cipher(app, sid, stream.key_wrapped, stream.key_version, stream.key_app_version)
            targets = sorted((seq, message_id) for _, seq, message_id, _ in rows)
            replied = {message_id: reply_to for _, _, message_id, reply_to in rows}
            await redact_messages(tx, app.app, sid, targets, job.by, job.at, hard=True)
            notices: list[Notice] = []
            for seq, message_id in targets:
                notices.append(
                    await record(
                        tx,
                        app=app.app,
                        sid=sid,
                        stream=channel,
                        cipher=cipher,
                        type=EventType.MESSAGE_DELETED.value,
                        at=job.at,
                        by=job.by,
                        ref=message_id,
                        item=f"{job.mark}/{message_id}",
                        data=MessageDeleted(id=message_id, message_seq=seq, hard=True, reply_to=replied[message_id]),
                        now=now,
                    )
                )
            return Change(rows[-1][0], tuple(notices))

        return await with_keys(self._apps, app, lambda: self._changes.run(unit))

    def _cipher(self, app: AppContext, sid: int, wrapped: bytes, version: int, app_version: int) -> StreamCipher:
        key = WrappedStreamKey(version=version, app_key_version=app_version, wrapped=wrapped)
        return self._keyring.cipher(app.id, str(sid), key)

    # ------------------------------------------------------------ devices

    async def register_devices(self, app: AppContext, devices: list[tuple[str, DeviceInfo]]) -> None:
        """Remember users' devices that connect, about `SEEN_BATCH` at most. Beyond `DEVICES_PER_USER_MAX` of a user the
        one unseen for longest is forgotten with its positions."""
        now = self._clock.now_ms()
        rows = []
        for user, device in devices:
            name = None if device.name is None else device.name.encode()
            sealed = None if name is None else app.cipher.seal(name, device_item(user, device.id))
            rows.append((app.app, user, device.id, device.platform, sealed, now, now))
        users = list({user: None for user, _ in devices})

        async def unit(tx: Tx) -> None:
            await tx.many(
                "INSERT INTO devices(app,user,id,platform,sealed,created_at,last_seen_at) VALUES (?,?,?,?,?,?,?)"
                " ON CONFLICT (app,user,id) DO UPDATE SET platform=coalesce(excluded.platform, devices.platform),"
                " sealed=coalesce(excluded.sealed, devices.sealed), last_seen_at=excluded.last_seen_at",
                rows,
            )
            for start in range(0, len(users), 200):
                chunk = users[start : start + 200]
                for user, count in await tx.all(
                    "SELECT d.user, count(*) FROM devices d WHERE d.app=?"
                    f" AND d.user IN ({log.placeholders(chunk)}) GROUP BY d.user HAVING count(*)>?",
                    app.app,
                    *chunk,
                    limits.DEVICES_PER_USER_MAX,
                ):
                    for (old,) in await tx.all(
                        "SELECT id FROM devices WHERE app=? AND devices.user=? ORDER BY last_seen_at, id LIMIT ?",
                        app.app,
                        user,
                        count - limits.DEVICES_PER_USER_MAX,
                    ):
                        await _delete_device(tx, app.app, user, old)

        await self._store.run(unit)

    async def devices(self, actor: Actor, user_id: str) -> list[Device]:
        """The devices of oneself, or of anybody with `device.manage_any`; the one seen last first."""
        if actor.user != user_id:
            actor.check(P.DEVICE_MANAGE_ANY)
        app = actor.app

        async def unit(tx: Tx) -> list[Device]:
            if await user_row(tx, app.app, user_id) is None:
                raise NotFound("user", field="id")
            rows = await tx.all(
                "SELECT id, platform, sealed, created_at, last_seen_at FROM devices WHERE app=? AND devices.user=?"
                " ORDER BY last_seen_at DESC, id",
                app.app,
                user_id,
            )
            return [
                Device(
                    id=id,
                    user=user_id,
                    platform=platform,
                    name=None if sealed is None else app.cipher.open(sealed, device_item(user_id, id)).decode(),
                    created_at=time_of(created_at),
                    last_seen_at=time_of(last_seen_at),
                )
                for id, platform, sealed, created_at, last_seen_at in rows
            ]

        return await with_keys(self._apps, app, lambda: self._store.read(unit))

    async def remove_device(self, actor: Actor, user_id: str, device_id: str) -> None:
        """Forget a device and its positions, and end its connections. Raises NotFound."""
        if actor.user != user_id:
            actor.check(P.DEVICE_MANAGE_ANY)
        app = actor.app

        async def unit(tx: Tx) -> Change[None]:
            if not await _delete_device(tx, app.app, user_id, device_id):
                raise NotFound("device", field="device")
            return Change(None, (Revoked(app.app, user_id, "token_revoked", device=device_id),))

        await self._changes.run(unit)

    # ------------------------------------------------------------ parts

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
            app.cipher.seal(encode(profile), user_item(user)),
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
            row.sealed if new == old else app.cipher.seal(encode(new), user_item(row.id)),
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
            changed = {"from": old_role, "to": role}
            await line_of(actor, Action.USER_ROLE_CHANGED, f"user:{row.id}", f"{mark}/{row.id}", now, **changed).write(
                tx
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


class _Deletion(msgspec.Struct, frozen=True):
    """A deletion under way, as its marker remembers it. `mark` names its events."""

    mark: str
    at: int
    by: str | None
    redact: bool


def _job_name(app: int, user: str) -> str:
    return f"{DELETING}{app}:{user}"


def device_item(user: str, device: str) -> bytes:
    """What a device's name is bound to under the app's key."""
    return f"device:{user}/{device}".encode()


async def _delete_device(tx: Tx, app: int, user: str, device: str) -> int:
    await forget_device(tx, app, user, device)
    await tx.execute(
        "DELETE FROM device_positions WHERE app=? AND device_positions.user=? AND device=?", app, user, device
    )
    return await tx.execute("DELETE FROM devices WHERE app=? AND devices.user=? AND id=?", app, user, device)


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is msgspec.UNSET else value
