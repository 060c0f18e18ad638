"""`tidings push`: providers, and why a device would or would not be woken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cyclopts
import msgspec

from tidings.wire.notifications import PushTest

if TYPE_CHECKING:
    from tidings.server.services import Services
    from tidings.wire.notifications import PushTestResult

from .admin import AppOption, Where, acting, finish, run
from .terminal import console

app = cyclopts.App(name="push", help="Push: would this device be woken, and why not?")
_HERE = Where()


@app.command(name="providers")
def list_providers(*, app: AppOption = None, where: Where = _HERE) -> None:
    """List an app's push providers, and what they said to a set-up that does not fit. Set them up over REST:
    docs/guides/push-fcm.md and its neighbours.

    For example:

        tidings push providers
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        return [
            {
                "id": one.id,
                "kind": msgspec.to_builtins(one.config)["kind"],
                "status": one.status,
                "error": one.error or "",
            }
            for one in await services.notifications.providers(await acting(services, app))
        ]

    finish(where, run(where, work), empty="There is no push provider yet: PUT /v1/push/providers/{id}.")


@app.command(name="test")
def try_push(
    user: str,
    /,
    *,
    device: str | None = None,
    channel: str | None = None,
    send: bool = False,
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """Tell step by step whether a message that came now would wake a user's devices, and why not.

    Which devices are connected is known to servers alone: ask one over REST (`POST /v1/push/test`) for that.

    For example:

        tidings push test bob

        tidings push test bob --channel ward-3 --device phone-1 --send

    Parameters
    ----------
    user
        Whom it is about.
    device
        Only this device.
    channel
        Also look at what they have said about this channel.
    send
        Send a test push, whatever speaks against it, and show the provider's answer.
    """

    async def work(services: Services) -> PushTestResult:
        wanted = PushTest(user=user, device=device, channel=channel, send=send)
        return await services.push_tester.test(await acting(services, app), wanted)

    found = run(where, work)
    if where.json:
        finish(where, msgspec.to_builtins(found))
        return
    out = console(stderr=False)
    for one in found.devices:
        by = f" by {one.provider}" if one.provider else ""
        out.print(
            f"{one.device or user}{by}: {'would be woken' if one.would_wake else 'would not be woken'}", markup=False
        )
        for step in one.steps:
            out.print(f"  {'ok' if step.passed else 'NO':<4}{step.question} {step.answer}", markup=False)
        if one.sent is not None:
            out.print(f"  sent: {one.sent}", markup=False)
