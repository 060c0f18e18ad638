"""`tidings presend`: an app's say about each message before it is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
import msgspec
from cyclopts import Parameter

from tidings.wire.presend import PresendHook, PresendHookPut, PresendTest

if TYPE_CHECKING:
    from tidings.server.services import Services

from .admin import AppOption, Where, acting, checked, finish, run

app = cyclopts.App(name="presend", help="The pre-send hook: an app's say about each message before it is stored.")
_HERE = Where()


@app.command(name="show")
def show(*, app: AppOption = None, where: Where = _HERE) -> None:
    """Show the hook.

    For example:

        tidings presend show
    """

    async def work(services: Services) -> dict[str, Any]:
        return _row(await services.presend_hooks.get(await acting(services, app)))

    finish(where, run(where, work))


@app.command(name="set")
def set_hook(
    url: str,
    /,
    *,
    timeout_ms: int = 1_500,
    on_failure: Literal["refuse", "allow"] = "refuse",
    channel_type: Annotated[list[str] | None, Parameter(negative="")] = None,
    include_backend: bool = False,
    enabled: bool = True,
    rotate: bool = False,
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """Have every message approved, changed or refused by an endpoint. Its secret is shown when one is made.

    For example:

        tidings presend set https://api.example.com/moderate

        tidings presend set https://api.example.com/moderate --on-failure allow --channel-type consultation

    Parameters
    ----------
    timeout_ms
        After that there is no answer.
    on_failure
        Without an answer a message is refused, to be tried again, or sent.
    channel_type
        Only in channels of this type; may be given several times.
    include_backend
        Also messages that no user sends.
    rotate
        Make another secret; the one before signs as well until it is set again.
    """
    wanted = checked(
        PresendHookPut,
        url=url,
        timeout_ms=timeout_ms,
        on_failure=on_failure,
        channel_types=channel_type or [],
        include_backend=include_backend,
        enabled=enabled,
        rotate=rotate,
    )

    async def work(services: Services) -> dict[str, Any]:
        made = await services.presend_hooks.put(await acting(services, app), wanted)
        return _row(made) | ({"secret": made.secret} if made.secret else {})

    finish(where, run(where, work))


@app.command(name="test")
def try_hook(text: str = "Is this all right?", /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Ask about a text now; nothing is stored.

    For example:

        tidings presend test "Call me on 555-0100"
    """
    wanted = checked(PresendTest, text=text)

    async def work(services: Services) -> dict[str, Any]:
        return dict(msgspec.to_builtins(await services.presend_hooks.test(await acting(services, app), wanted)))

    finish(where, run(where, work))


@app.command(name="remove")
def remove(*, app: AppOption = None, where: Where = _HERE) -> None:
    """Store messages without asking.

    For example:

        tidings presend remove
    """

    async def work(services: Services) -> dict[str, Any]:
        await services.presend_hooks.delete(await acting(services, app))
        return {"removed": True}

    finish(where, run(where, work))


def _row(hook: PresendHook) -> dict[str, Any]:
    return {
        "url": hook.url,
        "timeout_ms": hook.timeout_ms,
        "on_failure": hook.on_failure,
        "channel_types": list(hook.channel_types) or ["all"],
        "include_backend": hook.include_backend,
        "enabled": hook.enabled,
    }
