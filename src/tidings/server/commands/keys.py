"""`tidings keys …`: encryption keys, listed, made, changed and removed while the server runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import cyclopts
from cyclopts import Parameter

from tidings.server.config import Config
from tidings.server.errors import Refusal

from .datadir import ROTATION_LOCK, alone, hold
from .terminal import ConfigOption, DataDirOption, console, progress, settings

if TYPE_CHECKING:
    from tidings.server.services.rotation import Rotation, Told

T = TypeVar("T")

app = cyclopts.App(
    name="keys",
    help="""The keys that encrypt what is stored: root key, then one key per app, then one per conversation.

Rotating needs no pause: the server goes on reading and sending. What is interrupted is finished by running it again.
""",
)


@app.command(name="list")
def list_keys(
    *,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    json: Annotated[bool, Parameter(help="Answer with one JSON document.", negative="")] = False,
) -> None:
    """List root keys and apps' keys, never their content.

    For example:

        tidings keys list
    """
    where = settings(config, data_dir)

    async def work(rotation: Rotation) -> list[Any]:
        return list(await rotation.list_keys())

    found = _run(where, work)
    roots = _root_keys(where)
    for kid, info in roots.items():
        info["wraps"] = sum(key[2] == kid for entry in found for key in entry.keys)
    if json:
        _print_json(roots, found)
    else:
        _print_tables(where, roots, found)


@app.command(name="create")
def create(path: Path, /) -> None:
    """Make a new key file, for nodes that will share it. A file that exists is left alone.

    A server on one machine makes its own at the first start. Nodes that share a database must all have the same one
    before the first of them starts.

    For example:

        tidings keys create ./root.key

    Parameters
    ----------
    path
        Where to make it, with mode 0600.
    """
    from tidings.server.crypto.keyfile import KeyFile, KeyFileError

    if path.exists():
        raise KeyFileError(f"{path} exists already: a key file is never overwritten")
    made = KeyFile(path)
    err = console()
    err.print(f"Made {path} with the root key {made.current_kid}.")
    err.print("Next: copy it to where you keep keys. Without it nothing that is stored can be read.")


@app.command(name="prepare-root")
def prepare_root(*, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Put the next root key into the key file without using it yet: the first step where nodes have files of their own.

    Then copy the file to every node, and `tidings keys rotate-root`. Running this twice makes no second key.

    For example:

        tidings keys prepare-root
    """
    from tidings.server.crypto.keyfile import KeyFile

    where = settings(config, data_dir)
    kid = KeyFile(where.key_file, create=False).prepare_version()
    err = console()
    err.print(f"The root key {kid} is in {where.key_file}, and nothing uses it yet.")
    err.print("Next: copy the file to every node and to where you keep keys, then: tidings keys rotate-root")


@app.command(name="rotate-root")
def rotate_root(
    *,
    keep_old: Annotated[bool, Parameter(negative="")] = False,
    one_file: Annotated[bool, Parameter(negative="")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Wrap every app's keys with a new root key, and remove the old one from the key file.

    Do this once a year, and whenever somebody may have read the key file (then rotate the apps' keys too). Backups made
    before need the key file as it was: keep that copy with them, or use --keep-old. Make a copy of the new key file
    right away.

    Over PostgreSQL there may be nodes with a key file of their own. There it takes the key that `tidings keys
    prepare-root` has made, and the old one stays until `tidings keys retire-root`, unless you say --one-file.

    For example:

        tidings keys rotate-root

        tidings keys rotate-root --keep-old

    Parameters
    ----------
    keep_old
        Leave the old root key in the key file, so that backups made before can be restored with it.
    one_file
        All nodes read this very file: make the new key and remove the old one in one go.
    """
    where = settings(config, data_dir)
    several = not (where.embedded or one_file)

    async def work(rotation: Rotation) -> Any:
        with _bar() as told:
            return await rotation.rotate_root(keep_old=keep_old or several, prepared=several, told=told)

    with hold(where.data_dir, "a rotation of keys", lock=ROTATION_LOCK):
        done = _run(where, work)
    err = console()
    err.print(
        f"[bold green]{'Finished the interrupted rotation' if done.resumed else 'Rotated'}:[/] the root key is "
        f"{done.kid}; {done.rewrapped} app keys were wrapped anew."
    )
    _say_retired_roots(err, where, done.retired)
    if done.kept:
        err.print(f"Still in {where.key_file}: {', '.join(done.kept)}.")
    if several:
        err.print("Next: copy the file to every node and to where you keep keys, then: tidings keys retire-root")
    else:
        err.print(f"Next: copy {where.key_file} to where you keep keys. Without it nothing that is stored can be read.")


@app.command(name="retire-root")
def retire_root(*, config: ConfigOption = None, data_dir: DataDirOption = None) -> None:
    """Remove old root keys from the key file, if nothing needs them: the last step of a rotation over several nodes.

    Run it when every node has the file with the new current key, and copy the file once more. What is still wrapped by
    an old key stops it.

    For example:

        tidings keys retire-root
    """
    where = settings(config, data_dir)

    async def work(rotation: Rotation) -> tuple[str, ...]:
        return await rotation.retire_root()

    with hold(where.data_dir, "a rotation of keys", lock=ROTATION_LOCK):
        retired = _run(where, work)
    err = console()
    if retired:
        _say_retired_roots(err, where, retired)
        err.print("Next: copy the file to every node and to where you keep keys.")
    else:
        err.print(f"There is no old root key in {where.key_file}.")


def _say_retired_roots(err: Any, where: Config, retired: tuple[str, ...]) -> None:
    if retired:
        err.print(
            f"Removed from {where.key_file}: {', '.join(retired)}.\n"
            "Backups made before this need the key file as it was: keep that copy with them."
        )


@app.command(name="rotate-app")
def rotate_app(
    app_id: str | None = None,
    /,
    *,
    all: Annotated[bool, Parameter(negative="")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Give an app a new key, and move everything that its old key protects to it.

    Conversations keep their own keys, which are wrapped anew; profiles, device names and signing secrets are encrypted
    anew. When nothing else uses the data, the old key is removed at once. While a server runs it stays for an hour, in
    case that the server was just about to use it: `tidings keys retire` removes it then.

    For example:

        tidings keys rotate-app app_clinic

        tidings keys rotate-app --all

    Parameters
    ----------
    app_id
        The app; `tidings app list` shows them.
    all
        Every app, one after the other.
    """
    where = settings(config, data_dir)
    err = console()

    async def work(rotation: Rotation, by_itself: bool) -> list[Any]:
        done = []
        for id in await _chosen(rotation, app_id, all):
            with _bar() as told:
                done.append(await rotation.rotate_app(id, alone=by_itself, told=told))
        return done

    with (
        hold(where.data_dir, "a rotation of keys", lock=ROTATION_LOCK),
        alone(where.data_dir, "a rotation of keys") as by_itself,
    ):
        results = _run(where, lambda rotation: work(rotation, by_itself))
    for done in results:
        begun = "Finished the interrupted rotation of" if done.resumed else "Rotated"
        err.print(
            f"[bold green]{begun} {done.app_id}:[/] version {done.version}; {done.streams} stream keys wrapped anew, "
            f"{done.boxes} rows encrypted anew."
        )
        _say_retired(err, done.retired, done.kept)


@app.command(name="retire")
def retire(
    app_id: str | None = None,
    /,
    *,
    all: Annotated[bool, Parameter(negative="")] = False,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Remove apps' old keys that nothing needs any more. Safe at any time: what is still needed stays.

    For example:

        tidings keys retire --all

    Parameters
    ----------
    app_id
        The app.
    all
        Every app.
    """
    where = settings(config, data_dir)
    err = console()

    async def work(rotation: Rotation, by_itself: bool) -> list[Any]:
        return [(id, await rotation.retire(id, alone=by_itself)) for id in await _chosen(rotation, app_id, all)]

    with (
        hold(where.data_dir, "a rotation of keys", lock=ROTATION_LOCK),
        alone(where.data_dir, "a rotation of keys") as by_itself,
    ):
        results = _run(where, lambda rotation: work(rotation, by_itself))
    for id, (retired, kept) in results:
        err.print(f"{id}:", end=" ")
        if retired or kept:
            _say_retired(err, retired, kept)
        else:
            err.print("there is no old key.")


def _say_retired(err: Any, retired: tuple[int, ...], kept: tuple[int, ...]) -> None:
    if retired:
        err.print(f"Removed version {', '.join(map(str, retired))}.")
    if kept:
        err.print(
            f"Version {', '.join(map(str, kept))} stays for now, because a server runs or something still needs it. "
            "In an hour: tidings keys retire --all"
        )


async def _chosen(rotation: Rotation, app_id: str | None, all: bool) -> list[str]:
    known = [entry.app_id for entry in await rotation.list_keys()]
    if all == (app_id is not None):
        raise Refusal("invalid_field", "Name one app, or say --all.", field="app")
    if app_id is None:
        return known
    if app_id not in known:
        raise Refusal("not_found", f"There is no app {app_id}; there are: {', '.join(known) or 'none'}.", field="app")
    return [app_id]


def _run(where: Config, work: Callable[[Rotation], Awaitable[T]]) -> T:
    async def inside() -> T:
        async with _opened(where) as rotation:
            return await work(rotation)

    return asyncio.run(inside())


@asynccontextmanager
async def _opened(where: Config) -> AsyncIterator[Rotation]:
    from tidings.server.app import DATABASE, open_store
    from tidings.server.clock import Ids, SystemClock
    from tidings.server.crypto.keyfile import KeyFile
    from tidings.server.crypto.keyring import Keyring
    from tidings.server.services.rotation import Rotation

    if where.embedded and not (where.data_dir / DATABASE).is_file():
        raise Refusal("not_found", f"There is no database in {where.data_dir}: name the server's with --data-dir.")
    root = KeyFile(where.key_file, create=False)
    store = (await open_store(where, on_bus=False)).store
    try:
        clock = SystemClock()
        yield Rotation(store, Keyring(root), root, clock, Ids(clock))
    finally:
        await store.close()


@contextmanager
def _bar() -> Iterator[Told]:
    from tidings.server.services.rotation import Told

    tasks: dict[str, Any] = {}
    with progress() as bar:

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield Told(step)


def _root_keys(where: Config) -> dict[str, dict[str, Any]]:
    """Root key id → made at, whether it is the current one, and its state, oldest first. Never the keys."""
    import msgspec

    from tidings.server.crypto.keyfile import KeyFile

    held = KeyFile(where.key_file, create=False)
    made = msgspec.json.decode(held.path.read_bytes())["keys"]
    current, prepared = held.current_kid, held.prepared_kid()
    states = {current: "current", prepared: "prepared"}
    return {
        kid: {"made_at": made[kid]["created"], "current": kid == current, "state": states.get(kid, "old")}
        for kid in held.kids()
    }


def _print_json(roots: dict[str, dict[str, Any]], found: list[Any]) -> None:
    import msgspec

    answer = {
        "root_keys": [{"id": kid, **info} for kid, info in roots.items()],
        "apps": [
            {
                "app": entry.app_id,
                "rotating": entry.rotating,
                "keys": [
                    {"purpose": purpose, "version": version, "root_key": kid, "made_at": _time(at), "streams": streams}
                    for purpose, version, kid, at, streams in entry.keys
                ],
            }
            for entry in found
        ],
    }
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(answer), indent=2) + b"\n")


def _print_tables(where: Config, roots: dict[str, dict[str, Any]], found: list[Any]) -> None:
    from rich.table import Table

    out = console(stderr=False)
    table = Table(title=f"Root keys in {where.key_file}", title_justify="left", box=None, pad_edge=False)
    for name in ("id", "made at", "wraps", ""):
        table.add_column(name, no_wrap=True)
    for kid, info in roots.items():
        table.add_row(kid, info["made_at"], str(info["wraps"]), info["state"])
    out.print(table)
    for entry in found:
        out.print()
        title = f"{entry.app_id} ({entry.name})" + (", rotation unfinished" if entry.rotating else "")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("purpose", "version", "root key", "made at", "streams"):
            table.add_column(name, no_wrap=True)
        for purpose, version, kid, at, streams in entry.keys:
            table.add_row(purpose, str(version), kid, _time(at), str(streams) if purpose == "data" else "")
        out.print(table)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
