"""Apple Push Notification service: HTTP/2, and a provider token that a `.p8` key signs (ES256).

https://developer.apple.com/documentation/usernotifications/sending-notification-requests-to-apns and
https://developer.apple.com/documentation/usernotifications/establishing-a-token-based-connection-to-apns
"""

import re
from typing import Any, Final

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tidings.server.clock import Clock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import OutboundRefused, Reply, check_url
from tidings.server.push.asking import HttpClient, ask, json_object, reason_word, retry_after
from tidings.server.push.base import (
    Kind,
    Notification,
    Outcome,
    collapse_id,
    fit,
    refuse_field,
    refuse_token,
    ttl_of,
)
from tidings.wire.push import ApnsConfig

ENDPOINTS: Final = {"production": "https://api.push.apple.com", "sandbox": "https://api.sandbox.push.apple.com"}

PAYLOAD_BYTES_MAX: Final = 4096
# "Refresh your token no more than once every 20 minutes and no less than once every 60 minutes."
TOKEN_SECONDS: Final = 40 * 60.0
TOKEN_SECONDS_MIN: Final = 20 * 60.0

# Status and `reason` → what to do: tables 2 and 3 of
# https://developer.apple.com/documentation/usernotifications/handling-notification-responses-from-apns
ERRORS: Final[dict[str, tuple[int, Kind]]] = {
    "BadCollapseId": (400, "rejected"),
    # Also: a token of the sandbox at production, or the other way round.
    "BadDeviceToken": (400, "token_dead"),
    "BadExpirationDate": (400, "rejected"),
    "BadMessageId": (400, "rejected"),
    "BadPriority": (400, "rejected"),
    "BadTopic": (400, "misconfigured"),
    # The token is of another app than the topic says.
    "DeviceTokenNotForTopic": (400, "misconfigured"),
    "DuplicateHeaders": (400, "rejected"),
    "IdleTimeout": (400, "retry"),
    "InvalidPushType": (400, "rejected"),
    "MissingDeviceToken": (400, "token_dead"),
    "MissingTopic": (400, "misconfigured"),
    "PayloadEmpty": (400, "rejected"),
    "TopicDisallowed": (400, "misconfigured"),
    "BadCertificate": (403, "misconfigured"),
    "BadCertificateEnvironment": (403, "misconfigured"),
    "BadEnvironmentKeyIdInToken": (403, "misconfigured"),
    # After it was renewed once: this machine's clock is wrong.
    "ExpiredProviderToken": (403, "misconfigured"),
    "Forbidden": (403, "misconfigured"),
    "InvalidProviderToken": (403, "misconfigured"),
    "MissingProviderToken": (403, "misconfigured"),
    "UnrelatedKeyIdInToken": (403, "misconfigured"),
    "BadPath": (404, "rejected"),
    "MethodNotAllowed": (405, "rejected"),
    "ExpiredToken": (410, "token_dead"),
    "Unregistered": (410, "token_dead"),
    "PayloadTooLarge": (413, "too_large"),
    "TooManyProviderTokenUpdates": (429, "retry"),
    # Of this device, not of all.
    "TooManyRequests": (429, "retry"),
    "InternalServerError": (500, "retry"),
    "ServiceUnavailable": (503, "retry"),
    "Shutdown": (503, "retry"),
}
ONLY_TOKEN: Final = frozenset({"DeviceTokenNotForTopic"})
# For a reason that Apple has added since.
STATUSES: Final[dict[int, Kind]] = {
    403: "misconfigured",
    408: "retry",
    410: "token_dead",
    413: "too_large",
    429: "retry",
}

_TOKEN: Final = re.compile(r"(?:[0-9a-fA-F]{2}){16,160}\Z")


def check_apns(config: ApnsConfig, policy: OutboundPolicy) -> ApnsConfig:
    """The configuration, or the refusal of a field."""
    _private_key(config.private_key)
    if config.endpoint is not None:
        try:
            check_url(config.endpoint, policy)
        except OutboundRefused as error:
            raise refuse_field("endpoint", f"This URL cannot be used: {error.detail}.") from None
    return config


def check_apns_token(token: str) -> None:
    """Hexadecimal, 32 bytes today; Apple says not to rely on that."""
    if not _TOKEN.match(token):
        raise refuse_token("This is not an APNs device token: hexadecimal digits, without blanks and < >.")


class ApnsProvider:
    """One key's way to the devices of one app."""

    def __init__(self, config: ApnsConfig, client: HttpClient, clock: Clock) -> None:
        """`client` must speak HTTP/2."""
        self._base = (config.endpoint or ENDPOINTS[config.environment]).rstrip("/")
        self._topic = config.topic
        self._client = client
        self._clock = clock
        self._tokens = ProviderTokens(config, clock)

    async def send(self, token: str, notification: Notification) -> Outcome:
        """See `Provider.send`."""
        if not _TOKEN.match(token):
            return Outcome(kind="token_dead", reason="malformed")
        content = fit(notification, render, PAYLOAD_BYTES_MAX)
        if content is None:
            return Outcome(kind="too_large", reason="payload")
        provider_token = self._tokens.get()
        reply = await self._post(token, notification, content, provider_token)
        if isinstance(reply, Reply) and reply.status == 403 and _reason(reply) == "ExpiredProviderToken":
            renewed = self._tokens.get(instead_of=provider_token)
            if renewed != provider_token:
                reply = await self._post(token, notification, content, renewed)
        return reply if isinstance(reply, Outcome) else outcome(reply, self._clock)

    async def close(self) -> None:
        """Nothing is held."""

    async def _post(
        self, token: str, notification: Notification, content: bytes, provider_token: str
    ) -> Reply | Outcome:
        silent, ttl = notification.silent, ttl_of(notification)
        headers = {
            "authorization": f"bearer {provider_token}",
            "apns-topic": self._topic,
            "apns-push-type": "background" if silent else "alert",
            # With 10 a background push is refused.
            "apns-priority": "10" if notification.priority == "high" and not silent else "5",
            # Zero: one attempt, nothing is kept.
            "apns-expiration": str(self._clock.now_ms() // 1000 + ttl if ttl else 0),
        }
        if notification.collapse_key:
            headers["apns-collapse-id"] = collapse_id(notification.collapse_key)
        return await ask(self._client, "POST", f"{self._base}/3/device/{token}", headers=headers, content=content)


class ProviderTokens:
    """The JWT that says who we are: signed once in forty minutes, for every connection the same."""

    def __init__(self, config: ApnsConfig, clock: Clock) -> None:
        self._config = config
        self._key = _private_key(config.private_key)
        self._clock = clock
        self._token = ""
        self._made_at = 0.0
        self._made_ms = 0

    def get(self, *, instead_of: str = "") -> str:
        """A token. A refused one (`instead_of`) is replaced if it is old enough for that; Apple throttles who renews
        more often than every twenty minutes."""
        seconds = TOKEN_SECONDS_MIN if self._token == instead_of else TOKEN_SECONDS
        if not self._token or self._age() >= seconds:
            self._sign()
        return self._token

    def _age(self) -> float:
        # A machine that slept has aged its token by the wall clock only.
        return max(self._clock.monotonic() - self._made_at, abs(self._clock.now_ms() - self._made_ms) / 1000)

    def _sign(self) -> None:
        self._made_at, self._made_ms = self._clock.monotonic(), self._clock.now_ms()
        self._token = jwt.encode(
            {"iss": self._config.team_id, "iat": self._made_ms // 1000},
            self._key,
            algorithm="ES256",
            headers={"kid": self._config.key_id},
        )


def render(notification: Notification) -> bytes:
    """The payload. What is the app's own is in `data`, beside `aps`."""
    aps: dict[str, Any] = {}
    if notification.silent:
        aps["content-available"] = 1
    else:
        aps["alert"] = {"title": notification.title, "body": notification.body}
        if notification.sound:
            aps["sound"] = notification.sound
        if notification.category:
            aps["category"] = notification.category
        if notification.thread:
            aps["thread-id"] = notification.thread
    if notification.badge is not None:
        aps["badge"] = notification.badge
    payload: dict[str, Any] = {"aps": aps}
    if notification.data:
        payload["data"] = notification.data
    if notification.link:
        payload["link"] = notification.link
    return msgspec.json.encode(payload)


def outcome(reply: Reply, clock: Clock) -> Outcome:
    """What an answer means, by the tables above."""
    status = reply.status
    if status == 200:
        return Outcome(
            kind="accepted", reason="accepted", status=status, provider_id=reply.headers.get("apns-id", "")[:64] or None
        )
    reason = _reason(reply)
    if reason in ERRORS:
        kind = ERRORS[reason][1]
    else:
        kind = STATUSES.get(status, "retry" if status >= 500 else "rejected")
        reason = reason_word(reason, status)
    wait = retry_after(reply, clock) if kind == "retry" else None
    return Outcome(kind=kind, reason=reason, status=status, retry_after=wait, only_token=reason in ONLY_TOKEN)


def _reason(reply: Reply) -> str:
    reason = json_object(reply.body).get("reason")
    return reason if isinstance(reason, str) else ""


def _private_key(pem: str) -> EllipticCurvePrivateKey:
    if not pem:
        raise refuse_field("private_key", "The key is missing: paste the content of the .p8 file.")
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError):
        raise refuse_field(
            "private_key", "This is not a private key in PEM: paste the content of the .p8 file."
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise refuse_field("private_key", "This is not a P-256 key, which Apple's .p8 files hold.")
    return key
