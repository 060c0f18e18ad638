"""Waking devices: who is to be woken for a message, with what, and what became of it. Every decision is written down.

A message is looked at once its grace period is over, by the channel's own job. What a device has acknowledged by then
it has got; for the others one job per device and provider is put, in the transaction that writes the decisions down.
When that job runs it looks again, since people read, leave and connect meanwhile: nobody is woken for what they have
got, and nobody who was removed hears of anything.

What leaves holds identifiers and a text that is the same for every message, unless the app has switched content on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from random import Random
from typing import Any, Final, Literal, TypeAlias

import msgspec

from tidings.server.bus.base import Bus
from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import WrappedStreamKey
from tidings.server.domain.notify import Facts, Reason, Wishes, decide, wishes_of
from tidings.server.domain.templates import choose, fill
from tidings.server.errors import NotFound
from tidings.server.push.base import Notification, Outcome, Provider, Providers
from tidings.server.store.base import BACKEND, EVERYONE, MENTIONS_ALL, SILENT, SYSTEM, Row, Store, Tx
from tidings.server.store.log import placeholders
from tidings.server.telemetry import Metrics, get_logger
from tidings.wire.codec import encode
from tidings.wire.notifications import NotificationPreferences, PushEvent, PushSettings
from tidings.wire.push import PushConfig
from tidings.wire.resources import AppSettings

from .apps import AppContext, Apps
from .channels import Sealed
from .counting import HIDDEN, UNREAD
from .queue import Put, put
from .rendering import decode_body
from .users import Profile, user_item
from .waking import provider_item, token_item

log = get_logger(__name__)

DECIDE: Final = "push.decide"
SEND: Final = "push.send"

# An acknowledgement is written within a tick of the receipts (a quarter of a second) and a commit: what came in time
# counts as in time.
SETTLE_MS: Final = 1_000
# Messages decided at once: of a direct channel that is one transaction of some ten milliseconds.
MESSAGES_MAX: Final = 50
# People looked up by one statement.
USERS_AT_ONCE: Final = 500
# How long a device that is connected may take to acknowledge before it is asked whether it is still there, ms: two
# heartbeats end a connection that is dead.
CONNECTED_MS: Final = 60_000
# An answer about who is connected that is not older than this counts, ms.
FRESH_MS: Final = 2_000
# Attempts of one push with back-off from 2 s to 10 minutes: about half an hour in all.
ATTEMPTS_MAX: Final = 10
FIRST_SECONDS: Final = 2.0
LONGEST_SECONDS: Final = 600.0
# How far back it is looked whether somebody was woken for what they have read now.
CLEARED_MAX: Final = 50
# Of a text that a lock screen shows; the provider's adapter cuts further to what fits.
TEXT_CHARACTERS_MAX: Final = 500
DETAIL_CHARACTERS_MAX: Final = 200

Step: TypeAlias = Literal["first", "recheck", "fallback"]


class Sending(msgspec.Struct, frozen=True, omit_defaults=True):
    """A push that is to leave, as its job holds it: identifiers only. Times in ms."""

    sid: int
    seq: int
    user: str
    device: str
    provider: str
    at: int
    event: PushEvent = "message"
    step: Step = "first"
    quiet: bool = False
    # When it was last asked whether the device is connected.
    asked_at: int = 0


@dataclass(slots=True, frozen=True)
class Note:
    """A line of the push log, to be written."""

    sid: int
    seq: int
    user: str
    device: str
    outcome: Literal["skipped", "waiting", "scheduled", "accepted", "retrying", "failed", "dropped"]
    reason: Reason
    provider: str | None = None
    detail: str | None = None


@dataclass(slots=True, frozen=True)
class Decided:
    """What came of looking at a channel: the position it is at now, when to look again (ms; None: when there is more),
    and what to write in the transaction that ends the job."""

    position: int
    due_at: int | None
    notes: Sequence[Note]
    puts: Sequence[Put]


@dataclass(slots=True, frozen=True)
class Sent:
    """What came of a push: what to write, and when to try again (ms; None: never)."""

    notes: Sequence[Note]
    due_at: int | None = None
    attempts: int = 0
    payload: bytes | None = None
    # (user, device, provider, digest) of a token that is to be forgotten.
    dead: tuple[str, str, str, bytes] | None = None
    # (provider, error): its set-up does not fit.
    misconfigured: tuple[str, str] | None = None


@lru_cache(maxsize=1_000)
def push_settings(settings: str) -> PushSettings:
    """An app's settings for pushes, from its row."""
    return msgspec.json.decode(settings, type=AppSettings).push


class PushReader:
    """Puts the job of a channel in which somebody may have to be woken."""

    async def read(self, tx: Tx, rows: Sequence[Any], now: int) -> Sequence[Put]:
        """See `jobs.relay.Reader`."""
        first: dict[tuple[int, int], int] = {}
        for row in rows:
            if row.type == "message.created":
                first.setdefault((row.app, row.sid), row.seq)
        if not first:
            return ()
        apps = sorted({app for app, _ in first})
        grace: dict[int, int] = {}
        for app in apps:
            found = await tx.one(
                "SELECT a.settings FROM apps a WHERE a.app=? AND EXISTS"
                " (SELECT 1 FROM push_providers p WHERE p.app=a.app AND p.status<>'disabled')",
                app,
            )
            if found is not None:
                grace[app] = push_settings(found[0]).grace_seconds * 1_000
        return [
            Put(DECIDE, f"{sid}", app, now + grace[app] + SETTLE_MS, payload=b"%d" % (seq - 1))
            for (app, sid), seq in first.items()
            if app in grace
        ]


class Push:
    """Decides and sends."""

    def __init__(
        self,
        store: Store,
        apps: Apps,
        bus: Bus,
        providers: Providers,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        random: Random | None = None,
    ) -> None:
        self._store = store
        self._apps = apps
        self._bus = bus
        self._providers = providers
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._random = random or Random()
        # (app, id) -> (when it was set up, the provider).
        self._open: dict[tuple[int, str], tuple[int, Provider]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ deciding

    async def decide(self, app_number: int, sid: int, position: int) -> Decided | None:
        """Decide about the messages of a channel after `position` whose grace period is over. None: there is nothing to
        decide here any more."""
        try:
            app = await self._apps.numbered(app_number)
        except NotFound:
            return None
        settings = app.settings.push
        ripe = self._clock.now_ms() - settings.grace_seconds * 1_000 - SETTLE_MS

        async def unit(tx: Tx) -> _Channel | None:
            return await _look(tx, app.app, sid, position, settings)

        found = await self._store.read(unit)
        if found is None:
            return None
        messages = list(takewhile(lambda message: message.at <= ripe, found.messages))
        notes: list[Note] = []
        puts: list[Put] = []
        if messages:
            users = sorted({user for user, _ in found.tokens})
            now = self._clock.now_ms()
            connected = await self._bus.connected_devices(app.app, users) if users else set()
            for message in messages:
                self._decide_one(app, found, message, connected, now, notes, puts)
        position = messages[-1].seq if messages else position
        due_at = None
        if len(messages) < len(found.messages):
            due_at = found.messages[len(messages)].at + settings.grace_seconds * 1_000 + SETTLE_MS
        elif len(found.messages) == MESSAGES_MAX:
            due_at = self._clock.now_ms()
        return Decided(position, due_at, notes, puts)

    def _decide_one(
        self,
        app: AppContext,
        channel: _Channel,
        message: _Message,
        connected: set[tuple[str, str]],
        now: int,
        notes: list[Note],
        puts: list[Put],
    ) -> None:
        settings = app.settings.push
        sid, seq = channel.sid, message.seq

        def everybody(reason: Reason) -> None:
            notes.append(Note(sid, seq, "", "", "skipped", reason))

        if not channel.providers:
            return everybody(Reason.NO_PROVIDER)
        if message.deleted_at is not None:
            return everybody(Reason.DELETED)
        if message.flags & SYSTEM:
            return everybody(Reason.SYSTEM)
        if message.flags & SILENT:
            return everybody(Reason.SILENT)
        if channel.large:
            everybody(Reason.LARGE_CHANNEL)
        waits = {step.provider: step.after_minutes * 60_000 for step in settings.fallback}
        for member in channel.members:
            user = member.user
            if user == message.sender or member.joined_seq >= seq:
                continue
            named = (seq, user) in channel.mentions
            if channel.large and not named:
                continue
            if member.read >= seq:
                notes.append(Note(sid, seq, user, "", "skipped", Reason.READ))
                continue
            devices = channel.devices.get(user)
            if not devices:
                notes.append(Note(sid, seq, user, "", "skipped", Reason.NO_TOKEN))
                continue
            mentions = named or bool(message.flags & MENTIONS_ALL)
            facts = Facts(mentions, member.muted_until is not None and member.muted_until > now)
            event: PushEvent = "mention" if mentions else "reply" if message.reply_to is not None else "message"
            for device in devices:
                if channel.positions.get((user, device), 0) >= seq:
                    notes.append(Note(sid, seq, user, device, "skipped", Reason.ACKNOWLEDGED))
                    continue
                verdict = decide(facts, channel.wishes(user, device), settings.default_level, now)
                if not verdict.wake:
                    assert verdict.reason is not None
                    notes.append(Note(sid, seq, user, device, "skipped", verdict.reason))
                    continue
                for provider in channel.tokens[user, device]:
                    if provider not in channel.providers:
                        notes.append(Note(sid, seq, user, device, "dropped", Reason.PROVIDER_OFF, provider))
                        continue
                    wait = waits.get(provider, 0)
                    sending = Sending(sid, seq, user, device, provider, message.at, event, quiet=verdict.quiet)
                    due = now
                    if wait:
                        sending = msgspec.structs.replace(sending, step="fallback")
                        due = max(now, message.at + wait)
                        notes.append(Note(sid, seq, user, device, "waiting", Reason.FALLBACK, provider))
                    elif (user, device) in connected:
                        sending = msgspec.structs.replace(sending, step="recheck")
                        due = now + CONNECTED_MS
                        notes.append(Note(sid, seq, user, device, "waiting", Reason.CONNECTED, provider))
                    else:
                        sending = msgspec.structs.replace(sending, asked_at=now)
                        notes.append(Note(sid, seq, user, device, "scheduled", Reason.NOT_ACKNOWLEDGED, provider))
                    puts.append(
                        Put(SEND, f"{sid}/{seq}/{user}/{device}/{provider}", app.app, due, payload=encode(sending))
                    )

    async def write(self, tx: Tx, app: int, notes: Iterable[Note], puts: Sequence[Put] = ()) -> None:
        """Write decisions down, and put the jobs that follow from them. In a unit."""
        now = self._clock.now_ms()
        rows = [
            (
                app,
                note.sid,
                note.seq,
                note.user,
                note.device,
                self._ids.new_message_id()[2:],
                now,
                note.outcome,
                note.reason.value,
                note.provider,
                None if note.detail is None else note.detail[:DETAIL_CHARACTERS_MAX],
            )
            for note in notes
        ]
        if rows:
            await tx.many(
                "INSERT INTO push_log(app,sid,seq,user,device,id,at,outcome,reason,provider,detail)"
                " VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                rows,
            )
        if puts:
            await put(tx, puts, now=now)

    def count(self, notes: Iterable[Note]) -> None:
        """For the metrics, once they are written."""
        for note in notes:
            self._metrics.pushes.labels(note.outcome, note.reason.value).value += 1

    # ------------------------------------------------------------ sending

    async def send(self, app_number: int, sending: Sending, attempt: int) -> Sent:
        """Send a push, if it is still wanted."""
        try:
            app = await self._apps.numbered(app_number)
        except NotFound:
            return Sent(())
        now = self._clock.now_ms()
        settings = app.settings.push

        async def unit(tx: Tx) -> _Target | None:
            return await _target(tx, app.app, sending, now, content=settings.content, badge=settings.badge)

        target = await self._store.read(unit)

        def note(outcome: Any, reason: Reason, detail: str | None = None) -> Note:
            return Note(
                sending.sid, sending.seq, sending.user, sending.device, outcome, reason, sending.provider, detail
            )

        if target is None:
            return Sent((note("dropped", Reason.NOT_MEMBER),))
        if (reason := target.moot(sending)) is not None:
            got = reason in (Reason.ACKNOWLEDGED, Reason.READ)
            return Sent((note("skipped" if got else "dropped", reason),))
        if now > sending.at + settings.ttl_seconds * 1_000:
            return Sent((note("dropped", Reason.TOO_LATE),))
        if await self._is_connected(app, sending, now):
            if sending.step == "recheck":
                return Sent((note("skipped", Reason.CONNECTED),))
            later = encode(msgspec.structs.replace(sending, step="recheck"))
            return Sent((note("waiting", Reason.CONNECTED),), now + CONNECTED_MS, 0, later)
        provider = self._provider(app, sending.provider, target.provider_sealed, target.provider_updated_at)
        # Opened outside of the store's threads: keys are for this one.
        outcome = await provider.send(
            app.cipher.open(target.token_sealed, token_item(sending.user, sending.device, sending.provider)).decode(),
            self._notification(app, sending, target, now),
        )
        return self._sent(sending, target, outcome, attempt, now, note)

    async def _is_connected(self, app: AppContext, sending: Sending, now: int) -> bool:
        """Whether the device is connected, which matters to whoever would be woken first. It was just asked before a
        push that is decided is sent."""
        if sending.step == "fallback" or now - sending.asked_at <= FRESH_MS:
            return False
        return (sending.user, sending.device) in await self._bus.connected_devices(app.app, (sending.user,))

    async def clear(self, app_number: int, sid: int, user: str) -> Sequence[Note]:
        """Set the badge of devices that were woken for a channel which its user has read elsewhere meanwhile."""
        try:
            app = await self._apps.numbered(app_number)
        except NotFound:
            return ()
        now = self._clock.now_ms()

        async def unit(tx: Tx) -> tuple[Row | None, list[Row], int]:
            member = await tx.one(
                "SELECT m.read,c.id FROM members m JOIN channels c ON c.sid=m.sid"
                " WHERE m.app=? AND m.sid=? AND m.user=?",
                app.app,
                sid,
                user,
            )
            if member is None:
                return None, [], 0
            woken = await tx.all(
                "SELECT DISTINCT t.device,t.provider,t.sealed,p.sealed,p.updated_at FROM push_tokens t"
                " JOIN push_providers p ON p.app=t.app AND p.id=t.provider AND p.status='enabled'"
                " AND p.kind IN ('fcm','apns')"
                " JOIN push_log l ON l.app=t.app AND l.sid=? AND l.seq>? AND l.seq<=? AND l.user=t.user"
                " AND l.device=t.device AND l.outcome='accepted' AND l.reason='sent'"
                " WHERE t.app=? AND t.user=? ORDER BY t.device,t.provider",
                sid,
                member[0] - CLEARED_MAX,
                member[0],
                app.app,
                user,
            )
            return member, woken, await _badge(tx, app.app, user, now)

        member, woken, unread = await self._store.read(unit)
        if member is None or not woken:
            return ()
        connected = await self._bus.connected_devices(app.app, (user,))
        notes = []
        for device, provider, token, config, updated_at in woken:
            if (user, device) in connected:
                continue
            outcome = await self.try_out(
                app,
                provider,
                config,
                updated_at,
                token,
                user,
                device,
                Notification(
                    id=f"read/{member[1]}/{member[0]}/{device}",
                    data={"app": app.id, "channel": member[1], "seq": str(member[0]), "event": "read"},
                    badge=unread if app.settings.push.badge else None,
                    collapse_key=member[1],
                    priority="normal",
                    silent=True,
                ),
            )
            sent = outcome.kind == "accepted"
            detail = outcome.provider_id if sent else outcome.reason
            notes.append(
                Note(sid, member[0], user, device, "accepted" if sent else "failed", Reason.CLEARED, provider, detail)
            )
        return notes

    def _sent(self, sending: Sending, target: _Target, outcome: Outcome, attempt: int, now: int, note: Any) -> Sent:
        detail = outcome.reason if outcome.status is None else f"{outcome.status} {outcome.reason}"
        match outcome.kind:
            case "accepted":
                return Sent((note("accepted", Reason.SENT, outcome.provider_id),))
            case "token_dead":
                dead = (sending.user, sending.device, sending.provider, target.digest)
                return Sent((note("dropped", Reason.TOKEN_DEAD, detail),), dead=dead)
            case "rejected":
                return Sent((note("failed", Reason.REJECTED, detail),))
            case "too_large":
                return Sent((note("failed", Reason.TOO_LARGE, detail),))
            case "misconfigured":
                return Sent(
                    (note("failed", Reason.MISCONFIGURED, detail),),
                    misconfigured=None if outcome.only_token else (sending.provider, detail),
                )
            case "retry":
                if attempt >= ATTEMPTS_MAX:
                    return Sent((note("failed", Reason.UNAVAILABLE, detail),))
                wait = outcome.retry_after
                if wait is None:
                    wait = self._random.uniform(0, min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** (attempt - 1)))
                return Sent((note("retrying", Reason.UNAVAILABLE, detail),), now + round(wait * 1_000), attempt)

    async def try_out(
        self,
        app: AppContext,
        id: str,
        provider_sealed: bytes,
        updated_at: int,
        token_sealed: bytes,
        user: str,
        device: str,
        notification: Notification,
    ) -> Outcome:
        """Send something to a device now, whatever speaks against it."""
        provider = self._provider(app, id, provider_sealed, updated_at)
        token = app.cipher.open(token_sealed, token_item(user, device, id)).decode()
        return await provider.send(token, notification)

    def _provider(self, app: AppContext, id: str, sealed: bytes, updated_at: int) -> Provider:
        key = (app.app, id)
        held = self._open.get(key)
        if held is not None and held[0] == updated_at:
            return held[1]
        config = msgspec.json.decode(
            app.cipher.open(sealed, provider_item(id)),
            type=PushConfig,
        )
        made = self._providers.open(config)
        self._open[key] = (updated_at, made)
        if held is not None:
            # What is under way with the old one ends by itself; it holds nothing but short-lived credentials.
            task = asyncio.get_running_loop().create_task(held[1].close())  # owned by `_closing`
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return made

    async def close(self) -> None:
        """Let go of the providers."""
        for _, provider in self._open.values():
            await provider.close()
        self._open.clear()
        if self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _notification(self, app: AppContext, sending: Sending, target: _Target, now: int) -> Notification:
        settings = app.settings.push
        values = {"app": app.name, "count": str(target.badge if target.badge is not None else 1)}
        if settings.content:
            values |= self._content(app, sending, target)
        template = choose(settings.templates, sending.event, target.language)
        link = settings.link.replace("{channel_id}", target.channel).replace("{message_id}", target.message)
        return Notification(
            id=f"{target.message}/{sending.device}",
            title=fill(template.title, values),
            body=fill(template.body, values),
            data={
                "app": app.id,
                "channel": target.channel,
                "message": target.message,
                "seq": str(sending.seq),
                "event": sending.event,
            },
            badge=target.badge,
            sound=None if sending.quiet else settings.sound,
            collapse_key=target.channel,
            priority="normal" if sending.quiet else "high",
            ttl_seconds=max(0, settings.ttl_seconds - (now - sending.at) // 1_000),
            link=link or None,
            thread=target.channel,
        )

    def _content(self, app: AppContext, sending: Sending, target: _Target) -> dict[str, str]:
        """Names and the text, where the app has said that they may leave."""
        sid, wrapped, version, app_version = target.key
        key = WrappedStreamKey(version=version, app_key_version=app_version, wrapped=wrapped)
        cipher = self._apps.keyring.cipher(app.id, str(sid), key)
        body = decode_body(cipher.open(target.sealed, target.item.encode()))
        found = {"text": body.text[:TEXT_CHARACTERS_MAX], "sender": app.name, "channel": ""}
        if target.sender != BACKEND:
            found["sender"] = target.sender
            if target.sender_sealed is not None:
                profile = msgspec.json.decode(
                    app.cipher.open(target.sender_sealed, user_item(target.sender)), type=Profile
                )
                found["sender"] = profile.name or target.sender
        if target.channel_sealed is not None:
            found["channel"] = (
                msgspec.json.decode(cipher.open(target.channel_sealed, b"channel"), type=Sealed).name or ""
            )
        return found

    async def end(self, tx: Tx, app: int, sent: Sent) -> None:
        """Write down what came of a push. In a unit."""
        await self.write(tx, app, sent.notes)
        if sent.dead is not None:
            user, device, provider, digest = sent.dead
            # Only that one: the device may have told a new one meanwhile.
            await tx.execute(
                "DELETE FROM push_tokens WHERE app=? AND push_tokens.user=? AND device=? AND provider=? AND digest=?",
                app,
                user,
                device,
                provider,
                digest,
            )
        if sent.misconfigured is not None:
            id, error = sent.misconfigured
            changed = await tx.execute(
                "UPDATE push_providers SET status='misconfigured', error=? WHERE app=? AND id=? AND status='enabled'",
                error,
                app,
                id,
            )
            if changed:
                # Once, and loudly: nothing is sent there until it is set up anew.
                log.error("push_misconfigured", app=app, provider=id, why=error)
                self._metrics.push_misconfigured.labels(id).value += 1


# ---------------------------------------------------------------- what is looked up to decide


@dataclass(slots=True, frozen=True)
class _Message:
    seq: int
    sender: str
    at: int
    flags: int
    deleted_at: int | None
    reply_to: str | None


@dataclass(slots=True, frozen=True)
class _Member:
    user: str
    joined_seq: int
    read: int
    muted_until: int | None


@dataclass(slots=True)
class _Channel:
    sid: int
    large: bool
    providers: set[str]
    messages: list[_Message]
    members: list[_Member]
    mentions: set[tuple[int, str]]
    devices: dict[str, list[str]]
    tokens: dict[tuple[str, str], list[str]]
    positions: dict[tuple[str, str], int]
    stored: dict[str, dict[tuple[str, bool], NotificationPreferences]]

    def wishes(self, user: str, device: str) -> Wishes:
        return wishes_of(self.stored.get(user, {}), device)


_decode_preferences: Final = lru_cache(maxsize=10_000)(msgspec.json.Decoder(NotificationPreferences).decode)


async def _look(tx: Tx, app: int, sid: int, position: int, settings: PushSettings) -> _Channel | None:
    channel = await tx.one("SELECT member_count, deleted_at FROM channels WHERE app=? AND sid=?", app, sid)
    if channel is None or channel[1] is not None:
        return None
    messages = [
        _Message(*row)
        for row in await tx.all(
            "SELECT seq,sender,at,flags,deleted_at,reply_to FROM messages WHERE app=? AND sid=? AND seq>?"
            " ORDER BY seq LIMIT ?",
            app,
            sid,
            position,
            MESSAGES_MAX,
        )
    ]
    large = channel[0] > settings.members_max
    found = _Channel(sid, large, set(), messages, [], set(), {}, {}, {}, {})
    if not messages:
        return found
    found.providers = {
        row[0] for row in await tx.all("SELECT id FROM push_providers WHERE app=? AND status='enabled'", app)
    }
    found.mentions = {
        (seq, user)
        for seq, user in await tx.all(
            "SELECT n.seq, n.user FROM mentions n WHERE n.app=? AND n.sid=? AND n.seq>? AND n.seq<=?",
            app,
            sid,
            position,
            messages[-1].seq,
        )
        if user != EVERYONE
    }
    chosen = "" if not large else " AND m.user IN ({some})"
    members = "SELECT m.user, m.joined_seq, m.read, m.muted_until FROM members m WHERE m.app=? AND m.sid=?"
    if large:
        named = sorted({user for _, user in found.mentions})
        rows: list[Row] = []
        for some in _chunks(named):
            rows += await tx.all(members + chosen.format(some=placeholders(some)), app, sid, *some)
    else:
        rows = await tx.all(members, app, sid)
    found.members = [_Member(*row) for row in rows]
    for some in _chunks([member.user for member in found.members]):
        marks = placeholders(some)
        for user, device, provider in await tx.all(
            f"SELECT t.user,t.device,t.provider FROM push_tokens t WHERE t.app=? AND t.user IN ({marks})"
            " ORDER BY t.user,t.device,t.provider",
            app,
            *some,
        ):
            if (user, device) not in found.tokens:
                found.tokens[user, device] = []
                found.devices.setdefault(user, []).append(device)
            found.tokens[user, device].append(provider)
        for user, device, about, definition in await tx.all(
            "SELECT p.user,p.device,p.sid,p.definition FROM notification_preferences p"
            f" WHERE p.app=? AND p.user IN ({marks}) AND p.sid IN (0,?)",
            app,
            *some,
            sid,
        ):
            found.stored.setdefault(user, {})[device, about != 0] = _decode_preferences(definition)
        for user, device, seq in await tx.all(
            f"SELECT p.user,p.device,p.seq FROM device_positions p WHERE p.app=? AND p.user IN ({marks}) AND p.sid=?",
            app,
            *some,
            sid,
        ):
            found.positions[user, device] = seq
    return found


def _chunks(users: list[str]) -> Iterable[list[str]]:
    for start in range(0, len(users), USERS_AT_ONCE):
        yield users[start : start + USERS_AT_ONCE]


# ---------------------------------------------------------------- what is looked up to send


@dataclass(slots=True, frozen=True)
class _Target:
    provider_status: str | None
    provider_sealed: bytes
    provider_updated_at: int
    token_sealed: bytes
    digest: bytes
    language: str | None
    message: str
    sender: str
    deleted_at: int | None
    channel: str
    position: int
    delivered: int
    read: int
    badge: int | None
    key: tuple[int, bytes, int, int]
    sealed: bytes
    item: str
    sender_sealed: bytes | None
    channel_sealed: bytes | None

    def moot(self, sending: Sending) -> Reason | None:
        """Why there is nothing to be sent any more."""
        if self.read >= sending.seq:
            return Reason.READ
        if self.position >= sending.seq or (sending.step == "fallback" and self.delivered >= sending.seq):
            return Reason.ACKNOWLEDGED
        if self.deleted_at is not None:
            return Reason.DELETED
        if self.provider_status is None or self.provider_status == "disabled":
            return Reason.PROVIDER_OFF
        if self.provider_status != "enabled":
            return Reason.MISCONFIGURED
        if not self.token_sealed:
            return Reason.NO_TOKEN
        return None


async def _badge(tx: Tx, app: int, user: str, now: int) -> int:
    """What is unread in channels that are neither hidden, archived nor muted: what `GET /v1/unread` says."""
    row = await tx.one(
        f"SELECT CAST(coalesce(sum(q.unread),0) AS BIGINT) FROM (SELECT {UNREAD} AS unread FROM members m"
        f" JOIN streams s ON s.sid=m.sid WHERE m.app=? AND m.user=? AND m.archived=0 AND NOT {HIDDEN}"
        " AND (m.muted_until IS NULL OR m.muted_until<=?)"
        " AND (s.counted>m.read_counted OR m.marked_from IS NOT NULL)) q",
        app,
        user,
        now,
    )
    return int(row[0]) if row is not None else 0


async def _target(tx: Tx, app: int, sending: Sending, now: int, *, content: bool, badge: bool) -> _Target | None:
    """Everything that sending needs; None where the user is no member (any more)."""
    sid, seq, user, device = sending.sid, sending.seq, sending.user, sending.device
    member = await tx.one(
        "SELECT m.joined_seq, m.delivered, m.read FROM members m JOIN users u ON u.app=m.app AND u.id=m.user"
        " WHERE m.app=? AND m.sid=? AND m.user=? AND u.deactivated_at IS NULL AND u.deleted_at IS NULL",
        app,
        sid,
        user,
    )
    message = await tx.one(
        "SELECT m.id,m.sender,m.deleted_at,coalesce(e.item,m.id),coalesce(e.sealed,m.sealed),c.id,c.sealed,"
        "s.key_wrapped,s.key_version,s.key_app_version FROM messages m"
        " JOIN channels c ON c.sid=m.sid JOIN streams s ON s.sid=m.sid"
        " LEFT JOIN events e ON m.content_seq<>m.seq AND e.app=m.app AND e.sid=m.sid AND e.seq=m.content_seq"
        " WHERE m.app=? AND m.sid=? AND m.seq=?",
        app,
        sid,
        seq,
    )
    if member is None or message is None or member[0] >= seq:
        return None
    provider = await tx.one(
        "SELECT status,sealed,updated_at FROM push_providers WHERE app=? AND id=?", app, sending.provider
    )
    token = await tx.one(
        "SELECT t.sealed,t.digest,t.language FROM push_tokens t"
        " WHERE t.app=? AND t.user=? AND t.device=? AND t.provider=?",
        app,
        user,
        device,
        sending.provider,
    )
    position = await tx.one(
        "SELECT p.seq FROM device_positions p WHERE p.app=? AND p.user=? AND p.device=? AND p.sid=?",
        app,
        user,
        device,
        sid,
    )
    unread: int | None = None
    if badge:
        unread = await _badge(tx, app, user, now)
    language = token[2] if token is not None else None
    if language is None:
        said = await tx.all(
            "SELECT p.device,p.definition FROM notification_preferences p WHERE p.app=? AND p.user=? AND p.sid=0"
            " AND p.device IN ('',?) ORDER BY p.device DESC",
            app,
            user,
            device,
        )
        language = next((found for _, text in said if (found := _decode_preferences(text).language)), None)
    sender_sealed = None
    if content and message[1] != BACKEND:
        row = await tx.one("SELECT sealed FROM users WHERE app=? AND id=?", app, message[1])
        sender_sealed = row[0] if row is not None else None
    return _Target(
        provider[0] if provider else None,
        provider[1] if provider else b"",
        provider[2] if provider else 0,
        token[0] if token else b"",
        token[1] if token else b"",
        language,
        message[0],
        message[1],
        message[2],
        message[5],
        position[0] if position else 0,
        member[1],
        member[2],
        unread,
        (sid, message[7], message[8], message[9]),
        message[4],
        message[3],
        sender_sealed,
        message[6] if content else None,
    )
