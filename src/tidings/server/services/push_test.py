"""Would this device be woken? The questions that decide it, one by one, with their answers, and a test push."""

from __future__ import annotations

import msgspec

from tidings.server.bus.base import Bus
from tidings.server.clock import Clock, Ids
from tidings.server.domain.notify import Facts, Reason, decide, quiet_until, wishes_of
from tidings.server.domain.permissions import Permission
from tidings.server.domain.templates import choose, fill
from tidings.server.errors import NotFound
from tidings.server.push.base import Notification
from tidings.server.store.base import Row, Store, Tx
from tidings.wire.ids import time_of
from tidings.wire.notifications import (
    NotificationPreferences,
    PushTest,
    PushTestDevice,
    PushTestResult,
    PushTestStep,
)

from .access import Actor
from .apps import AppContext, Apps
from .push import Push


class PushTester:
    """Explains, and tries. Needs `push.manage`."""

    def __init__(self, store: Store, apps: Apps, bus: Bus, push: Push, clock: Clock, ids: Ids) -> None:
        self._store = store
        self._apps = apps
        self._bus = bus
        self._push = push
        self._clock = clock
        self._ids = ids

    async def test(self, actor: Actor, wanted: PushTest) -> PushTestResult:
        """What would become of a message for this user that came now, per device and provider. Raises NotFound."""
        actor.check(Permission.PUSH_MANAGE)
        app = await self._apps.get(actor.app.id)
        user = wanted.user

        async def unit(tx: Tx) -> tuple[Row, list[Row], list[Row], list[Row], list[Row], Row | None]:
            person = await tx.one(
                "SELECT deactivated_at FROM users WHERE app=? AND id=? AND deleted_at IS NULL", app.app, user
            )
            if person is None:
                raise NotFound("user", field="user")
            channel = None
            if wanted.channel is not None:
                channel = await tx.one(
                    "SELECT c.sid,m.muted_until,c.member_count FROM channels c"
                    " JOIN members m ON m.app=c.app AND m.sid=c.sid AND m.user=? WHERE c.app=? AND c.id=?",
                    user,
                    app.app,
                    wanted.channel,
                )
                if channel is None:
                    raise NotFound("member", field="channel")
            devices = await tx.all("SELECT d.id FROM devices d WHERE d.app=? AND d.user=? ORDER BY d.id", app.app, user)
            tokens = await tx.all(
                "SELECT t.device,t.provider,t.sealed,t.language FROM push_tokens t WHERE t.app=? AND t.user=?"
                " ORDER BY t.device,t.provider",
                app.app,
                user,
            )
            providers = await tx.all(
                "SELECT id,status,error,sealed,updated_at FROM push_providers WHERE app=? ORDER BY id", app.app
            )
            preferences = await tx.all(
                "SELECT p.device,p.sid,p.definition FROM notification_preferences p"
                " WHERE p.app=? AND p.user=? AND p.sid IN (0,?)",
                app.app,
                user,
                channel[0] if channel is not None else 0,
            )
            return person, devices, tokens, providers, preferences, channel

        person, devices, tokens, providers, stored, channel = await self._store.read(unit)
        connected = await self._bus.connected_devices(app.app, (user,))
        names = [row[0] for row in devices]
        if wanted.device is not None:
            if wanted.device not in names:
                raise NotFound("device", field="device")
            names = [wanted.device]
        known = {row[0]: row for row in providers}
        said = {
            (device, sid != 0): msgspec.json.decode(text, type=NotificationPreferences) for device, sid, text in stored
        }
        found = []
        everywhere: list[str | None] = [*names]
        for device in everywhere or [None]:
            mine: list[Row | None] = [row for row in tokens if row[0] == device]
            for token in mine or [None]:
                steps = self._steps(app, user, device, token, person, known, said, connected, channel)
                sent = None
                if wanted.send and token is not None and token[1] in known and known[token[1]][1] == "enabled":
                    sent = await self._send(app, user, token, known[token[1]])
                found.append(
                    PushTestDevice(
                        device=device,
                        provider=None if token is None else token[1],
                        would_wake=all(step.passed for step in steps),
                        steps=steps,
                        sent=sent,
                    )
                )
        return PushTestResult(user=user, devices=found)

    def _steps(
        self,
        app: AppContext,
        user: str,
        device: str | None,
        token: Row | None,
        person: Row,
        providers: dict[str, Row],
        said: dict[tuple[str, bool], NotificationPreferences],
        connected: set[tuple[str, str]],
        channel: Row | None,
    ) -> list[PushTestStep]:
        now = self._clock.now_ms()
        settings = app.settings.push
        steps: list[PushTestStep] = []

        def step(question: str, passed: bool, answer: str) -> None:
            steps.append(PushTestStep(question=question, passed=passed, answer=answer))

        active = person[0] is None
        step("Is the user active?", active, "yes" if active else "no, they are deactivated")
        enabled = [id for id, row in providers.items() if row[1] == "enabled"]
        step("Has the app a push provider?", bool(enabled), ", ".join(enabled) or "none that is enabled")
        step("Has the user a device?", device is not None, device or "none has ever connected or told a token")
        if token is None:
            step("Has the device told a push token?", False, "no: the app on it has to register one")
        else:
            step("Has the device told a push token?", True, f"yes, for {token[1]}")
            provider = providers.get(token[1])
            status = "not set up" if provider is None else provider[1]
            error = "" if provider is None or not provider[2] else f": it answered {provider[2]}"
            step(f"Does the provider {token[1]} work?", status == "enabled", status + error)
        wishes = wishes_of(said, device or "")
        muted = channel is not None and channel[1] is not None and channel[1] > now
        if channel is not None:
            step(
                "Is the channel muted?", not muted, f"until {time_of(channel[1]):%Y-%m-%d %H:%M} UTC" if muted else "no"
            )
            large = channel[2] > settings.members_max
            step(
                "Is the channel small enough?",
                not large,
                f"{channel[2]} members; beyond {settings.members_max} only mentions are pushed"
                if large
                else f"yes, {channel[2]} members",
            )
        level = wishes.level(settings.default_level)
        step("Do they want every message?", level == "all", f"the level is {level}")
        verdict = decide(Facts(mentions=True), wishes, "all", now)
        snoozed = verdict.reason is Reason.SNOOZED
        until = max(
            (one.snoozed_until for one in (wishes.device, wishes.everywhere) if one.snoozed_until is not None),
            default=None,
        )
        step("Have they snoozed?", not snoozed, f"until {until:%Y-%m-%d %H:%M} UTC" if snoozed and until else "no")
        hours = wishes.device.quiet_hours or wishes.everywhere.quiet_hours
        ends = None if hours is None else quiet_until(hours, now)
        if hours is None or ends is None:
            step("Is it quiet time?", True, "no")
        else:
            shown = f"until {time_of(ends):%Y-%m-%d %H:%M} UTC ({hours.start} to {hours.end} in {hours.timezone})"
            step(
                "Is it quiet time?",
                hours.mode == "silent",
                shown + (", without a sound" if hours.mode == "silent" else ""),
            )
        here = device is not None and (user, device) in connected
        step(
            "Is the device away?",
            not here,
            "no, it is connected: it gets messages at once"
            if here
            else f"yes: it is woken {settings.grace_seconds} s after a message that it has not acknowledged",
        )
        return steps

    async def _send(self, app: AppContext, user: str, token: Row, provider: Row) -> str:
        device, id, sealed, language = token
        template = choose(app.settings.push.templates, "message", language)
        values = {"app": app.name, "count": "1"}
        mark = self._ids.new_id("test_")
        outcome = await self._push.try_out(
            app,
            id,
            provider[3],
            provider[4],
            sealed,
            user,
            device,
            Notification(
                id=mark,
                title=fill(template.title, values),
                body=fill(template.body, values),
                data={"app": app.id, "event": "test"},
                sound=app.settings.push.sound,
                ttl_seconds=300,
            ),
        )
        return f"{outcome.kind}: {outcome.reason}" + ("" if outcome.status is None else f" ({outcome.status})")
