"""Tokens that must let nobody in, as data, for every door that takes tokens.

`vectors(app, keys, now)` builds them for an app and the keys a test holds; vectors that need a key the test has not
are left out. Each vector carries the codes it may be refused with.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from jwt.utils import der_to_raw_signature

from tidings.server.services.signing import AppKeys

Signer = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class AttackKeys:
    """The app's keys, with the private halves; `kid`s as configured. The app must have no audience and no issuer."""

    hs_kid: str
    hs_secret: bytes
    rs_kid: str | None = None
    rs_private: rsa.RSAPrivateKey | None = None
    es_kid: str | None = None
    es_private: ec.EllipticCurvePrivateKey | None = None
    ed_kid: str | None = None
    ed_private: ed25519.Ed25519PrivateKey | None = None


@dataclass(frozen=True, slots=True)
class Vector:
    name: str
    token: str
    codes: frozenset[str]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def compact(header: bytes | dict[str, Any], payload: bytes | dict[str, Any], sign: Signer) -> str:
    """A compact JWS over exactly these bytes, with no opinion about them."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    signing_input = f"{b64(head)}.{b64(body)}"
    return f"{signing_input}.{b64(sign(signing_input.encode()))}"


def hs256(secret: bytes) -> Signer:
    return lambda message: hmac.new(secret, message, hashlib.sha256).digest()


def hs512(secret: bytes) -> Signer:
    return lambda message: hmac.new(secret, message, hashlib.sha512).digest()


def rs256(key: rsa.RSAPrivateKey) -> Signer:
    return lambda message: key.sign(message, padding.PKCS1v15(), hashes.SHA256())


def ps256(key: rsa.RSAPrivateKey) -> Signer:
    return lambda message: key.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())


def es256(key: ec.EllipticCurvePrivateKey) -> Signer:
    return lambda message: der_to_raw_signature(key.sign(message, ec.ECDSA(hashes.SHA256())), key.curve)


def public_pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def claims_of(app: AppKeys, now: int, /, **changes: Any) -> dict[str, Any]:
    """Good claims at `now` (ms), with changes; a change to None removes the claim."""
    seconds = now // 1000
    claims = {"sub": "alice", "app": app.app_id, "iat": seconds, "exp": seconds + 600, **changes}
    return {name: value for name, value in claims.items() if value is not None}


def vectors(app: AppKeys, keys: AttackKeys, now: int) -> list[Vector]:
    """All vectors that these keys allow. `now` in ms since the epoch."""
    return [Vector(name, token, frozenset(codes.split())) for name, token, codes in _all(app, keys, now)]


def _all(app: AppKeys, keys: AttackKeys, now: int) -> Iterator[tuple[str, str, str]]:
    yield from _algorithms(app, keys, now)
    yield from _headers(app, keys, now)
    yield from _spellings(app, keys, now)
    yield from _claims(app, keys, now)
    yield from _asymmetric(app, keys, now)


def _algorithms(app: AppKeys, keys: AttackKeys, now: int) -> Iterator[tuple[str, str, str]]:
    good = claims_of(app, now)
    kid = keys.hs_kid
    sign = hs256(keys.hs_secret)
    for alg in ("none", "None", "NONE", "nOnE", "", "null", " none", "hs256", "Hs256", "HS256 ", "HS256\u0000"):
        shown = alg.encode("unicode_escape").decode()
        yield f"alg {shown!r}, no signature", compact({"alg": alg, "kid": kid}, good, lambda _: b""), "token_algorithm"
        yield f"alg {shown!r}, HS256 signature", compact({"alg": alg, "kid": kid}, good, sign), "token_algorithm"
    yield "alg HS256, no signature", compact({"alg": "HS256", "kid": kid}, good, lambda _: b""), "token_signature"
    yield "alg missing", compact({"kid": kid}, good, sign), "token_algorithm"
    for odd in (None, True, 0, ["HS256"], {"HS256": 1}):
        yield f"alg {odd!r}", compact({"alg": odd, "kid": kid}, good, sign), "token_algorithm"
    yield (
        "HS512 with the HS256 secret",
        compact({"alg": "HS512", "kid": kid}, good, hs512(keys.hs_secret)),
        ("token_algorithm"),
    )
    yield (
        "HS256 named, HS512 computed",
        compact({"alg": "HS256", "kid": kid}, good, hs512(keys.hs_secret)),
        ("token_signature"),
    )
    yield "RS256 named on the HS256 key", compact({"alg": "RS256", "kid": kid}, good, sign), "token_algorithm"
    # Not the secret with a NUL appended: HMAC pads short keys with NULs, so that is the same key.
    for guess in (b"", b"\0" * 32, b"secret", keys.hs_secret[:-1], keys.hs_secret + b"\1", kid.encode()):
        yield (
            f"another secret ({hashlib.sha256(guess).hexdigest()[:6]})",
            compact({"alg": "HS256", "kid": kid}, good, hs256(guess)),
            "token_signature",
        )


def _headers(app: AppKeys, keys: AttackKeys, now: int) -> Iterator[tuple[str, str, str]]:
    good = claims_of(app, now)
    kid = keys.hs_kid
    sign = hs256(keys.hs_secret)

    def header(**members: Any) -> dict[str, Any]:
        return {"alg": "HS256", "kid": kid, **members}

    mine = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    numbers = mine.public_key().public_numbers()
    own_jwk = {
        "kty": "RSA",
        "kid": "mine",
        "n": b64(numbers.n.to_bytes(256, "big")),
        "e": b64(numbers.e.to_bytes(3, "big")),
    }
    foreign: dict[str, dict[str, Any]] = {
        "jwk": {"jwk": own_jwk},
        "jku": {"jku": "https://attacker.example/jwks.json"},
        "x5u": {"x5u": "https://attacker.example/chain.pem"},
        "x5c": {"x5c": [b64(b"certificate")]},
    }
    unknown = "token_key_unknown token_algorithm"
    for name, members in foreign.items():
        yield (
            f"{name} names the attacker's key",
            compact({"alg": "RS256", "kid": "mine", **members}, good, rs256(mine)),
            unknown,
        )
        yield (
            f"{name} without kid",
            compact({"alg": "RS256", **members}, good, rs256(mine)),
            unknown + " token_signature",
        )
    yield (
        "jwk holds a secret of the attacker",
        compact(header(jwk={"kty": "oct", "k": b64(b"a" * 32)}), good, hs256(b"a" * 32)),
        "token_signature",
    )
    for name, odd in {
        "a path": "../../../../dev/null",
        "a query": "' UNION SELECT 'secret' --",
        "a command": "key|/bin/id",
        "a URL": "https://attacker.example/key",
        "a NUL": kid + "\0",
        "upper case": kid.swapcase() + "X",
        "a blank": kid + " ",
        "a dunder": "__class__",
    }.items():
        yield f"kid is {name}", compact({"alg": "HS256", "kid": odd}, good, hs256(b"")), "token_key_unknown"
    for odd_kid in (None, 7, True, [kid], {"kid": kid}, "", "k" * 129):
        yield (
            f"kid is {str(odd_kid)[:12]!r} of {type(odd_kid).__name__}",
            compact(header(kid=odd_kid), good, sign),
            ("token_malformed"),
        )
    for crit in (["exp"], [], ["b64"], "b64", None, ["http://example.org/unknown"]):
        yield f"crit {crit!r}", compact(header(crit=crit), good, sign), "token_malformed"
    for b64_member in (False, True, "false"):
        yield (
            f"b64 {b64_member!r} with crit",
            compact(header(b64=b64_member, crit=["b64"]), good, sign),
            ("token_malformed"),
        )
        yield f"b64 {b64_member!r} without crit", compact(header(b64=b64_member), good, sign), "token_malformed"
    yield "zip DEF", compact(header(zip="DEF"), good, sign), "token_malformed"
    yield "enc A256GCM", compact(header(enc="A256GCM"), good, sign), "token_malformed"
    yield "cty JWT (nested)", compact(header(cty="JWT"), good, sign), "token_malformed"
    for typ in ("secevent+jwt", "logout+jwt", "dpop+jwt", "JOSE", "", 1, None):
        yield f"typ {typ!r}", compact(header(typ=typ), good, sign), "token_malformed"
    doubled = b'{"alg":"none","kid":"%s","alg":"HS256"}' % kid.encode()
    yield "alg twice", compact(doubled, good, sign), "token_malformed"
    escaped = b'{"alg":"HS256","kid":"%s","\\u0061lg":"none"}' % kid.encode()
    yield "alg twice, once escaped", compact(escaped, good, sign), "token_malformed"
    yield "header is a list", compact(b'["HS256"]', good, sign), "token_malformed"
    yield "header is no JSON", compact(b"HS256", good, sign), "token_malformed"
    yield "header is not UTF-8", compact(b'{"alg":"HS256","x":"\xff"}', good, sign), "token_malformed"
    yield "header is UTF-16", compact(json.dumps(header()).encode("utf-16"), good, sign), "token_malformed"
    yield (
        "header begins with a byte-order mark",
        compact(b"\xef\xbb\xbf" + json.dumps(header()).encode(), good, sign),
        "token_malformed",
    )
    yield (
        "header nests 2,000 deep",
        compact(b'{"alg":' + b"[" * 2000 + b"]" * 2000 + b"}", good, sign),
        ("token_malformed token_algorithm"),
    )
    yield (
        "header has a 5,000-digit number",
        compact(b'{"alg":"HS256","n":' + b"9" * 5000 + b"}", good, sign),
        ("token_malformed token_too_large"),
    )


def _spellings(app: AppKeys, keys: AttackKeys, now: int) -> Iterator[tuple[str, str, str]]:
    sign = hs256(keys.hs_secret)
    good = compact({"alg": "HS256", "kid": keys.hs_kid}, claims_of(app, now), sign)
    head, body, signature = good.split(".")
    malformed = {
        "empty": "",
        "a dot": ".",
        "two dots": "..",
        "one part": head,
        "two parts": f"{head}.{body}",
        "four parts": f"{good}.{signature}",
        "five parts (JWE)": f"{head}.{body}.{body}.{body}.{signature}",
        "detached payload": f"{head}..{signature}",
        "empty header": f".{body}.{signature}",
        "padded signature": f"{good}=",
        "padded header": f"{head}==.{body}.{signature}",
        "leading blank": f" {good}",
        "trailing newline": f"{good}\n",
        "newline within": f"{head}.\n{body}.{signature}",
        "tab within": f"{head}.{body[:8]}\t{body[8:]}.{signature}",
        "a NUL at the end": f"{good}\0",
        "standard base64": f"{head}.{body}.{'+/' + signature[2:]}",
        "percent-encoded dot": good.replace(".", "%2E"),
        "a full-width dot": good.replace(".", "．"),
        "a non-ASCII letter": f"{head}.{body}.é{signature[1:]}",
        "the scheme twice": f"Bearer {good}",
        "quoted": f'"{good}"',
        "JSON serialisation": json.dumps({"protected": head, "payload": body, "signature": signature}),
        "junk in the signature": f"{head}.{body}.!!!!{signature}",
    }
    for name, token in malformed.items():
        yield f"spelling: {name}", token, "token_malformed"
    # 32 bytes leave two stray bits in the last of 43 characters: the other three spellings decode to the same bytes.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    stray = alphabet[alphabet.index(signature[-1]) + 1]
    yield "spelling: stray bits in the signature", f"{head}.{body}.{signature[:-1]}{stray}", "token_malformed"
    yield "spelling: a signature of impossible length", f"{good}AA", "token_malformed"
    yield "signature cut", f"{head}.{body}.{b64(sign(f'{head}.{body}'.encode())[:16])}", "token_signature"
    yield "signature doubled", f"{head}.{body}.{b64(sign(f'{head}.{body}'.encode()) * 2)}", "token_signature"
    other = b64(json.dumps(claims_of(app, now, sub="mallory")).encode())
    yield "payload replaced", f"{head}.{other}.{signature}", "token_signature"
    header_two = b64(json.dumps({"kid": keys.hs_kid, "alg": "HS256"}).encode())
    yield "header replaced", f"{header_two}.{body}.{signature}", "token_signature"
    yield "8,193 bytes", good + "A" * (8193 - len(good)), "token_too_large"
    yield "a megabyte", good + "A" * 2**20, "token_too_large"


def _claims(app: AppKeys, keys: AttackKeys, now: int) -> Iterator[tuple[str, str, str]]:
    sign = hs256(keys.hs_secret)
    seconds = now // 1000

    def signed(payload: bytes | dict[str, Any]) -> str:
        return compact({"alg": "HS256", "kid": keys.hs_kid}, payload, sign)

    def changed(**changes: Any) -> str:
        return signed(claims_of(app, now, **changes))

    odd: Any
    yield "exp missing", changed(exp=None), "token_claims"
    for odd in (str(seconds + 600), True, [seconds + 600], {}, -1, seconds * 1000, 10**30, -(10**30)):
        yield f"exp {odd!r}", changed(exp=odd), "token_claims"
    yield "exp null", signed({**claims_of(app, now), "exp": None}), "token_claims"
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000):
        raw = json.dumps(claims_of(app, now, exp=4242)).replace("4242", text).encode()
        yield f"exp {text[:12]}", signed(raw), "token_malformed token_claims"
    yield "exp 0", changed(exp=0), "token_expired"
    yield "expired long ago", changed(exp=seconds - 3600), "token_expired"
    yield "expired just beyond the leeway", changed(exp=seconds - app.leeway_seconds - 1), "token_expired"
    yield "nbf in the future", changed(nbf=seconds + 3600), "token_not_yet_valid"
    yield "iat in the future", changed(iat=seconds + 3600), "token_not_yet_valid"
    for name in ("nbf", "iat"):
        for odd in ("now", True, [], 10**20):
            yield f"{name} {odd!r}", changed(**{name: odd}), "token_claims"
    yield "sub missing", changed(sub=None), "token_claims"
    for sub in (
        7,
        True,
        ["alice"],
        {"id": "alice"},
        "",
        "a" * 129,
        "al ice",
        "alice\n",
        "alice\0",
        "../alice",
        "al/ice",
    ):
        yield f"sub {str(sub)[:12]!r}", changed(sub=sub), "token_claims"
    for sub in ("аlice", "alice\u200b", "alice\u202e", "ａlice"):
        yield f"sub looks like alice ({sub.encode().hex()})", changed(sub=sub), "token_claims"
    for odd in (7, "", "j" * 129, ["j"], "a b"):
        yield f"jti {str(odd)[:12]!r}", changed(jti=odd), "token_claims"
    yield "another app", changed(app="app_other"), "token_claims"
    yield "app in a list", changed(app=[app.app_id]), "token_claims"
    yield "an audience nobody configured", changed(aud="another-service"), "token_claims"
    yield "audience of odd type", changed(aud=[app.app_id, 7]), "token_claims"
    doubled = json.dumps(claims_of(app, now)).encode().replace(b'"sub"', b'"sub": "mallory", "sub"')
    yield "sub twice", signed(doubled), "token_malformed"
    nested = json.dumps(claims_of(app, now, x={"a": 1})).encode().replace(b'"a"', b'"a": 0, "a"')
    yield "a nested name twice", signed(nested), "token_malformed"
    yield "payload is a list", signed(b"[]"), "token_malformed"
    yield "payload is text", signed(b'"alice"'), "token_malformed"
    yield "payload is another token", signed(changed().encode()), "token_malformed"
    yield "payload is not UTF-8", signed(b'{"sub":"\xff"}'), "token_malformed"
    yield (
        "payload nests 2,000 deep",
        signed(b'{"sub":' + b"[" * 2000 + b"]" * 2000 + b"}"),
        "token_malformed token_claims",
    )


def _asymmetric(app: AppKeys, keys: AttackKeys, now: int) -> Iterator[tuple[str, str, str]]:
    good = claims_of(app, now)
    if keys.rs_private is not None:
        kid, pem = keys.rs_kid, public_pem(keys.rs_private)
        der = keys.rs_private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for name, secret in (("PEM", pem), ("PEM without newline", pem.strip()), ("DER", der)):
            yield (
                f"RSA public key ({name}) as HS256 secret",
                compact({"alg": "HS256", "kid": kid}, good, hs256(secret)),
                "token_algorithm",
            )
            yield (
                f"RSA public key ({name}) as HS256 secret under the HS256 kid",
                compact({"alg": "HS256", "kid": keys.hs_kid}, good, hs256(secret)),
                "token_signature",
            )
        yield (
            "PS256 with the RS256 key",
            compact({"alg": "PS256", "kid": kid}, good, ps256(keys.rs_private)),
            ("token_algorithm"),
        )
        yield (
            "PSS signature named RS256",
            compact({"alg": "RS256", "kid": kid}, good, ps256(keys.rs_private)),
            ("token_signature"),
        )
        yield (
            "RS256 signature of zeros",
            compact({"alg": "RS256", "kid": kid}, good, lambda _: b"\0" * 256),
            ("token_signature"),
        )
        stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        yield "another RSA key", compact({"alg": "RS256", "kid": kid}, good, rs256(stranger)), "token_signature"
    if keys.es_private is not None:
        es = keys.es_private
        header = {"alg": "ES256", "kid": keys.es_kid}
        # CVE-2022-21449: r = s = 0 verified against every key and message.
        yield "ES256 signature of zeros", compact(header, good, lambda _: b"\0" * 64), "token_signature"
        yield (
            "ES256 signature in DER",
            compact(header, good, lambda m: es.sign(m, ec.ECDSA(hashes.SHA256()))),
            ("token_signature"),
        )
        order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
        yield (
            "ES256 signature r = s = n",
            compact(header, good, lambda _: order.to_bytes(32, "big") * 2),
            ("token_signature"),
        )
        yield (
            "ES256 public key as HS256 secret",
            compact({"alg": "HS256", "kid": keys.es_kid}, good, hs256(public_pem(es))),
            "token_algorithm",
        )
        yield "ES384 named", compact({"alg": "ES384", "kid": keys.es_kid}, good, es256(es)), "token_algorithm"
    if keys.ed_private is not None:
        ed_header = {"alg": "EdDSA", "kid": keys.ed_kid}
        yield "EdDSA signature of zeros", compact(ed_header, good, lambda _: b"\0" * 64), "token_signature"
        yield "EdDSA empty signature", compact(ed_header, good, lambda _: b""), "token_signature"
        stranger_ed = ed25519.Ed25519PrivateKey.generate()
        yield "another Ed25519 key", compact(ed_header, good, stranger_ed.sign), "token_signature"
