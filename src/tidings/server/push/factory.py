"""Makes the provider that a configuration asks for. The only place that knows them all.

Loads two HTTP clients, which takes half a second and 30 MB: see `lazy.py`.
"""

import ssl
from typing import assert_never

from tidings.server.clock import Clock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import GuardedClient, Resolver, resolve_with_system
from tidings.server.outbound_pool import PooledClient
from tidings.server.push.apns import ApnsProvider, check_apns, check_apns_token
from tidings.server.push.base import Provider
from tidings.server.push.fcm import FcmProvider, check_fcm, check_fcm_token
from tidings.server.push.http import HttpProvider, check_http, check_http_token
from tidings.server.push.webpush import WebPushProvider, check_webpush, check_webpush_token, with_own_key
from tidings.wire.push import ApnsConfig, FcmConfig, HttpConfig, PushConfig, WebPushConfig


class PushProviders:
    """`tidings.server.push.base.Providers` over the network. All apps share its connections."""

    def __init__(
        self,
        policy: OutboundPolicy,
        clock: Clock,
        *,
        resolve: Resolver = resolve_with_system,
        user_agent: str = "tidings",
        trusted: str | None = None,
    ) -> None:
        """`trusted`: the path of a certificate to trust in place of the public ones, for tests."""
        self._policy = policy
        self._clock = clock
        # Two contexts: each client sets the protocols that it speaks in its own.
        contexts = [None if trusted is None else ssl.create_default_context(cafile=trusted) for _ in range(2)]
        self._pooled = PooledClient(policy, resolve=resolve, user_agent=user_agent, ssl_context=contexts[0])
        # APNs speaks HTTP/2 only.
        self._http2 = GuardedClient(policy, resolve=resolve, user_agent=user_agent, ssl_context=contexts[1])

    def check(self, config: PushConfig) -> PushConfig:
        """The configuration as it is to be kept. Raises Refusal(invalid_field) that names the field."""
        match config:
            case FcmConfig():
                return check_fcm(config, self._policy)
            case ApnsConfig():
                return check_apns(config, self._policy)
            case WebPushConfig():
                return check_webpush(config)
            case HttpConfig():
                return check_http(config, self._policy)
            case _:
                assert_never(config)

    def complete(self, config: PushConfig) -> PushConfig:
        """The configuration with a key made for it where it has none and needs no other's."""
        return with_own_key(config) if isinstance(config, WebPushConfig) else config

    def check_token(self, config: PushConfig, token: str) -> None:
        """Raises Refusal(invalid_field) for what cannot be a token of this provider."""
        match config:
            case FcmConfig():
                check_fcm_token(token)
            case ApnsConfig():
                check_apns_token(token)
            case WebPushConfig():
                check_webpush_token(token, self._policy)
            case HttpConfig():
                check_http_token(token)
            case _:
                assert_never(config)

    def open(self, config: PushConfig) -> Provider:
        """The provider of a configuration that was checked. Keep it: it holds access tokens."""
        match config:
            case FcmConfig():
                return FcmProvider(config, self._pooled, self._clock)
            case ApnsConfig():
                return ApnsProvider(config, self._http2, self._clock)
            case WebPushConfig():
                return WebPushProvider(config, self._pooled, self._clock)
            case HttpConfig():
                return HttpProvider(config, self._pooled, self._clock)
            case _:
                assert_never(config)

    async def aclose(self) -> None:
        """Close the connections. What is being sent ends with them."""
        await self._pooled.aclose()
        await self._http2.aclose()
