"""`python -m bench [scenario …]`: measure, and print each number beside its goal.

Exit code 0 whether or not goals are met: 1 means that a scenario could not be measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import uvloop
from rich.console import Console
from rich.table import Table

from . import server
from .measure import Findings, number
from .plan import Plan
from .results import save


class Scenario(NamedTuple):
    name: str
    what: str
    module: str
    function: str = "run"


SCENARIOS = (
    Scenario("fanout", "200 members, 100 messages/s, against a C loop of send()", "fanout"),
    Scenario("flood", "200 members, as fast as possible", "fanout", "run_flood"),
    Scenario("sends", "durable sends over sockets, 50 clients in a closed loop", "sends"),
    Scenario("sends-postgres", "the same over PostgreSQL, 50 and 400 clients", "sends", "run_postgres"),
    Scenario("rest", "durable sends over REST, 32 clients", "rest"),
    Scenario("memory", "memory of 10,000 idle connections", "connections", "run_memory"),
    Scenario("connects", "authenticated connections per second", "connections", "run_connects"),
    Scenario("catchup", "100,000 missed messages in one channel", "catchup"),
    Scenario("quiet", "one missed message among 10 and 10,000 channels", "catchup", "run_quiet"),
    Scenario("history", "latest page and unread count at 10^3 and 10^6 messages", "history"),
    Scenario("large", "a channel of 10^3 and one of 10^5 members", "large"),
    Scenario("bus", "two nodes on a bus, and a server that has one", "bus"),
    Scenario("enqueue", "what putting jobs adds to a send", "jobs", "run_enqueue"),
    Scenario("webhooks", "webhook deliveries by one worker to a sink", "jobs", "run_webhooks"),
    Scenario("backlog", "sends beside a backlog of 100,000 jobs", "jobs", "run_backlog"),
    Scenario("workers", "durable sends over PostgreSQL and NATS, one worker and two", "cluster", "run_workers"),
    Scenario("cluster-fanout", "200 members on one node, and spread over two", "cluster", "run_fanout"),
    Scenario("cluster-quiet", "one missed message among 10,000 channels, two nodes", "cluster", "run_quiet"),
    Scenario("doubts", "a node cut off: 20,000 sessions asked about again", "doubts"),
    Scenario("healing", "a lost last event among 80,000 streams of a node", "doubts", "run_healing"),
    Scenario("browser", "the JavaScript SDK in Chromium: 1,000 messages/s, and 10,000 that were missed", "browser"),
    Scenario("webpush", "Web Push to a sink: encrypted and sent", "webpush"),
    Scenario("media", "looking into a picture: a child of its own, three previews", "media"),
    Scenario("start", "from the command to an answer", "start"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure what DESIGN §7 promises for one machine.")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--runs", type=int, default=None, help="repetitions (default 5, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: only to see that it runs")
    parser.add_argument("--long", action="store_true", help="history with 10^7 messages too: fills the disk with 10 GB")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--save", action="store_true", help="keep them in bench/results.json, for bench.capacity")
    options = parser.parse_args()
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:14} {scenario.what}")
        return 0
    if unknown := sorted(set(options.scenario) - set(names)):
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(names)}")
    if options.save and options.quick:
        parser.error("the numbers of --quick are noise: they are not kept")
    plan = Plan(options.runs or (1 if options.quick else 5), options.quick, options.long)
    server.raise_file_limit()
    chosen = [scenario for scenario in SCENARIOS if not options.scenario or scenario.name in options.scenario]
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 120)
    failed = False
    results: list[dict[str, Any]] = []
    for scenario in chosen:
        findings = Findings()
        began, load = time.monotonic(), os.getloadavg()[0]
        console.print(f"[bold]{scenario.name}[/]: {scenario.what} …")
        try:
            uvloop.run(_function(scenario)(plan, findings))
        except Exception:
            traceback.print_exc()
            failed = True
            continue
        seconds = time.monotonic() - began
        _show(console, scenario, findings, seconds, load)
        results.append(_as_json(scenario, findings, seconds, load))
    machine = {"python": platform.python_version(), "kernel": platform.release(), "cores": os.cpu_count()}
    if options.save:
        save([{**result, "on": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", **machine} for result in results])
    if options.json:
        print(json.dumps({"machine": machine, "runs": plan.runs, "scenarios": results}, indent=2))
    return 1 if failed else 0


def _function(scenario: Scenario) -> Callable[[Plan, Findings], Coroutine[Any, Any, None]]:
    import importlib

    function: Callable[[Plan, Findings], Coroutine[Any, Any, None]] = getattr(
        importlib.import_module(f"bench.scenarios.{scenario.module}"), scenario.function
    )
    return function


def _show(console: Console, scenario: Scenario, findings: Findings, seconds: float, load: float) -> None:
    table = Table(title=None, pad_edge=False, box=None, header_style="dim")
    for name in ("", "median", "", "spread", "runs", "goal", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for measure in findings.measures.values():
        met = measure.met
        table.add_row(
            measure.name,
            number(measure.median),
            measure.unit,
            f"{number(min(measure.runs))} – {number(max(measure.runs))}" if len(measure.runs) > 1 else "",
            str(len(measure.runs)),
            "" if measure.goal is None else str(measure.goal),
            "" if met is None else "[green]met[/]" if met else "[red]missed[/]",
        )
    console.print(table)
    for note in findings.notes:
        console.print(f"[dim]{note}[/]")
    console.print(f"[dim]{seconds:.0f} s; load average when it began {load:.1f} on {os.cpu_count()} cores[/]\n")


def _as_json(scenario: Scenario, findings: Findings, seconds: float, load: float) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "seconds": round(seconds, 1),
        "load_average": load,
        "notes": findings.notes,
        "measures": [
            {
                "name": measure.name.strip(),
                "unit": measure.unit,
                "median": measure.median,
                "runs": measure.runs,
                "goal": None if measure.goal is None else str(measure.goal),
                "met": measure.met,
            }
            for measure in findings.measures.values()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
