"""Channels, and the caller's own side of them."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from tidings.wire import limits
from tidings.wire.ids import ChannelId, Labels, TypeName, UserId
from tidings.wire.replies import Page
from tidings.wire.requests import ChannelCreate, ChannelUpdate, MembershipUpdate
from tidings.wire.resources import Channel

from .operation import Call, Paging, Reply, json_reply, operation

_CHANNEL: Final = "/v1/channels/{channel}"


class ChannelsQuery(Paging, frozen=True, kw_only=True):
    type: Annotated[list[TypeName], Meta(min_length=1, max_length=16)] | None = None
    member: Annotated[list[UserId], Meta(min_length=1, max_length=16, description="All of these are in it")] | None = (
        None
    )
    ids: Annotated[list[ChannelId], Meta(min_length=1, max_length=limits.BULK_MAX)] | None = None
    label: Labels = msgspec.field(default_factory=dict)
    archived: Annotated[bool, Meta(description="The caller's archived channels, or the others")] | None = None
    hidden: Annotated[bool, Meta(description="The caller's hidden channels, or the others")] | None = None
    joined: Annotated[bool, Meta(description="Channels the caller is a member of, or the others")] | None = None
    unread: Annotated[bool, Meta(description="Only channels with something unread")] = False
    sort: Literal["last_message", "created", "updated"] = "last_message"
    include: list[Literal["last_message", "members"]] = msgspec.field(default_factory=list)


@operation(
    "channels.create",
    "POST",
    "/v1/channels",
    "Create a channel",
    reply=Channel,
    status=201,
    also={200: "The direct channel of this pair, which existed already"},
    body=ChannelCreate,
    problems=("already_exists", "bound_exceeded", "not_found", "conflict"),
)
async def create(call: Call[None, ChannelCreate]) -> Reply:
    """A direct channel is one per pair: creating it again gives the same one, with status 200."""
    channel, created = await call.services.channels.create(call.actor, call.body)
    return json_reply(201 if created else 200, channel)


@operation(
    "channels.list", "GET", "/v1/channels", "Find channels", reply=Page[Channel], query=ChannelsQuery, labels=True
)
async def find(call: Call[ChannelsQuery, None]) -> Page[Channel]:
    """The caller's channels; every channel of the app for backends and those with `channel.list_any`. Filters add
    up."""
    query = call.query
    found, more = await call.services.channels.query(
        call.actor,
        types=query.type,
        members=query.member,
        labels=query.label,
        ids=query.ids,
        archived=query.archived,
        hidden=query.hidden,
        unread_only=query.unread,
        joined=query.joined,
        sort=query.sort,
        limit=query.limit,
        cursor=query.cursor,
        include_last_message="last_message" in query.include,
        include_members="members" in query.include,
    )
    return Page(found, more)


@operation("channels.get", "GET", _CHANNEL, "Read a channel", reply=Channel)
async def get(call: Call[None, None]) -> Channel:
    """With the caller's own side of it as `membership`."""
    return await call.services.channels.get(call.actor, call.path["channel"])


@operation(
    "channels.update", "PATCH", _CHANNEL, "Change a channel", reply=Channel, body=ChannelUpdate, problems=("conflict",)
)
async def update(call: Call[None, ChannelUpdate]) -> Channel:
    """Fields that are left out stay as they are; null empties those that may be empty. `frozen` needs
    `channel.freeze`."""
    return await call.services.channels.update(call.actor, call.path["channel"], call.body)


@operation("channels.delete", "DELETE", _CHANNEL, "Delete a channel")
async def delete(call: Call[None, None]) -> None:
    """For everybody: its members lose it and its content is gone."""
    await call.services.channels.delete(call.actor, call.path["channel"])


@operation(
    "channels.set_membership",
    "PATCH",
    _CHANNEL + "/membership",
    "Hide, archive or mute for oneself",
    reply=Channel,
    body=MembershipUpdate,
    problems=("conflict",),
)
async def set_membership(call: Call[None, MembershipUpdate]) -> Channel:
    """The caller's own side of a channel; nobody else sees it."""
    return await call.services.channels.set_membership(call.actor, call.path["channel"], call.body)


OPERATIONS: Final = (create, find, get, update, delete, set_membership)
