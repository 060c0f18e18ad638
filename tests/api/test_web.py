"""What browsers load: the SDK's modules, and the demonstration where it is switched on and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tidings.server.config import load_config
from tidings.testing.process import ServerProcess


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        ServerProcess(tmp_path / "data", logs=tmp_path / "logs", environment={"TIDINGS_DEMO": "on"}) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as http,
    ):
        yield http


async def test_modules_are_served_as_they_are_and_nothing_else_is(demo: httpx.AsyncClient) -> None:
    found = await demo.get("/sdk/js/src/index.js")
    assert (found.status_code, found.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert found.headers["access-control-allow-origin"] == "*"
    assert "export" in found.text
    again = await demo.get("/sdk/js/src/index.js", headers={"if-none-match": found.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await demo.get("/sdk/components/src/auto.js")).status_code == 200
    for path in (
        "/sdk/js/package.json",
        "/sdk/js/test/server.js",
        "/sdk/js/src/../package.json",
        "/sdk/js/src/..%2f..%2f..%2fpyproject.toml",
        "/sdk//etc/passwd",
        "/demo/../rest/web.py",
        "/demo/demo.html",
        "/demo/nothing.js",
    ):
        refused = await demo.get(path)
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found"), path


async def test_the_demonstration_is_for_its_own_people_in_its_own_app(demo: httpx.AsyncClient) -> None:
    page = await demo.get("/demo")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    people = [one["id"] for one in (await demo.get("/demo/people")).json()["people"]]
    made = (await demo.post("/demo/session", json={"user": people[0]})).json()
    bearer = {"authorization": f"Bearer {made['token']}"}
    channels = (await demo.get("/v1/channels", headers=bearer)).json()["items"]
    assert {channel["id"] for channel in channels} >= {"demo-knee", "demo-bill"}
    assert "demo-ward" not in {channel["id"] for channel in channels}
    # Making it again, as after a restart, changes nothing.
    counts = {channel["id"]: channel["message_count"] for channel in channels}
    await demo.post("/demo/session", json={"user": people[1]})
    channels = (await demo.get("/v1/channels", headers=bearer)).json()["items"]
    assert {channel["id"]: channel["message_count"] for channel in channels} == counts
    for body in (b'{"user":"root"}', b"{}", b"[", b'{"user":"amira","role":"admin"}'):
        refused = await demo.post("/demo/session", content=body)
        assert (refused.status_code, refused.json()["field"]) == (422, "user"), refused.text
    assert (await demo.post("/demo/session", content=b"x" * 2_000)).status_code == 413


async def test_the_demonstration_can_wake_browsers_with_a_key_of_its_own(demo: httpx.AsyncClient) -> None:
    worker = await demo.get("/demo/worker.js")
    assert (worker.status_code, worker.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert worker.headers["service-worker-allowed"] == "/demo"
    assert "unsafe" not in worker.headers["content-security-policy"]
    unchanged = await demo.get("/demo/worker.js", headers={"if-none-match": worker.headers["etag"]})
    assert (unchanged.status_code, unchanged.headers["service-worker-allowed"]) == (304, "/demo")
    token = (await demo.post("/demo/session", json={"user": "amira"})).json()["token"]
    key = (await demo.get("/v1/push/webpush-key", headers={"authorization": f"Bearer {token}"})).json()
    assert (key["provider"], len(key["public_key"])) == ("web", 87)


async def test_the_key_of_the_demonstration_stays_over_restarts(tmp_path: Path) -> None:
    keys = []
    async with ServerProcess(tmp_path / "data", environment={"TIDINGS_DEMO": "on"}) as server:
        for _ in range(2):
            async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
                token = (await http.post("/demo/session", json={"user": "amira"})).json()["token"]
                bearer = {"authorization": f"Bearer {token}"}
                keys.append((await http.get("/v1/push/webpush-key", headers=bearer)).json()["public_key"])
            server.kill9()
            await server.wait_exit()
            await server.start()
    assert keys[0] == keys[1]


async def test_outside_of_development_there_is_no_demonstration(tmp_path: Path) -> None:
    assert [load_config(environ=env).demo_on for env in ({}, {"TIDINGS_DEMO": "on"})] == [False, True]
    assert load_config(environ={"TIDINGS_DEVELOPMENT": "true"}).demo_on
    assert not load_config(environ={"TIDINGS_DEVELOPMENT": "true", "TIDINGS_DEMO": "off"}).demo_on
    async with (
        ServerProcess(tmp_path / "data", logs=tmp_path / "logs") as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as http,
    ):
        for answer in (await http.get("/demo"), await http.post("/demo/session", json={"user": "amira"})):
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert (await http.get("/sdk/js/src/index.js")).status_code == 200
