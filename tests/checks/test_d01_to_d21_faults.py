"""What goes wrong in the world: kills, frozen peers, bad networks, crowds, full disks. Each has its own server."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.checks.house import House, Wire, assert_gapless, open_house, wait_until
from tidings.client import Client, FullJitter, MessageCreated
from tidings.testing.chaos import ChaosProxy
from tidings.testing.checker import check
from tidings.testing.history import Send, body_digest
from tidings.testing.rawsocket import RawSocket
from tidings.testing.recorder import Recorder

HEARTBEAT_S = 1.0

# A client in a process of its own, so that it can be frozen.
_CLIENT = """
import asyncio, sys
from tidings.client import Client
async def main(url, token):
    async with Client(url, token=token, device="frozen", transport="websocket") as chat:
        await chat.wait_connected(20)
        print("connected", flush=True)
        async for _ in chat.events():
            pass
asyncio.run(main(*sys.argv[1:]))
"""


@pytest_asyncio.fixture
async def own_house(tmp_path: Path) -> AsyncIterator[House]:
    settings = {
        "TIDINGS_HEARTBEAT_SECONDS": str(HEARTBEAT_S),
        "TIDINGS_PRESENCE_GRACE_SECONDS": "0",
        "TIDINGS_OUTBOX_BYTES_MAX": "131072",
    }
    async with open_house(tmp_path, **settings) as house:
        yield house


@pytest_asyncio.fixture
async def plain_house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as house:
        yield house


@pytest.mark.timeout(180)
async def test_d1_what_was_acknowledged_survives_kill_9_under_load(plain_house: House) -> None:
    house, writers, kills = plain_house, 8, 6
    rng = random.Random(1)
    names = [f"w{number}" for number in range(writers)]
    await house.users(*names)
    channels = [await house.channel(*names) for _ in range(3)]
    recorder = Recorder()
    stop = asyncio.Event()
    sent = [0] * writers
    # Nobody connects to a server that is being killed and started.
    running = asyncio.Event()
    running.set()

    async def write(number: int) -> None:
        name = names[number]
        while not stop.is_set():
            await running.wait()
            try:
                wire = await house.wire(name, device=name)
                while not stop.is_set():
                    key = f"{name}/{sent[number]}"
                    channel = channels[sent[number] % len(channels)]
                    with recorder.operation(name, Send(channel, name, key, body_digest(key))) as operation:
                        reply = await wire.send(channel, key, key=key)
                        assert reply["type"] == "message.sent", reply
                        operation.ok(message_id=reply["id"], seq=reply["seq"])
                    # An unanswered one is sent again with its key by the next connection.
                    sent[number] += 1
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(writers):
            group.create_task(write(number))
        for _ in range(kills):
            target = sum(sent) + rng.randrange(150, 400)
            await wait_until(lambda target=target: sum(sent) >= target, "messages were sent between two kills", 30)
            running.clear()
            house.server.kill9()
            await house.server.restart()
            running.set()
        target = sum(sent) + 100
        await wait_until(lambda: sum(sent) >= target, "messages were sent after the last kill", 30)
        stop.set()
    for channel in channels:
        epoch, log = await house.log(channel)
        recorder.final_log(channel, log, epoch=epoch)
    verdict = check(recorder.entries)
    assert verdict.ok, verdict.render()
    assert verdict.seen["acknowledged"] >= 150 * kills
    assert verdict.seen["unknown"] >= kills, "no kill hit anything under way"


async def test_d17_a_frozen_client_is_noticed_within_two_heartbeats_and_shown_as_offline(own_house: House) -> None:
    house = own_house
    await house.users("iced", "watcher")
    await house.channel("iced", "watcher")
    watcher = await house.wire("watcher")
    pinging = asyncio.create_task(_ping_for_ever(watcher))
    command = [sys.executable, "-c", _CLIENT, house.server.url, house.token("iced")]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0)
    try:
        assert client.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(client.stdout.readline), 30)
        assert line == b"connected\n"
        reply = await watcher.ask("presence.watch", users=["iced"])
        assert [user["status"] for user in reply["users"]] == ["online"]
        client.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()

        def offline() -> bool:
            return any(f["type"] == "presence" and f["status"] == "offline" for f in watcher.frames)

        await watcher.until(offline, "the frozen client was shown as offline")
        # It was heard at most now; two heartbeats, the server's own tick, and a busy machine.
        assert time.monotonic() - stopped < 2 * HEARTBEAT_S + 0.5 + 4
        assert await house.metric("tidings_connections") == 1
        client.send_signal(signal.SIGCONT)
        await watcher.until(
            lambda: watcher.frames[-1]["type"] == "presence" and watcher.frames[-1]["status"] == "online",
            "the client came back by itself",
        )
    finally:
        pinging.cancel()
        os.killpg(client.pid, signal.SIGKILL)
        client.wait()
        assert client.stdout is not None
        client.stdout.close()


async def _ping_for_ever(wire: Wire) -> None:
    while True:
        await wire.post("ping")
        await asyncio.sleep(HEARTBEAT_S / 2)


async def test_d18_a_client_converges_after_cuts_and_black_holes(own_house: House) -> None:
    house = own_house
    await house.users("ann", "bob")
    channel = await house.channel("ann", "bob")
    seen: list[int] = []
    async with (
        ChaosProxy(house.server.port, seed=1) as proxy,
        Client(
            f"http://127.0.0.1:{proxy.port}",
            token=house.token("bob"),
            device="d1",
            transport="websocket",
            backoff=lambda rng: FullJitter(base=0.05, cap=0.2, random=rng),
        ) as bob,
    ):
        await bob.wait_connected(10)

        async def take() -> None:
            async for event in bob.events(channel):
                assert isinstance(event, MessageCreated)
                seen.append(event.seq)

        taking = asyncio.create_task(take())
        ann = house.rest.as_user("ann")
        last = 3
        for trouble in ("none", "cut", "stall_down", "stall_up", "refuse", "half_close"):
            if trouble == "cut":
                proxy.cut()
            elif trouble.startswith("stall"):
                proxy.set(**{trouble: True})
            elif trouble == "refuse":
                await proxy.refuse_connections()
                proxy.cut()
            elif trouble == "half_close":
                proxy.half_close("down")
            accepted = proxy.stats.accepted
            for number in range(20):
                last = (await ann.messages.send(channel, "x", key=f"{trouble}{number}")).seq
            if trouble.startswith("stall"):
                # Both sides must notice by themselves.
                await wait_until(lambda n=accepted: proxy.stats.accepted > n, f"the client noticed {trouble}")
            proxy.heal()
            await proxy.accept_connections()
            await wait_until(lambda last=last: seen and seen[-1] >= last, f"it converged after {trouble}")
        assert_gapless(seen, 4, last, "what the client showed")
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


@pytest.mark.timeout(180)
async def test_d19_one_that_never_reads_costs_bounded_memory_and_delays_nobody(own_house: House) -> None:
    house, readers, rounds, size = own_house, 6, 20, 60
    names = [f"r{number}" for number in range(readers)]
    await house.users("speaker", "stuck", *names)
    channel = await house.channel("speaker", "stuck", *names)
    epoch = (await house.rest.streams.events(channel, 0, limit=1)).epoch
    ears = [await house.wire(name) for name in names]
    speaker = await house.wire("speaker")
    text = "x" * 8000
    head = 3 + readers

    async def talk(phase: str) -> int:
        """Everybody else has all of a round before the next one begins; what the server has grown by, in bytes."""
        nonlocal head
        before = house.server.memory().private
        for number in range(rounds):
            replies = await asyncio.gather(
                *(speaker.send(channel, text, key=f"{phase}{number}/{n}") for n in range(size))
            )
            first, head = head + 1, max(reply["seq"] for reply in replies)
            for ear in (*ears, speaker):
                await ear.until_seq(channel, head)
                assert_gapless(ear.seqs(channel), first, head, "a reader")
                ear.events.clear()
                ear.frames.clear()
                await ear.post("ping")
        return house.server.memory().private - before

    for ear in (*ears, speaker):
        ear.events.clear()
    # Twice without: the first time fills caches.
    await talk("warm")
    without = await talk("without")
    stuck = await RawSocket.open(house.server.port, receive_buffer=4096)
    async with stuck:
        await stuck.handshake("/v1/ws")
        await stuck.send_json({"type": "connect", "token": house.token("stuck"), "device": {"id": "d1"}})
        await stuck.read_frame()
        stuck.pause_reading()
        held = await talk("with") - without
    # What it did not read was ten megabytes.
    assert held < rounds * size * len(text) // 2, f"the one that never reads costs {held} bytes"
    # It comes back and has missed nothing.
    again = await house.wire("stuck", connect={"positions": {channel: {"seq": 0, "epoch": epoch}}})
    await again.until_seq(channel, head)
    assert_gapless(again.seqs(channel), 1, head, "the slow reader")


async def storm(house: House, clients: int) -> None:
    names = [f"s{number}" for number in range(clients)]
    await house.users("speaker", *names)
    groups = [await house.channel("speaker", *names[start : start + 50]) for start in range(0, clients, 50)]
    wires = await asyncio.gather(*(house.wire(name, device="d") for name in names))
    speaker = await house.wire("speaker")
    for channel in groups:
        await speaker.send(channel, "before", key="before")
    for number, wire in enumerate(wires):
        await wire.until(lambda w=wire, c=groups[number // 50]: w.seqs(c), "the message before the storm came")
    marks = [wire.frames[0]["mark"] for wire in wires]
    positions = [wire.seqs(groups[number // 50])[-1] for number, wire in enumerate(wires)]
    house.server.kill9()
    await asyncio.gather(*(wire.until_closed() for wire in (*wires, speaker)))
    await house.server.restart()
    for channel in groups:
        await house.rest.as_user("speaker").messages.send(channel, "missed", key="missed")

    async def back(number: int) -> None:
        channel = groups[number // 50]
        wire = await house.wire(names[number], device="d", connect={"since": marks[number]})
        assert channel in [head["stream"] for head in wire.frames[0]["moved"]]
        await wire.ask("sync", positions={channel: {"seq": positions[number]}})
        await wire.until_seq(channel, positions[number] + 1, 60)
        assert wire.seqs(channel) == [positions[number] + 1]

    # All at once; an ordinary client would spread itself.
    await asyncio.gather(*(back(number) for number in range(clients)))
    assert await house.metric("tidings_connections") == clients
    reply = await house.rest.as_user("speaker").messages.send(groups[0], "after", key="after")
    assert reply.seq == positions[0] + 2


@pytest.mark.timeout(180)
async def test_d20_five_hundred_clients_drop_at_once_and_come_back_to_what_they_missed(plain_house: House) -> None:
    await storm(plain_house, 500)


@pytest.mark.soak
async def test_d20_two_thousand_clients_drop_at_once_and_come_back_to_what_they_missed(plain_house: House) -> None:
    await storm(plain_house, 2000)


async def _send_until(
    house: House, wire: Wire, channel: str, want: str, prefix: str
) -> list[tuple[str, dict[str, Any]]]:
    """Send until a reply is of the wanted type; every key with its reply."""
    replies: list[tuple[str, dict[str, Any]]] = []
    deadline = time.monotonic() + 30
    while not replies or replies[-1][1]["type"] != want:
        assert time.monotonic() < deadline, f"no {want}: {replies[-3:]}\n{house.server.tail()}"
        key = f"{prefix}{len(replies)}"
        replies.append((key, await wire.send(channel, "x" * 5000, key=key)))
    return replies


@pytest.mark.sqlite
async def test_d21_on_a_full_disk_sends_are_refused_and_recovery_is_automatic(plain_house: House) -> None:
    house = plain_house
    await house.users("ann", "bob")
    channel = await house.channel("ann", "bob")
    ann, bob = await house.wire("ann"), await house.wire("bob")
    good = await _send_until(house, ann, channel, "message.sent", "a")
    # No file may grow beyond what the log has now: writes fail as on a full disk (EFBIG instead of ENOSPC).
    size = (house.server.data / "tidings.db-wal").stat().st_size
    resource.prlimit(house.server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    refused = await _send_until(house, ann, channel, "error", "b")
    assert refused[-1][1]["code"] == "unavailable"
    assert refused[-1][1]["retry"] == "later"
    reply = await ann.send(channel, "x" * 5000, key="c")
    assert reply.get("code") == "unavailable", "what fails must go on failing while the disk is full"
    # Reading goes on.
    assert (await bob.ask("history", channel=channel, limit=1))["type"] == "history"
    resource.prlimit(house.server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    later = await _send_until(house, ann, channel, "message.sent", "d")
    _, log = await house.log(channel)
    assert_gapless([event.seq for event in log], 1, len(log))
    stored = {event.key: event.seq for event in log if event.key}
    for key, reply in (*good, *refused, *later):
        if reply["type"] == "message.sent":
            assert stored.pop(key) == reply["seq"], "acknowledged, but not there"
    assert not stored, f"refused, but there: {stored}"
    await bob.until_seq(channel, log[-1].seq)
    assert_gapless(bob.seqs(channel), bob.seqs(channel)[0], log[-1].seq, "what bob saw")
    # Nothing depended on this process having gone on.
    await house.server.restart()
    _, after = await house.log(channel)
    assert after == log


@pytest.mark.sqlite
async def test_d21_while_somebody_else_holds_the_database_sends_are_refused_and_then_taken_again(
    plain_house: House,
) -> None:
    house = plain_house
    await house.users("ann")
    channel = await house.channel("ann")
    ann = await house.wire("ann")
    with closing(sqlite3.connect(house.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        reply = await ann.send(channel, "x", key="held")
        assert (reply["type"], reply["code"]) == ("error", "unavailable"), reply
        other.execute("ROLLBACK")
    reply = await ann.send(channel, "x", key="held")
    assert (reply["type"], reply["seq"], reply.get("duplicate", False)) == ("message.sent", 3, False)
