"""Webhooks: endpoints, their log, sending again."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from tidings.wire.ids import Time, ms_of
from tidings.wire.replies import Page
from tidings.wire.webhooks import (
    EventFilter,
    Outcome,
    Webhook,
    WebhookCreate,
    WebhookDelivery,
    WebhookExchange,
    WebhookReplay,
    WebhookReplayed,
    WebhookRotate,
    WebhookUpdate,
)

from .operation import Call, Paging, operation

_ONE: Final = "/v1/webhooks/{webhook}"


@operation("webhooks.list", "GET", "/v1/webhooks", "List webhooks", reply=Page[Webhook])
async def find(call: Call[None, None]) -> Page[Webhook]:
    """The app's endpoints, without their secrets."""
    return Page(await call.services.webhooks.find(call.actor))


@operation(
    "webhooks.create",
    "POST",
    "/v1/webhooks",
    "Add a webhook",
    reply=Webhook,
    status=201,
    body=WebhookCreate,
    problems=("bound_exceeded",),
)
async def create(call: Call[None, WebhookCreate]) -> Webhook:
    """`secret` verifies what is sent and is shown this once."""
    return await call.services.webhooks.create(call.actor, call.body)


@operation("webhooks.get", "GET", _ONE, "Get a webhook", reply=Webhook)
async def get(call: Call[None, None]) -> Webhook:
    """Where it is, what it hears of, and whether it works."""
    return await call.services.webhooks.get(call.actor, call.path["webhook"])


@operation("webhooks.update", "PATCH", _ONE, "Change a webhook", reply=Webhook, body=WebhookUpdate)
async def update(call: Call[None, WebhookUpdate]) -> Webhook:
    """Enabling it sends nothing of what was missed: replay that."""
    return await call.services.webhooks.update(call.actor, call.path["webhook"], call.body)


@operation("webhooks.delete", "DELETE", _ONE, "Remove a webhook")
async def delete(call: Call[None, None]) -> None:
    """With its log."""
    await call.services.webhooks.delete(call.actor, call.path["webhook"])


@operation(
    "webhooks.rotate", "POST", _ONE + "/rotate", "Exchange a webhook's secret", reply=Webhook, body=WebhookRotate
)
async def rotate(call: Call[None, WebhookRotate]) -> Webhook:
    """The new `secret` is shown this once. What is sent is signed with both for `overlap_hours`."""
    return await call.services.webhooks.rotate(call.actor, call.path["webhook"], call.body)


@operation("webhooks.test", "POST", _ONE + "/test", "Try a webhook", reply=WebhookExchange)
async def test(call: Call[None, None]) -> WebhookExchange:
    """Sends a `webhook.test` now, whatever state the endpoint is in; the answer is what was sent and what came back."""
    return await call.services.webhooks.test(call.actor, call.path["webhook"])


class DeliveriesQuery(Paging, frozen=True, kw_only=True):
    outcome: Outcome | None = None
    message: Annotated[str, Meta(max_length=64, description="The `webhook-id`")] | None = None
    type: EventFilter | None = None
    since: Time | None = None
    until: Time | None = None


@operation(
    "webhooks.deliveries",
    "GET",
    _ONE + "/deliveries",
    "List deliveries",
    reply=Page[WebhookDelivery],
    query=DeliveriesQuery,
)
async def deliveries(call: Call[DeliveriesQuery, None]) -> Page[WebhookDelivery]:
    """Every attempt of the last days, the newest first."""
    query = call.query
    found, more = await call.services.webhooks.deliveries(
        call.actor,
        call.path["webhook"],
        outcome=query.outcome,
        message=query.message,
        type=query.type,
        since=None if query.since is None else ms_of(query.since),
        until=None if query.until is None else ms_of(query.until),
        limit=query.limit,
        cursor=query.cursor,
    )
    return Page(found, more)


@operation("webhooks.delivery", "GET", _ONE + "/deliveries/{delivery}", "Look into a delivery", reply=WebhookExchange)
async def delivery(call: Call[None, None]) -> WebhookExchange:
    """What was sent and what came back; bodies are cut to 2 KB."""
    return await call.services.webhooks.delivery(call.actor, call.path["webhook"], call.path["delivery"])


@operation(
    "webhooks.replay",
    "POST",
    _ONE + "/replay",
    "Send again",
    reply=WebhookReplayed,
    body=WebhookReplay,
    problems=("conflict", "bound_exceeded"),
)
async def replay(call: Call[None, WebhookReplay]) -> WebhookReplayed:
    """One message, or everything from a time on, in order per channel and with the same ids: who has them already can
    tell."""
    return await call.services.webhooks.replay(call.actor, call.path["webhook"], call.body)


OPERATIONS: Final = (find, create, get, update, delete, rotate, test, deliveries, delivery, replay)
