"""Pushes as jobs: one per channel that decides, one per device and provider that sends."""

from __future__ import annotations

import msgspec

from tidings.server.services.clearing import CLEAR
from tidings.server.services.push import DECIDE, SEND, Push, Sending
from tidings.server.services.queue import Job
from tidings.server.store.base import Tx

from .worker import Again, Done, Kind, Outcome

_decode = msgspec.json.Decoder(Sending).decode


def push_kinds(push: Push) -> list[Kind]:
    """The kinds of jobs that wake devices."""

    async def decide(job: Job) -> Outcome:
        decided = await push.decide(job.app, int(job.key), int(job.payload or b"0"))
        if decided is None:
            return Done()

        async def unit(tx: Tx) -> None:
            await push.write(tx, job.app, decided.notes, decided.puts)

        push.count(decided.notes)
        position = b"%d" % decided.position
        if decided.due_at is None:
            return Done(payload=position, unit=unit)
        return Again(due_at=decided.due_at, payload=position, unit=unit)

    async def send(job: Job) -> Outcome:
        sent = await push.send(job.app, _decode(job.payload or b""), job.attempts)

        async def unit(tx: Tx) -> None:
            await push.end(tx, job.app, sent)

        push.count(sent.notes)
        if sent.due_at is None:
            return Done(unit=unit)
        return Again(due_at=sent.due_at, payload=sent.payload, attempts=sent.attempts, unit=unit)

    async def clear(job: Job) -> Outcome:
        sid, _, user = job.key.partition("/")
        notes = await push.clear(job.app, int(sid), user)

        async def unit(tx: Tx) -> None:
            await push.write(tx, job.app, notes)

        push.count(notes)
        return Done(unit=unit)

    return [
        Kind(CLEAR, clear, concurrency=16, attempts_max=3, seconds_max=60.0),
        Kind(DECIDE, decide, concurrency=8),
        Kind(SEND, send, concurrency=64, seconds_max=30.0),
    ]
