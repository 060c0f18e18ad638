"""Webhooks: an app's endpoints, what is sent to them, in order per channel, and what became of it.

Delivery reads the log: the job of an endpoint and a channel (its lane) holds a position, sends the events after it
one by one, and moves on when the endpoint has taken one or the schedule is used up. So nothing is copied when an
event happens, order follows from `seq`, and sending again is moving the position back.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any, Final, Literal

import msgspec

from tidings.server.clock import Clock, Ids
from tidings.server.crypto.keyring import WrappedStreamKey
from tidings.server.domain.permissions import Permission
from tidings.server.domain.standard_webhooks import (
    SECRET_BYTES,
    Signer,
    matches,
    public_text,
    retry_after,
    secret_bytes,
    secret_text,
    wait_seconds,
)
from tidings.server.errors import NotFound, Refusal
from tidings.server.posting import Poster
from tidings.server.store import log as event_log
from tidings.server.store.base import Row, Store, Tx
from tidings.server.telemetry import Metrics, get_logger
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.events import OWN_EVENTS
from tidings.wire.ids import ms_of, time_of
from tidings.wire.webhooks import (
    WEBHOOKS_MAX,
    Outcome,
    Webhook,
    WebhookBody,
    WebhookCreate,
    WebhookDelivery,
    WebhookExchange,
    WebhookReplay,
    WebhookReplayed,
    WebhookRotate,
    WebhookUpdate,
)

from .access import Actor
from .apps import AppContext, Apps
from .audit import Action, Line, line_id, line_of
from .paging import make_cursor, read_cursor
from .queue import Put, cancel_beginning, put
from .waking import delivery_item, webhook_item

log = get_logger(__name__)
P = Permission

LANE: Final = "webhook"
NOTICE: Final = "webhook.notice"

# Events of one lane sent under one claim, and how long that may take, seconds: what was sent is sent again if the
# process ends before it is written down.
EVENTS_MAX: Final = 50
LANE_SECONDS: Final = 10.0
# An endpoint answers at once and works later.
TIMEOUT_SECONDS: Final = 10.0
ANSWER_BYTES_MAX: Final = 64 << 10
# Of bodies in the log.
LOGGED_BYTES_MAX: Final = 2_048
# An endpoint to which nothing could be delivered for so long, though it was tried, is switched off, ms.
FAILING_MS: Final = 5 * 24 * 3_600 * 1_000
# While an endpoint fails, its other lanes wait, but ask again within this time, ms: it may be well again.
PAUSE_MS_MAX: Final = 5 * 60 * 1_000
# Channels of one replay: each becomes a job.
REPLAY_CHANNELS_MAX: Final = 10_000


class _Definition(msgspec.Struct, frozen=True, omit_defaults=True):
    url: str
    events: list[str]
    description: str = ""
    channel_types: list[str] = []
    content: bool = False


class _Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """A secret and the seed of an ed25519 key, as base64; `until` (ms): when they end."""

    secret: str
    seed: str
    until: int | None = None


class Lane(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a lane is: the position in the log, and how often the event after it was tried. `until`: a replay that ends
    with the event of this number."""

    position: int
    attempt: int = 0
    until: int | None = None


@dataclass(slots=True, frozen=True)
class Attempt:
    """One POST and its answer."""

    id: str
    webhook: str
    message: str
    type: str
    sid: int | None
    seq: int | None
    at: int
    number: int
    outcome: Outcome
    status: int | None
    milliseconds: int
    error: str | None
    exchange: bytes
    retry_after: float | None = None


@dataclass(slots=True, frozen=True)
class Progress:
    """What became of a lane: where it is, when it goes on (ms; 0: at once; None: it is empty), and what to write."""

    lane: Lane
    due_at: int | None
    attempts: Sequence[Attempt] = ()
    waits: bool = False
    # What it means for the endpoint.
    change: Literal["", "recovered", "failing", "gone", "exhausted"] = ""


_definition: Final = lru_cache(maxsize=1_000)(msgspec.json.Decoder(_Definition).decode)
_decode_lane: Final = msgspec.json.Decoder(Lane).decode


def lane_key(webhook: str, sid: int) -> str:
    """The key of the job of an endpoint and a channel."""
    return f"{webhook}/{sid}"


class WebhookReader:
    """Puts the lanes in which there is something to be told."""

    async def read(self, tx: Tx, rows: Sequence[Any], now: int) -> Sequence[Put]:
        """See `jobs.relay.Reader`."""
        apps = sorted({row.app for row in rows})
        endpoints: dict[int, list[tuple[str, list[str]]]] = {}
        for app in apps:
            found = await tx.all("SELECT id,definition FROM webhooks WHERE app=? AND status='enabled'", app)
            if found:
                endpoints[app] = [(id, _definition(definition).events) for id, definition in found]
        puts: dict[tuple[int, str], Put] = {}
        for row in rows:
            if row.app not in endpoints or row.type in OWN_EVENTS:
                continue
            for id, filters in endpoints[row.app]:
                key = lane_key(id, row.sid)
                if (row.app, key) not in puts and matches(filters, row.type):
                    puts[row.app, key] = Put(LANE, key, row.app, payload=encode(Lane(row.seq - 1)))
        return list(puts.values())


class Webhooks:
    """Use-cases of webhooks. Those of people need `webhook.manage`."""

    def __init__(
        self,
        store: Store,
        apps: Apps,
        poster: Poster,
        clock: Clock,
        ids: Ids,
        metrics: Metrics,
        random: Random | None = None,
    ) -> None:
        self._store = store
        self._apps = apps
        self._poster = poster
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._random = random or Random()
        # (app, id, sealed) -> what signs.
        self._signers: dict[tuple[int, str], tuple[bytes, int | None, Signer]] = {}

    # ------------------------------------------------------------ endpoints

    async def find(self, actor: Actor) -> list[Webhook]:
        """The app's webhooks, the oldest first."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)

        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(f"SELECT {_WEBHOOK} FROM webhooks WHERE app=? ORDER BY created_at,id", context.app)

        return [self._render(context, row) for row in await self._store.read(unit)]

    async def get(self, actor: Actor, id: str) -> Webhook:
        """One webhook. Raises NotFound."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)
        return self._render(context, await self._row(context.app, id))

    async def create(self, actor: Actor, wanted: WebhookCreate) -> Webhook:
        """Add an endpoint; the answer holds its secret, this once. Raises Refusal naming the field."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)
        self._check_url(wanted.url)
        key = self._new_key(wanted.secret)
        id, now = self._ids.new_id("wh_"), self._clock.now_ms()
        definition = _Definition(
            wanted.url, list(wanted.events), wanted.description, list(wanted.channel_types), wanted.content
        )
        sealed = context.cipher.seal(encode([key]), webhook_item(id))
        line = self._line(actor, Action.WEBHOOK_CREATED, id)

        async def unit(tx: Tx) -> None:
            count = await tx.one("SELECT count(*) FROM webhooks WHERE app=?", context.app)
            if count is not None and count[0] >= WEBHOOKS_MAX:
                raise Refusal("bound_exceeded", f"An app has {WEBHOOKS_MAX} webhooks.", bound=WEBHOOKS_MAX)
            await tx.execute(
                "INSERT INTO webhooks(app,id,definition,sealed,status,created_at,updated_at) VALUES (?,?,?,?,?,?,?)",
                context.app,
                id,
                encode(definition).decode(),
                sealed,
                "enabled",
                now,
                now,
            )
            await line.write(tx)

        await self._store.run(unit)
        made = self._render(context, (id, encode(definition).decode(), sealed, "enabled", None, now, now, None, None))
        return msgspec.structs.replace(made, secret=secret_text(base64.b64decode(key.secret)))

    async def update(self, actor: Actor, id: str, wanted: WebhookUpdate) -> Webhook:
        """Change an endpoint, or switch it on or off. Raises NotFound, or Refusal naming the field."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)
        if isinstance(wanted.url, str):
            self._check_url(wanted.url)
        changed = {
            name: value
            for name in ("url", "description", "events", "channel_types", "content")
            if (value := getattr(wanted, name)) is not msgspec.UNSET
        }
        now = self._clock.now_ms()
        line = self._line(actor, Action.WEBHOOK_UPDATED, id, fields=sorted(changed), status=str(wanted.status or ""))

        async def unit(tx: Tx) -> None:
            row = await tx.one(
                "SELECT definition,status FROM webhooks WHERE app=? AND id=?" + tx.for_update, context.app, id
            )
            if row is None:
                raise NotFound("webhook", field="webhook")
            definition = msgspec.structs.replace(_definition(row[0]), **changed)
            await tx.execute(
                "UPDATE webhooks SET definition=?, updated_at=? WHERE app=? AND id=?",
                encode(definition).decode(),
                now,
                context.app,
                id,
            )
            if wanted.status is not msgspec.UNSET and wanted.status != row[1]:
                if wanted.status == "enabled":
                    await tx.execute(
                        "UPDATE webhooks SET status='enabled', reason=NULL, failing_since=NULL, paused_until=NULL,"
                        " failures=0 WHERE app=? AND id=?",
                        context.app,
                        id,
                    )
                else:
                    await _disable(tx, context.app, id, "switched off", now)
            await line.write(tx)

        await self._store.run(unit)
        return self._render(context, await self._row(context.app, id))

    async def delete(self, actor: Actor, id: str) -> None:
        """Take an endpoint away with its log. Raises NotFound."""
        actor.check(P.WEBHOOK_MANAGE)
        app, line = actor.app.app, self._line(actor, Action.WEBHOOK_DELETED, id)

        async def unit(tx: Tx) -> None:
            if not await tx.execute("DELETE FROM webhooks WHERE app=? AND id=?", app, id):
                raise NotFound("webhook", field="webhook")
            await cancel_beginning(tx, LANE, app, f"{id}/")
            await cancel_beginning(tx, NOTICE, app, f"{id}/")
            await tx.execute("DELETE FROM webhook_deliveries WHERE app=? AND webhook=?", app, id)
            await line.write(tx)

        await self._store.run(unit)

    async def rotate(self, actor: Actor, id: str, wanted: WebhookRotate) -> Webhook:
        """A new secret and key pair; what is sent is signed with the old ones, too, until they end. The answer holds
        the secret, this once. Raises NotFound."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)
        now = self._clock.now_ms()
        key = self._new_key(wanted.secret)
        line = self._line(actor, Action.WEBHOOK_ROTATED, id)

        async def unit(tx: Tx) -> None:
            row = await tx.one("SELECT sealed FROM webhooks WHERE app=? AND id=?" + tx.for_update, context.app, id)
            if row is None:
                raise NotFound("webhook", field="webhook")
            old = [one for one in self._keys(context, id, row[0]) if one.until is None]
            keys = [key]
            if wanted.overlap_hours and old:
                keys.append(msgspec.structs.replace(old[0], until=now + wanted.overlap_hours * 3_600_000))
            await tx.execute(
                "UPDATE webhooks SET sealed=?, updated_at=? WHERE app=? AND id=?",
                context.cipher.seal(encode(keys), webhook_item(id)),
                now,
                context.app,
                id,
            )
            await line.write(tx)

        await self._store.run(unit)
        made = self._render(context, await self._row(context.app, id))
        return msgspec.structs.replace(made, secret=secret_text(base64.b64decode(key.secret)))

    async def test(self, actor: Actor, id: str) -> WebhookExchange:
        """Send a `webhook.test` now, whatever state the endpoint is in; what was sent and what came back."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)
        row = await self._row(context.app, id)
        now = self._clock.now_ms()
        body = encode(WebhookBody(type="webhook.test", timestamp=time_of(now), data={"app": context.id, "webhook": id}))
        attempt = await self._post(
            context, id, _definition(row[1]).url, row[2], self._ids.new_id("msg_"), "webhook.test", None, None, 1, body
        )
        await self._store.run(lambda tx: self._write(tx, context.app, [attempt]))
        return _exchange(context, attempt, attempt.exchange)

    # ------------------------------------------------------------ the log

    async def deliveries(
        self,
        actor: Actor,
        id: str,
        *,
        outcome: str | None = None,
        message: str | None = None,
        type: str | None = None,
        since: int | None = None,
        until: int | None = None,
        limit: int = limits.PAGE_DEFAULT,
        cursor: str | None = None,
    ) -> tuple[list[WebhookDelivery], str | None]:
        """Attempts, the newest first, and the cursor of the next page. Times in ms. Raises NotFound."""
        actor.check(P.WEBHOOK_MANAGE)
        app = actor.app.app
        await self._row(app, id)
        listing = ["deliveries", id, outcome, message, type, since, until]
        conditions, args = ["app=?", "webhook=?"], [app, id]
        for condition, value in (
            ("outcome=?", outcome),
            ("message=?", message),
            ("type=?", type),
            ("at>=?", since),
            ("at<?", until),
        ):
            if value is not None:
                conditions.append(condition)
                args.append(value)
        if cursor is not None:
            conditions.append("id<?")
            args.append(read_cursor(actor.app, listing, cursor, tuple[str])[0])

        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(
                f"SELECT {_DELIVERY} FROM webhook_deliveries WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?",
                *args,
                limit + 1,
            )

        rows = await self._store.read(unit)
        more = make_cursor(actor.app, listing, [rows[limit - 1][0]]) if len(rows) > limit else None
        return [_delivery(row) for row in rows[:limit]], more

    async def delivery(self, actor: Actor, id: str, delivery: str) -> WebhookExchange:
        """An attempt with what was sent and what came back. Raises NotFound."""
        actor.check(P.WEBHOOK_MANAGE)
        context = await self._apps.get(actor.app.id)

        async def unit(tx: Tx) -> Row | None:
            return await tx.one(
                f"SELECT {_DELIVERY},sealed FROM webhook_deliveries WHERE app=? AND webhook=? AND id=?",
                context.app,
                id,
                delivery,
            )

        row = await self._store.read(unit)
        if row is None:
            raise NotFound("delivery", field="delivery")
        return _exchange(context, _delivery(row[:-1]), row[-1])

    async def replay(self, actor: Actor, id: str, wanted: WebhookReplay) -> WebhookReplayed:
        """Send again, with the same ids: one message, or all that happened in a time. Raises NotFound, Refusal."""
        actor.check(P.WEBHOOK_MANAGE)
        if (wanted.message is None) == (wanted.since is None):
            raise Refusal("invalid_field", "Give either a message or a time since when.", field="message")
        app = actor.app.app
        row = await self._row(app, id)
        if row[3] != "enabled":
            raise Refusal("conflict", "The webhook is disabled: enable it first.", field="webhook")
        now = self._clock.now_ms()
        since = 0 if wanted.since is None else ms_of(wanted.since)
        until = now + 1 if wanted.until is None else min(ms_of(wanted.until), now + 1)
        line = self._line(actor, Action.WEBHOOK_REPLAYED, id)
        mark = line_id(self._ids)

        async def unit(tx: Tx) -> int:
            ranges: list[tuple[int, int, int]] = []
            if wanted.message is not None:
                found = await tx.one(
                    "SELECT sid,seq FROM webhook_deliveries WHERE app=? AND webhook=? AND message=? AND sid IS NOT NULL"
                    " LIMIT 1",
                    app,
                    id,
                    wanted.message,
                )
                if found is None:
                    raise NotFound("message", field="message")
                ranges.append((found[0], found[1] - 1, found[1]))
            else:
                sids = await tx.all(
                    "SELECT sid FROM streams WHERE app=? AND moved_at>=? AND kind='channel' ORDER BY moved_at LIMIT ?",
                    app,
                    since,
                    REPLAY_CHANNELS_MAX + 1,
                )
                if len(sids) > REPLAY_CHANNELS_MAX:
                    raise Refusal(
                        "bound_exceeded",
                        f"More than {REPLAY_CHANNELS_MAX} channels have moved since then: replay a later time first.",
                        bound=REPLAY_CHANNELS_MAX,
                    )
                for (sid,) in sids:
                    first, last = await _bounds(tx, app, sid, since, until)
                    if first <= last:
                        ranges.append((sid, first - 1, last))
            await put(
                tx,
                [
                    Put(LANE, f"{lane_key(id, sid)}/{mark}", app, payload=encode(Lane(after, 0, last)))
                    for sid, after, last in ranges
                ],
                now=now,
            )
            await line.write(tx)
            return len(ranges)

        return WebhookReplayed(channels=await self._store.run(unit))

    # ------------------------------------------------------------ delivering

    async def deliver(self, app_number: int, key: str, payload: bytes) -> Progress | None:
        """Go on with a lane. None: there is nobody to tell any more."""
        id, sid = key.split("/")[0], int(key.split("/")[1])
        lane = _decode_lane(payload)
        try:
            context = await self._apps.numbered(app_number)
        except NotFound:
            return None

        async def unit(tx: Tx) -> tuple[Row, Row, list[Any]] | None:
            row = await tx.one(f"SELECT {_WEBHOOK} FROM webhooks WHERE app=? AND id=?", context.app, id)
            stream = await tx.one(
                "SELECT s.epoch,s.key_wrapped,s.key_version,s.key_app_version,c.id,c.type,s.floor FROM streams s"
                " JOIN channels c ON c.sid=s.sid WHERE s.sid=? AND s.app=?",
                sid,
                context.app,
            )
            if row is None or stream is None or row[3] != "enabled":
                return None
            return row, stream, await event_log.events_after(tx, context.app, sid, lane.position, EVENTS_MAX)

        found = await self._store.read(unit)
        if found is None:
            return None
        row, stream, events = found
        now = self._clock.now_ms()
        paused_until = row[8]
        if paused_until is not None and paused_until > now and lane.attempt == 0:
            return Progress(lane, paused_until, waits=True)
        definition = _definition(row[1])
        began = self._clock.monotonic()
        attempts: list[Attempt] = []
        recovered: Literal["", "recovered"] = ""
        for event in events:
            if lane.until is not None and event.seq > lane.until:
                return Progress(lane, None, attempts, change=recovered)
            if not matches(definition.events, event.type) or (
                definition.channel_types and stream[5] not in definition.channel_types
            ):
                lane = Lane(event.seq, 0, lane.until)
                continue
            if attempts and self._clock.monotonic() - began > LANE_SECONDS:
                return Progress(lane, 0, attempts, change=recovered)
            message = self._message_id(context, sid, stream[0], event.seq)
            number = lane.attempt + 1
            body = self._body(context, sid, stream, event, content=definition.content)
            attempt = await self._post(
                context, id, definition.url, row[2], message, event.type, sid, event.seq, number, body
            )
            attempts.append(attempt)
            if attempt.outcome == "delivered":
                if row[7] is not None or row[8] is not None:
                    recovered = "recovered"
                lane = Lane(event.seq, 0, lane.until)
                continue
            if attempt.status == 410:
                return Progress(lane, None, attempts, change="gone")
            wait = wait_seconds(number, self._random.random())
            if wait is None:
                attempts[-1] = replace(attempt, outcome="exhausted")
                return Progress(Lane(event.seq, 0, lane.until), 0, attempts, change="exhausted")
            if attempt.retry_after is not None:
                wait = max(wait, attempt.retry_after)
            due = self._clock.now_ms() + round(wait * 1_000)
            return Progress(Lane(lane.position, number, lane.until), due, attempts, waits=True, change="failing")
        more = len(events) == EVENTS_MAX
        return Progress(lane, 0 if more else None, attempts, change=recovered)

    async def end(self, tx: Tx, app: int, key: str, progress: Progress) -> None:
        """Write down what became of a lane. In the unit that ends its job."""
        await self._write(tx, app, progress.attempts)
        id, now = key.split("/")[0], self._clock.now_ms()
        match progress.change:
            case "recovered":
                await tx.execute(
                    "UPDATE webhooks SET failing_since=NULL, paused_until=NULL, failures=0 WHERE app=? AND id=?",
                    app,
                    id,
                )
                # Its other lanes need not wait any longer.
                await tx.execute(
                    "UPDATE jobs SET due_at=? WHERE kind=? AND app=? AND key>=? AND key<? AND lease=0 AND due_at>?"
                    " AND dead_at IS NULL",
                    now,
                    LANE,
                    app,
                    f"{id}/",
                    f"{id}/\U0010ffff",
                    now,
                )
            case "failing" | "exhausted":
                due = progress.due_at or now
                row = await tx.one(
                    "UPDATE webhooks SET failures=failures+1, failing_since=coalesce(failing_since,?), paused_until=?"
                    " WHERE app=? AND id=? AND status='enabled' RETURNING failing_since",
                    now,
                    min(due, now + PAUSE_MS_MAX),
                    app,
                    id,
                )
                if row is not None and now - row[0] >= FAILING_MS:
                    await self._switch_off(tx, app, id, "failing", now)
            case "gone":
                await self._switch_off(tx, app, id, "gone", now)
            case "":
                pass

    async def _switch_off(self, tx: Tx, app: int, id: str, reason: str, now: int) -> None:
        """Disable an endpoint, and tell people: a line of the audit trail, a log line, a metric, and the app's other
        endpoints."""
        if not await _disable(tx, app, id, reason, now):
            return
        await Line(
            app, line_id(self._ids), now, "server", Action.WEBHOOK_DISABLED, f"webhook:{id}", {"reason": reason}
        ).write(tx)
        log.warning("webhook_disabled", app=app, webhook=id, why=reason)
        self._metrics.webhooks_disabled.labels(reason).value += 1
        others = await tx.all("SELECT id FROM webhooks WHERE app=? AND status='enabled'", app)
        mark = self._ids.new_id("msg_")
        await put(
            tx,
            [
                Put(NOTICE, f"{other}/{mark}", app, payload=encode({"webhook": id, "reason": reason, "at": now}))
                for (other,) in others
            ],
            now=now,
        )

    async def notify(self, app_number: int, key: str, payload: bytes, attempt: int) -> tuple[list[Attempt], int | None]:
        """Tell an endpoint that another one was disabled: what became of it, and when to try again (ms)."""
        id, message = key.split("/")
        said = msgspec.json.decode(payload)
        try:
            context = await self._apps.numbered(app_number)
            row = await self._row(context.app, id)
        except NotFound:
            return [], None
        if row[3] != "enabled":
            return [], None
        data = {"app": context.id, "webhook": said["webhook"], "reason": said["reason"]}
        body = encode(WebhookBody(type="webhook.disabled", timestamp=time_of(said["at"]), data=data))
        made = await self._post(
            context, id, _definition(row[1]).url, row[2], message, "webhook.disabled", None, None, attempt, body
        )
        if made.outcome == "delivered":
            return [made], None
        wait = wait_seconds(attempt, self._random.random())
        return [made], None if wait is None else self._clock.now_ms() + round(wait * 1_000)

    async def _post(
        self,
        context: AppContext,
        id: str,
        url: str,
        sealed: bytes,
        message: str,
        type: str,
        sid: int | None,
        seq: int | None,
        number: int,
        body: bytes,
    ) -> Attempt:
        now, began = self._clock.now_ms(), self._clock.monotonic()
        headers = self._signer(context, id, sealed, now).headers(message, now // 1_000, body)
        reply = await self._poster.post(
            url, headers=headers, body=body, seconds=TIMEOUT_SECONDS, answer_bytes_max=ANSWER_BYTES_MAX
        )
        error = reply.error
        outcome: Outcome = "failed"
        if reply.refused:
            outcome = "refused"
        elif reply.status is not None and 200 <= reply.status < 300:
            outcome = "delivered"
        elif reply.status is not None and 300 <= reply.status < 400:
            error = "redirects are not followed"
        exchange = encode(
            {
                "url": url,
                "request_headers": headers,
                "request_body": body[:LOGGED_BYTES_MAX].decode(errors="replace"),
                "response_headers": dict(reply.headers),
                "response_body": reply.body[:LOGGED_BYTES_MAX].decode(errors="replace"),
            }
        )
        delivery = f"dl_{self._ids.new_message_id()[2:]}"
        self._metrics.webhook_deliveries.labels(outcome).value += 1
        return Attempt(
            delivery,
            id,
            message,
            type,
            sid,
            seq,
            now,
            number,
            outcome,
            reply.status,
            round((self._clock.monotonic() - began) * 1_000),
            error,
            context.cipher.seal(exchange, delivery_item(delivery)),
            retry_after(reply.headers["retry-after"], now) if "retry-after" in reply.headers else None,
        )

    async def _write(self, tx: Tx, app: int, attempts: Sequence[Attempt]) -> None:
        if attempts:
            await tx.many(
                "INSERT INTO webhook_deliveries(app,webhook,id,message,type,sid,seq,at,attempt,outcome,status,"
                "milliseconds,error,sealed) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                [
                    (
                        app,
                        one.webhook,
                        one.id,
                        one.message,
                        one.type,
                        one.sid,
                        one.seq,
                        one.at,
                        one.number,
                        one.outcome,
                        one.status,
                        one.milliseconds,
                        one.error,
                        one.exchange,
                    )
                    for one in attempts
                ],
            )

    async def write(self, tx: Tx, app: int, attempts: Sequence[Attempt]) -> None:
        """Write attempts into the log. In a unit."""
        await self._write(tx, app, attempts)

    # ------------------------------------------------------------ parts

    def _message_id(self, context: AppContext, sid: int, epoch: str, seq: int) -> str:
        """The same for every attempt at an event, for ever, and nothing that could be guessed."""
        digest = context.cipher.fingerprint(f"webhook:{sid}:{epoch}:{seq}".encode())
        return "msg_" + base64.b32encode(digest[:15]).decode().lower()

    def _body(self, context: AppContext, sid: int, stream: Row, event: Any, *, content: bool) -> bytes:
        data: dict[str, Any] = {
            "app": context.id,
            "channel": stream[4],
            "channel_type": stream[5],
            "seq": event.seq,
        }
        if event.by is not None:
            data["by"] = event.by
        noun = event.type.partition(".")[0]
        if event.ref is not None and noun in ("message", "reaction"):
            data["message"] = event.ref
        elif event.ref is not None and noun == "member":
            data["user"] = event.ref
        # A channel whose key was destroyed says nothing any more.
        if content and event.sealed is not None and not event.redacted and stream[1]:
            key = WrappedStreamKey(version=stream[2], app_key_version=stream[3], wrapped=stream[1])
            cipher = self._apps.keyring.cipher(context.id, str(sid), key)
            data["event"] = msgspec.Raw(cipher.open(event.sealed, event.item.encode()))
        return encode(WebhookBody(type=event.type, timestamp=time_of(event.at), data=data))

    def _signer(self, context: AppContext, id: str, sealed: bytes, now: int) -> Signer:
        held = self._signers.get((context.app, id))
        if held is not None and held[0] == sealed and (held[1] is None or now < held[1]):
            return held[2]
        keys = [one for one in self._keys(context, id, sealed) if one.until is None or one.until > now]
        made = Signer([base64.b64decode(one.secret) for one in keys], [base64.b64decode(one.seed) for one in keys])
        ends = min((one.until for one in keys if one.until is not None), default=None)
        if len(self._signers) >= 10_000:
            self._signers.clear()
        self._signers[context.app, id] = (sealed, ends, made)
        return made

    def _keys(self, context: AppContext, id: str, sealed: bytes) -> list[_Key]:
        keys: list[_Key] = msgspec.json.decode(context.cipher.open(sealed, webhook_item(id)), type=list[_Key])
        return keys

    def _new_key(self, secret: str | None) -> _Key:
        if secret is None:
            key = self._ids.random_bytes(SECRET_BYTES)
        else:
            try:
                key = secret_bytes(secret)
            except ValueError as error:
                raise Refusal("invalid_field", str(error), field="secret") from None
        seed = self._ids.random_bytes(32)
        return _Key(base64.b64encode(key).decode(), base64.b64encode(seed).decode())

    def _check_url(self, url: str) -> None:
        if (wrong := self._poster.check(url)) is not None:
            raise Refusal("invalid_field", f"This URL cannot be used: {wrong}.", field="url")

    async def _row(self, app: int, id: str) -> Row:
        async def unit(tx: Tx) -> Row | None:
            return await tx.one(f"SELECT {_WEBHOOK} FROM webhooks WHERE app=? AND id=?", app, id)

        row = await self._store.read(unit)
        if row is None:
            raise NotFound("webhook", field="webhook")
        return row

    def _render(self, context: AppContext, row: Row) -> Webhook:
        id, text, sealed, status, reason, created_at, updated_at, failing_since, paused_until = row
        definition = _definition(text)
        newest = self._keys(context, id, sealed)[0]
        return Webhook(
            id=id,
            url=definition.url,
            description=definition.description,
            events=list(definition.events),
            channel_types=list(definition.channel_types),
            content=definition.content,
            status=status,
            reason=reason,
            created_at=time_of(created_at),
            updated_at=time_of(updated_at),
            failing_since=None if failing_since is None else time_of(failing_since),
            paused_until=None if paused_until is None else time_of(paused_until),
            public_key=public_text(base64.b64decode(newest.seed)),
        )

    def _line(self, actor: Actor, action: Action, id: str, **detail: Any) -> Line:
        return line_of(actor, action, f"webhook:{id}", line_id(self._ids), self._clock.now_ms(), **detail)


_WEBHOOK: Final = "id,definition,sealed,status,reason,created_at,updated_at,failing_since,paused_until"
_DELIVERY: Final = "id,webhook,message,type,at,attempt,outcome,status,milliseconds,error"


def _delivery(row: Row) -> WebhookDelivery:
    return WebhookDelivery(
        id=row[0],
        webhook=row[1],
        message=row[2],
        type=row[3],
        at=time_of(row[4]),
        attempt=row[5],
        outcome=row[6],
        status=row[7],
        milliseconds=row[8],
        error=row[9],
    )


def _exchange(context: AppContext, attempt: Attempt | WebhookDelivery, sealed: bytes) -> WebhookExchange:
    if isinstance(attempt, Attempt):
        attempt = _delivery(
            (
                attempt.id,
                attempt.webhook,
                attempt.message,
                attempt.type,
                attempt.at,
                attempt.number,
                attempt.outcome,
                attempt.status,
                attempt.milliseconds,
                attempt.error,
            )
        )
    said = msgspec.json.decode(context.cipher.open(sealed, delivery_item(attempt.id)))
    return WebhookExchange(delivery=attempt, **said)


async def _disable(tx: Tx, app: int, id: str, reason: str, now: int) -> bool:
    """Whether it was enabled before. What waits is given up: once it is enabled again, it hears of what happens
    then."""
    changed = await tx.execute(
        "UPDATE webhooks SET status='disabled', reason=?, updated_at=? WHERE app=? AND id=? AND status='enabled'",
        reason,
        now,
        app,
        id,
    )
    if changed:
        await cancel_beginning(tx, LANE, app, f"{id}/")
        await cancel_beginning(tx, NOTICE, app, f"{id}/")
    return changed > 0


async def _bounds(tx: Tx, app: int, sid: int, since: int, until: int) -> tuple[int, int]:
    """The first and the last event of a stream from `since` on and before `until`, ms: times grow with `seq`, but for
    clocks that were set back. Found by halving."""
    row = await tx.one("SELECT head, floor FROM streams WHERE sid=?", sid)
    if row is None:
        return 1, 0
    head, floor = int(row[0]), int(row[1])

    async def first_at(moment: int) -> int:
        low, high = floor + 1, head + 1
        while low < high:
            middle = (low + high) // 2
            events = await event_log.events_after(tx, app, sid, middle - 1, 1)
            if events and events[0].at < moment:
                low = int(events[0].seq) + 1
            else:
                high = middle
        return low

    return await first_at(since), await first_at(until) - 1
