"""The OpenAPI 3.1 document, made from the operations and the wire types, so that it cannot differ from what runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Final

import msgspec

from tidings.wire.codec import encode, to_builtins
from tidings.wire.problems import CATALOGUE, ProblemDocument, problem_document

from .examples import example_of
from .limits import POLICY
from .operation import BULK_BYTES_MAX, Operation

_REF: Final = "#/components/schemas/{name}"
_JSON: Final = "application/json"
_PROBLEM: Final = "application/problem+json"

_TOKEN: Final = tuple(
    code for code, entry in CATALOGUE.items() if entry.status == 401 and code not in ("auth_timeout",)
)
_TAGS: Final = {
    "app": "The app itself: settings, keys, roles, channel types, audit trail",
    "users": "Users, their tokens and devices",
    "me": "The user who asks",
    "channels": "Conversations",
    "members": "Who is in a channel",
    "messages": "What is said",
    "receipts": "Read positions and unread counts",
    "sync": "Catching up by polling",
    "notifications": "Who is woken, where and when",
    "push": "Push providers",
    "webhooks": "Where your backend hears of events",
    "presend": "Your say about messages before they are stored",
    "jobs": "What is done behind the scenes",
    "system": "For operators and developers",
}
_DESCRIPTION: Final = """\
Chat for your application, on your own machines.

**Credentials.** `Authorization: Bearer` with an API key (your backend) or a user's token (a JWT that your identity \
system signs). A backend acts for a user with `Tidings-User: <id>`. A token without an `app` claim needs \
`Tidings-App: <id>`.

**Problems** are RFC 9457 documents with a stable `code`; `retry` says whether the same request may be sent again.

**Lists** come in pages: give `next` back as `cursor` until it is null. In query strings lists are comma-separated and \
`+` is written %2B.

**Limits.** `RateLimit-Policy` and `RateLimit` tell the credential's quota, `Retry-After` when to come back."""

_PARAMETERS: Final = {
    "channel": ("A channel's id", "ch_7f3k"),
    "user": ("A user's id", "alice"),
    "message": ("A message's id", "m_01J9ZQ4T8V6N2R5C7XKDMBWEHY"),
    "device": ("A device's id", "phone-1"),
    "emoji": ("An emoji, percent-encoded", "👍"),
    "level": ("Where the role is held", "channel"),
    "role": ("A role's name", "nurse"),
    "type": ("A channel type's name", "consultation"),
    "key": ("An API key's id", "k7f3m2"),
    "kid": ("A signing key's id", "s1"),
    "push_provider": ("A push provider's id", "fcm"),
    "webhook": ("A webhook's id", "wh_7f3k"),
    "delivery": ("A delivery's id", "dl_01J9ZQ4T8V6N2R5C7XKDMBWEHY"),
    "job": ("A job's id", "job_42"),
    "provider": ("An identity provider's id", "idp_1"),
}


def codes_of(op: Operation) -> dict[int, list[str]]:
    """Every problem code that the operation may answer with, by status."""
    codes = ["invalid", "internal", "unavailable"]
    if op.open:
        codes = ["invalid", "internal"]
    else:
        codes += [*_TOKEN, "user_deactivated", "forbidden", "rate_limited", "invalid_field"]
    if op.parameters:
        codes.append("not_found")
    if op.query is not None:
        codes.append("invalid_field")
        if any(one.name == "cursor" for one in _fields(op.query)):
            codes.append("cursor_invalid")
    if op.body is not None:
        codes += ["invalid_field", "too_large", "unsupported_media"]
    # A path or query that fits no operation's shape, or a filter that does not exist.
    codes.append("invalid_field")
    found: dict[int, list[str]] = {}
    for code in dict.fromkeys([*codes, *op.problems]):
        found.setdefault(CATALOGUE[code].status, []).append(code)
    return dict(sorted(found.items()))


def make_openapi(operations: Sequence[Operation], *, url: str, body_max: int) -> dict[str, Any]:
    """The document. `url` is the server's public address, `body_max` the bound of bodies without one of their own."""
    types = [ProblemDocument, *_types(operations)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {id(type): schema for type, schema in zip(types, schemas, strict=True)}
    problem = components["ProblemDocument"]
    problem["properties"]["code"]["enum"] = list(CATALOGUE)
    paths: dict[str, dict[str, Any]] = {}
    responses: dict[str, Any] = {}
    for op in operations:
        paths.setdefault(op.path, {})[op.method.lower()] = _operation(op, by_type, responses, body_max)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tidings",
            "version": version("tidings"),
            "summary": "A chat API that a team runs itself",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": url}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "security": [{"apiKey": []}, {"userToken": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "responses": dict(sorted(responses.items())),
            "headers": _HEADERS,
            "securitySchemes": {
                "apiKey": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key of the app's backend: tk_<id>_<secret>",
                },
                "userToken": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "A user's token: claims sub (the user's id), exp, iat, app; optionally jti",
                },
            },
        },
    }


def render_openapi(operations: Sequence[Operation], *, url: str, body_max: int) -> bytes:
    """The document as JSON."""
    return encode(make_openapi(operations, url=url, body_max=body_max))


_HEADERS: Final[dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The request's id: the client's own, or one made here",
        "schema": {"type": "string"},
        "example": "r_9f86d081884c7d65",
    },
    "RateLimit-Policy": {
        "description": "Quota q of requests and the window w in seconds in which it comes back"
        " (draft-ietf-httpapi-ratelimit-headers)",
        "schema": {"type": "string"},
        "example": f'"{POLICY}";q=400;w=2',
    },
    "RateLimit": {
        "description": "Requests that remain (r), and seconds until all of them are back (t)",
        "schema": {"type": "string"},
        "example": f'"{POLICY}";r=399;t=1',
    },
    "Retry-After": {
        "description": "Seconds to wait before the same request is worth repeating",
        "schema": {"type": "integer", "minimum": 1},
        "example": 1,
    },
    "WWW-Authenticate": {"description": "How to authenticate", "schema": {"type": "string"}, "example": "Bearer"},
}


@cache
def _fields(query: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    """A query's fields, the same objects each time: their types are told apart by identity."""
    return msgspec.structs.fields(query)


def _types(operations: Sequence[Operation]) -> list[Any]:
    found: dict[int, Any] = {}
    for op in operations:
        for type in (op.body, op.reply):
            if type is not None:
                found[id(type)] = type
        if op.query is not None:
            for one in _fields(op.query):
                found[id(one.type)] = one.type
    return list(found.values())


def _operation(op: Operation, schemas: dict[int, Any], shared: dict[str, Any], body_max: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": op.id,
        "tags": [op.tag],
        "summary": op.summary,
        "description": op.description,
        "parameters": [*_path_parameters(op), *_query_parameters(op, schemas), *_header_parameters(op)],
        "responses": _responses(op, schemas, shared),
    }
    if not made["parameters"]:
        del made["parameters"]
    if op.open:
        made["security"] = []
    if op.body is not None:
        made["requestBody"] = {
            "required": True,
            "description": f"At most {op.body_max or body_max} bytes",
            "content": {_JSON: {"schema": schemas[id(op.body)], "example": to_builtins(example_of(op.body))}},
        }
    return made


def _path_parameters(op: Operation) -> list[dict[str, Any]]:
    made = []
    for name in op.parameters:
        description, example = _PARAMETERS[name]
        schema: dict[str, Any] = {"type": "string", "pattern": r"^[A-Za-z0-9_.:@+\-]{1,128}$"}
        if name == "level":
            schema = {"type": "string", "enum": ["app", "channel", "relation"]}
        elif name == "emoji":
            schema = {"type": "string", "pattern": r"^[^\s\x00-\x1f\x7f/]{1,64}$"}
        made.append(
            {
                "name": name,
                "in": "path",
                "required": True,
                "description": description,
                "schema": schema,
                "example": example,
            }
        )
    return made


def _query_parameters(op: Operation, schemas: dict[int, Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if op.query is None:
        return made
    for one in _fields(op.query):
        schema = dict(schemas[id(one.type)])
        # A parameter is absent rather than null.
        if "anyOf" in schema:
            rest = [choice for choice in schema.pop("anyOf") if choice != {"type": "null"}]
            schema = {**rest[0], **schema}
        described = schema.pop("description", None)
        if one.default not in (msgspec.NODEFAULT, None):
            schema["default"] = one.default
        if one.name == "label":
            made.append(
                {
                    "name": "label.{name}",
                    "in": "query",
                    "description": "A label's value: label.<name>=<value>, for as many labels as are wanted",
                    "schema": {"type": "string", "maxLength": 64},
                }
            )
            continue
        parameter: dict[str, Any] = {"name": one.encode_name, "in": "query", "schema": schema}
        if described:
            parameter["description"] = described
        if one.required:
            parameter["required"] = True
        if schema.get("type") == "array":
            parameter |= {"style": "form", "explode": False}
        made.append(parameter)
    return made


def _header_parameters(op: Operation) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "header",
            "description": description,
            "schema": {"type": "string", "pattern": r"^[\x21-\x7e]{1,128}$"},
            "example": "5f0c7c1e-4b1d-4d5e-9f6a-2b8f1d0c9a11",
        }
        for name, description in op.request_headers.items()
    ]
    if not op.open:
        made.append(
            {
                "name": "Tidings-User",
                "in": "header",
                "description": "With an API key that has `user.act_as`: the user to act for",
                "schema": {"type": "string", "pattern": r"^[A-Za-z0-9_.:@+\-]{1,128}$"},
            }
        )
    return made


def _responses(op: Operation, schemas: dict[int, Any], shared: dict[str, Any]) -> dict[str, Any]:
    common: dict[str, Any] = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    if not op.open:
        common |= {name: {"$ref": f"#/components/headers/{name}"} for name in ("RateLimit-Policy", "RateLimit")}
    own = {
        name: {"description": description, "schema": {"type": "string"}}
        for name, description in op.reply_headers.items()
    }
    made: dict[str, Any] = {}
    said = {201: "Made", 204: "Done", 200: "As asked"}
    for status, description in ({op.status: said[op.status]} | dict(op.also)).items():
        made[str(status)] = {"description": description, "headers": common | own}
        if op.reply is not None:
            content: dict[str, Any] = {"schema": schemas[id(op.reply)]}
            if (example := example_of(op.reply)) is not None:
                content["example"] = to_builtins(example)
            made[str(status)]["content"] = {op.media_type: content}
    for status, codes in codes_of(op).items():
        headers = {"X-Request-Id": common["X-Request-Id"]} if status == 401 else dict(common)
        if status in (429, 503):
            headers["Retry-After"] = {"$ref": "#/components/headers/Retry-After"}
        if status == 401:
            headers["WWW-Authenticate"] = {"$ref": "#/components/headers/WWW-Authenticate"}
        if str(status) in made:
            # /readyz says why in its own words.
            continue
        response = {
            "description": "Problem: " + ", ".join(codes),
            "headers": headers,
            "content": {
                _PROBLEM: {
                    "schema": {"$ref": _REF.format(name="ProblemDocument")},
                    "examples": {code: {"value": to_builtins(_problem(code))} for code in codes},
                }
            },
        }
        # Most operations share theirs: written out at each, they would be nine tenths of the document.
        name = _name_of(response, status, shared)
        shared[name] = response
        made[str(status)] = {"$ref": f"#/components/responses/{name}"}
    return made


def _name_of(response: dict[str, Any], status: int, shared: dict[str, Any]) -> str:
    number = 1
    while shared.get(name := f"Problem{status}" + (f"_{number}" if number > 1 else ""), response) != response:
        number += 1
    return name


def _problem(code: str) -> ProblemDocument:
    return problem_document(
        code,
        CATALOGUE[code].title + ".",
        field="text" if code == "invalid_field" else None,
        bound=BULK_BYTES_MAX if code == "too_large" else None,
        retry_after_ms=1000 if CATALOGUE[code].status in (429, 503) else None,
    )
