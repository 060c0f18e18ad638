"""POSTs to addresses that an app has chosen, with what came of them as a value: nothing here is loaded, and nothing
raised, until somebody has a webhook.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidings.server.domain.netguard import OutboundPolicy

if TYPE_CHECKING:
    from tidings.server.outbound_pool import PooledClient


@dataclass(slots=True, frozen=True)
class Posted:
    """The answer, or why there is none: `refused` says that the address is not one that this server connects to."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None
    refused: bool = False


class Poster:
    """Posts through the guard (`tidings.server.outbound_pool`), whose libraries take half a second to load: at the
    first use, off the event loop."""

    def __init__(self, policy: OutboundPolicy, client: PooledClient | None = None) -> None:
        self.policy = policy
        self._client = client

    async def post(
        self, url: str, *, headers: dict[str, str], body: bytes, seconds: float, answer_bytes_max: int
    ) -> Posted:
        """Post, and read the answer within `seconds`. Never raises but when cancelled."""
        if self._client is None:
            kind = await asyncio.to_thread(_load)
            if self._client is None:
                self._client = kind(self.policy)
        import httpx

        from tidings.server.outbound import OutboundRefused

        try:
            reply = await self._client.request(
                "POST", url, body_bytes_max=answer_bytes_max, headers=headers, content=body, total_seconds=seconds
            )
        except OutboundRefused as refused:
            return Posted(error=refused.detail, refused=True)
        except httpx.TimeoutException:
            return Posted(error=f"no answer within {seconds:g} s")
        except httpx.TransportError as failure:
            return Posted(error=str(failure) or "the connection broke")
        return Posted(reply.status, reply.headers, reply.body)

    def check(self, url: str) -> str | None:
        """What is wrong with an address, as far as it can be told without resolving it; None when nothing is."""
        from tidings.server.outbound import OutboundRefused, check_url

        try:
            check_url(url, self.policy)
        except OutboundRefused as refused:
            return refused.detail
        return None

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()


def _load() -> type[PooledClient]:
    from tidings.server.outbound_pool import PooledClient

    return PooledClient
