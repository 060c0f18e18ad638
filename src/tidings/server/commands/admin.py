"""`tidings app | key | token | user | migrate`: administering the data directly, also while the server runs.

A running server notices within a second that somebody else has written, and reads anew. What these commands print for
people is on standard error or a terminal; `--json` puts one JSON document on standard output, for scripts.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

import cyclopts
import msgspec
from cyclopts import Parameter

from tidings.server.config import Config, ConfigError, load_config
from tidings.server.crypto.base import CryptoError
from tidings.server.domain.permissions import EVERYTHING
from tidings.server.errors import Refusal, TidingsError
from tidings.wire import limits
from tidings.wire.requests import ApiKeyCreate, UserCreate
from tidings.wire.resources import ApiKey, User

if TYPE_CHECKING:
    from tidings.server.services import Services
    from tidings.server.services.access import Actor

from .datadir import share

T = TypeVar("T")

app = cyclopts.App(name="app", help="Apps: the tenants of this server. Nothing crosses from one to another.")
key = cyclopts.App(name="key", help="API keys, with which an app's backend calls the API.")
token = cyclopts.App(name="token", help="Users' tokens: make one to try things out, or end them.")
user = cyclopts.App(name="user", help="Users of an app.")

_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
# Who changed something, in the audit trail.
VIA: Final = "cli"


@Parameter(name="*")
@dataclass(slots=True, frozen=True)
class Where:
    """Which data to work on, and how to answer."""

    config: Annotated[Path | None, Parameter(help="TOML file with settings.")] = None
    data_dir: Annotated[Path | None, Parameter(name=["--data-dir", "--data"], help="Directory of the data.")] = None
    store: Annotated[str | None, Parameter(help="The database, where it is not the file in the directory.")] = None
    json: Annotated[bool, Parameter(help="Answer with one JSON document.", negative="")] = False


AppOption = Annotated[str | None, Parameter(name="--app", help="The app's id; needed when there are several.")]
_HERE: Final = Where()


# ---------------------------------------------------------------- apps


@app.command(name="create")
def create_app(name: str, /, *, id: str | None = None, where: Where = _HERE) -> None:
    """Make an app, with an API key for its backend and a secret that signs its users' tokens.

    Both are shown once and stored hashed or encrypted: keep them where your backend keeps its secrets.

    For example:

        tidings app create Clinic

        tidings app create Clinic --id clinic --json > clinic.json

    Parameters
    ----------
    name
        What people call it.
    id
        Its id, if you would like to choose it. It never changes.
    """

    async def work(services: Services) -> dict[str, Any]:
        new = await services.admin.create_app(name, id, VIA)
        return {
            "app": new.app_id,
            "name": new.name,
            "api_key": new.api_key,
            "api_key_id": new.api_key_id,
            "signing_kid": new.signing_kid,
            "signing_secret": new.signing_secret,
        }

    finish(where, run(where, work), secret=True)


@app.command(name="list")
def list_apps(*, where: Where = _HERE) -> None:
    """List the apps of this server.

    For example:

        tidings app list --json
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        return [
            {"app": id, "name": name, "created_at": _text(datetime.fromtimestamp(created_at / 1000, UTC))}
            for id, name, created_at in await _apps(services)
        ]

    finish(where, run(where, work), empty="There is no app yet: tidings app create NAME")


# ---------------------------------------------------------------- API keys


@key.command(name="create")
def create_key(
    name: str,
    /,
    *,
    scope: Annotated[list[str] | None, Parameter(negative="")] = None,
    expires_in: str | None = None,
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """Make an API key. It is shown once; only a hash of it is stored.

    For example:

        tidings key create billing --scope message.send --scope message.system

        tidings key create deploy --expires-in 90d

    Parameters
    ----------
    name
        What it is for; stands beside it in lists.
    scope
        A permission word that the key may use; repeat it for several. Without any, the key may do everything.
    expires_in
        Its life, such as 12h or 90d; without it, until it is revoked.
    """

    async def work(services: Services) -> dict[str, Any]:
        expires_at = None
        if expires_in is not None:
            expires_at = datetime.now(UTC) + timedelta(seconds=seconds_of(expires_in))
        body = ApiKeyCreate(name=name, scopes=scope or ["*"], expires_at=expires_at)
        made = await services.admin.create_api_key(await acting(services, app), body)
        return {"id": made.id, "name": made.name, "scopes": made.scopes, "api_key": made.secret}

    finish(where, run(where, work), secret=True)


@key.command(name="list")
def list_keys(*, app: AppOption = None, where: Where = _HERE) -> None:
    """List the app's API keys, without their secrets.

    For example:

        tidings key list
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        found = await services.admin.list_api_keys(await acting(services, app))
        return [_key_row(item) for item in found]

    finish(where, run(where, work), empty="The app has no API key.")


@key.command(name="revoke")
def revoke_key(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """End an API key. A running server refuses it within a second.

    For example:

        tidings key revoke 4hqk7mzcvb2s5xw3n6yjd7tgae

    Parameters
    ----------
    id
        The key's id, as `tidings key list` shows it.
    """

    async def work(services: Services) -> dict[str, Any]:
        await services.admin.revoke_api_key(await acting(services, app), id)
        return {"revoked": id}

    finish(where, run(where, work))


# ---------------------------------------------------------------- tokens


@token.command(name="mint")
def mint_token(
    *,
    user: str,
    ttl: str = "1h",
    create: Annotated[bool, Parameter(negative="")] = False,
    app: AppOption = None,
    where: Where = _HERE,
) -> None:
    """Make a token for a user, to try things out. In production your identity system signs them.

    The token alone goes to standard output, so that it can be put into a variable.

    For example:

        TOKEN=$(tidings token mint --user alice)

        tidings token mint --user alice --create --ttl 10m --json

    Parameters
    ----------
    user
        The user's id.
    ttl
        Its life, such as 30s, 10m, 1h or 7d.
    create
        Make the user if there is none of that id.
    """

    async def work(services: Services) -> dict[str, Any]:
        actor = await acting(services, app)
        if create:
            await services.users.ensure(actor.app, user)
        made = await services.auth.mint(actor, user, seconds_of(ttl))
        return {"token": made.token, "user": user, "app": actor.app.id, "expires_at": _text(made.expires_at)}

    done = run(where, work)
    if where.json:
        finish(where, done)
    else:
        sys.stdout.write(f"{done['token']}\n")


@token.command(name="revoke")
def revoke_tokens(*, user: str, jti: str | None = None, app: AppOption = None, where: Where = _HERE) -> None:
    """End every token that a user has been given so far, or one of them.

    For example:

        tidings token revoke --user alice

    Parameters
    ----------
    user
        The user's id.
    jti
        The `jti` of the one token to end.
    """

    async def work(services: Services) -> dict[str, Any]:
        await services.auth.revoke(await acting(services, app), user, jti)
        return {"revoked": "all tokens issued until now" if jti is None else jti, "user": user}

    finish(where, run(where, work))


# ---------------------------------------------------------------- users


@user.command(name="create")
def create_user(
    id: str, /, *, name: str | None = None, role: str = "user", app: AppOption = None, where: Where = _HERE
) -> None:
    """Make a user.

    For example:

        tidings user create alice --name "Alice Roe"

        tidings user create root --role admin

    Parameters
    ----------
    id
        The user's id, as your application knows it.
    name
        What others see.
    role
        An app role: guest, user, moderator, admin or one of the app's own.
    """

    async def work(services: Services) -> dict[str, Any]:
        made = await services.users.create(await acting(services, app), UserCreate(id=id, name=name, role=role))
        return _user_row(made)

    finish(where, run(where, work))


@user.command(name="list")
def list_users(
    *, role: str | None = None, limit: int = limits.PAGE_DEFAULT, app: AppOption = None, where: Where = _HERE
) -> None:
    """List users, the oldest first.

    For example:

        tidings user list --role admin

    Parameters
    ----------
    role
        Only those who have this role.
    limit
        At most so many.
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        actor = await acting(services, app)
        found: list[dict[str, Any]] = []
        cursor = None
        while len(found) < limit:
            size = min(limits.PAGE_MAX, limit - len(found))
            page, cursor = await services.users.query(actor, role=role, limit=size, cursor=cursor)
            found += [_user_row(item) for item in page]
            if cursor is None:
                break
        return found

    finish(where, run(where, work), empty="There is no such user.")


@user.command(name="deactivate")
def deactivate_user(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Lock a user out: their connections end and their tokens are refused. Everything of theirs stays.

    For example:

        tidings user deactivate mallory
    """
    finish(where, run(where, lambda services: _set_active(services, app, id, False)))


@user.command(name="reactivate")
def reactivate_user(id: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Let a deactivated user in again.

    For example:

        tidings user reactivate mallory
    """
    finish(where, run(where, lambda services: _set_active(services, app, id, True)))


async def _set_active(services: Services, app: str | None, id: str, active: bool) -> dict[str, Any]:
    actor = await acting(services, app)
    change = services.users.reactivate if active else services.users.deactivate
    return _user_row(await change(actor, id))


# ---------------------------------------------------------------- the schema


def migrate(*, plan: Annotated[bool, Parameter(negative="")] = False, where: Where = _HERE) -> None:
    """Bring the database to this version's schema. `tidings serve` does so by itself at its start.

    Take a backup first: there is no way back to an older version but that. Over PostgreSQL, nodes of the version before
    go on serving meanwhile.

    For example:

        tidings migrate --plan

        tidings migrate

        tidings migrate --store postgres://tidings@db.internal/tidings --plan

    Parameters
    ----------
    plan
        Only say what would be done.
    """
    from tidings.server.app import migrate_store

    config = _config(where)
    try:
        with _console().status("Looking …" if plan else "Migrating …"):
            name, found = asyncio.run(migrate_store(config, plan=plan))
    except Refusal as error:
        _fail(where, msgspec.to_builtins(error.document()), error.detail)
    except (TidingsError, OSError) as error:
        _fail(where, {"code": "unavailable", "detail": str(error)}, str(error))
    answer = {"database": name, "from": found.current or "none", "to": found.target, "steps": list(found.steps)}
    if where.json:
        finish(where, answer)
    elif not found.steps:
        _console().print(f"{name} is at revision {found.target}: nothing to do.")
    else:
        _console().print(f"{name}: {'would run' if plan else 'ran'} {', '.join(found.steps)}")


# ---------------------------------------------------------------- inside


def seconds_of(text: str) -> int:
    """A duration such as `90s`, `10m`, `1h` or `7d`, or plain seconds. Raises Refusal `invalid_field`."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise Refusal("invalid_field", f"{text!r} is not a duration: write 30s, 10m, 1h or 7d.", field="ttl")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _config(where: Where) -> Config:
    try:
        return load_config(file=where.config, overrides={"data_dir": where.data_dir, "store": where.store})
    except ConfigError as error:
        _fail(where, {"code": "invalid", "detail": str(error)}, str(error))


@asynccontextmanager
async def _opened(where: Where) -> AsyncIterator[Services]:
    from tidings.server.app import open_core

    config = _config(where)
    with share(config.data_dir):
        async with open_core(config, on_bus=False) as core:
            yield core.services


def run(where: Where, work: Callable[[Services], Awaitable[T]]) -> T:
    """Work on the data; what goes wrong is said, and ends the command."""

    async def inside() -> T:
        async with _opened(where) as services:
            return await work(services)

    try:
        return asyncio.run(inside())
    except Refusal as error:
        at = f" ({error.field})" if error.field else ""
        _fail(where, msgspec.to_builtins(error.document()), f"{error.detail}{at}")
    except (TidingsError, CryptoError, OSError) as error:
        _fail(where, {"code": "unavailable", "detail": str(error)}, str(error))


async def _apps(services: Services) -> list[tuple[str, str, int]]:
    async def unit(tx: Any) -> list[Any]:
        found: list[Any] = await tx.all("SELECT id,name,created_at FROM apps ORDER BY created_at, id")
        return found

    return await services.store.read(unit)


async def acting(services: Services, app_id: str | None) -> Actor:
    """Whoever is at the terminal, who may do everything. Raises Refusal if it is not clear in which app."""
    from tidings.server.services.access import Actor

    if app_id is None:
        found = [id for id, _, _ in await _apps(services)]
        if not found:
            raise Refusal("not_found", "There is no app yet: tidings app create NAME.")
        if len(found) > 1:
            raise Refusal("invalid_field", f"Say which app: {', '.join(found)}.", field="--app")
        app_id = found[0]
    return Actor(await services.apps.get(app_id), None, EVERYTHING, VIA)


def checked(kind: Any, **fields: Any) -> Any:
    """A request as REST would take it. Raises Refusal."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise Refusal("invalid_field", str(error)) from None


def _key_row(item: ApiKey) -> dict[str, Any]:
    state = "revoked" if item.revoked_at else "active"
    if item.expires_at is not None and item.expires_at <= datetime.now(UTC):
        state = "expired"
    return {
        "id": item.id,
        "name": item.name,
        "state": state,
        "scopes": item.scopes,
        "created_at": _text(item.created_at),
        "expires_at": _text(item.expires_at),
        "last_used_at": _text(item.last_used_at),
    }


def _user_row(item: User) -> dict[str, Any]:
    state = "active" if item.deactivated_at is None else "deactivated"
    return {"id": item.id, "name": item.name, "role": item.role, "state": state, "created_at": _text(item.created_at)}


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def finish(where: Where, answer: Any, *, secret: bool = False, empty: str = "") -> None:
    """Show an answer: a document for scripts, a table for people."""
    if where.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(answer), indent=2) + b"\n")
        sys.stdout.flush()
        return
    from rich.table import Table

    console = _console()
    rows = answer if isinstance(answer, list) else [answer]
    if not rows:
        console.print(empty)
        return
    if isinstance(answer, list):
        table = Table(box=None, pad_edge=False)
        for name in rows[0]:
            # Identifiers are copied from here: the other columns give way.
            table.add_column(name, no_wrap=name in ("id", "app"), overflow="fold")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)
        return
    # Line by line and not in a table: secrets must come out whole, however narrow the terminal.
    width = max(map(len, answer))
    for name, value in answer.items():
        console.print(f"{name:<{width}}  {_cell(value)}", soft_wrap=True, markup=False)
    if secret:
        console.print("\nSecrets are shown this once: keep them now.", style="bold")


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)


def _fail(where: Where, document: dict[str, Any], message: str) -> NoReturn:
    """End the command with status 1; the reason goes to standard error, in JSON if JSON was asked for."""
    if where.json:
        sys.stderr.buffer.write(msgspec.json.encode(document) + b"\n")
    else:
        _console(stderr=True).print(f"tidings: {message}", markup=False)
    raise SystemExit(1)
