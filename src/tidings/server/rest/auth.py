"""Who asks: the `Authorization` header becomes an `Actor`, before anything else of the request is read.

Reading a body and waiting for news take time, and what was true before may not be after: a user is deactivated, a
token revoked, a role changed. So what the gate found comes as a `Pass`, which is renewed after every wait. As long as
nothing was forgotten since, that costs a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tidings.server.clock import Clock
from tidings.server.domain.limits import Limiter
from tidings.server.errors import Refusal
from tidings.server.services.access import Actor
from tidings.server.services.auth import Auth, Authenticated
from tidings.server.telemetry import Metrics
from tidings.wire import limits

from .limits import bucket_of

_SCHEME: Final = b"bearer "


@dataclass(slots=True)
class Pass:
    """What the gate found out about a request's credential, and when: `seen` is `Auth.forgotten` of that moment."""

    gate: Gate
    granted: Authenticated
    seen: int

    @property
    def stands(self) -> bool:
        """Whether nothing has changed since that could matter."""
        return self.seen == self.gate.auth.forgotten and not self._expired()

    async def renew(self) -> Actor:
        """The actor as things stand now. Raises what authenticating would: Refusal `user_deactivated` …"""
        if not self.stands:
            try:
                if self._expired():
                    raise Refusal("token_expired", "The credential has expired meanwhile.")
                # Before the reads: what changes while they run is found at the next renewal.
                seen = self.gate.auth.forgotten
                self.granted = await self.gate.auth.recheck(self.granted)
                self.seen = seen
            except Refusal as refusal:
                self.gate.refused(refusal)
                raise
        return self.granted.actor

    def _expired(self) -> bool:
        expires = self.granted.expires_at_ms
        if expires is None:
            return False
        actor = self.granted.actor
        leeway = 0 if actor.via.startswith("key:") else actor.app.settings.token_leeway_seconds * 1000
        return expires + leeway <= self.gate.clock.now_ms()


class Gate:
    """Authenticates requests and takes them from their credential's bucket. Behind the router, so that an address that
    does not exist costs no cryptography."""

    def __init__(self, auth: Auth, limiter: Limiter, clock: Clock, metrics: Metrics) -> None:
        self.auth = auth
        self.clock = clock
        self._limiter = limiter
        self._auth_refused = metrics.auth_refused
        self._rate_refused = metrics.rate_limited.labels("rest")

    async def admit(self, scope: Any) -> Pass:
        """Who asks. Leaves `actor` and `rate` (for the reply's headers) in the request's state.

        Raises Refusal with the code of what is wrong with the credential, or `rate_limited`.
        """
        credential: bytes | None = None
        app_hint: bytes | None = None
        on_behalf_of: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                if credential is not None:
                    raise Refusal("invalid", "The header Authorization is given twice.")
                credential = value
            elif name == b"tidings-app":
                app_hint = value
            elif name == b"tidings-user":
                on_behalf_of = value
        seen = self.auth.forgotten
        try:
            granted = await self._authenticate(credential, app_hint, on_behalf_of)
        except Refusal as refusal:
            self.refused(refusal)
            raise
        state = scope["state"]
        state["actor"] = granted.actor
        verdict = state["rate"] = self._limiter.take(bucket_of(granted.actor), self.clock.monotonic())
        if not verdict.allowed:
            self._rate_refused.inc()
            rate = self._limiter.rate
            raise Refusal(
                "rate_limited",
                f"At most {rate.per_second:g} requests a second, {rate.burst} at once.",
                bound=rate.burst,
                retry_after_ms=verdict.retry_after_ms,
            )
        return Pass(self, granted, seen)

    def refused(self, refusal: Refusal) -> None:
        """Count a credential that was turned away."""
        self._auth_refused.labels(refusal.code).inc()

    async def _authenticate(
        self, header: bytes | None, app_hint: bytes | None, on_behalf_of: bytes | None
    ) -> Authenticated:
        if not header:
            raise Refusal("unauthenticated", "Send Authorization: Bearer <API key or user token>.")
        if header[:7].lower() != _SCHEME:
            raise Refusal("unauthenticated", "The scheme of Authorization is Bearer.")
        raw = header[7:].strip()
        if len(raw) > limits.TOKEN_BYTES_MAX:
            raise Refusal(
                "token_too_large",
                f"Tokens have at most {limits.TOKEN_BYTES_MAX} bytes.",
                bound=limits.TOKEN_BYTES_MAX,
            )
        try:
            credential = raw.decode("ascii")
            app = None if app_hint is None else app_hint.decode("ascii")
            user = None if on_behalf_of is None else on_behalf_of.decode("ascii")
        except UnicodeDecodeError:
            raise Refusal("token_malformed", "Credentials and identifiers are ASCII.") from None
        found = self.auth.authenticate_now(credential, app_hint=app, on_behalf_of=user)
        if found is None:
            found = await self.auth.authenticate(credential, app_hint=app, on_behalf_of=user)
        return found
