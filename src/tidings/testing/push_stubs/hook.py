"""An endpoint of the app's own, which checks signatures as Standard Webhooks says."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from typing import Any

from .base import Answer, PushStub

TOLERANCE_SECONDS = 300


class HookStub(PushStub):
    """`secret` is the endpoint's; more than one signature may come with a push, and one must fit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.secret = "whsec_" + base64.b64encode(os.urandom(32)).decode()

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """`POST /push`."""
        if (method, path) != ("POST", "/push"):
            return self.fault("path", Answer(404))
        key = base64.b64decode(self.secret.removeprefix("whsec_"))
        name, at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "0")
        signed = hmac.new(key, f"{name}.{at}.".encode() + body, hashlib.sha256).digest()
        if "v1," + base64.b64encode(signed).decode() not in headers.get("webhook-signature", "").split(" "):
            return self.fault("signature", Answer(401))
        if not name or abs(self.now() - int(at)) > TOLERANCE_SECONDS:
            return self.fault("time", Answer(401))
        payload = json.loads(body)
        return await self.accept(payload["data"]["token"], payload, headers, Answer(202, {"id": f"mail-{name}"}))
