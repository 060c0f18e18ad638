"""The seed scenario: a patient asks, the clinician's phone is offline, and everything that has to happen does.

A patient writes from a browser. The message is stored, the phone is woken without being told what was said, the
clinic's backend hears of it by a signed webhook, and it stands in the history. The clinician's phone and laptop come
online and catch up in order; what is read on one is read on the other. Then the trace of the message tells all of it.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
from standardwebhooks import Webhook as Verifier

from tests.browser.conftest import Stage
from tests.browser.test_demo import write
from tests.checks.house import wait_until
from tests.ops.conftest import tidings
from tidings.client import Client, MessageCreated, Rest
from tidings.testing.push_stubs import Answer, FcmStub, PushStub
from tidings.wire.commands import UnreadSignal

QUESTION = "May I sleep on my side now, or is it too early?"
SECOND = "And may I drive?"
CHANNEL = "demo-knee"
PHONE = "fcm-token-of-lenas-phone:" + "x" * 100


class Backend(PushStub):
    """The clinic's own backend: takes webhooks, and keeps what verifies."""

    secret = ""

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """`POST /hook`."""
        Verifier(self.secret).verify(body, headers)
        return await self.accept(headers["webhook-id"], json.loads(body), headers, Answer(204))

    def of(self, type: str) -> list[dict[str, Any]]:
        return [one.payload for one in self.received if one.payload["type"] == type]


async def test_the_seed_scenario(stage: Stage, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        fcm = await stack.enter_async_context(FcmStub())
        backend = await stack.enter_async_context(Backend())
        # The demonstration makes its app when somebody enters.
        patient = await stage.enter("amira")
        made = await tidings(
            "key", "create", "scenario", "--scope", "*", "--app", "app_demo", "--data", tmp_path / "data", "--json"
        )
        assert made.status == 0, made.err
        rest = Rest(stage.server.url, api_key=json.loads(made.out)["api_key"])
        stack.push_async_callback(rest.close)
        app = await rest.request("PATCH", "/v1/app", body={"settings": {"push": {"grace_seconds": 1}}})
        assert b"grace_seconds" in app
        config = {"kind": "fcm", "service_account": fcm.service_account(), "endpoint": fcm.url}
        await rest.request("PUT", "/v1/push/providers/fcm", body={"config": config})
        token = {"provider": "fcm", "token": PHONE}
        await rest.request("PUT", "/v1/users/lena/devices/lena-phone/push", body=token)
        hook = msgspec.json.decode(
            await rest.request("POST", "/v1/webhooks", body={"url": f"{backend.url}/hook", "events": ["message.*"]})
        )
        backend.secret = hook["secret"]

        # The patient asks.
        await write(patient, QUESTION)
        await wait_until(lambda: backend.of("message.created"), "the backend was told", 30)
        id = backend.of("message.created")[0]["data"]["message"]

        # The demonstration's own messages may be told of, too: nobody has looked at them yet.
        def woken() -> list[Any]:
            return [one for one in fcm.received if one.payload["data"].get("message") == id]

        await wait_until(woken, "the phone was woken", 30)

        # The phone was woken with identifiers, and nothing that was said.
        (push,) = woken()
        assert {one.token for one in fcm.received} == {PHONE}
        assert push.payload["data"]["channel"] == CHANNEL
        assert all(QUESTION not in json.dumps(one.payload) for one in fcm.received)
        # So was the backend told.
        (told,) = backend.of("message.created")
        assert (told["data"]["channel"], told["data"]["by"]) == (CHANNEL, "amira")
        assert QUESTION not in json.dumps(told)
        assert told["data"]["message"] == id
        # It stands in the history.
        lena = rest.as_user("lena")
        assert (await lena.messages.get(CHANNEL, id)).text == QUESTION
        await write(patient, SECOND)
        await wait_until(lambda: len(backend.of("message.created")) == 2, "the backend was told again", 30)

        # Both devices of the clinician come online and catch up, in order, from where the push has pointed.
        devices = {}
        seen: dict[str, list[str]] = {"lena-phone": [], "lena-laptop": []}
        for device in seen:

            async def provide() -> str:
                return (await rest.users.token("lena")).token

            chat = Client(stage.server.url, token_provider=provide, device=device, start="all")
            devices[device] = await stack.enter_async_context(chat)

            async def note(event: MessageCreated, device: str = device) -> None:
                if event.channel == CHANNEL:
                    seen[device].append(event.message.text)

            chat.on(MessageCreated, note)
        await wait_until(
            lambda: all(texts[-2:] == [QUESTION, SECOND] for texts in seen.values()), "both devices have caught up", 30
        )
        history = sorted([one async for one in lena.messages.history(CHANNEL)], key=lambda one: one.seq)
        for texts in seen.values():
            assert texts == [message.text for message in history][-len(texts) :]

        # Read on the phone: nothing is left unread on the laptop.
        newest = history[-1]
        laptop = devices["lena-laptop"].signals(UnreadSignal)
        assert (await lena.receipts.unread()).unread >= 2
        await devices["lena-phone"].channel(CHANNEL).read(newest.seq)
        async with asyncio.timeout(10):
            async for signal in laptop:
                if signal.channel == CHANNEL and signal.unread == 0:
                    break

        # The trace tells it all, and nothing that was said.
        async def complete() -> bool:
            one = (await rest.messages.trace(CHANNEL, id, user="lena")).recipients[0]
            return all(device.acknowledged for device in one.devices) and len(one.devices) == 2

        await wait_until(complete, "the trace tells it all", 30)
        traced = await rest.messages.trace(CHANNEL, id, user="lena")
        (recipient,) = traced.recipients
        assert (traced.sender, traced.handed_on, recipient.delivered, recipient.read) == ("amira", True, True, True)
        assert {device.id: device.connected for device in recipient.devices} == {
            "lena-phone": True,
            "lena-laptop": True,
        }
        assert [(one.device, one.outcome, one.reason) for one in recipient.push] == [
            ("lena-phone", "scheduled", "not_acknowledged"),
            ("lena-phone", "accepted", "sent"),
        ]
        assert [(one.webhook, one.outcome, one.attempt) for one in traced.webhooks] == [(hook["id"], "delivered", 1)]
        assert QUESTION.encode() not in msgspec.json.encode(traced)
        shown = await tidings("trace", id, "--app", "app_demo", "--data", tmp_path / "data")
        assert "push on lena-phone accepted by fcm: sent" in shown.out, shown.err
        assert fcm.faults == []
