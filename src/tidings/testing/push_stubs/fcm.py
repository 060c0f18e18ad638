"""Google's token endpoint and FCM's `messages:send` (HTTP v1), and a service account for them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from .base import Answer, PushStub

PROJECT = "clinic-1"
EMAIL = "push@clinic-1.iam.gserviceaccount.com"
SCOPE = "https://www.googleapis.com/auth/firebase.messaging"
GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
# Reserved words of a message's data.
RESERVED = ("google", "gcm")


@cache
def account_key() -> rsa.RSAPrivateKey:
    """One key for all stubs of a process: it takes a tenth of a second to make."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def fcm_error(status: int, word: str, code: str = "", *, message: str = "", field: str = "", **headers: str) -> Answer:
    """An error as FCM forms it: `word` is google.rpc's, `code` FCM's own, `field` what a BadRequest names."""
    details: list[dict[str, Any]] = []
    if code:
        details.append({"@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError", "errorCode": code})
    if field:
        violations = [{"field": field, "description": "Invalid value"}]
        details.append({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": violations})
    error = {"code": status, "message": message or word, "status": word, "details": details}
    return Answer(status, {"error": error}, headers)


class FcmStub(PushStub):
    """`exchanges`: how often a token was asked for. `token_answer`: what the token endpoint says instead of a token."""

    exchanges = 0
    seconds = 3600
    token_answer: Answer | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._valid: set[str] = set()

    def service_account(self) -> dict[str, Any]:
        """The file that Google's console makes, with this stub's token endpoint."""
        pem = account_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return {
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": "k1",
            "private_key": pem,
            "client_email": EMAIL,
            "client_id": "1",
            "token_uri": f"{self.url}/token",
        }

    def revoke(self) -> None:
        """No access token that was given so far is good any more."""
        self._valid.clear()

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """The two endpoints."""
        if path == "/token":
            return await self._exchange(headers, body)
        if path != f"/v1/projects/{PROJECT}/messages:send":
            return self.fault("path", fcm_error(404, "NOT_FOUND"))
        # As Google's: a new token leaves those that others hold as they are.
        if headers.get("authorization", "").removeprefix("Bearer ") not in self._valid:
            return fcm_error(401, "UNAUTHENTICATED")
        message = json.loads(body)["message"]
        data = message.get("data", {})
        if not all(isinstance(value, str) and not key.startswith(RESERVED) for key, value in data.items()):
            return self.fault("data", fcm_error(400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", field="message.data"))
        if len(json.dumps([message.get("notification"), data], ensure_ascii=False).encode()) > 4096:
            return self.fault("size", fcm_error(400, "INVALID_ARGUMENT", "INVALID_ARGUMENT", message="Message too big"))
        good = Answer(200, {"name": f"projects/{PROJECT}/messages/{len(self.received)}"})
        return await self.accept(message["token"], message, headers, good)

    async def _exchange(self, headers: dict[str, str], body: bytes) -> Answer:
        self.exchanges += 1
        if self.token_answer is not None:
            if self.token_answer.hold:
                await self.gate.wait()
            else:
                return self.token_answer
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        try:
            assert form["grant_type"] == GRANT
            assert headers["content-type"] == "application/x-www-form-urlencoded"
            claims = jwt.decode(
                form["assertion"],
                account_key().public_key(),
                algorithms=["RS256"],
                audience=f"{self.url}/token",
                issuer=EMAIL,
                options={"verify_exp": False, "verify_iat": False},
            )
            assert claims["scope"] == SCOPE
            assert abs(claims["iat"] - self.now()) < 300
            assert claims["iat"] < claims["exp"] <= claims["iat"] + 3600
        except (jwt.InvalidTokenError, AssertionError, KeyError) as error:
            return self.fault(repr(error), Answer(400, {"error": "invalid_grant", "error_description": "Invalid JWT"}))
        token = f"ya29.{self.exchanges}"
        self._valid.add(token)
        return Answer(200, {"access_token": token, "expires_in": self.seconds, "token_type": "Bearer"})
