"""The HTTP door: every operation as a Litestar route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
from litestar import Litestar, Request
from litestar.handlers import HTTPRouteHandler

from tidings.server.config import Config
from tidings.server.domain.limits import Limiter, Rate
from tidings.server.errors import Refusal
from tidings.server.services import Services
from tidings.server.telemetry import Metrics
from tidings.wire.codec import encode

from . import apps, channels, jobs, members, messages, notifications, presend, receipts, sync, system, users, webhooks
from .auth import Gate
from .docs_page import render_page
from .door import Door
from .openapi import render_openapi
from .operation import Call, Operation, Reply, check_path, decode_body, decode_query
from .problems import ProblemHandler, headers_of

# What has a shortcut.
HOT: Final = "messages.send"

Endpoint = Callable[[Any, Any], Awaitable[Reply]]

# Bodies without a bound of their own; see Config.frame_bytes_max.
_JSON_TYPES: Final = ("application/json", "application/merge-patch+json")


def create_rest_app(
    services: Services,
    config: Config,
    *,
    metrics: Metrics,
    limiter: Limiter | None = None,
    draining: Callable[[], bool] = lambda: False,
    asyncapi: Callable[[], bytes] | None = None,
    route_handlers: Sequence[Any] = (),
) -> Litestar:
    """The ASGI application of everything under /v1 that is not a socket, /healthz, /readyz, /metrics and /docs.

    `limiter` is shared with the gateway, by keys of `limits.bucket_of`; `draining` says that the server is about to
    stop (call `services.sync.wake_all()` too, which answers long polls); `asyncapi` makes the socket's document;
    `route_handlers` are further Litestar routes, which get the same headers and problem documents but no
    authentication.
    """
    if limiter is None:  # Not `or`: a limiter that nobody has used yet is empty, and empty is false.
        limiter = Limiter(Rate(config.rest_rate_per_second, config.rest_burst))
    problems = ProblemHandler(metrics)
    found = all_operations(config, metrics, asyncapi)

    gate = Gate(services.auth, limiter, services.clock, metrics)
    endpoints = {op.id: _endpoint(op, services, config, gate, problems, draining) for op in found}
    app = _Litestar(
        route_handlers=[
            *(
                HTTPRouteHandler(
                    "".join(["/" + _typed(part) for part in op.path.strip("/").split("/")]),
                    http_method=[op.method],
                    name=op.id,
                    status_code=200,
                    include_in_schema=False,
                )(_handler(endpoints[op.id]))
                for op in found
            ),
            *route_handlers,
        ],
        exception_handlers={Exception: problems},
        # Ours is made from the operations; its errors and logs are ours too.
        openapi_config=None,
        logging_config=None,
        debug=False,
    )
    app.state.operations = found
    # Around everything, the router's own refusals included, which Litestar's middleware is not.
    inside = _Shortcut(app.asgi_handler, next(op for op in found if op.id == HOT), endpoints[HOT])
    app.asgi_handler = Door(inside, origins=config.cors_origins, rate=limiter.rate, metrics=metrics)
    return app


def all_operations(
    config: Config, metrics: Metrics, asyncapi: Callable[[], bytes] | None = None
) -> tuple[Operation, ...]:
    """Every operation of the door, in the order in which people read them."""
    nouns = (
        *apps.OPERATIONS,
        *users.OPERATIONS,
        *channels.OPERATIONS,
        *members.OPERATIONS,
        messages.send_operation(messages.InFlight()),
        *messages.OPERATIONS,
        *receipts.OPERATIONS,
        *sync.OPERATIONS,
        *notifications.OPERATIONS,
        *webhooks.OPERATIONS,
        *presend.OPERATIONS,
        *jobs.OPERATIONS,
        *system.OPERATIONS,
        system.metrics_operation(metrics, public=config.metrics_public),
    )

    def openapi() -> bytes:
        return render_openapi(everything, url=config.url, body_max=config.frame_bytes_max)

    def page() -> bytes:
        return render_page(msgspec.json.decode(openapi()))

    everything = (*nouns, *system.documents(openapi, page, asyncapi))
    return everything


class _Litestar(Litestar):
    """Litestar without the plugins that it takes by itself for libraries that it finds: no type here is theirs, and
    pydantic, where something else has brought it along, would be a seventh of the start."""

    @staticmethod
    def _get_default_plugins(plugins: list[Any]) -> list[Any]:
        return plugins


def _typed(part: str) -> str:
    return f"{{{part[1:-1]}:str}}" if part.startswith("{") else part


def _endpoint(
    op: Operation,
    services: Services,
    config: Config,
    gate: Gate,
    problems: ProblemHandler,
    draining: Callable[[], bool],
) -> Endpoint:
    decoder = msgspec.json.Decoder(op.body) if op.body is not None else None
    body_max = op.body_max or config.frame_bytes_max
    handle, has_path, status = op.handle, bool(op.parameters), op.status

    async def endpoint(scope: Any, receive: Any) -> Reply:
        try:
            entrance = None if op.open else await gate.admit(scope)
            path = scope["path_params"]
            if has_path:
                check_path(path)
            query = decode_query(op, scope["query_string"])
            body = None
            if decoder is not None:
                body = decode_body(decoder, await read_body(scope, receive, body_max))
                if entrance is not None and not entrance.stands:
                    await entrance.renew()
            result = await handle(Call(services, entrance, path, query, body, scope, receive, draining))
        except Exception as error:
            # Here rather than in Litestar's handler: refusals are ordinary answers and should cost like them.
            document = problems.document(error, scope)
            return Reply(document.status, encode(document), headers_of(document))
        if isinstance(result, Reply):
            return result
        return Reply(status, b"" if result is None else encode(result))

    return endpoint


def _handler(endpoint: Endpoint) -> Callable[..., Any]:
    async def handler(request: Request[Any, Any, Any]) -> Reply:
        return await endpoint(request.scope, request.receive)

    return handler


class _Shortcut:
    """Past the router for the one operation that is called more often than all others together: the same endpoint,
    without a third of the way there. Whatever is not plainly its address goes the long way."""

    def __init__(self, app: Any, op: Operation, endpoint: Endpoint) -> None:
        self._app = app
        self._endpoint = endpoint
        self._method, self._template = op.method, op.path
        self._head, _, self._tail = op.path.partition("{channel}")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == self._method:
            path: str = scope["path"]
            head, tail = self._head, self._tail
            if path.startswith(head) and path.endswith(tail):
                channel = path[len(head) : -len(tail)]
                if channel and "/" not in channel:
                    scope["path_params"] = {"channel": channel}
                    scope["path_template"] = self._template
                    reply = await self._endpoint(scope, receive)
                    await reply(scope, receive, send)
                    return
        await self._app(scope, receive, send)


async def read_body(scope: Any, receive: Any, bound: int) -> bytes:
    """The whole body, at most `bound` bytes of it ever in memory. Raises Refusal: `too_large`,
    `unsupported_media`, `invalid` when the client left in the middle."""
    too_large = Refusal("too_large", f"At most {bound} bytes are allowed here.", bound=bound)
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower().decode("latin-1")
            if kind not in _JSON_TYPES:
                raise Refusal("unsupported_media", "Send JSON, with Content-Type: application/json.")
        elif name == b"content-length" and value.isdigit() and int(value) > bound:
            raise too_large
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise Refusal("unsupported_media", "Compressed bodies are not taken.")
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts, size = [body], len(body)
        while message.get("more_body") and size <= bound:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        body = b"".join(parts)
    if len(body) > bound:
        raise too_large
    if message["type"] == "http.disconnect":
        raise Refusal("invalid", "The body ended early.")
    return body
