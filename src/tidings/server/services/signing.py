"""The keys that users' tokens are signed with: what an app configures, and what becomes of it.

An algorithm belongs to a key and is never taken from a token. Everything about a key is checked when it is configured,
so that verifying has nothing left to decide.
"""

import enum
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import Algorithm, get_default_algorithms
from jwt.exceptions import InvalidKeyError

# RFC 7518 3.2: an HS256 key is at least as long as the hash. Shorter ones can be guessed offline from one token.
HMAC_SECRET_BYTES_MIN: Final = 32
HMAC_SECRET_BYTES_MAX: Final = 1024
# RFC 7518 3.3 asks for 2048 bits; 8192 bounds the cost of one verification (about 1 ms).
RSA_BITS_MIN: Final = 2048
RSA_BITS_MAX: Final = 8192
KEY_TEXT_CHARS_MAX: Final = 16384
# A key id is a dictionary key and appears in logs.
KID_CHARS_MAX: Final = 128

LEEWAY_SECONDS_DEFAULT: Final = 30
# Clocks of machines with NTP differ by less than a second; a minute forgives a badly kept one (DESIGN 6).
LEEWAY_SECONDS_MAX: Final = 60
JWKS_CACHE_SECONDS_DEFAULT: Final = 600

_KID: Final = re.compile(r"[\x21-\x7e]{1,128}\Z")

# Header value → algorithm of ours. RFC 9864 renames EdDSA with this curve; libraries write either.
ALGORITHM_BY_HEADER: Final[Mapping[str, str]] = {
    "HS256": "HS256",
    "RS256": "RS256",
    "ES256": "ES256",
    "EdDSA": "EdDSA",
    "Ed25519": "EdDSA",
}
ASYMMETRIC_ALGORITHMS: Final = ("RS256", "ES256", "EdDSA")
_IMPLEMENTATIONS: Final[Mapping[str, Algorithm]] = {
    name: get_default_algorithms()[name] for name in ("HS256", *ASYMMETRIC_ALGORITHMS)
}
# kty, members of the public key. Whatever else a JWK carries (private parts, x5u, x5c) is not looked at.
_JWK_SHAPE: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "RS256": ("RSA", ("kty", "n", "e")),
    "ES256": ("EC", ("kty", "crv", "x", "y")),
    "EdDSA": ("OKP", ("kty", "crv", "x")),
}


class KeyStatus(enum.Enum):
    """A retired key verifies and signs nothing any more. Keys that overlap during a rotation are all active."""

    ACTIVE = "active"
    RETIRED = "retired"


class VerificationKey:
    """A key that is ready to verify: the algorithm is bound to it. Compared by identity."""

    __slots__ = ("_implementation", "_prepared", "algorithm", "kid")

    def __init__(self, kid: str, algorithm: str, prepared: Any) -> None:
        self.kid = kid
        self.algorithm = algorithm
        self._implementation = _IMPLEMENTATIONS[algorithm]
        self._prepared = prepared

    def __repr__(self) -> str:
        return f"VerificationKey(kid={self.kid!r}, algorithm={self.algorithm!r})"

    def signed(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature is this key's over the message. Never raises for a bad signature."""
        return self._implementation.verify(message, self._prepared, signature)


class SigningKey(msgspec.Struct, frozen=True):
    """One key of an app. Raises ValueError when the material does not suit the algorithm.

    `material` is for HS256 the secret itself (text counts as its UTF-8 bytes, at least 32 of them); for RS256, ES256
    (P-256) and EdDSA (Ed25519) the *public* key as PEM or as a JWK in JSON. Its `repr` does not show the material.
    """

    kid: str
    algorithm: str
    material: bytes | str
    status: KeyStatus = KeyStatus.ACTIVE

    def __post_init__(self) -> None:
        prepare_key(self)

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r}, algorithm={self.algorithm!r}, status={self.status.value!r})"


class JwksSource(msgspec.Struct, frozen=True):
    """A key set at a URL of the app's identity provider.

    `algorithms`: which of RS256, ES256, EdDSA are believed. `cache_seconds`: the age at which the set is fetched again.
    `kid_prefix`: only key ids that begin with it are looked up here (several providers, one app).
    """

    url: str
    algorithms: tuple[str, ...] = ASYMMETRIC_ALGORITHMS
    cache_seconds: int = JWKS_CACHE_SECONDS_DEFAULT
    kid_prefix: str | None = None

    def __post_init__(self) -> None:
        if not self.algorithms or not set(self.algorithms) <= set(ASYMMETRIC_ALGORITHMS):
            raise ValueError(f"algorithms of a key set are among {', '.join(ASYMMETRIC_ALGORITHMS)}")
        if not 30 <= self.cache_seconds <= 86_400:
            raise ValueError("cache_seconds is between 30 and 86400")

    def covers(self, kid: str) -> bool:
        """Whether a key of that id is this source's business."""
        return self.kid_prefix is None or kid.startswith(self.kid_prefix)


class AppKeys(msgspec.Struct, frozen=True):
    """Everything that decides whether a token is one of this app's users.

    `max_ttl_seconds` bounds `exp` minus `iat` (minus now where there is no `iat`). `audience` and `issuer`, when set,
    must be matched; a token that names an audience while none is set is refused (RFC 7519 4.1.3).
    """

    app_id: str
    keys: tuple[SigningKey, ...] = ()
    jwks: tuple[JwksSource, ...] = ()
    leeway_seconds: int = LEEWAY_SECONDS_DEFAULT
    max_ttl_seconds: int | None = None
    audience: str | None = None
    issuer: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.leeway_seconds <= LEEWAY_SECONDS_MAX:
            raise ValueError(f"leeway_seconds is between 0 and {LEEWAY_SECONDS_MAX}")
        if self.max_ttl_seconds is not None and self.max_ttl_seconds <= 0:
            raise ValueError("max_ttl_seconds is positive")
        kids = [key.kid for key in self.keys]
        if len(set(kids)) != len(kids):
            raise ValueError("two keys of the app have the same kid")


def prepare_key(key: SigningKey) -> VerificationKey:
    """The key ready for use. Raises ValueError with what is wrong with it; the message never shows the material."""
    if not _KID.match(key.kid):
        raise ValueError(f"kid is 1 to {KID_CHARS_MAX} printable ASCII characters without blanks")
    if key.algorithm not in _IMPLEMENTATIONS:
        raise ValueError(f"algorithm is one of {', '.join(_IMPLEMENTATIONS)}")
    if key.algorithm == "HS256":
        return VerificationKey(key.kid, "HS256", _secret(key.material))
    text = key.material.decode("utf-8", "replace") if isinstance(key.material, bytes) else key.material
    if len(text) > KEY_TEXT_CHARS_MAX:
        raise ValueError("the key is too long")
    if text.lstrip().startswith("{"):
        try:
            members = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("the key is not valid JSON") from None
        return key_from_jwk(members, kid=key.kid, algorithm=key.algorithm)
    try:
        prepared = _IMPLEMENTATIONS[key.algorithm].prepare_key(text)
    except (ValueError, TypeError, InvalidKeyError, UnsupportedAlgorithm):
        raise ValueError(f"this is not a public key for {key.algorithm} (PEM or JWK)") from None
    return VerificationKey(key.kid, key.algorithm, _suitable(key.algorithm, prepared))


def key_from_jwk(jwk: Mapping[str, Any], *, kid: str, algorithm: str) -> VerificationKey:
    """The public key in a JWK, for that algorithm. Raises ValueError when it is none, or not meant for signatures."""
    kty, members = _JWK_SHAPE[algorithm]
    if jwk.get("kty") != kty:
        raise ValueError(f"a key for {algorithm} has kty {kty}")
    if "d" in jwk:
        raise ValueError("this is a private key; configure the public one")
    if jwk.get("use", "sig") != "sig":
        raise ValueError("the key is not meant for signatures (use)")
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise ValueError("the key is not meant for verifying (key_ops)")
    if "alg" in jwk and ALGORITHM_BY_HEADER.get(str(jwk["alg"])) != algorithm:
        raise ValueError("the key is for another algorithm (alg)")
    public = {name: jwk.get(name) for name in members}
    if not all(isinstance(value, str) and len(value) <= KEY_TEXT_CHARS_MAX for value in public.values()):
        raise ValueError(f"a member of {', '.join(members)} is missing")
    try:
        prepared = _IMPLEMENTATIONS[algorithm].from_jwk(public)
        _IMPLEMENTATIONS[algorithm].prepare_key(prepared)  # checks the curve
    except (ValueError, TypeError, InvalidKeyError, UnsupportedAlgorithm):
        raise ValueError(f"this is not a public key for {algorithm}") from None
    return VerificationKey(kid, algorithm, _suitable(algorithm, prepared))


def _secret(material: bytes | str) -> bytes:
    secret = material.encode() if isinstance(material, str) else material
    if not HMAC_SECRET_BYTES_MIN <= len(secret) <= HMAC_SECRET_BYTES_MAX:
        raise ValueError(f"an HS256 secret has {HMAC_SECRET_BYTES_MIN} to {HMAC_SECRET_BYTES_MAX} bytes")
    try:
        # Refuses PEM, SSH, DER and JWK: a public key as HMAC secret is how "RS256 to HS256" attacks succeed.
        return bytes(_IMPLEMENTATIONS["HS256"].prepare_key(secret))
    except InvalidKeyError:
        raise ValueError("this is a public or private key, not an HS256 secret") from None


def _suitable(algorithm: str, prepared: Any) -> Any:
    match algorithm:
        case "RS256":
            if not isinstance(prepared, RSAPublicKey):
                raise ValueError("this is a private key; configure the public one")
            if not RSA_BITS_MIN <= prepared.key_size <= RSA_BITS_MAX:
                raise ValueError(f"an RSA key has {RSA_BITS_MIN} to {RSA_BITS_MAX} bits")
        case "ES256":
            if not isinstance(prepared, EllipticCurvePublicKey):
                raise ValueError("this is a private key; configure the public one")
        case _:
            if not isinstance(prepared, Ed25519PublicKey):
                raise ValueError("an EdDSA key is a public Ed25519 key")
    return prepared
