"""Users, their tokens and devices, and `me`."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from tidings.wire import limits
from tidings.wire.ids import Labels, RoleName, UserId
from tidings.wire.replies import Page
from tidings.wire.requests import TokenMint, TokensRevoke, UserCreate, UsersUpsert, UserUpdate
from tidings.wire.resources import Device, Token, User

from .operation import BULK_BYTES_MAX, Call, Paging, operation

_USER: Final = "/v1/users/{user}"


class UsersQuery(Paging, frozen=True, kw_only=True):
    ids: Annotated[list[UserId], Meta(min_length=1, max_length=limits.BULK_MAX)] | None = None
    role: RoleName | None = None
    active: Annotated[bool, Meta(description="false: only deactivated users")] | None = None
    label: Labels = msgspec.field(default_factory=dict)


@operation(
    "users.create",
    "POST",
    "/v1/users",
    "Create a user",
    reply=User,
    status=201,
    body=UserCreate,
    problems=("already_exists",),
)
async def create(call: Call[None, UserCreate]) -> User:
    """Without `id` the server makes one."""
    return await call.services.users.create(call.actor, call.body)


@operation(
    "users.upsert",
    "PUT",
    "/v1/users",
    "Create or change users in bulk",
    reply=Page[User],
    body=UsersUpsert,
    body_max=BULK_BYTES_MAX,
    problems=("conflict",),
)
async def upsert(call: Call[None, UsersUpsert]) -> Page[User]:
    """All of them or none. Fields that are left out stay as they are on users that exist."""
    return Page(await call.services.users.upsert(call.actor, call.body.users))


@operation("users.list", "GET", "/v1/users", "Find users", reply=Page[User], query=UsersQuery, labels=True)
async def find(call: Call[UsersQuery, None]) -> Page[User]:
    """Filters add up: a user matches all of them."""
    query = call.query
    found, more = await call.services.users.query(
        call.actor,
        ids=query.ids,
        role=query.role,
        active=query.active,
        label=query.label,
        limit=query.limit,
        cursor=query.cursor,
    )
    return Page(found, more)


@operation("users.get", "GET", _USER, "Read a user", reply=User)
async def get(call: Call[None, None]) -> User:
    """The profile, role, custom data and state of one user."""
    return await call.services.users.get(call.actor, call.path["user"])


@operation("users.update", "PATCH", _USER, "Change a user", reply=User, body=UserUpdate, problems=("conflict",))
async def update(call: Call[None, UserUpdate]) -> User:
    """Fields that are left out stay as they are; null empties those that may be empty."""
    return await call.services.users.update(call.actor, call.path["user"], call.body)


@operation("users.delete", "DELETE", _USER, "Delete a user")
async def delete(call: Call[None, None]) -> None:
    """For good: profile, memberships, devices. The app's setting `deleted_user_messages` says what becomes of the
    user's messages."""
    await call.services.users.delete(call.actor, call.path["user"])


@operation("users.deactivate", "POST", _USER + "/deactivate", "Deactivate a user", reply=User, problems=("conflict",))
async def deactivate(call: Call[None, None]) -> User:
    """The user's connections end, their tokens are refused; their data stays."""
    return await call.services.users.deactivate(call.actor, call.path["user"])


@operation("users.reactivate", "POST", _USER + "/reactivate", "Reactivate a user", reply=User, problems=("conflict",))
async def reactivate(call: Call[None, None]) -> User:
    """Undoes a deactivation."""
    return await call.services.users.reactivate(call.actor, call.path["user"])


@operation(
    "users.mint_token",
    "POST",
    _USER + "/tokens",
    "Make a token for a user",
    reply=Token,
    status=201,
    body=TokenMint,
    problems=("conflict", "user_deactivated"),
)
async def mint(call: Call[None, TokenMint]) -> Token:
    """Signed with the app's newest HS256 key. For development and simple set-ups: an app usually signs its own."""
    return await call.services.auth.mint(call.actor, call.path["user"], call.body.ttl_seconds)


@operation("users.revoke_tokens", "POST", _USER + "/tokens/revoke", "Revoke a user's tokens", body=TokensRevoke)
async def revoke(call: Call[None, TokensRevoke]) -> None:
    """With `jti` that one token, else every token issued until now. Connections made with them end."""
    await call.services.auth.revoke(call.actor, call.path["user"], call.body.jti)


@operation("users.devices", "GET", _USER + "/devices", "List a user's devices", reply=Page[Device])
async def devices(call: Call[None, None]) -> Page[Device]:
    """Every device that has connected and was not removed."""
    return Page(await call.services.users.devices(call.actor, call.path["user"]))


@operation("users.remove_device", "DELETE", _USER + "/devices/{device}", "Remove a device")
async def remove_device(call: Call[None, None]) -> None:
    """Its connections end."""
    await call.services.users.remove_device(call.actor, call.path["user"], call.path["device"])


@operation("me.get", "GET", "/v1/me", "Read one's own user", reply=User, problems=("invalid_field",))
async def me(call: Call[None, None]) -> User:
    """The user of the token, or the one a backend acts for."""
    return await call.services.users.get(call.actor, call.user)


@operation("me.update", "PATCH", "/v1/me", "Change one's own user", reply=User, body=UserUpdate)
async def update_me(call: Call[None, UserUpdate]) -> User:
    """As changing a user. A user cannot change their own role."""
    return await call.services.users.update(call.actor, call.user, call.body)


OPERATIONS: Final = (
    create,
    upsert,
    find,
    get,
    update,
    delete,
    deactivate,
    reactivate,
    mint,
    revoke,
    devices,
    remove_device,
    me,
    update_me,
)
