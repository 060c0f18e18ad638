from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tidings.client.backoff import FullJitter
from tidings.client.client import Client

from .fake import FakeServer


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def http_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    await fake.start_http()
    yield fake
    await fake.stop()


def quick(source: random.Random) -> FullJitter:
    """Retries fast enough for a test."""
    return FullJitter(base=0.01, cap=0.05, random=source)


def client(server: FakeServer, **options: Any) -> Client:
    options = {"token": "user:alice", "device": "phone", "backoff": quick, **options}
    if "token_provider" in options:
        del options["token"]
    return Client(server.url, **options)


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for a condition; the test fails with it when it does not come true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)  # why: this is the waiting for a condition


async def take(events: Any, count: int, seconds: float = 5.0) -> list[Any]:
    """The next `count` events."""
    async with asyncio.timeout(seconds):
        return [await anext(events) for _ in range(count)]
