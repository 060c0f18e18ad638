"""Firebase Cloud Messaging, HTTP v1 (https://firebase.google.com/docs/reference/fcm/rest/v1/projects.messages).

The service account signs a JWT (RS256) that Google exchanges for an access token of an hour (RFC 7523;
https://developers.google.com/identity/protocols/oauth2/service-account). One exchange is under way at a time.
"""

import asyncio
from typing import Any, Final
from urllib.parse import quote, urlencode

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tidings.server.clock import Clock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import OutboundRefused, Reply, check_url
from tidings.server.push.asking import HttpClient, ask, json_object, reason_word, retry_after
from tidings.server.push.base import (
    TOKEN_CHARS_MAX,
    Kind,
    Notification,
    Outcome,
    collapse_id,
    fit,
    refuse_field,
    refuse_token,
    ttl_of,
)
from tidings.wire.push import FcmConfig

ENDPOINT: Final = "https://fcm.googleapis.com"
SCOPE: Final = "https://www.googleapis.com/auth/firebase.messaging"
GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"

# "4096 bytes for most messages", keys and values: https://firebase.google.com/docs/cloud-messaging/concept-options.
# The whole message is held to it, which is a little stricter and needs no knowledge of what Google counts.
PAYLOAD_BYTES_MAX: Final = 4096
# Google gives an hour. A token that ends while a request is on its way costs a 401 and another exchange.
ASSERTION_SECONDS: Final = 3600
REFRESH_BEFORE_SECONDS: Final = 300.0
# After a refused exchange the next push does not ask again at once: nothing gets better by the second.
TOKEN_RETRY_SECONDS: Final = 60.0
# A 429 without Retry-After: a minute at the least, https://firebase.google.com/docs/cloud-messaging/scale-fcm.
QUOTA_RETRY_SECONDS: Final = 60.0

# FcmError.errorCode → what to do. https://firebase.google.com/docs/reference/fcm/rest/v1/ErrorCode
# INVALID_ARGUMENT may mean the token: see _blames_token.
ERRORS: Final[dict[str, tuple[int, Kind]]] = {
    "UNSPECIFIED_ERROR": (500, "retry"),
    "INVALID_ARGUMENT": (400, "rejected"),
    "UNREGISTERED": (404, "token_dead"),
    # The token belongs to another project: wrong service account, or an app that was built for another one.
    "SENDER_ID_MISMATCH": (403, "misconfigured"),
    "QUOTA_EXCEEDED": (429, "retry"),
    "UNAVAILABLE": (503, "retry"),
    "INTERNAL": (500, "retry"),
    # The APNs key or the web push key that was given to Firebase: of this token's platform, not of all.
    "THIRD_PARTY_AUTH_ERROR": (401, "misconfigured"),
}
ONLY_TOKEN: Final = frozenset({"SENDER_ID_MISMATCH", "THIRD_PARTY_AUTH_ERROR"})
# google.rpc.Code as `error.status`, where there is no FcmError: the gateway in front of FCM answered.
STATUSES: Final[dict[str, Kind]] = {
    "INVALID_ARGUMENT": "rejected",
    "UNAUTHENTICATED": "misconfigured",
    "PERMISSION_DENIED": "misconfigured",
    # No such project.
    "NOT_FOUND": "misconfigured",
    "RESOURCE_EXHAUSTED": "retry",
    "INTERNAL": "retry",
    "UNAVAILABLE": "retry",
    "DEADLINE_EXCEEDED": "retry",
}


def check_fcm(config: FcmConfig, policy: OutboundPolicy) -> FcmConfig:
    """The configuration, or the refusal of a field."""
    account = config.service_account
    _private_key(account.private_key)
    for field, url in (("service_account.token_uri", account.token_uri), ("endpoint", config.endpoint)):
        if url is not None:
            try:
                check_url(url, policy)
            except OutboundRefused as error:
                raise refuse_field(field, f"This URL cannot be used: {error.detail}.") from None
    return config


def check_fcm_token(token: str) -> None:
    """A registration token is a word of unknown form."""
    if not 32 <= len(token) <= TOKEN_CHARS_MAX or not token.isascii() or not token.isprintable() or " " in token:
        raise refuse_token("This is not an FCM registration token: what getToken() returns on the device.")


class FcmProvider:
    """One service account's way to its devices."""

    def __init__(self, config: FcmConfig, client: HttpClient, clock: Clock) -> None:
        project = quote(config.service_account.project_id, safe="")
        self._url = f"{(config.endpoint or ENDPOINT).rstrip('/')}/v1/projects/{project}/messages:send"
        self._client = client
        self._clock = clock
        self._access = AccessTokens(config, client, clock)

    async def send(self, token: str, notification: Notification) -> Outcome:
        """See `Provider.send`."""
        content = fit(notification, lambda cut: render(cut, ""), PAYLOAD_BYTES_MAX)
        if content is None:
            return Outcome(kind="too_large", reason="payload")
        # The token does not count, and its length is not the app's doing.
        content = content.replace(b'"token":""', b'"token":' + msgspec.json.encode(token), 1)
        access = await self._access.get()
        if isinstance(access, Outcome):
            return access
        reply = await self._post(access, content)
        if isinstance(reply, Reply) and reply.status == 401 and not _fcm_code(json_object(reply.body)):
            renewed = await self._access.get(instead_of=access)
            if isinstance(renewed, Outcome):
                return renewed
            reply = await self._post(renewed, content)
        return reply if isinstance(reply, Outcome) else outcome(reply, self._clock)

    async def close(self) -> None:
        """Nothing is held."""

    async def _post(self, access: str, content: bytes) -> Reply | Outcome:
        headers = {"authorization": f"Bearer {access}", "content-type": "application/json; charset=utf-8"}
        return await ask(self._client, "POST", self._url, headers=headers, content=content)


class AccessTokens:
    """The access token of a service account, exchanged anew before it ends. Refusals are remembered for a minute."""

    def __init__(self, config: FcmConfig, client: HttpClient, clock: Clock) -> None:
        self._account = config.service_account
        self._key = _private_key(config.service_account.private_key)
        self._client = client
        self._clock = clock
        self._lock = asyncio.Lock()
        self._token = ""
        self._until = 0.0
        self._refusal: Outcome | None = None
        self._refused_until = 0.0

    async def get(self, *, instead_of: str = "") -> str | Outcome:
        """A token that is good for some minutes; another one than `instead_of`, which was refused."""
        if self._token and self._token != instead_of and self._clock.monotonic() < self._until:
            return self._token
        async with self._lock:
            # Whoever waited here finds what the one before has got, be it a token or a refusal.
            now = self._clock.monotonic()
            if self._token and self._token != instead_of and now < self._until:
                return self._token
            if self._refusal is not None and now < self._refused_until:
                return self._refusal
            return await self._exchange(now)

    async def _exchange(self, now: float) -> str | Outcome:
        account, at = self._account, self._clock.now_ms() // 1000
        claims = {
            "iss": account.client_email,
            "scope": SCOPE,
            "aud": account.token_uri,
            "iat": at,
            "exp": at + ASSERTION_SECONDS,
        }
        headers = {"kid": account.private_key_id} if account.private_key_id else None
        assertion = jwt.encode(claims, self._key, algorithm="RS256", headers=headers)
        reply = await ask(
            self._client,
            "POST",
            account.token_uri,
            headers={"content-type": "application/x-www-form-urlencoded"},
            content=urlencode({"grant_type": GRANT, "assertion": assertion}).encode(),
        )
        if isinstance(reply, Reply):
            document = json_object(reply.body)
            token, seconds = document.get("access_token"), document.get("expires_in", ASSERTION_SECONDS)
            if reply.status == 200 and isinstance(token, str) and token and isinstance(seconds, int):
                self._token = token
                # Half of it, should somebody give tokens of minutes.
                self._until = now + max(seconds - REFRESH_BEFORE_SECONDS, seconds / 2)
                self._refusal = None
                return token
            reply = _token_refusal(reply, document, self._clock)
        self._token = ""
        self._refusal = reply
        # Trouble on the way is over sooner than a wrong key.
        wait = 1.0 if reply.kind == "retry" else TOKEN_RETRY_SECONDS
        self._refused_until = now + max(wait, reply.retry_after or 0.0)
        return reply


def _token_refusal(reply: Reply, document: dict[str, Any], clock: Clock) -> Outcome:
    """RFC 6749, 5.2: `invalid_grant` (key deleted, clock wrong), `invalid_client` …"""
    reason = reason_word(document.get("error"), reply.status)
    if reply.status in (408, 429) or reply.status >= 500 or reply.status == 200:
        return Outcome(kind="retry", reason=reason, status=reply.status, retry_after=retry_after(reply, clock))
    return Outcome(kind="misconfigured", reason=reason, status=reply.status)


def render(notification: Notification, token: str) -> bytes:
    """The request: `message` with what each platform needs."""
    silent, ttl = notification.silent, ttl_of(notification)
    high = notification.priority == "high" and not silent
    message: dict[str, Any] = {"token": token}
    if notification.data:
        message["data"] = notification.data
    android: dict[str, Any] = {"priority": "HIGH" if high else "NORMAL", "ttl": f"{ttl}s"}
    aps: dict[str, Any] = {}
    apns_headers = {"apns-priority": "10" if high else "5", "apns-push-type": "background" if silent else "alert"}
    webpush: dict[str, Any] = {"headers": {"TTL": str(ttl), "Urgency": "high" if high else "normal"}}
    if notification.collapse_key:
        android["collapse_key"] = notification.collapse_key
        apns_headers["apns-collapse-id"] = collapse_id(notification.collapse_key)
    if notification.badge is not None:
        aps["badge"] = notification.badge
    if silent:
        aps["content-available"] = 1
    else:
        message["notification"] = {"title": notification.title, "body": notification.body}
        shown: dict[str, Any] = {}
        if notification.sound:
            shown["sound"] = aps["sound"] = notification.sound
        if notification.category:
            shown["channel_id"] = aps["category"] = notification.category
        if notification.collapse_key:
            shown["tag"] = notification.collapse_key
        if notification.badge is not None:
            shown["notification_count"] = notification.badge
        if shown:
            android["notification"] = shown
        if notification.thread:
            aps["thread-id"] = notification.thread
        # Firebase takes an https link or none.
        if notification.link and notification.link.startswith("https://"):
            webpush["fcm_options"] = {"link": notification.link}
    message["android"] = android
    message["apns"] = {"headers": apns_headers, "payload": {"aps": aps}}
    message["webpush"] = webpush
    return msgspec.json.encode({"message": message})


def outcome(reply: Reply, clock: Clock) -> Outcome:
    """What an answer means, by the tables above."""
    document, status = json_object(reply.body), reply.status
    if status == 200:
        name = document.get("name")
        return Outcome(
            kind="accepted",
            reason="accepted",
            status=status,
            provider_id=name[-256:] if isinstance(name, str) else None,
        )
    code = _fcm_code(document)
    error = _mapping(document.get("error"))
    word = error.get("status")
    kind: Kind | None = None
    if code in ERRORS:
        kind, reason = ERRORS[code][1], code
    else:
        reason = reason_word(word, status)
        kind = STATUSES.get(word) if isinstance(word, str) else None
    if kind is None:
        kind = (
            "retry"
            if status in (408, 429) or status >= 500
            else "misconfigured"
            if status in (401, 403)
            else "rejected"
        )
    if kind == "rejected" and status == 400:
        if _blames_token(error):
            kind = "token_dead"
        elif _blames_size(error):
            kind = "too_large"
    wait = retry_after(reply, clock) if kind == "retry" else None
    if kind == "retry" and status == 429 and wait is None:
        wait = QUOTA_RETRY_SECONDS
    return Outcome(kind=kind, reason=reason, status=status, retry_after=wait, only_token=reason in ONLY_TOKEN)


def _fcm_code(document: dict[str, Any]) -> str:
    """`errorCode` of the FcmError among the details, or an empty word."""
    details = _mapping(document.get("error")).get("details")
    for detail in details if isinstance(details, list) else []:
        kind, code = _mapping(detail).get("@type"), _mapping(detail).get("errorCode")
        if isinstance(kind, str) and kind.endswith("google.firebase.fcm.v1.FcmError") and isinstance(code, str):
            return code
    return ""


def _blames_token(error: dict[str, Any]) -> bool:
    """Whether an INVALID_ARGUMENT is about the token. The documentation on stale tokens says to make sure of it first:
    a bad payload is answered with the same code, and live tokens must stay."""
    fields = [_mapping(violation).get("field") for violation in _violations(error)]
    message = error.get("message")
    return fields == ["message.token"] or (
        isinstance(message, str) and "is not a valid FCM registration token" in message
    )


def _blames_size(error: dict[str, Any]) -> bool:
    text = str(error.get("message", "")).lower()
    return "too big" in text or "too large" in text


def _violations(error: dict[str, Any]) -> list[Any]:
    details = error.get("details")
    found: list[Any] = []
    for detail in details if isinstance(details, list) else []:
        violations = _mapping(detail).get("fieldViolations")
        found += violations if isinstance(violations, list) else []
    return found


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _private_key(pem: str) -> RSAPrivateKey:
    field = "service_account.private_key"
    if not pem:
        raise refuse_field(field, "The private key is missing: paste the whole file that Google's console made.")
    try:
        key = load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError):
        raise refuse_field(
            field, "This is not a private key in PEM. Line breaks must be real or written as \\n."
        ) from None
    if not isinstance(key, RSAPrivateKey):
        raise refuse_field(field, "This is not an RSA key, which Google's service accounts have.")
    return key
