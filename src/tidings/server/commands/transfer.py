"""`tidings transfer`: everything from a data directory into a PostgreSQL database."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from tidings.server.config import Config

from .backup import DATABASE, check_integrity
from .datadir import COMMANDS_LOCK, ROTATION_LOCK, SERVER_LOCK, DataDirInUse, check_restored, hold
from .terminal import ConfigOption, console, settings

if TYPE_CHECKING:
    from rich.progress import Task

    from tidings.server.store.transfer import Outcome

# Between two lines where there is no terminal: often enough to see that it goes on, seldom enough for a log.
LINE_SECONDS: Final = 5.0


def transfer(
    *,
    source: Annotated[Path | None, Parameter(name="--from")] = None,
    target: Annotated[str | None, Parameter(name="--to")] = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    config: ConfigOption = None,
) -> None:
    """Move all data from a data directory (SQLite) into an empty PostgreSQL database.

    Stop the server first; it stays stopped until the new one is started. The source is only read. Whatever breaks the
    transfer off, run the same command again: it goes on where it was. At the end everything is read back from
    PostgreSQL and compared, and only then nodes are let in.

    Clients notice nothing but the pause: messages, numbers, positions, keys and tokens stay as they are.

    Examples:

        tidings transfer --from ./data --to postgres://tidings@db.internal/tidings --dry-run

        tidings transfer --from ./data --to postgres://tidings@db.internal/tidings

        tidings serve --data-dir ./data --store postgres://tidings@db.internal/tidings

    Parameters
    ----------
    source
        The data directory. Without it, the setting data_dir.
    target
        URL of an empty database. Without it, the setting store: others on this machine can read a command line, so give
        a password in TIDINGS_STORE, PGPASSWORD or ~/.pgpass.
    dry_run
        Only look at both sides, and say what would be copied. The server may run meanwhile.
    """
    where = settings(config, source, store=target)
    if where.embedded:
        raise SystemExit("tidings: say where to: --to postgres://…, or the setting store.")
    database = where.data_dir.absolute() / DATABASE
    check_restored(where.data_dir)
    if dry_run:
        _dry_run(where, database)
        return
    with ExitStack() as held:
        if where.data_dir.is_dir():
            # As a server would, and as whoever writes beside one.
            for lock in (SERVER_LOCK, COMMANDS_LOCK, ROTATION_LOCK):
                held.enter_context(hold(where.data_dir, "a transfer to PostgreSQL", lock=lock))
        if database.is_file():
            check_integrity(database)
        done = asyncio.run(_transfer(where, database))
    err = console()
    before = done.rows - done.copied
    err.print(
        f"[bold green]Transferred[/] {done.rows:,} rows of {len(done.source)} tables"
        + (f", {before:,} of them by runs before this one" if before else "")
        + ". Counts and checksums agree."
    )
    if done.root_kids:
        err.print(
            f"The key file did not move: every node needs root key {', '.join(done.root_kids)}, which is in "
            f"{where.key_file}.\nCopy that file to each as its key_file (mode 0600); nothing can be read without it."
        )
    err.print(f"Next: tidings serve --data-dir {where.data_dir} --store {_shown(where)}")


async def _transfer(where: Config, database: Path) -> Outcome:
    from tidings.server.store.transfer import transfer

    with _telling() as told:
        return await transfer(database, where.store, allow_unsafe=where.allow_unsafe_store, told=told)


def _dry_run(where: Config, database: Path) -> None:
    from rich.table import Table

    from tidings.server.store.transfer import look

    async def looked() -> tuple[Outcome, dict[str, int]]:
        with _telling() as told:
            return await look(database, where.store, told=told)

    found, there = asyncio.run(looked())
    out = console(stderr=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("Table")
    for name in ("rows", "there already", "to copy"):
        table.add_column(name, justify="right")
    for name, summed in found.source.items():
        if summed.rows:
            done = there.get(name, 0)
            table.add_row(name, f"{summed.rows:,}", f"{done:,}", f"{summed.rows - done:,}")
    out.print(table)
    err = console()
    err.print(f"{found.rows - sum(there.values()):,} rows would be copied to {_shown(where)}. Nothing was changed.")
    try:
        with hold(where.data_dir, "a look before a transfer", lock=SERVER_LOCK):
            pass
    except DataDirInUse as error:
        err.print(f"{error} Stop it before the transfer.")


def _shown(where: Config) -> str:
    from tidings.server.store.postgres import redact

    return redact(where.store)


# ---------------------------------------------------------------- progress


@contextmanager
def _telling() -> Iterator[Callable[[str, str, int, int], None]]:
    """Tell how far it is: a bar on a terminal, else a line now and then."""
    err = console()
    if not err.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f} rows/s")

    columns = (BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn(), TextColumn("{task.fields[table]}"))
    with Progress(TextColumn("{task.description:<9}"), *columns, console=err) as bar:
        tasks = {}

        def told(phase: str, table: str, done: int, total: int) -> None:
            if phase not in tasks:
                # What is there from an earlier run says nothing about the speed of this one.
                tasks[phase] = bar.add_task(phase, total=total, completed=done, table=table)
            bar.update(tasks[phase], completed=done, total=total, table=table)

        yield told


class _Lines:
    """Plain lines on standard error, for logs and pipes."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._phase = ""
        self._began = (0.0, 0)
        self._said = 0.0
        self._whole = False

    def __call__(self, phase: str, table: str, done: int, total: int) -> None:
        now = self._now()
        if phase != self._phase:
            self._phase, self._began, self._said, self._whole = phase, (now, done), now, False
            sys.stderr.write(f"{phase}: {done:,} of {total:,} rows\n")
            return
        if self._whole or (now - self._said < LINE_SECONDS and done < total):
            return
        self._said, self._whole = now, done >= total
        since, from_row = self._began
        speed = (done - from_row) / max(now - since, 0.001)
        left = f", {(total - done) / speed:,.0f} s left: {table}" if done < total and speed else ""
        sys.stderr.write(
            f"{phase}: {done:,} of {total:,} rows ({done * 100 // max(total, 1)} %), {speed:,.0f} rows/s{left}\n"
        )
        sys.stderr.flush()
