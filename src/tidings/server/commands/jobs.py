"""`tidings jobs`: what is done behind the scenes, and another try for what was given up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import Parameter

if TYPE_CHECKING:
    from tidings.server.services import Services

from .admin import AppOption, Where, acting, finish, run

app = cyclopts.App(name="jobs", help="Jobs: what is done behind the scenes, and what was given up.")
_HERE = Where()

KindOption = Annotated[str | None, Parameter(help="Only jobs of this kind: webhook, push …")]


@app.command(name="list")
def list_jobs(
    *, waiting: bool = False, kind: KindOption = None, limit: int = 100, app: AppOption = None, where: Where = _HERE
) -> None:
    """List jobs that were given up, and why; or those that wait.

    For example:

        tidings jobs list

        tidings jobs list --waiting --kind webhook --json

    Parameters
    ----------
    waiting
        Those that are still to be done.
    limit
        At most so many, the oldest first.
    """

    async def work(services: Services) -> list[dict[str, Any]]:
        actor = await acting(services, app)
        found, _ = await services.jobs.list(
            actor, state="waiting" if waiting else "dead", kind=kind, limit=max(1, min(limit, 1_000))
        )
        return [
            {
                "job": job.id,
                "kind": job.kind,
                "attempts": job.attempts,
                "due_at" if waiting else "died_at": text_of(job.due_at if waiting else job.died_at),
                "error": job.error or "",
            }
            for job in found
        ]

    finish(where, run(where, work), empty="Nothing waits." if waiting else "Nothing was given up.")


@app.command(name="retry")
def retry(job: str | None = None, /, *, kind: KindOption = None, app: AppOption = None, where: Where = _HERE) -> None:
    """Have jobs that were given up tried again: one, those of a kind, or all, at most 1,000 at once.

    For example:

        tidings jobs retry job_42

        tidings jobs retry --kind webhook

    Parameters
    ----------
    job
        Its id, from `tidings jobs list`.
    """

    async def work(services: Services) -> dict[str, Any]:
        done = await services.jobs.retry(await acting(services, app), job, kind)
        return {"retried": done.count}

    finish(where, run(where, work))


@app.command(name="drop")
def drop(job: str, /, *, app: AppOption = None, where: Where = _HERE) -> None:
    """Give a dead job up for good.

    For example:

        tidings jobs drop job_42

    Parameters
    ----------
    job
        Its id, from `tidings jobs list`.
    """

    async def work(services: Services) -> dict[str, Any]:
        await services.jobs.drop(await acting(services, app), job)
        return {"dropped": job}

    finish(where, run(where, work))


def text_of(at: datetime | None) -> str:
    """A time as people read it."""
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
