"""Files, made here: nothing is copied from elsewhere, so that each says what it is for."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from tests.media.making import Look
from tidings.server.media.facts import MediaLimits
from tidings.server.media.process import Media

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="ffmpeg was not found. On Debian: sudo apt-get install ffmpeg"
)


@pytest.fixture
def media() -> Media:
    return Media(MediaLimits())


@pytest.fixture
def look(media: Media) -> Look:
    return Look(media)


@pytest.fixture(scope="session", autouse=True)
def loops_have_their_descriptors() -> None:
    """uvloop keeps some from its first use on."""
    uvloop.run(asyncio.wait_for(asyncio.create_subprocess_exec("true"), None))


@pytest.fixture(autouse=True)
def descriptors_are_given_back() -> Iterator[None]:
    """Every test: as many descriptors after it as before."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def ffmpeg(tmp_path: Path) -> Callable[..., bytes]:
    """Runs ffmpeg and gives the bytes of the file that it writes: `ffmpeg("out.mp4", *options)`."""

    def run(name: str, *options: str) -> bytes:
        target = tmp_path / name
        done = subprocess.run(
            ["ffmpeg", "-nostdin", "-v", "error", "-y", *options, str(target)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return target.read_bytes()

    return run
