"""Web Push: RFC 8030 (the request), RFC 8291 over RFC 8188 (the encryption), RFC 8292 (VAPID, who we are).

The endpoint is a URL that a browser gave us, or somebody who says to be one: it is reached through the guard only.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDH,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    derive_private_key,
    generate_private_key,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from tidings.server.clock import Clock
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import OutboundRefused, Reply, check_url
from tidings.server.push.asking import HttpClient, ask, json_object, reason_word, retry_after
from tidings.server.push.base import (
    TOKEN_CHARS_MAX,
    Kind,
    Notification,
    Outcome,
    encode_notification,
    fit,
    refuse_field,
    refuse_token,
    ttl_of,
)
from tidings.wire.push import PushSubscription, WebPushConfig

# RFC 8291, 4: one record; RFC 8030, 7.2: a push service must take 4096 bytes, and some take no more.
BODY_BYTES_MAX: Final = 4096
_HEADER_BYTES: Final = 16 + 4 + 1 + 65
_TAG_BYTES: Final = 16
# One byte marks the end of the text.
PLAINTEXT_BYTES_MAX: Final = BODY_BYTES_MAX - _HEADER_BYTES - _TAG_BYTES - 1
_RECORD_SIZE: Final = BODY_BYTES_MAX.to_bytes(4)

# RFC 8292, 2: not more than a day. Renewed at half of it, so that none ends on its way.
VAPID_SECONDS: Final = 12 * 3600
# Origins are chosen by who subscribes; there are a handful of push services.
VAPID_TOKENS_MAX: Final = 1000
TOPIC_CHARS_MAX: Final = 32
# Subscriptions that were read lately: a user's devices get a conversation's pushes one after the other.
SUBSCRIPTIONS_KEPT: Final = 4096

# Status → what to do. RFC 8030, 5 and 8.3 to 8.4; RFC 8292, 4.2; and, as they go beyond these,
# https://mozilla-services.github.io/autopush-rs/errors.html (Firefox), https://web.dev/articles/
# push-notifications-web-push-protocol (Chrome), https://developer.apple.com/documentation/usernotifications/
# sending-web-push-notifications-in-web-apps-and-browsers (Safari), https://learn.microsoft.com/windows/apps/develop/
# notifications/push-notifications/push-request-response-headers (Edge).
ERRORS: Final[dict[int, Kind]] = {
    200: "accepted",
    201: "accepted",
    # RFC 8030, 5.1: with `Prefer: respond-async`.
    202: "accepted",
    204: "accepted",
    400: "rejected",
    # RFC 8292, 4.2: the VAPID token is missing, out of date or not signed by its key.
    401: "misconfigured",
    # The subscription was made for another key; Safari also answers so to a subject it does not like.
    403: "misconfigured",
    404: "token_dead",
    405: "rejected",
    # Edge's word for 429.
    406: "retry",
    408: "retry",
    410: "token_dead",
    413: "too_large",
    429: "retry",
    500: "retry",
    502: "retry",
    503: "retry",
    504: "retry",
}
# Safari's words for a set-up that suits no subscription at all.
_EVERY_TOKEN: Final = frozenset({"BadJwtToken", "ExpiredJwtToken", "BadAuthorizationHeader"})


def with_own_key(config: WebPushConfig) -> WebPushConfig:
    """With a new VAPID key if it has none: whoever sets it up need not know how one is made (RFC 8292, 3.2)."""
    if config.private_key:
        return config
    number = generate_private_key(SECP256R1()).private_numbers().private_value
    return msgspec.structs.replace(config, private_key=encoded(number.to_bytes(32)), public_key="")


def check_webpush(config: WebPushConfig) -> WebPushConfig:
    """The configuration with its public key, or the refusal of a field."""
    public = encoded(public_bytes(_private_key(config.private_key).public_key()))
    given = config.public_key.rstrip("=")
    if given and given != public:
        raise refuse_field("public_key", "This is not the public key of the private key. It may be left out.")
    return msgspec.structs.replace(config, public_key=public)


def check_webpush_token(token: str, policy: OutboundPolicy) -> None:
    """A subscription as a browser gives it; see `PushSubscription`."""
    try:
        endpoint = read_subscription(token).endpoint
    except ValueError as error:
        raise refuse_token(f"This is not a push subscription: {error}.") from None
    try:
        check_url(endpoint, policy)
    except OutboundRefused as error:
        raise refuse_token(f"The subscription's endpoint cannot be used: {error.detail}.") from None


class Subscription(msgspec.Struct, frozen=True):
    """A subscription, read: where to send, and for whom to encrypt."""

    endpoint: str
    origin: str
    public_key: EllipticCurvePublicKey
    public_bytes: bytes
    auth: bytes


def read_subscription(token: str) -> Subscription:
    """Raises ValueError with what is wrong with it, in a few words."""
    if len(token) > TOKEN_CHARS_MAX:
        raise ValueError(f"longer than {TOKEN_CHARS_MAX} characters")
    try:
        given = msgspec.json.decode(token, type=PushSubscription)
    except (ValueError, RecursionError):
        raise ValueError("JSON with endpoint, keys.p256dh and keys.auth is expected") from None
    try:
        point, auth = decoded(given.keys.p256dh), decoded(given.keys.auth)
        # Also refuses what is not on the curve, which would give the private key away bit by bit.
        public = EllipticCurvePublicKey.from_encoded_point(SECP256R1(), point)
    except ValueError:
        raise ValueError("keys.p256dh is not a P-256 key in base64url") from None
    if len(point) != 65 or len(auth) != 16:
        raise ValueError("keys.p256dh has 65 bytes and keys.auth 16")
    parts = urlsplit(given.endpoint)
    return Subscription(given.endpoint, f"{parts.scheme}://{parts.netloc}".lower(), public, point, auth)


class WebPushProvider:
    """One VAPID key's way to the browsers that subscribed with it."""

    def __init__(
        self,
        config: WebPushConfig,
        client: HttpClient,
        clock: Clock,
        *,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._client = client
        self._clock = clock
        self._randomness = randomness
        self._vapid = VapidTokens(config, clock)
        self._read = lru_cache(maxsize=SUBSCRIPTIONS_KEPT)(read_subscription)

    async def send(self, token: str, notification: Notification) -> Outcome:
        """See `Provider.send`."""
        try:
            subscription = self._read(token)
        except ValueError:
            return Outcome(kind="token_dead", reason="malformed")
        plaintext = fit(notification, encode_notification, PLAINTEXT_BYTES_MAX)
        if plaintext is None:
            return Outcome(kind="too_large", reason="payload")
        headers = {
            "authorization": self._vapid.header(subscription.origin),
            "content-encoding": "aes128gcm",
            "content-type": "application/octet-stream",
            "ttl": str(ttl_of(notification)),
            "urgency": "low" if notification.silent else notification.priority,
        }
        if notification.collapse_key:
            headers["topic"] = topic(notification.collapse_key)
        body = encrypt(plaintext, subscription, salt=self._randomness(16), key=generate_private_key(SECP256R1()))
        # The endpoint is this subscription's, and no fault of the set-up.
        reply = await ask(
            self._client, "POST", subscription.endpoint, headers=headers, content=body, refused="rejected"
        )
        return reply if isinstance(reply, Outcome) else outcome(reply, self._clock)

    async def close(self) -> None:
        """Nothing is held."""


class VapidTokens:
    """The `Authorization` for each push service: signed once in six hours per origin."""

    def __init__(self, config: WebPushConfig, clock: Clock) -> None:
        self._key = _private_key(config.private_key)
        self._public = encoded(public_bytes(self._key.public_key()))
        self._subject = config.subject
        self._clock = clock
        self._tokens: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def header(self, origin: str) -> str:
        """RFC 8292, 3."""
        now = self._clock.now_ms() // 1000
        known = self._tokens.get(origin)
        # The second condition: a clock that was set back must not leave a token that lives for days.
        if known is not None and VAPID_SECONDS // 2 < known[1] - now <= VAPID_SECONDS:
            self._tokens.move_to_end(origin)
            return known[0]
        until = now + VAPID_SECONDS
        token = jwt.encode({"aud": origin, "exp": until, "sub": self._subject}, self._key, algorithm="ES256")
        header = f"vapid t={token}, k={self._public}"
        self._tokens[origin] = (header, until)
        self._tokens.move_to_end(origin)
        if len(self._tokens) > VAPID_TOKENS_MAX:
            self._tokens.popitem(last=False)
        return header


def encrypt(plaintext: bytes, to: Subscription, *, salt: bytes, key: EllipticCurvePrivateKey) -> bytes:
    """The body of RFC 8291: one record of aes128gcm. `salt` (16 bytes) and `key` are new for every message."""
    ours = public_bytes(key.public_key())
    shared = key.exchange(ECDH(), to.public_key)
    # RFC 8291, 3.4: HKDF with the subscription's secret, then (RFC 8188, 2.2 and 2.3) with the salt. Each output fits
    # in one block of SHA-256, so that HKDF-Expand is one HMAC; by hand it costs a fifth of the library's objects.
    ikm = _hmac(_hmac(to.auth, shared), b"WebPush: info\0" + to.public_bytes + ours + b"\x01")
    prk = _hmac(salt, ikm)
    content_key = _hmac(prk, b"Content-Encoding: aes128gcm\0\x01")[:16]
    nonce = _hmac(prk, b"Content-Encoding: nonce\0\x01")[:12]
    # 0x02: the last record. No padding: what we say of a notification's length is what its kind says.
    sealed = AESGCM(content_key).encrypt(nonce, plaintext + b"\x02", None)
    return salt + _RECORD_SIZE + bytes([len(ours)]) + ours + sealed


def topic(collapse_key: str) -> str:
    """RFC 8030, 5.4: up to 32 characters of base64url. A fingerprint, for the push service need not know our names."""
    digest = hashlib.sha256(b"topic\0" + collapse_key.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode()[:TOPIC_CHARS_MAX]


def outcome(reply: Reply, clock: Clock) -> Outcome:
    """What an answer means, by the table above."""
    status = reply.status
    kind = ERRORS.get(status, "retry" if status >= 500 else "rejected")
    if kind == "accepted":
        # RFC 8030, 5: Location names the message.
        return Outcome(
            kind=kind, reason="accepted", status=status, provider_id=reply.headers.get("location", "")[-256:] or None
        )
    reason = reason_word(_reason(reply), status)
    return Outcome(
        kind=kind,
        reason=reason,
        status=status,
        retry_after=retry_after(reply, clock) if kind == "retry" else None,
        only_token=status == 403 and reason not in _EVERY_TOKEN,
    )


def _reason(reply: Reply) -> object:
    """Safari's `reason`, Firefox's `errno`; the others answer in sentences."""
    document = json_object(reply.body)
    errno = document.get("errno")
    return f"errno_{errno}" if isinstance(errno, int) else document.get("reason")


def public_bytes(key: EllipticCurvePublicKey) -> bytes:
    """The 65 bytes of an uncompressed point."""
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def encoded(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def decoded(text: str) -> bytes:
    """The bytes of base64url, with or without padding; ValueError for anything else."""
    # Some libraries give the other alphabet.
    plain = text.rstrip("=").replace("+", "-").replace("/", "_")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("this is not base64url") from error


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _private_key(text: str) -> EllipticCurvePrivateKey:
    field = "private_key"
    if not text:
        raise refuse_field(field, "The VAPID private key is missing.")
    try:
        if "BEGIN" in text:
            key = load_pem_private_key(text.encode(), password=None)
            if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
                raise refuse_field(field, "A VAPID key is a P-256 key.")
            return key
        raw = decoded(text.strip())
        if len(raw) == 32:
            return derive_private_key(int.from_bytes(raw), SECP256R1())
    except (ValueError, TypeError):
        pass
    raise refuse_field(field, "This is not a VAPID private key: 32 bytes as base64url, or PEM.")
