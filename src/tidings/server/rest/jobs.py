"""Jobs: what waits to be done behind the scenes, and what was given up."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from tidings.wire.replies import Page
from tidings.wire.requests import JobsRetry
from tidings.wire.resources import Job, JobsRetried

from .operation import Call, Paging, operation


class JobsQuery(Paging, frozen=True, kw_only=True):
    state: Annotated[Literal["dead", "waiting"], Meta(description="Given up, or still to be done")] = "dead"
    kind: Annotated[str, Meta(max_length=64, description="webhook, push …")] | None = None


@operation("jobs.list", "GET", "/v1/jobs", "List jobs", reply=Page[Job], query=JobsQuery)
async def find(call: Call[JobsQuery, None]) -> Page[Job]:
    """What was given up after its last try, and why; or what still waits. The oldest first."""
    query = call.query
    found, more = await call.services.jobs.list(
        call.actor, state=query.state, kind=query.kind, limit=query.limit, cursor=query.cursor
    )
    return Page(found, more)


@operation("jobs.retry_all", "POST", "/v1/jobs/retry", "Try dead jobs again", reply=JobsRetried, body=JobsRetry)
async def retry_all(call: Call[None, JobsRetry]) -> JobsRetried:
    """All of them, or those of a kind: the oldest thousand. `count` says how many; at 1,000 there may be more."""
    return await call.services.jobs.retry(call.actor, kind=call.body.kind)


@operation(
    "jobs.retry", "POST", "/v1/jobs/{job}/retry", "Try a dead job again", reply=JobsRetried, problems=("not_found",)
)
async def retry(call: Call[None, None]) -> JobsRetried:
    """At once, and with all its attempts."""
    return await call.services.jobs.retry(call.actor, call.path["job"])


@operation("jobs.drop", "DELETE", "/v1/jobs/{job}", "Give a dead job up", problems=("not_found",))
async def drop(call: Call[None, None]) -> None:
    """For good. One that still waits cannot be taken away."""
    await call.services.jobs.drop(call.actor, call.path["job"])


OPERATIONS: Final = (find, retry_all, retry, drop)
