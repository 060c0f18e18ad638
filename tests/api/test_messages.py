"""Messages over REST: stored once, read back, edited, taken back."""

from __future__ import annotations

import asyncio

import pytest

from .world import World


@pytest.fixture
async def channel(world: World) -> str:
    for name in ("alice", "bob"):
        await world.user(name)
    return await world.channel("alice", "bob")


async def test_a_message_is_stored_with_its_place_and_read_back(world: World, channel: str) -> None:
    sent = await world.call("alice", "POST", f"/v1/channels/{channel}/messages", {"text": "hello", "key": "k1"})
    assert sent.status_code == 201
    body = sent.json()
    assert body.items() >= {"channel": channel, "key": "k1", "duplicate": False}.items()
    read = await world.ok("bob", "GET", f"/v1/channels/{channel}/messages/{body['id']}")
    assert (read["text"], read["user"], read["seq"], read["key"]) == ("hello", "alice", body["seq"], "k1")


async def test_a_repeated_send_gets_the_first_result_and_says_so(world: World, channel: str) -> None:
    path, headers = f"/v1/channels/{channel}/messages", {"idempotency-key": '"abc"'}
    first = await world.call("alice", "POST", path, {"text": "hello"}, headers)
    again = await world.call("alice", "POST", path, {"text": "hello", "key": "abc"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json() | {"duplicate": True}
    assert len((await world.ok("bob", "GET", path))["messages"]) == 1


async def test_the_same_key_with_another_body_is_refused(world: World, channel: str) -> None:
    path = f"/v1/channels/{channel}/messages"
    await world.ok("alice", "POST", path, {"text": "hello", "key": "k"})
    refused = await world.call("alice", "POST", path, {"text": "goodbye", "key": "k"})
    assert (refused.status_code, refused.json()["code"]) == (422, "key_reused")


async def test_of_copies_sent_at_once_one_is_stored_and_others_are_told_to_wait(world: World, channel: str) -> None:
    path, body = f"/v1/channels/{channel}/messages", {"text": "hello", "key": "k"}
    replies = await asyncio.gather(*(world.call("alice", "POST", path, body) for _ in range(20)))
    assert sorted({reply.status_code for reply in replies}) in ([201, 409], [200, 201, 409])
    assert {reply.json().get("code") for reply in replies if reply.status_code == 409} == {"in_flight"}
    assert len((await world.ok("bob", "GET", path))["messages"]) == 1
    assert (await world.call("alice", "POST", path, body)).status_code == 200


async def test_a_send_without_a_key_gets_one_from_the_server(world: World, channel: str) -> None:
    path = f"/v1/channels/{channel}/messages"
    keys = {(await world.ok("alice", "POST", path, {"text": "hello"}))["key"] for _ in range(2)}
    assert len(keys) == 2


async def test_header_and_body_must_name_the_same_key(world: World, channel: str) -> None:
    refused = await world.call(
        "alice", "POST", f"/v1/channels/{channel}/messages", {"text": "x", "key": "a"}, {"idempotency-key": "b"}
    )
    assert (refused.status_code, refused.json()["field"]) == (422, "key")


async def test_an_edit_changes_what_it_names_and_keeps_the_original(world: World, channel: str) -> None:
    sent = await world.send("alice", channel, "helo", custom={"a": 1})
    path = f"/v1/channels/{channel}/messages/{sent['id']}"
    edited = await world.ok("alice", "PATCH", path, {"text": "hello"})
    assert (edited["text"], edited["custom"], edited["edits"]) == ("hello", {"a": 1}, 1)
    versions = (await world.ok("alice", "GET", path + "/versions"))["items"]
    assert [version["text"] for version in versions] == ["helo", "hello"]


async def test_a_deleted_message_leaves_its_place(world: World, channel: str) -> None:
    sent = await world.send("alice", channel, "secret")
    path = f"/v1/channels/{channel}/messages/{sent['id']}"
    first, again = await world.ok("alice", "DELETE", path), await world.ok("alice", "DELETE", path)
    assert first["seq"] > sent["seq"]
    assert again == {"seq": None}
    read = await world.ok("bob", "GET", path)
    assert read["seq"] == sent["seq"]
    assert "text" not in read


async def test_a_reaction_is_counted_once_per_user(world: World, channel: str) -> None:
    sent = await world.send("alice", channel)
    path = f"/v1/channels/{channel}/messages/{sent['id']}"
    assert (await world.ok("bob", "POST", path + "/reactions", {"emoji": "👍"}))["seq"]
    assert (await world.ok("bob", "POST", path + "/reactions", {"emoji": "👍"}))["seq"] is None
    assert (await world.ok("alice", "GET", path))["reactions"] == [{"emoji": "👍", "count": 1, "users": ["bob"]}]
    assert (await world.ok("bob", "DELETE", path + "/reactions/%F0%9F%91%8D"))["seq"]
    assert "reactions" not in await world.ok("alice", "GET", path)


async def test_history_goes_both_ways_and_around(world: World, channel: str) -> None:
    seqs = [(await world.send("alice", channel, str(number)))["seq"] for number in range(6)]
    path = f"/v1/channels/{channel}/messages"

    async def page(**query: int) -> tuple[list[int], bool, bool]:
        found = await world.ok("bob", "GET", path, params=query)
        return [one["seq"] for one in found["messages"]], found["has_before"], found["has_after"]

    assert await page(limit=2) == (seqs[4:], True, False)
    assert await page(limit=2, before=seqs[4]) == (seqs[2:4], True, True)
    assert (await page(limit=2, after=seqs[1]))[0] == seqs[2:4]
    assert (await page(limit=4, around=seqs[3]))[0] == seqs[1:5]


async def test_only_those_who_may_send_system_messages(world: World, channel: str) -> None:
    path, body = f"/v1/channels/{channel}/messages", {"text": "The visit has begun", "kind": "system"}
    assert (await world.call("alice", "POST", path, body)).status_code == 403
    sent = await world.ok("backend", "POST", path, body)
    read = await world.ok("bob", "GET", f"{path}/{sent['id']}")
    assert read["kind"] == "system"
    assert "user" not in read


async def test_a_backend_sends_in_a_users_name(world: World, channel: str) -> None:
    sent = await world.ok(
        "backend", "POST", f"/v1/channels/{channel}/messages", {"text": "x"}, headers={"tidings-user": "alice"}
    )
    assert (await world.ok("bob", "GET", f"/v1/channels/{channel}/messages/{sent['id']}"))["user"] == "alice"


async def test_the_way_past_the_router_answers_as_the_long_way(world: World) -> None:
    await world.user("alice")
    channel = await world.channel("alice")
    own = f"/v1/channels/{channel}/messages"
    await world.ok("alice", "POST", own, {"text": "x", "key": "same"})
    shortcut = world.rest.asgi_handler._app  # type: ignore[attr-defined]
    tail = shortcut._tail
    for who, path, body, headers in (
        ("alice", own, {"text": "x", "key": "same"}, {}),
        ("alice", own, {"text": "y", "key": "same"}, {}),
        ("alice", "/v1/channels/nowhere/messages", {"text": "x"}, {}),
        ("alice", "/v1/channels/a%20b/messages", {"text": "x"}, {}),
        ("alice", "/v1/channels/a%2Fb/messages", {"text": "x"}, {}),
        ("alice", "/v1/channels//messages", {"text": "x"}, {}),
        ("alice", own + "?limit=3", {"text": "x"}, {}),
        ("alice", own, {"txt": "x"}, {"origin": "https://x.example"}),
        (None, own, {"text": "x"}, {}),
        ("bad_token", own, {"text": "x"}, {}),
    ):
        answers = []
        for way in (tail, "/never"):
            shortcut._tail = way
            reply = await world.call(who, "POST", path, body, headers={**headers, "x-request-id": "same"})
            told = sorted(item for item in reply.headers.multi_items() if item[0] != "ratelimit")
            answers.append((reply.status_code, told, reply.json()))
        shortcut._tail = tail
        assert answers[0] == answers[1]
    text = (await world.http.get("/metrics")).text
    # Both ways are counted under the one address.
    assert 'route="/v1/channels/{channel}/messages",status="200"} 2.0' in text


async def test_a_reaction_with_a_slash_in_its_name_can_be_taken_back(world: World) -> None:
    await world.user("alice")
    channel = await world.channel("alice")
    path = f"/v1/channels/{channel}/messages/{(await world.send('alice', channel))['id']}"
    await world.ok("alice", "POST", f"{path}/reactions", {"emoji": ":n/a:"})
    await world.ok("alice", "DELETE", f"{path}/reactions", params={"emoji": ":n/a:"})
    assert "reactions" not in await world.ok("alice", "GET", path)
    assert (await world.call("alice", "DELETE", f"{path}/reactions")).json()["field"] == "emoji"
