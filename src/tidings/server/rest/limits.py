"""How often: every request of a credential takes from its bucket, the one that its commands on sockets take from too.

The headers are those of draft-ietf-httpapi-ratelimit-headers-10: `RateLimit-Policy` tells the quota `q` (requests) and
the window `w` (seconds in which it comes back), `RateLimit` what remains `r` and in how many seconds `t` all is back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from tidings.server.clock import Clock
from tidings.server.domain.limits import Limiter, Rate, Verdict
from tidings.server.errors import Refusal
from tidings.server.services.access import Actor
from tidings.server.telemetry import Metrics

ASGI = Callable[[Any, Any, Any], Awaitable[None]]

POLICY: Final = "requests"


def bucket_of(actor: Actor) -> tuple[int, str]:
    """Whose bucket an actor takes from: the credential's, whether it comes by REST or by socket."""
    return (actor.app.app, actor.via)


def policy_header(rate: Rate) -> bytes:
    """The value of `RateLimit-Policy`."""
    return b'"%b";q=%d;w=%d' % (POLICY.encode(), rate.burst, rate.window_seconds)


def limit_header(verdict: Verdict) -> bytes:
    """The value of `RateLimit`."""
    return b'"%b";r=%d;t=%d' % (POLICY.encode(), verdict.remaining, verdict.reset_seconds)


class RateLimit:
    """ASGI middleware behind `Authentication`. Leaves the verdict in the request's state for the reply's headers."""

    def __init__(self, app: ASGI, limiter: Limiter, clock: Clock, metrics: Metrics) -> None:
        self._app = app
        self._limiter = limiter
        self._clock = clock
        self._refused = metrics.rate_limited.labels("rest")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        state = scope["state"]
        verdict = self._limiter.take(bucket_of(state["actor"]), self._clock.monotonic())
        state["rate"] = verdict
        if not verdict.allowed:
            self._refused.inc()
            rate = self._limiter.rate
            raise Refusal(
                "rate_limited",
                f"At most {rate.per_second:g} requests a second, {rate.burst} at once.",
                bound=rate.burst,
                retry_after_ms=verdict.retry_after_ms,
            )
        await self._app(scope, receive, send)
