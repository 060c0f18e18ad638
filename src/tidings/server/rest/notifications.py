"""Where people can be woken, what they want to be told of, and the app's push providers."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from tidings.wire.ids import DeviceId
from tidings.wire.notifications import (
    ChannelNotifications,
    NotificationPreferences,
    ProviderId,
    PushProvider,
    PushProviderPut,
    PushTest,
    PushTestResult,
    PushToken,
    PushTokenPut,
    WebPushKey,
)
from tidings.wire.replies import Page

from .operation import Call, Query, operation

_USER: Final = "/v1/users/{user}"


class DeviceQuery(Query, frozen=True, kw_only=True):
    device: Annotated[DeviceId, Meta(description="Only on this device")] | None = None


class ProviderQuery(Query, frozen=True, kw_only=True):
    provider: Annotated[ProviderId, Meta(description="Only this provider's token")] | None = None


@operation("notifications.tokens", "GET", _USER + "/push-tokens", "List push tokens", reply=Page[PushToken])
async def tokens(call: Call[None, None]) -> Page[PushToken]:
    """Where a user can be woken. The tokens themselves are never shown."""
    return Page(await call.services.notifications.tokens(call.actor, call.path["user"]))


@operation(
    "notifications.put_token",
    "PUT",
    _USER + "/devices/{device}/push",
    "Register a push token",
    reply=PushToken,
    body=PushTokenPut,
    problems=("not_found",),
)
async def put_token(call: Call[None, PushTokenPut]) -> PushToken:
    """A device has one token per provider, and a token belongs to the device that told it last, whoever uses it."""
    return await call.services.notifications.put_token(call.actor, call.path["user"], call.path["device"], call.body)


@operation(
    "notifications.remove_token",
    "DELETE",
    _USER + "/devices/{device}/push",
    "Remove push tokens",
    query=ProviderQuery,
)
async def remove_token(call: Call[ProviderQuery, None]) -> None:
    """The device is woken no more, by one provider or any: do this when somebody signs out."""
    await call.services.notifications.remove_token(
        call.actor, call.path["user"], call.path["device"], call.query.provider
    )


@operation(
    "notifications.get",
    "GET",
    _USER + "/notifications",
    "Get notification preferences",
    reply=NotificationPreferences,
    query=DeviceQuery,
)
async def get(call: Call[DeviceQuery, None]) -> NotificationPreferences:
    """What a user wants to be told of, on all devices or on one."""
    return await call.services.notifications.preferences(call.actor, call.path["user"], call.query.device)


@operation(
    "notifications.put",
    "PUT",
    _USER + "/notifications",
    "Set notification preferences",
    reply=NotificationPreferences,
    query=DeviceQuery,
    body=NotificationPreferences,
    problems=("bound_exceeded",),
)
async def put(call: Call[DeviceQuery, NotificationPreferences]) -> NotificationPreferences:
    """Replaces what was said. What is said for a device counts there in place of what is said for all."""
    return await call.services.notifications.put_preferences(
        call.actor, call.path["user"], call.body, call.query.device
    )


@operation(
    "notifications.get_channel",
    "GET",
    "/v1/channels/{channel}/notifications",
    "Get a channel's notification preferences",
    reply=ChannelNotifications,
    query=DeviceQuery,
)
async def get_channel(call: Call[DeviceQuery, None]) -> ChannelNotifications:
    """What the user who asks has said about this channel."""
    return await call.services.notifications.channel_preferences(call.actor, call.path["channel"], call.query.device)


@operation(
    "notifications.put_channel",
    "PUT",
    "/v1/channels/{channel}/notifications",
    "Set a channel's notification preferences",
    reply=ChannelNotifications,
    query=DeviceQuery,
    body=ChannelNotifications,
    problems=("bound_exceeded",),
)
async def put_channel(call: Call[DeviceQuery, ChannelNotifications]) -> ChannelNotifications:
    """For the user who asks. It counts in place of what they have said for all channels; a channel that they have muted
    wakes nobody, whatever is said here."""
    return await call.services.notifications.put_channel_preferences(
        call.actor, call.path["channel"], call.body, call.query.device
    )


@operation("push.providers", "GET", "/v1/push/providers", "List push providers", reply=Page[PushProvider])
async def providers(call: Call[None, None]) -> Page[PushProvider]:
    """Without their secrets. `misconfigured`: the provider has refused the set-up; nothing is sent until it is put
    anew."""
    return Page(await call.services.notifications.providers(call.actor))


@operation(
    "push.put_provider",
    "PUT",
    "/v1/push/providers/{push_provider}",
    "Set a push provider up",
    reply=PushProvider,
    body=PushProviderPut,
    problems=("bound_exceeded", "conflict"),
)
async def put_provider(call: Call[None, PushProviderPut]) -> PushProvider:
    """Secrets that are left out stay as they are. A VAPID key that is left out is made."""
    return await call.services.notifications.put_provider(call.actor, call.path["push_provider"], call.body)


@operation("push.delete_provider", "DELETE", "/v1/push/providers/{push_provider}", "Remove a push provider")
async def delete_provider(call: Call[None, None]) -> None:
    """With every token that devices have told for it."""
    await call.services.notifications.delete_provider(call.actor, call.path["push_provider"])


@operation(
    "push.webpush_key", "GET", "/v1/push/webpush-key", "Get the Web Push key", reply=WebPushKey, problems=("not_found",)
)
async def webpush_key(call: Call[None, None]) -> WebPushKey:
    """What a browser needs to subscribe (`applicationServerKey`), and the provider to register the subscription
    with."""
    return await call.services.notifications.webpush_key(call.actor)


@operation(
    "push.test",
    "POST",
    "/v1/push/test",
    "Would this device be woken?",
    reply=PushTestResult,
    body=PushTest,
    problems=("not_found",),
)
async def test(call: Call[None, PushTest]) -> PushTestResult:
    """Step by step, for each device and provider of a user, as things stand now. With `send` a test push leaves,
    whatever speaks against it."""
    return await call.services.push_tester.test(call.actor, call.body)


OPERATIONS: Final = (
    tokens,
    put_token,
    remove_token,
    get,
    put,
    get_channel,
    put_channel,
    providers,
    put_provider,
    delete_provider,
    webpush_key,
    test,
)
