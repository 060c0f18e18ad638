"""One NATS server for all tests of a process that share it: each takes a cluster name of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidings.testing.nats import NatsProcess

_serial = itertools.count(1)


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsProcess]:
    """A running server."""
    server = NatsProcess(Path(tmp_path_factory.mktemp("nats")) / "server")
    try:
        asyncio.run(server.start())
        yield server
    finally:
        asyncio.run(server.close())


@pytest.fixture
def cluster() -> str:
    """A name that no other test has."""
    return f"test{next(_serial)}"
