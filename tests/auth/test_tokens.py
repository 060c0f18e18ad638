"""Who gets in with a token, and who does not."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.auth.attack_corpus import AttackKeys, b64, claims_of, compact, hs256, public_pem, vectors
from tests.auth.conftest import NOW, FrozenClock, private_pem
from tidings.server.domain.netguard import OutboundPolicy
from tidings.server.outbound import GuardedClient
from tidings.server.services import tokens as tokens_module
from tidings.server.services.jwks import JwksCache
from tidings.server.services.tokens import (
    AppKeys,
    JwksSource,
    KeyStatus,
    SigningKey,
    TokenRefused,
    TokenVerifier,
    Verified,
    mint,
    unverified_app,
)

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "tokens.md"
SECRET_TWO = bytes(range(2, 34))


def refused(verifier: TokenVerifier, app: AppKeys, token: str | bytes) -> TokenRefused:
    with pytest.raises(TokenRefused) as refusal:
        verifier.verify(app, token)
    return refusal.value


def hs_token(app: AppKeys, keys: AttackKeys, /, **changes: object) -> str:
    return compact({"alg": "HS256", "kid": keys.hs_kid}, claims_of(app, NOW, **changes), hs256(keys.hs_secret))


def test_every_attack_is_refused_with_its_code(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    corpus = vectors(app, keys, NOW)
    # A genuine token was seen before, so that nothing is refused merely because no cache was warm.
    verifier.verify(app, hs_token(app, keys))
    wrong = []
    for vector in corpus:
        try:
            outcome: object = verifier.verify(app, vector.token)
        except TokenRefused as refusal:
            if refusal.code not in vector.codes:
                wrong.append((vector.name, refusal.code))
            if len(vector.token) > 8 and vector.token in refusal.detail:
                wrong.append((vector.name, "the detail shows the token"))
        else:
            wrong.append((vector.name, str(outcome)))
    assert wrong == []
    assert len(corpus) >= 150
    assert len({vector.name for vector in corpus}) == len(corpus)


def test_attacks_are_attacks_because_of_one_thing(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    """The corpus' own builder makes tokens that pass: a vector fails for what it changes, not for how it is built."""
    assert verifier.verify(app, hs_token(app, keys)) == Verified("alice", NOW + 600_000, NOW, None, "hs-1")
    assert verifier.verify(app, hs_token(app, keys).encode()) == Verified("alice", NOW + 600_000, NOW, None, "hs-1")


@pytest.mark.parametrize("name", ["rs", "es", "ed"])
def test_a_token_of_each_asymmetric_key_is_accepted(
    name: str, verifier: TokenVerifier, app: AppKeys, keys: AttackKeys
) -> None:
    key = next(key for key in app.keys if key.kid == f"{name}-1")
    token = mint(app, key, "dr:gupta@clinic", 60, NOW, private_key=private_pem(getattr(keys, f"{name}_private")))
    assert verifier.verify(app, token) == Verified("dr:gupta@clinic", NOW + 60_000, NOW, None, f"{name}-1")


def test_ed25519_may_go_by_its_newer_name(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    assert keys.ed_private is not None
    token = compact({"alg": "Ed25519", "kid": "ed-1"}, claims_of(app, NOW), keys.ed_private.sign)
    assert isinstance(verifier.verify(app, token), Verified)


def test_a_key_may_be_given_as_jwk(verifier: TokenVerifier, keys: AttackKeys) -> None:
    for kid, algorithm, private in (("a", "RS256", keys.rs_private), ("b", "ES256", keys.es_private)):
        jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key())  # type: ignore[union-attr]
        app = AppKeys("app_jwk", (SigningKey(kid, algorithm, jwk),))
        token = mint(app, app.keys[0], "alice", 60, NOW, private_key=private_pem(private))  # type: ignore[arg-type]
        assert isinstance(verifier.verify(app, token), Verified)


@pytest.mark.parametrize(
    ("language", "command", "ending"),
    [
        ("python", [sys.executable, "-c"], "\nprint(token)"),
        ("js", ["node", "--input-type=module", "-e"], "\nconsole.log(token)"),
    ],
)
def test_the_five_lines_of_the_guide_make_a_token_that_is_accepted(
    language: str, command: list[str], ending: str
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    code = GUIDE.read_text().split(f"```{language}\n")[1].split("```")[0]
    secret = "correct-horse-battery-staple-0123"
    environment = {**os.environ, "TIDINGS_APP": "app_clinic", "TIDINGS_SECRET": secret, "TIDINGS_KID": "hs-1"}
    ran = subprocess.run([*command, code + ending], env=environment, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    app = AppKeys("app_clinic", (SigningKey("hs-1", "HS256", secret),))
    clock = FrozenClock(time.time_ns() // 1_000_000)
    verifier = TokenVerifier(clock, JwksCache(GuardedClient(OutboundPolicy())))
    outcome = verifier.verify(app, ran.stdout.strip())
    assert isinstance(outcome, Verified)
    assert (outcome.user_id, outcome.key_id) == ("alice", "hs-1")


def test_jti_and_extra_claims_survive(verifier: TokenVerifier, app: AppKeys) -> None:
    token = mint(app, app.keys[0], "alice", 60, NOW, jti="4f5c", claims={"role": "admin"})
    outcome = verifier.verify(app, token)
    assert isinstance(outcome, Verified)
    assert outcome.jti == "4f5c"
    with pytest.raises(ValueError, match="claims"):
        mint(app, app.keys[0], "alice", 60, NOW, claims={"sub": "mallory"})


def test_a_cached_token_still_expires(
    verifier: TokenVerifier, app: AppKeys, keys: AttackKeys, clock: FrozenClock
) -> None:
    token = hs_token(app, keys)
    verifier.verify(app, token)
    clock.at = NOW + 600_000 + app.leeway_seconds * 1000 - 1
    assert isinstance(verifier.verify(app, token), Verified)
    clock.at += 1
    assert refused(verifier, app, token).code == "token_expired"
    assert refused(verifier, app, token).code == "token_expired"


def test_a_cached_token_ends_with_its_key(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    token = hs_token(app, keys)
    verifier.verify(app, token)
    retired = AppKeys(app.app_id, (SigningKey("hs-1", "HS256", keys.hs_secret, KeyStatus.RETIRED),))
    assert refused(verifier, retired, token).code == "token_key_unknown"
    replaced = AppKeys(app.app_id, (SigningKey("hs-1", "HS256", SECRET_TWO),))
    assert refused(verifier, replaced, token).code == "token_signature"


def test_a_cached_token_is_of_no_use_in_another_app(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    token = hs_token(app, keys)
    verifier.verify(app, token)
    other = AppKeys("app_other", app.keys)
    assert refused(verifier, other, token).code == "token_claims"


def test_the_caches_stay_bounded(verifier: TokenVerifier, app: AppKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VERIFIED_CACHE_ENTRIES_MAX", "KEYRINGS_MAX", "HEADERS_MAX"):
        monkeypatch.setattr(tokens_module, name, 4)
    for number in range(20):
        other = AppKeys(f"app_{number}", (SigningKey(f"k{number}", "HS256", SECRET_TWO),))
        verifier.verify(other, mint(other, other.keys[0], "alice", 60, NOW))
    assert max(len(verifier._known), len(verifier._keyrings), len(verifier._headers)) <= 4


def test_headers_of_forged_tokens_are_not_kept(verifier: TokenVerifier, app: AppKeys) -> None:
    for number in range(5):
        refused(verifier, app, compact({"alg": "HS256", "kid": "hs-1", "x": number}, claims_of(app, NOW), hs256(b"x")))
    assert not verifier._headers
    assert not verifier._known


def test_without_kid_only_the_sole_key_of_the_algorithm_counts(verifier: TokenVerifier, keys: AttackKeys) -> None:
    one = SigningKey("a", "HS256", keys.hs_secret)
    two = SigningKey("b", "HS256", SECRET_TWO)
    token = compact({"alg": "HS256"}, claims_of(AppKeys("app_x"), NOW), hs256(keys.hs_secret))
    assert isinstance(verifier.verify(AppKeys("app_x", (one,)), token), Verified)
    assert refused(verifier, AppKeys("app_x", (one, two)), token).code == "token_key_unknown"
    idle = SigningKey("b", "HS256", SECRET_TWO, KeyStatus.RETIRED)
    assert isinstance(verifier.verify(AppKeys("app_x", (one, idle)), token), Verified)
    rs_only = AppKeys("app_x", (SigningKey("r", "RS256", public_pem(keys.rs_private)),))
    assert refused(verifier, rs_only, token).code == "token_algorithm"
    jwks_only = AppKeys("app_x", jwks=(JwksSource("https://idp.example/jwks"),))
    assert refused(verifier, jwks_only, token).code == "token_key_unknown"


@pytest.mark.parametrize(
    ("claim", "offset_seconds", "code"),
    [
        ("exp", -29, None),
        ("exp", -30, "token_expired"),
        ("nbf", 30, None),
        ("nbf", 31, "token_not_yet_valid"),
        ("iat", 30, None),
        ("iat", 31, "token_not_yet_valid"),
    ],
)
def test_leeway_is_kept_to_the_second(
    claim: str, offset_seconds: int, code: str | None, verifier: TokenVerifier, app: AppKeys, keys: AttackKeys
) -> None:
    assert app.leeway_seconds == 30
    token = hs_token(app, keys, **{claim: NOW // 1000 + offset_seconds})
    if code is None:
        assert isinstance(verifier.verify(app, token), Verified)
    else:
        assert refused(verifier, app, token).code == code


def test_fractions_of_seconds_are_kept(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    outcome = verifier.verify(app, hs_token(app, keys, exp=NOW / 1000 + 0.5))
    assert isinstance(outcome, Verified)
    assert outcome.expires_at == NOW + 500


def test_iat_may_be_missing(verifier: TokenVerifier, app: AppKeys, keys: AttackKeys) -> None:
    outcome = verifier.verify(app, hs_token(app, keys, iat=None))
    assert isinstance(outcome, Verified)
    assert outcome.issued_at is None


def test_the_longest_life_is_bounded(verifier: TokenVerifier, keys: AttackKeys) -> None:
    app = AppKeys("app_clinic", (SigningKey("hs-1", "HS256", keys.hs_secret),), max_ttl_seconds=600)
    assert isinstance(verifier.verify(app, hs_token(app, keys)), Verified)
    assert refused(verifier, app, hs_token(app, keys, exp=NOW // 1000 + 601)).code == "token_claims"
    assert refused(verifier, app, hs_token(app, keys, exp=NOW // 1000 + 601, iat=None)).code == "token_claims"
    early = hs_token(app, keys, iat=NOW // 1000 - 10, exp=NOW // 1000 + 595)
    assert refused(verifier, app, early).code == "token_claims"
    with pytest.raises(ValueError, match="ttl"):
        mint(app, app.keys[0], "alice", 601, NOW)


def test_audience_and_issuer_are_checked_when_configured(verifier: TokenVerifier, keys: AttackKeys) -> None:
    app = AppKeys("app_clinic", (SigningKey("hs-1", "HS256", keys.hs_secret),), audience="chat", issuer="https://idp")
    for aud in ("chat", ["web", "chat"]):
        assert isinstance(verifier.verify(app, hs_token(app, keys, aud=aud, iss="https://idp")), Verified)
    for changes in (
        {"iss": "https://idp"},
        {"aud": "web", "iss": "https://idp"},
        {"aud": ["web"], "iss": "https://idp"},
        {"aud": [], "iss": "https://idp"},
        {"aud": {"chat": 1}, "iss": "https://idp"},
        {"aud": ["chat"] * 65, "iss": "https://idp"},
        {"aud": "chat"},
        {"aud": "chat", "iss": "https://idp/"},
        {"aud": "chat", "iss": ["https://idp"]},
    ):
        assert refused(verifier, app, hs_token(app, keys, **changes)).code == "token_claims"
    assert isinstance(verifier.verify(app, mint(app, app.keys[0], "alice", 60, NOW)), Verified)


def test_unsuitable_keys_are_refused_when_configured(keys: AttackKeys) -> None:
    assert keys.rs_private is not None
    rs_pem = public_pem(keys.rs_private)
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    cases: list[tuple[str, bytes | str]] = [
        ("HS256", b"x" * 31),
        ("HS256", "x" * 31),
        ("HS256", b""),
        ("HS256", rs_pem),
        ("HS256", public_pem(keys.es_private)),
        ("HS256", json.dumps({"kty": "oct", "k": b64(keys.hs_secret)})),
        ("RS256", public_pem(small)),
        ("RS256", private_pem(keys.rs_private)),
        ("RS256", public_pem(keys.es_private)),
        ("RS256", "not a key"),
        ("RS256", "{"),
        ("RS256", json.dumps({"kty": "oct", "k": b64(keys.hs_secret)})),
        ("ES256", public_pem(ec.generate_private_key(ec.SECP384R1()))),
        ("ES256", private_pem(ec.generate_private_key(ec.SECP256R1()))),
        ("ES256", rs_pem),
        ("EdDSA", private_pem(ed25519.Ed25519PrivateKey.generate())),
        ("EdDSA", rs_pem),
        ("none", b"x" * 32),
        ("HS512", b"x" * 64),
    ]
    for algorithm, material in cases:
        with pytest.raises(ValueError, match=r".+") as refusal:
            SigningKey("k", algorithm, material)
        assert not material or str(material)[:40] not in str(refusal.value)
    for kid in ("", "k" * 129, "a b", "é"):
        with pytest.raises(ValueError, match="kid"):
            SigningKey(kid, "HS256", b"x" * 32)
    with pytest.raises(ValueError, match="same kid"):
        AppKeys("app_x", (SigningKey("k", "HS256", b"x" * 32), SigningKey("k", "HS256", b"y" * 32)))
    with pytest.raises(ValueError, match="leeway"):
        AppKeys("app_x", leeway_seconds=61)
    with pytest.raises(ValueError, match="algorithms"):
        JwksSource("https://idp.example/jwks", ("HS256",))


def test_a_key_does_not_show_its_secret() -> None:
    app = AppKeys("app_x", (SigningKey("k", "HS256", "correct-horse-battery-staple-0123"),))
    assert "horse" not in repr(app)
    assert "horse" not in str(app.keys[0])


def test_the_app_a_token_is_for_can_be_read_to_choose_the_keys(app: AppKeys, keys: AttackKeys) -> None:
    assert unverified_app(hs_token(app, keys)) == app.app_id
    assert unverified_app(hs_token(app, keys, app=None)) is None
    for token, code in (
        ("x" * 9000, "token_too_large"),
        ("a.b", "token_malformed"),
        (hs_token(app, keys, app=7), "token_claims"),
        (hs_token(app, keys, app="app_x\n"), "token_claims"),
    ):
        with pytest.raises(TokenRefused) as refusal:
            unverified_app(token)
        assert refusal.value.code == code


def test_the_app_of_a_token_is_remembered_only_if_the_token_names_it(
    verifier: TokenVerifier, app: AppKeys, keys: AttackKeys
) -> None:
    for token, named in ((hs_token(app, keys), app.app_id), (hs_token(app, keys, app=None), None)):
        before = verifier.app_of(token)
        verifier.verify(app, token)
        assert before == verifier.app_of(token) == named
