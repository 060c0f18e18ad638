"""The log: one gapless order that everybody sees, and every message in it once."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from tests.checks.house import House, assert_gapless
from tidings.client import Client, FullJitter, Rest
from tidings.client.errors import NotConnected, OutcomeUnknown, Refused
from tidings.testing.chaos import ChaosProxy
from tidings.testing.checker import check
from tidings.testing.history import Send, body_digest
from tidings.testing.recorder import Recorder

pytestmark = pytest.mark.asyncio(loop_scope="module")

# A message is its own event; the others are in a table of theirs.
EVERYTHING = "SELECT seq FROM events WHERE sid=? UNION ALL SELECT seq FROM messages WHERE sid=? ORDER BY 1"

WRITERS = 32
READERS = 10
EACH = 20


async def test_d4_d6_many_writers_make_one_gapless_order_that_sockets_and_rest_see_alike(
    house: House,
) -> None:
    writers = [f"writer{number}" for number in range(WRITERS)]
    readers = [f"reader{number}" for number in range(READERS)]
    await house.users(*writers, *readers)
    channel = await house.channel(*writers, *readers)
    ears = [await house.wire(name) for name in readers]
    mouths = [await house.wire(name) for name in writers]

    async def write(number: int) -> list[int]:
        seqs = []
        for count in range(EACH):
            if number % 4 == 0:
                sent = await house.rest.as_user(writers[number]).messages.send(channel, f"{count}", key=f"k{count}")
                seqs.append(sent.seq)
            else:
                seqs.append((await mouths[number].send(channel, f"{count}", key=f"k{count}"))["seq"])
        return seqs

    acknowledged = await asyncio.gather(*(write(number) for number in range(WRITERS)))
    for seqs in acknowledged:
        assert seqs == sorted(seqs), "one writer's messages changed places"

    sid = house.sid(channel)
    seqs = [seq for (seq,) in house.sql(EVERYTHING, sid, sid)]
    head = 1 + WRITERS + READERS + WRITERS * EACH
    assert_gapless(seqs, 1, head, "the events in the database")
    assert house.sql("SELECT head FROM streams WHERE sid=?", sid) == [(head,)]
    stored = {(sender, seq) for sender, seq in house.sql("SELECT sender, seq FROM messages WHERE sid=?", sid)}
    assert stored == {(writers[number], seq) for number, own in enumerate(acknowledged) for seq in own}

    _, log = await house.log(channel)
    assert [event.seq for event in log] == seqs
    in_log = [(event.seq, event.message_id) for event in log if event.type == "message.created"]
    for ear in ears:
        await ear.until_seq(channel, head)
        seen = [(event["seq"], event["data"]["id"]) for event in ear.events if event["type"] == "message.created"]
        assert seen == in_log


async def test_d7_a_hundred_concurrent_copies_of_one_message_are_one_message(house: House) -> None:
    await house.users("ann", "ben")
    channel = await house.channel("ann", "ben")
    wires = [await house.wire("ann", device=f"d{number}") for number in range(4)]
    rest = house.rest.as_user("ann")

    async def copy(number: int) -> tuple[str, int]:
        if number % 5 == 4:
            sent = await rest.messages.send(channel, "once", key="the-key")
            return sent.id, sent.seq
        reply = await wires[number % 4].send(channel, "once", key="the-key")
        assert reply["type"] == "message.sent", reply
        return reply["id"], reply["seq"]

    results = set(await asyncio.gather(*(copy(number) for number in range(100))))
    assert len(results) == 1, results
    assert house.sql("SELECT count(*) FROM messages WHERE sid=?", house.sid(channel)) == [(1,)]
    # And years later.
    ((message_id, seq),) = results
    again = await wires[0].send(channel, "once", key="the-key")
    assert (again["id"], again["seq"], again.get("duplicate")) == (message_id, seq, True)
    # Somebody else's key of the same name is another key.
    other = await (await house.wire("ben")).send(channel, "once", key="the-key")
    assert other["seq"] == seq + 1


async def test_d7_d9_when_half_of_the_replies_are_lost_retries_store_nothing_twice(house: House) -> None:
    await house.users("ann", "cleo")
    channel = await house.channel("ann", "cleo")
    rng = random.Random(7)
    recorder = Recorder()
    async with ChaosProxy(house.server.port, seed=7) as proxy:
        proxy.set(drop_reply_share=0.5)
        async with Rest(
            f"http://127.0.0.1:{proxy.port}", api_key=house.api_key, attempts=1, timeout=5, random=rng
        ) as lossy:
            rest = lossy.as_user("ann")

            async def send(number: int) -> None:
                for _ in range(14):
                    with recorder.operation("ann", Send(channel, "ann", f"k{number}", body_digest("x"))) as operation:
                        try:
                            sent = await rest.messages.send(channel, "x", key=f"k{number}")
                        except (NotConnected, OutcomeUnknown, httpx.HTTPError) as error:
                            operation.info(type(error).__name__)
                            continue
                        operation.ok(message_id=sent.id, seq=sent.seq)
                        return

            await asyncio.gather(*(send(number) for number in range(24)))
        assert proxy.stats.replies_dropped >= 8
    epoch, log = await house.log(channel)
    recorder.final_log(channel, log, epoch=epoch)
    verdict = check(recorder.entries)
    assert verdict.ok, verdict.render()
    assert verdict.seen["unknown"] >= 8
    assert verdict.seen["acknowledged"] >= 20


async def test_d7_the_sdk_sends_everything_once_over_a_connection_that_loses_replies(house: House) -> None:
    await house.users("dora")
    channel = await house.channel("dora")
    async with ChaosProxy(house.server.port, seed=3) as proxy:
        async with Client(
            f"http://127.0.0.1:{proxy.port}",
            token=house.token("dora"),
            device="d1",
            transport="websocket",
            backoff=lambda rng: FullJitter(base=0.05, cap=0.2, random=rng),
        ) as chat:
            await chat.wait_connected(10)
            sends = []
            for number in range(30):
                if number % 3 == 0:
                    proxy.drop_reply()
                sends.append(await chat.channel(channel).send("y", key=f"k{number}", wait=False))
                if number % 3 == 2:
                    await sends[-1].sent(20)
            results = [await one.sent(20) for one in sends]
        assert proxy.stats.replies_dropped >= 5
    assert any(result.duplicate for result in results), "no reply was lost: this showed nothing"
    assert [result.seq for result in results] == list(range(3, 33))
    assert house.sql("SELECT count(*) FROM messages WHERE sid=?", house.sid(channel)) == [(30,)]


async def test_d8_the_same_key_with_another_body_is_refused_and_nothing_is_stored(house: House) -> None:
    await house.users("ann")
    channel = await house.channel("ann")
    wire = await house.wire("ann")
    first = await wire.send(channel, "body", key="k", custom={"a": 1})
    sid = house.sid(channel)
    before = house.sql(EVERYTHING, sid, sid)
    for changes in ({"text": "other"}, {"custom": {"a": 2}}, {"silent": True}, {"mentions": ["ann"]}):
        fields = {"text": "body", "custom": {"a": 1}, **changes}
        reply = await wire.ask("message.send", channel=channel, key="k", **fields)
        assert (reply["type"], reply.get("code")) == ("error", "key_reused"), changes
    with pytest.raises(Refused) as refused:
        await house.rest.as_user("ann").messages.send(channel, "other", key="k")
    assert refused.value.code == "key_reused"
    assert house.sql(EVERYTHING, sid, sid) == before
    again = await wire.send(channel, "body", key="k", custom={"a": 1})
    assert (again["id"], again["seq"]) == (first["id"], first["seq"])
