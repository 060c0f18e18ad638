"""The format of Standard Webhooks: identifiers, times and signatures.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md. What is signed is the id,
the time in seconds and the body, joined by dots. A header carries any number of signatures: one per secret, so that a
secret can be exchanged while both work.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what secrets begin with
PRIVATE_PREFIX: Final = "whsk_"
PUBLIC_PREFIX: Final = "whpk_"
SECRET_BYTES_MIN: Final = 24
SECRET_BYTES_MAX: Final = 64
SECRET_BYTES: Final = 32

# Attempts at one message, as seconds after the one before: the schedule that the specification proposes.
SCHEDULE: Final = (0, 5, 5 * 60, 30 * 60, 2 * 3_600, 5 * 3_600, 10 * 3_600, 10 * 3_600)
# Each wait is longer by up to this share, so that endpoints that failed together are not asked together.
JITTER: Final = 0.1
# An endpoint cannot put an attempt off for longer than this, seconds.
RETRY_AFTER_MAX: Final = 24 * 3_600


def secret_bytes(secret: str) -> bytes:
    """The key in a `whsec_…`. Raises ValueError saying what is wrong, without the secret."""
    if not secret.startswith(SECRET_PREFIX):
        raise ValueError(f"A secret begins with {SECRET_PREFIX}.")
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ValueError(f"What follows {SECRET_PREFIX} is not base64.") from None
    if not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
        raise ValueError(f"A secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, in base64.")
    return key


def secret_text(key: bytes) -> str:
    """A key as people copy it."""
    return SECRET_PREFIX + base64.b64encode(key).decode()


def public_text(seed: bytes) -> str:
    """The public key that verifies what the ed25519 key with this seed (32 bytes) signs."""
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    return PUBLIC_PREFIX + base64.b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


class Signer:
    """Signs with every key there is: HMAC-SHA256 secrets and ed25519 seeds."""

    __slots__ = ("_private", "_secrets")

    def __init__(self, secrets: Sequence[bytes], seeds: Sequence[bytes] = ()) -> None:
        self._secrets = tuple(secrets)
        self._private = tuple(Ed25519PrivateKey.from_private_bytes(seed) for seed in seeds)

    def headers(self, message: str, seconds: int, body: bytes) -> dict[str, str]:
        """The headers of a message."""
        signed = f"{message}.{seconds}.".encode() + body
        signatures = [f"v1,{_text(hmac.digest(key, signed, 'sha256'))}" for key in self._secrets]
        signatures += [f"v1a,{_text(key.sign(signed))}" for key in self._private]
        return {
            "content-type": "application/json",
            "webhook-id": message,
            "webhook-timestamp": str(seconds),
            "webhook-signature": " ".join(signatures),
        }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wait_seconds(attempt: int, draw: float) -> float | None:
    """How long to wait after the attempt of this number (from 1) has failed; None: there is no other. `draw`: 0 to
    1."""
    if attempt >= len(SCHEDULE):
        return None
    return SCHEDULE[attempt] * (1 + JITTER * draw)


def retry_after(text: str, now_ms: int) -> float | None:
    """Seconds that `Retry-After` asks for: a number or a date (RFC 9110, 10.2.3), bounded. None: it cannot be read."""
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(min(int(text), RETRY_AFTER_MAX))
    try:
        seconds = parsedate_to_datetime(text).timestamp() - now_ms / 1_000
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), float(RETRY_AFTER_MAX))


def matches(filters: Sequence[str], type: str) -> bool:
    """Whether an event's type is among the filters: itself, its noun with a star, or a star."""
    noun = type.partition(".")[0]
    return any(one in ("*", type) or (one.endswith(".*") and one[:-2] == noun) for one in filters)
