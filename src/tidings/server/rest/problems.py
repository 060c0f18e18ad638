"""Refusals as responses (RFC 9457), and what the framework, msgspec and Python raise as refusals.

Anything that is not a refusal is our mistake: it is logged with its trace and an id, and answered as `internal` with
that id and nothing else.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException, MethodNotAllowedException
from litestar.response import Response

from tidings.server.errors import NotFound, Refusal
from tidings.server.telemetry import Metrics, get_logger
from tidings.wire.codec import encode
from tidings.wire.problems import ProblemDocument

PROBLEM_TYPE: Final = b"application/problem+json"

_log = get_logger(__name__)

# How msgspec (0.22) says where: "… - at `$.users[2].name`", "… - at `key` in `$.labels`".
_PLACE: Final = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `([^`]*)`")
_MISSING: Final = re.compile(r"^Object missing required field `([^`]*)`")
_BOUND: Final = re.compile(r"^Expected `\w+`(?: of length)? (?:<=|>=|<|>) (-?\d+)\b")


def refusal_of_validation(error: msgspec.ValidationError) -> Refusal:
    """What msgspec found wrong, naming the field by its path (`users[2].name`) and the bound where there is one."""
    text = str(error)
    place = _PLACE.search(text)
    path = place.group(1) if place else ""
    said = text[: place.start()] if place else text
    if named := _UNKNOWN.match(said) or _MISSING.match(said):
        path = f"{path}.{named.group(1)}" if path else named.group(1)
    bound = _BOUND.match(said)
    return Refusal(
        "invalid_field",
        said + ".",
        # A document of another shape altogether has no field to name.
        field=path or None,
        bound=int(bound.group(1)) if bound else None,
    )


def headers_of(document: ProblemDocument) -> list[tuple[bytes, bytes]]:
    """Headers that go with a problem: its type, when to come back, how to authenticate."""
    headers = [(b"content-type", PROBLEM_TYPE)]
    if document.retry_after_ms is not None and document.status in (429, 503):
        # Whole seconds, rounded up: coming back early would be refused again.
        headers.append((b"retry-after", b"%d" % -(-document.retry_after_ms // 1000)))
    if document.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="tidings"'))
    return headers


class ProblemHandler:
    """Litestar's exception handler: every exception becomes a problem document."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def document(self, error: Exception, scope: Any) -> ProblemDocument:
        """The problem that `error` is answered with; logs what is our fault."""
        if isinstance(error, Refusal):
            return error.document()
        if isinstance(error, HTTPException):
            return _of_framework(error).document()
        request_id = str(scope["state"].get("request_id", ""))
        route = str(scope.get("path_template", ""))
        self._metrics.internal_errors.labels("rest").inc()
        _log.error("rest.internal_error", request_id=request_id, route=route, exc_info=error)
        document = Refusal("internal", f"This is our mistake. It is logged as {request_id}.").document()
        return msgspec.structs.replace(document, instance=f"urn:tidings:request:{request_id}")

    def __call__(self, request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
        document = self.document(error, request.scope)
        headers = {name.decode(): value.decode() for name, value in headers_of(document)}
        if isinstance(error, MethodNotAllowedException) and error.headers and (allow := error.headers.get("allow")):
            headers["allow"] = allow
        return Response(
            encode(document), status_code=document.status, media_type=headers.pop("content-type"), headers=headers
        )


def _of_framework(error: HTTPException) -> Refusal:
    match error.status_code:
        case 404:
            return NotFound("address")
        case 405:
            return Refusal("method_not_allowed", "This address does not take this method.")
        case 413:
            return Refusal("too_large", "The request is larger than allowed.")
        case 415:
            return Refusal("unsupported_media", "Send JSON, as application/json.")
        case _:
            return Refusal("invalid", "The request cannot be read.")
