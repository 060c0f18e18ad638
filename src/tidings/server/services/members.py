"""Members: added, joining, leaving, removed, given other roles."""

from __future__ import annotations

from typing import Literal, TypeAlias

from tidings.server.bus.base import AccessChanged, MembersMoved, Notice
from tidings.server.clock import Clock, Ids
from tidings.server.domain.permissions import NONE, Permission, has
from tidings.server.errors import Refusal
from tidings.server.store import log
from tidings.server.store.base import Row, Store, Tx
from tidings.wire import limits
from tidings.wire.events import EventType, MemberChanged
from tidings.wire.requests import MembersAdd, MemberUpdate
from tidings.wire.resources import Member

from .access import Access, AccessService, Actor
from .apps import Apps
from .audit import Action, line_of
from .change import Change, Changes, record
from .membership import (
    check_not_last_owner,
    check_rank,
    check_role_exists,
    check_users,
    delete_member,
    insert_members,
    member_of,
    members_named,
    members_of,
    no_member,
    place_of,
    render_member,
)
from .paging import make_cursor, read_cursor
from .streams import user_streams, with_keys

P = Permission
# `list` is a use-case below, so the type needs names of its own there.
Page: TypeAlias = list[Member]
_Ids: TypeAlias = list[str]


class Members:
    """Use-cases of membership."""

    def __init__(
        self, store: Store, apps: Apps, access: AccessService, changes: Changes, clock: Clock, ids: Ids
    ) -> None:
        self._store = store
        self._apps = apps
        self._keyring = apps.keyring
        self._access = access
        self._changes = changes
        self._clock = clock
        self._ids = ids

    async def add(self, actor: Actor, channel_id: str, body: MembersAdd) -> Page:
        """Make users members, all or none; in the order given. Who is one already stays as they are.

        Without a role they get the type's default. Raises Refusal: `invalid_field` naming `users[3]` or `role`,
        `forbidden` for a role that holds more than the actor has here, `bound_exceeded`, `conflict` (direct channel).
        """
        users = list(dict.fromkeys(body.users))
        if len(users) > limits.BULK_MAX:
            raise Refusal(
                "invalid_field", f"At most {limits.BULK_MAX} users at once.", field="users", bound=limits.BULK_MAX
            )

        async def unit(tx: Tx, access: Access) -> Change[Page]:
            _check_not_direct(access)
            compiled = access.channel.type
            role = body.role if body.role is not None else compiled.definition.default_role
            check_role_exists(compiled, role, "role")
            if role != compiled.definition.default_role:
                check_rank(access.grants, compiled.grants[role], "role")
            return await self._insert(tx, access, users, role, mark)

        mark = self._ids.new_id("e_")
        return await with_keys(self._apps, actor.app, lambda: self._access.write(actor, channel_id, P.MEMBER_ADD, unit))

    async def remove(self, actor: Actor, channel_id: str, user: str) -> None:
        """End somebody's membership. Nothing of the channel reaches them after this returns.

        Raises NotFound, or Refusal: `forbidden` for members with more rights than the actor, `conflict` for the last
        one who can manage roles.
        """
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[None]:
            _check_not_direct(access)
            row = await self._row(tx, access, user)
            if user != actor.user:
                check_rank(access.grants, access.channel.type.grants.get(row[1], NONE), "user")
            return await self._delete(tx, access, row, "removed", mark)

        await with_keys(self._apps, actor.app, lambda: self._access.write(actor, channel_id, P.MEMBER_REMOVE, unit))

    async def join(self, actor: Actor, channel_id: str) -> Member:
        """Become a member by oneself, with the type's default role: in public channels, or with `channel.join`.
        Members stay as they are."""
        user = _user(actor)
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[Member]:
            row = await member_of(tx, access.channel.app, access.channel.sid, user)
            if row is None:
                access.check(P.CHANNEL_JOIN)
                _check_not_direct(access)
            change = await self._insert(tx, access, [user], access.channel.type.definition.default_role, mark)
            return Change(change.value[0], change.notices)

        need = P.CHANNEL_JOIN if actor.may(P.CHANNEL_JOIN) else P.CHANNEL_READ
        return await with_keys(self._apps, actor.app, lambda: self._access.write(actor, channel_id, need, unit))

    async def leave(self, actor: Actor, channel_id: str) -> None:
        """End one's own membership. Raises Refusal `conflict` in direct channels and for the last one who can manage
        roles, unless nobody else is there."""
        user = _user(actor)
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[None]:
            row = await self._row(tx, access, user)
            _check_not_direct(access)
            return await self._delete(tx, access, row, "left", mark)

        await with_keys(self._apps, actor.app, lambda: self._access.write(actor, channel_id, P.CHANNEL_LEAVE, unit))

    async def update(self, actor: Actor, channel_id: str, user: str, body: MemberUpdate) -> Member:
        """Give a member another role. Neither the old nor the new one may hold more than the actor has here."""
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[Member]:
            channel = access.channel
            compiled = channel.type
            receipts = compiled.definition.features.receipts
            row = await self._row(tx, access, user)
            check_role_exists(compiled, body.role, "role")
            old = row[1]
            if old == body.role:
                return Change(render_member(row, receipts=receipts))
            check_rank(access.grants, compiled.grants.get(old, NONE), "user")
            check_rank(access.grants, compiled.grants[body.role], "role")
            if not has(compiled.grants[body.role], P.MEMBER_UPDATE):
                await check_not_last_owner(tx, access, user, old)
            now = self._clock.now_ms()
            await tx.execute(
                "UPDATE members SET role=?, moved_at=? WHERE app=? AND sid=? AND members.user=?",
                body.role,
                now,
                channel.app,
                channel.sid,
                user,
            )
            published = await record(
                tx,
                app=channel.app,
                sid=channel.sid,
                stream=channel.id,
                cipher=channel.cipher,
                type=EventType.MEMBER_UPDATED.value,
                at=now,
                by=actor.user,
                ref=user,
                item=mark,
                data=MemberChanged(user=user, role=body.role),
            )
            # What one member may do says nothing of the others.
            moved = MembersMoved(await log.touch_access(tx, channel.sid), channel.member_count, [user])
            change = {"user": user, "from": old, "to": body.role}
            await line_of(actor, Action.MEMBER_ROLE_CHANGED, f"channel:{channel.id}", mark, now, **change).write(tx)
            after = await self._row(tx, access, user)
            return Change(
                render_member(after, receipts=receipts),
                (AccessChanged(channel.app, sid=channel.sid, channel=channel.id, moved=moved), published),
            )

        return await with_keys(
            self._apps, actor.app, lambda: self._access.write(actor, channel_id, P.MEMBER_UPDATE, unit)
        )

    async def list(
        self,
        actor: Actor,
        channel_id: str,
        *,
        role: str | None = None,
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
    ) -> tuple[Page, str | None]:
        """A page of members in the order of their ids, and the cursor of the next one."""
        # Before the cursor is looked at: whether there is such a channel is not for everybody.
        await self._access.channel(actor, channel_id, P.MEMBER_READ)
        listing = ["members", channel_id, role]
        after = "" if cursor is None else read_cursor(actor.app, listing, cursor, tuple[str])[0]
        limit = max(1, min(limit, limits.PAGE_MAX))

        async def unit(tx: Tx, access: Access, epoch: str, head: int) -> tuple[Page, str | None]:
            channel = access.channel
            receipts = channel.type.definition.features.receipts
            rows = await members_of(tx, channel.app, channel.sid, role=role, after=after, limit=limit + 1)
            shown = [render_member(row, receipts=receipts) for row in rows[:limit]]
            return shown, make_cursor(actor.app, listing, [rows[limit - 1][0]]) if len(rows) > limit else None

        return await self._access.read(actor, channel_id, P.MEMBER_READ, unit)

    # ------------------------------------------------------------ parts

    async def _insert(self, tx: Tx, access: Access, users: _Ids, role: str, mark: str) -> Change[Page]:
        channel = access.channel
        app = access.actor.app
        found = await members_named(tx, channel.app, channel.sid, users)
        new = [user for user in users if user not in found]
        notices: list[Notice] = []
        if new:
            await self._check_new(tx, access, users, new)
            moved, notices = await insert_members(
                tx,
                self._keyring,
                app,
                place_of(access),
                [(user, role) for user in new],
                at=self._clock.now_ms(),
                by=access.actor.user,
                mark=mark,
            )
            # What is remembered about access goes first: another node hears these one by one, and whoever is told that
            # they have joined reads the channel in between.
            notices.insert(0, AccessChanged(channel.app, sid=channel.sid, channel=channel.id, moved=moved))
            found |= await members_named(tx, channel.app, channel.sid, new)
        receipts = channel.type.definition.features.receipts
        return Change([render_member(found[user], receipts=receipts) for user in users], tuple(notices))

    async def _check_new(self, tx: Tx, access: Access, users: _Ids, new: _Ids) -> None:
        channel = access.channel
        try:
            await check_users(tx, access.actor.app, new, "{}")
        except Refusal as refusal:
            place = users.index(new[int(refusal.field or 0)])
            raise Refusal(refusal.code, refusal.detail, field=f"users[{place}]") from None
        count = await tx.one("SELECT member_count FROM channels WHERE sid=?", channel.sid)
        most = channel.type.definition.members_max
        if count is not None and count[0] + len(new) > most:
            raise Refusal(
                "bound_exceeded", f"Channels of this type have at most {most} members.", field="users", bound=most
            )

    async def _delete(
        self, tx: Tx, access: Access, row: Row, reason: Literal["left", "removed"], mark: str
    ) -> Change[None]:
        channel = access.channel
        app = access.actor.app
        user, role = row[0], row[1]
        now = self._clock.now_ms()
        await check_not_last_owner(tx, access, user, role)
        own = await user_streams(tx, self._keyring, app, [user])
        notices = await delete_member(
            tx,
            app,
            place_of(access),
            user,
            own[0] if own else None,
            reason,
            at=now,
            by=access.actor.user,
            mark=mark,
        )
        if reason == "removed":
            await line_of(
                access.actor, Action.MEMBER_REMOVED, f"channel:{channel.id}", mark, now, user=user, role=role
            ).write(tx)
        return Change(None, tuple(notices))

    @staticmethod
    async def _row(tx: Tx, access: Access, user: str) -> Row:
        row = await member_of(tx, access.channel.app, access.channel.sid, user)
        if row is None:
            raise no_member()
        return row


def _user(actor: Actor) -> str:
    if actor.user is None:
        raise Refusal("conflict", "The app's backend is no member of anything: act for a user.")
    return actor.user


def _check_not_direct(access: Access) -> None:
    if access.channel.type.definition.direct:
        raise Refusal("conflict", "The two members of a direct channel stay the same.")
