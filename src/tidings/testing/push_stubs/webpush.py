"""A browser's push service and its browsers: hands out subscriptions, checks VAPID, and decrypts what it gets."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from .base import Answer, PushStub

BODY_BYTES_MAX = 4096
DAY = 86_400


@dataclass(frozen=True)
class Browser:
    """The private half of a subscription. `application_key`: whose pushes alone are taken; None: anybody's."""

    key: ec.EllipticCurvePrivateKey
    auth: bytes
    application_key: str | None


class WebPushStub(PushStub):
    """What arrives is recorded decrypted, with the browser's name as its token."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.browsers: dict[str, Browser] = {}
        # The VAPID tokens that were seen, in order.
        self.issued: list[str] = []

    def subscribe(self, application_key: str | None = None, *, name: str = "") -> str:
        """A new subscription, as JSON: what a browser's `subscribe()` gives."""
        name = name or _encoded(os.urandom(12))
        browser = Browser(ec.generate_private_key(ec.SECP256R1()), os.urandom(16), application_key)
        self.browsers[name] = browser
        keys = {"p256dh": _encoded(_point(browser.key.public_key())), "auth": _encoded(browser.auth)}
        return json.dumps({"endpoint": f"{self.url}/push/{name}", "expirationTime": None, "keys": keys})

    def unsubscribe(self, subscription: str) -> None:
        """The user took the permission away: 410 from now on."""
        del self.browsers[json.loads(subscription)["endpoint"].rpartition("/")[2]]

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """`POST /push/{browser}`, RFC 8030."""
        found = re.fullmatch(r"/push/([A-Za-z0-9_\-]+)", path)
        if found is None or method != "POST":
            return self.fault("path", Answer(404))
        browser = self.browsers.get(found[1])
        if browser is None:
            return Answer(410)
        refusal = self._vapid_refusal(headers.get("authorization", ""), browser)
        if refusal is not None:
            return refusal
        if not headers.get("ttl", "").isdigit():
            return self.fault("TTL", Answer(400))
        if headers.get("urgency", "normal") not in ("very-low", "low", "normal", "high"):
            return self.fault("Urgency", Answer(400))
        if not re.fullmatch(r"[A-Za-z0-9_\-]{1,32}", headers.get("topic", "t")):
            return self.fault("Topic", Answer(400))
        if len(body) > BODY_BYTES_MAX:
            return self.fault("size", Answer(413))
        try:
            assert headers.get("content-encoding") == "aes128gcm"
            payload = json.loads(decrypt(body, browser.key, browser.auth))
        except (ValueError, AssertionError, InvalidTag, IndexError) as error:
            return self.fault(f"does not decrypt: {error!r}", Answer(400))
        good = Answer(201, headers={"location": f"{self.url}/message/{len(self.received)}"})
        return await self.accept(found[1], payload, headers, good)

    def _vapid_refusal(self, authorization: str, browser: Browser) -> Answer | None:
        found = re.fullmatch(r"vapid t=([^,\s]+), ?k=([A-Za-z0-9_\-]+)", authorization)
        if found is None:
            return self.fault("no VAPID", Answer(401))
        token, key = found.groups()
        if not self.issued or self.issued[-1] != token:
            self.issued.append(token)
        try:
            public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), _decoded(key))
            options = {"verify_exp": False, "require": ["aud", "exp", "sub"]}
            claims = jwt.decode(token, public, algorithms=["ES256"], audience=self.url, options=options)  # type: ignore[arg-type]
            assert 0 < claims["exp"] - self.now() <= DAY
            assert claims["sub"].startswith(("mailto:", "https:"))
        except (jwt.InvalidTokenError, AssertionError, ValueError) as error:
            return self.fault(f"VAPID: {error!r}", Answer(401))
        if browser.application_key is not None and key != browser.application_key:
            return Answer(403, {"reason": "VapidPkHashMismatch"})
        return None


def decrypt(body: bytes, key: ec.EllipticCurvePrivateKey, auth: bytes) -> bytes:
    """The text of an aes128gcm body of one record (RFC 8188, RFC 8291). Raises ValueError or InvalidTag."""
    salt, size, length = body[:16], int.from_bytes(body[16:20]), body[20]
    sender, sealed = body[21 : 21 + length], body[21 + length :]
    if len(sealed) > size or length != 65:
        raise ValueError("more than one record, or not a key")
    shared = key.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sender))
    info = b"WebPush: info\0" + _point(key.public_key()) + sender
    ikm = HKDF(hashes.SHA256(), 32, auth, info).derive(shared)
    content_key = HKDF(hashes.SHA256(), 16, salt, b"Content-Encoding: aes128gcm\0").derive(ikm)
    nonce = HKDF(hashes.SHA256(), 12, salt, b"Content-Encoding: nonce\0").derive(ikm)
    text = AESGCM(content_key).decrypt(nonce, sealed, None).rstrip(b"\0")
    if not text.endswith(b"\x02"):
        raise ValueError("not the last record")
    return text[:-1]


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
