"""Catching up: 100,000 missed messages in one channel, and one missed message among many quiet channels."""

from __future__ import annotations

import asyncio
import json
import time

from bench.fill import Fill, kept_server
from bench.measure import Findings, at_least, at_most
from bench.plan import Plan
from bench.server import BenchServer
from bench.setup import acting
from bench.sockets import connect
from bench.workers import Link, worker
from tidings.client import Client, MessageCreated

MISSED = 100_000
FEW = 10
MANY = 10_000
READER = "reader"
WRITER = "writer"
CHANNEL = "busy"
COMMAND_EVERY = 100


async def run(plan: Plan, findings: Findings) -> None:
    missed = plan.size(MISSED, 5_000)

    async def make(fill: Fill) -> None:
        await fill.users([READER, WRITER])
        await fill.groups({CHANNEL: [READER, WRITER]})
        await fill.messages(CHANNEL, WRITER, missed)

    async with kept_server(f"catchup-{missed}", make) as server:
        token = server.credentials.token(READER)
        for name, drive in (
            ("bare client", drive_bare),
            ("Python SDK", drive_sdk),
            ("SDK with commands", drive_sdk_with_commands),
        ):
            for turn in range(plan.runs):
                async with worker(drive, server.port, token, f"{drive.__name__}-{turn}", missed) as link:
                    await link.receive()
                    before = server.cpu_time()
                    seconds, count = await link.ask()
                    cpu = server.cpu_time() - before
                findings.add(f"{name}: events, by the clock", count / seconds, "1/s", at_least(30_000))
                findings.add(f"{name}: events per server core-second", count / cpu.total_s, "1/s")
    findings.note(f"{missed} messages of 200 bytes of text in one channel, from its beginning to `synced`.")
    findings.note(f"With commands: the application waits for the reply to one after every {COMMAND_EVERY} events.")


async def drive_bare(link: Link, port: int, token: str, device: str, missed: int) -> None:
    link.send("ready")
    await link.receive()
    synced = asyncio.Event()
    began = time.perf_counter()
    one = await connect(port, token, device, positions={CHANNEL: {"seq": 0}})

    def other(payload: bytes) -> None:
        if payload.startswith(b'{"type":"synced"'):
            synced.set()

    one.on_other = other
    await one.until(synced)
    if one.events != missed:
        raise RuntimeError(f"{one.events} messages came instead of {missed}")
    link.send((time.perf_counter() - began, one.events))
    await link.receive()


async def drive_sdk(link: Link, port: int, token: str, device: str, missed: int) -> None:
    await _drive_sdk(link, port, token, device, missed, missed)


async def drive_sdk_with_commands(link: Link, port: int, token: str, device: str, missed: int) -> None:
    """An application that has something to say while it catches up: the reply comes behind what it has not read."""
    await _drive_sdk(link, port, token, device, missed, COMMAND_EVERY)


async def _drive_sdk(link: Link, port: int, token: str, device: str, missed: int, command_every: int) -> None:
    link.send("ready")
    await link.receive()
    began = time.perf_counter()
    async with Client(f"http://127.0.0.1:{port}", token=token, device=device, start="all") as chat:
        events = chat.channel(CHANNEL).events()
        count = 0
        while count < missed:
            if isinstance(await anext(events), MessageCreated):
                count += 1
                if count % command_every == 0:
                    await chat.set_presence("online")
        link.send((time.perf_counter() - began, count))
        await link.receive()


async def run_quiet(plan: Plan, findings: Findings) -> None:
    counts = (FEW, plan.size(MANY, 300))

    async def make(fill: Fill) -> None:
        await fill.users([WRITER, *(f"{READER}-{count}" for count in counts)])
        for count in counts:
            await fill.groups({f"quiet-{count}-{n}": [WRITER, f"{READER}-{count}"] for n in range(count)})

    async with kept_server(f"quiet-{counts[1]}", make) as server:
        tokens = [server.credentials.token(f"{READER}-{count}") for count in counts]
        marks = []
        for count, token in zip(counts, tokens, strict=True):
            async with worker(drive_first, server.port, token) as link:
                await link.receive()
                before = server.cpu_time()
                await link.ask()
                cpu = (server.cpu_time() - before).total_s
            findings.add(f"among {count} channels: server CPU, first connect", cpu * 1e3, "ms")
            async with worker(drive_mark, server.port, token) as link:
                marks.append(await link.receive())
        for turn in range(plan.runs + 1):
            costs = []
            for count, token, mark in zip(counts, tokens, marks, strict=True):
                async with worker(drive_quiet, server.port, token, mark) as link:
                    await link.receive()
                    # What the reader misses is written while nobody else is connected.
                    await write_one(server, f"quiet-{count}-0", f"t{time.time_ns()}")
                    before = server.cpu_time()
                    cost = await link.ask()
                    cpu = (server.cpu_time() - before).total_s
                costs.append((cost[0], cpu, cost[1]))
                if turn:
                    findings.add(f"among {count} channels: received", cost[0], "bytes")
                    findings.add(f"among {count} channels: server CPU", cpu * 1e3, "ms")
                    findings.add(f"among {count} channels: by the clock", cost[1] * 1e3, "ms")
            if turn:
                few, many = costs
                findings.add(f"{counts[1]} to {FEW} channels: bytes", many[0] / few[0], "×", at_most(1.2))
                findings.add(f"{counts[1]} to {FEW} channels: server CPU", many[1] / few[1], "×", at_most(1.2))
                findings.add(f"{counts[1]} to {FEW} channels: by the clock", many[2] / few[2], "×")
    findings.note("From the start of the connection, with an old mark, to `synced` with the one missed message.")


async def write_one(server: BenchServer, channel: str, key: str) -> None:
    async with acting(server, WRITER) as rest:
        await rest.messages.send(channel, "x" * 200, key=key)


async def drive_first(link: Link, port: int, token: str) -> None:
    link.send("ready")
    await link.receive()
    await connect(port, token)
    link.send("connected")
    await link.receive()


async def drive_mark(link: Link, port: int, token: str) -> None:
    """Find a mark since which nothing has moved. Marks have a margin of seconds: what moved within it is told again,
    and the mark stays until the device says that it has it. This one asks for a new mark instead."""
    mark = None
    while True:
        one = await connect(port, token, **({} if mark is None else {"since": mark}))
        connected = json.loads(await one.connected)
        one.transport.disconnect()
        if mark is not None and not connected.get("moved"):
            break
        mark = connected["mark"] if mark is None else None
        await asyncio.sleep(0.2)
    link.send(mark)
    await link.receive()


async def drive_quiet(link: Link, port: int, token: str, mark: str) -> None:
    link.send("ready")
    await link.receive()
    began = time.perf_counter()
    one = await connect(port, token, since=mark)
    connected = await one.connected
    moved = json.loads(connected).get("moved", [])
    received = len(connected)
    left = len(moved)
    synced = asyncio.Event()

    def other(payload: bytes) -> None:
        nonlocal received, left
        received += len(payload)
        if payload.startswith(b'{"type":"synced"'):
            left -= 1
            if left == 0:
                synced.set()

    one.on_other = other
    # A device that has everything but the last event of each.
    positions = {head["stream"]: {"seq": head["head"] - 1, "epoch": head["epoch"]} for head in moved}
    one.send(json.dumps({"type": "sync", "ref": 2, "positions": positions}).encode())
    await one.until(synced)
    if one.events != 1:
        raise RuntimeError(f"{one.events} messages came instead of 1; moved: {[head['stream'] for head in moved]}")
    link.send((received + one.bytes, time.perf_counter() - began))
    await link.receive()
