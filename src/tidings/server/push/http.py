"""Push by the app's own endpoint: e-mail, text messages, whatever another service does.

A POST of JSON, signed as https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
says, so that the libraries of `standardwebhooks` verify it.
"""

import base64
import binascii
import hmac
from typing import Final

import msgspec

from tidings.server.clock import Clock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import OutboundRefused, Reply, check_url
from tidings.server.push.asking import HttpClient, ask, json_object, reason_word, retry_after
from tidings.server.push.base import (
    TOKEN_CHARS_MAX,
    Kind,
    Notification,
    Outcome,
    fit,
    refuse_field,
    refuse_token,
)
from tidings.wire.push import HttpConfig

TYPE: Final = "push.notification"
# The specification recommends to stay below 20 kB.
BODY_BYTES_MAX: Final = 20_000
SECRET_PREFIX: Final = "whsec_"  # noqa: S105  (what secrets begin with)
SECRET_BYTES_MIN: Final = 24
SECRET_BYTES_MAX: Final = 64

# Status → what to do: the specification's section on status codes (2xx, 410, 429, 5xx), and docs/guides/push-http.md
# for the others. What is not listed: 2xx accepted, 3xx and 4xx misconfigured, 5xx retry.
ERRORS: Final[dict[int, Kind]] = {
    200: "accepted",
    201: "accepted",
    202: "accepted",
    204: "accepted",
    # The endpoint understood and will not: nobody is to be woken with this.
    400: "rejected",
    401: "misconfigured",
    403: "misconfigured",
    404: "misconfigured",
    408: "retry",
    409: "rejected",
    410: "token_dead",
    413: "too_large",
    422: "rejected",
    425: "retry",
    429: "retry",
    500: "retry",
    502: "retry",
    503: "retry",
    504: "retry",
}


def check_http(config: HttpConfig, policy: OutboundPolicy) -> HttpConfig:
    """The configuration, or the refusal of a field."""
    try:
        check_url(config.url, policy)
    except OutboundRefused as error:
        raise refuse_field("url", f"This URL cannot be used: {error.detail}.") from None
    if not config.secrets:
        raise refuse_field("secrets", "A secret is needed: what is sent is signed with it.")
    for secret in config.secrets:
        _secret_bytes(secret)
    return config


def check_http_token(token: str) -> None:
    """Whatever the endpoint understands: an address, a number."""
    if not 1 <= len(token) <= TOKEN_CHARS_MAX or not token.isprintable():
        raise refuse_token(f"A token has 1 to {TOKEN_CHARS_MAX} printable characters.")


class HttpProvider:
    """One endpoint of the app's."""

    def __init__(self, config: HttpConfig, client: HttpClient, clock: Clock) -> None:
        self._url = config.url
        self._keys = [_secret_bytes(secret) for secret in config.secrets]
        self._client = client
        self._clock = clock

    async def send(self, token: str, notification: Notification) -> Outcome:
        """See `Provider.send`."""
        at = self._clock.now_ms() // 1000
        content = fit(notification, lambda cut: render(cut, token, at), BODY_BYTES_MAX)
        if content is None:
            return Outcome(kind="too_large", reason="payload")
        headers = {
            "content-type": "application/json",
            "webhook-id": notification.id,
            "webhook-timestamp": str(at),
            "webhook-signature": signatures(self._keys, notification.id, at, content),
        }
        reply = await ask(self._client, "POST", self._url, headers=headers, content=content)
        return reply if isinstance(reply, Outcome) else outcome(reply, self._clock)

    async def close(self) -> None:
        """Nothing is held."""


def render(notification: Notification, token: str, at: int) -> bytes:
    """The body. `timestamp` is in seconds, as in the header."""
    return msgspec.json.encode({"type": TYPE, "timestamp": at, "data": {"token": token, "notification": notification}})


def signatures(keys: list[bytes], message_id: str, at: int, content: bytes) -> str:
    """`v1,` and base64 of the HMAC-SHA256 over id, timestamp and body, once for each key."""
    signed = f"{message_id}.{at}.".encode() + content
    return " ".join(f"v1,{base64.b64encode(hmac.digest(key, signed, 'sha256')).decode()}" for key in keys)


def outcome(reply: Reply, clock: Clock) -> Outcome:
    """What an answer means, by the table above. Its body may be `{"id": …, "reason": …}`, and need not be."""
    status = reply.status
    kind = ERRORS.get(status)
    if kind is None:
        kind = "accepted" if 200 <= status < 300 else "retry" if status >= 500 else "misconfigured"
    document = json_object(reply.body)
    if kind == "accepted":
        given = document.get("id")
        return Outcome(
            kind=kind, reason="accepted", status=status, provider_id=given[:256] if isinstance(given, str) else None
        )
    wait = retry_after(reply, clock) if kind == "retry" else None
    return Outcome(kind=kind, reason=reason_word(document.get("reason"), status), status=status, retry_after=wait)


def _secret_bytes(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        raise refuse_field(
            "secrets", f"A secret is whsec_ and the base64 of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} random bytes."
        )
    return key
