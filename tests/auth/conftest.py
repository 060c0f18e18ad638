"""An app with a key of every kind, a clock that stands still, and a verifier."""

from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.auth.attack_corpus import AttackKeys, public_pem
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import GuardedClient
from tidings.server.services.jwks import JwksCache
from tidings.server.services.tokens import AppKeys, SigningKey, TokenVerifier

NOW = 1_790_000_000_000


@dataclass
class FrozenClock:
    at: int = NOW

    def now_ms(self) -> int:
        return self.at

    def monotonic(self) -> float:
        return self.at / 1000


def private_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture(scope="session")
def keys() -> AttackKeys:
    return AttackKeys(
        hs_kid="hs-1",
        hs_secret=bytes(range(1, 33)),
        rs_kid="rs-1",
        rs_private=rsa.generate_private_key(public_exponent=65537, key_size=2048),
        es_kid="es-1",
        es_private=ec.generate_private_key(ec.SECP256R1()),
        ed_kid="ed-1",
        ed_private=ed25519.Ed25519PrivateKey.generate(),
    )


@pytest.fixture(scope="session")
def app(keys: AttackKeys) -> AppKeys:
    return AppKeys(
        "app_clinic",
        (
            SigningKey("hs-1", "HS256", keys.hs_secret),
            SigningKey("rs-1", "RS256", public_pem(keys.rs_private)),
            SigningKey("es-1", "ES256", public_pem(keys.es_private)),
            SigningKey("ed-1", "EdDSA", public_pem(keys.ed_private)),
        ),
    )


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def verifier(clock: FrozenClock) -> TokenVerifier:
    return TokenVerifier(clock, JwksCache(GuardedClient(OutboundPolicy())))
