"""Tasks that have an owner who hears of their death."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from tidings.server.telemetry import get_logger

log = get_logger(__name__)


class Tasks:
    """A set of background tasks: a failure is logged with its trace, `close` cancels and waits for all of them."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` in the background under this owner."""
        task = asyncio.get_running_loop().create_task(work, name=name)  # owned by this set
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", owner=self._owner, task=task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
