"""Loading things on behalf of someone: the one place that decides what is visible to whom.

`channel` is the door to everything in a channel. What it found is remembered together with the stream's access
version; every append carries that version and is refused as stale by the store if it has moved, so a decision that
was overtaken by a removal never stores anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import msgspec

from tidings.server.bus.base import AccessChanged, Left, Lost, MembersMoved, Notice
from tidings.server.crypto.base import AppKeyNotLoaded
from tidings.server.crypto.keyring import Keyring, StreamCipher, WrappedStreamKey
from tidings.server.domain.permissions import EVERYTHING, NONE, Grants, Permission, bit
from tidings.server.errors import Forbidden, NotFound, StoreUnavailable
from tidings.server.store.base import Stale, Store, Tx

from .apps import AppContext, Apps, CompiledType
from .change import Change, Changes

T = TypeVar("T")

# Decisions overtaken in a row before giving up: each needs another change of membership within microseconds.
ATTEMPTS_MAX: Final = 8

# Channels remembered: about 1 KB each with a few users.
CHANNELS_MAX: Final = 50_000
# People remembered per channel: a send by someone else costs one read.
USERS_MAX: Final = 10_000

# Users forgotten one by one before everything is forgotten at once: about 10 MB.
USERS_FORGOTTEN_MAX: Final = 100_000

_READ: Final = bit(Permission.CHANNEL_READ)


@dataclass(slots=True, frozen=True)
class Actor:
    """Who asks: a user, an app's backend, or a backend in a user's name. `grants` hold everywhere in the app.

    `via` names the credential for the audit trail: `user:<id>` or `key:<id>`. `role`: the app role that `grants` come
    from, None where they are a key's scopes.
    """

    app: AppContext
    user: str | None
    grants: Grants
    via: str
    device: str | None = None
    session: str | None = None
    role: str | None = None

    def check(self, need: Permission) -> None:
        """Refuse unless the app-level grants hold `need`. Raises Forbidden."""
        if not self.grants & bit(need):
            raise Forbidden(need.value)

    def may(self, need: Permission) -> bool:
        """Whether the app-level grants hold `need`."""
        return bool(self.grants & bit(need))


@dataclass(slots=True)
class ChannelView:
    """A channel as remembered, for everyone."""

    app: int
    id: str
    sid: int
    epoch: str
    type: CompiledType
    frozen: bool
    access_version: int
    cipher: StreamCipher
    floor: int
    # As exact as the rest: whoever joins or leaves makes another view of it.
    member_count: int = 0
    users: dict[str, Member] = field(default_factory=dict)
    # Those of them who stand in a relation to somebody: what they may do here can depend on who else is a member.
    relating: set[str] = field(default_factory=set)


@dataclass(slots=True, frozen=True)
class Member:
    """What someone may do in a channel by membership, openness and relation, and whether they are a member."""

    grants: Grants
    is_member: bool
    role: str | None
    joined_seq: int
    # The count of forgetting that it was read under.
    known_at: int = 0


class Access(msgspec.Struct, frozen=True):
    """A channel through someone's eyes. `grants` are all they may do there."""

    actor: Actor
    channel: ChannelView
    member: Member
    grants: Grants

    def check(self, need: Permission) -> None:
        """Refuse unless `need` is granted: visibly if they may read the channel, else as if it were not there."""
        if not self.grants & bit(need):
            if self.grants & _READ:
                raise Forbidden(need.value)
            raise NotFound("channel", field="channel")

    def may(self, need: Permission) -> bool:
        """Whether `need` is granted here."""
        return bool(self.grants & bit(need))

    @property
    def floor(self) -> int:
        """Nothing at or before this seq is theirs to see."""
        if self.member.is_member and self.channel.type.definition.history == "since_join":
            return max(self.channel.floor, self.member.joined_seq)
        return self.channel.floor


_BACKEND: Final = Member(NONE, False, None, 0)


class AccessService:
    """Answers who may see and do what, from memory where it can."""

    def __init__(self, store: Store, apps: Apps, keyring: Keyring, changes: Changes) -> None:
        self._store = store
        self._changes = changes
        self._apps = apps
        self._keyring = keyring
        self._channels: OrderedDict[tuple[int, str], ChannelView] = OrderedDict()
        # Grows with everything forgotten: what was read before that must not be remembered after it.
        self._forgotten = 0
        # User -> the count at which they were forgotten: what was remembered of them before that does not count. One
        # number each instead of a walk through all channels. Users of the same id in two apps share it: the other one
        # is only read once more.
        self._users_forgotten: dict[str, int] = {}

    # ------------------------------------------------------------ the doors

    def cached(self, actor: Actor, channel_id: str) -> Access | None:
        """The channel through the actor if both are in memory: the hot path's door, which never waits."""
        view = self._channels.get((actor.app.app, channel_id))
        if view is None:
            return None
        app = self._apps.cached(actor.app.id)
        if app is not actor.app:
            if app is None:
                return None
            actor = _as_of(actor, app)
        if actor.user is None:
            return Access(actor, view, _BACKEND, actor.grants)
        member = view.users.get(actor.user)
        if member is None or member.known_at < self._users_forgotten.get(actor.user, 0):
            return None
        return Access(actor, view, member, Grants(actor.grants | member.grants))

    async def channel(self, actor: Actor, channel_id: str, need: Permission) -> Access:
        """Load a channel on behalf of someone who needs `need`.

        Raises NotFound when there is no such channel or they may not know of it, Forbidden when they may read it
        but not do this.
        """
        access = self.cached(actor, channel_id)
        if access is None:
            access = await self._load(actor, channel_id)
        access.check(need)
        return access

    async def write(
        self,
        actor: Actor,
        channel_id: str,
        need: Permission,
        unit: Callable[[Tx, Access], Awaitable[Change[T]]],
    ) -> T:
        """Run a unit that changes something in a channel, under the access that was checked for it.

        The stream's row is locked first and its access version compared, so that a removal or a change of roles that
        commits in between is seen: then access is decided again. Raises what `channel` and the unit raise.
        """
        for _ in range(ATTEMPTS_MAX):
            access = await self.channel(actor, channel_id, need)

            async def guarded(tx: Tx, access: Access = access) -> Change[T]:
                row = await tx.one(
                    "SELECT access_version FROM streams WHERE sid=?" + tx.for_update,
                    access.channel.sid,
                )
                if row is None or row[0] != access.channel.access_version:
                    raise Stale
                return await unit(tx, access)

            try:
                return await self._changes.run(guarded)
            except Stale:
                self.forget_overtaken(actor.app.app, channel_id, access.channel.access_version)
        raise StoreUnavailable("the channel's members change too fast")

    async def read(
        self,
        actor: Actor,
        channel_id: str,
        need: Permission,
        unit: Callable[[Tx, Access, str, int], Awaitable[T]],
    ) -> T:
        """Run a unit that only reads what is in a channel; it gets the stream's epoch and head, too.

        It reads a snapshot in which the access that was checked for it still holds: what is remembered here may be out
        of date, where another node has removed somebody and could not say so. Raises what `channel` and the unit raise.
        """
        for _ in range(ATTEMPTS_MAX):
            access = await self.channel(actor, channel_id, need)

            async def guarded(tx: Tx, access: Access = access) -> T:
                row = await tx.one("SELECT access_version, epoch, head FROM streams WHERE sid=?", access.channel.sid)
                if row is None or row[0] != access.channel.access_version:
                    raise Stale
                return await unit(tx, access, row[1], row[2])

            try:
                return await self._store.read(guarded)
            except Stale:
                self.forget_overtaken(actor.app.app, channel_id, access.channel.access_version)
        raise StoreUnavailable("the channel's members change too fast")

    # ------------------------------------------------------------ forgetting

    def heard(self, notice: Notice) -> None:
        """Take a notice from the bus: what it says does not hold any more is not remembered from here on."""
        if isinstance(notice, AccessChanged):
            if notice.channel is not None:
                self.members_moved(notice.app, notice.channel, notice.moved)
            elif notice.user is not None:
                self.forget_user(notice.app, notice.user)
            else:
                self.forget_app(notice.app)
        elif isinstance(notice, Left):
            self.forget_member(notice.app, notice.channel, notice.user)
        elif isinstance(notice, Lost):
            self.forget_all()

    def forget_channel(self, app: int, channel_id: str) -> None:
        """Who may do what in the channel has changed."""
        self._forgotten += 1
        self._channels.pop((app, channel_id), None)

    def forget_overtaken(self, app: int, channel_id: str, version: int) -> None:
        """What was decided under this access version came too late: unless a newer one is known, read it again."""
        view = self._channels.get((app, channel_id))
        if view is None or view.access_version <= version:
            self.forget_channel(app, channel_id)

    def members_moved(self, app: int, channel_id: str, moved: MembersMoved | None) -> None:
        """Who may do what in the channel has changed; `moved`: because members came or went, and for nobody but them
        and those whose rights hang on who is a member.

        What is known of the others is then taken over under the new version, so that a channel of many members does not
        read all of them again for one who comes. Decisions under way keep the old version, and are decided anew.
        """
        view = self._channels.get((app, channel_id))
        if view is None or moved is None or view.access_version < moved.version - 1:
            # Something in between was not heard of.
            self.forget_channel(app, channel_id)
            return
        if view.access_version >= moved.version:
            return
        self._forgotten += 1
        for user in (*moved.users, *view.relating):
            view.users.pop(user, None)
        view.relating.clear()
        self._channels[app, channel_id] = replace(view, access_version=moved.version, member_count=moved.member_count)

    def forget_member(self, app: int, channel_id: str, user: str | None) -> None:
        """The user is no member any more; None: nobody is."""
        view = self._channels.get((app, channel_id))
        if user is None or view is None:
            self.forget_channel(app, channel_id)
            return
        self._forgotten += 1
        view.users.pop(user, None)

    def forget_user(self, app: int, user: str) -> None:
        """The user's relations or role have changed."""
        self._forgotten += 1
        self._users_forgotten[user] = self._forgotten
        if len(self._users_forgotten) > USERS_FORGOTTEN_MAX:
            self.forget_all()

    def forget_app(self, app: int) -> None:
        """Roles, types or relations of the app have changed."""
        self._forgotten += 1
        for key in [key for key in self._channels if key[0] == app]:
            del self._channels[key]

    def forget_all(self) -> None:
        """Another process has written: nothing remembered is certain."""
        self._forgotten += 1
        self._channels.clear()
        self._users_forgotten.clear()

    # ------------------------------------------------------------ loading

    async def _load(self, actor: Actor, channel_id: str) -> Access:
        # The app as it is now, read after the count: the actor may have come before a role or type was changed (a
        # request's body takes its time), and what is remembered below is for everybody.
        forgotten = self._forgotten
        app = await self._apps.get(actor.app.id)
        actor = _as_of(actor, app)

        async def unit(tx: Tx) -> tuple[tuple[object, ...], tuple[object, ...] | None, list[tuple[object, ...]]] | None:
            row = await tx.one(
                "SELECT c.sid, s.epoch, c.type, c.frozen, s.access_version, s.key_wrapped, s.key_version,"
                " s.key_app_version, s.floor, c.member_count FROM channels c JOIN streams s ON s.sid=c.sid"
                " WHERE c.app=? AND c.id=? AND c.deleted_at IS NULL",
                app.app,
                channel_id,
            )
            if row is None:
                return None
            if actor.user is None:
                return row, None, []
            member = await tx.one(
                "SELECT role, joined_seq FROM members WHERE app=? AND sid=? AND user=?", app.app, row[0], actor.user
            )
            related = await tx.all(
                "SELECT r.kind, count(m.user) FROM relations r LEFT JOIN members m ON m.app=r.app AND m.sid=?"
                " AND m.user=r.other WHERE r.app=? AND r.user=? GROUP BY r.kind",
                row[0],
                app.app,
                actor.user,
            )
            return row, member, related

        found = await self._store.read(unit)
        if found is None:
            raise NotFound("channel", field="channel")
        row, member_row, related = found
        sid, epoch, type_name, frozen, version, wrapped, key_version, key_app_version, floor, count = row
        compiled = app.types.get(str(type_name)) or app.types["group"]
        key = (app.app, channel_id)
        view = self._channels.get(key)
        if view is None or view.access_version != version or view.sid != sid:
            stream_key = WrappedStreamKey(
                version=int(str(key_version)),
                app_key_version=int(str(key_app_version)),
                wrapped=bytes(wrapped),  # type: ignore[call-overload]
            )
            view = ChannelView(
                app=app.app,
                id=channel_id,
                sid=int(str(sid)),
                epoch=str(epoch),
                type=compiled,
                frozen=bool(frozen),
                access_version=int(str(version)),
                cipher=await self.cipher(app, int(str(sid)), stream_key),
                floor=int(str(floor)),
                member_count=int(str(count)),
            )
            if forgotten == self._forgotten:
                self._channels[key] = view
                if len(self._channels) > CHANNELS_MAX:
                    self._channels.popitem(last=False)
        else:
            self._channels.move_to_end(key)
        if actor.user is None:
            return Access(actor, view, _BACKEND, actor.grants)
        grants = int(compiled.everyone)
        for kind, members in related:
            if members:
                grants |= app.relation_roles.get(str(kind), NONE)
        if member_row is not None:
            role = str(member_row[0])
            grants |= compiled.grants.get(role, NONE)
            member = Member(Grants(grants), True, role, int(str(member_row[1])), forgotten)
        else:
            member = Member(Grants(grants), False, None, 0, forgotten)
        if forgotten == self._forgotten:
            if len(view.users) >= USERS_MAX:
                view.users.clear()
                view.relating.clear()
            view.users[actor.user] = member
            if related:
                view.relating.add(actor.user)
        return Access(actor, view, member, Grants(actor.grants | member.grants))

    async def type_of(self, app: int, name: str) -> CompiledType:
        """A channel type of the app numbered `app`, as it is now. Raises NotFound."""
        found = await self._apps.numbered(app)
        return found.types.get(name) or found.types["group"]

    async def cipher(self, app: AppContext, sid: int, key: WrappedStreamKey) -> StreamCipher:
        """The cipher of a stream, reading the keys of its app again if another process has rotated them."""
        try:
            return self._keyring.cipher(app.id, str(sid), key)
        except AppKeyNotLoaded:
            # Another process has rotated the app's key: read its keys again, once.
            self._apps.forget(app.app)
            await self._apps.get(app.id)
            return self._keyring.cipher(app.id, str(sid), key)


def _as_of(actor: Actor, app: AppContext) -> Actor:
    """The actor with what their role grants in the app as it is now."""
    if actor.role is None:
        return actor
    grants = app.app_roles.get(actor.role, NONE)
    return actor if grants == actor.grants else replace(actor, app=app, grants=grants)


def backend_actor(app: AppContext, key_id: str, scopes: Grants = EVERYTHING) -> Actor:
    """The app's own backend, with what its API key's scopes allow."""
    return Actor(app, None, scopes, f"key:{key_id}")
