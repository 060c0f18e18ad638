"""Channels: made, found again, listed with what is new in them, changed, deleted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tidings.server.bus.base import Notice
from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import StreamCipher, WrappedStreamKey
from tidings.server.domain.permissions import NONE, Grants, Permission
from tidings.server.errors import NotFound, Refusal, StoreUnavailable
from tidings.server.store.base import Row, Store, Tx
from tidings.wire.codec import encode
from tidings.wire.events import EventType
from tidings.wire.ids import time_of
from tidings.wire.requests import ChannelCreate
from tidings.wire.resources import Channel, Membership

from .access import ATTEMPTS_MAX, AccessService, Actor
from .apps import AppContext, Apps, CompiledType
from .change import Change, Changes, record
from .counting import HIDDEN, MENTIONED, UNREAD
from .membership import (
    Place,
    check_rank,
    check_role_exists,
    check_users,
    insert_members,
)
from .messages import check_custom
from .streams import insert_new, new_stream, with_keys
from .users import write_labels

P = Permission

_CHANNEL: Final = (
    "c.id, c.sid, c.type, c.sealed, c.labels, c.created_by, c.created_at, c.updated_at, c.frozen, c.member_count,"
    " s.epoch, s.head, s.messages, s.last_message_at, s.key_wrapped, s.key_version, s.key_app_version, s.floor,"
    " s.access_version"
)
_MEMBER: Final = (
    "m.role, m.joined_at, m.joined_seq, m.delivered, m.read, m.marked_from, m.archived, m.muted_until,"
    f" CASE WHEN {HIDDEN} THEN 1 ELSE 0 END, {UNREAD}, {MENTIONED}"
)
# Somebody's side comes along if they are a member: one parameter, their id.
_FROM: Final = (
    " FROM channels c JOIN streams s ON s.sid=c.sid LEFT JOIN members m ON m.app=c.app AND m.sid=c.sid AND m.user=?"
)
SELECT_ONE: Final = f"SELECT {_CHANNEL}, {_MEMBER}{_FROM} WHERE c.app=? AND c.id=? AND c.deleted_at IS NULL"


class Sealed(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is sealed of a channel, under item `channel` of its stream's key."""

    name: str | None = None
    description: str | None = None
    avatar_url: str | None = None
    custom: dict[str, Any] = {}


_ITEM: Final = b"channel"


@dataclass(slots=True, frozen=True)
class ChannelRow:
    """A row of `channels` with its stream."""

    id: str
    sid: int
    type: str
    sealed: bytes | None
    labels: str
    created_by: str | None
    created_at: int
    updated_at: int
    frozen: int
    member_count: int
    epoch: str
    head: int
    messages: int
    last_message_at: int | None
    key_wrapped: bytes
    key_version: int
    key_app_version: int
    floor: int
    access_version: int


@dataclass(slots=True, frozen=True)
class SideRow:
    """Somebody's side of a channel: their row of `members` with counts."""

    role: str
    joined_at: int
    joined_seq: int
    delivered: int
    read: int
    marked_from: int | None
    archived: int
    muted_until: int | None
    hidden: int
    unread: int
    mentions: int


_CHANNEL_WIDTH: Final = len(ChannelRow.__slots__)
_SIDE_WIDTH: Final = len(SideRow.__slots__)


def split(row: Row) -> tuple[ChannelRow, SideRow | None]:
    """A row of `SELECT_ONE`."""
    side = row[_CHANNEL_WIDTH : _CHANNEL_WIDTH + _SIDE_WIDTH]
    return ChannelRow(*row[:_CHANNEL_WIDTH]), None if side[0] is None else SideRow(*side)


def render_membership(side: SideRow) -> Membership:
    """The caller's own side of a channel."""
    return Membership(
        role=side.role,
        joined_at=time_of(side.joined_at),
        hidden=bool(side.hidden),
        archived=bool(side.archived),
        muted_until=None if side.muted_until is None else time_of(side.muted_until),
        delivered=side.delivered,
        read=side.read,
        unread=side.unread,
        mentions=side.mentions,
        marked_unread_from=side.marked_from,
    )


def render_channel(row: ChannelRow, cipher: StreamCipher, side: SideRow | None) -> Channel:
    """A channel, with the caller's own side if they are a member."""
    sealed = open_sealed(row, cipher)
    return Channel(
        id=row.id,
        type=row.type,
        epoch=row.epoch,
        head=row.head,
        name=sealed.name,
        description=sealed.description,
        avatar_url=sealed.avatar_url,
        custom=sealed.custom,
        labels=msgspec.json.decode(row.labels, type=dict[str, str]),
        created_by=row.created_by,
        created_at=time_of(row.created_at),
        updated_at=time_of(row.updated_at),
        last_message_at=None if row.last_message_at is None else time_of(row.last_message_at),
        frozen=bool(row.frozen),
        member_count=row.member_count,
        message_count=row.messages,
        membership=None if side is None else render_membership(side),
    )


def open_sealed(row: ChannelRow, cipher: StreamCipher) -> Sealed:
    """Name, description, avatar and custom data of a channel."""
    if row.sealed is None:
        return Sealed()
    return msgspec.json.decode(cipher.open(row.sealed, _ITEM), type=Sealed)


class _Raced(Exception):
    """Somebody else has just taken the id or made the pair's channel: look again."""


class Channels:
    """Use-cases of channels."""

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

    # ------------------------------------------------------------ making

    async def create(self, actor: Actor, body: ChannelCreate) -> tuple[Channel, bool]:
        """Make a channel with its members; the channel and whether it is new.

        A user who makes one is a member, with the type's creator role. A direct channel is the one of its pair: if it
        exists already it is given back, shown again to whom had hidden it. Raises Refusal: `already_exists`,
        `bound_exceeded`, `invalid_field` naming the field, such as `members[3]`.
        """
        app = actor.app
        compiled = app.types.get(body.type)
        if compiled is None:
            raise Refusal("invalid_field", "There is no such channel type.", field="type")
        direct = compiled.definition.direct
        actor.check(P.CHANNEL_CREATE_DIRECT if direct else P.CHANNEL_CREATE)
        entrants = self._entrants(actor, body, compiled)
        check_custom(body.custom, "custom")
        pair = "\n".join(sorted(user for user, _ in entrants)) if direct else None
        channel_id = body.id if body.id is not None else self._ids.new_id("ch_")
        now = self._clock.now_ms()
        stream = new_stream(self._keyring, app, self._ids, now)
        mark = self._ids.new_id("e_")
        sealed = Sealed(body.name, body.description, body.avatar_url, body.custom)
        # Fields name places in the request; the creator is not in it, but is known to be active.
        places = {user: place for place, user in reversed(list(enumerate(body.members)))}

        async def unit(tx: Tx) -> Change[tuple[Channel, bool]]:
            if pair is not None:
                found = await tx.one(
                    "SELECT id FROM channels WHERE app=? AND type=? AND pair=?", app.app, body.type, pair
                )
                if found is not None:
                    shown = await self._show(tx, actor, found[0], now, mark)
                    return Change((await self._render(tx, actor, found[0]), False), tuple(shown))
            if await tx.one("SELECT 1 FROM channels WHERE app=? AND id=?", app.app, channel_id) is not None:
                raise Refusal("already_exists", "There is or was a channel with this id.", field="id")
            named = [user for user, _ in entrants if user in places]
            await self._check_named(tx, app, named, places)
            if actor.user is not None and actor.user not in places:
                await check_users(tx, app, [actor.user], "members")
            inserted = await tx.execute(
                "INSERT INTO channels(app,id,sid,type,sealed,labels,pair,created_by,created_at,updated_at)"
                " VALUES (?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO NOTHING",
                app.app,
                channel_id,
                stream.sid,
                body.type,
                stream.cipher.seal(encode(sealed), _ITEM),
                encode(body.labels).decode(),
                pair,
                actor.user,
                now,
                now,
            )
            if not inserted:
                raise _Raced
            await insert_new(tx, app, stream, "channel", channel_id, now)
            if body.labels:
                await write_labels(tx, app.app, "channel", channel_id, body.labels)
            created = await record(
                tx,
                app=app.app,
                sid=stream.sid,
                stream=channel_id,
                cipher=stream.cipher,
                type=EventType.CHANNEL_CREATED.value,
                at=now,
                by=actor.user,
                ref=channel_id,
                item=mark,
                # As it is at that event: its members are the next ones.
                data=Channel(
                    id=channel_id,
                    type=body.type,
                    epoch=stream.epoch,
                    head=1,
                    name=body.name,
                    description=body.description,
                    avatar_url=body.avatar_url,
                    custom=body.custom,
                    labels=body.labels,
                    created_by=actor.user,
                    created_at=time_of(now),
                    updated_at=time_of(now),
                ),
            )
            place = Place(stream.sid, channel_id, stream.epoch, stream.cipher)
            notices = await insert_members(tx, self._keyring, app, place, entrants, at=now, by=actor.user, mark=mark)
            return Change((await self._render(tx, actor, channel_id), True), (created, *notices))

        async def attempt() -> tuple[Channel, bool]:
            for _ in range(ATTEMPTS_MAX):
                try:
                    return await self._changes.run(unit)
                except _Raced:
                    continue
            raise StoreUnavailable("others make the same channel")

        return await with_keys(self._apps, app, attempt)

    @staticmethod
    def _entrants(actor: Actor, body: ChannelCreate, compiled: CompiledType) -> list[tuple[str, str]]:
        """Who will be members with which roles: the creator first, then as given, each once."""
        definition = compiled.definition
        members = dict.fromkeys(body.members, definition.default_role)
        for user, role in body.roles.items():
            if user not in members:
                raise Refusal(
                    "invalid_field", "A role is given to someone who is not named as a member.", field=f"roles.{user}"
                )
            check_role_exists(compiled, role, f"roles.{user}")
            if actor.user is not None and role != definition.default_role:
                held = Grants(actor.grants | compiled.grants.get(definition.creator_role, NONE))
                check_rank(held, compiled.grants[role], f"roles.{user}")
            members[user] = role
        if actor.user is not None:
            members = {actor.user: definition.creator_role} | members
            if actor.user not in body.roles:
                members[actor.user] = definition.creator_role
        for role in (definition.default_role, definition.creator_role):
            check_role_exists(compiled, role, "type")
        if definition.direct and len(members) != 2:
            raise Refusal("invalid_field", "A direct channel has exactly two different members.", field="members")
        if len(members) > definition.members_max:
            raise Refusal(
                "bound_exceeded",
                f"Channels of this type have at most {definition.members_max} members.",
                field="members",
                bound=definition.members_max,
            )
        return list(members.items())

    @staticmethod
    async def _check_named(tx: Tx, app: AppContext, named: list[str], places: dict[str, int]) -> None:
        """Refuse members who do not exist or are not active, by their place in the request."""
        if not named:
            return
        ordered = sorted(named, key=lambda user: places[user])
        try:
            await check_users(tx, app, ordered, "{}")
        except Refusal as refusal:
            place = places[ordered[int(refusal.field or 0)]]
            raise Refusal(refusal.code, refusal.detail, field=f"members[{place}]") from None

    async def _show(self, tx: Tx, actor: Actor, channel_id: str, now: int, mark: str) -> list[Notice]:
        """Show a hidden channel to the caller again."""
        return []

    # ------------------------------------------------------------ reading

    async def get(self, actor: Actor, channel_id: str) -> Channel:
        """A channel with the caller's own side. Who may list every channel may also look at one."""
        need = P.CHANNEL_LIST_ANY if actor.may(P.CHANNEL_LIST_ANY) else P.CHANNEL_READ
        await self._access.channel(actor, channel_id, need)

        async def unit(tx: Tx) -> Channel:
            return await self._render(tx, actor, channel_id)

        return await with_keys(self._apps, actor.app, lambda: self._store.read(unit))

    async def _render(self, tx: Tx, actor: Actor, channel_id: str) -> Channel:
        row = await tx.one(SELECT_ONE, actor.user, actor.app.app, channel_id)
        if row is None:
            raise NotFound("channel", field="channel")
        channel, side = split(row)
        return render_channel(channel, self._cipher(actor.app, channel), side)

    def _cipher(self, app: AppContext, row: ChannelRow) -> StreamCipher:
        key = WrappedStreamKey(version=row.key_version, app_key_version=row.key_app_version, wrapped=row.key_wrapped)
        return self._keyring.cipher(app.id, str(row.sid), key)
