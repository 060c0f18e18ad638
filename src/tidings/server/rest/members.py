"""Members of channels."""

from __future__ import annotations

from typing import Final

from tidings.wire.ids import RoleName
from tidings.wire.replies import Page
from tidings.wire.requests import MembersAdd, MemberUpdate
from tidings.wire.resources import Member

from .operation import Call, Paging, operation

_MEMBERS: Final = "/v1/channels/{channel}/members"


class MembersQuery(Paging, frozen=True, kw_only=True):
    role: RoleName | None = None


@operation("members.list", "GET", _MEMBERS, "List members", reply=Page[Member], query=MembersQuery)
async def find(call: Call[MembersQuery, None]) -> Page[Member]:
    """Who is in the channel, in which role."""
    query = call.query
    found, more = await call.services.members.list(
        call.actor, call.path["channel"], role=query.role, limit=query.limit, cursor=query.cursor
    )
    return Page(found, more)


@operation(
    "members.add",
    "POST",
    _MEMBERS,
    "Add members",
    reply=Page[Member],
    body=MembersAdd,
    problems=("bound_exceeded", "conflict"),
)
async def add(call: Call[None, MembersAdd]) -> Page[Member]:
    """All of them or none. Who is in already stays as they are."""
    return Page(await call.services.members.add(call.actor, call.path["channel"], call.body))


@operation(
    "members.update",
    "PATCH",
    _MEMBERS + "/{user}",
    "Change a member's role",
    reply=Member,
    body=MemberUpdate,
    problems=("conflict",),
)
async def update(call: Call[None, MemberUpdate]) -> Member:
    """Takes effect before the answer."""
    return await call.services.members.update(call.actor, call.path["channel"], call.path["user"], call.body)


@operation("members.remove", "DELETE", _MEMBERS + "/{user}", "Remove a member", problems=("conflict",))
async def remove(call: Call[None, None]) -> None:
    """Once this is answered, nothing of the channel reaches them any more."""
    await call.services.members.remove(call.actor, call.path["channel"], call.path["user"])


@operation(
    "members.join",
    "POST",
    "/v1/channels/{channel}/join",
    "Join a channel",
    problems=("bound_exceeded", "conflict", "invalid_field"),
)
async def join(call: Call[None, None]) -> None:
    """Where the channel's type is public, or a role grants `channel.join`."""
    await call.services.members.join(call.actor, call.path["channel"])


@operation(
    "members.leave",
    "POST",
    "/v1/channels/{channel}/leave",
    "Leave a channel",
    problems=("conflict", "invalid_field"),
)
async def leave(call: Call[None, None]) -> None:
    """Direct channels cannot be left, only hidden."""
    await call.services.members.leave(call.actor, call.path["channel"])


OPERATIONS: Final = (find, add, update, remove, join, leave)
