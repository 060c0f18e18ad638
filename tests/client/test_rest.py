"""The HTTP client: what is repeated, what is not, and the same without `await`."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import httpx
import msgspec
import pytest

from tidings.client import SyncClient, SyncRest, blocking
from tidings.client import rest as rest_module
from tidings.client.errors import NotConnected, OutcomeUnknown, Refused
from tidings.client.rest import Rest

from .fake import FakeServer, now

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]] | Exception


class Script:
    """Answers requests from a list, and remembers them."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, body, *headers = answer
        return httpx.Response(status, content=msgspec.json.encode(body), headers=headers[0] if headers else None)


def scripted(script: Script, **options: Any) -> tuple[Rest, list[float]]:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    rest = Rest("http://server", api_key="tk_a_b", sleep=sleep, **options)
    rest._http = httpx.AsyncClient(
        base_url="http://server", headers=rest._http.headers, transport=httpx.MockTransport(script)
    )
    return rest, pauses


MESSAGE = {"id": "m1", "channel": "c1", "seq": 1, "created_at": now(), "text": "hi"}
DOWN = (503, {"code": "unavailable", "detail": "", "retry": "later"})


async def test_a_send_is_repeated_with_the_same_key() -> None:
    sent = {"id": "m1", "channel": "c1", "seq": 1, "at": now(), "key": "k", "duplicate": True}
    script = Script(httpx.ReadError("cut"), DOWN, httpx.ConnectError("away"), (200, sent))
    rest, pauses = scripted(script)
    assert (await rest.messages.send("c1", "hi")).seq == 1
    keys = {msgspec.json.decode(request.content)["key"] for request in script.requests}
    assert len(script.requests) == 4
    assert len(keys) == 1
    assert len(pauses) == 3


async def test_what_could_be_done_twice_is_not_repeated() -> None:
    script = Script(httpx.ReadError("cut"))
    rest, _ = scripted(script)
    with pytest.raises(OutcomeUnknown):
        await rest.channels.create(name="ward")
    assert len(script.requests) == 1


async def test_what_never_left_is_repeated_always() -> None:
    script = Script(*[httpx.ConnectError("away")] * 5)
    rest, pauses = scripted(script)
    with pytest.raises(NotConnected):
        await rest.channels.create(name="ward")
    assert len(pauses) == 4


async def test_the_servers_pause_is_kept() -> None:
    limited = (429, {"code": "rate_limited", "detail": "", "retry": "later"}, {"Retry-After": "3"})
    user = {"id": "a", "created_at": now(), "updated_at": now()}
    rest, pauses = scripted(Script(limited, (201, user)))
    assert (await rest.users.create("a")).id == "a"
    assert 3 <= pauses[0] <= 3.5


async def test_refusals_carry_the_catalogue() -> None:
    problem = {"code": "invalid_field", "detail": "too long", "retry": "never", "field": "text", "bound": 20000}
    rest, _ = scripted(Script((422, problem)))
    with pytest.raises(Refused) as refused:
        await rest.messages.send("c1", "hi")
    assert (refused.value.code, refused.value.field, refused.value.bound) == ("invalid_field", "text", 20000)
    assert refused.value.status == 422


async def test_a_proxys_answer_is_a_refusal_too() -> None:
    rest, _ = scripted(Script(*[(502, "Bad Gateway")] * 5))
    with pytest.raises(Refused) as refused:
        await rest.users.get("a")
    assert (refused.value.code, refused.value.status) == ("unavailable", 502)


async def test_listings_follow_their_cursor_and_acting_for_a_user_is_said() -> None:
    member = {"user": "a", "joined_at": now()}
    script = Script((200, {"items": [member, member], "next": "x"}), (200, {"items": [member], "next": None}))
    rest, _ = scripted(script)
    assert len([one async for one in rest.as_user("alice").members.all("c/1")]) == 3
    assert script.requests[1].url.params["cursor"] == "x"
    assert script.requests[0].url.raw_path.startswith(b"/v1/channels/c%2F1/members")
    assert script.requests[0].headers["Tidings-User"] == "alice"
    assert script.requests[0].headers["Authorization"] == "Bearer tk_a_b"


NOUNS = ("app", "users", "me", "channels", "members", "messages", "receipts", "streams")


@pytest.mark.parametrize("noun", NOUNS)
def test_every_method_exists_without_await(noun: str) -> None:
    asynchronous = type(getattr(Rest("http://server", token="t"), noun))
    synchronous = getattr(blocking, "Sync" + asynchronous.__name__.removesuffix("Rest"))
    public = {name for name, _ in inspect.getmembers(asynchronous, callable) if not name.startswith("_")}
    assert public == {name for name, _ in inspect.getmembers(synchronous, callable) if not name.startswith("_")}
    assert rest_module._Noun in asynchronous.__mro__
    for name in public:
        method = getattr(asynchronous, name)
        answer = inspect.signature(method).return_annotation
        iterates = inspect.isasyncgenfunction(method) or str(answer).startswith("AsyncIterator")
        assert inspect.isgeneratorfunction(getattr(synchronous, name)) == iterates, name


def test_the_synchronous_rest_client_answers_and_refuses() -> None:
    with SyncRest("http://server", token="t") as rest:
        script = Script((200, MESSAGE), (404, {"code": "not_found", "detail": "", "retry": "never"}))
        rest._wrapped._http = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(script))
        assert rest.messages.get("c1", "m1").text == "hi"
        with pytest.raises(Refused):
            rest.messages.get("c1", "m2")


async def test_the_synchronous_client_sends_and_iterates(server: FakeServer) -> None:
    def script() -> list[int]:
        with SyncClient(server.url, token_provider=lambda: "user:alice", device="script") as chat:
            chat.wait_connected(5)
            events = chat.events(timeout=0.2)
            channel = chat.channel("c1")
            sent = [channel.send(str(n)).seq for n in range(3)]
            assert [event.seq for event in events] == sent
            assert [message.seq for message in channel.history()] == [3, 2, 1]
            assert chat.position("c1") == 3
            return sent

    assert await asyncio.to_thread(script) == [1, 2, 3]
