"""What every request passes: forms, bounds, problems, headers, origins, rates, long polls."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tidings.server.config import Config
from tidings.server.rest.examples import example_of
from tidings.server.rest.factory import all_operations
from tidings.server.services.sync import POLLS_PER_USER_MAX
from tidings.server.telemetry import Metrics, setup_logging

from .world import World, open_world


@pytest.fixture
async def served(world: World) -> World:
    await world.user("alice")
    return world


@pytest.fixture
async def channel(world: World) -> str:
    await world.user("alice")
    return await world.channel("alice")


@pytest.mark.parametrize(
    ("body", "field", "bound"),
    [
        ({"users": [{"id": "a"}, {"id": "b"}, {"id": "c", "name": 5}]}, "users[2].name", None),
        ({"users": [{"id": "a", "name": "x" * 257}]}, "users[0].name", 256),
        ({"users": []}, "users", 1),
        ({"users": [{"id": "a", "colour": "red"}]}, "users[0].colour", None),
        ({"users": [{}]}, "users[0].id", None),
        ({"users": [{"id": "a", "labels": {"Team": "x"}}]}, "users[0].labels", None),
        ({}, "users", None),
        ({"user": []}, "user", None),
    ],
)
async def test_what_is_wrong_is_named_by_its_place(world: World, body: Any, field: str, bound: int | None) -> None:
    problem = (await world.call("backend", "PUT", "/v1/users", body)).json()
    assert (problem["status"], problem["code"], problem["field"]) == (422, "invalid_field", field)
    assert problem.get("bound") == bound


# What is shown and cannot be asked for: the difference between a resource and the bodies that make or change it.
READ_ONLY = [
    (op.id, sorted({one.encode_name for one in msgspec.structs.fields(op.reply)} - writable))
    for op in all_operations(Config(), Metrics())
    if op.body is not None
    and isinstance(op.reply, type)
    and (writable := {one.encode_name for one in msgspec.structs.fields(op.body)}) is not None
]


@pytest.mark.parametrize(("op", "fields"), READ_ONLY, ids=[op for op, _ in READ_ONLY])
async def test_fields_that_only_the_server_writes_are_refused_by_name(
    served: World, op: str, fields: list[str]
) -> None:
    declared = next(one for one in served.rest.state.operations if one.id == op)
    path = declared.path.format(
        channel="c",
        message="m",
        user="alice",
        level="app",
        role="r",
        type="t",
        device="d",
        push_provider="p",
        webhook="w",
    )
    for field in fields:
        body = {**example_of(declared.body), field: "2026-01-01T00:00:00Z"}
        reply = await served.call("backend", declared.method, path, body, headers={"tidings-user": "alice"})
        assert (reply.status_code, reply.json()["code"], reply.json()["field"]) == (422, "invalid_field", field)


async def test_a_sender_cannot_be_written_into_a_message(world: World, channel: str) -> None:
    for field in ("user", "id", "seq", "created_at", "edited_by", "reactions"):
        reply = await world.call("alice", "POST", f"/v1/channels/{channel}/messages", {"text": "x", field: "bob"})
        assert (reply.status_code, reply.json()["field"]) == (422, field)


async def test_nobody_raises_their_own_role(world: World, channel: str) -> None:
    assert (await world.call("alice", "PATCH", "/v1/me", {"role": "admin"})).status_code == 403
    assert (await world.ok("alice", "GET", "/v1/me")).get("role", "user") == "user"


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid"),
        (b"", {}, 400, "invalid"),
        (b'{"name":"\xff"}', {}, 400, "invalid"),
        (b"[" * 5000 + b"]" * 5000, {}, 400, "invalid"),
        (b'{"custom":' + b'{"a":' * 70 + b"1" + b"}" * 70 + b"}", {}, 400, "invalid"),
        (b"[]", {}, 422, "invalid_field"),
        (b"id=a", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media"),
        (b"{}", {"content-encoding": "gzip"}, 415, "unsupported_media"),
        (b'{"name":"' + b"x" * 140_000 + b'"}', {}, 413, "too_large"),
    ],
)
async def test_bodies_that_are_no_request_are_refused(
    world: World, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    headers = {**world.as_("backend"), "content-type": "application/json", **headers}
    reply = await world.http.post("/v1/users", content=content, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (status, code)


async def test_brackets_in_texts_do_not_count_as_nesting(world: World, channel: str) -> None:
    await world.send("alice", channel, '[{"\\' * 200)


async def test_a_body_without_a_length_is_bounded_while_it_is_read(world: World) -> None:
    sent = 0

    async def flood() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 65_536
            yield b" " * 65_536

    reply = await world.http.post(
        "/v1/users", content=flood(), headers={**world.as_("backend"), "content-type": "application/json"}
    )
    assert reply.status_code == 413
    assert sent < 1 << 20


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limti=5", "limti"),
        ("limit=5&limit=6", "limit"),
        ("label=x", "label"),
    ],
)
async def test_a_wrong_filter_is_refused_by_name(world: World, query: str, field: str) -> None:
    reply = await world.call("backend", "GET", f"/v1/users?{query}")
    assert (reply.status_code, reply.json()["field"]) == (422, field)


async def test_lists_and_labels_in_a_query(world: World) -> None:
    for name, team in (("a", "x"), ("b", "x"), ("c", "y")):
        await world.ok("backend", "POST", "/v1/users", {"id": name, "labels": {"team": team}})
    found = await world.ok("backend", "GET", "/v1/users?ids=a,c&label.team=x")
    assert [user["id"] for user in found["items"]] == ["a"]
    first = await world.ok("backend", "GET", "/v1/users?limit=2")
    second = await world.ok("backend", "GET", f"/v1/users?limit=2&cursor={first['next']}")
    assert sorted(user["id"] for user in first["items"] + second["items"]) == ["a", "b", "c"]
    assert second["next"] is None


@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/v1/nothing", 404, "not_found"),
    ("GET", "/", 404, "not_found"),
    ("PUT", "/v1/channels", 405, "method_not_allowed"),
    ("GET", "/v1/users/a%20b", 404, "not_found"),
    ("GET", "/v1/users/a%0A", 404, "not_found"),
])  # fmt: skip
async def test_what_does_not_exist_is_a_problem_document(
    world: World, method: str, path: str, status: int, code: str
) -> None:
    reply = await world.call("backend", method, path)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-content-type-options"] == "nosniff"
    if status == 405:
        assert {"GET", "POST"} <= set(reply.headers["allow"].split(", "))


async def test_credentials_are_asked_for_by_name(world: World) -> None:
    for headers in ({}, {"authorization": "Basic YTpi"}, {"authorization": ""}):
        reply = await world.http.get("/v1/app", headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (401, "unauthenticated")
        assert reply.headers["www-authenticate"].startswith("Bearer")
    reply = await world.http.get("/v1/app", headers={"authorization": "Bearer " + "x" * 9000})
    assert reply.json()["code"] == "token_too_large"


async def test_our_mistakes_are_logged_with_their_id_and_say_nothing_else(
    world: World, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    setup_logging(format="json", stream=log)

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("canary-in-the-exception")

    monkeypatch.setattr(type(world.services.users), "get", broken)
    reply = await world.call("alice", "GET", "/v1/users/alice?")
    problem = reply.json()
    assert (reply.status_code, problem["code"]) == (500, "internal")
    assert reply.headers["x-request-id"] in problem["detail"]
    assert reply.headers["x-request-id"] in log.getvalue()
    assert "test_door.py" in log.getvalue()
    assert "canary" not in reply.text + log.getvalue()


async def test_access_logs_hold_no_query_no_token_no_content(world: World, channel: str) -> None:
    log = io.StringIO()
    setup_logging(level="debug", format="json", stream=log)
    # Loggers are bound when the door is made.
    world.rest.asgi_handler._log = world.rest.asgi_handler._log.bind()  # type: ignore[attr-defined]
    await world.call("alice", "POST", f"/v1/channels/{channel}/messages", {"text": "canary-text"})
    await world.call("alice", "GET", "/v1/users?label.team=canary-label")
    token = world.as_("alice")["authorization"].split()[1]
    assert "canary" not in log.getvalue()
    assert token not in log.getvalue()


async def test_replies_are_not_cached_and_carry_the_request_id(world: World) -> None:
    reply = await world.call("backend", "GET", "/v1/app", headers={"x-request-id": "mine-1"})
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-request-id"] == "mine-1"
    odd = await world.call("backend", "GET", "/v1/app", headers={"x-request-id": "<script>"})
    assert odd.headers["x-request-id"].startswith("r_")


async def test_any_origin_may_call_and_never_with_cookies(world: World) -> None:
    asked = {"origin": "https://x.example", "access-control-request-method": "PATCH"}
    preflight = await world.http.options("/v1/me", headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    reply = await world.call("backend", "GET", "/v1/app", headers={"origin": "https://x.example"})
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in {**preflight.headers, **reply.headers}


async def test_origins_can_be_narrowed(tmp_path: Path) -> None:
    async with open_world(tmp_path, cors_origins=("https://app.example",)) as world:
        for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
            reply = await world.call("backend", "GET", "/v1/app", headers={"origin": origin})
            assert reply.headers.get("access-control-allow-origin") == (origin if allowed else None)
            assert reply.headers["vary"] == "Origin"


async def test_a_credential_that_asks_too_often_waits_and_others_do_not(tmp_path: Path) -> None:
    async with open_world(tmp_path, rest_rate_per_second=2.0, rest_burst=10) as world:
        await world.user("alice")
        await world.user("bob")
        replies = [await world.call("alice", "GET", "/v1/me") for _ in range(11)]
        assert [reply.status_code for reply in replies] == [200] * 10 + [429]
        assert replies[0].headers["ratelimit-policy"] == '"requests";q=10;w=5'
        assert replies[0].headers["ratelimit"] == '"requests";r=9;t=1'
        assert replies[-1].headers["ratelimit"].startswith('"requests";r=0;')
        assert replies[-1].headers["retry-after"] == "1"
        assert replies[-1].json()["retry_after_ms"] == 500
        assert (await world.call("bob", "GET", "/v1/me")).status_code == 200
        world.clock.advance(0.5)
        assert (await world.call("alice", "GET", "/v1/me")).status_code == 200


async def test_a_long_poll_answers_when_something_happens(world: World, channel: str) -> None:
    head = (await world.ok("alice", "GET", f"/v1/channels/{channel}/events?limit=200"))["head"]
    path = f"/v1/channels/{channel}/events?after={head}&wait=25"
    waiting = asyncio.create_task(world.ok("alice", "GET", path))
    while not world.services.sync.polls:
        await asyncio.sleep(0)
    sent = await world.send("alice", channel, "news")
    found = await waiting
    assert [(event["seq"], event["data"]["text"]) for event in found["events"]] == [(sent["seq"], "news")]
    assert not world.services.sync.polls


async def test_a_long_poll_for_what_moved_does_not_take_its_own_answer_for_news(world: World, channel: str) -> None:
    await world.send("alice", channel)
    first = await world.ok("alice", "GET", "/v1/sync")
    again = await world.ok("alice", "GET", f"/v1/sync?since={first['mark']}")
    waiting = asyncio.create_task(world.ok("alice", "GET", f"/v1/sync?since={again['mark']}&wait=25"))
    while not world.services.sync.polls:
        await asyncio.sleep(0)
    sent = await world.send("alice", channel)
    assert {one["stream"]: one["head"] for one in (await waiting)["moved"]}[channel] == sent["seq"]


async def test_a_long_poll_ends_with_the_client_and_with_the_server(world: World, channel: str) -> None:
    head = (await world.ok("alice", "GET", f"/v1/channels/{channel}/events"))["head"]
    path = f"/v1/channels/{channel}/events?after={head}&wait=25"
    leaves = asyncio.Event()
    scope = {
        "type": "http", "method": "GET", "path": path.partition("?")[0], "raw_path": b"", "root_path": "",
        "query_string": path.partition("?")[2].encode(), "scheme": "http", "http_version": "1.1",
        "headers": [(name.encode(), value.encode()) for name, value in world.as_("alice").items()],
        "client": ("127.0.0.1", 1), "server": ("x", 80), "state": {},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None: ...

    gone = asyncio.create_task(world.rest(scope, receive, send))  # type: ignore[arg-type]
    stays = asyncio.create_task(world.ok("alice", "GET", path))
    while world.services.sync.polls < 2:
        await asyncio.sleep(0)
    leaves.set()
    await gone
    assert world.services.sync.polls == 1
    world.draining = True
    world.services.sync.wake_all()
    assert (await stays)["events"] == []
    assert (await world.ok("alice", "GET", path))["events"] == []


async def test_operators_hear_of_life_and_readiness(world: World) -> None:
    assert (await world.http.get("/healthz")).json() == {"status": "ok"}
    assert (await world.http.get("/readyz")).status_code == 200
    world.draining = True
    assert (await world.http.get("/readyz")).status_code == 503
    assert (await world.http.get("/healthz")).status_code == 200
    world.draining = False
    await world.services.store.close()
    assert (await world.http.get("/readyz")).json() == {"status": "store"}


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("10.1.2.3", {}, 200),
        ("::ffff:10.1.2.3", {}, 200),
        ("8.8.8.8", {}, 404),
        ("127.0.0.1", {"x-forwarded-for": "10.0.0.1"}, 404),
    ],
)
async def test_metrics_are_for_the_neighbourhood(
    world: World, client: str, headers: dict[str, str], status: int
) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(world.rest, client=(client, 1)), base_url="http://t"
    ) as http:
        reply = await http.get("/metrics", headers=headers)
    assert reply.status_code == status
    if status == 200:
        await world.call("backend", "GET", "/v1/users/nobody")
        text = (await world.http.get("/metrics")).text
        assert 'tidings_rest_requests_total{route="/v1/users/{user}",status="404"} 1.0' in text


class Slow:
    """A request whose body comes in pieces, when the test says so."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.reading = asyncio.Event()
        self.more = asyncio.Event()

    async def __aiter__(self) -> Any:
        first, *rest = self._pieces
        yield first
        self.reading.set()
        await self.more.wait()
        for piece in rest:
            yield piece


async def slow_send(world: World, who: str, channel: str, meanwhile: Any) -> httpx.Response:
    """Send a message whose body is held back while `meanwhile` happens."""
    body = Slow(b'{"text":"late",', b'"key":"late-1"}')
    headers = {**world.as_(who), "content-type": "application/json"}
    path = f"/v1/channels/{channel}/messages"
    transport = httpx.ASGITransport(world.rest)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
        sending = asyncio.create_task(http.post(path, content=body, headers=headers))
        await body.reading.wait()
        await meanwhile()
        body.more.set()
        return await sending


@pytest.mark.parametrize("how", ["deactivated", "revoked", "expired", "role"])
async def test_a_held_back_body_is_judged_by_what_holds_when_it_is_complete(
    world: World, channel: str, how: str
) -> None:
    async def meanwhile() -> None:
        match how:
            case "deactivated":
                await world.ok("backend", "POST", "/v1/users/alice/deactivate")
            case "revoked":
                world.clock.advance(2)
                await world.ok("backend", "POST", "/v1/users/alice/tokens/revoke", {})
            case "expired":
                world.clock.advance(3600 + 60)
            case _:
                await world.ok("backend", "PUT", "/v1/app/roles/channel/member", {"grants": ["channel.read"]})

    reply = await slow_send(world, "alice", channel, meanwhile)
    code = {"deactivated": "user_deactivated", "revoked": "token_revoked", "expired": "token_expired"}.get(
        how, "forbidden"
    )
    assert reply.json()["code"] == code
    history = await world.ok("backend", "GET", f"/v1/channels/{channel}/messages")
    assert history["messages"] == []


async def test_an_api_key_that_is_revoked_while_its_request_arrives_does_nothing(world: World, channel: str) -> None:
    made = await world.ok("backend", "POST", "/v1/app/keys", {"name": "spare", "scopes": ["*"]})
    world.credentials["spare"] = {"authorization": f"Bearer {made['secret']}"}

    async def meanwhile() -> None:
        await world.ok("backend", "DELETE", f"/v1/app/keys/{made['id']}")

    assert (await slow_send(world, "spare", channel, meanwhile)).json()["code"] == "key_invalid"


async def test_a_long_poll_tells_nothing_to_who_was_deactivated_while_it_waited(world: World, channel: str) -> None:
    head = (await world.ok("alice", "GET", f"/v1/channels/{channel}/events"))["head"]
    waiting = asyncio.create_task(world.call("alice", "GET", f"/v1/channels/{channel}/events?after={head}&wait=25"))
    while not world.services.sync.polls:
        await asyncio.sleep(0)
    await world.ok("backend", "POST", "/v1/users/alice/deactivate")
    await world.send("backend", channel, "secret")
    reply = await waiting
    assert (reply.status_code, reply.json()["code"]) == (403, "user_deactivated")


async def test_too_many_long_polls_of_one_user_are_told_to_wait(world: World, channel: str) -> None:
    await world.user("bob")
    for _ in range(30):
        await world.channel("alice", "bob")
    mark = (await world.ok("alice", "GET", "/v1/sync"))["mark"]
    mark = (await world.ok("alice", "GET", f"/v1/sync?since={mark}"))["mark"]
    path = f"/v1/sync?since={mark}&wait=25"
    polls = [asyncio.create_task(world.ok("alice", "GET", path)) for _ in range(POLLS_PER_USER_MAX)]
    while world.services.sync.polls < POLLS_PER_USER_MAX:
        await asyncio.sleep(0)
    refused = await world.call("alice", "GET", path)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "2"
    # Bob's do not suffer.
    theirs = asyncio.create_task(world.ok("bob", "GET", "/v1/me/events?after=30&wait=25"))
    while world.services.sync.polls == POLLS_PER_USER_MAX and not theirs.done():
        await asyncio.sleep(0)
    world.services.sync.wake_all()
    await asyncio.gather(*polls, theirs)
    assert (world.services.sync.polls, world.services.sync._waiters) == (0, {})


@pytest.mark.parametrize(
    "query", ["since=" + "f" * 30, "since=" + "f" * 16, "since=-1", "cursor=zzzzzzzzzzzzzzzz.1", "cursor=-1.1"]
)
async def test_marks_and_cursors_that_were_never_given_out_are_refused(served: World, query: str) -> None:
    reply = await served.call("alice", "GET", f"/v1/sync?{query}")
    assert (reply.status_code, reply.json()["code"]) == (422, "cursor_invalid")


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PATCH", "/v1/app", {"settings": {"last_sene": False}}, "settings.last_sene"),
        ("PUT", "/v1/app/channel-types/t", {"features": {"typng": False}}, "features.typng"),
        (
            "POST",
            "/v1/channels/{channel}/messages",
            {"attachments": [{"type": "file"}, {"type": "file", "uri": "https://x.example"}]},
            "attachments[1].uri",
        ),
    ],
)
async def test_misspelt_fields_inside_a_body_are_refused_by_name(
    world: World, channel: str, method: str, path: str, body: Any, field: str
) -> None:
    reply = await world.call("backend", method, path.format(channel=channel), body)
    assert (reply.status_code, reply.json().get("field")) == (422, field)
