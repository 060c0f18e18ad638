"""`tidings doctor`: what could go wrong on this machine, found before it does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .terminal import ConfigOption, DataDirOption, StoreOption, console

if TYPE_CHECKING:
    from tidings.server.doctor import Finding

_SIGNS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]FAIL[/]"}


def doctor(
    *,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    host: Annotated[str | None, Parameter(help="Address that the server will listen on.")] = None,
    port: Annotated[int | None, Parameter(help="Port that the server will listen on.")] = None,
    json: Annotated[bool, Parameter(help="Answer with one JSON document.", negative="")] = False,
) -> None:
    """Look for what will go wrong: settings, disk or database, bus, keys, limits, clock, port.

    Changes nothing. Run it as the user that runs the server. Exit status 1 when something would keep the server from
    working; warnings alone leave it 0.

    For example:

        tidings doctor

        tidings doctor --config /etc/tidings.toml

        tidings doctor --store postgres://tidings@db.internal/tidings

        tidings doctor --json
    """
    from tidings.server.doctor import examine, worst
    from tidings.server.telemetry import setup_logging

    # What is found is told below, and by nobody else.
    setup_logging(level="error")
    overrides = {"data_dir": data_dir, "store": store, "host": host, "port": port}
    err = console()
    findings: list[Finding] = []
    with err.status("Looking …"):
        findings.extend(examine(file=config, overrides=overrides))
    if json:
        _print_json(findings)
    else:
        _print_table(findings)
    if worst(findings) == "fail":
        raise SystemExit(1)


def _print_json(findings: list[Finding]) -> None:
    import msgspec

    rows = [{"status": item.status, "name": item.name, "found": item.what, "do": item.do} for item in findings]
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")


def _print_table(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console(stderr=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("Looked at", no_wrap=True)
    table.add_column("Found", overflow="fold")
    for item in findings:
        found = Text(item.what)
        if item.do:
            found.append(f"\n→ {item.do}", style="bold")
        table.add_row(_SIGNS[item.status], item.name, found)
    out.print(table)
    failed = sum(item.status == "fail" for item in findings)
    warned = sum(item.status == "warn" for item in findings)
    if failed:
        out.print(f"\n[bold red]{failed} to mend[/] before the server can work, {warned} to think about.")
    elif warned:
        out.print(f"\nNothing in the way; {warned} to think about.")
    else:
        out.print("\nEverything is in order.")
