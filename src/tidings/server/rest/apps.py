"""The app itself: settings, keys, identity providers, roles, channel types, relations, audit trail."""

from __future__ import annotations

from typing import Annotated, Final, Literal, cast

from msgspec import Meta

from tidings.wire.ids import RoleName, Time, UserId, ms_of
from tidings.wire.replies import Page
from tidings.wire.requests import (
    ApiKeyCreate,
    AppUpdate,
    ChannelTypePut,
    IdentityProviderCreate,
    RelationPut,
    RolePut,
    SigningKeyCreate,
)
from tidings.wire.resources import (
    ApiKey,
    App,
    AuditEntry,
    ChannelType,
    IdentityProvider,
    Relation,
    Role,
    SigningKeyInfo,
)

from .operation import Call, Paging, Query, operation

Scope = Literal["app", "channel", "relation"]


@operation("app.get", "GET", "/v1/app", "Read the app", reply=App)
async def get(call: Call[None, None]) -> App:
    """The app that the credential belongs to, with its settings."""
    return await call.services.admin.get_app(call.actor)


@operation("app.update", "PATCH", "/v1/app", "Change the app", reply=App, body=AppUpdate)
async def update(call: Call[None, AppUpdate]) -> App:
    """`settings` is replaced as a whole when given: settings that it leaves out take their defaults."""
    return await call.services.admin.update_app(call.actor, call.body)


@operation("app.list_keys", "GET", "/v1/app/keys", "List API keys", reply=Page[ApiKey])
async def list_keys(call: Call[None, None]) -> Page[ApiKey]:
    """Without their secrets, which are not stored."""
    return Page(await call.services.admin.list_api_keys(call.actor))


@operation(
    "app.create_key",
    "POST",
    "/v1/app/keys",
    "Create an API key",
    reply=ApiKey,
    status=201,
    body=ApiKeyCreate,
    problems=("bound_exceeded",),
)
async def create_key(call: Call[None, ApiKeyCreate]) -> ApiKey:
    """`secret` is the whole key and is shown this once. Its scopes are at most those of the caller."""
    return await call.services.admin.create_api_key(call.actor, call.body)


@operation("app.revoke_key", "DELETE", "/v1/app/keys/{key}", "Revoke an API key", problems=("conflict",))
async def revoke_key(call: Call[None, None]) -> None:
    """Takes effect before the answer."""
    await call.services.admin.revoke_api_key(call.actor, call.path["key"])


@operation("app.list_signing_keys", "GET", "/v1/app/signing-keys", "List signing keys", reply=Page[SigningKeyInfo])
async def list_signing_keys(call: Call[None, None]) -> Page[SigningKeyInfo]:
    """The keys that verify users' tokens, without secrets."""
    return Page(await call.services.admin.list_signing_keys(call.actor))


@operation(
    "app.create_signing_key",
    "POST",
    "/v1/app/signing-keys",
    "Add a signing key",
    reply=SigningKeyInfo,
    status=201,
    body=SigningKeyCreate,
    problems=("already_exists", "bound_exceeded"),
)
async def create_signing_key(call: Call[None, SigningKeyCreate]) -> SigningKeyInfo:
    """A secret that the server made is shown this once."""
    return await call.services.admin.create_signing_key(call.actor, call.body)


@operation(
    "app.retire_signing_key", "DELETE", "/v1/app/signing-keys/{kid}", "Retire a signing key", problems=("conflict",)
)
async def retire_signing_key(call: Call[None, None]) -> None:
    """Tokens that it signed are refused from now on."""
    await call.services.admin.retire_signing_key(call.actor, call.path["kid"])


@operation(
    "app.list_providers", "GET", "/v1/app/identity-providers", "List identity providers", reply=Page[IdentityProvider]
)
async def list_providers(call: Call[None, None]) -> Page[IdentityProvider]:
    """Key sets (JWKS) whose keys verify users' tokens."""
    return Page(await call.services.admin.list_providers(call.actor))


@operation(
    "app.create_provider",
    "POST",
    "/v1/app/identity-providers",
    "Add an identity provider",
    reply=IdentityProvider,
    status=201,
    body=IdentityProviderCreate,
    problems=("already_exists", "bound_exceeded"),
)
async def create_provider(call: Call[None, IdentityProviderCreate]) -> IdentityProvider:
    """The URL must not lead into the server's own network."""
    return await call.services.admin.create_provider(call.actor, call.body)


@operation("app.delete_provider", "DELETE", "/v1/app/identity-providers/{provider}", "Remove an identity provider")
async def delete_provider(call: Call[None, None]) -> None:
    """Tokens of its keys are refused from now on."""
    await call.services.admin.delete_provider(call.actor, call.path["provider"])


@operation("app.list_roles", "GET", "/v1/app/roles", "List roles", reply=Page[Role])
async def list_roles(call: Call[None, None]) -> Page[Role]:
    """Built-in ones and the app's own. For everybody who may read profiles or create channels: features tell a client
    what to show."""
    return Page(await call.services.admin.list_roles(call.actor))


@operation(
    "app.put_role",
    "PUT",
    "/v1/app/roles/{level}/{role}",
    "Define a role",
    reply=Role,
    body=RolePut,
    problems=("bound_exceeded",),
)
async def put_role(call: Call[None, RolePut]) -> Role:
    """Replaces the role of this name, a built-in one too. Takes effect on open connections."""
    scope = cast("Scope", call.path["level"])
    return await call.services.admin.put_role(call.actor, scope, call.path["role"], call.body.grants)


@operation("app.delete_role", "DELETE", "/v1/app/roles/{level}/{role}", "Delete a role", problems=("conflict",))
async def delete_role(call: Call[None, None]) -> None:
    """A built-in role gets its original grants back. Refused while something still uses a role of the app's own."""
    await call.services.admin.delete_role(call.actor, cast("Scope", call.path["level"]), call.path["role"])


@operation("app.list_types", "GET", "/v1/app/channel-types", "List channel types", reply=Page[ChannelType])
async def list_types(call: Call[None, None]) -> Page[ChannelType]:
    """Built-in ones and the app's own. For everybody who may read profiles or create channels: features tell a client
    what to show."""
    return Page(await call.services.admin.list_types(call.actor))


@operation("app.get_type", "GET", "/v1/app/channel-types/{type}", "Read a channel type", reply=ChannelType)
async def get_type(call: Call[None, None]) -> ChannelType:
    """Features, grants and bounds."""
    return await call.services.admin.get_type(call.actor, call.path["type"])


@operation(
    "app.put_type",
    "PUT",
    "/v1/app/channel-types/{type}",
    "Define a channel type",
    reply=ChannelType,
    body=ChannelTypePut,
    problems=("conflict", "bound_exceeded"),
)
async def put_type(call: Call[None, ChannelTypePut]) -> ChannelType:
    """Replaces the type of this name; its channels follow."""
    return await call.services.admin.put_type(call.actor, call.path["type"], call.body)


@operation("app.delete_type", "DELETE", "/v1/app/channel-types/{type}", "Delete a channel type", problems=("conflict",))
async def delete_type(call: Call[None, None]) -> None:
    """Refused while channels of it exist."""
    await call.services.admin.delete_type(call.actor, call.path["type"])


class RelationsQuery(Paging, frozen=True, kw_only=True):
    user: UserId | None = None
    other: UserId | None = None
    kind: RoleName | None = None


@operation(
    "app.list_relations", "GET", "/v1/app/relations", "List relations", reply=Page[Relation], query=RelationsQuery
)
async def list_relations(call: Call[RelationsQuery, None]) -> Page[Relation]:
    """Who stands in which relation to whom."""
    query = call.query
    found, more = await call.services.admin.list_relations(
        call.actor, user=query.user, other=query.other, kind=query.kind, limit=query.limit, cursor=query.cursor
    )
    return Page(found, more)


@operation(
    "app.put_relation",
    "PUT",
    "/v1/app/relations",
    "Relate two users",
    reply=Relation,
    body=RelationPut,
    problems=("not_found", "bound_exceeded"),
)
async def put_relation(call: Call[None, RelationPut]) -> Relation:
    """`user` gets the grants of the relation `kind` in the channels of `other`. Doing it again changes nothing."""
    body = call.body
    return await call.services.admin.put_relation(
        call.actor, Relation(kind=body.kind, user=body.user, other=body.other)
    )


class RelationQuery(Query, frozen=True, kw_only=True):
    kind: RoleName
    user: UserId
    other: UserId


@operation(
    "app.delete_relation",
    "DELETE",
    "/v1/app/relations",
    "End a relation",
    query=RelationQuery,
    problems=("not_found",),
)
async def delete_relation(call: Call[RelationQuery, None]) -> None:
    """Its grants end before the answer."""
    query = call.query
    await call.services.admin.delete_relation(call.actor, Relation(kind=query.kind, user=query.user, other=query.other))


class AuditQuery(Paging, frozen=True, kw_only=True):
    by: Annotated[str, Meta(max_length=160, description="Who did it: user:<id> or key:<id>")] | None = None
    action: Annotated[str, Meta(max_length=64)] | None = None
    target: Annotated[str, Meta(max_length=160)] | None = None
    since: Time | None = None
    until: Time | None = None


@operation("app.audit", "GET", "/v1/app/audit", "Read the audit trail", reply=Page[AuditEntry], query=AuditQuery)
async def audit(call: Call[AuditQuery, None]) -> Page[AuditEntry]:
    """The newest first. Who did what to what, never content."""
    query = call.query
    found, more = await call.services.admin.audit(
        call.actor,
        by=query.by,
        action=query.action,
        target=query.target,
        since_ms=ms_of(query.since) if query.since else None,
        until_ms=ms_of(query.until) if query.until else None,
        limit=query.limit,
        cursor=query.cursor,
    )
    return Page(found, more)


OPERATIONS: Final = (
    get,
    update,
    list_keys,
    create_key,
    revoke_key,
    list_signing_keys,
    create_signing_key,
    retire_signing_key,
    list_providers,
    create_provider,
    delete_provider,
    list_roles,
    put_role,
    delete_role,
    list_types,
    get_type,
    put_type,
    delete_type,
    list_relations,
    put_relation,
    delete_relation,
    audit,
)
