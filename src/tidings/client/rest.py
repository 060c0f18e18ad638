"""The HTTP interface, noun by noun, for backends and scripts.

    async with Rest("https://chat.example", api_key="tk_…") as rest:
        await rest.users.upsert([{"id": "alice", "name": "Alice"}])
        channel = await rest.channels.create(members=["alice", "bob"])
        await rest.as_user("alice").messages.send(channel.id, "Good morning")

Answers are the wire's resources (`tidings.wire.resources`). A refusal raises Refused with the catalogue's code; a
server that cannot be reached raises NotConnected, or OutcomeUnknown when the request may have arrived and cannot be
repeated. Requests that may be repeated are: with back-off, and with the pause that the server asks for.
"""

from __future__ import annotations

import asyncio
import random as random_module
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import httpx
import msgspec
from msgspec import UNSET, UnsetType

from ..wire import limits, requests
from ..wire.replies import Changed
from ..wire.resources import (
    ApiKey,
    App,
    AppSettings,
    Attachment,
    AuditEntry,
    Channel,
    ChannelFeatures,
    ChannelType,
    Device,
    Head,
    IdentityProvider,
    Job,
    JobsRetried,
    Member,
    Message,
    MessageVersion,
    Receipt,
    ReceiptCounts,
    Relation,
    Role,
    SigningKeyInfo,
    Token,
    Unread,
    UnreadTotal,
    User,
)
from ..wire.trace import MessageTrace
from .backoff import FullJitter
from .errors import NotConnected, OutcomeUnknown, ProtocolError
from .events import Event, decode_event
from .noun import Noun as _Noun
from .noun import path_of as _path
from .outbox import Sent
from .rest_notifying import NotificationsRest, PushRest, WebhooksRest
from .transport import http_url, refusal_of

T = TypeVar("T")

# Attempts of a request that may be repeated: with full jitter about four seconds in all.
ATTEMPTS_MAX = 5
# A longer pause than this is the caller's business: the refusal is raised with its `retry_after`.
PAUSE_SECONDS_MAX = 30.0
REQUEST_SECONDS_MAX = 30.0
# Connections kept open to one server: what the server's own limits make useful.
CONNECTIONS_MAX = 64

# These may be repeated whatever became of the first attempt.
_IDEMPOTENT: Final = frozenset({"GET", "PUT", "DELETE"})


class Page(msgspec.Struct, frozen=True):
    """One page of a listing; `next`: the cursor of the one after it."""

    items: list[msgspec.Raw]
    next: str | None = None


class MessagePage(msgspec.Struct, frozen=True):
    """Messages in ascending order of seq, and where the channel stood in the same moment."""

    messages: list[Message]
    epoch: str
    head: int
    has_before: bool = False
    has_after: bool = False


class Moved(msgspec.Struct, frozen=True):
    """The streams that moved since a mark, and the mark to ask with next time, once every page (`next`) is read."""

    mark: str
    moved: list[Head] = []
    next: str | None = None


class EventPage(msgspec.Struct, frozen=True):
    """Events after a seq; `head`: where the stream stands."""

    events: list[Event]
    epoch: str
    head: int


class _RawEvents(msgspec.Struct):
    events: list[msgspec.Raw]
    epoch: str
    head: int


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that were given a value: neither UNSET nor None."""
    return {name: value for name, value in fields.items() if value is not UNSET and value is not None}


class Rest:
    """A connection to a server's HTTP interface. Give an API key (with `user`: act for them) or a user's token.

    attempts: how often a request that may be repeated is tried. random: for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        token: str | None = None,
        user: str | None = None,
        app: str | None = None,
        attempts: int = ATTEMPTS_MAX,
        timeout: float = REQUEST_SECONDS_MAX,
        random: random_module.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if (api_key is None) == (token is None):
            raise ValueError("give either api_key or token")
        headers = {"Authorization": f"Bearer {api_key or token}", "User-Agent": "tidings-python"}
        if app is not None:
            headers["Tidings-App"] = app
        self._http = httpx.AsyncClient(
            base_url=http_url(url),
            headers=headers,
            timeout=timeout,
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX),
        )
        self._attempts = attempts
        self._random = random or random_module.Random()
        self._sleep = sleep
        self._set_up(user)

    def _set_up(self, user: str | None) -> None:
        self._user = user
        self.app = AppRest(self)
        self.users = UsersRest(self)
        self.me = MeRest(self)
        self.channels = ChannelsRest(self)
        self.members = MembersRest(self)
        self.messages = MessagesRest(self)
        self.receipts = ReceiptsRest(self)
        self.streams = StreamsRest(self)
        self.notifications = NotificationsRest(self)
        self.push = PushRest(self)
        self.webhooks = WebhooksRest(self)

    def as_user(self, user: str) -> Rest:
        """The same connection, acting for this user (needs an API key)."""
        other = object.__new__(Rest)
        other._http, other._attempts, other._random, other._sleep = (
            self._http,
            self._attempts,
            self._random,
            self._sleep,
        )
        other._set_up(user)
        return other

    async def __aenter__(self) -> Rest:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back. Iterators under way fail."""
        await self._http.aclose()

    # ------------------------------------------------------------ requests

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """One request, repeated as far as it may be; the answer's body. For paths that have no method here."""
        if repeatable is None:
            repeatable = method in _IDEMPOTENT
        sent_headers = dict(headers or {})
        if self._user is not None:
            sent_headers["Tidings-User"] = self._user
        content = None
        if body is not None:
            content = msgspec.json.encode(body)
            sent_headers["Content-Type"] = "application/json"
        jitter = FullJitter(random=self._random)
        while True:
            last = jitter.attempt + 1 >= self._attempts
            try:
                response = await self._http.request(
                    method,
                    path,
                    params=query,
                    content=content,
                    headers=sent_headers,
                    timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout,
                )
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                # It never left.
                if last:
                    raise NotConnected(f"cannot reach {self._http.base_url}: {error!r}") from error
                pause = jitter.next()
            except httpx.HTTPError as error:
                if not repeatable:
                    raise OutcomeUnknown(f"no answer to {method} {path}: {error!r}") from error
                if last:
                    raise NotConnected(f"no answer to {method} {path}: {error!r}") from error
                pause = jitter.next()
            else:
                if response.status_code < 400:
                    return response.content
                refused = refusal_of(response)
                # A rate limit refuses before anything is done: any request may be repeated after it.
                may = response.status_code == 429 or (repeatable and refused.retry == "later")
                if not may or last or (refused.retry_after or 0.0) > PAUSE_SECONDS_MAX:
                    raise refused
                pause = jitter.next() + (refused.retry_after or 0.0)
            await self._sleep(pause)

    async def _get(self, kind: type[T], path: str, /, **query: Any) -> T:
        return _decode(await self.request("GET", path, query=_given(**query)), kind)

    async def _call(self, kind: type[T], method: str, path: str, body: Any = None, **more: Any) -> T:
        return _decode(await self.request(method, path, body=body, **more), kind)

    async def _do(self, method: str, path: str, body: Any = None, **more: Any) -> None:
        await self.request(method, path, body=body, **more)

    async def _list(self, kind: type[T], path: str, query: Mapping[str, Any] | None = None) -> AsyncIterator[T]:
        """Every item of a listing, fetching pages as they are needed."""
        cursor: str | None = None
        while True:
            page = await self._get(Page, path, **{**(query or {}), "cursor": cursor})
            for item in page.items:
                yield _decode(bytes(item), kind)
            if page.next is None:
                return
            cursor = page.next


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the answer is not a {getattr(kind, '__name__', kind)}: {error}") from error


class AppRest(_Noun):
    """The app itself: settings, keys, roles, channel types, relations, audit. Needs an API key."""

    async def get(self) -> App:
        """The app's name and settings."""
        return await self._rest._get(App, "/v1/app")

    async def update(self, *, name: str | UnsetType = UNSET, settings: AppSettings | UnsetType = UNSET) -> App:
        """Change what is given; the app as it is now. `settings` replaces all of them."""
        return await self._rest._call(App, "PATCH", "/v1/app", requests.AppUpdate(name=name, settings=settings))

    def keys(self) -> AsyncIterator[ApiKey]:
        """The API keys, revoked ones included, without their secrets."""
        return self._rest._list(ApiKey, "/v1/app/keys")

    async def create_key(
        self, name: str, *, scopes: list[str] | None = None, expires_at: datetime | None = None
    ) -> ApiKey:
        """A new API key. Its `secret` is in this answer and in no other."""
        body = requests.ApiKeyCreate(name=name, scopes=scopes or ["*"], expires_at=expires_at)
        return await self._rest._call(ApiKey, "POST", "/v1/app/keys", body)

    async def revoke_key(self, id: str) -> None:
        """End a key at once. Raises Refused (`conflict`) for the key that asks."""
        await self._rest._do("DELETE", _path("app", "keys", id))

    def signing_keys(self) -> AsyncIterator[SigningKeyInfo]:
        """The keys that verify users' tokens, retired ones included, without their secrets."""
        return self._rest._list(SigningKeyInfo, "/v1/app/signing-keys")

    async def create_signing_key(
        self,
        algorithm: Literal["HS256", "RS256", "ES256", "EdDSA"] = "HS256",
        *,
        kid: str | None = None,
        secret: str | None = None,
        public_key: str | None = None,
    ) -> SigningKeyInfo:
        """A new key for users' tokens. An HS256 secret that the server made is in this answer and in no other."""
        body = requests.SigningKeyCreate(algorithm=algorithm, kid=kid, secret=secret, public_key=public_key)
        return await self._rest._call(SigningKeyInfo, "POST", "/v1/app/signing-keys", body)

    async def delete_signing_key(self, kid: str) -> None:
        """Retire a key: tokens that it signed are refused from now on."""
        await self._rest._do("DELETE", _path("app", "signing-keys", kid))

    def identity_providers(self) -> AsyncIterator[IdentityProvider]:
        """Where the app's own identity systems publish their keys."""
        return self._rest._list(IdentityProvider, "/v1/app/identity-providers")

    async def create_identity_provider(
        self,
        jwks_url: str,
        *,
        algorithms: list[Literal["RS256", "ES256", "EdDSA"]] | None = None,
        cache_seconds: int = 300,
    ) -> IdentityProvider:
        """Trust tokens signed by the keys under `jwks_url`; they are kept for `cache_seconds`."""
        body = requests.IdentityProviderCreate(
            jwks_url=jwks_url, algorithms=algorithms or ["RS256"], cache_seconds=cache_seconds
        )
        return await self._rest._call(IdentityProvider, "POST", "/v1/app/identity-providers", body)

    async def delete_identity_provider(self, id: str) -> None:
        """Trust this provider's tokens no longer."""
        await self._rest._do("DELETE", _path("app", "identity-providers", id))

    def roles(self) -> AsyncIterator[Role]:
        """Every role, built-in ones included."""
        return self._rest._list(Role, "/v1/app/roles")

    async def put_role(self, scope: str, name: str, grants: list[str]) -> Role:
        """Define a role of a `scope` (app, channel or relation) by its permission words."""
        return await self._rest._call(Role, "PUT", _path("app", "roles", scope, name), requests.RolePut(grants=grants))

    async def delete_role(self, scope: str, name: str) -> None:
        """Delete a role. Raises Refused (`conflict`) while it is in use or when it is built in."""
        await self._rest._do("DELETE", _path("app", "roles", scope, name))

    def channel_types(self) -> AsyncIterator[ChannelType]:
        """Every channel type, built-in ones included."""
        return self._rest._list(ChannelType, "/v1/app/channel-types")

    async def channel_type(self, name: str) -> ChannelType:
        """One channel type. Raises Refused (`not_found`)."""
        return await self._rest._get(ChannelType, _path("app", "channel-types", name))

    async def put_channel_type(
        self,
        name: str,
        *,
        features: ChannelFeatures | None = None,
        grants: dict[str, list[str]] | None = None,
        default_role: str = "member",
        creator_role: str = "owner",
        members_max: int = 100_000,
        public: bool = False,
        history: Literal["all", "since_join"] = "all",
    ) -> ChannelType:
        """Define a channel type, or replace the definition that there is."""
        body = requests.ChannelTypePut(
            features=features or ChannelFeatures(),
            grants=grants or {},
            default_role=default_role,
            creator_role=creator_role,
            members_max=members_max,
            public=public,
            history=history,
        )
        return await self._rest._call(ChannelType, "PUT", _path("app", "channel-types", name), body)

    async def delete_channel_type(self, name: str) -> None:
        """Delete a channel type. Raises Refused (`conflict`) while there are channels of it, deleted ones included."""
        await self._rest._do("DELETE", _path("app", "channel-types", name))

    def relations(self, *, user: str | None = None, kind: str | None = None) -> AsyncIterator[Relation]:
        """Who stands in which relation to whom."""
        return self._rest._list(Relation, "/v1/app/relations", {"user": user, "kind": kind})

    async def put_relation(self, kind: str, user: str, other: str) -> Relation:
        """Let `user` stand in relation `kind` to `other`; it may stand already."""
        body = requests.RelationPut(kind=kind, user=user, other=other)
        return await self._rest._call(Relation, "PUT", "/v1/app/relations", body)

    async def delete_relation(self, kind: str, user: str, other: str) -> None:
        """End a relation. Raises Refused (`not_found`) when there was none."""
        query = {"kind": kind, "user": user, "other": other}
        await self._rest.request("DELETE", "/v1/app/relations", query=query)

    def audit(self) -> AsyncIterator[AuditEntry]:
        """Who did what to what, the newest first; never content."""
        return self._rest._list(AuditEntry, "/v1/app/audit")

    def jobs(self, *, state: Literal["dead", "waiting"] = "dead", kind: str | None = None) -> AsyncIterator[Job]:
        """What was given up behind the scenes, or what waits to be done, the oldest first."""
        return self._rest._list(Job, "/v1/jobs", {"state": state, "kind": kind})

    async def retry_jobs(self, *, kind: str | None = None) -> int:
        """Have dead jobs tried again, those of a kind or all, at most 1,000; how many."""
        body = requests.JobsRetry(kind=kind)
        return (await self._rest._call(JobsRetried, "POST", "/v1/jobs/retry", body)).count

    async def retry_job(self, id: str) -> None:
        """Have a dead job tried again. Raises Refused (`not_found`)."""
        await self._rest._call(JobsRetried, "POST", _path("jobs", id, "retry"))

    async def drop_job(self, id: str) -> None:
        """Give a dead job up for good. Raises Refused (`not_found`)."""
        await self._rest._do("DELETE", _path("jobs", id))


class UsersRest(_Noun):
    """Users, their tokens and their devices."""

    async def create(
        self,
        id: str | None = None,
        *,
        name: str | None = None,
        avatar_url: str | None = None,
        role: str = "user",
        custom: dict[str, Any] | None = None,
        labels: dict[str, str] | None = None,
    ) -> User:
        """Create a user; without an `id` the server makes one. Raises Refused (`already_exists`)."""
        body = requests.UserCreate(
            id=id, name=name, avatar_url=avatar_url, role=role, custom=custom or {}, labels=labels or {}
        )
        return await self._rest._call(User, "POST", "/v1/users", body)

    async def upsert(self, users: Iterable[requests.UserUpsert | Mapping[str, Any]]) -> list[User]:
        """Create these users, or change the named fields of those that exist; any number, sent in bulks."""
        wanted = [
            user if isinstance(user, requests.UserUpsert) else msgspec.convert(dict(user), requests.UserUpsert)
            for user in users
        ]
        answer: list[User] = []
        for start in range(0, len(wanted), limits.BULK_MAX):
            body = requests.UsersUpsert(users=wanted[start : start + limits.BULK_MAX])
            page = await self._rest._call(Page, "PUT", "/v1/users", body)
            answer += [_decode(bytes(item), User) for item in page.items]
        return answer

    def query(self, filters: Mapping[str, str] | None = None) -> AsyncIterator[User]:
        """Users that match, for example `{"role": "clinician", "label.ward": "3b"}`."""
        return self._rest._list(User, "/v1/users", filters)

    async def get(self, id: str) -> User:
        """One user. Raises Refused (`not_found`)."""
        return await self._rest._get(User, _path("users", id))

    async def update(
        self,
        id: str,
        *,
        name: str | UnsetType | None = UNSET,
        avatar_url: str | UnsetType | None = UNSET,
        role: str | UnsetType = UNSET,
        custom: dict[str, Any] | UnsetType = UNSET,
        labels: dict[str, str] | UnsetType = UNSET,
    ) -> User:
        """Change what is given; None empties a field."""
        body = requests.UserUpdate(name=name, avatar_url=avatar_url, role=role, custom=custom, labels=labels)
        return await self._rest._call(User, "PATCH", _path("users", id), body)

    async def delete(self, id: str) -> None:
        """Delete a user: they leave every channel. Messages stay or go as the app's settings say."""
        await self._rest._do("DELETE", _path("users", id))

    async def deactivate(self, id: str) -> User:
        """Refuse this user from now on and end their connections; nothing is deleted."""
        return await self._rest._call(User, "POST", _path("users", id, "deactivate"), repeatable=True)

    async def reactivate(self, id: str) -> User:
        """Let a deactivated user in again."""
        return await self._rest._call(User, "POST", _path("users", id, "reactivate"), repeatable=True)

    async def token(self, id: str, *, ttl_seconds: int = 3600) -> Token:
        """A token for this user, made by the server."""
        body = requests.TokenMint(ttl_seconds=ttl_seconds)
        return await self._rest._call(Token, "POST", _path("users", id, "tokens"), body, repeatable=True)

    async def revoke_tokens(self, id: str, *, jti: str | None = None) -> None:
        """End every token that the user was given until now, or the one with this `jti`."""
        await self._rest._do(
            "POST", _path("users", id, "tokens", "revoke"), requests.TokensRevoke(jti=jti), repeatable=True
        )

    def devices(self, id: str) -> AsyncIterator[Device]:
        """The devices this user has connected with."""
        return self._rest._list(Device, _path("users", id, "devices"))

    async def delete_device(self, id: str, device: str) -> None:
        """Forget a device."""
        await self._rest._do("DELETE", _path("users", id, "devices", device))


class MeRest(_Noun):
    """The user on whose behalf the requests are."""

    async def get(self) -> User:
        """The user's own profile."""
        return await self._rest._get(User, "/v1/me")

    async def update(
        self,
        *,
        name: str | UnsetType | None = UNSET,
        avatar_url: str | UnsetType | None = UNSET,
        custom: dict[str, Any] | UnsetType = UNSET,
    ) -> User:
        """Change what is given of it; None empties a field."""
        body = requests.UserUpdate(name=name, avatar_url=avatar_url, custom=custom)
        return await self._rest._call(User, "PATCH", "/v1/me", body)


class ChannelsRest(_Noun):
    """Channels, and the caller's own side of them."""

    async def create(
        self,
        id: str | None = None,
        *,
        type: str = "group",
        name: str | None = None,
        description: str | None = None,
        avatar_url: str | None = None,
        members: list[str] | None = None,
        roles: dict[str, str] | None = None,
        custom: dict[str, Any] | None = None,
        labels: dict[str, str] | None = None,
    ) -> Channel:
        """Make a channel. Of type `direct`: the same two people always get the same one."""
        body = requests.ChannelCreate(
            id=id,
            type=type,
            name=name,
            description=description,
            avatar_url=avatar_url,
            members=members or [],
            roles=roles or {},
            custom=custom or {},
            labels=labels or {},
        )
        return await self._rest._call(Channel, "POST", "/v1/channels", body, repeatable=type == "direct")

    def query(
        self,
        *,
        type: str | None = None,
        member: str | None = None,
        labels: Mapping[str, str] | None = None,
        archived: bool | None = None,
        hidden: bool | None = None,
        unread: bool | None = None,
        sort: Literal["last_message", "created", "updated"] | None = None,
        include: Iterable[Literal["last_message", "members"]] = (),
    ) -> AsyncIterator[Channel]:
        """The channels that match everything given, fetched page by page; `hidden` and `archived` need a user.

        `include`: what else each of them is to carry. `sort`: the newest first; by default `last_message`.
        """
        flags = {
            name: str(value).lower()
            for name, value in (("archived", archived), ("hidden", hidden), ("unread", unread))
            if value is not None
        }
        wanted = {f"label.{name}": value for name, value in (labels or {}).items()}
        plain = {"type": type, "member": member, "sort": sort, "include": ",".join(include) or None}
        return self._rest._list(Channel, "/v1/channels", {**plain, **flags, **wanted})

    async def get(self, id: str) -> Channel:
        """One channel, with the caller's own side of it in `membership`. Raises Refused (`not_found`)."""
        return await self._rest._get(Channel, _path("channels", id))

    async def update(
        self,
        id: str,
        *,
        name: str | UnsetType | None = UNSET,
        description: str | UnsetType | None = UNSET,
        avatar_url: str | UnsetType | None = UNSET,
        custom: dict[str, Any] | UnsetType = UNSET,
        labels: dict[str, str] | UnsetType = UNSET,
        frozen: bool | UnsetType = UNSET,
    ) -> Channel:
        """Change what is given; None empties a field. `frozen`: nobody may write for now."""
        body = requests.ChannelUpdate(
            name=name, description=description, avatar_url=avatar_url, custom=custom, labels=labels, frozen=frozen
        )
        return await self._rest._call(Channel, "PATCH", _path("channels", id), body)

    async def delete(self, id: str) -> None:
        """Delete a channel for everyone."""
        await self._rest._do("DELETE", _path("channels", id))

    async def set_membership(
        self,
        id: str,
        *,
        hidden: bool | UnsetType = UNSET,
        archived: bool | UnsetType = UNSET,
        muted_until: datetime | UnsetType | None = UNSET,
    ) -> Channel:
        """Change the caller's own side of a channel; the channel, with the new settings in `membership`."""
        body = requests.MembershipUpdate(hidden=hidden, archived=archived, muted_until=muted_until)
        return await self._rest._call(Channel, "PATCH", _path("channels", id, "membership"), body)

    async def join(self, id: str) -> None:
        """Join a public channel; the user may be in it already."""
        await self._rest._do("POST", _path("channels", id, "join"), repeatable=True)

    async def leave(self, id: str) -> None:
        """Leave a channel."""
        await self._rest._do("POST", _path("channels", id, "leave"))


class MembersRest(_Noun):
    """Who is in a channel, and in which role."""

    def all(self, channel: str) -> AsyncIterator[Member]:
        """Every member of a channel."""
        return self._rest._list(Member, _path("channels", channel, "members"))

    async def add(self, channel: str, users: list[str], *, role: str | None = None) -> list[Member]:
        """Add these users; those that are members already stay as they are. Any number, sent in bulks."""
        answer: list[Member] = []
        for start in range(0, len(users), limits.BULK_MAX):
            body = requests.MembersAdd(users=users[start : start + limits.BULK_MAX], role=role)
            page = await self._rest._call(Page, "POST", _path("channels", channel, "members"), body, repeatable=True)
            answer += [_decode(bytes(item), Member) for item in page.items]
        return answer

    async def update(self, channel: str, user: str, *, role: str) -> Member:
        """Give a member another role."""
        body = requests.MemberUpdate(role=role)
        return await self._rest._call(Member, "PATCH", _path("channels", channel, "members", user), body)

    async def remove(self, channel: str, user: str) -> None:
        """Remove a member: nothing of the channel reaches them once this has returned."""
        await self._rest._do("DELETE", _path("channels", channel, "members", user))


class MessagesRest(_Noun):
    """Messages: sent, read, changed, reacted to."""

    async def send(
        self,
        channel: str,
        text: str = "",
        *,
        key: str | None = None,
        reply_to: str | None = None,
        mentions: list[str] | None = None,
        mention_all: bool = False,
        attachments: list[Attachment] | None = None,
        custom: dict[str, Any] | None = None,
        silent: bool = False,
        kind: Literal["regular", "system"] = "regular",
    ) -> Sent:
        """Send a message, once, however often the request is repeated. `key`: see Channel.send of the Client."""
        body = requests.MessageSend(
            key=key or uuid.uuid4().hex,
            text=text,
            mentions=mentions or [],
            mention_all=mention_all,
            reply_to=reply_to,
            attachments=attachments or [],
            custom=custom or {},
            silent=silent,
            kind=kind,
        )
        return await self._rest._call(Sent, "POST", _path("channels", channel, "messages"), body, repeatable=True)

    async def page(
        self,
        channel: str,
        *,
        before: int | None = None,
        after: int | None = None,
        around: int | None = None,
        limit: int = limits.PAGE_DEFAULT,
    ) -> MessagePage:
        """One page in ascending order: the latest messages, or those before, after or around a seq."""
        return await self._rest._get(
            MessagePage, _path("channels", channel, "messages"), before=before, after=after, around=around, limit=limit
        )

    async def history(self, channel: str, *, newest_first: bool = True) -> AsyncIterator[Message]:
        """All messages of a channel, page by page as you go."""
        edge: int | None = None if newest_first else 0
        while True:
            page = await self.page(
                channel,
                before=edge if newest_first else None,
                after=None if newest_first else edge,
                limit=limits.PAGE_MAX,
            )
            for message in reversed(page.messages) if newest_first else page.messages:
                yield message
            if not page.messages or not (page.has_before if newest_first else page.has_after):
                return
            edge = page.messages[0 if newest_first else -1].seq

    async def replies(self, channel: str, id: str) -> AsyncIterator[Message]:
        """The replies to a message, the first one first, page by page as you go. Raises Refused (`not_found`)."""
        path = _path("channels", channel, "messages", id, "replies")
        edge = 0
        while True:
            page = await self._rest._get(MessagePage, path, after=edge, limit=limits.PAGE_MAX)
            for message in page.messages:
                yield message
            if not page.messages or not page.has_after:
                return
            edge = page.messages[-1].seq

    async def get(self, channel: str, id: str) -> Message:
        """One message; of a deleted one its place without its content. Raises Refused (`not_found`)."""
        return await self._rest._get(Message, _path("channels", channel, "messages", id))

    async def edit(
        self,
        channel: str,
        id: str,
        text: str | UnsetType = UNSET,
        *,
        mentions: Any = UNSET,
        attachments: Any = UNSET,
        custom: dict[str, Any] | UnsetType = UNSET,
    ) -> Message:
        """Change a message; what is left out stays. The message as it is now."""
        body = requests.MessageEdit(text=text, mentions=mentions, attachments=attachments, custom=custom)
        return await self._rest._call(Message, "PATCH", _path("channels", channel, "messages", id), body)

    async def delete(self, channel: str, id: str, *, hard: bool = False) -> int | None:
        """Delete a message; `hard` destroys its content and needs a permission of its own.

        Answers the seq of the change, None when there was nothing to change.
        """
        query = {"hard": "true"} if hard else None
        path = _path("channels", channel, "messages", id)
        return (await self._rest._call(Changed, "DELETE", path, query=query)).seq

    def versions(self, channel: str, id: str) -> AsyncIterator[MessageVersion]:
        """Every version of a message that was edited, the original first.

        For the message's author until it is deleted; otherwise it takes `message.versions`, and a hard deletion leaves
        none.
        """
        return self._rest._list(MessageVersion, _path("channels", channel, "messages", id, "versions"))

    async def trace(self, channel: str, id: str, *, user: str | None = None, limit: int = 50) -> MessageTrace:
        """What became of a message: which devices have it, which pushes left or did not and why, what webhooks
        answered; of the first `limit` members, or of one. It takes `trace.read` and shows nothing that was said."""
        return await self._rest._get(
            MessageTrace, _path("channels", channel, "messages", id, "trace"), user=user, limit=limit
        )

    async def react(self, channel: str, id: str, emoji: str) -> int | None:
        """Add the user's reaction. Answers the seq of the change, None when it was there already."""
        path = _path("channels", channel, "messages", id, "reactions")
        return (await self._rest._call(Changed, "POST", path, requests.ReactionAdd(emoji=emoji), repeatable=True)).seq

    async def unreact(self, channel: str, id: str, emoji: str) -> int | None:
        """Take the user's reaction back. Answers the seq of the change, None when there was none."""
        path = _path("channels", channel, "messages", id, "reactions")
        return (await self._rest._call(Changed, "DELETE", path, query={"emoji": emoji})).seq


class ReceiptsRest(_Noun):
    """How far everyone has read, and what is left."""

    async def read(self, channel: str, seq: int) -> Unread:
        """The user has read everything up to `seq`."""
        path = _path("channels", channel, "read")
        return await self._rest._call(Unread, "POST", path, requests.ReadMark(seq=seq), repeatable=True)

    async def mark_unread(self, channel: str, seq: int) -> Unread:
        """Count everything from the message at `seq` on as unread, until the channel is read again."""
        path = _path("channels", channel, "unread")
        return await self._rest._call(Unread, "POST", path, requests.ReadMark(seq=seq), repeatable=True)

    def all(self, channel: str) -> AsyncIterator[Receipt]:
        """How far each member is: delivered and read."""
        return self._rest._list(Receipt, _path("channels", channel, "receipts"))

    async def of_message(self, channel: str, id: str) -> ReceiptCounts:
        """How many of the other members a message has reached, and how many have read it."""
        return await self._rest._get(ReceiptCounts, _path("channels", channel, "messages", id, "receipts"))

    async def unread(self) -> UnreadTotal:
        """The user's unread messages and mentions in all, and every channel that has any (all pages of them)."""
        total = page = await self._rest._get(UnreadTotal, "/v1/unread")
        channels = list(page.channels)
        while page.next is not None:
            page = await self._rest._get(UnreadTotal, "/v1/unread", cursor=page.next)
            channels += page.channels
        return UnreadTotal(unread=total.unread, mentions=total.mentions, channels=channels)


class StreamsRest(_Noun):
    """Asynchronous polling by cursor: for backends that follow conversations without a connection."""

    async def moved(self, since: str | None = None, *, wait: int = 0, cursor: str | None = None) -> Moved:
        """The streams that moved since a mark, a page at a time; without a mark all of them.

        `wait`: seconds to wait for one that moves (at most POLL_WAIT_MAX). A stream may be listed though it stood
        still: compare each head with what you have. `cursor`: the `next` of the page before.
        """
        query = _given(since=since, wait=wait or None, cursor=cursor)
        return _decode(
            await self._rest.request("GET", "/v1/sync", query=query, timeout=REQUEST_SECONDS_MAX + wait), Moved
        )

    async def events(
        self, channel: str, after: int, *, epoch: str | None = None, limit: int | None = None, wait: int = 0
    ) -> EventPage:
        """A channel's events after a seq. Raises Refused with `epoch_changed` or `cursor_expired`: start over."""
        return await self._events(_path("channels", channel, "events"), after, epoch, limit, wait)

    async def own_events(
        self, after: int, *, epoch: str | None = None, limit: int | None = None, wait: int = 0
    ) -> EventPage:
        """The same for the user's own stream."""
        return await self._events("/v1/me/events", after, epoch, limit, wait)

    async def _events(self, path: str, after: int, epoch: str | None, limit: int | None, wait: int) -> EventPage:
        data = await self._rest.request(
            "GET",
            path,
            query=_given(after=after, epoch=epoch, limit=limit, wait=wait or None),
            timeout=REQUEST_SECONDS_MAX + wait,
        )
        raw = _decode(data, _RawEvents)
        return EventPage([decode_event(bytes(event)) for event in raw.events], raw.epoch, raw.head)
