"""Where people can be woken, what they want to be told of, and how an app reaches its push providers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from tidings.server.bus.base import AccessChanged
from tidings.server.clock import Clock, Ids
from tidings.server.domain.notify import zone
from tidings.server.domain.permissions import Permission
from tidings.server.domain.templates import CONTENT_VARIABLES, unknown_name
from tidings.server.errors import NotFound, Refusal
from tidings.server.push.base import Providers
from tidings.server.store.base import Row, Store, Tx
from tidings.wire.codec import encode
from tidings.wire.events import EventType, NotificationsUpdated
from tidings.wire.ids import time_of
from tidings.wire.notifications import (
    TOKENS_PER_USER_MAX,
    ChannelNotifications,
    NotificationPreferences,
    PushProvider,
    PushProviderPut,
    PushSettings,
    PushToken,
    PushTokenPut,
    WebPushKey,
)
from tidings.wire.push import PushConfig, WebPushConfig, with_secrets_of, without_secrets

from .access import AccessService, Actor
from .apps import Apps
from .audit import Action, line_id, line_of
from .change import Change, Changes
from .streams import record_own, user_streams, with_keys
from .waking import provider_item, token_item

P = Permission

# A phone each, a browser, mail and text messages, for a few brands.
PROVIDERS_MAX: Final = 20
# Devices that hold preferences of their own, and channels: more than anybody sets by hand.
PREFERENCES_PER_USER_MAX: Final = 2_000


class Notifications:
    """Use-cases of tokens, preferences and providers."""

    def __init__(
        self,
        store: Store,
        apps: Apps,
        access: AccessService,
        changes: Changes,
        providers: Providers,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._store = store
        self._apps = apps
        self._access = access
        self._changes = changes
        self._providers = providers
        self._clock = clock
        self._ids = ids

    # ------------------------------------------------------------ where people can be woken

    async def tokens(self, actor: Actor, user: str) -> list[PushToken]:
        """Where a user can be woken, without the tokens: oneself, or anybody with `device.manage_any`."""
        _check_own(actor, user)
        app = actor.app.app

        async def unit(tx: Tx) -> list[Row]:
            await _check_user(tx, app, user)
            return await tx.all(
                "SELECT t.device,t.provider,t.language,t.created_at,t.updated_at FROM push_tokens t"
                " WHERE t.app=? AND t.user=? ORDER BY t.device,t.provider",
                app,
                user,
            )

        return [_token(user, *row) for row in await self._store.read(unit)]

    async def put_token(self, actor: Actor, user: str, device: str, wanted: PushTokenPut) -> PushToken:
        """Remember where a device can be woken: it has one token per provider, and a token belongs to one device, the
        one that told it last. Raises NotFound, or Refusal naming what is wrong."""
        _check_own(actor, user)
        if (wanted.token is None) == (wanted.subscription is None):
            raise Refusal("invalid_field", "Give either a token or a browser's subscription.", field="token")
        token = encode(wanted.subscription).decode() if wanted.subscription is not None else str(wanted.token)
        context = await self._apps.get(actor.app.id)
        app = context.app
        digest = context.cipher.fingerprint(f"push:{wanted.provider}:{token}".encode())
        now = self._clock.now_ms()

        async def configured(tx: Tx) -> Row | None:
            return await tx.one("SELECT definition FROM push_providers WHERE app=? AND id=?", app, wanted.provider)

        row = await self._store.read(configured)
        if row is None:
            raise NotFound("push provider", field="provider")
        config: PushConfig = msgspec.json.decode(row[0], type=PushConfig)
        if wanted.subscription is not None and not isinstance(config, WebPushConfig):
            raise Refusal("invalid_field", "This provider does not speak to browsers.", field="subscription")
        self._providers.check_token(config, token)
        sealed = context.cipher.seal(token.encode(), token_item(user, device, wanted.provider))

        async def unit(tx: Tx) -> int:
            await _check_user(tx, app, user)
            await tx.execute(
                "INSERT INTO devices(app,user,id,created_at,last_seen_at) VALUES (?,?,?,?,?) ON CONFLICT DO NOTHING",
                app,
                user,
                device,
                now,
                now,
            )
            # Whoever told it last has the device in hand: on a shared phone the one before must not be woken there.
            await tx.execute(
                "DELETE FROM push_tokens WHERE app=? AND provider=? AND digest=?"
                " AND NOT (push_tokens.user=? AND device=?)",
                app,
                wanted.provider,
                digest,
                user,
                device,
            )
            made = await tx.one(
                "INSERT INTO push_tokens(app,user,device,provider,digest,sealed,language,created_at,updated_at)"
                " VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT (app,user,device,provider) DO UPDATE SET"
                " digest=excluded.digest, sealed=excluded.sealed, language=excluded.language,"
                " updated_at=excluded.updated_at RETURNING created_at",
                app,
                user,
                device,
                wanted.provider,
                digest,
                sealed,
                wanted.language,
                now,
                now,
            )
            # The oldest go: a person does not have so many devices, an app that forgets to sign out does.
            await tx.execute(
                "DELETE FROM push_tokens WHERE app=? AND push_tokens.user=? AND (device,provider) IN"
                " (SELECT t.device,t.provider FROM push_tokens t WHERE t.app=? AND t.user=?"
                " ORDER BY t.updated_at DESC, t.device, t.provider LIMIT 1000 OFFSET ?)",
                app,
                user,
                app,
                user,
                TOKENS_PER_USER_MAX,
            )
            assert made is not None
            return int(made[0])

        return _token(user, device, wanted.provider, wanted.language, await self._store.run(unit), now)

    async def remove_token(self, actor: Actor, user: str, device: str, provider: str | None = None) -> None:
        """Wake a device no more, by one provider or any. Raises NotFound when nothing could wake it."""
        _check_own(actor, user)
        app = actor.app.app

        async def unit(tx: Tx) -> None:
            gone = await tx.execute(
                "DELETE FROM push_tokens WHERE app=? AND push_tokens.user=? AND device=?"
                + ("" if provider is None else " AND provider=?"),
                app,
                user,
                device,
                *(() if provider is None else (provider,)),
            )
            if not gone:
                raise NotFound("push token", field="device")

        await self._store.run(unit)

    # ------------------------------------------------------------ what people want to be told of

    async def preferences(self, actor: Actor, user: str, device: str | None = None) -> NotificationPreferences:
        """What a user has said for all devices, or for one: oneself, or anybody with `device.manage_any`."""
        _check_own(actor, user)
        return await self._stored(actor, user, device, 0)

    async def put_preferences(
        self, actor: Actor, user: str, wanted: NotificationPreferences, device: str | None = None
    ) -> NotificationPreferences:
        """Replace what a user has said; the user's other devices are told. Raises Refusal naming the field."""
        _check_own(actor, user)
        if wanted.quiet_hours is not None and zone(wanted.quiet_hours.timezone) is None:
            raise Refusal("invalid_field", "There is no such time zone.", field="quiet_hours.timezone")
        if wanted.snoozed_until is not None and wanted.snoozed_until.astimezone(UTC) > _FAR:
            raise Refusal("invalid_field", "A snooze ends before the year 2100.", field="snoozed_until")
        await self._write(actor, user, device, 0, None, wanted)
        return wanted

    async def channel_preferences(self, actor: Actor, channel: str, device: str | None = None) -> ChannelNotifications:
        """What the user who asks has said about one channel. Raises NotFound."""
        access = await self._access.channel(actor, channel, P.CHANNEL_READ)
        user = _user_of(actor)
        return ChannelNotifications(level=(await self._stored(actor, user, device, access.channel.sid)).level)

    async def put_channel_preferences(
        self, actor: Actor, channel: str, wanted: ChannelNotifications, device: str | None = None
    ) -> ChannelNotifications:
        """Replace what the user who asks has said about one channel; their other devices are told."""
        access = await self._access.channel(actor, channel, P.CHANNEL_READ)
        user = _user_of(actor)
        stored = NotificationPreferences(level=wanted.level)
        await self._write(actor, user, device, access.channel.sid, access.channel.id, stored)
        return wanted

    async def _stored(self, actor: Actor, user: str, device: str | None, sid: int) -> NotificationPreferences:
        app = actor.app.app

        async def unit(tx: Tx) -> Row | None:
            await _check_user(tx, app, user)
            return await tx.one(
                "SELECT p.definition FROM notification_preferences p"
                " WHERE p.app=? AND p.user=? AND p.device=? AND p.sid=?",
                app,
                user,
                device or "",
                sid,
            )

        row = await self._store.read(unit)
        return NotificationPreferences() if row is None else msgspec.json.decode(row[0], type=NotificationPreferences)

    async def _write(
        self,
        actor: Actor,
        user: str,
        device: str | None,
        sid: int,
        channel: str | None,
        wanted: NotificationPreferences,
    ) -> None:
        now = self._clock.now_ms()
        mark = line_id(self._ids)

        async def unit(tx: Tx) -> Change[None]:
            app = actor.app.app
            await _check_user(tx, app, user)
            if wanted == NotificationPreferences():
                await tx.execute(
                    "DELETE FROM notification_preferences WHERE app=? AND notification_preferences.user=?"
                    " AND device=? AND sid=?",
                    app,
                    user,
                    device or "",
                    sid,
                )
            else:
                count = await tx.one(
                    "SELECT count(*) FROM notification_preferences p WHERE p.app=? AND p.user=?", app, user
                )
                if count is not None and count[0] >= PREFERENCES_PER_USER_MAX:
                    raise Refusal(
                        "bound_exceeded",
                        f"A user can say something about {PREFERENCES_PER_USER_MAX} devices and channels.",
                        bound=PREFERENCES_PER_USER_MAX,
                    )
                await tx.execute(
                    "INSERT INTO notification_preferences(app,user,device,sid,definition,updated_at)"
                    " VALUES (?,?,?,?,?,?) ON CONFLICT (app,user,device,sid) DO UPDATE SET"
                    " definition=excluded.definition, updated_at=excluded.updated_at",
                    app,
                    user,
                    device or "",
                    sid,
                    encode(wanted).decode(),
                    now,
                )
            told = [
                await record_own(
                    tx,
                    actor.app,
                    own,
                    type=EventType.NOTIFICATIONS_UPDATED,
                    at=now,
                    by=actor.user,
                    ref=channel or user,
                    mark=mark,
                    data=NotificationsUpdated(device=device, channel=channel),
                )
                for own in await user_streams(tx, self._apps.keyring, actor.app, [user])
            ]
            return Change(None, tuple(told))

        await with_keys(self._apps, actor.app, lambda: self._changes.run(unit))

    # ------------------------------------------------------------ how an app reaches its providers

    async def providers(self, actor: Actor) -> list[PushProvider]:
        """The app's push providers, without secrets. Needs `push.manage`."""
        actor.check(P.PUSH_MANAGE)
        app = actor.app.app

        async def unit(tx: Tx) -> list[Row]:
            return await tx.all(f"SELECT {_PROVIDER} FROM push_providers WHERE app=? ORDER BY id", app)

        return [_provider(row) for row in await self._store.read(unit)]

    async def put_provider(self, actor: Actor, id: str, wanted: PushProviderPut) -> PushProvider:
        """Set a provider up, or anew, which also makes a misconfigured one work again. Secrets that are left out stay
        as they are; a VAPID key that is left out is made. Needs `push.manage`. Raises Refusal naming the field."""
        actor.check(P.PUSH_MANAGE)
        context = await self._apps.get(actor.app.id)
        app, now = context.app, self._clock.now_ms()
        status = "enabled" if wanted.enabled else "disabled"
        line = line_of(actor, Action.PUSH_PROVIDER_PUT, f"push_provider:{id}", line_id(self._ids), now, status=status)

        async def before(tx: Tx) -> tuple[Row | None, int]:
            count = await tx.one("SELECT count(*) FROM push_providers WHERE app=?", app)
            row = await tx.one("SELECT kind,sealed FROM push_providers WHERE app=? AND id=?", app, id)
            return row, count[0] if count else 0

        stored, count = await self._store.read(before)
        config = wanted.config
        if stored is None:
            if count >= PROVIDERS_MAX:
                raise Refusal("bound_exceeded", f"An app has {PROVIDERS_MAX} providers.", bound=PROVIDERS_MAX)
        else:
            old: PushConfig = msgspec.json.decode(context.cipher.open(stored[1], provider_item(id)), type=PushConfig)
            if type(old) is not type(config):
                raise Refusal("conflict", "A provider stays of one kind: make another one.", field="config.kind")
            config = with_secrets_of(config, old)
        config = self._providers.check(self._providers.complete(config))
        kind = msgspec.to_builtins(config)["kind"]
        shown = without_secrets(config)

        async def unit(tx: Tx) -> Change[int]:
            # Grows with every change, also within a millisecond: what holds the old one sees that it is old.
            made = await tx.one(
                "INSERT INTO push_providers(app,id,kind,definition,sealed,status,created_at,updated_at)"
                " VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (app,id) DO UPDATE SET kind=excluded.kind,"
                " definition=excluded.definition, sealed=excluded.sealed, status=excluded.status, error=NULL,"
                " updated_at=CASE WHEN push_providers.updated_at<excluded.updated_at THEN excluded.updated_at"
                " ELSE push_providers.updated_at+1 END RETURNING created_at",
                app,
                id,
                kind,
                encode(shown).decode(),
                context.cipher.seal(encode(config), provider_item(id)),
                status,
                now,
                now,
            )
            await line.write(tx)
            assert made is not None
            return Change(int(made[0]), (AccessChanged(app),))

        created = await self._changes.run(unit)
        return PushProvider(
            id=id,
            config=shown,
            status="enabled" if wanted.enabled else "disabled",
            created_at=time_of(created),
            updated_at=time_of(now),
        )

    async def delete_provider(self, actor: Actor, id: str) -> None:
        """Take a provider away with every token that devices have told for it. Needs `push.manage`. Raises NotFound."""
        actor.check(P.PUSH_MANAGE)
        app = actor.app.app
        line = line_of(
            actor, Action.PUSH_PROVIDER_DELETED, f"push_provider:{id}", line_id(self._ids), self._clock.now_ms()
        )

        async def unit(tx: Tx) -> None:
            if not await tx.execute("DELETE FROM push_providers WHERE app=? AND id=?", app, id):
                raise NotFound("push provider", field="provider")
            await tx.execute("DELETE FROM push_tokens WHERE app=? AND provider=?", app, id)
            await line.write(tx)

        await self._store.run(unit)

    async def webpush_key(self, actor: Actor) -> WebPushKey:
        """What a browser needs to subscribe: the app's first Web Push provider. Raises NotFound."""
        app = actor.app.app

        async def unit(tx: Tx) -> Row | None:
            return await tx.one(
                "SELECT id,definition FROM push_providers WHERE app=? AND kind='webpush' AND status<>'disabled'"
                " ORDER BY id LIMIT 1",
                app,
            )

        row = await self._store.read(unit)
        if row is None:
            raise NotFound("Web Push provider")
        config = msgspec.json.decode(row[1], type=WebPushConfig)
        return WebPushKey(provider=row[0], public_key=config.public_key)


_FAR: Final = datetime(2100, 1, 1, tzinfo=UTC)
_PROVIDER: Final = "id,definition,status,error,created_at,updated_at"


def _provider(row: Row) -> PushProvider:
    id, definition, status, error, created_at, updated_at = row
    config: Any = msgspec.json.decode(definition, type=PushConfig)
    return PushProvider(
        id=id,
        config=config,
        status=status,
        error=error,
        created_at=time_of(created_at),
        updated_at=time_of(updated_at),
    )


def _token(user: str, device: str, provider: str, language: str | None, created_at: int, updated_at: int) -> PushToken:
    return PushToken(
        user=user,
        device=device,
        provider=provider,
        language=language,
        created_at=time_of(created_at),
        updated_at=time_of(updated_at),
    )


def _check_own(actor: Actor, user: str) -> None:
    if actor.user != user:
        actor.check(P.DEVICE_MANAGE_ANY)


def _user_of(actor: Actor) -> str:
    if actor.user is None:
        raise Refusal("invalid_field", "This is about a user: name them with the header Tidings-User.", field="user")
    return actor.user


async def _check_user(tx: Tx, app: int, user: str) -> None:
    if await tx.one("SELECT 1 FROM users WHERE app=? AND id=? AND deleted_at IS NULL", app, user) is None:
        raise NotFound("user", field="user")


def check_push_settings(settings: PushSettings) -> None:
    """Refuse templates that name what may not be said, and a fallback that asks one provider twice. Raises Refusal."""
    for event, languages in settings.templates.items():
        for language, template in languages.items():
            for part in ("title", "body"):
                wrong = unknown_name(getattr(template, part), content=settings.content)
                if wrong is not None:
                    raise Refusal(
                        "invalid_field",
                        f"A template may not name {wrong}"
                        + (" unless content is switched on." if wrong.strip("{}") in CONTENT_VARIABLES else "."),
                        field=f"settings.push.templates.{event}.{language}.{part}",
                    )
    providers = [step.provider for step in settings.fallback]
    if len(set(providers)) != len(providers):
        raise Refusal("invalid_field", "Each provider stands in the chain once.", field="settings.push.fallback")
    minutes = [step.after_minutes for step in settings.fallback]
    if minutes != sorted(minutes):
        raise Refusal("invalid_field", "The chain goes forward in time.", field="settings.push.fallback")
