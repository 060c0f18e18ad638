"""The pre-send hook."""

from __future__ import annotations

from typing import Final

from tidings.wire.presend import PresendHook, PresendHookPut, PresendTest, PresendTried

from .operation import Call, operation

_PATH: Final = "/v1/presend-hook"


@operation("presend.get", "GET", _PATH, "Get the pre-send hook", reply=PresendHook, problems=("not_found",))
async def get(call: Call[None, None]) -> PresendHook:
    """Without its secret."""
    return await call.services.presend_hooks.get(call.actor)


@operation("presend.put", "PUT", _PATH, "Set the pre-send hook up", reply=PresendHook, body=PresendHookPut)
async def put(call: Call[None, PresendHookPut]) -> PresendHook:
    """Every message is sent there before it is stored, with what it says, and is approved, changed or refused.
    `secret` is in the answer when one was made: the first time, and with `rotate`."""
    return await call.services.presend_hooks.put(call.actor, call.body)


@operation("presend.delete", "DELETE", _PATH, "Remove the pre-send hook", problems=("not_found",))
async def delete(call: Call[None, None]) -> None:
    """Messages are stored without asking."""
    await call.services.presend_hooks.delete(call.actor)


@operation(
    "presend.test",
    "POST",
    _PATH + "/test",
    "Try the pre-send hook",
    reply=PresendTried,
    body=PresendTest,
    problems=("not_found", "conflict"),
)
async def test(call: Call[None, PresendTest]) -> PresendTried:
    """Asks about a text now; nothing is stored."""
    return await call.services.presend_hooks.test(call.actor, call.body)


OPERATIONS: Final = (get, put, delete, test)
