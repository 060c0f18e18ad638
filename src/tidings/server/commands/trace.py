"""`tidings trace`: where is my message?"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tidings.server.services import Services
    from tidings.wire.trace import MessageTrace, TracedPush, TracedRecipient

from .admin import AppOption, Where, acting, finish, run
from .terminal import console

_HERE = Where()


def trace(
    message: str, /, *, user: str | None = None, limit: int = 50, app: AppOption = None, where: Where = _HERE
) -> None:
    """Tell what became of a message: where it is stored, which devices have it, which pushes left or did not and why,
    what webhooks answered, and what is still to be done. Nothing that was said is shown.

    Which devices are connected is known to servers alone: ask one over REST for that.

    For example:

        tidings trace m_01J9ZQ4T8V6N2R5C7XKDMBWEHY

        tidings trace m_01J9ZQ4T8V6N2R5C7XKDMBWEHY --user bob --json

    Parameters
    ----------
    message
        Its id.
    user
        Only what concerns this member.
    limit
        At most so many members, in order of their ids.
    """

    async def work(services: Services) -> MessageTrace:
        return await services.trace.message(await acting(services, app), message, user=user, limit=max(1, limit))

    found = run(where, work)
    if where.json:
        finish(where, msgspec.to_builtins(found))
        return
    out = console(stderr=False)
    for line in lines_of(found):
        out.print(line, markup=False)


def lines_of(found: MessageTrace) -> list[str]:
    """The story of a message, line by line."""
    sender = found.sender or "the backend"
    lines = [f"{found.message} in {found.channel}, from {sender}", ""]
    lines.append(f"{_at(found.accepted_at)}  accepted and stored as number {found.seq}")
    for at, what in ((found.edited_at, "edited"), (found.deleted_at, "deleted")):
        if at is not None:
            lines.append(f"{_at(at)}  {what}")
    lines.append(
        "published to connected devices" + (", handed on to jobs" if found.handed_on else "; not handed on yet")
    )
    lines += [f"{_push(one)}  for everybody" for one in found.push]
    for one in found.webhooks:
        answer = one.error or f"status {one.status}"
        lines.append(
            f"{_at(one.at)}  webhook {one.webhook}: {one.outcome} at attempt {one.attempt}, {answer},"
            f" {one.milliseconds} ms"
        )
    for work in found.work:
        error = f": {work.error}" if work.error else ""
        lines.append(
            f"{work.kind} {work.target} is {work.state}, due {_at(work.due_at)}, tried {work.attempts}x{error}"
        )
    for recipient in found.recipients:
        lines += ["", *_of(recipient)]
    if found.next is not None:
        lines += ["", "There are more members: --user, or a larger --limit."]
    return lines


def _of(recipient: TracedRecipient) -> list[str]:
    state = "read it" if recipient.read else "has it" if recipient.delivered else "does not have it"
    lines = [f"{recipient.user} {state}"]
    for device in recipient.devices:
        if device.acknowledged_at is not None:
            said = f"acknowledged by {_at(device.acknowledged_at)}"
        else:
            said = f"not acknowledged (it is at {device.position})"
        woken = f", can be woken by {', '.join(device.push_tokens)}" if device.push_tokens else ", has no push token"
        lines.append(f"  {device.id}: {said}{woken}")
    lines += [f"  {_push(one)}" for one in recipient.push]
    if not recipient.devices:
        lines.append("  no device has ever connected")
    return lines


def _push(one: TracedPush) -> str:
    where = f" on {one.device}" if one.device else ""
    by = f" by {one.provider}" if one.provider else ""
    detail = f" ({one.detail})" if one.detail else ""
    return f"{_at(one.at)}  push{where} {one.outcome}{by}: {one.reason}{detail}"


def _at(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}.{time.microsecond // 1000:03}Z"
