"""Channels: made, found again, listed with what is new in them, changed, deleted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec

from tidings.server.bus.base import AccessChanged, Left, Notice, Published
from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import StreamCipher, WrappedStreamKey
from tidings.server.domain.permissions import NONE, Grants, Permission, has
from tidings.server.errors import NotFound, Refusal, StoreUnavailable
from tidings.server.store import log
from tidings.server.store.base import Row, Store, Tx
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.events import ChannelDeleted, ChannelLeft, ChannelSettings, EventType
from tidings.wire.ids import ms_of, time_of
from tidings.wire.requests import ChannelCreate, ChannelUpdate, MembershipUpdate
from tidings.wire.resources import Channel, Membership, Message

from .access import ATTEMPTS_MAX, Access, AccessService, Actor, ChannelView, Member
from .apps import AppContext, Apps, CompiledType
from .audit import Action, line_of
from .change import Change, Changes, record
from .counting import HIDDEN, MENTIONED, UNREAD
from .membership import (
    Place,
    check_rank,
    check_role_exists,
    check_users,
    insert_members,
    members_of,
    render_member,
)
from .messages import check_custom, last_message
from .paging import make_cursor, read_cursor
from .streams import SidTaken, insert_new, new_stream, record_each, record_own, shred, user_streams, with_keys
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
# Members shown with a channel in a list: what a row of a channel list has room for.
MEMBERS_SHOWN_MAX: Final = 10
# Members or types named in one query: each member is an index probe per channel.
MEMBERS_ASKED_MAX: Final = 50
# Members told in one unit that their channel is deleted: at about 50 µs each, others wait 10 ms.
RELEASE_BATCH: Final = 200
# A marker in `meta` for every deletion that takes several units.
DELETING: Final = "deleting:channel:"

Sort: TypeAlias = Literal["last_message", "created", "updated"]
SORTS: Final[dict[str, str]] = {
    "last_message": "coalesce(s.last_message_at, c.created_at)",
    "created": "c.created_at",
    "updated": "c.updated_at",
}


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


class _Deletion(msgspec.Struct, frozen=True):
    """A deletion under way, as its marker remembers it. `mark` names its events."""

    mark: str
    at: int
    by: str | None


def _job_name(app: int, channel_id: str) -> str:
    return f"{DELETING}{app}:{channel_id}"


def _time_or_none(ms: int | None) -> datetime | None:
    return None if ms is None else time_of(ms)


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is msgspec.UNSET else value


def _no_type() -> Refusal:
    return Refusal("invalid_field", "There is no such channel type.", field="type")


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
            raise _no_type()
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
            if not compiled.definition.built_in:
                await self._check_type(tx, app, body.type)
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
            _, notices = await insert_members(tx, self._keyring, app, place, entrants, at=now, by=actor.user, mark=mark)
            return Change((await self._render(tx, actor, channel_id), True), (created, *notices))

        async def attempt() -> tuple[Channel, bool]:
            nonlocal stream
            for _ in range(ATTEMPTS_MAX):
                try:
                    return await self._changes.run(unit)
                except (_Raced, SidTaken):
                    # Also when another stream drew this number in the same millisecond.
                    stream = new_stream(self._keyring, app, self._ids, now)
            raise StoreUnavailable("others make the same channel")

        return await with_keys(self._apps, app, attempt)

    @staticmethod
    async def _check_type(tx: Tx, app: AppContext, name: str) -> None:
        """The type may have been deleted since the app was read, or be about to be: then one of the two waits."""
        if (
            await tx.one("SELECT 1 FROM channel_types WHERE app=? AND name=?" + tx.for_key_share, app.app, name)
        ) is None:
            raise _no_type()

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
        row = await tx.one(SELECT_ONE, actor.user, actor.app.app, channel_id)
        if row is None:
            return []
        channel, side = split(row)
        if side is None or not side.hidden or actor.user is None:
            return []
        await tx.execute(
            "UPDATE members SET hidden=0, moved_at=? WHERE app=? AND sid=? AND members.user=?",
            now,
            actor.app.app,
            channel.sid,
            actor.user,
        )
        settings = ChannelSettings(
            channel=channel_id, archived=bool(side.archived), muted_until=_time_or_none(side.muted_until)
        )
        return await self._record_settings(tx, actor, settings, now, mark)

    # ------------------------------------------------------------ reading

    async def get(self, actor: Actor, channel_id: str) -> Channel:
        """A channel with the caller's own side. Who may list every channel may also look at one."""
        need = P.CHANNEL_LIST_ANY if actor.may(P.CHANNEL_LIST_ANY) else P.CHANNEL_READ
        await self._access.channel(actor, channel_id, need)

        async def unit(tx: Tx) -> Channel:
            return await self._render(tx, actor, channel_id)

        return await with_keys(self._apps, actor.app, lambda: self._store.read(unit))

    async def query(
        self,
        actor: Actor,
        *,
        types: list[str] | None = None,
        members: list[str] | None = None,
        labels: dict[str, str] | None = None,
        ids: list[str] | None = None,
        archived: bool | None = None,
        hidden: bool | None = None,
        unread_only: bool = False,
        joined: bool | None = None,
        sort: Sort = "last_message",
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
        include_last_message: bool = False,
        include_members: bool = False,
    ) -> tuple[list[Channel], str | None]:
        """A page of channels, the latest first, and the cursor of the next one.

        Which: users see the channels they are members of, backends and holders of `channel.list_any` all of the app.
        `joined` True: only one's own; False: only those one is no member of, which are for ordinary users the public
        ones and those readable through a relation. Narrowed by: `types` (any of them), `ids` (any), `members` (all of
        them are members), `labels` (all), `unread_only`. Hidden and archived ones are left out unless asked for: True
        gives only those; with `ids` they are not left out.

        A page may hold fewer than `limit` channels, and the last message and members are left away where the actor
        may not read them. Raises Refusal `cursor_invalid`, `invalid_field`.
        """
        app = actor.app
        for name, given in (("ids", ids), ("members", members), ("types", types)):
            most = limits.PAGE_MAX if name == "ids" else MEMBERS_ASKED_MAX
            if given is not None and len(given) > most:
                raise Refusal("invalid_field", f"At most {most} at once.", field=name, bound=most)
        everything = actor.may(P.CHANNEL_LIST_ANY) or (actor.user is None and actor.may(P.CHANNEL_READ))
        if actor.user is None and not everything:
            # A key with narrow scopes: there is nothing that it is a member of.
            actor.check(P.CHANNEL_LIST_ANY)
        mine = actor.user is not None and (joined is True or (joined is None and not everything))
        if mine:
            source = " FROM members m JOIN streams s ON s.sid=m.sid JOIN channels c ON c.sid=m.sid"
            where, args = ["m.app=? AND m.user=?"], [app.app, actor.user]
        else:
            # The sign keeps SQLite from walking through the app's channels where their numbers are known.
            by_app = "c.app=?" if everything else "+c.app=?"
            source, where, args = _FROM, [by_app], [actor.user, app.app]
            if joined is False:
                where.append("m.user IS NULL")
            if not everything:
                self._narrow_to_open(actor, where, args)
        where.append("c.deleted_at IS NULL")
        if types is not None:
            where.append(f"c.type IN ({log.placeholders(types)})" if types else "1=0")
            args += types
        if ids is not None:
            where.append(f"c.id IN ({log.placeholders(ids)})" if ids else "1=0")
            args += ids
        for user in members or []:
            where.append("EXISTS (SELECT 1 FROM members x WHERE x.app=c.app AND x.sid=c.sid AND x.user=?)")
            args.append(user)
        for name, value in (labels or {}).items():
            where.append(
                "EXISTS (SELECT 1 FROM labels l WHERE l.app=c.app AND l.noun='channel' AND l.name=? AND l.value=?"
                " AND l.id=c.id)"
            )
            args += [name, value]
        for asked, state in ((archived, "m.archived<>0"), (hidden, HIDDEN)):
            if asked is True:
                where.append(f"m.user IS NOT NULL AND {state}")
            elif asked is False or ids is None:
                where.append(f"(m.user IS NULL OR NOT {state})")
        if unread_only:
            where.append(f"m.user IS NOT NULL AND {UNREAD}>0")
        listing = ["channels", types, members, labels, ids, archived, hidden, unread_only, joined, sort, actor.user]
        order = SORTS[sort]
        if cursor is not None:
            key, last_id = read_cursor(app, listing, cursor, tuple[int, str])
            where.append(f"({order}<? OR ({order}=? AND c.id<?))")
            args += [key, key, last_id]
        limit = max(1, min(limit, limits.PAGE_MAX))
        # Which ones first, what is in them after: counts are computed for the page alone.
        select = f"SELECT c.id, {order}{source} WHERE {' AND '.join(where)} ORDER BY {order} DESC, c.id DESC LIMIT ?"

        async def unit(tx: Tx) -> tuple[list[Channel], str | None]:
            keys = await tx.all(select, *args, limit + 1)
            found = []
            for channel_id, _ in keys[:limit]:
                row = await tx.one(SELECT_ONE, actor.user, app.app, channel_id)
                if row is None:
                    continue
                channel, side = split(row)
                access = await self._look(tx, actor, channel, side)
                if not everything and not access.may(P.CHANNEL_READ):
                    continue
                shown = render_channel(channel, access.channel.cipher, side)
                if include_last_message and access.may(P.CHANNEL_READ):
                    encoded = await last_message(tx, access)
                    if encoded is not None:
                        shown = msgspec.structs.replace(shown, last_message=msgspec.json.decode(encoded, type=Message))
                if include_members and access.may(P.MEMBER_READ):
                    receipts = access.channel.type.definition.features.receipts
                    rows = await members_of(tx, app.app, channel.sid, limit=MEMBERS_SHOWN_MAX)
                    shown = msgspec.structs.replace(
                        shown, members=[render_member(member, receipts=receipts) for member in rows]
                    )
                found.append(shown)
            more = None
            if len(keys) > limit:
                last_id, key = keys[limit - 1]
                more = make_cursor(app, listing, [key, last_id])
            return found, more

        return await with_keys(self._apps, app, lambda: self._store.read(unit))

    @staticmethod
    def _narrow_to_open(actor: Actor, where: list[str], args: list[Any]) -> None:
        """Leave only what somebody may read without being a member: one set by two indexes, so that a list costs what
        is in it, not what is in the app."""
        app = actor.app
        public = [name for name, compiled in app.types.items() if has(compiled.everyone, P.CHANNEL_READ)]
        kinds = [kind for kind, grants in app.relation_roles.items() if has(grants, P.CHANNEL_READ)]
        where.append(
            "c.sid IN (SELECT o.sid FROM channels o WHERE o.app=?"
            f" AND o.type IN ({log.placeholders(public) or 'NULL'})"
            # CROSS JOIN: SQLite keeps the order, from the few relations to their members.
            " UNION SELECT p.sid FROM relations r CROSS JOIN members p"
            " WHERE p.app=r.app AND p.user=r.other AND r.app=? AND r.user=?"
            f" AND r.kind IN ({log.placeholders(kinds) or 'NULL'}))"
        )
        args += [app.app, *public, app.app, actor.user, *kinds]

    async def _look(self, tx: Tx, actor: Actor, row: ChannelRow, side: SideRow | None) -> Access:
        """A channel of a list through the actor: the same sum of grants as `AccessService` computes for one."""
        app = actor.app
        compiled = app.types.get(row.type) or app.types["group"]
        grants = int(compiled.everyone)
        if side is not None:
            grants |= compiled.grants.get(side.role, NONE)
        if actor.user is not None and not (has(Grants(grants), P.CHANNEL_READ) and has(Grants(grants), P.MEMBER_READ)):
            for (kind,) in await tx.all(
                "SELECT DISTINCT r.kind FROM relations r JOIN members p ON p.app=r.app AND p.sid=? AND p.user=r.other"
                " WHERE r.app=? AND r.user=?",
                row.sid,
                app.app,
                actor.user,
            ):
                grants |= app.relation_roles.get(kind, NONE)
        view = ChannelView(
            app=app.app,
            id=row.id,
            sid=row.sid,
            epoch=row.epoch,
            type=compiled,
            frozen=bool(row.frozen),
            access_version=row.access_version,
            cipher=self._cipher(app, row),
            floor=row.floor,
            member_count=row.member_count,
        )
        member = (
            Member(Grants(grants), False, None, 0)
            if side is None
            else Member(Grants(grants), True, side.role, side.joined_seq)
        )
        return Access(actor, view, member, Grants(actor.grants | grants))

    # ------------------------------------------------------------ changing

    async def update(self, actor: Actor, channel_id: str, body: ChannelUpdate) -> Channel:
        """Change the named fields; the members hear the whole channel as it is then. Freezing needs `channel.freeze`,
        everything else `channel.update`."""
        if body.custom is not msgspec.UNSET:
            check_custom(body.custom, "custom")
        described = any(
            value is not msgspec.UNSET
            for value in (body.name, body.description, body.avatar_url, body.custom, body.labels)
        )
        need = P.CHANNEL_FREEZE if body.frozen is not msgspec.UNSET and not described else P.CHANNEL_UPDATE
        now = self._clock.now_ms()
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[Channel]:
            channel = access.channel
            old, side = await self._row(tx, actor, channel_id)
            sealed = open_sealed(old, channel.cipher)
            new_sealed = Sealed(
                _or(body.name, sealed.name),
                _or(body.description, sealed.description),
                _or(body.avatar_url, sealed.avatar_url),
                _or(body.custom, sealed.custom),
            )
            old_labels = msgspec.json.decode(old.labels, type=dict[str, str])
            labels = _or(body.labels, old_labels)
            frozen = int(_or(body.frozen, bool(old.frozen)))
            if (new_sealed, labels, frozen) == (sealed, old_labels, old.frozen):
                return Change(render_channel(old, channel.cipher, side))
            if frozen != old.frozen:
                access.check(P.CHANNEL_FREEZE)
            # The stream's row is locked: the event's own number is the next one.
            new = replace(
                old,
                sealed=channel.cipher.seal(encode(new_sealed), _ITEM),
                labels=encode(labels).decode(),
                frozen=frozen,
                updated_at=now,
                head=old.head + 1,
            )
            await tx.execute(
                "UPDATE channels SET sealed=?, labels=?, frozen=?, updated_at=? WHERE app=? AND id=?",
                new.sealed,
                new.labels,
                frozen,
                now,
                channel.app,
                channel_id,
            )
            if labels != old_labels:
                await write_labels(tx, channel.app, "channel", channel_id, labels)
            notices: list[Notice] = [
                await record(
                    tx,
                    app=channel.app,
                    sid=channel.sid,
                    stream=channel_id,
                    cipher=channel.cipher,
                    type=EventType.CHANNEL_UPDATED.value,
                    at=now,
                    by=actor.user,
                    ref=channel_id,
                    item=mark,
                    data=render_channel(new, channel.cipher, None),
                )
            ]
            if frozen != old.frozen:
                await log.touch_access(tx, channel.sid)
                notices.append(AccessChanged(channel.app, sid=channel.sid, channel=channel_id))
            return Change(render_channel(new, channel.cipher, side), tuple(notices))

        return await with_keys(self._apps, actor.app, lambda: self._access.write(actor, channel_id, need, unit))

    async def set_membership(self, actor: Actor, channel_id: str, body: MembershipUpdate) -> Channel:
        """Hide, archive or mute a channel for oneself; one's other devices hear of it. A hidden channel shows itself
        again with its next message. Raises Refusal `conflict` for those who are not members."""
        now = self._clock.now_ms()
        mark = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[Channel]:
            channel = access.channel
            row, side = await self._row(tx, actor, channel_id)
            if side is None:
                raise Refusal("conflict", "Only members have a side of their own to set here.")
            hidden = bool(_or(body.hidden, bool(side.hidden)))
            archived = bool(_or(body.archived, bool(side.archived)))
            muted = side.muted_until
            if body.muted_until is not msgspec.UNSET:
                muted = None if body.muted_until is None else ms_of(body.muted_until)
            if (hidden, archived, muted) == (bool(side.hidden), bool(side.archived), side.muted_until):
                return Change(render_channel(row, channel.cipher, side))
            await tx.execute(
                "UPDATE members SET hidden=?, archived=?, muted_until=?, moved_at=?"
                " WHERE app=? AND sid=? AND members.user=?",
                row.messages + 1 if hidden else 0,
                int(archived),
                muted,
                now,
                channel.app,
                channel.sid,
                actor.user,
            )
            settings = ChannelSettings(
                channel=channel_id, hidden=hidden, archived=archived, muted_until=_time_or_none(muted)
            )
            notices = await self._record_settings(tx, actor, settings, now, mark)
            side = replace(side, hidden=int(hidden), archived=int(archived), muted_until=muted)
            return Change(render_channel(row, channel.cipher, side), tuple(notices))

        return await with_keys(
            self._apps, actor.app, lambda: self._access.write(actor, channel_id, P.CHANNEL_READ, unit)
        )

    async def _record_settings(
        self, tx: Tx, actor: Actor, settings: ChannelSettings, now: int, mark: str
    ) -> list[Notice]:
        return [
            await record_own(
                tx,
                actor.app,
                own,
                type=EventType.CHANNEL_SETTINGS,
                at=now,
                by=actor.user,
                ref=settings.channel,
                mark=mark,
                data=settings,
            )
            for own in await user_streams(tx, self._keyring, actor.app, [actor.user] if actor.user else [])
        ]

    # ------------------------------------------------------------ ending

    async def delete(self, actor: Actor, channel_id: str) -> None:
        """Delete a channel for ever: it is gone for everyone at once, and with its key everything in it is unreadable.

        Members are told on their own streams, in units of `RELEASE_BATCH`, the first of them together with the
        deletion; all are when this returns, and `resume_deletions` finishes what a crash cuts short. The id is not
        used again; the pair of a direct channel may start a new one.
        """
        app = actor.app
        now = self._clock.now_ms()
        job = _Deletion(mark=self._ids.new_id("e_"), at=now, by=actor.user)

        async def unit(tx: Tx, access: Access) -> Change[tuple[int, bool]]:
            channel = access.channel
            deleted = await record(
                tx,
                app=app.app,
                sid=channel.sid,
                stream=channel_id,
                cipher=channel.cipher,
                type=EventType.CHANNEL_DELETED.value,
                at=now,
                by=actor.user,
                ref=channel_id,
                item=job.mark,
                data=ChannelDeleted(id=channel_id),
            )
            await tx.execute(
                "UPDATE channels SET deleted_at=?, updated_at=?, pair=NULL, sealed=NULL, labels='{}', member_count=0"
                " WHERE app=? AND id=?",
                now,
                now,
                app.app,
                channel_id,
            )
            await write_labels(tx, app.app, "channel", channel_id, {})
            await shred(tx, channel.sid)
            await log.touch_access(tx, channel.sid)
            await line_of(actor, Action.CHANNEL_DELETED, f"channel:{channel_id}", job.mark, now).write(tx)
            told, more = await self._release_some(tx, app, channel.sid, channel_id, job, now)
            if more:
                await tx.execute(
                    "INSERT INTO meta(name,value) VALUES (?,?)", _job_name(app.app, channel_id), encode(job).decode()
                )
            return Change(
                (channel.sid, more),
                (
                    deleted,
                    Left(app.app, None, channel.sid, channel_id),
                    AccessChanged(app.app, sid=channel.sid, channel=channel_id),
                    *told,
                ),
            )

        sid, more = await with_keys(
            self._apps, app, lambda: self._access.write(actor, channel_id, P.CHANNEL_DELETE, unit)
        )
        self._keyring.forget_stream(app.id, str(sid))
        if more:
            await self._finish_deletion(app, sid, channel_id, job)

    async def resume_deletions(self) -> int:
        """Finish deletions that a crash has cut short, at start; how many there were."""

        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(
                "SELECT name, value FROM meta WHERE name>=? AND name<? ORDER BY name", DELETING, DELETING + "\x7f"
            )

        found = await self._store.read(unit)
        for name, value in found:
            number, _, channel_id = name.removeprefix(DELETING).partition(":")
            app = await self._apps.numbered(int(number))

            async def look(tx: Tx, app: AppContext = app, channel_id: str = channel_id) -> log.StreamRow | None:
                return await log.stream_of(tx, app.app, "channel", channel_id)

            stream = await self._store.read(look)
            if stream is not None:
                await self._finish_deletion(app, stream.sid, channel_id, msgspec.json.decode(value, type=_Deletion))
        return len(found)

    async def _finish_deletion(self, app: AppContext, sid: int, channel_id: str, job: _Deletion) -> None:
        async def release(tx: Tx) -> Change[bool]:
            told, more = await self._release_some(tx, app, sid, channel_id, job, self._clock.now_ms())
            if not more:
                await tx.execute("DELETE FROM meta WHERE name=?", _job_name(app.app, channel_id))
            return Change(more, tuple(told))

        while await with_keys(self._apps, app, lambda: self._changes.run(release)):
            pass

    async def _release_some(
        self, tx: Tx, app: AppContext, sid: int, channel_id: str, job: _Deletion, now: int
    ) -> tuple[list[Published], bool]:
        """End up to `RELEASE_BATCH` memberships of a deleted channel: what those users are told, and whether there may
        be more of them."""
        rows = await tx.all(
            "SELECT m.user FROM members m WHERE m.app=? AND m.sid=? ORDER BY m.user LIMIT ?",
            app.app,
            sid,
            RELEASE_BATCH,
        )
        users = [user for (user,) in rows]
        await tx.many(
            "DELETE FROM members WHERE app=? AND sid=? AND members.user=?", [(app.app, sid, user) for user in users]
        )
        told = await record_each(
            tx,
            app,
            await user_streams(tx, self._keyring, app, users),
            type=EventType.CHANNEL_LEFT,
            at=job.at,
            by=job.by,
            ref=channel_id,
            mark=job.mark,
            data=lambda _: ChannelLeft(channel=channel_id, reason="deleted"),
            now=now,
        )
        return told, len(users) == RELEASE_BATCH

    # ------------------------------------------------------------ parts

    async def _row(self, tx: Tx, actor: Actor, channel_id: str) -> tuple[ChannelRow, SideRow | None]:
        row = await tx.one(SELECT_ONE, actor.user, actor.app.app, channel_id)
        if row is None:
            raise NotFound("channel", field="channel")
        return split(row)

    async def _render(self, tx: Tx, actor: Actor, channel_id: str) -> Channel:
        channel, side = await self._row(tx, actor, channel_id)
        return render_channel(channel, self._cipher(actor.app, channel), side)

    def _cipher(self, app: AppContext, row: ChannelRow) -> StreamCipher:
        key = WrappedStreamKey(version=row.key_version, app_key_version=row.key_app_version, wrapped=row.key_wrapped)
        return self._keyring.cipher(app.id, str(row.sid), key)
