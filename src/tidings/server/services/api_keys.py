"""API keys as text: `tk_<key id>_<secret>`. The id is public and stands in the audit trail, the secret is hashed.

A plain SHA-256 is enough, and a slow hash (bcrypt, argon2) would only cost: those exist to make guessing a *person's*
password expensive, and these secrets are 256 random bits, which nobody guesses at any speed. What the hash is for is
that a stolen database opens no door.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

PREFIX: Final = "tk_"
# 26 characters of base 32 (128 bits), then 43 of base 64 (256 bits). The id holds no underscore, the secret may.
_KEY: Final = re.compile(r"tk_([a-z2-7]{26})_([A-Za-z0-9_-]{43})")


def key_text(key_id: str, secret: str) -> str:
    """The whole key, as its holder sends it."""
    return f"{PREFIX}{key_id}_{secret}"


def parse_key(text: str) -> tuple[str, str] | None:
    """Id and secret of something that has the form of a key, else None."""
    match = _KEY.fullmatch(text)
    return (match[1], match[2]) if match else None


def hash_secret(secret: str) -> bytes:
    """What is stored of a secret: 32 bytes."""
    return hashlib.sha256(secret.encode()).digest()


def matches(secret: str, secret_hash: bytes) -> bool:
    """Whether it is the secret that was hashed, in a time that does not depend on how much of it is right."""
    return hmac.compare_digest(hash_secret(secret), secret_hash)
