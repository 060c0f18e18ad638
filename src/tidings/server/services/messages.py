"""Messages: send, edit, delete, react, read back.

Sending is the hot path. It decides from memory, seals, and hands one `Append` to the store's group commit; the
sender is answered and the event announced from the commit's callback. Everything else runs as a unit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from tidings.server.bus.base import Bus, Published
from tidings.server.clock import Clock, Ids
from tidings.server.domain.permissions import Permission, bit
from tidings.server.errors import Forbidden, NotFound, Refusal, StoreUnavailable
from tidings.server.store.base import (
    BACKEND,
    COUNTS,
    EVERYONE,
    MENTIONS_ALL,
    SILENT,
    SYSTEM,
    Append,
    Appended,
    Row,
    Stale,
    Store,
    Tx,
)
from tidings.server.store.log import placeholders
from tidings.wire import limits
from tidings.wire.codec import encode, splice
from tidings.wire.events import EventType, MessageDeleted, ReactionChanged
from tidings.wire.ids import time_of
from tidings.wire.resources import Attachment, MessageVersion, Reaction

from .access import ATTEMPTS_MAX, Access, AccessService, Actor
from .change import Change, record
from .presend import BEFORE_EDIT, BEFORE_SEND, Content, Presend, applies
from .rendering import (
    UPDATED,
    MessageBody,
    decode_body,
    render_created,
    render_event,
    render_tombstone,
    render_withheld,
)

P = Permission
_SEND: Final = bit(P.MESSAGE_SEND)

# With history `since_join` an edit looks whether somebody has joined after the message, member by member. Beyond this
# many it is taken for granted, so that an edit costs the writer at most about 0.1 ms more.
WITHHELD_MEMBERS_MAX: Final = 1_000

_ROW: Final = (
    "m.seq,m.id,m.sender,m.at,m.content_seq,m.flags,m.edits,m.deleted_at,m.deleted_by,coalesce(e.item,m.id),"
    "coalesce(e.sealed,m.sealed),m.redacted,m.reply_to"
)
_FROM: Final = (
    " FROM messages m LEFT JOIN events e"
    " ON m.content_seq<>m.seq AND e.app=m.app AND e.sid=m.sid AND e.seq=m.content_seq"
)


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody wants to say, checked for form at the door."""

    text: str = ""
    mentions: list[str] = []
    mention_all: bool = False
    reply_to: str | None = None
    attachments: list[Attachment] = []
    custom: dict[str, Any] = {}
    silent: bool = False
    kind: Literal["regular", "system"] = "regular"


@dataclass(slots=True, frozen=True)
class Edit:
    """What an edit changes; UNSET fields stay."""

    text: str | msgspec.UnsetType = msgspec.UNSET
    mentions: list[str] | msgspec.UnsetType = msgspec.UNSET
    attachments: list[Attachment] | msgspec.UnsetType = msgspec.UNSET
    custom: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


@dataclass(slots=True, frozen=True)
class Page:
    """Messages as JSON, in ascending order of seq, and where the stream stood in the same snapshot."""

    messages: list[bytes]
    epoch: str
    head: int
    has_before: bool
    has_after: bool


def check_draft(access: Access, draft: Draft) -> None:
    """Refuse what may not be said here. Raises Refusal naming the field."""
    features = access.channel.type.definition.features
    if access.channel.frozen and not access.may(P.MESSAGE_SEND_FROZEN):
        raise Refusal("frozen", "The channel is frozen: only its moderators may send.")
    if not draft.text and not draft.attachments and not draft.custom:
        raise Refusal("invalid_field", "A message needs a text, an attachment or custom data.", field="text", bound=1)
    if draft.kind == "system":
        access.check(P.MESSAGE_SYSTEM)
    if draft.silent:
        access.check(P.MESSAGE_SILENT)
    if draft.mention_all:
        access.check(P.MESSAGE_MENTION_ALL)
    if (draft.mentions or draft.mention_all) and not features.mentions:
        raise Refusal("feature_off", "Mentions are switched off in this type of channel.", field="mentions")
    if draft.reply_to is not None and not features.replies:
        raise Refusal("feature_off", "Replies are switched off in this type of channel.", field="reply_to")
    check_content(access, draft.attachments, draft.custom)


def check_content(
    access: Access,
    attachments: list[Attachment] | msgspec.UnsetType,
    custom: dict[str, Any] | msgspec.UnsetType,
) -> None:
    """Refuse attachments where they are off and custom data beyond its bound. Raises Refusal."""
    if attachments:
        if not access.channel.type.definition.features.attachments:
            raise Refusal("feature_off", "Attachments are switched off in this type of channel.", field="attachments")
        for place, attachment in enumerate(attachments):
            check_custom(attachment.custom, f"attachments[{place}].custom")
    if custom:
        check_custom(custom, "custom")


def check_custom(custom: dict[str, Any], field: str) -> None:
    """Refuse custom data whose JSON is larger than the bound. Raises Refusal."""
    if custom and (size := len(encode(custom))) > limits.CUSTOM_BYTES_MAX:
        raise Refusal(
            "invalid_field",
            f"Custom data is {size} bytes of JSON; at most {limits.CUSTOM_BYTES_MAX} are allowed.",
            field=field,
            bound=limits.CUSTOM_BYTES_MAX,
        )


class Messages:
    """Use-cases of messages."""

    def __init__(
        self,
        store: Store,
        access: AccessService,
        bus: Bus,
        clock: Clock,
        ids: Ids,
        presend: Presend | None = None,
    ) -> None:
        """`presend` asks apps that want to be asked about messages before they are stored."""
        self._presend = presend
        self._store = store
        self._access = access
        self._bus = bus
        self._clock = clock
        self._ids = ids

    # ------------------------------------------------------------ sending

    def send_now(
        self,
        actor: Actor,
        channel_id: str,
        draft: Draft,
        key: str,
        done: Callable[[Appended | Exception], None],
        version: int = 0,
    ) -> int:
        """Send from memory, without waiting: 0 if that cannot be decided here, then `send` must be used; else the
        access version under which it was decided.

        `done` gets `Appended` after the commit and before anybody hears of the message, or the exception (`Stale`
        means: use `send`). With `version`, only under that one. What would be refused is left to `send`, too: it may be
        the retry of a stored message.
        """
        if draft.reply_to is not None:
            return 0
        access = self._access.cached(actor, channel_id)
        if access is None:
            return 0
        decided: int = access.channel.access_version
        if version and decided != version:
            return 0
        if not access.grants & _SEND:
            return 0
        if actor.app.presend is not None and applies(access):
            return 0
        try:
            check_draft(access, draft)
        except Refusal:
            return 0
        self._submit(access, draft, key, done)
        return decided

    async def send(
        self,
        actor: Actor,
        channel_id: str,
        draft: Draft,
        key: str,
        then: Callable[[Appended], None] | None = None,
    ) -> Appended:
        """Store a message and announce it. Once per (sender, channel, key), for ever: a retry gets the first result,
        also when the message might not be sent any more, as long as its sender may see the channel.

        `then` is called after the commit and before anybody hears of the message: its sender is answered first.

        Raises NotFound, Forbidden, Refusal (`frozen`, `invalid_field`, `key_reused` …) or StoreUnavailable: then
        nothing is stored, unless an earlier try with this key was.
        """
        approved: Draft | None = None
        for _ in range(ATTEMPTS_MAX):
            try:
                access = await self._access.channel(actor, channel_id, P.MESSAGE_SEND)
                check_draft(access, draft)
                if draft.reply_to is not None:
                    await self._check_reply(access, draft.reply_to)
                if approved is None and self._presend is not None and applies(access):
                    # What is stored already is not asked about again.
                    first = await self._first_result(actor, channel_id, draft, key)
                    if first is not None:
                        if then is not None:
                            then(first)
                        return first
                    approved = await self._approved(self._presend, access, draft)
                    continue
                if approved is not None:
                    check_draft(access, approved)
            except Refusal:
                first = await self._first_result(actor, channel_id, draft, key)
                if first is None:
                    raise
                if then is not None:
                    then(first)
                return first
            future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()

            def settle(outcome: Appended | Exception, future: asyncio.Future[Appended] = future) -> None:
                if future.done():
                    return
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                    return
                if then is not None:
                    then(outcome)
                future.set_result(outcome)

            self._submit(access, approved or draft, key, settle, said=draft)
            try:
                return await future
            except Stale:
                self._access.forget_overtaken(actor.app.app, channel_id, access.channel.access_version)
        raise StoreUnavailable("the channel's members change too fast")

    async def _first_result(self, actor: Actor, channel_id: str, draft: Draft, key: str) -> Appended | None:
        """What an earlier try with this key and body has stored, for somebody who may still see the channel."""
        try:
            access = await self._access.channel(actor, channel_id, P.CHANNEL_READ)
        except Refusal:
            return None
        channel = access.channel

        async def unit(tx: Tx) -> Row | None:
            return await tx.one(
                "SELECT id, seq, at, digest FROM messages m WHERE m.app=? AND m.sid=? AND m.sender=? AND m.key=?",
                channel.app,
                channel.sid,
                actor.user if actor.user is not None else BACKEND,
                key,
            )

        row = await self._store.read(unit)
        if row is None or row[3] != actor.app.cipher.fingerprint(encode(draft)):
            return None
        return Appended(row[0], row[1], row[2], True)

    async def _approved(self, presend: Presend, access: Access, draft: Draft) -> Draft:
        content = Content(draft.text, draft.mentions, draft.attachments, draft.custom)
        found = await presend.ask(access, content, BEFORE_SEND, mention_all=draft.mention_all, reply_to=draft.reply_to)
        return msgspec.structs.replace(draft, **found.changes(content))

    def _submit(
        self,
        access: Access,
        draft: Draft,
        key: str,
        done: Callable[[Appended | Exception], None],
        said: Draft | None = None,
    ) -> None:
        """`said`: what the sender wrote, by which a retry is known, where something else is to be stored."""
        channel = access.channel
        user = access.actor.user
        now = self._clock.now_ms()
        message_id = self._ids.new_message_id()
        mentions = list(dict.fromkeys(draft.mentions)) if draft.mentions else []
        system = draft.kind == "system"
        flags = 0
        if system:
            flags |= SYSTEM
        if draft.silent:
            flags |= SILENT
        if not flags:
            flags = COUNTS
        if draft.mention_all:
            flags |= MENTIONS_ALL
        body = encode(
            MessageBody(
                id=message_id,
                channel=channel.id,
                user=user,
                key=key,
                kind=draft.kind,
                silent=draft.silent,
                reply_to=draft.reply_to,
                created_at=time_of(now),
                text=draft.text,
                mentions=mentions,
                mention_all=draft.mention_all,
                attachments=draft.attachments,
                custom=draft.custom,
            )
        )
        publish = self._bus.publish
        sid, stream = channel.sid, channel.id

        def committed(outcome: Appended | Exception) -> None:
            done(outcome)
            if type(outcome) is Appended and not outcome.duplicate:
                seq = outcome.seq
                publish(Published(sid, seq, render_created(stream, seq, now, user, body)))

        self._store.append(
            Append(
                channel.app,
                sid,
                channel.access_version,
                user if user is not None else BACKEND,
                key,
                access.actor.app.cipher.fingerprint(encode(said or draft)),
                message_id,
                channel.cipher.seal(body, message_id.encode()),
                now,
                flags,
                draft.reply_to,
                tuple(mentions),
                committed,
            )
        )

    async def _approved_edit(self, actor: Actor, channel_id: str, message_id: str, edit: Edit) -> Edit:
        """The edit as the app lets it through: a text that would be refused must not come in by another door."""
        if self._presend is None or actor.app.presend is None:
            return edit
        access = await self._access.channel(actor, channel_id, P.CHANNEL_READ)
        if not applies(access):
            return edit

        async def unit(tx: Tx) -> None:
            row = await self._row(tx, access, message_id)
            self._check_owner(access, row, P.MESSAGE_EDIT_OWN, P.MESSAGE_EDIT_ANY)

        await self._store.read(unit)
        content = Content(
            "" if edit.text is msgspec.UNSET else edit.text,
            [] if edit.mentions is msgspec.UNSET else list(edit.mentions),
            [] if edit.attachments is msgspec.UNSET else list(edit.attachments),
            {} if edit.custom is msgspec.UNSET else edit.custom,
        )
        found = await self._presend.ask(access, content, BEFORE_EDIT, message=message_id)
        return replace(edit, **found.changes(content))

    async def _check_reply(self, access: Access, message_id: str) -> None:
        channel = access.channel

        async def unit(tx: Tx) -> Row | None:
            return await tx.one(
                "SELECT seq FROM messages WHERE app=? AND sid=? AND id=?", channel.app, channel.sid, message_id
            )

        row = await self._store.read(unit)
        if row is None or row[0] <= access.floor:
            raise NotFound("message", field="reply_to")

    # ------------------------------------------------------------ changing

    async def edit(self, actor: Actor, channel_id: str, message_id: str, edit: Edit) -> tuple[int, bytes]:
        """Change a message's content; earlier versions stay in the log. The event's seq and the message as JSON."""
        edit = await self._approved_edit(actor, channel_id, message_id, edit)
        now = self._clock.now_ms()

        async def unit(tx: Tx, access: Access) -> Change[tuple[int, bytes]]:
            channel = access.channel
            if not channel.type.definition.features.edits:
                raise Refusal("feature_off", "Edits are switched off in this type of channel.")
            row = await self._row(tx, access, message_id)
            self._check_owner(access, row, P.MESSAGE_EDIT_OWN, P.MESSAGE_EDIT_ANY)
            if channel.frozen and not access.may(P.MESSAGE_SEND_FROZEN):
                raise Refusal("frozen", "The channel is frozen: only its moderators may edit.")
            if row.deleted_at is not None:
                raise Refusal("conflict", "The message is deleted.", field="id")
            if row.edits >= limits.EDITS_PER_MESSAGE_MAX:
                raise Refusal(
                    "bound_exceeded",
                    f"A message can be edited {limits.EDITS_PER_MESSAGE_MAX} times.",
                    bound=limits.EDITS_PER_MESSAGE_MAX,
                )
            if edit.mentions and not channel.type.definition.features.mentions:
                raise Refusal("feature_off", "Mentions are switched off in this type of channel.", field="mentions")
            check_content(access, edit.attachments, edit.custom)
            old = decode_body(channel.cipher.open(row.sealed, row.item.encode()))
            mentions = old.mentions if edit.mentions is msgspec.UNSET else list(dict.fromkeys(edit.mentions))
            new = msgspec.structs.replace(
                old,
                text=old.text if edit.text is msgspec.UNSET else edit.text,
                mentions=mentions,
                attachments=old.attachments if edit.attachments is msgspec.UNSET else edit.attachments,
                custom=old.custom if edit.custom is msgspec.UNSET else edit.custom,
                edited_at=time_of(now),
                edited_by=actor.user,
                edits=row.edits + 1,
            )
            if not new.text and not new.attachments and not new.custom:
                raise Refusal(
                    "invalid_field", "A message needs a text, an attachment or custom data.", field="text", bound=1
                )
            data = splice(b'{"seq":%d}' % row.seq, encode(new))
            published = await record(
                tx,
                app=channel.app,
                sid=channel.sid,
                stream=channel.id,
                cipher=channel.cipher,
                type=UPDATED,
                at=now,
                by=actor.user,
                ref=message_id,
                item=f"{message_id}/{row.edits + 2}",
                data=data,
            )
            if await _is_before_some(tx, access, row.seq):
                withheld = render_event(UPDATED, channel.id, published.seq, now, actor.user, render_withheld(data))
                published = Published(channel.sid, published.seq, withheld)
            await tx.execute(
                "UPDATE messages SET content_seq=?, edits=edits+1, edited_at=?, edited_by=?"
                " WHERE app=? AND sid=? AND seq=?",
                published.seq,
                now,
                actor.user,
                channel.app,
                channel.sid,
                row.seq,
            )
            if mentions != old.mentions:
                await tx.execute(
                    "DELETE FROM mentions WHERE app=? AND sid=? AND seq=? AND user<>?",
                    channel.app,
                    channel.sid,
                    row.seq,
                    EVERYONE,
                )
                await tx.many(
                    "INSERT INTO mentions(app,sid,user,seq) VALUES (?,?,?,?)",
                    [(channel.app, channel.sid, user, row.seq) for user in mentions],
                )
            return Change((published.seq, data), (published,))

        return await self._access.write(actor, channel_id, P.CHANNEL_READ, unit)

    async def delete(self, actor: Actor, channel_id: str, message_id: str, *, hard: bool = False) -> int | None:
        """Turn a message into a tombstone; `hard` destroys content and versions. The event's seq.

        None when it was deleted (as hard) before: deleting is idempotent.
        """
        now = self._clock.now_ms()

        async def unit(tx: Tx, access: Access) -> Change[int | None]:
            channel = access.channel
            row = await self._row(tx, access, message_id)
            if hard:
                access.check(P.MESSAGE_DELETE_HARD)
            else:
                self._check_owner(access, row, P.MESSAGE_DELETE_OWN, P.MESSAGE_DELETE_ANY)
            level = 2 if hard else 1
            if row.redacted >= level:
                return Change(None)
            published = await record(
                tx,
                app=channel.app,
                sid=channel.sid,
                stream=channel.id,
                cipher=channel.cipher,
                type=EventType.MESSAGE_DELETED.value,
                at=now,
                by=actor.user,
                ref=message_id,
                item=f"{message_id}/deleted/{level}",
                data=MessageDeleted(
                    id=message_id,
                    message_seq=row.seq,
                    hard=hard,
                    reply_to=row.reply_to if row.deleted_at is None else None,
                ),
            )
            await redact_messages(tx, channel.app, channel.sid, [(row.seq, message_id)], actor.user, now, hard=hard)
            return Change(published.seq, (published,))

        return await self._access.write(actor, channel_id, P.CHANNEL_READ, unit)

    async def react(self, actor: Actor, channel_id: str, message_id: str, emoji: str, *, add: bool) -> int | None:
        """Add or take back the actor's reaction. The event's seq, None when nothing changed."""
        now = self._clock.now_ms()
        user = actor.user
        if user is None:
            raise Refusal("invalid_field", "A reaction is a user's: name them with Tidings-User.", field="user")
        event_id = self._ids.new_id("e_")

        async def unit(tx: Tx, access: Access) -> Change[int | None]:
            channel = access.channel
            if not channel.type.definition.features.reactions:
                raise Refusal("feature_off", "Reactions are switched off in this type of channel.")
            row = await self._row(tx, access, message_id)
            if row.deleted_at is not None:
                raise Refusal("conflict", "The message is deleted.", field="id")
            where = (channel.app, channel.sid, row.seq)
            if add:
                kinds = await tx.all(
                    "SELECT DISTINCT emoji FROM reactions WHERE app=? AND sid=? AND message_seq=?", *where
                )
                if (emoji,) not in kinds and len(kinds) >= limits.REACTIONS_PER_MESSAGE_MAX:
                    raise Refusal(
                        "bound_exceeded",
                        f"A message carries at most {limits.REACTIONS_PER_MESSAGE_MAX} different reactions.",
                        field="emoji",
                        bound=limits.REACTIONS_PER_MESSAGE_MAX,
                    )
                changed = await tx.execute(
                    "INSERT INTO reactions(app,sid,message_seq,emoji,user,at) VALUES (?,?,?,?,?,?)"
                    " ON CONFLICT DO NOTHING",
                    *where,
                    emoji,
                    user,
                    now,
                )
            else:
                changed = await tx.execute(
                    "DELETE FROM reactions WHERE app=? AND sid=? AND message_seq=? AND emoji=? AND user=?",
                    *where,
                    emoji,
                    user,
                )
            if not changed:
                return Change(None)
            count = await tx.one(
                "SELECT count(*) FROM reactions WHERE app=? AND sid=? AND message_seq=? AND emoji=?", *where, emoji
            )
            published = await record(
                tx,
                app=channel.app,
                sid=channel.sid,
                stream=channel.id,
                cipher=channel.cipher,
                type=(EventType.REACTION_ADDED if add else EventType.REACTION_REMOVED).value,
                at=now,
                by=user,
                ref=message_id,
                item=event_id,
                data=ReactionChanged(
                    message_id=message_id,
                    message_seq=row.seq,
                    emoji=emoji,
                    user=user,
                    count=count[0] if count else 0,
                ),
            )
            return Change(published.seq, (published,))

        return await self._access.write(actor, channel_id, P.REACTION_ADD, unit)

    @staticmethod
    async def _row(tx: Tx, access: Access, message_id: str) -> MessageRow:
        row = await tx.one(
            f"SELECT {_ROW}{_FROM} WHERE m.app=? AND m.sid=? AND m.id=?",
            access.channel.app,
            access.channel.sid,
            message_id,
        )
        if row is None or row[0] <= access.floor:
            raise NotFound("message", field="id")
        return MessageRow(*row)

    @staticmethod
    def _check_owner(access: Access, row: MessageRow, own: Permission, any: Permission) -> None:
        if access.may(any):
            return
        if row.sender != access.actor.user:
            raise Forbidden(any.value)
        access.check(own)

    # ------------------------------------------------------------ reading

    async def one(self, actor: Actor, channel_id: str, message_id: str) -> bytes:
        """One message as JSON. Raises NotFound."""

        async def unit(tx: Tx, access: Access, epoch: str, head: int) -> bytes:
            return (await render_messages(tx, access, [await self._row(tx, access, message_id)]))[0]

        return await self._access.read(actor, channel_id, P.CHANNEL_READ, unit)

    async def versions(self, actor: Actor, channel_id: str, message_id: str) -> list[MessageVersion]:
        """Every version, the original first: for `message.versions`, and for the author until it is deleted."""

        async def unit(tx: Tx, access: Access, epoch: str, head: int) -> list[MessageVersion]:
            channel = access.channel
            row = await self._row(tx, access, message_id)
            if row.sender != actor.user or row.deleted_at is not None:
                access.check(P.MESSAGE_VERSIONS)
            logged = await tx.all(
                "SELECT seq,at,sender,id,sealed FROM messages WHERE app=? AND sid=? AND seq=? UNION ALL"
                " SELECT seq,at,by,item,sealed FROM events WHERE app=? AND sid=? AND ref=?"
                " AND type='message.updated' ORDER BY 1",
                channel.app,
                channel.sid,
                row.seq,
                channel.app,
                channel.sid,
                message_id,
            )
            found = []
            for version, (_, at, by, item, sealed) in enumerate(logged, 1):
                if sealed is None:
                    continue
                body = decode_body(channel.cipher.open(sealed, item.encode()))
                found.append(
                    MessageVersion(
                        version=version,
                        at=time_of(at),
                        by=None if by == BACKEND else by,
                        text=body.text,
                        mentions=body.mentions,
                        mention_all=body.mention_all,
                        attachments=body.attachments,
                        custom=body.custom,
                    )
                )
            return found

        return await self._access.read(actor, channel_id, P.CHANNEL_READ, unit)

    async def history(
        self,
        actor: Actor,
        channel_id: str,
        *,
        before: int | None = None,
        after: int | None = None,
        around: int | None = None,
        limit: int = limits.PAGE_DEFAULT,
        replies_to: str | None = None,
    ) -> Page:
        """A page of messages: the latest, or before, after or around a seq. With `replies_to`, only the replies to that
        message. Raises Refusal when two places are given, NotFound for a message that the actor may not see."""
        if sum(value is not None for value in (before, after, around)) > 1:
            raise Refusal("invalid_field", "Give one of before, after and around.", field="before")
        select = f"SELECT {_ROW}{_FROM} WHERE m.app=? AND m.sid=?"
        which = [] if replies_to is None else [replies_to]
        if which:
            select += " AND m.reply_to=?"

        async def older(tx: Tx, access: Access, below: int, count: int) -> list[Row]:
            rows = await tx.all(
                select + " AND m.seq<? AND m.seq>? ORDER BY m.seq DESC LIMIT ?",
                access.channel.app,
                access.channel.sid,
                *which,
                below,
                access.floor,
                count,
            )
            return rows[::-1]

        async def newer(tx: Tx, access: Access, above: int, count: int) -> list[Row]:
            return await tx.all(
                select + " AND m.seq>? ORDER BY m.seq LIMIT ?",
                access.channel.app,
                access.channel.sid,
                *which,
                max(above, access.floor),
                count,
            )

        async def unit(tx: Tx, access: Access, epoch: str, head: int) -> Page:
            if replies_to is not None:
                await self._row(tx, access, replies_to)
            # One more than asked for tells whether there is more.
            if around is not None:
                half = limit // 2
                left = await older(tx, access, around, half + 1)
                right = await newer(tx, access, around - 1, limit - half + 1)
                has_before, has_after = len(left) > half, len(right) > limit - half
                rows = left[-half:] if half else []
                rows = rows + right[: limit - half]
            elif after is not None:
                rows = await newer(tx, access, after, limit + 1)
                has_before, has_after = after > access.floor, len(rows) > limit
                rows = rows[:limit]
            else:
                rows = await older(tx, access, 2**62 if before is None else before, limit + 1)
                has_before, has_after = len(rows) > limit, before is not None and before <= head
                rows = rows[-limit:]
            found = [MessageRow(*row) for row in rows]
            return Page(await render_messages(tx, access, found), epoch, head, has_before, has_after)

        return await self._access.read(actor, channel_id, P.CHANNEL_READ, unit)


@dataclass(slots=True, frozen=True)
class MessageRow:
    """A row of `messages` with the event that holds its content."""

    seq: int
    id: str
    sender: str
    at: int
    content_seq: int
    flags: int
    edits: int
    deleted_at: int | None
    deleted_by: str | None
    item: str
    sealed: bytes
    redacted: int
    reply_to: str | None


class _Around(msgspec.Struct, frozen=True, omit_defaults=True):
    """What others have added to a message."""

    reactions: list[Reaction] = []
    reply_count: int = 0
    last_reply_at: datetime | None = None


async def render_messages(tx: Tx, access: Access, rows: list[MessageRow]) -> list[bytes]:
    """Messages of a channel, ascending by seq, as JSON for a reader who has access; part of a unit."""
    if not rows:
        return []
    reactions = await _reactions(tx, access, rows)
    replies = await _replies(tx, access, rows)
    rendered = []
    for row in rows:
        data = _render(access, row)
        if row.seq in reactions or row.id in replies:
            count, last = replies.get(row.id, (0, None))
            data = splice(data, encode(_Around(reactions.get(row.seq, []), count, last)))
        rendered.append(data)
    return rendered


def _render(access: Access, row: MessageRow) -> bytes:
    if row.deleted_at is not None:
        user = None if row.sender == BACKEND else row.sender
        return render_tombstone(
            access.channel.id, row.id, row.seq, user, row.at, row.deleted_at, row.deleted_by, row.reply_to
        )
    data = access.channel.cipher.open(row.sealed, row.item.encode())
    return splice(b'{"seq":%d}' % row.seq, data) if row.content_seq == row.seq else data


async def _reactions(tx: Tx, access: Access, rows: list[MessageRow]) -> dict[int, list[Reaction]]:
    counts = await tx.all(
        "SELECT message_seq, emoji, count(*), min(at) FROM reactions WHERE app=? AND sid=?"
        " AND message_seq BETWEEN ? AND ? GROUP BY message_seq, emoji ORDER BY 1, 4, 2",
        access.channel.app,
        access.channel.sid,
        rows[0].seq,
        rows[-1].seq,
    )
    found: dict[int, list[Reaction]] = {}
    for seq, emoji, count, _ in counts:
        users = await tx.all(
            "SELECT user FROM reactions WHERE app=? AND sid=? AND message_seq=? AND emoji=? ORDER BY at, user LIMIT ?",
            access.channel.app,
            access.channel.sid,
            seq,
            emoji,
            limits.REACTION_USERS_SHOWN_MAX,
        )
        found.setdefault(seq, []).append(Reaction(emoji=emoji, count=count, users=[user for (user,) in users]))
    return found


async def _replies(tx: Tx, access: Access, rows: list[MessageRow]) -> dict[str, tuple[int, datetime]]:
    """Message id → how many replies there are, and when the last one came; without those that have none."""
    counts = await tx.all(
        "SELECT m.reply_to, count(*), max(m.at) FROM messages m WHERE m.app=? AND m.sid=? AND m.deleted_at IS NULL"
        f" AND m.reply_to IN ({placeholders(rows)}) GROUP BY m.reply_to",
        access.channel.app,
        access.channel.sid,
        *[row.id for row in rows],
    )
    return {id: (count, time_of(at)) for id, count, at in counts}


async def _is_before_some(tx: Tx, access: Access, seq: int) -> bool:
    """Whether a member may not see the message at `seq`, since they joined after it; part of a unit.

    An event is encoded once for all, so what one may not read is left out for everyone. Nobody can join between this
    and the commit (the stream's row is locked), and who joins later does not get the event at all.
    """
    channel = access.channel
    if channel.type.definition.history != "since_join":
        return False
    if channel.member_count > WITHHELD_MEMBERS_MAX:
        return True
    return (
        await tx.one(
            "SELECT 1 FROM members m WHERE m.app=? AND m.sid=? AND m.joined_seq>=? LIMIT 1",
            channel.app,
            channel.sid,
            seq,
        )
    ) is not None


async def redact_messages(
    tx: Tx, app: int, sid: int, targets: list[tuple[int, str]], by: str | None, at: int, *, hard: bool
) -> None:
    """Hide messages (seq, id) from every read, or destroy their content, all versions; part of a unit."""
    change = "redacted=2, sealed=NULL" if hard else "redacted=1"
    for seq, message_id in targets:
        await tx.execute(
            f"UPDATE messages SET {change} WHERE app=? AND sid=? AND seq=?",
            app,
            sid,
            seq,
        )
        await tx.execute(
            f"UPDATE events SET {change} WHERE app=? AND sid=? AND ref=? AND type='message.updated'",
            app,
            sid,
            message_id,
        )
        await tx.execute(
            "UPDATE messages SET deleted_at=coalesce(deleted_at,?), deleted_by=coalesce(deleted_by,?)"
            " WHERE app=? AND sid=? AND seq=?",
            at,
            by,
            app,
            sid,
            seq,
        )
        await tx.execute("DELETE FROM mentions WHERE app=? AND sid=? AND seq=?", app, sid, seq)
        await tx.execute("DELETE FROM reactions WHERE app=? AND sid=? AND message_seq=?", app, sid, seq)


async def last_message(tx: Tx, access: Access) -> bytes | None:
    """The latest message that the actor may see, as JSON; part of a unit."""
    row = await tx.one(
        f"SELECT {_ROW}{_FROM} WHERE m.app=? AND m.sid=? AND m.seq>? ORDER BY m.seq DESC LIMIT 1",
        access.channel.app,
        access.channel.sid,
        access.floor,
    )
    if row is None:
        return None
    return (await render_messages(tx, access, [MessageRow(*row)]))[0]
