"""What every request passes on its way in and every reply on its way out, whatever answers it.

* a request id: the client's `X-Request-Id` if it is harmless, else a new one, on the reply and in every log line;
* `Cache-Control: no-store` under /v1: conversations are not to lie in caches; `X-Content-Type-Options: nosniff`;
* CORS: any origin may call /v1 unless configured otherwise. That is safe because no credential here is ambient: the
  bearer token is put into each request by the page's own code, never by the browser as cookies are. So a foreign page
  can do nothing here that it could not do from a server of its own, and credentials mode is never allowed;
* metrics by route and status, and one access log event without query string, token or content.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Final

from tidings.server.domain.limits import Rate
from tidings.server.telemetry import Counter, Histogram, Metrics, get_logger

from .limits import limit_header, policy_header

ASGI = Callable[[Any, Any, Any], Awaitable[None]]

_REQUEST_ID: Final = re.compile(rb"^[A-Za-z0-9._\-]{1,64}\Z")
_NO_STORE: Final = (b"cache-control", b"no-store")
_NOSNIFF: Final = (b"x-content-type-options", b"nosniff")
# A day: what browsers keep at most (Firefox; Chromium keeps two hours).
_PREFLIGHT_SECONDS: Final = b"86400"
_ALLOW_HEADERS: Final = b"authorization, content-type, idempotency-key, tidings-app, tidings-user, x-request-id"
_ALLOW_METHODS: Final = b"GET, POST, PUT, PATCH, DELETE"
_EXPOSE: Final = b"ratelimit, ratelimit-policy, retry-after, x-request-id, idempotency-replayed"
UNMATCHED: Final = "unmatched"


class Door:
    """ASGI application around Litestar's own, so that refusals of the router pass it too."""

    def __init__(self, app: ASGI, *, origins: tuple[str, ...], rate: Rate, metrics: Metrics) -> None:
        self._app = app
        self._any_origin = "*" in origins
        self._origins = frozenset(origin.encode().lower() for origin in origins)
        self._policy = (b"ratelimit-policy", policy_header(rate))
        self._metrics = metrics
        self._counters: dict[tuple[str, int], Counter] = {}
        self._timers: dict[str, Histogram] = {}
        # One draw of randomness and a count: a system call per request would be a tenth of what the door costs.
        self._id_format = b"r_" + secrets.token_hex(6).encode() + b"%x"
        self._requests = 0
        self._log = get_logger(__name__).bind()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        origin = request_id = preflight = None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = value if _REQUEST_ID.match(value) else None
            elif name == b"origin":
                origin = value
            elif name == b"access-control-request-method":
                preflight = value
        if request_id is None:
            self._requests += 1
            request_id = self._id_format % self._requests
        state = scope["state"]
        state["request_id"] = request_id.decode()
        api: bool = scope["path"].startswith("/v1/")
        headers = [(b"x-request-id", request_id), _NOSNIFF]
        if api:
            headers.append(_NO_STORE)
            if origin is not None:
                headers += self._cors(origin)
                if preflight is not None and scope["method"] == "OPTIONS":
                    await self._preflight(send, headers)
                    return
        status = 0

        async def reply(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                verdict = state.get("rate")
                if verdict is not None:
                    headers.append(self._policy)
                    headers.append((b"ratelimit", limit_header(verdict)))
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        try:
            await self._app(scope, receive, reply)
        except asyncio.CancelledError:
            # The client is gone, or the server is: 499, as nginx counts it.
            status = status or 499
            raise
        finally:
            self._account(scope, status, perf_counter() - started)

    def _account(self, scope: Any, status: int, seconds: float) -> None:
        route = scope.get("path_template") or UNMATCHED
        counter = self._counters.get((route, status))
        if counter is None:
            counter = self._counters[route, status] = self._metrics.rest_requests.labels(route, str(status))
            self._timers.setdefault(route, self._metrics.rest_seconds.labels(route))
        counter.value += 1
        self._timers[route].observe(seconds)
        actor = scope["state"].get("actor")
        # At debug: at info it would be most of a busy server's log and a third of its time.
        self._log.debug(
            "rest.request",
            request_id=scope["state"]["request_id"],
            method=scope["method"],
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            app=actor.app.id if actor is not None else None,
            actor=actor.via if actor is not None else None,
        )

    def _cors(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        if self._any_origin:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSE)]
        if origin.lower() not in self._origins:
            return [(b"vary", b"Origin")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSE),
            (b"vary", b"Origin"),
        ]

    async def _preflight(self, send: Any, headers: list[tuple[bytes, bytes]]) -> None:
        # `Authorization` has to be named: the wildcard does not cover it (Fetch, CORS-unsafe header names).
        allowed = any(name == b"access-control-allow-origin" for name, _ in headers)
        if allowed:
            headers += [
                (b"access-control-allow-methods", _ALLOW_METHODS),
                (b"access-control-allow-headers", _ALLOW_HEADERS),
                (b"access-control-max-age", _PREFLIGHT_SECONDS),
            ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
