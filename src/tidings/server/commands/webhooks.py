"""`tidings webhooks`: where an app's backend hears of its events."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import Parameter

from tidings.wire.webhooks import Webhook, WebhookCreate, WebhookReplay, WebhookRotate, WebhookUpdate

if TYPE_CHECKING:
    from tidings.server.services import Services

from .admin import AppOption, Where, acting, checked, finish, run

app = cyclopts.App(name="webhooks", help="Webhooks: where an app's backend hears of its events.")
_HERE = Where()


@app.command(name="list")
def list_webhooks(*, app: AppOption = None, where: Where = _HERE) -> None:
    """List an app's webhooks and how they are.

    For example:

        tidings webhooks list
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        return [_row(one) for one in await services.webhooks.find(await acting(services, app))]

    finish(where, run(where, work), empty="There is no webhook yet: tidings webhooks add URL")


@app.command(name="add")
def add(
    url: str,
    /,
    *,
    event: Annotated[list[str] | None, Parameter(negative="")] = None,
    channel_type: Annotated[list[str] | None, Parameter(negative="")] = None,
    content: bool = False,
    description: str = "",
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """Add an endpoint; its secret is shown this once.

    For example:

        tidings webhooks add https://api.example.com/tidings

        tidings webhooks add https://api.example.com/tidings --event 'message.*' --event member.added

    Parameters
    ----------
    url
        https, and not an internal address, unless the setting outbound_allow_hosts names it.
    event
        What it hears of: types, `message.*` or `*` (which is the default).
    channel_type
        Only events of channels of this type; may be given several times.
    content
        Send what was said along; otherwise identifiers only.
    """
    wanted = checked(
        WebhookCreate,
        url=url,
        events=event or ["*"],
        channel_types=channel_type or [],
        content=content,
        description=description,
    )

    async def work(services: Services) -> dict[str, Any]:
        made = await services.webhooks.create(await acting(services, app), wanted)
        return {"id": made.id, "url": made.url, "secret": made.secret, "public_key": made.public_key}

    finish(where, run(where, work), secret=True)


@app.command(name="rotate")
def rotate(id: str, /, *, overlap_hours: int = 24, app: AppOption = None, where: Where = _HERE) -> None:
    """Exchange an endpoint's secret: what is sent is signed with the old one, too, for some hours.

    For example:

        tidings webhooks rotate wh_7f3k --overlap-hours 48
    """
    wanted = checked(WebhookRotate, overlap_hours=overlap_hours)

    async def work(services: Services) -> dict[str, Any]:
        made = await services.webhooks.rotate(await acting(services, app), id, wanted)
        return {"id": made.id, "secret": made.secret, "public_key": made.public_key}

    finish(where, run(where, work), secret=True)


@app.command(name="test")
def try_webhook(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Send a `webhook.test` now, and show what was sent and what came back.

    For example:

        tidings webhooks test wh_7f3k
    """

    async def work(services: Services) -> dict[str, Any]:
        done = await services.webhooks.test(await acting(services, app), id)
        answer = done.delivery.error or f"status {done.delivery.status}"
        return {
            "outcome": done.delivery.outcome,
            "answer": answer,
            "milliseconds": done.delivery.milliseconds,
            "sent": done.request_body,
            "signature": done.request_headers["webhook-signature"],
            "received": done.response_body,
        }

    finish(where, run(where, work))


@app.command(name="deliveries")
def deliveries(
    id: str,
    /,
    *,
    outcome: str | None = None,
    message: str | None = None,
    limit: int = 50,
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """List attempts, the newest first.

    For example:

        tidings webhooks deliveries wh_7f3k --outcome failed

    Parameters
    ----------
    outcome
        delivered, failed, exhausted or refused.
    message
        Only attempts at this message (its webhook-id).
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        found, _ = await services.webhooks.deliveries(
            await acting(services, app), id, outcome=outcome, message=message, limit=max(1, min(limit, 1_000))
        )
        return [
            {
                "at": f"{one.at:%Y-%m-%d %H:%M:%S}Z",
                "message": one.message,
                "type": one.type,
                "attempt": one.attempt,
                "outcome": one.outcome,
                "answer": one.error or f"status {one.status}",
                "ms": one.milliseconds,
            }
            for one in found
        ]

    finish(where, run(where, work), empty="Nothing was sent in the last days.")


@app.command(name="replay")
def replay(
    id: str,
    /,
    *,
    message: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """Send again, with the same ids and in order per channel: one message, or everything of a time. Servers or workers
    do it in the background.

    For example:

        tidings webhooks replay wh_7f3k --message msg_k3l4

        tidings webhooks replay wh_7f3k --since 2026-11-27T08:00 --until 2026-11-27T12:00

    Parameters
    ----------
    since
        From then on; without a time zone it is UTC.
    until
        Before then; without it, until now.
    """
    wanted = checked(WebhookReplay, message=message, since=_utc(since), until=_utc(until))

    async def work(services: Services) -> dict[str, Any]:
        done = await services.webhooks.replay(await acting(services, app), id, wanted)
        return {"channels": done.channels}

    finish(where, run(where, work))


@app.command(name="enable")
def enable(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Switch an endpoint on. What was missed is not sent: `tidings webhooks replay` sends it.

    For example:

        tidings webhooks enable wh_7f3k
    """
    _switch(id, WebhookUpdate(status="enabled"), app, where)


@app.command(name="disable")
def disable(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Switch an endpoint off.

    For example:

        tidings webhooks disable wh_7f3k
    """
    _switch(id, WebhookUpdate(status="disabled"), app, where)


@app.command(name="remove")
def remove(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Take an endpoint away, with its log.

    For example:

        tidings webhooks remove wh_7f3k
    """

    async def work(services: Services) -> dict[str, Any]:
        await services.webhooks.delete(await acting(services, app), id)
        return {"removed": id}

    finish(where, run(where, work))


def _switch(id: str, wanted: WebhookUpdate, app_id: str | None, where: Where) -> None:
    async def work(services: Services) -> dict[str, Any]:
        return _row(await services.webhooks.update(await acting(services, app_id), id, wanted))

    finish(where, run(where, work))


def _row(one: Webhook) -> dict[str, Any]:
    return {
        "id": one.id,
        "url": one.url,
        "events": one.events,
        "status": one.status if one.reason is None else f"{one.status} ({one.reason})",
        "failing_since": "" if one.failing_since is None else f"{one.failing_since:%Y-%m-%d %H:%M}Z",
    }


def _utc(time: datetime | None) -> datetime | None:
    return time if time is None or time.tzinfo is not None else time.replace(tzinfo=UTC)
