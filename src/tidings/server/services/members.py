"""Members: added, joining, leaving, removed, given other roles."""

from __future__ import annotations

from typing import Literal

from tidings.server.bus.base import AccessChanged
from tidings.server.clock import Clock, Ids
from tidings.server.domain.permissions import NONE, Permission
from tidings.server.errors import Refusal
from tidings.server.store import log
from tidings.server.store.base import Row, Store, Tx
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.requests import MembersAdd
from tidings.wire.resources import Member

from .access import Access, AccessService, Actor
from .apps import Apps
from .change import Change, Changes
from .membership import (
    check_not_last_owner,
    check_rank,
    check_role_exists,
    check_users,
    delete_member,
    insert_members,
    member_of,
    no_member,
    place_of,
    render_member,
)
from .streams import user_streams, with_keys

P = Permission


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

    async def add(self, actor: Actor, channel_id: str, body: MembersAdd) -> list[Member]:
        """Make users members, all or none; in the order given. Who is one already stays as they are.

        Without a role they get the type's default. Raises Refusal: `invalid_field` naming `users[3]` or `role`,
        `forbidden` for a role that holds more than the actor has here, `bound_exceeded`, `conflict` in a direct channel.
        """
        users = list(dict.fromkeys(body.users))
        if len(users) > limits.BULK_MAX:
            raise Refusal(
                "invalid_field", f"At most {limits.BULK_MAX} users at once.", field="users", bound=limits.BULK_MAX
            )

        async def unit(tx: Tx, access: Access) -> Change[list[Member]]:
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

    # ------------------------------------------------------------ parts

    async def _insert(self, tx: Tx, access: Access, users: list[str], role: str, mark: str) -> Change[list[Member]]:
        channel = access.channel
        app = access.actor.app
        found: dict[str, Row] = {}
        for user in users:
            row = await member_of(tx, channel.app, channel.sid, user)
            if row is not None:
                found[user] = row
        new = [user for user in users if user not in found]
        notices = []
        if new:
            await self._check_new(tx, access, users, new)
            notices = await insert_members(
                tx,
                self._keyring,
                app,
                place_of(access),
                [(user, role) for user in new],
                at=self._clock.now_ms(),
                by=access.actor.user,
                mark=mark,
            )
            notices.append(AccessChanged(channel.app, sid=channel.sid, channel=channel.id))
            for user in new:
                row = await member_of(tx, channel.app, channel.sid, user)
                if row is not None:
                    found[user] = row
        receipts = channel.type.definition.features.receipts
        return Change([render_member(found[user], receipts=receipts) for user in users], tuple(notices))

    async def _check_new(self, tx: Tx, access: Access, users: list[str], new: list[str]) -> None:
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
            await log.write_audit(
                tx,
                app=app.app,
                id=mark,
                at=now,
                actor=access.actor.via,
                action="member.remove",
                target=f"channel:{channel.id}",
                detail=encode({"user": user, "role": role}).decode(),
            )
        notices.append(AccessChanged(channel.app, sid=channel.sid, channel=channel.id))
        return Change(None, tuple(notices))

    @staticmethod
    async def _row(tx: Tx, access: Access, user: str) -> Row:
        row = await member_of(tx, access.channel.app, access.channel.sid, user)
        if row is None:
            raise no_member()
        return row


def _check_not_direct(access: Access) -> None:
    if access.channel.type.definition.direct:
        raise Refusal("conflict", "The two members of a direct channel stay the same.")
