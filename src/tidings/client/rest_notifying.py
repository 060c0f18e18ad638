"""REST: who is woken and how, and where a backend hears of events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Literal

from msgspec import UNSET, UnsetType

from ..wire.notifications import (
    ChannelNotifications,
    Level,
    NotificationPreferences,
    PushProvider,
    PushProviderPut,
    PushTest,
    PushTestResult,
    PushToken,
    PushTokenPut,
    QuietHours,
    WebPushKey,
)
from ..wire.push import PushConfig, PushSubscription
from ..wire.webhooks import (
    Webhook,
    WebhookCreate,
    WebhookDelivery,
    WebhookExchange,
    WebhookReplay,
    WebhookReplayed,
    WebhookRotate,
    WebhookUpdate,
)
from .noun import Noun, given, path_of


class NotificationsRest(Noun):
    """Where people can be woken, and what they want to be told of: oneself, or anybody with `device.manage_any`."""

    def tokens(self, user: str) -> AsyncIterator[PushToken]:
        """Where a user can be woken; the tokens themselves are never shown."""
        return self._rest._list(PushToken, path_of("users", user, "push-tokens"))

    async def put_token(
        self,
        user: str,
        device: str,
        provider: str,
        token: str | PushSubscription,
        *,
        language: str | None = None,
    ) -> PushToken:
        """Remember where a device can be woken: what the provider gave it, or a browser's subscription. A token belongs
        to the device that told it last. Raises Refused."""
        body = PushTokenPut(
            provider=provider,
            token=token if isinstance(token, str) else None,
            subscription=None if isinstance(token, str) else token,
            language=language,
        )
        return await self._rest._call(PushToken, "PUT", path_of("users", user, "devices", device, "push"), body)

    async def remove_token(self, user: str, device: str, *, provider: str | None = None) -> None:
        """Wake a device no more: do this when somebody signs out. Raises Refused (`not_found`)."""
        query = given(provider=provider)
        await self._rest.request("DELETE", path_of("users", user, "devices", device, "push"), query=query)

    async def get(self, user: str, *, device: str | None = None) -> NotificationPreferences:
        """What a user has said for all devices, or for one."""
        return await self._rest._get(
            NotificationPreferences, path_of("users", user, "notifications"), **given(device=device)
        )

    async def put(
        self,
        user: str,
        *,
        device: str | None = None,
        level: Level | None = None,
        quiet_hours: QuietHours | None = None,
        snoozed_until: datetime | None = None,
        language: str | None = None,
    ) -> NotificationPreferences:
        """Replace what a user has said, as a whole. Raises Refused naming the field."""
        body = NotificationPreferences(
            level=level, quiet_hours=quiet_hours, snoozed_until=snoozed_until, language=language
        )
        path = path_of("users", user, "notifications")
        return await self._rest._call(NotificationPreferences, "PUT", path, body, query=given(device=device))

    async def get_channel(self, channel: str, *, device: str | None = None) -> ChannelNotifications:
        """What the user who asks has said about one channel."""
        return await self._rest._get(
            ChannelNotifications, path_of("channels", channel, "notifications"), **given(device=device)
        )

    async def put_channel(
        self, channel: str, *, level: Level | None = None, device: str | None = None
    ) -> ChannelNotifications:
        """Replace what the user who asks has said about one channel."""
        path = path_of("channels", channel, "notifications")
        body = ChannelNotifications(level=level)
        return await self._rest._call(ChannelNotifications, "PUT", path, body, query=given(device=device))


class PushRest(Noun):
    """The app's push providers. It takes `push.manage`, but for `webpush_key`."""

    def providers(self) -> AsyncIterator[PushProvider]:
        """Every provider without its secrets, and what it said to a set-up that does not fit."""
        return self._rest._list(PushProvider, "/v1/push/providers")

    async def put_provider(self, id: str, config: PushConfig, *, enabled: bool = True) -> PushProvider:
        """Set a provider up; secrets that are left out stay as they are. Raises Refused naming the field."""
        body = PushProviderPut(config=config, enabled=enabled)
        return await self._rest._call(PushProvider, "PUT", path_of("push", "providers", id), body)

    async def delete_provider(self, id: str) -> None:
        """Take a provider away with every token for it. Raises Refused (`not_found`)."""
        await self._rest._do("DELETE", path_of("push", "providers", id))

    async def webpush_key(self) -> WebPushKey:
        """What a browser needs to subscribe. Raises Refused (`not_found`) without a Web Push provider."""
        return await self._rest._get(WebPushKey, "/v1/push/webpush-key")

    async def test(
        self, user: str, *, device: str | None = None, channel: str | None = None, send: bool = False
    ) -> PushTestResult:
        """Step by step, whether a message that came now would wake a user's devices. `send`: also send a test."""
        body = PushTest(user=user, device=device, channel=channel, send=send)
        return await self._rest._call(PushTestResult, "POST", "/v1/push/test", body)


class WebhooksRest(Noun):
    """Where the app's backend hears of its events. It takes `webhook.manage`."""

    def all(self) -> AsyncIterator[Webhook]:
        """Every webhook, without secrets."""
        return self._rest._list(Webhook, "/v1/webhooks")

    async def get(self, id: str) -> Webhook:
        """One webhook. Raises Refused (`not_found`)."""
        return await self._rest._get(Webhook, path_of("webhooks", id))

    async def create(
        self,
        url: str,
        *,
        events: list[str] | None = None,
        channel_types: list[str] | None = None,
        content: bool = False,
        description: str = "",
        secret: str | None = None,
    ) -> Webhook:
        """Add one; its `secret` is in the answer, this once. Not repeated by itself: it would be two."""
        body = WebhookCreate(
            url=url,
            events=events or ["*"],
            channel_types=channel_types or [],
            content=content,
            description=description,
            secret=secret,
        )
        return await self._rest._call(Webhook, "POST", "/v1/webhooks", body)

    async def update(
        self,
        id: str,
        *,
        url: str | UnsetType = UNSET,
        events: list[str] | UnsetType = UNSET,
        channel_types: list[str] | UnsetType = UNSET,
        content: bool | UnsetType = UNSET,
        description: str | UnsetType = UNSET,
        status: Literal["enabled", "disabled"] | UnsetType = UNSET,
    ) -> Webhook:
        """Change what is given. Enabling sends nothing of what was missed: replay that."""
        body = WebhookUpdate(
            url=url,
            events=events,
            channel_types=channel_types,
            content=content,
            description=description,
            status=status,
        )
        return await self._rest._call(Webhook, "PATCH", path_of("webhooks", id), body)

    async def delete(self, id: str) -> None:
        """Take one away with its log. Raises Refused (`not_found`)."""
        await self._rest._do("DELETE", path_of("webhooks", id))

    async def rotate(self, id: str, *, secret: str | None = None, overlap_hours: int = 24) -> Webhook:
        """Exchange the secret, which is in the answer; the old one signs as well for some hours."""
        body = WebhookRotate(secret=secret, overlap_hours=overlap_hours)
        return await self._rest._call(Webhook, "POST", path_of("webhooks", id, "rotate"), body)

    async def test(self, id: str) -> WebhookExchange:
        """Send a `webhook.test` now: what was sent and what came back."""
        return await self._rest._call(WebhookExchange, "POST", path_of("webhooks", id, "test"))

    def deliveries(
        self, id: str, *, outcome: str | None = None, message: str | None = None, type: str | None = None
    ) -> AsyncIterator[WebhookDelivery]:
        """Attempts of the last days, the newest first."""
        query = given(outcome=outcome, message=message, type=type)
        return self._rest._list(WebhookDelivery, path_of("webhooks", id, "deliveries"), query)

    async def delivery(self, id: str, delivery: str) -> WebhookExchange:
        """An attempt with what was sent and what came back."""
        return await self._rest._get(WebhookExchange, path_of("webhooks", id, "deliveries", delivery))

    async def replay(
        self,
        id: str,
        *,
        message: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> int:
        """Send again, in order per channel and with the same ids: one message, or all of a time; in how many
        channels."""
        body = WebhookReplay(message=message, since=since, until=until)
        return (await self._rest._call(WebhookReplayed, "POST", path_of("webhooks", id, "replay"), body)).channels
