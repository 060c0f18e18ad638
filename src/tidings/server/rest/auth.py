"""Who asks: the `Authorization` header becomes an `Actor` in the request's state, before anything of it is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from tidings.server.errors import Refusal
from tidings.server.services.auth import Auth
from tidings.server.telemetry import Metrics
from tidings.wire import limits

ASGI = Callable[[Any, Any, Any], Awaitable[None]]

_SCHEME: Final = b"bearer "


class Authentication:
    """ASGI middleware. Litestar puts it behind the router, so an address that does not exist costs no cryptography."""

    def __init__(self, app: ASGI, auth: Auth, metrics: Metrics) -> None:
        self._app = app
        self._auth = auth
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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
        try:
            scope["state"]["actor"] = (await self._authenticate(credential, app_hint, on_behalf_of)).actor
        except Refusal as refusal:
            self._metrics.auth_refused.labels(refusal.code).inc()
            raise
        await self._app(scope, receive, send)

    async def _authenticate(self, header: bytes | None, app_hint: bytes | None, on_behalf_of: bytes | None) -> Any:
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
        found = self._auth.authenticate_now(credential, app_hint=app, on_behalf_of=user)
        if found is None:
            found = await self._auth.authenticate(credential, app_hint=app, on_behalf_of=user)
        return found
