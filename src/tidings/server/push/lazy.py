"""The providers of `factory.py`, loaded when the first of them is needed: most servers start without a push to send."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tidings.server.clock import Clock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.push.base import Provider
from tidings.wire.push import PushConfig

if TYPE_CHECKING:
    from tidings.server.push.factory import PushProviders


class LazyProviders:
    """`tidings.server.push.base.Providers` at the price of nothing until it is used."""

    def __init__(
        self, policy: OutboundPolicy, clock: Clock, *, user_agent: str = "tidings", trusted: str | None = None
    ) -> None:
        """`trusted`: see `PushProviders`."""
        self._policy = policy
        self._clock = clock
        self._user_agent = user_agent
        self._trusted = trusted
        self._made: PushProviders | None = None

    async def load(self) -> None:
        """Load off the loop, which would stand still for half a second. For who is about to use them first."""
        if self._made is None:
            await asyncio.to_thread(_factory)

    def check(self, config: PushConfig) -> PushConfig:
        """The configuration as it is to be kept. Raises Refusal(invalid_field) that names the field."""
        return self._providers().check(config)

    def complete(self, config: PushConfig) -> PushConfig:
        """The configuration with a key made for it where it has none and needs no other's."""
        return self._providers().complete(config)

    def check_token(self, config: PushConfig, token: str) -> None:
        """Raises Refusal(invalid_field) for what cannot be a token of this provider."""
        self._providers().check_token(config, token)

    def open(self, config: PushConfig) -> Provider:
        """The provider of a configuration that was checked. Keep it: it holds access tokens."""
        return self._providers().open(config)

    async def aclose(self) -> None:
        """Close the connections, if there are any."""
        if self._made is not None:
            await self._made.aclose()

    def _providers(self) -> PushProviders:
        if self._made is None:
            self._made = _factory()(self._policy, self._clock, user_agent=self._user_agent, trusted=self._trusted)
        return self._made


def _factory() -> type[PushProviders]:
    from tidings.server.push.factory import PushProviders

    return PushProviders
