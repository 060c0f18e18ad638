"""Role × operation × object × tenant: who gets in where. A row for every operation, made for the one that runs.

Thirteen callers knock at every operation of the OpenAPI document. A row says who gets in; who does not is told
`forbidden` only about what they may see, and `not found` otherwise, exactly as about what does not exist.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from .world import World, open_world

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRANGERS = ("anonymous", "bad_token", "deactivated")
FOREIGN = ("other_backend", "other_user")
USERS = ("outsider", "guest", "admin", "member", "moderator", "owner")
KEYS = ("backend", "narrow")
ACTORS = (*STRANGERS, *FOREIGN, *USERS, *KEYS)

INSIDE = frozenset({"member", "moderator", "owner"})
# An API key with every scope.
BACKEND = frozenset({"backend"})
STAFF = frozenset({"moderator", "owner"})
EVERY_USER = frozenset(USERS)


@dataclass(frozen=True)
class Row:
    """One operation: what is asked, and who gets in.

    `forbidden`: who is told so; `wrong`: who may, but whose request makes no sense (422 or 409). Everybody else of the
    app gets `not found`. `foreign`: what callers of another app get, who find nothing of this one: 404 unless said.
    """

    allowed: frozenset[str]
    forbidden: frozenset[str] = frozenset()
    body: Any = None
    query: dict[str, str] = field(default_factory=dict)
    wrong: frozenset[str] = frozenset()
    foreign: tuple[int, int] = (404, 404)


def channel(allowed: frozenset[str], **more: Any) -> Row:
    """Something in a channel: its readers are told what they may not; to others it does not exist."""
    return Row(allowed, (INSIDE | BACKEND) - allowed - more.get("wrong", frozenset()), **more)


def app(allowed: frozenset[str], foreign: tuple[int, int] = (200, 403), **more: Any) -> Row:
    """Something of the whole app: there is nothing to hide that it exists."""
    return Row(allowed, (EVERY_USER | set(KEYS)) - allowed - more.get("wrong", frozenset()), foreign=foreign, **more)


ADMIN = BACKEND | {"admin"}
NARROW = frozenset({"narrow"})
MINE = (200, 200)
# What a browser gives: its key is a point on the curve, any point.
SUBSCRIPTION = {
    "endpoint": "https://updates.push.services.mozilla.com/wpush/v2/abc",
    "keys": {
        "p256dh": "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
        "auth": "BTBZMqHH6r4Tts7J_aSIgg",
    },
}

ROWS: dict[str, Row] = {
    # The app. An admin runs it but holds no keys.
    "app.get": app(ADMIN),
    "app.update": app(ADMIN, body={"name": "Renamed"}),
    "app.list_keys": app(BACKEND),
    "app.create_key": app(BACKEND, (201, 403), body={"name": "k", "scopes": ["user.read"]}),
    "app.revoke_key": app(BACKEND, (404, 403)),
    "app.list_signing_keys": app(BACKEND),
    "app.create_signing_key": app(BACKEND, (201, 403), body={"algorithm": "HS256"}),
    "app.retire_signing_key": app(BACKEND, (404, 403)),
    "app.list_providers": app(BACKEND),
    "app.create_provider": app(BACKEND, (201, 403), body={"jwks_url": "https://id.example.com/jwks"}),
    "app.delete_provider": app(BACKEND, (404, 403)),
    "app.list_roles": app(ADMIN),
    "app.put_role": app(ADMIN, body={"grants": ["member.read"]}),
    "app.delete_role": app(ADMIN, (404, 403)),
    # What channels can do is no secret among those who use them.
    "app.list_types": app(EVERY_USER | BACKEND | NARROW, MINE),
    "app.get_type": app(EVERY_USER | BACKEND | NARROW, (404, 404)),
    "app.put_type": app(ADMIN, body={}),
    "app.delete_type": app(ADMIN, (404, 403)),
    "app.list_relations": app(ADMIN),
    # A panel reads messages. An admin does not, and nobody grants what they have not got.
    "app.put_relation": app(BACKEND, (404, 403), body={"kind": "panel", "user": "member", "other": "outsider"}),
    "app.delete_relation": app(ADMIN, (404, 403), query={"kind": "panel", "user": "owner", "other": "target"}),
    "app.audit": app(ADMIN),
    "presend.get": app(ADMIN, (404, 403)),
    "presend.put": app(ADMIN, body={"url": "https://hook.invalid/", "enabled": False}),
    "presend.delete": app(ADMIN, (404, 403)),
    "presend.test": app(ADMIN, (404, 403), body={}),
    "webhooks.list": app(ADMIN),
    "webhooks.create": app(ADMIN, (201, 403), body={"url": "https://api.example.com/hook"}),
    "webhooks.get": app(ADMIN, (404, 403)),
    "webhooks.update": app(ADMIN, (404, 403), body={"description": "d"}),
    "webhooks.delete": app(ADMIN, (404, 403)),
    "webhooks.rotate": app(ADMIN, (404, 403), body={}),
    # It is sent to a name that nobody has.
    "webhooks.test": app(ADMIN, (404, 403)),
    "webhooks.deliveries": app(ADMIN, (404, 403)),
    "webhooks.delivery": app(ADMIN, (404, 403)),
    "webhooks.replay": app(ADMIN, (404, 403), body={"since": "2026-01-01T00:00:00Z"}),
    "push.providers": app(ADMIN),
    "push.put_provider": app(ADMIN, body={"config": {"kind": "webpush", "subject": "mailto:ops@example.com"}}),
    "push.delete_provider": app(ADMIN, (404, 403)),
    "push.test": app(ADMIN, (404, 403), body={"user": "target"}),
    "push.webpush_key": app(EVERY_USER | BACKEND | NARROW, (404, 404)),
    "notifications.tokens": app(ADMIN, (404, 403)),
    "notifications.put_token": app(ADMIN, (404, 403), body={"provider": "vapid", "subscription": SUBSCRIPTION}),
    "notifications.remove_token": app(ADMIN, (404, 403)),
    "notifications.get": app(ADMIN, (404, 403)),
    "notifications.put": app(ADMIN, (404, 403), body={"level": "mentions"}),
    "notifications.get_channel": channel(INSIDE, wrong=BACKEND, foreign=(404, 404)),
    "notifications.put_channel": channel(INSIDE, wrong=BACKEND, foreign=(404, 404), body={"level": "none"}),
    "jobs.list": app(ADMIN),
    "jobs.retry_all": app(ADMIN, body={}),
    "jobs.retry": app(ADMIN, (404, 403)),
    "jobs.drop": app(ADMIN, (404, 403)),
    # Users. Everybody in the app may read profiles; some act on others.
    "users.create": app(ADMIN, (201, 403), body={"id": "new"}),
    "users.upsert": app(ADMIN, body={"users": [{"id": "target", "name": "T"}]}),
    "users.list": app(EVERY_USER | BACKEND | NARROW, MINE),
    "users.get": Row(EVERY_USER | BACKEND | NARROW),
    "users.update": app(ADMIN, (404, 403), body={"name": "T"}),
    "users.delete": app(ADMIN, (404, 403)),
    "users.deactivate": app(ADMIN, (404, 403)),
    "users.reactivate": app(ADMIN, (404, 403)),
    "users.mint_token": app(BACKEND, (404, 403), body={}),
    "users.revoke_tokens": app(ADMIN, (404, 403), body={}),
    "users.devices": app(ADMIN, (404, 403)),
    "users.remove_device": app(ADMIN, (404, 403)),
    "me.get": app(EVERY_USER, (422, 200), wrong=frozenset(KEYS)),
    "me.update": app(EVERY_USER, (422, 200), wrong=frozenset(KEYS), body={"name": "Me"}),
    # Channels. An admin may know that they exist, without their content.
    "channels.create": app(EVERY_USER - {"guest"} | BACKEND, (201, 201), body={"name": "c"}),
    "channels.list": app(EVERY_USER | BACKEND, MINE),
    "channels.get": channel(INSIDE | ADMIN),
    "channels.update": channel(STAFF | BACKEND, body={"name": "c"}),
    "channels.delete": channel(frozenset({"owner"}) | BACKEND),
    "channels.set_membership": channel(INSIDE, body={"hidden": True}, wrong=BACKEND),
    "members.list": channel(INSIDE | ADMIN),
    "members.add": channel(STAFF | BACKEND, body={"users": ["outsider"]}),
    "members.update": channel(frozenset({"owner"}) | BACKEND, body={"role": "reader"}),
    "members.remove": channel(STAFF | BACKEND),
    "members.join": channel(INSIDE, wrong=BACKEND | NARROW, foreign=(409, 404)),
    # Without its only owner nobody could give roles any more.
    "members.leave": channel(INSIDE - {"owner"}, wrong=BACKEND | NARROW | {"owner"}, foreign=(409, 404)),
    # Messages. The message is the owner's.
    "messages.send": channel(INSIDE | BACKEND, body={"text": "x"}),
    "messages.list": channel(INSIDE | BACKEND),
    "messages.get": channel(INSIDE | BACKEND),
    "messages.replies": channel(INSIDE | BACKEND),
    "messages.edit": channel(frozenset({"owner"}) | BACKEND, body={"text": "y"}),
    "messages.delete": channel(STAFF | BACKEND),
    "messages.versions": channel(STAFF | BACKEND),
    "messages.react": channel(INSIDE, wrong=BACKEND | NARROW, body={"emoji": "👍"}, foreign=(422, 404)),
    "messages.unreact": channel(INSIDE, wrong=BACKEND | NARROW, foreign=(422, 404)),
    "messages.unreact_any": channel(INSIDE, wrong=BACKEND | NARROW, query={"emoji": "👍"}, foreign=(422, 404)),
    # Who runs the app may follow a message without reading it.
    "messages.trace": app(ADMIN, (404, 403)),
    # Positions.
    "receipts.read": channel(INSIDE, wrong=BACKEND, body={"seq": 1}),
    "receipts.mark_unread": channel(INSIDE, wrong=BACKEND, body={"seq": 1}),
    "receipts.list": channel(INSIDE | ADMIN),
    "receipts.of_message": channel(INSIDE | ADMIN),
    "receipts.unread": app(EVERY_USER, (422, 200), wrong=frozenset(KEYS)),
    "sync.heads": app(EVERY_USER, (422, 200), wrong=frozenset(KEYS)),
    "sync.channel_events": channel(INSIDE | BACKEND),
    "sync.own_events": app(EVERY_USER, (422, 200), wrong=frozenset(KEYS)),
}
# No credentials are asked for. The metrics look at the address, which is loopback here; see test_system.py.
OPEN = {"system.health", "system.ready", "system.metrics", "system.openapi", "system.docs"}


@dataclass
class Stage:
    """What the operations act on. Made anew whenever somebody has changed something."""

    world: World
    number: Any = field(default_factory=count)
    values: dict[str, str] = field(default_factory=dict)

    async def build(self) -> None:
        world, number = self.world, next(self.number)
        target = f"target{number}"
        await world.ok("backend", "PUT", "/v1/users", {"users": [{"id": target}]})
        made = await world.channel(
            "member", "moderator", "owner", target, roles={"moderator": "moderator", "owner": "owner"}
        )
        sent = await world.send("owner", made)
        self.values = {
            "channel": made,
            "message": sent["id"],
            "user": target,
            "device": "phone",
            "emoji": "👍",
            "level": "channel",
            "role": f"role{number}",
            "type": f"type{number}",
            "push_provider": "vapid",
        }

    async def build_for(self, op: str) -> None:
        """What only some operations need."""
        world, values = self.world, self.values
        match op:
            case "app.delete_role":
                await world.ok("backend", "PUT", f"/v1/app/roles/channel/{values['role']}", {"grants": []})
            case "app.revoke_key":
                made = await world.ok("backend", "POST", "/v1/app/keys", {"name": "spare", "scopes": ["user.read"]})
                values["key"] = made["id"]
            case "app.get_type" | "app.delete_type":
                await world.ok("backend", "PUT", f"/v1/app/channel-types/{values['type']}", {})
            case "app.delete_relation":
                relation = {"kind": "panel", "user": "owner", "other": values["user"]}
                await world.ok("backend", "PUT", "/v1/app/relations", relation)
            case "app.retire_signing_key":
                made = await world.ok("backend", "POST", "/v1/app/signing-keys", {"algorithm": "HS256"})
                values["kid"] = made["kid"]
            case "app.delete_provider" | "app.create_provider":
                for one in (await world.ok("backend", "GET", "/v1/app/identity-providers"))["items"]:
                    await world.ok("backend", "DELETE", f"/v1/app/identity-providers/{one['id']}")
                if op == "app.delete_provider":
                    body = {"jwks_url": "https://id.example.com/jwks"}
                    values["provider"] = (await world.ok("backend", "POST", "/v1/app/identity-providers", body))["id"]
            case str() if op.startswith("presend."):
                # Everything fails there, and is let through.
                hook = {"url": "https://hook.invalid/", "on_failure": "allow"}
                await world.ok("backend", "PUT", "/v1/presend-hook", hook)
                await world.call("other_backend", "DELETE", "/v1/presend-hook")
            case str() if op.startswith("webhooks."):
                for one in (await world.ok("backend", "GET", "/v1/webhooks"))["items"]:
                    await world.ok("backend", "DELETE", f"/v1/webhooks/{one['id']}")
                made = await world.ok("backend", "POST", "/v1/webhooks", {"url": "https://hook.invalid/"})
                values["webhook"] = made["id"]
                if op == "webhooks.delivery":
                    tried = await world.ok("backend", "POST", f"/v1/webhooks/{made['id']}/test")
                    values["delivery"] = tried["delivery"]["id"]
            case "push.delete_provider" | "push.webpush_key" | "notifications.put_token" | "notifications.remove_token":
                body: Any = {"config": {"kind": "webpush", "subject": "mailto:ops@example.com"}}
                await world.ok("backend", "PUT", "/v1/push/providers/vapid", body)
                await world.call("other_backend", "DELETE", "/v1/push/providers/vapid")
                if op == "notifications.remove_token":
                    body = {"provider": "vapid", "subscription": SUBSCRIPTION}
                    await world.ok("backend", "PUT", f"/v1/users/{values['user']}/devices/phone/push", body)
            case "jobs.retry" | "jobs.drop":
                await world.execute("DELETE FROM jobs WHERE id=42")
                await world.execute(
                    "INSERT INTO jobs(id,app,kind,key,due_at,created_at,dead_at)"
                    " SELECT 42,app,'work','a',1,1,1 FROM apps WHERE id='clinic'"
                )
                values["job"] = "job_42"
            case "users.remove_device":
                await world.execute(
                    "INSERT INTO devices(app,user,id,created_at,last_seen_at) SELECT app,?,'phone',1,1 FROM apps"
                    " WHERE id='clinic'",
                    values["user"],
                )

    def fill(self, value: Any) -> Any:
        """`target` and `new` in bodies and queries are this stage's."""
        match value:
            case dict():
                return {name: self.fill(one) for name, one in value.items()}
            case list():
                return [self.fill(one) for one in value]
            case "target":
                return self.values["user"]
            case "new":
                return self.values["user"] + "new"
            case _:
                return value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    path: Path = tmp_path_factory.mktemp("matrix")
    async with open_world(path) as world:
        for name in ("outsider", "member", "moderator", "owner", "deactivated"):
            await world.user(name)
        await world.user("guest", "guest")
        await world.user("admin", "admin")
        await world.user("other_user", app="other_backend")
        await world.key("narrow", "user.read")
        await world.ok("backend", "POST", "/v1/users/deactivated/deactivate")
        world.credentials["anonymous"] = {}
        yield Stage(world)


def expected(row: Row, actor: str) -> set[int]:
    if actor in ("anonymous", "bad_token"):
        return {401}
    if actor == "deactivated":
        return {403}
    if actor in FOREIGN:
        want = row.foreign[FOREIGN.index(actor)]
        return {200, 204} if want == 200 else {want}
    if actor in row.allowed:
        return {200, 201, 204}
    if actor in row.forbidden:
        return {403}
    return {409, 422} if actor in row.wrong else {404}


async def test_every_operation_has_a_row(stage: Stage) -> None:
    known = {op.id: op.open for op in stage.world.rest.state.operations}
    assert set(ROWS) | OPEN == set(known)
    assert {id for id, open in known.items() if open} == OPEN


@pytest.mark.parametrize("op", ROWS)
async def test_who_gets_in(stage: Stage, op: str) -> None:
    world, row = stage.world, ROWS[op]
    declared = next(one for one in world.rest.state.operations if one.id == op)
    differ = {}
    dirty = True
    for actor in ACTORS:
        if dirty:
            await stage.build()
            await stage.build_for(op)
        path = declared.path.format(**stage.values)
        reply = await world.call(actor, declared.method, path, stage.fill(row.body), params=stage.fill(row.query))
        dirty = reply.status_code < 300 and declared.method != "GET"
        if reply.status_code not in expected(row, actor):
            differ[actor] = f"{reply.status_code} {reply.json().get('code') if reply.content else None}"
        if reply.status_code >= 400:
            assert reply.headers["content-type"] == "application/problem+json"
    assert not differ


HIDDEN = [op for op, row in ROWS.items() if row.foreign == (404, 404) and "outsider" not in row.allowed]


@pytest.mark.parametrize("op", HIDDEN)
async def test_what_is_hidden_looks_like_what_is_not_there(stage: Stage, op: str) -> None:
    """The same words for an object of somebody else, of another app, and for none."""
    world, row = stage.world, ROWS[op]
    declared = next(one for one in world.rest.state.operations if one.id == op)
    await stage.build()
    await stage.build_for(op)
    first = declared.parameters[0]
    real = declared.path.format(**stage.values)
    missing = declared.path.format(**{**stage.values, first: "nothing-here"})
    who = "other_user" if first == "user" else "outsider"
    replies = [
        await world.call(actor, declared.method, path, stage.fill(row.body))
        for actor, path in ((who, real), (who, missing), ("other_backend", real), ("other_backend", missing))
    ]
    bodies = [reply.json() for reply in replies]
    assert {reply.status_code for reply in replies} == {404}
    assert bodies[0] == bodies[1]
    assert bodies[2] == bodies[3]
