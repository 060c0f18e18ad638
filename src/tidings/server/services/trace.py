"""Where is my message? What is known of its way, put together when somebody asks.

Nothing is written down for this beyond what the work needs anyway: the message's row, devices' positions, the logs of
pushes and webhooks, and the jobs that are still to be done. It opens nothing that is sealed, so it cannot show content.
"""

from __future__ import annotations

from typing import Any, Final

from tidings.server.bus.base import Bus
from tidings.server.domain.permissions import Permission
from tidings.server.errors import NotFound
from tidings.server.store.base import BACKEND, Row, Store, Tx
from tidings.server.store.log import placeholders
from tidings.wire.ids import time_of
from tidings.wire.trace import (
    MessageTrace,
    TracedDelivery,
    TracedDevice,
    TracedPush,
    TracedRecipient,
    TracedWork,
)

from .access import Actor
from .paging import make_cursor, read_cursor

# Attempts shown: a schedule of eight for a few webhooks, and replays.
DELIVERIES_MAX: Final = 200
# Decisions and attempts shown per page of recipients.
PUSHES_MAX: Final = 1_000
WORK_MAX: Final = 100


class Trace:
    """Answers what became of a message. Needs `trace.read`, which shows nothing that was said."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self._store = store
        self._bus = bus

    async def message(
        self,
        actor: Actor,
        message_id: str,
        channel_id: str | None = None,
        *,
        user: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> MessageTrace:
        """The trace of a message, with recipients in order of user: one page of them, or one `user`. Without a channel
        the message is looked for in the whole app. Raises Forbidden, NotFound."""
        actor.check(Permission.TRACE_READ)
        app = actor.app.app
        listing = ["trace", message_id]
        after = "" if cursor is None else read_cursor(actor.app, listing, cursor, tuple[str])[0]

        async def unit(tx: Tx) -> dict[str, Any]:
            return await _gather(tx, app, message_id, channel_id, user, after, limit)

        found = await self._store.read(unit)
        users = [row[0] for row in found["members"][:limit]]
        connected = await self._bus.connected_devices(app, users) if users else set()
        more = make_cursor(actor.app, listing, [users[-1]]) if len(found["members"]) > limit else None
        return _render(found, connected, limit, more)


async def _gather(
    tx: Tx, app: int, message_id: str, channel_id: str | None, user: str | None, after: str, limit: int
) -> dict[str, Any]:
    message = await tx.one(
        "SELECT m.sid,m.seq,m.sender,m.at,m.edited_at,m.deleted_at,c.id,c.member_count FROM messages m"
        " JOIN channels c ON c.sid=m.sid WHERE m.app=? AND m.id=? AND c.app=m.app",
        app,
        message_id,
    )
    if message is None or (channel_id is not None and message[6] != channel_id):
        raise NotFound("message", field="message")
    sid, seq = message[0], message[1]
    members = await tx.all(
        "SELECT m.user,m.delivered,m.read,m.joined_seq FROM members m WHERE m.app=? AND m.sid=? AND m.user>?"
        + (" AND m.user=?" if user is not None else "")
        + " ORDER BY m.user LIMIT ?",
        app,
        sid,
        after,
        *(() if user is None else (user,)),
        limit + 1,
    )
    if user is not None and not members:
        raise NotFound("member", field="user")
    users = [row[0] for row in members[:limit]]
    devices: list[Row] = []
    tokens: list[Row] = []
    pushes: list[Row] = []
    if users:
        some = placeholders(users)
        devices = await tx.all(
            "SELECT d.user,d.id,d.platform,p.seq,p.at FROM devices d LEFT JOIN device_positions p"
            " ON p.app=d.app AND p.user=d.user AND p.device=d.id AND p.sid=?"
            f" WHERE d.app=? AND d.user IN ({some}) ORDER BY d.user,d.id",
            sid,
            app,
            *users,
        )
        tokens = await tx.all(
            f"SELECT t.user,t.device,t.provider FROM push_tokens t WHERE t.app=? AND t.user IN ({some})"
            " ORDER BY t.user,t.device,t.provider",
            app,
            *users,
        )
        pushes = await tx.all(
            "SELECT p.user,p.device,p.at,p.outcome,p.reason,p.provider,p.detail FROM push_log p"
            f" WHERE p.app=? AND p.sid=? AND p.seq=? AND p.user IN ({some}) ORDER BY p.id LIMIT ?",
            app,
            sid,
            seq,
            *users,
            PUSHES_MAX,
        )
    everybody = await tx.all(
        "SELECT p.user,p.device,p.at,p.outcome,p.reason,p.provider,p.detail FROM push_log p"
        " WHERE p.app=? AND p.sid=? AND p.seq=? AND p.user='' ORDER BY p.id LIMIT ?",
        app,
        sid,
        seq,
        PUSHES_MAX,
    )
    deliveries = await tx.all(
        "SELECT webhook,id,message,type,at,attempt,outcome,status,milliseconds,error FROM webhook_deliveries"
        " WHERE app=? AND sid=? AND seq=? ORDER BY id LIMIT ?",
        app,
        sid,
        seq,
        DELIVERIES_MAX,
    )
    webhooks = [row[0] for row in await tx.all("SELECT id FROM webhooks WHERE app=?", app)]
    work = await _work(tx, app, sid, seq, webhooks)
    waiting = await tx.one("SELECT 1 FROM outbox WHERE app=? AND sid=? AND seq=? LIMIT 1", app, sid, seq)
    return {
        "message": (message_id, *message),
        "members": members,
        "devices": devices,
        "tokens": tokens,
        "pushes": pushes,
        "everybody": everybody,
        "deliveries": deliveries,
        "work": work,
        "handed_on": waiting is None,
    }


async def _work(tx: Tx, app: int, sid: int, seq: int, webhooks: list[str]) -> list[Row]:
    """Jobs about the channel or the message: (kind, what of it, due_at, lease, attempts, error, dead_at)."""
    # Their keys are made where the jobs are put: jobs/webhooks.py, jobs/push.py.
    wanted = [("webhook", f"{webhook}/{sid}", webhook) for webhook in webhooks]
    wanted.append(("push.decide", f"{sid}", ""))
    found = []
    for kind, key, target in wanted[:WORK_MAX]:
        row = await tx.one(
            "SELECT due_at,lease,attempts,error,dead_at FROM jobs WHERE kind=? AND app=? AND key=?", kind, app, key
        )
        if row is not None:
            found.append((kind, target, *row))
    begin = f"{sid}/{seq}/"
    rows = await tx.all(
        "SELECT key,due_at,lease,attempts,error,dead_at FROM jobs WHERE kind='push.send' AND app=? AND key>=? AND key<?"
        " ORDER BY key LIMIT ?",
        app,
        begin,
        begin + "\U0010ffff",
        WORK_MAX,
    )
    found += [("push.send", row[0].removeprefix(begin), *row[1:]) for row in rows]
    return found


def _render(found: dict[str, Any], connected: set[tuple[str, str]], limit: int, more: str | None) -> MessageTrace:
    id, _sid, seq, sender, at, edited_at, deleted_at, channel, members = found["message"]
    woken: dict[tuple[str, str], list[str]] = {}
    for user, device, provider in found["tokens"]:
        woken.setdefault((user, device), []).append(provider)
    devices: dict[str, list[TracedDevice]] = {}
    for user, device, platform, position, moved_at in found["devices"]:
        devices.setdefault(user, []).append(
            TracedDevice(
                id=device,
                platform=platform,
                connected=(user, device) in connected,
                position=position or 0,
                acknowledged=(position or 0) >= seq,
                acknowledged_at=time_of(moved_at) if (position or 0) >= seq else None,
                push_tokens=woken.get((user, device), []),
            )
        )
    pushes: dict[str, list[TracedPush]] = {}
    for row in found["pushes"]:
        pushes.setdefault(row[0], []).append(_push(row))
    return MessageTrace(
        message=id,
        channel=channel,
        seq=seq,
        sender=None if sender == BACKEND else sender,
        accepted_at=time_of(at),
        handed_on=found["handed_on"],
        edited_at=None if edited_at is None else time_of(edited_at),
        deleted_at=None if deleted_at is None else time_of(deleted_at),
        members=members,
        push=[_push(row) for row in found["everybody"]],
        webhooks=[
            TracedDelivery(
                webhook=row[0],
                id=row[1],
                message=row[2],
                type=row[3],
                at=time_of(row[4]),
                attempt=row[5],
                outcome=row[6],
                status=row[7],
                milliseconds=row[8],
                error=row[9],
            )
            for row in found["deliveries"]
        ],
        work=[
            TracedWork(
                kind=kind,
                target=target,
                state="dead" if dead_at is not None else "working" if lease else "waiting",
                due_at=time_of(due_at),
                attempts=attempts,
                error=error,
            )
            for kind, target, due_at, lease, attempts, error, dead_at in found["work"]
        ],
        recipients=[
            TracedRecipient(
                user=user,
                delivered=delivered >= seq,
                read=read >= seq,
                devices=devices.get(user, []),
                push=pushes.get(user, []),
            )
            for user, delivered, read, joined in found["members"][:limit]
            if user != sender and joined < seq
        ],
        next=more,
    )


def _push(row: Row) -> TracedPush:
    return TracedPush(
        at=time_of(row[2]), device=row[1] or None, outcome=row[3], reason=row[4], provider=row[5], detail=row[6]
    )
