"""Users' tokens: JWTs that an app's own identity system signs, verified here and, for development, minted.

PyJWT does the cryptography and parses the keys. Reading the token is ours, because PyJWT (2.15) is laxer than a door
should be (padded base64, duplicate members, any `typ`, dates as text) and costs more than twice as much.

How a key is chosen:

* The token names a `kid`: it is looked up among the app's own keys, then in the key sets that cover it. The key's
  algorithm must be the token's.
* It names none: allowed only if exactly one active key of the app itself has the token's algorithm. Key sets are never
  searched without a `kid`.

Sources: RFC 7515 (JWS), RFC 7519 (JWT), RFC 8725 (best practice), RFC 7797 (`b64`).
"""

import asyncio
import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jwt
import msgspec

from tidings.server.clock import Clock
from tidings.server.errors import Refusal
from tidings.server.services.jwks import JwksCache
from tidings.server.services.signing import (
    ALGORITHM_BY_HEADER,
    KID_CHARS_MAX,
    AppKeys,
    JwksSource,
    KeyStatus,
    SigningKey,
    VerificationKey,
    prepare_key,
)
from tidings.server.strict_json import NotStrictJson, parse_object

__all__ = [
    "AppKeys",
    "JwksSource",
    "KeyStatus",
    "Pending",
    "SigningKey",
    "TokenRefused",
    "TokenVerifier",
    "Verified",
    "mint",
    "unverified_app",
]

# Identity providers that put groups into tokens reach 4 KiB; headers of web servers end at 8 KiB anyway.
TOKEN_BYTES_MAX: Final = 8192
# 31 December 9999, the last second that RFC 3339 can write. Milliseconds given by mistake lie far beyond.
NUMERIC_DATE_MAX: Final = 253_402_300_799
AUDIENCES_MAX: Final = 64
# About 400 bytes each. A reconnect storm presents tokens that were verified minutes ago.
VERIFIED_CACHE_ENTRIES_MAX: Final = 8192
# Prepared keys of that many apps stay in memory, the least recently used leave.
KEYRINGS_MAX: Final = 1024
# Issuers write the same header into every token; only headers of genuine tokens are kept.
HEADERS_MAX: Final = 256

_COMPACT: Final = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)")
# Which last characters leave no stray bits, by length modulo 4 (RFC 4648 3.5): one token, one spelling.
_LAST_OF_TWO: Final = frozenset(b"AQgw")
_LAST_OF_THREE: Final = frozenset(b"AEIMQUYcgkosw048")
_TO_STANDARD: Final = bytes.maketrans(b"-_", b"+/")
_USER_ID: Final = re.compile(r"[A-Za-z0-9_.:@+-]{1,128}")
_JTI: Final = re.compile(r"[\x21-\x7e]{1,128}")
# Explicit types of other kinds of JWT (security events, logout, DPoP) must not pass for a user's token (RFC 8725 3.11).
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/jwt", "application/at+jwt"})
_RESERVED_CLAIMS: Final = frozenset({"sub", "iat", "exp", "nbf", "jti", "app", "aud", "iss"})


class TokenRefused(Refusal):
    """The token does not let anybody in. `detail` never contains the token.

    Codes: `token_too_large`, `token_malformed`, `token_algorithm`, `token_key_unknown`, `token_signature`,
    `token_claims`, `token_expired`, `token_not_yet_valid`.
    """


class Verified(msgspec.Struct, frozen=True):
    """Who the token speaks for. Times in ms since the epoch; `expires_at` is without leeway.

    Revocation is the caller's to check, each time: against `issued_at` and `jti`.
    """

    user_id: str
    expires_at: int
    issued_at: int | None
    jti: str | None
    key_id: str


class Pending(msgspec.Struct, frozen=True):
    """The token names a key that must be fetched first: call `verify_async`."""

    sources: tuple[JwksSource, ...]
    kid: str


class _Header(msgspec.Struct, frozen=True):
    algorithm: str
    kid: str | None


class _Known(msgspec.Struct, frozen=True):
    """A token that was verified, and what must still hold for the result to count."""

    keyring: "_Keyring"
    key: VerificationKey
    source: JwksSource | None
    verified: Verified
    # Whether the token names its app itself.
    names_app: bool


class _Keyring:
    __slots__ = ("_by_kid", "_sole", "app", "leeway_ms", "retired")

    def __init__(self, app: AppKeys) -> None:
        self.app = app
        self.leeway_ms = app.leeway_seconds * 1000
        active = [prepare_key(key) for key in app.keys if key.status is KeyStatus.ACTIVE]
        self.retired = frozenset(key.kid for key in app.keys if key.status is KeyStatus.RETIRED)
        self._by_kid = {key.kid: key for key in active}
        self._sole: dict[str, VerificationKey | None] = {}
        for key in active:
            self._sole[key.algorithm] = None if key.algorithm in self._sole else key

    def named(self, kid: str) -> VerificationKey | None:
        return self._by_kid.get(kid)

    def nameless(self, algorithm: str) -> VerificationKey:
        key = self._sole.get(algorithm)
        if key is not None:
            return key
        if algorithm in self._sole:
            raise TokenRefused("token_key_unknown", f"the app has several {algorithm} keys: name one in the kid header")
        if self._sole or not self.app.jwks:
            raise TokenRefused("token_algorithm", f"the app has no {algorithm} key")
        raise TokenRefused("token_key_unknown", "a token of a key set must name its key in the kid header")


class TokenVerifier:
    """Decides whether a token is a user of an app. Holds prepared keys and recently verified tokens, all bounded."""

    def __init__(self, clock: Clock, jwks: JwksCache) -> None:
        self._clock = clock
        self._jwks = jwks
        self._keyrings: dict[str, _Keyring] = {}
        self._headers: dict[bytes, _Header] = {}
        # By SHA-256 and not by the token itself, so that a memory dump does not hand out sessions.
        self._known: dict[bytes, _Known] = {}

    def verify(self, app: AppKeys, token: str | bytes) -> Verified | Pending:
        """The user of a genuine token; Pending if its key has to be fetched. Raises TokenRefused. Never waits."""
        if len(token) > TOKEN_BYTES_MAX:
            raise TokenRefused("token_too_large", f"a token has at most {TOKEN_BYTES_MAX} bytes")
        raw = _ascii(token)
        now = self._clock.now_ms()
        keyring = self._keyring(app)
        digest = hashlib.sha256(raw).digest()
        known = self._known.get(digest)
        if known is not None and self._still_holds(known, keyring):
            if known.verified.expires_at + keyring.leeway_ms <= now:
                del self._known[digest]
                raise TokenRefused("token_expired", "the token has expired")
            return known.verified

        match = _COMPACT.fullmatch(raw)
        if match is None:
            raise TokenRefused("token_malformed", "a token is three base64url parts joined by dots (compact JWS)")
        header_part, payload_part, signature_part = match.groups()
        header = self._headers.get(header_part) or _read_header(header_part)

        source: JwksSource | None = None
        if header.kid is None:
            key = keyring.nameless(header.algorithm)
        else:
            found = keyring.named(header.kid)
            if found is None:
                located = self._locate(keyring, header.kid, header.algorithm)
                if isinstance(located, Pending):
                    return located
                source, found = located
            key = found
            if key.algorithm != header.algorithm:
                raise TokenRefused("token_algorithm", f"the key the token names is for {key.algorithm}")

        if not key.signed(raw[: match.end(2)], _decode_part(signature_part)):
            raise TokenRefused("token_signature", "the signature does not match")
        verified, names_app = _read_claims(keyring.app, _decode_part(payload_part), now, key.kid)
        self._remember(digest, header_part, header, _Known(keyring, key, source, verified, names_app))
        return verified

    async def verify_async(self, app: AppKeys, token: str | bytes) -> Verified:
        """As `verify`, fetching the key sets that might know the key. Waits at most for one fetch of each."""
        outcome = self.verify(app, token)
        if isinstance(outcome, Pending):
            await asyncio.gather(*(self._jwks.refresh(source) for source in outcome.sources))
            outcome = self.verify(app, token)
        if isinstance(outcome, Pending):  # a source became due while another was fetched: next time
            raise _unknown_key()
        return outcome

    def app_of(self, token: str | bytes) -> str | None:
        """As `unverified_app`, from memory for tokens that were verified before."""
        if len(token) <= TOKEN_BYTES_MAX:
            known = self._known.get(hashlib.sha256(_ascii(token)).digest())
            if known is not None and known.names_app:
                return known.keyring.app.app_id
        return unverified_app(token)

    def _keyring(self, app: AppKeys) -> _Keyring:
        keyring = self._keyrings.get(app.app_id)
        if keyring is not None and (keyring.app is app or keyring.app == app):
            return keyring
        self._keyrings.pop(app.app_id, None)
        while len(self._keyrings) >= KEYRINGS_MAX:
            del self._keyrings[next(iter(self._keyrings))]
        keyring = self._keyrings[app.app_id] = _Keyring(app)
        return keyring

    def _still_holds(self, known: _Known, keyring: _Keyring) -> bool:
        """Whether the same app, with the same keys, would take the token again (a withdrawn key ends its tokens)."""
        if known.keyring is not keyring:
            return False
        if known.source is None:
            return True
        return self._jwks.find(known.source, known.key.kid, known.key.algorithm) is known.key

    def _locate(self, keyring: _Keyring, kid: str, algorithm: str) -> tuple[JwksSource, VerificationKey] | Pending:
        if kid in keyring.retired:
            raise TokenRefused("token_key_unknown", "the key the token names is retired")
        covering = tuple(source for source in keyring.app.jwks if source.covers(kid) and algorithm in source.algorithms)
        for source in covering:
            key = self._jwks.find(source, kid, algorithm)
            if key is not None:
                return source, key
        due = tuple(source for source in covering if self._jwks.may_refresh(source))
        if due:
            return Pending(due, kid)
        raise _unknown_key()

    def _remember(self, digest: bytes, header_part: bytes, header: _Header, known: _Known) -> None:
        if len(self._headers) >= HEADERS_MAX:
            self._headers.clear()
        self._headers[header_part] = header
        self._known.pop(digest, None)
        if len(self._known) >= VERIFIED_CACHE_ENTRIES_MAX:
            del self._known[next(iter(self._known))]
        self._known[digest] = known


def mint(
    app: AppKeys,
    key: SigningKey,
    user_id: str,
    ttl_seconds: int,
    now: int,
    *,
    jti: str | None = None,
    private_key: str | bytes | None = None,
    claims: Mapping[str, Any] | None = None,
) -> str:
    """A token that `verify` accepts for `ttl_seconds` from `now` (ms since the epoch).

    For development and for backends. `private_key` (PEM) is needed for RS256, ES256 and EdDSA, whose `key.material` is
    only the public half. `claims` are added and must not replace registered ones. Raises ValueError.
    """
    if key.status is not KeyStatus.ACTIVE:
        raise ValueError("the key is retired")
    if not _USER_ID.fullmatch(user_id):
        raise ValueError("user_id is 1 to 128 of A-Z a-z 0-9 _ . : @ + -")
    if ttl_seconds <= 0 or (app.max_ttl_seconds is not None and ttl_seconds > app.max_ttl_seconds):
        raise ValueError("ttl_seconds is positive and within the app's maximum")
    if jti is not None and not _JTI.fullmatch(jti):
        raise ValueError("jti is 1 to 128 printable ASCII characters without blanks")
    extra = dict(claims or {})
    if not _RESERVED_CLAIMS.isdisjoint(extra):
        raise ValueError(f"claims must not contain {', '.join(sorted(_RESERVED_CLAIMS))}")
    issued_at = now // 1000
    payload: dict[str, Any] = {
        **extra,
        "app": app.app_id,
        "sub": user_id,
        "iat": issued_at,
        "exp": issued_at + ttl_seconds,
    }
    if jti is not None:
        payload["jti"] = jti
    if app.audience is not None:
        payload["aud"] = app.audience
    if app.issuer is not None:
        payload["iss"] = app.issuer
    signer = key.material if key.algorithm == "HS256" else private_key
    if signer is None:
        raise ValueError(f"minting with {key.algorithm} needs the private key")
    try:
        token = jwt.encode(payload, signer, algorithm=key.algorithm, headers={"kid": key.kid})
    except (jwt.PyJWTError, TypeError, ValueError) as error:
        raise ValueError(f"the token cannot be signed ({type(error).__name__})") from None
    if len(token) > TOKEN_BYTES_MAX:
        raise ValueError(f"a token has at most {TOKEN_BYTES_MAX} bytes")
    return token


def unverified_app(token: str | bytes) -> str | None:
    """Which app the token says it is for: a claim, to choose the keys by, and nothing more. None if it does not say.

    Raises TokenRefused when the token cannot be read. `verify` then insists that the app is the one of the keys.
    """
    if len(token) > TOKEN_BYTES_MAX:
        raise TokenRefused("token_too_large", f"a token has at most {TOKEN_BYTES_MAX} bytes")
    match = _COMPACT.fullmatch(_ascii(token))
    if match is None:
        raise TokenRefused("token_malformed", "a token is three base64url parts joined by dots (compact JWS)")
    app_id = _parse(match.group(2), "payload").get("app")
    if app_id is None:
        return None
    if not isinstance(app_id, str) or not _USER_ID.fullmatch(app_id):
        raise TokenRefused("token_claims", "app is an app's id")
    return app_id


def _unknown_key() -> TokenRefused:
    return TokenRefused("token_key_unknown", "no key of the app has the id in the token's kid header")


def _ascii(token: str | bytes) -> bytes:
    if isinstance(token, bytes):
        return token
    try:
        return token.encode("ascii")
    except UnicodeEncodeError:
        raise TokenRefused("token_malformed", "a token is ASCII") from None


def _decode_part(part: bytes) -> bytes:
    """Unpadded canonical base64url (RFC 7515 2). The alphabet was checked by `_COMPACT`."""
    remainder = len(part) % 4
    if (
        remainder == 1
        or (remainder == 2 and part[-1] not in _LAST_OF_TWO)
        or (remainder == 3 and part[-1] not in _LAST_OF_THREE)
    ):
        raise TokenRefused("token_malformed", "a part of the token is not canonical base64url")
    return binascii.a2b_base64(part.translate(_TO_STANDARD) + b"==="[: -remainder % 4])


def _parse(part: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_object(_decode_part(part))
    except NotStrictJson as error:
        raise TokenRefused("token_malformed", f"the token's {name} is {error}") from None


def _read_header(part: bytes) -> _Header:
    """What the header may decide: almost nothing. `jku`, `jwk`, `x5u`, `x5c` and unknown members are ignored."""
    header = _parse(part, "header")
    # RFC 7515 4.1.11: whoever does not understand a critical extension must refuse, and we understand none.
    for member in ("crit", "b64", "zip", "enc"):
        if member in header:
            raise TokenRefused("token_malformed", f"the header member {member} is not supported")
    if "cty" in header:
        raise TokenRefused("token_malformed", "nested tokens are not supported")
    typ = header.get("typ", "JWT")
    if not isinstance(typ, str) or typ.lower() not in _TYPES:
        raise TokenRefused("token_malformed", "the header's typ is not that of a user's token (JWT or at+jwt)")
    alg = header.get("alg")
    algorithm = ALGORITHM_BY_HEADER.get(alg) if isinstance(alg, str) else None
    if algorithm is None:
        raise TokenRefused("token_algorithm", "the algorithm is not HS256, RS256, ES256 or EdDSA")
    kid = header.get("kid")
    if "kid" in header and (not isinstance(kid, str) or not 0 < len(kid) <= KID_CHARS_MAX):
        raise TokenRefused("token_malformed", f"kid is text of 1 to {KID_CHARS_MAX} characters")
    return _Header(algorithm, kid)


def _read_claims(app: AppKeys, payload: bytes, now: int, key_id: str) -> tuple[Verified, bool]:
    """Who the claims speak for, and whether they name the app."""
    try:
        claims = parse_object(payload)
    except NotStrictJson as error:
        raise TokenRefused("token_malformed", f"the token's payload is {error}") from None
    user_id = claims.get("sub")
    if not isinstance(user_id, str) or not _USER_ID.fullmatch(user_id):
        raise TokenRefused("token_claims", "sub is a user id: 1 to 128 of A-Z a-z 0-9 _ . : @ + -")
    leeway = app.leeway_seconds * 1000
    expires_at = _moment(claims, "exp")
    if expires_at is None:
        raise TokenRefused("token_claims", "exp is required")
    if expires_at + leeway <= now:
        raise TokenRefused("token_expired", "the token has expired")
    issued_at = _moment(claims, "iat")
    not_before = _moment(claims, "nbf")
    if not_before is not None and not_before > now + leeway:
        raise TokenRefused("token_not_yet_valid", "the token is not valid yet (nbf)")
    if issued_at is not None and issued_at > now + leeway:
        raise TokenRefused("token_not_yet_valid", "the token was issued in the future (iat)")
    if app.max_ttl_seconds is not None:
        start = now if issued_at is None else issued_at
        if expires_at - start > app.max_ttl_seconds * 1000:
            raise TokenRefused("token_claims", f"the token lives longer than {app.max_ttl_seconds} seconds")
    jti = claims.get("jti")
    if "jti" in claims and (not isinstance(jti, str) or not _JTI.fullmatch(jti)):
        raise TokenRefused("token_claims", "jti is 1 to 128 printable ASCII characters without blanks")
    if "app" in claims and claims["app"] != app.app_id:
        raise TokenRefused("token_claims", "the token is for another app")
    _check_audience(app.audience, claims)
    if app.issuer is not None and claims.get("iss") != app.issuer:
        raise TokenRefused("token_claims", "iss is not the app's issuer")
    return Verified(user_id, expires_at, issued_at, jti, key_id), "app" in claims


def _moment(claims: Mapping[str, Any], name: str) -> int | None:
    """A NumericDate (seconds, RFC 7519 2) in ms, or None where there is none."""
    if name not in claims:
        return None
    value = claims[name]
    # type() and not isinstance: True is an int in Python, and no date.
    if type(value) not in (int, float) or not 0 <= value <= NUMERIC_DATE_MAX:
        raise TokenRefused("token_claims", f"{name} is a number of seconds since 1970 (not milliseconds, not text)")
    return int(value * 1000)


def _check_audience(audience: str | None, claims: Mapping[str, Any]) -> None:
    if audience is None and "aud" not in claims:
        return
    named = claims.get("aud")
    names: Sequence[Any] = named if isinstance(named, list) else [named]
    if len(names) > AUDIENCES_MAX or not all(isinstance(name, str) for name in names):
        raise TokenRefused("token_claims", "aud is text or a list of texts, and must name the app's audience")
    if audience is None:
        raise TokenRefused("token_claims", "the token names an audience but the app has none configured")
    if audience not in names:
        raise TokenRefused("token_claims", "aud does not name the app's audience")
