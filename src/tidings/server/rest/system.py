"""What operators and developers ask: is it alive, ready, how much, and what does it speak."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from tidings.server.errors import NotFound
from tidings.server.store.base import Row, Tx
from tidings.server.telemetry import EXPOSITION_TYPE, Metrics
from tidings.wire.replies import Health

from .operation import JSON_TYPE, Call, Operation, Reply, json_reply, operation

# A store that needs longer than this for one row serves nobody. Orchestrators' probes give up after 1-3 s.
READY_SECONDS_MAX: Final = 2.0
_FORWARDED: Final = frozenset({b"x-forwarded-for", b"forwarded", b"x-real-ip"})
_HTML: Final = (b"content-type", b"text/html; charset=utf-8")
# The page has no script, no image, no font and nothing from elsewhere, and may have none.
_PAGE_POLICY: Final = (
    b"content-security-policy",
    b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
)


@operation("system.health", "GET", "/healthz", "Is it alive", reply=Health, open=True)
async def health(call: Call[None, None]) -> Reply:
    """The process answers. Says nothing of its store."""
    return json_reply(200, Health(status="ok"))


@operation(
    "system.ready",
    "GET",
    "/readyz",
    "Is it ready",
    reply=Health,
    also={503: "No traffic, please: the server is draining, or its store does not answer"},
    open=True,
)
async def ready(call: Call[None, None]) -> Reply:
    """The store answers a read and the server is not about to stop."""
    if call.draining():
        return json_reply(503, Health(status="draining"))

    async def unit(tx: Tx) -> Row | None:
        return await tx.one("SELECT 1")

    try:
        async with asyncio.timeout(READY_SECONDS_MAX):
            await call.services.store.read(unit)
    except Exception:
        # Whatever it is, it is not ready; the store logs why.
        return json_reply(503, Health(status="store"))
    bus = call.services.bus
    # Not a reason to turn traffic away: where the bus itself is down, all nodes would do so at once.
    return json_reply(200, Health(status="ok", bus="cut_off" if bus is not None and not bus.connected else None))


def is_near(scope: Any) -> bool:
    """Whether the request comes straight from this machine or a private network. One that a proxy has forwarded
    comes from anywhere."""
    client = scope.get("client")
    if client is None or any(name in _FORWARDED for name, _ in scope["headers"]):
        return False
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_private


def metrics_operation(metrics: Metrics, *, public: bool) -> Operation:
    """The metrics, for this machine and private networks unless `public`."""

    @operation(
        "system.metrics",
        "GET",
        "/metrics",
        "Metrics for Prometheus",
        reply=str,
        open=True,
        media_type=EXPOSITION_TYPE,
        problems=("not_found",),
    )
    async def exposition(call: Call[None, None]) -> Reply:
        """Only for callers on this machine or a private network, unless the setting `metrics_public` is on: to
        others it does not exist."""
        if not public and not is_near(call.scope):
            raise NotFound("address")
        return Reply(200, metrics.exposition(), [(b"content-type", EXPOSITION_TYPE.encode())])

    return exposition


def documents(
    openapi: Callable[[], bytes], page: Callable[[], bytes], asyncapi: Callable[[], bytes] | None
) -> tuple[Operation, ...]:
    """The contracts that this server keeps, each made at its first use."""
    openapi, page = cache(openapi), cache(page)

    @operation("system.openapi", "GET", "/v1/openapi.json", "The OpenAPI document", reply=dict[str, Any], open=True)
    async def openapi_json(call: Call[None, None]) -> Reply:
        """OpenAPI 3.1 of everything under this address."""
        return Reply(200, openapi(), [JSON_TYPE])

    @operation(
        "system.docs", "GET", "/docs", "The operations, readable", reply=str, open=True, media_type=_HTML[1].decode()
    )
    async def docs(call: Call[None, None]) -> Reply:
        """A page made from the OpenAPI document."""
        return Reply(200, page(), [_HTML, _PAGE_POLICY])

    if asyncapi is None:
        return openapi_json, docs
    socket = cache(asyncapi)

    @operation("system.asyncapi", "GET", "/v1/asyncapi.json", "The AsyncAPI document", reply=dict[str, Any], open=True)
    async def asyncapi_json(call: Call[None, None]) -> Reply:
        """AsyncAPI 3 of the socket."""
        return Reply(200, socket(), [JSON_TYPE])

    return openapi_json, docs, asyncapi_json


OPERATIONS: Final = (health, ready)
