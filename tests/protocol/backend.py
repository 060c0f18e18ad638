"""The app's backend in the tests of the protocol: makes users and tokens, speaks for others."""

import re
from typing import Any

import httpx

from tidings.testing.process import ServerProcess

# Longest that one request takes on a busy machine, seconds.
PATIENCE = 30


class Backend:
    """The app's backend over REST."""

    def __init__(self, server: ServerProcess) -> None:
        found = re.search(r"tk_\w+_[\w-]+", server.tail())
        assert found, server.tail()
        self._http = httpx.AsyncClient(
            base_url=server.url, headers={"authorization": f"Bearer {found[0]}"}, trust_env=False, timeout=PATIENCE
        )

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        reply = await self._http.post(path, json=body, headers=headers)
        assert reply.is_success, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    async def token(self, user: str) -> str:
        return str((await self.post(f"/v1/users/{user}/tokens", {}))["token"])

    async def say(self, channel: str, user: str, text: str) -> None:
        body = {"key": text.replace(" ", "-"), "text": text}
        await self.post(f"/v1/channels/{channel}/messages", body, **{"Tidings-User": user})

    async def messages(self, channel: str) -> list[dict[str, Any]]:
        reply = await self._http.get(f"/v1/channels/{channel}/messages", params={"limit": 200})
        found: list[dict[str, Any]] = reply.json()["messages"]
        return found

    async def close(self) -> None:
        await self._http.aclose()
