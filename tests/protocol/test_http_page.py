"""The HTTP fall-back, step by step as its page tells it, against the real server."""

import json
from pathlib import Path
from typing import Any

import httpx

from tests.protocol.backend import PATIENCE, Backend
from tests.protocol.frames import check_server_frame
from tidings.testing.process import ServerProcess


async def test_a_session_over_plain_http_goes_as_the_page_says(tmp_path: Path) -> None:
    async with ServerProcess(tmp_path / "data") as server:
        backend = Backend(server)
        for user in ("alice", "bob"):
            await backend.post("/v1/users", {"id": user})
        channel = (await backend.post("/v1/channels", {"type": "group", "members": ["alice", "bob"]}))["id"]
        headers = {"authorization": f"Bearer {await backend.token('alice')}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False, timeout=PATIENCE) as http:
            opened = await http.post("/v1/realtime", json={"type": "connect", "ref": 1, "device": {"id": "phone-1"}})
            assert opened.status_code == 200
            session, frames = opened.json()["session"], opened.json()["frames"]
            assert [frame["type"] for frame in frames] == ["connected"]
            check_server_frame(frames[0])

            send = {"type": "message.send", "ref": 2, "channel": channel, "key": "k1", "text": "Good morning"}
            unreadable = await http.post(f"/v1/realtime/{session}/commands", json=[send, {"type": "message.sned"}])
            assert unreadable.status_code == 422
            sent = await http.post(f"/v1/realtime/{session}/commands", json=[send, {"type": "ping", "ref": 3}])
            assert sent.status_code == 202

            heard: list[dict[str, Any]] = []
            after = 0
            while len(heard) < 3:
                poll = await http.get(f"/v1/realtime/{session}/poll", params={"after": after, "wait": 25})
                assert [one["n"] for one in poll.json()["frames"]] == list(range(after + 1, poll.json()["next"] + 1))
                heard += [one["frame"] for one in poll.json()["frames"]]
                after = poll.json()["next"]
            for frame in heard:
                check_server_frame(frame)
            assert sorted(frame["type"] for frame in heard) == ["message.created", "message.sent", "pong"]

            await backend.say(channel, "bob", "over-events")
            numbers: list[int] = []
            async with http.stream(
                "GET", f"/v1/realtime/{session}/events", headers={"Last-Event-ID": str(after)}
            ) as events:
                async for line in events.aiter_lines():
                    if line.startswith("id: "):
                        numbers.append(int(line[4:]))
                    if line.startswith("data: ") and json.loads(line[6:])["type"] == "message.created":
                        break
            assert numbers[0] == after + 1
            document = (await http.get("/v1/asyncapi.json")).json()
            assert document["servers"]["this"]["host"] == server.url.removeprefix("http://")
            gone = await http.get("/v1/realtime/s_nobody/poll")
            assert gone.json()["code"] == "session_unknown"
        await backend.close()
