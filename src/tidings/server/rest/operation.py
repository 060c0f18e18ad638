"""An operation: one method on one address, with everything that is known about it in one place.

What a handler is given is decoded and checked; what it gives back is a struct of `tidings.wire`, or a `Reply` where it
has bytes or another status. The OpenAPI document, the access matrix and the routes are made from the same entries.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Generic, Literal, TypeVar
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta

from tidings.server.errors import NotFound, Refusal
from tidings.server.services import Services
from tidings.server.services.access import Actor
from tidings.wire import limits
from tidings.wire.codec import encode

from .auth import Pass
from .problems import refusal_of_validation

Q = TypeVar("Q")
B = TypeVar("B")
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Headers = list[tuple[bytes, bytes]]

JSON_TYPE: Final = (b"content-type", b"application/json")

# A hundred users with 8 KB of custom data each.
BULK_BYTES_MAX: Final = 1 << 20
# Custom data is references and small state. What is decoded here is encoded and decoded again deeper in the call stack,
# and Python's stack ends at about a thousand.
JSON_DEPTH_MAX: Final = 64
# Names and values in a query string: every filter of the richest list, twice.
QUERY_FIELDS_MAX: Final = 64


class Reply:
    """A finished response. `body` is encoded already."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: bytes = b"", headers: Headers | None = None) -> None:
        self.status = status
        self.body = body
        self.headers: Headers = headers if headers is not None else ([JSON_TYPE] if body else [])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it: an ASGI application, which is how Litestar takes responses untouched."""
        headers = self.headers
        if self.status != 204:
            headers = [*headers, (b"content-length", b"%d" % len(self.body))]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


def json_reply(status: int, value: Any, *headers: tuple[bytes, bytes]) -> Reply:
    """A struct as JSON."""
    return Reply(status, encode(value), [JSON_TYPE, *headers])


@dataclass(slots=True)
class Call(Generic[Q, B]):
    """One request to an operation. `path` holds checked identifiers. `entrance`: None where nobody is asked who they
    are."""

    services: Services
    entrance: Pass | None
    path: dict[str, str]
    query: Q
    body: B
    scope: Any
    receive: Any
    draining: Callable[[], bool]

    def header(self, name: bytes) -> str | None:
        """A request header by its lower-case name; bytes that are not ASCII make it unreadable. Raises Refusal."""
        return header_of(self.scope, name)

    @property
    def actor(self) -> Actor:
        """Who asks."""
        assert self.entrance is not None, "an open operation asks nobody who they are"
        return self.entrance.granted.actor

    async def renew(self) -> None:
        """After a wait: go on as things stand now. Raises Refusal when the caller would not be let in any more."""
        if self.entrance is not None and not self.entrance.stands:
            await self.entrance.renew()

    @property
    def user(self) -> str:
        """The user who asks. Raises Refusal when a backend asks for itself."""
        if self.actor.user is None:
            raise Refusal(
                "invalid_field", "This is about a user: name them with the header Tidings-User.", field="user"
            )
        return self.actor.user


def header_of(scope: Any, name: bytes) -> str | None:
    """A request header by its lower-case name. Raises Refusal when it is not ASCII."""
    for key, value in scope["headers"]:
        if key == name:
            try:
                return str(value, "ascii")
            except UnicodeDecodeError:
                raise Refusal("invalid", f"The header {name.decode()} is not ASCII.") from None
    return None


Handler = Callable[[Call[Any, Any]], Awaitable[Any]]


@dataclass(slots=True, frozen=True)
class Operation:
    """`id` is its operationId and its metrics label. `problems` are codes beyond those that follow from its shape.

    `also`: further successful statuses with what they mean. `open`: no credentials are asked for.
    """

    id: str
    method: Method
    path: str
    summary: str
    handle: Handler
    description: str
    reply: Any
    status: int = 200
    also: Mapping[int, str] = field(default_factory=dict)
    query: Any = None
    body: Any = None
    body_max: int | None = None
    problems: tuple[str, ...] = ()
    request_headers: Mapping[str, str] = field(default_factory=dict)
    reply_headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"
    open: bool = False
    labels: bool = False

    @property
    def tag(self) -> str:
        """The noun it belongs to."""
        return self.id.partition(".")[0]

    @property
    def parameters(self) -> list[str]:
        """Names of its path parameters, in order."""
        return re.findall(r"{(\w+)}", self.path)


def operation(
    id: str,
    method: Method,
    path: str,
    summary: str,
    *,
    reply: Any = None,
    status: int | None = None,
    also: Mapping[int, str] | None = None,
    query: Any = None,
    body: Any = None,
    body_max: int | None = None,
    problems: tuple[str, ...] = (),
    request_headers: Mapping[str, str] | None = None,
    reply_headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
    open: bool = False,
    labels: bool = False,
) -> Callable[[Callable[[Call[Any, Any]], Awaitable[Any]]], Operation]:
    """Declare the handler below as an operation; its docstring is the description that users read."""

    def declare(handle: Handler) -> Operation:
        return Operation(
            id,
            method,
            path,
            summary,
            handle,
            " ".join((handle.__doc__ or "").split()),
            reply,
            status if status is not None else (204 if reply is None else 200),
            also or {},
            query,
            body,
            body_max,
            problems,
            request_headers or {},
            reply_headers or {},
            media_type,
            open,
            labels,
        )

    return declare


# ---------------------------------------------------------------- decoding

# What each path parameter may be; what cannot exist is answered like what does not.
_ID: Final = re.compile(limits.ID_PATTERN)
_EMOJI: Final = re.compile(rf"^[^\s\x00-\x1f\x7f]{{1,{limits.EMOJI_LENGTH_MAX}}}\Z")
_LEVEL: Final = re.compile(r"^(app|channel|relation)\Z")
_PROVIDER: Final = re.compile(r"^[a-z0-9][a-z0-9_\-]{0,31}\Z")
PATTERNS: Final[dict[str, re.Pattern[str]]] = {"emoji": _EMOJI, "level": _LEVEL, "push_provider": _PROVIDER}


def check_path(parameters: Mapping[str, str]) -> None:
    """Refuse parameters that no stored thing can have. Raises NotFound naming the parameter."""
    for name, value in parameters.items():
        pattern = PATTERNS.get(name, _ID)
        # `$` also matches before a final newline, which no identifier has.
        if not pattern.match(value) or value[-1] == "\n":
            raise NotFound(name, field=name)


def decode_body(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """One JSON document as the operation's body. Raises Refusal: `invalid`, or `invalid_field` naming the field."""
    if raw.count(b"[") + raw.count(b"{") > JSON_DEPTH_MAX and _depth(raw) > JSON_DEPTH_MAX:
        raise Refusal("invalid", f"The JSON is nested deeper than {JSON_DEPTH_MAX} levels.", bound=JSON_DEPTH_MAX)
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise refusal_of_validation(error) from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Refusal("invalid", "The body is not JSON in UTF-8." if raw else "A JSON body is needed.") from None


def _depth(raw: bytes) -> int:
    """How deep brackets are nested outside of strings; anything for what is not JSON."""
    deepest = depth = 0
    for token in _STRUCTURE.finditer(raw):
        match token.group()[:1]:
            case b"[" | b"{":
                depth += 1
                deepest = max(deepest, depth)
            case b"]" | b"}":
                depth -= 1
    return deepest


# Strings are matched whole, so that brackets in them do not count. Possessive: an unclosed one is not tried again.
_STRUCTURE: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


def decode_query(op: Operation, raw: bytes) -> Any:
    """The query string as the operation's struct. Lists are comma-separated. Raises Refusal naming the parameter."""
    if not raw and op.query is None:
        return None
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
    except ValueError:
        raise Refusal("invalid", "The query string cannot be read.") from None
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    lists = _lists(op.query) if op.query is not None else frozenset()
    for name, value in pairs:
        if name in values:
            raise Refusal("invalid_field", "This parameter is given twice.", field=name[:64])
        if op.labels and name.startswith("label."):
            labels[name[6:]] = value
        elif name in lists:
            values[name] = value.split(",") if value else []
        else:
            values[name] = value
    if op.query is None:
        if values:
            raise Refusal("invalid_field", "There is no such parameter.", field=next(iter(values))[:64])
        return None
    if labels:
        values["label"] = labels
    elif "label" in values:
        raise Refusal("invalid_field", "Write label.<name>=<value>.", field="label")
    try:
        return msgspec.convert(values, op.query, strict=False)
    except msgspec.ValidationError as error:
        raise refusal_of_validation(error) from None


_LISTS: Final[dict[Any, frozenset[str]]] = {}


def _lists(query: Any) -> frozenset[str]:
    found = _LISTS.get(query)
    if found is None:
        names = {
            one.encode_name
            for one in msgspec.structs.fields(query)
            if isinstance(_without_none(msgspec.inspect.type_info(one.type)), msgspec.inspect.ListType)
        }
        found = _LISTS[query] = frozenset(names)
    return found


def _without_none(type: Any) -> Any:
    if isinstance(type, msgspec.inspect.UnionType):
        return next(one for one in type.types if not isinstance(one, msgspec.inspect.NoneType))
    return type


class Query(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every query string. Unknown parameters are refused: a misspelt filter must not be ignored in silence."""


CursorText = Annotated[str, Meta(max_length=512, description="`next` of the page before")]
PageSize = Annotated[int, Meta(ge=1, le=limits.PAGE_MAX, description="Items on one page")]


class Paging(Query, frozen=True, kw_only=True):
    """Every list that is cut into pages."""

    cursor: CursorText | None = None
    limit: PageSize = limits.PAGE_DEFAULT
