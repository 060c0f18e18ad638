"""W1, W2: what is told to backends and phones survives `kill -9` of whoever tells it, in the middle of a flood.

Every event's webhook arrives at least once, with one id, and in order per channel; every decision about a push is
accounted for; and a device that has got a message in time is never woken for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from standardwebhooks import Webhook as Verifier

from tests.checks.house import House, open_house, wait_until
from tidings.testing.process import ServerProcess
from tidings.testing.push_stubs import Answer, FcmStub, PushStub

CHANNELS = 6
ROUNDS = 40
KILLS = 4
# A worker's lease; what a killed one was at falls to the next after it.
PATIENCE_S = 60.0

WORKER_COMMAND = (sys.executable, "-m", "tidings.server.cli", "worker", "--data", "{data}")


class Backend(PushStub):
    """Takes webhooks: keeps what verifies, in the order it came. It thinks for a moment, so that kills find some
    under way."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = ""

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """`POST /hook`."""
        Verifier(self.secret).verify(body, headers)
        return await self.accept(headers["webhook-id"], json.loads(body), headers, Answer(204, seconds=0.02))


class Worker(ServerProcess):
    """`tidings worker`, which has no address: it is ready when it says so."""

    async def wait_ready(self) -> None:
        await wait_until(lambda: self.stderr_path.read_text().count("worker.started") == self.starts, "the worker", 20)


@asynccontextmanager
async def set_up(house: House, backend: Backend, fcm: FcmStub) -> AsyncIterator[list[str]]:
    """An app with a webhook and a provider, channels with a sender and two phones; their ids."""
    await house.users("alice", "bob", "carol")
    channels = [await house.channel("alice", "bob", "carol", id=f"c{number}") for number in range(CHANNELS)]
    rest = house.rest
    await rest.request("PATCH", "/v1/app", body={"settings": {"push": {"grace_seconds": 1}}})
    config = {"kind": "fcm", "service_account": fcm.service_account(), "endpoint": fcm.url}
    await rest.request("PUT", "/v1/push/providers/fcm", body={"config": config})
    for user in ("bob", "carol"):
        token = {"provider": "fcm", "token": f"token-of-{user}:" + "x" * 100}
        await rest.request("PUT", f"/v1/users/{user}/devices/{user}-phone/push", body=token)
    hook = msgspec.json.decode(
        await rest.request("POST", "/v1/webhooks", body={"url": f"{backend.url}/hook", "events": ["message.created"]})
    )
    backend.secret = hook["secret"]
    yield channels


async def flood(house: House, channels: list[str], kill: Any) -> int:
    """Messages into every channel, each until it is acknowledged, while `kill` is called now and then; how many."""
    sent = 0
    for number in range(ROUNDS):
        for channel in channels:
            await send(house, channel, f"{channel}-{number}")
            sent += 1
        if number % (ROUNDS // KILLS) == ROUNDS // KILLS - 1:
            await kill()
    return sent


async def send(house: House, channel: str, key: str) -> None:
    """One message, however often its sender has to ask."""
    while True:
        try:
            await house.rest.as_user("alice").messages.send(channel, "hello", key=key)
        except Exception:  # why: a killed server answers in many ways, and the key makes all of them the same
            await asyncio.sleep(0.05)  # why: until it is there again
        else:
            return


def check_webhooks(backend: Backend, sent: int) -> None:
    ids: dict[tuple[str, int], set[str]] = defaultdict(set)
    order: dict[str, list[int]] = defaultdict(list)
    for one in backend.received:
        data = one.payload["data"]
        place = (data["channel"], data["seq"])
        if place not in ids:
            order[data["channel"]].append(data["seq"])
        ids[place].add(one.headers["webhook-id"])
    assert len(ids) == sent
    assert all(len(found) == 1 for found in ids.values())
    for seqs in order.values():
        assert seqs == sorted(seqs)


def check_pushes(house: House, fcm: FcmStub, sent: int) -> None:
    rows = house.sql("SELECT sid, seq, user, outcome FROM push_log")
    ended = {(sid, seq, user) for sid, seq, user, outcome in rows if outcome in ("accepted", "skipped", "dropped")}
    expected = {
        (sid, seq, user) for sid, seq in house.sql("SELECT sid, seq FROM messages") for user in ("bob", "carol")
    }
    assert len(expected) == 2 * sent
    assert ended == expected
    assert fcm.faults == []


@pytest.mark.parametrize("who", ["server", "worker"])
async def test_everything_is_told_at_least_once_in_order_and_accounted_for(tmp_path: Path, who: str) -> None:
    async with AsyncExitStack() as stack:
        fcm, backend = await stack.enter_async_context(FcmStub()), await stack.enter_async_context(Backend())
        settings = {"TIDINGS_OUTBOUND_ALLOW_HOSTS": "127.0.0.1"}
        jobs = {"TIDINGS_JOBS": "false"} if who == "worker" else {}
        house = await stack.enter_async_context(open_house(tmp_path, **settings, **jobs))
        shared = {"TIDINGS_STORE": house.store_url, "TIDINGS_ALLOW_UNSAFE_STORE": "true"} if house.store_url else {}
        workers: list[Worker] = []
        for number in range(2 if who == "worker" else 0):
            worker = Worker(
                house.server.data,
                logs=tmp_path / f"worker{number}",
                environment={**settings, **shared},
                command=WORKER_COMMAND,
            )
            workers.append(await stack.enter_async_context(worker))
        channels = await stack.enter_async_context(set_up(house, backend, fcm))
        for number in range(10):
            backend.answer_next("*", *([Answer(503)] if number % 3 == 0 else [Answer(204)]))
        turn = 0

        async def kill() -> None:
            nonlocal turn
            turn += 1
            victim = workers[turn % 2] if workers else house.server
            victim.kill9()
            await victim.restart()

        sent = await flood(house, channels, kill)
        await wait_until(
            lambda: (
                not house.sql("SELECT 1 FROM jobs WHERE kind<>'housekeeping' UNION ALL SELECT 1 FROM outbox LIMIT 1")
            ),
            "the end",
            PATIENCE_S,
        )
        check_webhooks(backend, sent)
        check_pushes(house, fcm, sent)


async def test_who_has_got_it_in_time_is_not_woken_for_it(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        fcm, backend = await stack.enter_async_context(FcmStub()), await stack.enter_async_context(Backend())
        house = await stack.enter_async_context(open_house(tmp_path, TIDINGS_OUTBOUND_ALLOW_HOSTS="127.0.0.1"))
        channels = await stack.enter_async_context(set_up(house, backend, fcm))
        bob = await house.wire("bob", device="bob-phone")

        async def acknowledge() -> None:
            told: dict[str, int] = {}
            while True:
                for channel in channels:
                    seqs = bob.seqs(channel)
                    if seqs and seqs[-1] > told.get(channel, 0):
                        told[channel] = seqs[-1]
                        await bob.post("ack", positions={channel: seqs[-1]})
                await asyncio.sleep(0.02)  # why: it acknowledges as devices do, now and then

        task = asyncio.ensure_future(acknowledge())
        stack.callback(task.cancel)
        for number in range(30):
            for channel in channels:
                await send(house, channel, f"{channel}-{number}")
        await wait_until(
            lambda: (
                not house.sql("SELECT 1 FROM jobs WHERE kind<>'housekeeping' UNION ALL SELECT 1 FROM outbox LIMIT 1")
            ),
            "the end",
            PATIENCE_S,
        )
        assert {one.token.partition(":")[0] for one in fcm.received} == {"token-of-carol"}
        outcomes = house.sql("SELECT DISTINCT outcome, reason FROM push_log WHERE user='bob'")
        assert outcomes == [("skipped", "acknowledged")]
        # One who is connected but silent is asked about again, later: nothing is sent meanwhile.
        assert len(fcm.received) == 30 * CHANNELS
