"""Asking a provider: one request, and what to make of there being no answer."""

import email.utils
import re
from typing import Any, Final, Protocol

import httpx
import msgspec

from tidings.server.clock import Clock
from tidings.server.outbound import TOTAL_SECONDS, OutboundRefused, Reply
from tidings.server.push.base import Kind, Outcome

# Providers answer with a sentence or a small document.
ANSWER_BYTES_MAX: Final = 64 << 10
# Longer than a day, and the notification has lost its point; a provider must not be able to park a job for ever.
RETRY_AFTER_SECONDS_MAX: Final = 86_400.0


class HttpClient(Protocol):
    """What `GuardedClient` and `PooledClient` have in common."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        body_bytes_max: int,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        total_seconds: float = TOTAL_SECONDS,
    ) -> Reply:
        """See `tidings.server.outbound.GuardedClient.request`."""
        ...


async def ask(
    client: HttpClient,
    method: str,
    url: str,
    *,
    headers: dict[str, str],
    content: bytes | None,
    refused: Kind = "misconfigured",
) -> Reply | Outcome:
    """The provider's answer, or what to make of there being none. `refused`: what it is when the URL is not allowed."""
    try:
        return await client.request(method, url, body_bytes_max=ANSWER_BYTES_MAX, headers=headers, content=content)
    except OutboundRefused:
        # The address is not one that this server connects to, or the answer is not one that it reads.
        return Outcome(kind=refused, reason="address_refused")
    except httpx.TimeoutException:
        return Outcome(kind="retry", reason="timeout")
    except httpx.TransportError:
        return Outcome(kind="retry", reason="unreachable")


def retry_after(reply: Reply, clock: Clock) -> float | None:
    """Seconds that the answer asks to wait (RFC 9110, 10.2.3: a number or a date), within bounds."""
    text = reply.headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        seconds = float(text[:10])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - clock.now_ms() / 1000
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_SECONDS_MAX)


_REASON: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}\Z")


def reason_word(text: object, status: int) -> str:
    """The provider's word if it is one, `status_404` otherwise: it goes to logs and traces."""
    return text if isinstance(text, str) and _REASON.match(text) else f"status_{status}"


def json_object(body: bytes) -> dict[str, Any]:
    """The object that `body` is; empty when it is something else: a proxy's page, a sentence, a riddle."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
