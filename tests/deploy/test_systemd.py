"""What systemd hears from a server: when it is ready, while it lives, and when it stops."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tidings.server.systemd import notify, watchdog_seconds
from tidings.testing.process import ServerProcess


@contextmanager
def manager(path: str) -> Iterator[socket.socket]:
    """systemd's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path)
        listening.setblocking(False)
        yield listening


async def heard(listening: socket.socket) -> str:
    async with asyncio.timeout(20):
        return (await asyncio.get_running_loop().sock_recv(listening, 4096)).decode()


async def test_it_says_when_it_answers_that_it_lives_and_when_it_stops(tmp_path: Path) -> None:
    # Short: an address of this kind has at most 107 bytes.
    address = f"\0tidings-test-{os.getpid()}"
    environment = {"NOTIFY_SOCKET": "@" + address[1:], "WATCHDOG_USEC": "200000"}
    with manager(address) as listening:
        server = ServerProcess(tmp_path / "data", environment=environment)
        try:
            server.launch()
            async with asyncio.timeout(30):
                while await heard(listening) != "READY=1":
                    pass
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{server.url}/healthz")).status_code == 200
            alive = [await heard(listening) for _ in range(3)]
            assert set(alive) == {"WATCHDOG=1"}
            stopping = asyncio.ensure_future(server.terminate())
            async with asyncio.timeout(30):
                while await heard(listening) != "STOPPING=1":
                    pass
            assert await stopping == 0
        finally:
            await server.close()


def test_a_path_is_an_address_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with manager(str(tmp_path / "notify")) as listening:
        assert notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "nowhere", "/does/not/exist", "@nobody-listens-here"])
def test_without_systemd_nothing_is_said_and_nothing_breaks(address: str) -> None:
    assert not notify("READY=1", {"NOTIFY_SOCKET": address})


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_signs_of_life_are_given_twice_in_the_time(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ) == seconds
