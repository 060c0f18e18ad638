"""How somebody becomes a member of a channel and stops being one, as parts of a unit.

Both change who may do what, so both move the stream's access version: whatever was authorised before is decided anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidings.server.bus.base import AccessChanged, Joined, Left, MembersMoved, Notice
from tidings.server.crypto.keyring import Keyring, StreamCipher
from tidings.server.domain.permissions import Grants, Permission, bit
from tidings.server.errors import NotFound, Refusal
from tidings.server.store import log
from tidings.server.store.base import Row, Tx
from tidings.wire.events import ChannelJoined, ChannelLeft, EventType, MemberChanged
from tidings.wire.ids import time_of
from tidings.wire.resources import Member

from .access import Access
from .apps import AppContext, CompiledType
from .change import record, record_many
from .streams import UserStream, record_each, record_own, user_streams


@dataclass(slots=True, frozen=True)
class Place:
    """A channel, as far as its log is concerned."""

    sid: int
    id: str
    epoch: str
    cipher: StreamCipher


def place_of(access: Access) -> Place:
    """The channel of an access."""
    channel = access.channel
    return Place(channel.sid, channel.id, channel.epoch, channel.cipher)


def check_role_exists(compiled: CompiledType, role: str, field: str) -> None:
    """Refuse a channel role that the type does not know."""
    if role not in compiled.grants:
        raise Refusal("invalid_field", "There is no such channel role.", field=field)


def check_rank(held: Grants, role: Grants, field: str) -> None:
    """Refuse to give, change or take away a role that holds permissions the actor lacks."""
    if role & ~held:
        raise Refusal("forbidden", "The role holds permissions that you lack.", field=field)


async def check_users(tx: Tx, app: AppContext, users: list[str], field: str) -> None:
    """Refuse users who do not exist or are not active. `field` formats the place: `members[{}]`.

    Their rows stay locked, in the order of their ids: nobody is deleted while they are added.
    """
    active: set[str] = set()
    ordered = sorted(users)
    for start in range(0, len(ordered), 200):
        chunk = ordered[start : start + 200]
        rows = await tx.all(
            "SELECT id FROM users WHERE app=? AND deactivated_at IS NULL AND deleted_at IS NULL"
            f" AND id IN ({log.placeholders(chunk)}) ORDER BY id{tx.for_update}",
            app.app,
            *chunk,
        )
        active.update(user for (user,) in rows)
    for number, user in enumerate(users):
        if user not in active:
            raise Refusal("invalid_field", "There is no such active user.", field=field.format(number))


async def insert_members(
    tx: Tx,
    keyring: Keyring,
    app: AppContext,
    place: Place,
    entrants: list[tuple[str, str]],
    *,
    at: int,
    by: str | None,
    mark: str,
) -> tuple[MembersMoved, list[Notice]]:
    """Make (user, role) members who are none yet; what to announce, and what it means for what is remembered.

    The stream's row is locked by the caller. New members have read everything there was before them.
    """
    row = await tx.one("SELECT counted FROM streams WHERE sid=?", place.sid)
    counted = row[0] if row else 0
    published = await record_many(
        tx,
        app=app.app,
        sid=place.sid,
        stream=place.id,
        cipher=place.cipher,
        type=EventType.MEMBER_ADDED.value,
        at=at,
        by=by,
        events=[(user, f"{mark}/{user}", MemberChanged(user=user, role=role)) for user, role in entrants],
    )
    events: list[Notice] = [*published]
    joined: list[Notice] = []
    heads: dict[str, tuple[str, int]] = {}
    rows = []
    for (user, role), event in zip(entrants, published, strict=True):
        head = event.seq - 1
        heads[user] = (role, head)
        rows.append((app.app, place.sid, user, role, at, head, head, head, counted, at))
        joined.append(Joined(app.app, user, place.sid, place.id, place.epoch, head))
    await tx.many(
        "INSERT INTO members(app,sid,user,role,joined_at,joined_seq,delivered,read,read_counted,moved_at)"
        " VALUES (?,?,?,?,?,?,?,?,?,?)",
        rows,
    )

    def told(stream: UserStream) -> ChannelJoined:
        role, head = heads[stream.user]
        return ChannelJoined(channel=place.id, role=role, epoch=place.epoch, head=head)

    events += await record_each(
        tx,
        app,
        await user_streams(tx, keyring, app, heads),
        type=EventType.CHANNEL_JOINED,
        at=at,
        by=by,
        ref=place.id,
        mark=mark,
        data=told,
    )
    moved = await _members_moved(tx, place.sid, len(entrants), [user for user, _ in entrants])
    return moved, events + joined


async def _members_moved(tx: Tx, sid: int, more: int, users: list[str]) -> MembersMoved:
    """Count who came (or, below zero, went), and declare what was authorised out of date."""
    row = await tx.one("UPDATE channels SET member_count=member_count+? WHERE sid=? RETURNING member_count", more, sid)
    return MembersMoved(await log.touch_access(tx, sid), row[0] if row else 0, users)


async def delete_member(
    tx: Tx,
    app: AppContext,
    place: Place,
    user: str,
    own: UserStream | None,
    reason: Literal["left", "removed", "deleted"],
    *,
    at: int,
    by: str | None,
    mark: str,
    now: int | None = None,
) -> list[Notice]:
    """End a membership; what to announce, what is remembered about access first, then `Left`: the one who leaves hears
    nothing more of the channel.

    `own`: their own stream, None if it is destroyed. `now`: the present, where `at` is an earlier moment. The stream's
    row is locked by the caller.
    """
    await tx.execute("DELETE FROM members WHERE app=? AND sid=? AND members.user=?", app.app, place.sid, user)
    await tx.execute(
        "DELETE FROM device_positions WHERE app=? AND device_positions.user=? AND sid=? AND device IN"
        " (SELECT id FROM devices d WHERE d.app=? AND d.user=?)",
        app.app,
        user,
        place.sid,
        app.app,
        user,
    )
    moved = await _members_moved(tx, place.sid, -1, [user])
    notices: list[Notice] = [
        AccessChanged(app.app, sid=place.sid, channel=place.id, moved=moved),
        Left(app.app, user, place.sid, place.id),
    ]
    notices.append(
        await record(
            tx,
            app=app.app,
            sid=place.sid,
            stream=place.id,
            cipher=place.cipher,
            type=EventType.MEMBER_REMOVED.value,
            at=at,
            by=by,
            ref=user,
            item=f"{mark}/{user}",
            data=MemberChanged(user=user, reason=reason),
            now=now,
        )
    )
    if own is not None:
        notices.append(
            await record_own(
                tx,
                app,
                own,
                type=EventType.CHANNEL_LEFT,
                at=at,
                by=by,
                ref=place.id,
                mark=mark,
                data=ChannelLeft(channel=place.id, reason=reason),
                now=now,
            )
        )
    return notices


async def check_not_last_owner(tx: Tx, access: Access, user: str, role: str) -> None:
    """Refuse to leave a channel without anyone who can manage its roles, unless it is empty then.

    Backends may: they can always appoint somebody.
    """
    if access.actor.user is None:
        return
    manages = bit(Permission.MEMBER_UPDATE)
    owners = [name for name, grants in access.channel.type.grants.items() if grants & manages]
    if role not in owners:
        return
    channel = access.channel
    others = await tx.one(
        "SELECT 1 FROM members m WHERE m.app=? AND m.sid=? AND m.user<>? LIMIT 1", channel.app, channel.sid, user
    )
    if others is None:
        return
    heir = await tx.one(
        "SELECT 1 FROM members m WHERE m.app=? AND m.sid=? AND m.user<>?"
        f" AND m.role IN ({log.placeholders(owners)}) LIMIT 1",
        channel.app,
        channel.sid,
        user,
        *owners,
    )
    if heir is None:
        raise Refusal(
            "conflict",
            "This is the last member who can manage roles here: give someone else such a role first.",
            field="user",
        )


_MEMBER = "m.user, m.role, m.joined_at, m.delivered, m.read"


async def member_of(tx: Tx, app: int, sid: int, user: str) -> Row | None:
    """A membership's row, for `render_member`."""
    return await tx.one(f"SELECT {_MEMBER} FROM members m WHERE m.app=? AND m.sid=? AND m.user=?", app, sid, user)


async def members_named(tx: Tx, app: int, sid: int, users: list[str]) -> dict[str, Row]:
    """The memberships of those of the users who are members."""
    found: dict[str, Row] = {}
    for start in range(0, len(users), 200):
        chunk = users[start : start + 200]
        rows = await tx.all(
            f"SELECT {_MEMBER} FROM members m WHERE m.app=? AND m.sid=? AND m.user IN ({log.placeholders(chunk)})",
            app,
            sid,
            *chunk,
        )
        found.update((row[0], row) for row in rows)
    return found


async def members_of(tx: Tx, app: int, sid: int, *, role: str | None = None, after: str = "", limit: int) -> list[Row]:
    """Members after a user id, in the order of their ids."""
    return await tx.all(
        f"SELECT {_MEMBER} FROM members m WHERE m.app=? AND m.sid=? AND m.user>?"
        + (" AND m.role=?" if role is not None else "")
        + " ORDER BY m.user LIMIT ?",
        app,
        sid,
        after,
        *([role] if role is not None else []),
        limit,
    )


def render_member(row: Row, *, receipts: bool) -> Member:
    """A member; with `receipts`, how far they are."""
    user, role, joined_at, delivered, read = row
    return Member(
        user=user,
        role=role,
        joined_at=time_of(joined_at),
        delivered=delivered if receipts else 0,
        read=read if receipts else 0,
    )


def no_member() -> NotFound:
    """The named user is no member."""
    return NotFound("member", field="user")
