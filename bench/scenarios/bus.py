"""The bus between nodes: what it costs to follow streams, to tell and to hear, and what a server pays for having it."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from pathlib import Path
from typing import Any

from bench.measure import Findings, at_most
from bench.plan import Plan
from bench.scenarios.fanout import MEMBERS, drive, ward
from bench.server import fresh_server, scratch
from bench.workers import worker
from tidings.server.bus.base import Notice, Published
from tidings.server.bus.nats import NatsBus
from tidings.server.bus.nats_link import read_address
from tidings.server.telemetry import setup_logging
from tidings.testing.nats import NatsProcess

STREAMS = 10_000
# A short message as an event.
PAYLOAD = b"x" * 300
# Notices handed over in one turn of the loop, as a commit of many brings them.
AT_ONCE = 20


async def run(plan: Plan, findings: Findings) -> None:
    setup_logging(level="warning")
    with scratch() as folder:
        async with NatsProcess(folder / "nats") as nats:
            for number in range(plan.runs):
                await _nodes(plan, findings, nats.url, number)
                if importlib.util.find_spec("nats") is not None:
                    await _official(plan, findings, nats.url, number)
            for environment, name in ((None, "alone"), ({"TIDINGS_BUS": nats.url}, "on a bus")):
                await _flood(plan, findings, environment, name)
    alone, on_bus = (findings.measures[f"server CPU per message, {name}"] for name in ("alone", "on a bus"))
    findings.add("ratio", on_bus.median / alone.median, "×", at_most(1.3))
    findings.note(
        f"Two nodes in one process around one NATS server, {len(PAYLOAD)} bytes, {AT_ONCE} in each turn of the loop; "
        "CPU is of both, memory of the first run. The flood is that of `flood`, nobody else on the bus. "
        "The official client is measured if it is "
        "installed (`pip install nats-py`)."
    )


async def _nodes(plan: Plan, findings: Findings, url: str, run: int) -> None:
    here, there = (NatsBus([read_address(url)], node=node, cluster=f"run{run}") for node in "ab")
    await here.open(5)
    await there.open(5)
    memory, cpu = _memory(), time.process_time()
    for sid in range(STREAMS):
        there.follow(sid)
    await there.settle()
    findings.add("to follow a stream, CPU", (time.process_time() - cpu) / STREAMS * 1e6, "µs")
    if run == 0:
        # Later runs find memory that earlier ones have left.
        findings.add("to follow a stream, memory", (_memory() - memory) / STREAMS, "B")
    count = plan.size(50_000, 5_000)
    done = asyncio.Event()
    heard = 0

    def hear(notice: Notice) -> None:
        nonlocal heard
        heard += type(notice) is Published
        if heard == count:
            done.set()

    there.listen(hear)
    cpu = time.process_time()
    for number in range(count):
        here.publish(Published(number % 100, number, PAYLOAD))
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
    await done.wait()
    findings.add("a notice told and heard, CPU", (time.process_time() - cpu) / count * 1e6, "µs")
    await here.close()
    await there.close()


async def _official(plan: Plan, findings: Findings, url: str, run: int) -> None:
    nats: Any = importlib.import_module("nats")
    here, there = await nats.connect(url), await nats.connect(url)
    count = plan.size(50_000, 5_000)
    done = asyncio.Event()
    heard = 0

    async def hear(_: Any) -> None:
        nonlocal heard
        heard += 1
        if heard == count:
            done.set()

    memory, cpu = _memory(), time.process_time()
    for sid in range(STREAMS):
        await there.subscribe(f"official.{sid}", cb=hear)
    await there.flush()
    findings.add("official client: to follow, CPU", (time.process_time() - cpu) / STREAMS * 1e6, "µs")
    if run == 0:
        findings.add("official client: to follow, memory", (_memory() - memory) / STREAMS, "B")
    cpu = time.process_time()
    for number in range(count):
        await here.publish(f"official.{number % 100}", PAYLOAD)
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
    await here.flush()
    await done.wait()
    findings.add("official client: told and heard, CPU", (time.process_time() - cpu) / count * 1e6, "µs")
    await here.close()
    await there.close()


async def _flood(plan: Plan, findings: Findings, environment: dict[str, str] | None, name: str) -> None:
    messages = plan.size(5_000, 500)
    async with fresh_server(environment=environment) as server:
        tokens = await ward(server)
        async with worker(drive, server.port, tokens, None) as link:
            await link.receive()
            await link.ask(("flood", messages // 10))
            for _ in range(plan.runs):
                before = server.cpu_time()
                await link.ask(("flood", messages))
                cpu = server.cpu_time() - before
                findings.add(f"server CPU per message, {name}", cpu.total_s / messages * 1e6, "µs")
                findings.add(f"server CPU per delivery, {name}", cpu.total_s / messages / MEMBERS * 1e6, "µs")


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
