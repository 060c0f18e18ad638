"""The pre-send hook: an app's endpoint approves, changes or refuses each message before it is stored.

It is asked after the sender's right to send was found and before anything is written, outside of any transaction; what
has changed meanwhile is noticed by the append's access version. A message that is stored is not asked about again: a
retry gets its first result. What the hook makes of a text is stored, and the retry is still known by what its sender
wrote.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tidings.server.bus.base import AccessChanged
from tidings.server.clock import Clock, Ids
from tidings.server.domain.breaker import Breaker
from tidings.server.domain.permissions import Permission
from tidings.server.domain.standard_webhooks import SECRET_BYTES, Signer, secret_text
from tidings.server.errors import NotFound, Refusal
from tidings.server.posting import Posted, Poster
from tidings.server.store.base import Row, Store, Tx
from tidings.server.telemetry import Metrics, get_logger
from tidings.wire.codec import encode
from tidings.wire.ids import time_of
from tidings.wire.presend import (
    OnFailure,
    PresendAnswer,
    PresendAsked,
    PresendHook,
    PresendHookPut,
    PresendTest,
    PresendTried,
)
from tidings.wire.resources import Attachment
from tidings.wire.webhooks import WebhookBody

from .access import Access, Actor
from .apps import AppContext, Apps, PresendRule
from .audit import Action, line_id, line_of
from .change import Change, Changes
from .waking import PRESEND_ITEM

log = get_logger(__name__)
P = Permission

BEFORE_SEND: Final = "message.before_send"
BEFORE_EDIT: Final = "message.before_edit"
# An answer holds a message at the most.
ANSWER_BYTES_MAX: Final = 256 << 10
# Questions of an app under way at once, per node: senders wait for them.
UNDER_WAY_MAX: Final = 64
# When to come back if there was no answer, ms.
RETRY_MS: Final = 2_000

_decode_answer: Final = msgspec.json.Decoder(PresendAnswer).decode


@dataclass(slots=True, frozen=True)
class Content:
    """What somebody is about to say, as the hook may change it."""

    text: str
    mentions: list[str]
    attachments: list[Attachment]
    custom: dict[str, Any]

    def changes(self, before: Content) -> dict[str, Any]:
        """What is different from before, by name."""
        names = ("text", "mentions", "attachments", "custom")
        return {name: value for name in names if (value := getattr(self, name)) != getattr(before, name)}


class _State:
    """One app's hook on this node."""

    __slots__ = ("breaker", "signer", "under_way", "version")

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.under_way = 0
        self.version = -1
        self.signer: Signer | None = None


class Presend:
    """Asks."""

    def __init__(self, poster: Poster, clock: Clock, ids: Ids, metrics: Metrics) -> None:
        self._poster = poster
        self._clock = clock
        self._ids = ids
        self._metrics = metrics
        self._states: dict[int, _State] = {}

    async def ask(
        self,
        access: Access,
        content: Content,
        type: str,
        *,
        message: str | None = None,
        mention_all: bool = False,
        reply_to: str | None = None,
    ) -> Content:
        """What is to be stored in place of `content`; `message` is the one that is edited. Raises Refusal
        `message_refused` with the app's reason, or `hook_unavailable`."""
        app = access.actor.app
        asked = PresendAsked(
            app=app.id,
            channel=access.channel.id,
            channel_type=access.channel.type.definition.name,
            user=access.actor.user,
            message=message,
            text=content.text,
            mentions=content.mentions,
            mention_all=mention_all,
            reply_to=reply_to,
            attachments=content.attachments,
            custom=content.custom,
        )
        rule = app.presend
        assert rule is not None
        state = self._states.setdefault(app.app, _State())
        answer: PresendAnswer | None = None
        if state.under_way >= UNDER_WAY_MAX or not state.breaker.may_ask(self._clock.monotonic()):
            self._count("skipped")
        else:
            answer, posted = await self._post(app, rule, state, asked, type)
            if answer is None:
                log.warning("presend_failed", app=app.id, channel=asked.channel, status=posted.status)
        if answer is None:
            if rule.definition.on_failure == "allow":
                return content
            raise Refusal(
                "hook_unavailable",
                "The app looks at messages before they are sent, and could not be asked. Nothing was stored.",
                retry_after_ms=RETRY_MS,
            )
        match answer.action:
            case "allow":
                self._count("allowed")
                return content
            case "change":
                self._count("changed")
                return Content(
                    content.text if answer.text is None else answer.text,
                    content.mentions if answer.mentions is None else list(answer.mentions),
                    content.attachments if answer.attachments is None else list(answer.attachments),
                    content.custom if answer.custom is None else answer.custom,
                )
            case "refuse":
                self._count("refused")
                raise Refusal("message_refused", answer.reason or "The app does not let this message through.")

    async def _post(
        self, app: AppContext, rule: PresendRule, state: _State, asked: PresendAsked, type: str
    ) -> tuple[PresendAnswer | None, Posted]:
        if state.version != rule.version or state.signer is None:
            secrets = msgspec.json.decode(app.cipher.open(rule.sealed, PRESEND_ITEM), type=list[str])
            state.signer = Signer([base64.b64decode(secret) for secret in secrets])
            state.version = rule.version
        now = self._clock.now_ms()
        body = encode(WebhookBody(type=type, timestamp=time_of(now), data=msgspec.to_builtins(asked)))
        headers = state.signer.headers(self._ids.new_id("msg_"), now // 1_000, body)
        state.under_way += 1
        answered = False
        began = self._clock.monotonic()
        try:
            posted = await self._poster.post(
                rule.definition.url,
                headers=headers,
                body=body,
                seconds=rule.definition.timeout_ms / 1_000,
                answer_bytes_max=ANSWER_BYTES_MAX,
            )
            answered = True
        finally:
            state.under_way -= 1
            if not answered:
                state.breaker.gave_up()
        self._metrics.presend_seconds.observe(self._clock.monotonic() - began)
        answer = None
        if posted.status == 200:
            try:
                answer = _decode_answer(posted.body)
            except (msgspec.DecodeError, msgspec.ValidationError):
                answer = None
        if answer is None:
            self._count("failed")
            state.breaker.failed(self._clock.monotonic())
        else:
            state.breaker.succeeded()
        return answer, posted

    async def try_out(self, app: AppContext, asked: PresendAsked) -> tuple[PresendAnswer | None, Posted, int]:
        """Ask now, whatever the breaker says: the answer, what came, and how long it took, ms."""
        rule = app.presend
        assert rule is not None
        began = self._clock.monotonic()
        answer, posted = await self._post(app, rule, self._states.setdefault(app.app, _State()), asked, BEFORE_SEND)
        return answer, posted, round((self._clock.monotonic() - began) * 1_000)

    def _count(self, outcome: str) -> None:
        self._metrics.presend.labels(outcome).value += 1


def applies(access: Access) -> bool:
    """Whether the app wants to be asked about what is said here by whom."""
    rule = access.actor.app.presend
    return rule is not None and rule.applies(access.channel.type.definition.name, backend=access.actor.user is None)


class PresendHooks:
    """Use-cases of whoever sets the hook up. All need `hook.manage`."""

    def __init__(
        self, store: Store, apps: Apps, changes: Changes, presend: Presend, poster: Poster, clock: Clock, ids: Ids
    ) -> None:
        self._store = store
        self._apps = apps
        self._changes = changes
        self._presend = presend
        self._poster = poster
        self._clock = clock
        self._ids = ids

    async def get(self, actor: Actor) -> PresendHook:
        """The hook, without its secret. Raises NotFound."""
        actor.check(P.HOOK_MANAGE)
        row = await self._row(actor.app.app)
        return _render(row[0], row[2])

    async def put(self, actor: Actor, wanted: PresendHookPut) -> PresendHook:
        """Set it up, or anew; the secret is in the answer when one is made. Raises Refusal naming the field."""
        actor.check(P.HOOK_MANAGE)
        context = await self._apps.get(actor.app.id)
        if (wrong := self._poster.check(wanted.url)) is not None:
            raise Refusal("invalid_field", f"This URL cannot be used: {wrong}.", field="url")
        now = self._clock.now_ms()
        line = line_of(actor, Action.PRESEND_PUT, "presend_hook", line_id(self._ids), now)
        definition = encode(
            {
                name: getattr(wanted, name)
                for name in ("url", "timeout_ms", "on_failure", "channel_types", "include_backend", "enabled")
            }
        ).decode()
        new = self._ids.random_bytes(SECRET_BYTES)

        async def unit(tx: Tx) -> Change[bool]:
            row = await tx.one("SELECT sealed,updated_at FROM presend_hooks WHERE app=?" + tx.for_update, context.app)
            secrets = (
                [] if row is None else msgspec.json.decode(context.cipher.open(row[0], PRESEND_ITEM), type=list[str])
            )
            made = not secrets or wanted.rotate
            kept = [base64.b64encode(new).decode(), *secrets[:1]] if made else secrets[:1]
            # Grows with every change, also within a millisecond: nodes tell by it that theirs is old.
            at = now if row is None or row[1] < now else row[1] + 1
            await tx.execute(
                "INSERT INTO presend_hooks(app,definition,sealed,updated_at) VALUES (?,?,?,?)"
                " ON CONFLICT (app) DO UPDATE SET definition=excluded.definition, sealed=excluded.sealed,"
                " updated_at=excluded.updated_at",
                context.app,
                definition,
                context.cipher.seal(encode(kept), PRESEND_ITEM),
                at,
            )
            await line.write(tx)
            return Change(made, (AccessChanged(context.app),))

        made = await self._changes.run(unit)
        shown = _render(definition, now)
        return msgspec.structs.replace(shown, secret=secret_text(new)) if made else shown

    async def delete(self, actor: Actor) -> None:
        """Ask no more. Raises NotFound."""
        actor.check(P.HOOK_MANAGE)
        app = actor.app.app
        line = line_of(actor, Action.PRESEND_DELETED, "presend_hook", line_id(self._ids), self._clock.now_ms())

        async def unit(tx: Tx) -> Change[None]:
            if not await tx.execute("DELETE FROM presend_hooks WHERE app=?", app):
                raise NotFound("pre-send hook")
            await line.write(tx)
            return Change(None, (AccessChanged(app),))

        await self._changes.run(unit)

    async def test(self, actor: Actor, wanted: PresendTest) -> PresendTried:
        """Ask about a text now; nothing is stored. Raises NotFound."""
        actor.check(P.HOOK_MANAGE)
        await self._row(actor.app.app)
        app = await self._apps.get(actor.app.id)
        if app.presend is None:
            raise Refusal("conflict", "The hook is disabled: enable it first.")
        asked = PresendAsked(app=app.id, channel="test", channel_type="test", text=wanted.text)
        answer, posted, took = await self._presend.try_out(app, asked)
        if answer is None:
            error = posted.error or "the answer is not 200 with an action"
            return PresendTried(outcome="failed", status=posted.status, milliseconds=took, error=error)
        outcomes: dict[str, Any] = {"allow": "allowed", "change": "changed", "refuse": "refused"}
        return PresendTried(
            outcome=outcomes[answer.action],
            status=posted.status,
            milliseconds=took,
            reason=answer.reason or None,
            text=answer.text,
        )

    async def _row(self, app: int) -> Row:
        async def unit(tx: Tx) -> Row | None:
            return await tx.one("SELECT definition,sealed,updated_at FROM presend_hooks WHERE app=?", app)

        row = await self._store.read(unit)
        if row is None:
            raise NotFound("pre-send hook")
        return row


def _render(definition: str, updated_at: int) -> PresendHook:
    said = msgspec.json.decode(definition)
    return PresendHook(**said, updated_at=time_of(updated_at))


__all__ = ["OnFailure", "Presend", "PresendHooks", "applies"]
