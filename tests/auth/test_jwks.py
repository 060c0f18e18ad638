"""Keys from an identity provider: found, shared, kept, and never fetched more often than agreed."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from tests.auth.attack_corpus import AttackKeys, claims_of, compact, es256, hs256, public_pem, rs256
from tests.auth.conftest import NOW, FrozenClock
from tests.auth.stub_http import StubServer, key_set, response, stub_server
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import GuardedClient
from tidings.server.services import jwks as jwks_module
from tidings.server.services.jwks import BODY_BYTES_MAX, JwksCache, read_key_set
from tidings.server.services.tokens import (
    AppKeys,
    JwksSource,
    KeyStatus,
    Pending,
    SigningKey,
    TokenRefused,
    TokenVerifier,
    Verified,
)


@dataclass
class Ticks:
    """Monotonic seconds that move when the test says so."""

    at: float = 1000.0

    def __call__(self) -> float:
        return self.at


@dataclass
class Provider:
    """A stub identity provider, an app that trusts it, and a verifier that may reach it."""

    stub: StubServer
    app: AppKeys
    cache: JwksCache
    verifier: TokenVerifier
    ticks: Ticks

    @property
    def source(self) -> JwksSource:
        return self.app.jwks[0]

    async def code(self, token: str) -> str | None:
        """With what the token is refused, or None."""
        try:
            await self.verifier.verify_async(self.app, token)
        except TokenRefused as refusal:
            return refusal.code
        return None


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with stub_server() as stub:
        client = GuardedClient(OutboundPolicy(networks=("127.0.0.1/32",)))
        ticks = Ticks()
        cache = JwksCache(client, monotonic=ticks)
        app = AppKeys("app_clinic", jwks=(JwksSource(stub.url, cache_seconds=600),))
        yield Provider(stub, app, cache, TokenVerifier(FrozenClock(), cache), ticks)
        await cache.aclose()
        await client.aclose()


def rsa_jwk(key: rsa.RSAPrivateKey | None, kid: str, **members: Any) -> dict[str, Any]:
    assert key is not None
    return {**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, **members}


def signed(keys: AttackKeys, kid: str, **changes: Any) -> str:
    assert keys.rs_private is not None
    return compact(
        {"alg": "RS256", "kid": kid}, claims_of(AppKeys("app_clinic"), NOW, **changes), rs256(keys.rs_private)
    )


async def test_an_unknown_key_is_fetched_once_and_then_known_without_waiting(
    provider: Provider, keys: AttackKeys
) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "2026-a"))
    token = signed(keys, "2026-a")
    assert provider.verifier.verify(provider.app, token) == Pending((provider.source,), "2026-a")
    outcome = await provider.verifier.verify_async(provider.app, token)
    assert outcome == Verified("alice", NOW + 600_000, NOW, None, "2026-a")
    another = signed(keys, "2026-a", sub="bob")
    assert isinstance(provider.verifier.verify(provider.app, another), Verified)
    assert len(provider.stub.requests) == 1


async def test_a_flood_of_unknown_kids_causes_one_fetch_per_interval(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "known"))
    provider.stub.gate.clear()
    flood = [asyncio.create_task(provider.code(signed(keys, f"random-{number}"))) for number in range(200)]
    async with asyncio.timeout(10):
        while not provider.stub.requests:
            await asyncio.sleep(0)
    provider.stub.gate.set()
    assert set(await asyncio.gather(*flood)) == {"token_key_unknown"}
    for number in range(200):  # and one after the other
        assert await provider.code(signed(keys, f"later-{number}")) == "token_key_unknown"
    assert len(provider.stub.requests) == 1
    assert await provider.code(signed(keys, "known")) is None  # the flood hurts nobody who is known
    provider.ticks.at += 29.9
    assert await provider.code(signed(keys, "x")) == "token_key_unknown"
    assert len(provider.stub.requests) == 1
    provider.ticks.at += 0.2
    assert await provider.code(signed(keys, "y")) == "token_key_unknown"
    assert len(provider.stub.requests) == 2


async def test_the_check_notices_a_cache_without_the_interval(
    provider: Provider, keys: AttackKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the check above: fetch whenever a kid is unknown."""
    monkeypatch.setattr(provider.cache, "_rested", lambda state: True)
    for number in range(3):
        assert await provider.code(signed(keys, f"random-{number}")) == "token_key_unknown"
    assert len(provider.stub.requests) > 1


async def test_a_new_key_is_found_after_rotation_and_the_old_one_ends(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "old"))
    old = signed(keys, "old")
    assert await provider.code(old) is None
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "new"))
    provider.ticks.at += 31
    assert await provider.code(signed(keys, "new")) is None
    # The old token was verified and cached; its key is gone, so is it.
    assert await provider.code(old) == "token_key_unknown"


async def test_a_set_past_its_age_is_served_and_renewed_in_passing(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "a"))
    token = signed(keys, "a")
    assert await provider.code(token) is None
    provider.ticks.at += 601
    provider.stub.answer = lambda: key_set()
    assert isinstance(provider.verifier.verify(provider.app, token), Verified)  # without waiting
    async with asyncio.timeout(10):
        while provider.cache.status(provider.source).keys:
            await asyncio.sleep(0)
    assert len(provider.stub.requests) == 2
    assert await provider.code(token) == "token_key_unknown"


async def test_another_key_under_the_same_kid_ends_the_tokens_of_the_first(
    provider: Provider, keys: AttackKeys
) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "a"))
    token = signed(keys, "a")
    assert await provider.code(token) is None
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    provider.stub.answer = lambda: key_set(rsa_jwk(stranger, "a"))
    provider.ticks.at += 31
    await provider.cache.refresh(provider.source)
    assert await provider.code(token) == "token_signature"


async def test_a_retired_kid_does_not_come_back_through_a_set(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "a"))
    retired = SigningKey("a", "RS256", public_pem(keys.rs_private), KeyStatus.RETIRED)
    provider.app = AppKeys("app_clinic", (retired,), provider.app.jwks)
    assert await provider.code(signed(keys, "a")) == "token_key_unknown"


async def test_a_failing_provider_leaves_the_keys_in_use_up_to_a_day(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "a"))
    token = signed(keys, "a")
    assert await provider.code(token) is None
    bodies = [
        response(b"oops", status="500 Internal Server Error"),
        response(b'{"keys": []}', status="203 Non-Authoritative Information"),
        response(b"not json"),
        response(b'{"keys": 7}'),
        response(b'{"keys": [], "keys": []}'),
        response(b"", status="302 Found", headers="location: http://127.0.0.1/elsewhere\r\n"),
        response(b"{" + b" " * BODY_BYTES_MAX + b"}"),
        response(b'{"keys": []}', headers="content-encoding: gzip\r\n"),
        key_set(*[{}] * 65),
        b"garbage\r\n\r\n",
        b"",
    ]
    for body in bodies:
        provider.stub.answer = lambda body=body: body  # type: ignore[misc]
        provider.ticks.at += 1000
        await provider.cache.refresh(provider.source)
        assert provider.cache.status(provider.source).last_error
        assert await provider.code(token) is None
    assert len(provider.stub.requests) == 1 + len(bodies)
    provider.ticks.at += 86_400
    assert await provider.code(token) == "token_key_unknown"


async def test_a_failed_fetch_is_not_repeated_within_the_interval(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: response(b"", status="503 Service Unavailable")
    for number in range(5):
        assert await provider.code(signed(keys, f"k{number}")) == "token_key_unknown"
    assert len(provider.stub.requests) == 1


async def test_a_provider_that_drips_is_given_up(
    provider: Provider, keys: AttackKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks_module, "FETCH_TOTAL_SECONDS", 0.3)

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)  # why: the pace of the drip, nobody waits for it

    provider.stub.drip = drip
    async with asyncio.timeout(5):
        assert await provider.code(signed(keys, "a")) == "token_key_unknown"
    assert provider.cache.status(provider.source).last_error == "the answer took too long"


async def test_a_caller_that_leaves_does_not_end_the_fetch_for_others(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "a"))
    provider.stub.gate.clear()
    impatient = asyncio.create_task(provider.code(signed(keys, "a")))
    patient = asyncio.create_task(provider.code(signed(keys, "a", sub="bob")))
    async with asyncio.timeout(10):
        while not provider.stub.requests:
            await asyncio.sleep(0)
    impatient.cancel()
    provider.stub.gate.set()
    assert await patient is None
    assert len(provider.stub.requests) == 1


async def test_algorithm_and_prefix_of_the_source_decide(provider: Provider, keys: AttackKeys) -> None:
    assert keys.es_private is not None
    es_jwk = {**ECAlgorithm.to_jwk(keys.es_private.public_key(), as_dict=True), "kid": "idp:es"}
    provider.stub.answer = lambda: key_set(es_jwk, rsa_jwk(keys.rs_private, "idp:rs"))
    source = JwksSource(provider.stub.url, ("ES256",), kid_prefix="idp:")
    provider.app = AppKeys("app_clinic", jwks=(source,))
    assert await provider.code(signed(keys, "other")) == "token_key_unknown"
    assert await provider.code(signed(keys, "idp:rs")) == "token_key_unknown"
    elsewhere = compact({"alg": "ES256", "kid": "other"}, claims_of(provider.app, NOW), es256(keys.es_private))
    assert await provider.code(elsewhere) == "token_key_unknown"
    assert provider.stub.requests == []  # neither is this source's business
    token = compact({"alg": "ES256", "kid": "idp:es"}, claims_of(provider.app, NOW), es256(keys.es_private))
    assert await provider.code(token) is None
    assert await provider.code(signed(keys, "idp:rs")) == "token_key_unknown"


async def test_a_public_key_of_a_set_is_never_an_hmac_secret(provider: Provider, keys: AttackKeys) -> None:
    jwk = rsa_jwk(keys.rs_private, "a")
    provider.stub.answer = lambda: key_set(jwk, {"kty": "oct", "k": "AAAA", "kid": "s", "alg": "HS256"})
    assert await provider.code(signed(keys, "a")) is None
    for kid, secret in (("a", json.dumps(jwk).encode()), ("s", b"\0\0\0")):
        token = compact({"alg": "HS256", "kid": kid}, claims_of(provider.app, NOW), hs256(secret))
        assert await provider.code(token) == "token_key_unknown"


async def test_the_apps_own_key_wins_over_a_set_with_the_same_kid(provider: Provider, keys: AttackKeys) -> None:
    provider.stub.answer = lambda: key_set(rsa_jwk(keys.rs_private, "a"))
    provider.app = AppKeys("app_clinic", (SigningKey("a", "HS256", keys.hs_secret),), provider.app.jwks)
    assert await provider.code(signed(keys, "a")) == "token_algorithm"
    assert provider.stub.requests == []


async def test_a_set_at_an_internal_address_is_not_fetched(provider: Provider, keys: AttackKeys) -> None:
    client = GuardedClient(OutboundPolicy())
    cache = JwksCache(client)
    for url in (provider.stub.url, provider.stub.url.replace("http:", "https:")):
        source = JwksSource(url)
        await cache.refresh(source)
        assert "https" in (cache.status(source).last_error or "") or "public" in (cache.status(source).last_error or "")
    assert provider.stub.requests == []
    await client.aclose()


def test_unusable_keys_of_a_set_are_left_out(keys: AttackKeys) -> None:
    assert keys.ed_private is not None
    good = rsa_jwk(keys.rs_private, "good")
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    p384 = ec.generate_private_key(ec.SECP384R1())
    members: list[Any] = [
        good,
        {**OKPAlgorithm.to_jwk(keys.ed_private.public_key(), as_dict=True), "kid": "ed", "alg": "Ed25519"},
        rsa_jwk(keys.rs_private, "enc", use="enc"),
        rsa_jwk(keys.rs_private, "ops", key_ops=["encrypt"]),
        rsa_jwk(keys.rs_private, "pss", alg="PS256"),
        rsa_jwk(keys.rs_private, "hs", alg="HS256"),
        rsa_jwk(keys.rs_private, "private", d="AQAB"),
        rsa_jwk(weak, "weak"),
        rsa_jwk(keys.rs_private, "twice"),
        rsa_jwk(weak, "twice-weak"),
        rsa_jwk(keys.rs_private, "twice"),
        {**ECAlgorithm.to_jwk(p384.public_key(), as_dict=True), "kid": "p384"},
        {key: value for key, value in good.items() if key != "kid"},
        {**good, "kid": 7},
        {**good, "kid": "n7", "n": 7},
        {"kty": "OKP", "crv": "Ed448", "x": "AAAA", "kid": "ed448"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA", "kid": "short"},
        {"kty": "EC", "crv": "P-256", "x": "A" * 43, "y": "A" * 43, "kid": "off-curve"},
        "text",
    ]
    assert set(read_key_set(json.dumps({"keys": members}).encode())) == {("good", "RS256"), ("ed", "EdDSA")}
