"""The audit trail: who changed what, when. Identifiers only; no line holds anything that somebody wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from tidings.server.clock import Ids
from tidings.server.store import log
from tidings.server.store.base import Row, Tx
from tidings.wire.codec import encode
from tidings.wire.ids import time_of
from tidings.wire.resources import AuditEntry

from .access import Actor


class Action(StrEnum):
    """What the trail can tell, in one list."""

    APP_CREATED = "app.created"
    APP_UPDATED = "app.updated"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    APP_KEY_ROTATED = "app_key.rotated"
    APP_KEY_RETIRED = "app_key.retired"
    SIGNING_KEY_CREATED = "signing_key.created"
    SIGNING_KEY_RETIRED = "signing_key.retired"
    PROVIDER_CREATED = "identity_provider.created"
    PROVIDER_DELETED = "identity_provider.deleted"
    ROLE_PUT = "role.put"
    ROLE_DELETED = "role.deleted"
    TYPE_PUT = "channel_type.put"
    TYPE_DELETED = "channel_type.deleted"
    RELATION_PUT = "relation.put"
    RELATION_DELETED = "relation.deleted"
    TOKEN_MINTED = "token.minted"  # noqa: S105 - an action's name, not a secret
    TOKENS_REVOKED = "token.revoked"
    USER_ROLE_CHANGED = "user.role_changed"
    USER_DEACTIVATED = "user.deactivated"
    USER_REACTIVATED = "user.reactivated"
    USER_DELETED = "user.deleted"
    CHANNEL_DELETED = "channel.deleted"
    MEMBER_ROLE_CHANGED = "member.role_changed"
    MEMBER_REMOVED = "member.removed"
    PUSH_PROVIDER_PUT = "push_provider.put"
    PUSH_PROVIDER_DELETED = "push_provider.deleted"
    WEBHOOK_CREATED = "webhook.created"
    WEBHOOK_UPDATED = "webhook.updated"
    WEBHOOK_DELETED = "webhook.deleted"
    WEBHOOK_ROTATED = "webhook.rotated"
    WEBHOOK_REPLAYED = "webhook.replayed"
    WEBHOOK_DISABLED = "webhook.disabled"
    PRESEND_PUT = "presend_hook.put"
    PRESEND_DELETED = "presend_hook.deleted"
    JOBS_RETRIED = "job.retried"
    JOB_DROPPED = "job.dropped"


@dataclass(slots=True, frozen=True)
class Line:
    """One line of the trail, made before the unit that writes it. `actor`: `key:<id>`, `user:<id>` or `cli`."""

    app: int
    id: str
    at: int
    actor: str
    action: Action
    target: str
    detail: dict[str, Any] = field(default_factory=dict)

    async def write(self, tx: Tx) -> None:
        """Add it to the trail, in the transaction of what it tells of."""
        await log.write_audit(
            tx,
            app=self.app,
            id=self.id,
            at=self.at,
            actor=self.actor,
            action=self.action.value,
            target=self.target,
            detail=encode(self.detail).decode(),
        )


def line_id(ids: Ids) -> str:
    """An id for a line: later ones of this process sort behind earlier ones, also within one millisecond."""
    return f"au_{ids.new_message_id()[2:]}"


def line_of(actor: Actor, action: Action, target: str, id: str, at: int, **detail: Any) -> Line:
    """What `actor` is about to do. A key that acts for a user is named as the actor, the user in the detail."""
    if actor.user is not None and actor.via.startswith("key:"):
        detail["for_user"] = actor.user
    return Line(actor.app.app, id, at, actor.via, action, target, detail)


async def lines_before(
    tx: Tx,
    app: int,
    *,
    actor: str | None,
    action: str | None,
    target: str | None,
    since: int | None,
    until: int | None,
    before: tuple[int, str] | None,
    limit: int,
) -> list[Row]:
    """Rows (at, id, actor, action, target, detail), newest first, from before the position `before` (at, id).

    `since` is inclusive and `until` exclusive, ms; the other filters match whole values.
    """
    conditions: list[str] = ["app=?"]
    values: list[Any] = [app]
    filters: tuple[tuple[str, Any], ...] = (
        ("actor=?", actor),
        ("action=?", action),
        ("target=?", target),
        ("at>=?", since),
        ("at<?", until),
    )
    for condition, value in filters:
        if value is not None:
            conditions.append(condition)
            values.append(value)
    if before is not None:
        conditions.append("(at,id)<(?,?)")
        values += before
    return await tx.all(
        "SELECT at,id,actor,action,target,detail FROM audit WHERE "
        + " AND ".join(conditions)
        + " ORDER BY at DESC, id DESC LIMIT ?",
        *values,
        limit,
    )


def entry_of(row: Row) -> AuditEntry:
    """A row of `lines_before` as the API shows it."""
    at, id, actor, action, target, detail = row
    return AuditEntry(
        id=id, at=time_of(at), actor=actor, action=action, target=target, detail=msgspec.json.decode(detail)
    )
