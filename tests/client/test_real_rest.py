"""Every method of the HTTP client against a whole server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

from tests import postgres
from tidings.client import MessageCreated, Refused, Rest
from tidings.client.rest import _Noun
from tidings.testing.process import ServerProcess
from tidings.wire.notifications import QuietHours
from tidings.wire.push import PushSubscription, PushSubscriptionKeys, WebPushConfig
from tidings.wire.resources import AppSettings, ChannelFeatures

from .real import ENVIRONMENT, Place, key_of

NOUNS = (
    "app",
    "users",
    "me",
    "channels",
    "members",
    "messages",
    "receipts",
    "streams",
    "notifications",
    "push",
    "webhooks",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    environment = ENVIRONMENT | await postgres.server_environment()
    async with ServerProcess(tmp_path_factory.mktemp("rest") / "data", environment=environment) as server:
        yield Place(server, await key_of(server))


class Witness:
    """Notes which methods of a noun were used."""

    def __init__(self, noun: Any, name: str, used: set[str]) -> None:
        self._noun = noun
        self._name = name
        self._used = used

    def __getattr__(self, method: str) -> Any:
        self._used.add(f"{self._name}.{method}")
        return getattr(self._noun, method)


def watched(rest: Rest, used: set[str]) -> Any:
    """The same client; `used` learns what is called."""
    for name in NOUNS:
        setattr(rest, name, Witness(getattr(rest, name), name, used))
    return rest


async def all_of(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def test_every_method_does_what_it_says(place: Place) -> None:
    used: set[str] = set()
    async with place.rest() as plain:
        rest = watched(plain, used)
        await the_app(rest)
        await the_users(rest)
        await the_channels(rest, watched(plain.as_user("ann"), used), watched(plain.as_user("ben"), used))
        await the_messages(rest, watched(plain.as_user("ann"), used), watched(plain.as_user("ben"), used))
        await the_notifications(rest, watched(plain.as_user("ben"), used))
        await the_webhooks(rest)
        await the_goodbyes(rest)
        public = {
            f"{name}.{method}"
            for name in NOUNS
            for method, _ in inspect.getmembers(type(getattr(plain.as_user("x"), name)), inspect.isfunction)
            if not method.startswith("_")
        }
        assert all(isinstance(getattr(plain.as_user("x"), name), _Noun) for name in NOUNS)
        assert used == public


async def the_app(rest: Any) -> None:
    app = await rest.app.get()
    assert (await rest.app.update(name="Clinic", settings=AppSettings(token_leeway_seconds=5))).name == "Clinic"
    assert (await rest.app.get()).settings.token_leeway_seconds == 5
    await rest.app.update(settings=app.settings)

    key = await rest.app.create_key("reports", scopes=["user.read"], expires_at=datetime.now(UTC) + timedelta(days=1))
    assert key.secret is not None
    assert key.id in [one.id for one in await all_of(rest.app.keys())]
    await rest.app.revoke_key(key.id)

    signing = await rest.app.create_signing_key(kid="second")
    assert signing.secret
    assert "second" in [one.kid for one in await all_of(rest.app.signing_keys())]
    await rest.app.delete_signing_key("second")

    provider = await rest.app.create_identity_provider("https://id.example/jwks.json", algorithms=["ES256"])
    assert [one.id for one in await all_of(rest.app.identity_providers())] == [provider.id]
    await rest.app.delete_identity_provider(provider.id)
    assert await all_of(rest.app.identity_providers()) == []

    role = await rest.app.put_role("channel", "listener", ["channel.read", "member.read"])
    assert role in await all_of(rest.app.roles())
    await rest.app.delete_role("channel", "listener")

    kind = await rest.app.put_channel_type("open", features=ChannelFeatures(typing=False), public=True)
    assert await rest.app.channel_type("open") == kind
    assert "open" in [one.name for one in await all_of(rest.app.channel_types())]


async def the_users(rest: Any) -> None:
    assert (await rest.users.create("ann", name="Ann", role="user", labels={"ward": "3b"})).name == "Ann"
    assert [one.id for one in await rest.users.upsert([{"id": "ben"}, {"id": "ann", "name": "Anne"}])] == ["ben", "ann"]
    assert [one.id async for one in rest.users.query({"label.ward": "3b"})] == ["ann"]
    assert (await rest.users.get("ann")).name == "Anne"
    assert (await rest.users.update("ann", name=None)).name is None
    assert (await rest.users.deactivate("ben")).deactivated_at is not None
    assert (await rest.users.reactivate("ben")).deactivated_at is None
    token = await rest.users.token("ben", ttl_seconds=60)
    assert token.expires_at > datetime.now(UTC)
    await rest.users.revoke_tokens("ben")
    assert await all_of(rest.users.devices("ben")) == []

    await rest.app.put_relation("panel", "ann", "ben")
    assert [(one.user, one.other) for one in await all_of(rest.app.relations(kind="panel"))] == [("ann", "ben")]
    await rest.app.delete_relation("panel", "ann", "ben")
    assert await all_of(rest.app.relations(user="ann")) == []


async def the_channels(rest: Any, ann: Any, ben: Any) -> None:
    assert (await ann.me.get()).id == "ann"
    assert (await ann.me.update(name="Ann")).name == "Ann"
    channel = await rest.channels.create("ward", name="Ward", members=["ann"], labels={"floor": "3"})
    direct = await ann.channels.create(type="direct", members=["ann", "ben"])
    assert (await ann.channels.create(type="direct", members=["ann", "ben"])).id == direct.id
    assert (await ann.channels.get("ward")).membership is not None
    assert (await rest.channels.update("ward", name="Ward 3b", labels={"floor": "4"})).name == "Ward 3b"
    found = await all_of(rest.channels.query(labels={"floor": "4"}, include=["members", "last_message"]))
    assert [(one.id, [m.user for m in one.members]) for one in found] == [(channel.id, ["ann"])]
    assert (await ann.channels.set_membership("ward", hidden=True)).membership.hidden
    assert [one.id for one in await all_of(ann.channels.query(hidden=True))] == ["ward"]
    await ann.channels.set_membership("ward", hidden=False)

    assert [one.user for one in await rest.members.add("ward", ["ben", "ann"])] != []
    assert {one.user for one in await all_of(rest.members.all("ward"))} == {"ann", "ben"}
    assert (await rest.members.update("ward", "ben", role="moderator")).role == "moderator"
    await rest.members.remove("ward", "ben")
    with pytest.raises(Refused) as refused:
        await ben.channels.get("ward")
    assert refused.value.code == "not_found"
    await rest.members.add("ward", ["ben"])

    await rest.channels.create("lobby", type="open")
    await ben.channels.join("lobby")
    assert [one.user for one in await all_of(rest.members.all("lobby"))] == ["ben"]
    await ben.channels.leave("lobby")
    await rest.channels.delete("lobby")
    assert "lobby" not in [one.id for one in await all_of(ben.channels.query())]


async def the_messages(rest: Any, ann: Any, ben: Any) -> None:
    mark = (await ben.streams.moved()).mark
    sent = await ann.messages.send("ward", "Good morning", key="k1", mentions=["ben"], custom={"n": 1})
    assert (sent.channel, sent.key, sent.duplicate) == ("ward", "k1", False)
    again = await ann.messages.send("ward", "Good morning", key="k1", mentions=["ben"], custom={"n": 1})
    assert (again.id, again.seq, again.duplicate) == (sent.id, sent.seq, True)
    second = await ann.messages.send("ward", "and again", reply_to=sent.id)
    page = await ben.messages.page("ward", limit=1)
    assert [one.id for one in page.messages] == [second.id]
    assert (page.has_before, page.has_after, page.head) == (True, False, second.seq)
    assert (await ben.messages.page("ward", after=sent.seq)).messages[0].reply_to == sent.id
    assert [one.id for one in await all_of(ben.messages.history("ward"))] == [second.id, sent.id]
    assert (await ben.messages.get("ward", sent.id)).custom == {"n": 1}
    assert (await ben.messages.get("ward", sent.id)).reply_count == 1
    assert [one.id for one in await all_of(ben.messages.replies("ward", sent.id))] == [second.id]

    total = await ben.receipts.unread()
    assert (total.unread, total.mentions) == (2, 1)
    assert (await ben.receipts.read("ward", second.seq)).unread == 0
    assert (await ben.receipts.mark_unread("ward", second.seq)).unread == 1
    assert {one.user: one.read for one in await all_of(ann.receipts.all("ward"))}["ben"] == second.seq
    counted = await ann.receipts.of_message("ward", second.id)
    assert 1 <= counted.read <= counted.delivered <= counted.members

    assert (await ann.messages.edit("ward", sent.id, "Good evening")).edits == 1
    assert [one.text for one in await all_of(ann.messages.versions("ward", sent.id))] == [
        "Good morning",
        "Good evening",
    ]
    assert await ben.messages.react("ward", sent.id, "👍") == second.seq + 2
    assert await ben.messages.react("ward", sent.id, "👍") is None
    assert await ben.messages.unreact("ward", sent.id, "👍") == second.seq + 3
    assert await ann.messages.delete("ward", sent.id) == second.seq + 4
    assert (await ben.messages.get("ward", sent.id)).deleted_at is not None
    traced = await rest.messages.trace("ward", sent.id, user="ben")
    assert (traced.seq, [one.user for one in traced.recipients]) == (sent.seq, ["ben"])
    # What its author took back, its author can no longer read; whoever may read versions still can.
    with pytest.raises(Refused) as refused:
        await all_of(ann.messages.versions("ward", sent.id))
    assert refused.value.code == "forbidden"
    assert len(await all_of(rest.messages.versions("ward", sent.id))) == 2

    moved = await ben.streams.moved(mark)
    (head,) = [one for one in moved.moved if one.stream == "ward"]
    events = await ben.streams.events("ward", sent.seq - 1, limit=2)
    assert [(type(one), one.seq) for one in events.events] == [(MessageCreated, sent.seq), (MessageCreated, second.seq)]
    assert (events.head, events.epoch) == (head.head, head.epoch)
    with pytest.raises(Refused) as refused:
        await ben.streams.events("ward", 0, epoch="another")
    assert refused.value.code == "epoch_changed"
    own = await ben.streams.own_events(0)
    assert [one.seq for one in own.events] == list(range(1, own.head + 1))

    # A long poll returns with the news.
    waiting = asyncio.ensure_future(ben.streams.events("ward", events.head, wait=20))
    await ann.messages.send("ward", "news")
    assert [one.message.text for one in (await waiting).events] == ["news"]


async def the_notifications(rest: Any, ben: Any) -> None:
    config = WebPushConfig(subject="mailto:ops@example.com")
    made = await rest.push.put_provider("web", config)
    assert [one.id for one in await all_of(rest.push.providers())] == ["web"]
    key = await ben.push.webpush_key()
    assert (key.provider, key.public_key) == ("web", made.config.public_key)
    keys = PushSubscriptionKeys(
        "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
        "BTBZMqHH6r4Tts7J_aSIgg",
    )
    subscription = PushSubscription("https://updates.push.services.mozilla.com/wpush/v2/abc", keys)
    await ben.notifications.put_token("ben", "browser", "web", subscription, language="de")
    (token,) = await all_of(ben.notifications.tokens("ben"))
    assert (token.device, token.provider, token.language) == ("browser", "web", "de")
    said = await ben.notifications.put(
        "ben", level="mentions", quiet_hours=QuietHours(start="22:00", end="07:00", timezone="UTC")
    )
    assert await rest.notifications.get("ben") == said
    assert (await ben.notifications.put_channel("ward", level="none", device="browser")).level == "none"
    assert (await ben.notifications.get_channel("ward", device="browser")).level == "none"
    (explained,) = (await rest.push.test("ben", channel="ward", device="browser")).devices
    assert not explained.would_wake
    await ben.notifications.put_channel("ward", device="browser")
    await ben.notifications.put("ben")
    await ben.notifications.remove_token("ben", "browser", provider="web")
    await rest.users.delete_device("ben", "browser")
    await rest.push.delete_provider("web")


async def the_webhooks(rest: Any) -> None:
    # Nobody has this name: attempts fail, and are shown.
    made = await rest.webhooks.create("https://hook.invalid/", events=["message.*"], channel_types=["direct"])
    assert made.secret.startswith("whsec_")
    assert [one.id for one in await all_of(rest.webhooks.all())] == [made.id]
    assert (await rest.webhooks.update(made.id, description="Billing", content=True)).description == "Billing"
    assert (await rest.webhooks.rotate(made.id, overlap_hours=1)).secret != made.secret
    tried = await rest.webhooks.test(made.id)
    assert tried.delivery.outcome in ("failed", "refused")
    assert await rest.webhooks.delivery(made.id, tried.delivery.id) == tried
    assert [one.id for one in await all_of(rest.webhooks.deliveries(made.id, type="webhook.test"))] == [
        tried.delivery.id
    ]
    assert await rest.webhooks.replay(made.id, since=datetime.now(UTC) + timedelta(hours=1)) == 0
    assert (await rest.webhooks.get(made.id)).secret is None
    await rest.webhooks.delete(made.id)


async def the_goodbyes(rest: Any) -> None:
    await rest.app.put_channel_type("short-lived")
    await rest.app.delete_channel_type("short-lived")
    async with place_client(rest) as chat:
        await chat.wait_connected(5)
        # Devices are written down a little later, many at a time.
        async with asyncio.timeout(10):
            while [one.id for one in await all_of(rest.users.devices("ben"))] != ["ben-phone"]:
                pass
    await rest.users.delete_device("ben", "ben-phone")
    assert await all_of(rest.users.devices("ben")) == []
    await rest.users.delete("ann")
    assert (await rest.users.get("ann")).deleted_at is not None
    assert await all_of(rest.app.jobs(state="dead", kind="webhook")) == []
    assert await rest.app.retry_jobs(kind="webhook") == 0
    for act in (rest.app.retry_job, rest.app.drop_job):
        with pytest.raises(Refused, match="not_found"):
            await act("job_7")
    actions = {one.action async for one in rest.app.audit()}
    assert actions >= {"app.updated", "key.revoked", "role.put"}


def place_client(rest: Any) -> Any:
    """A client of Ben's."""
    from tidings.client import Client

    async def provide() -> str:
        token: str = (await rest.users.token("ben")).token
        return token

    return Client(str(rest._http.base_url), token_provider=provide, device="ben-phone")
