"""`python -m bench.capacity`: how many nodes, computed from what was measured.

Reads bench/results.json (`make bench ARGS="--save"`); every cost and assumption can be given instead. `--write` puts
the tables into docs/operate/capacity.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .results import PATH, load, median

PAGE = Path(__file__).parents[1] / "docs/operate/capacity.md"
BEGIN, END = "<!-- python -m bench.capacity --write: begin -->", "<!-- python -m bench.capacity --write: end -->"
USERS = (10_000, 1_000_000, 100_000_000)


def _number(help: str, default: float, unit: str = "") -> Any:
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True)
class Costs:
    """What one thing costs a node: CPU in µs, memory in KiB. `source` says where each number is from."""

    connect: float = _number("a connect: TCP, upgrade, token, memberships", 0, "µs of CPU")
    send: float = _number("a send, its answer and two deliveries, many under way", 0, "µs of CPU")
    delivery: float = _number("a delivery to one more socket, one message at a time", 0, "µs of CPU")
    store: float = _number("a message, in PostgreSQL", 0, "µs of its CPU")
    memory: float = _number("an idle connection, in 11 channels", 0, "KiB")
    base: float = _number("a node without connections", 0, "MiB")


# Cost -> scenario and measure. The first that was measured counts: sends over the database that nodes share, if there
# are such results, else over the embedded one.
SOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    "connect": (("connects", "server CPU per connect"),),
    "send": (("sends-postgres", "50 clients: node CPU per message"), ("sends", "server CPU per message")),
    "delivery": (("fanout", "server CPU per delivery"),),
    "store": (("sends-postgres", "50 clients: PostgreSQL's CPU per message"),),
    "memory": (
        ("memory", "RSS per connection, in 10 more groups of 100"),
        ("memory", "RSS per connection, in one direct channel each"),
    ),
    "base": (("memory", "server before, RSS"),),
}

# What is taken where it was neither measured nor given.
ESTIMATED = {"store": 200.0}


@dataclass(frozen=True)
class Assumed:
    """What people do, and how full a node may be. None of it is measured: change it to what yours do."""

    devices: float = _number("connections of one connected user", 1.3)
    sends_per_hour: float = _number("messages that a connected user sends in the busiest hour", 6, "per hour")
    recipients: float = _number("connections that get each message", 10)
    session_minutes: float = _number("how long a connection lasts", 30, "minutes")
    ping_cost: float = _number("a heartbeat, both ways (estimated)", 40, "µs of CPU")
    hear_cost: float = _number("an event that a node hears over the bus (estimated)", 40, "µs of CPU")
    heartbeat_seconds: float = _number("between two of them", 25, "s")
    load: float = _number("how busy the one core of a node may be in that hour", 0.5, "of a core")
    connections: float = _number("connections on one node, as connections_max", 50_000)
    kernel_memory: float = _number("the kernel's part of a connection (estimated)", 10, "KiB")
    node_memory: float = _number("memory of a node", 2_048, "MiB")
    spare: float = _number("nodes that may be lost without anybody noticing, at least 1 in 20", 1, "nodes")
    message_bytes: float = _number("stored of one message, with its indexes and its outbox row", 900, "bytes")
    database_cores: float = _number("cores of one PostgreSQL server, as busy as a node", 8, "cores")
    bus_messages: float = _number("events a second that one NATS server passes on (estimated)", 500_000, "per s")


@dataclass(frozen=True)
class Need:
    """What so many connected users need in the busiest hour."""

    users: int
    connections: float
    sends: float
    deliveries: float
    cores: float
    nodes: int
    bound_by: str
    node_load: float
    node_memory: float
    return_seconds: float
    databases: int
    bus: int
    stored: float


def need(users: int, costs: Costs, assumed: Assumed) -> Need:
    """How much of everything. Per second and in bytes where nothing else is said."""
    connections = users * assumed.devices
    sends = users * assumed.sends_per_hour / 3600
    # The cost of a send has two deliveries in it.
    deliveries = sends * assumed.recipients
    connects = connections / (assumed.session_minutes * 60)
    alone = (
        sends * costs.send
        + sends * max(0.0, assumed.recipients - 2) * costs.delivery
        + connects * costs.connect
        + connections / assumed.heartbeat_seconds * assumed.ping_cost
    ) / 1e6
    memory = (costs.memory + assumed.kernel_memory) / 1024
    nodes = least = 1
    passed = cores = 0.0
    wanted: dict[str, float] = {}
    # More nodes hear more: after a few rounds the number stands.
    for _ in range(8):
        passed = sends * min(nodes, assumed.recipients) if nodes > 1 else 0.0
        cores = alone + passed * assumed.hear_cost / 1e6
        wanted = {
            "processor": cores / assumed.load,
            "connections_max": connections / assumed.connections,
            "memory": connections * memory / (assumed.node_memory - costs.base),
        }
        least = max(1, math.ceil(max(wanted.values())))
        nodes = least + max(math.ceil(assumed.spare), math.ceil(least / 20))
    bound_by = max(wanted, key=lambda name: wanted[name])
    # One node is lost: the others take its connections with what they have left.
    left = (nodes - 1) * (1 - cores / nodes)
    per_node = connections / nodes
    databases = max(1, math.ceil(sends * costs.store / 1e6 / (assumed.load * assumed.database_cores)))
    return Need(
        users,
        connections,
        sends,
        deliveries,
        cores,
        nodes,
        bound_by,
        cores / nodes,
        costs.base + per_node * memory,
        per_node * costs.connect / 1e6 / left,
        databases,
        3 * max(1, math.ceil(passed / assumed.bus_messages / 3)),
        sends * assumed.message_bytes,
    )


def measured(results: dict[str, dict[str, Any]], given: dict[str, float]) -> tuple[Costs, dict[str, str]]:
    """The costs and where each is from. Raises LookupError naming what is neither measured nor given."""
    costs: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name, places in SOURCES.items():
        if name in given:
            costs[name], sources[name] = given[name], "given"
            continue
        for scenario, measure in places:
            value = median(results, scenario, measure)
            if value is not None:
                costs[name], sources[name] = value, f"`{scenario}`, {results[scenario].get('on', 'undated')}"
                break
        else:
            if name in ESTIMATED:
                costs[name], sources[name] = ESTIMATED[name], "estimated, not measured"
                continue
            wanted = " or ".join(sorted({scenario for scenario, _ in places}))
            raise LookupError(f'{name} was not measured: make bench ARGS="--save {wanted}", or give --{name}')
    return Costs(**costs), sources


def report(costs: Costs, sources: dict[str, str], assumed: Assumed, users: tuple[int, ...] = USERS) -> str:
    """Three tables: what was measured, what is assumed, and what follows."""
    lines = ["| measured: what it costs a node | | | from |", "|---|--:|---|---|"]
    for one in dataclasses.fields(costs):
        value = getattr(costs, one.name)
        lines.append(f"| {one.metadata['help']} | {_text(value)} | {one.metadata['unit']} | {sources[one.name]} |")
    lines += ["", "| assumed | | | flag |", "|---|--:|---|---|"]
    for one in dataclasses.fields(assumed):
        value = getattr(assumed, one.name)
        lines.append(f"| {one.metadata['help']} | {_text(value)} | {one.metadata['unit']} | `{_flag(one.name)}` |")
    found = [need(count, costs, assumed) for count in users]

    def row(name: str, *values: str) -> str:
        return f"| {name} | " + " | ".join(values) + " |"

    lines += [
        "",
        row("connected users", *(_text(one.users) for one in found)),
        "|---|" + "--:|" * len(found),
        row("connections", *(_text(one.connections) for one in found)),
        row("messages sent, per second", *(_text(one.sends) for one in found)),
        row("delivered, per second", *(_text(one.deliveries) for one in found)),
        row("cores busy with that", *(_text(one.cores) for one in found)),
        row("**nodes**, spare ones included", *(f"**{_text(one.nodes)}**" for one in found)),
        row("decided by", *(one.bound_by for one in found)),
        row("a node is busy for", *(f"{one.node_load:.0%}" for one in found)),
        row("memory of a node, MiB", *(_text(one.node_memory) for one in found)),
        row("seconds that the others need for a lost node's clients", *(_text(one.return_seconds) for one in found)),
        row("PostgreSQL servers that write, each with a standby", *(_text(one.databases) for one in found)),
        row("NATS servers", *(_text(one.bus) for one in found)),
        row("stored in the busiest hour, GB", *(_text(one.stored * 3600 / 1e9) for one in found)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _text(value: float) -> str:
    if value >= 100 or value == int(value):
        # Three digits: the fourth would be a lie.
        shown = round(value, -(len(str(int(value))) - 3)) if value >= 1000 and value != int(value) else round(value)
        return f"{int(shown):,}"
    return f"{value:.3g}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--results", type=Path, default=PATH, help="what `make bench ARGS=--save` has kept")
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS), help="connected users")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    for one in (*dataclasses.fields(Costs), *dataclasses.fields(Assumed)):
        words = f"{one.metadata['help']} {one.metadata['unit']}".replace("%", "%%")
        parser.add_argument(_flag(one.name), type=float, default=None, help=words)
    options = vars(parser.parse_args(arguments))
    given = {name: value for name, value in options.items() if value is not None}
    try:
        costs, sources = measured(load(options["results"]), given)
    except LookupError as error:
        print(error.args[0], file=sys.stderr)
        return 1
    names = {one.name for one in dataclasses.fields(Assumed)}
    assumed = Assumed(**{name: value for name, value in given.items() if name in names})
    made = report(costs, sources, assumed, tuple(options["users"]))
    if options["write"]:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n{made}{END}{after}", encoding="utf-8")
    else:
        print(made, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
