"""Joining, leaving, sending and reading in a channel of a thousand members and in one of a hundred thousand."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TypeAlias

from bench.fill import Fill, kept_server
from bench.measure import Findings, at_most
from bench.plan import Plan
from bench.server import BenchServer
from bench.sockets import Socket, acknowledge_all, connect_all, flood, message
from bench.workers import Link, worker
from tidings.wire.limits import BULK_MAX

CONNECTED = 10
TEXT = "x" * 200
PAGE = 50
WARM_UP = 30
# Messages unacknowledged: as of people who do not wait for one another.
WINDOW = 8

# Method, path, token and body of a request.
Request: TypeAlias = tuple[str, str, str, bytes]


async def run(plan: Plan, findings: Findings) -> None:
    largest = 4 if plan.quick else 5
    sizes = [10**3, 10**largest]
    count = plan.size(300, 30)
    joining = [f"new-{n}" for n in range(count)]

    async def make(fill: Fill) -> None:
        await fill.users(joining)
        for size in sizes:
            # With room for those who come: a type has a most.
            users = [_user(size, n) for n in range(size - count)]
            await fill.users(users)
            await fill.groups({f"c-{size}": users}, type="public")
            await fill.messages(f"c-{size}", users[0], 1_000)

    async with kept_server(f"large-{largest}", make) as server:
        token = server.credentials.token
        people = {size: [token(_user(size, n * 60)) for n in range(CONNECTED)] for size in sizes}
        async with worker(drive, server.port, people) as link:
            await link.receive()
            for turn in range(plan.runs + 1):
                costs: dict[str, list[float]] = {}
                for size in sizes:
                    some = joining if turn else joining[:3]
                    for what, cpu in await _all(server, link, size, people[size], some):
                        costs.setdefault(what, []).append(cpu)
                        if turn:
                            findings.add(f"{what}, at 10^{len(str(size)) - 1}: server CPU", cpu * 1e6, "µs")
                for what, (few, many) in costs.items():
                    if turn:
                        findings.add(f"{what}: CPU at 10^{largest} to 10^3", many / few, "×", at_most(1.2))
            for size in sizes:
                owners = ("GET", f"/v1/channels/c-{size}/members?role=owner", people[size][0], b"")
                cpu = await _cost(server, link, [owners] * WARM_UP)
                findings.add(f"looking for owners, at 10^{len(str(size)) - 1}: server CPU", cpu * 1e3, "ms")
                cpu = await _cost(server, link, [_counts(await _newest(server, size), size, people[size][0])])
                findings.add(f"looking through positions, at 10^{len(str(size)) - 1}: server CPU", cpu * 1e3, "ms")
    findings.note(
        f"{CONNECTED} members of each are connected and hear everything. One request at a time over one connection, "
        f"{count} of each in a run, sizes in turn. Positions are looked through once in ten seconds at most, however "
        "many ask for a message's receipts."
    )


async def _all(
    server: BenchServer, link: Link, size: int, people: list[str], joining: list[str]
) -> list[tuple[str, float]]:
    """What each thing costs, in CPU seconds. Who joins leaves again."""
    path = f"/v1/channels/c-{size}"
    newcomers = [server.credentials.token(user) for user in joining]
    count = max(WARM_UP, len(newcomers))
    reader = people[1]
    found = [
        ("join", await _cost(server, link, [("POST", f"{path}/join", one, b"") for one in newcomers])),
        ("leave", await _cost(server, link, [("POST", f"{path}/leave", one, b"") for one in newcomers])),
    ]
    adding = [_add(server, path, joining[start : start + BULK_MAX]) for start in range(0, len(joining), BULK_MAX)]
    found.append((f"one of {BULK_MAX} added at once", await _cost(server, link, adding, per=len(newcomers))))
    await _cost(server, link, [("POST", f"{path}/leave", one, b"") for one in newcomers])
    sends = [_send(path, one) for one in people]
    joins = [request for one in newcomers for request in (("POST", f"{path}/join", one, b""), *sends)]
    found.append(("join, then 10 members send", await _cost(server, link, joins, per=len(newcomers))))
    await _cost(server, link, [("POST", f"{path}/leave", one, b"") for one in newcomers])
    before = server.cpu_time()
    await link.ask(("flood", size, count))
    found.append(("send, delivered to 10", (server.cpu_time() - before).total_s / count))
    for what, read in (
        (f"{PAGE} members", f"{path}/members?limit={PAGE}"),
        ("the channel", path),
        (f"latest {PAGE} messages", f"{path}/messages?limit={PAGE}"),
        ("unread count", "/v1/unread"),
    ):
        found.append((what, await _cost(server, link, [("GET", read, reader, b"")] * count)))
    return found


def _user(size: int, number: int) -> str:
    return f"of-{size}-{number:06}"


def _add(server: BenchServer, path: str, users: list[str]) -> Request:
    return "POST", f"{path}/members", server.credentials.api_key, json.dumps({"users": users}).encode()


def _send(path: str, token: str) -> Request:
    return "POST", f"{path}/messages", token, json.dumps({"text": TEXT}).encode()


async def _newest(server: BenchServer, size: int) -> str:
    async with server.rest() as rest:
        return (await rest.messages.page(f"c-{size}", limit=1)).messages[0].id


def _counts(message_id: str, size: int, token: str) -> Request:
    return "GET", f"/v1/channels/c-{size}/messages/{message_id}/receipts", token, b""


async def _cost(server: BenchServer, link: Link, requests: list[Request], *, per: int = 0) -> float:
    """Server CPU seconds of one request, or of one of `per` groups of them."""
    before = server.cpu_time()
    await link.ask(("requests", requests))
    return (server.cpu_time() - before).total_s / (per or len(requests))


async def drive(link: Link, port: int, people: dict[int, list[str]]) -> None:
    members = {size: await connect_all(port, tokens) for size, tokens in people.items()}
    acknowledging = acknowledge_all([one for some in members.values() for one in some])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    link.send("ready")
    number = 0
    while True:
        order, *more = await link.receive()
        if order == "requests":
            for request in more[0]:
                await _ask(reader, writer, request)
        else:
            size, count = more
            sender = members[size][0]
            number = await flood(sender, number, count, window=WINDOW, frame=partial(_frame, sender, f"c-{size}"))
        if acknowledging.done():
            acknowledging.result()
        link.send(None)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> None:
    method, path, token, body = request
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if method == "POST" else ""
    writer.write(f"{head}{kind}\r\n".encode() + body)
    said = await reader.readuntil(b"\r\n\r\n")
    length = said.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
    answer = await reader.readexactly(int(length or 0))
    if not said.startswith(b"HTTP/1.1 2"):
        raise RuntimeError(f"{method} {path}: {said.decode()}{answer.decode()}")


def _frame(sender: Socket, channel: str, number: int) -> bytes:
    return message(number, channel, f"l-{id(sender)}-{number}", TEXT)
