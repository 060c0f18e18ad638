"""Whatever a file does to the child, the parent answers, in time, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checks.house import wait_until
from tests.media.conftest import needs_ffmpeg
from tests.media.making import SIZES, Look, corners, encoded, held, png
from tidings.server.media.facts import PROBLEMS, Looked, MediaLimits, Preview
from tidings.server.media.kinds import Kind
from tidings.server.media.process import Media

ROOT = Path(__file__).parents[2]
HOSTILE = Path(__file__).with_name("hostile.py")
PNG = encoded(corners(), "PNG")
PICTURE = Kind("image/png", "image", True)


def hostile(*what: str, **limits: Any) -> Look:
    return Look(Media(MediaLimits(**limits), program=(str(HOSTILE), *what)))


def children() -> set[int]:
    """Every process that this one has started, or that one of them has, and that has not ended."""
    found: set[int] = set()
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(name)] = int(parent)
    more = {os.getpid()}
    while more:
        more = {process for process, parent in parents.items() if parent in more} - found
        found |= more
    return found


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    # Not async: some of the tests bring a loop of their own.
    before = children()
    yield
    # What was killed is gone when the kernel gets to it.
    deadline = time.monotonic() + 10
    while not children() <= before:
        assert time.monotonic() < deadline, children() - before
        time.sleep(0.01)  # why: the pace of a loop that looks at a condition


# --- bounds ---------------------------------------------------------------------------------------


async def test_a_child_that_spins_is_ended_by_its_share_of_the_processor() -> None:
    begun = time.monotonic()
    assert (await hostile("spin", cpu_seconds=1, seconds=20)(PNG)).problem == "too_slow"
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("how", [("wait",), ("spin",), ("spin", "deaf")])
async def test_a_child_that_does_not_come_back_is_ended_by_the_clock(how: tuple[str, ...]) -> None:
    begun = time.monotonic()
    assert (await hostile(*how, seconds=0.6)(PNG)).problem == "too_slow"
    assert time.monotonic() - begun < 5


async def test_a_child_that_eats_memory_is_ended() -> None:
    begun = time.monotonic()
    assert (await hostile("eat", memory_bytes=300 << 20)(PNG)).problem == "too_much_memory"
    assert time.monotonic() - begun < 10


async def test_a_child_that_never_stops_talking_is_not_listened_to() -> None:
    assert (await hostile("flood", output_bytes=1 << 20, seconds=20)(PNG)).problem == "crashed"


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (signal.SIGSEGV, "crashed"),
        (signal.SIGABRT, "crashed"),
        (signal.SIGXCPU, "too_slow"),
        # The kernel's, where the machine has no memory left.
        (signal.SIGKILL, "too_much_memory"),
    ],
)
async def test_how_a_child_died_says_why(number: signal.Signals, problem: str) -> None:
    assert (await hostile("die", str(int(number)))(PNG)).problem == problem


@pytest.mark.parametrize("answer", ["", "00", "80", "c0", "ff" * 40, "df ffffffff", "81a5776964746801" + "00"])
async def test_what_is_no_answer_is_not_believed(answer: str) -> None:
    looked = await hostile("say", answer.replace(" ", ""))(PNG)
    assert looked in {Looked(problem="crashed"), Looked()} if answer == "80" else looked == Looked(problem="crashed")


LIES = [
    *("a page", "its type", "its length", "its name", "how many", "its size", "its side"),
    *("the sides", "the pages", "the waveform", "the thumbhash"),
]


@pytest.mark.parametrize("about", LIES)
async def test_a_child_that_was_taken_over_is_not_believed(about: str) -> None:
    assert (await hostile("lie", "nothing")(PNG)).problem is None
    assert await hostile("lie", about)(PNG) == Looked(problem="crashed")


# --- what a child has -----------------------------------------------------------------------------


async def test_a_child_gets_nothing_but_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIDINGS_SECRET", "hunter2")
    leak = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        await hostile("environment", str(tmp_path / "said"))(PNG)
    finally:
        os.close(leak)
    said = msgspec.json.decode((tmp_path / "said").read_bytes())
    assert set(said["environment"]) <= {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LANG", "MALLOC_ARENA_MAX", "LC_CTYPE"}
    assert said["files"] == []
    assert not Path(said["folder"]).exists()
    # The three of every process, the file, and the one with which it lists them.
    assert len(said["descriptors"]) == 5
    assert said["file"] in said["descriptors"]
    assert said["read_only"]
    assert said["leads"]


async def test_the_doors_are_shut_as_far_as_the_kernel_lets() -> None:
    looked = await hostile("doors")(PNG)
    assert looked.width is not None
    assert looked.height is not None
    possible = {name for bit, name in enumerate(ATTEMPTS) if looked.width >> bit & 1}
    holds = {name for bit, name in enumerate(("network", "files", "calls")) if looked.height >> bit & 1}
    # Nothing is ever written, whatever the kernel.
    assert not possible & {"write a file", "write a memfd"}
    if "files" in holds:
        assert not possible & {"read a file", "list a folder", "read the server's environment", "signal the server"}
    if "calls" in holds:
        assert not possible & {"a socket", "a socket of this machine", "a program"}
    assert looked.pages == 10


ATTEMPTS = (
    *("a socket", "a socket of this machine", "read a file", "list a folder"),
    *("write a file", "write a memfd", "read the server's environment", "signal the server"),
    "a program",
)


@needs_ffmpeg
async def test_where_the_kernel_refuses_it_all_files_are_looked_at_all_the_same(
    ffmpeg: Callable[..., bytes],
) -> None:
    looked = await hostile("refused")(PNG)
    assert (looked.width, looked.problem, len(looked.previews)) == (600, None, 3)
    film = ffmpeg("a.mp4", "-f", "lavfi", "-i", "testsrc=duration=1:size=64x64:rate=5", "-pix_fmt", "yuv420p")
    assert (await hostile("refused")(film)).problem is None


async def test_the_callers_descriptor_stays_as_it_was(media: Media) -> None:
    with held(PNG) as fd:
        os.lseek(fd, 7, os.SEEK_SET)
        looked = await media.look(fd, len(PNG), PICTURE, SIZES)
        assert looked.problem is None
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7
        os.pwrite(fd, b"x", 0)


async def test_what_nobody_can_look_into_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    look = hostile("die", "9")
    for data in (b"<svg/>", b"words", b"PK\3\4", b"\0\1\2"):
        assert (await look(data)) == Looked(problem="unsupported")


# --- many, and ends -------------------------------------------------------------------------------


async def test_no_more_children_at_a_time_than_the_limit() -> None:
    before = children()
    look = hostile("wait", children=2, seconds=30)
    tasks = [asyncio.ensure_future(look(PNG)) for _ in range(5)]
    await wait_until(lambda: len(children() - before) == 2, "two are at work")
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(children() - before) == 2
    # One that ends makes room for the next.
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    await wait_until(lambda: len(children() - before) == 2, "two are at work")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert children() <= before


async def test_who_waits_for_a_turn_is_not_too_slow() -> None:
    media = Media(MediaLimits(children=1, seconds=3))
    looked = await asyncio.gather(*(Look(media)(PNG) for _ in range(4)))
    assert [one.problem for one in looked] == [None] * 4


def cancelled_at_any_time(seed: int) -> None:
    """Cancelled before, while and after the child starts, on the loop that runs this."""

    async def play() -> None:
        chance = random.Random(seed)
        media = Media(MediaLimits(children=3))
        before = children()
        for _ in range(12):
            task = asyncio.ensure_future(Look(media)(PNG))
            for _ in range(chance.choice([0, 1, 2, 3, 5, 8])):
                await asyncio.sleep(0)
            if chance.random() < 0.6:
                await asyncio.sleep(chance.random() * 0.2)
            task.cancel()
            if chance.random() < 0.3:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
        await wait_until(lambda: children() <= before, "all are gone")
        # And it still works.
        assert (await Look(media)(PNG)).problem is None

    asyncio.run(play()) if seed % 2 else uvloop.run(play())


@pytest.mark.parametrize("seed", [0, 1])
def test_cancelled_at_any_time_nothing_stays_behind(seed: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cancelled_at_any_time(seed)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_cancelling_ends_what_the_child_has_started(tmp_path: Path) -> None:
    told = tmp_path / "numbers"
    task = asyncio.ensure_future(hostile("with a loose grandchild", str(told))(PNG))
    await wait_until(told.exists, "it has begun")
    numbers = [int(word) for word in told.read_text().split()]
    assert all(lives(number) for number in numbers)
    task.cancel()
    await asyncio.wait([task])
    await wait_until(lambda: not any(lives(number) for number in numbers), "none is left")


async def test_a_server_that_is_killed_leaves_no_orphans(tmp_path: Path) -> None:
    told = tmp_path / "numbers"
    server = f"""
import asyncio, os
from tidings.server.media.facts import MediaLimits
from tidings.server.media.kinds import Kind
from tidings.server.media.process import Media
fd = os.memfd_create("x")
media = Media(MediaLimits(seconds=600), program=({str(HOSTILE)!r}, "with a grandchild", {str(told)!r}))
asyncio.run(media.look(fd, 0, Kind("image/png", "image", True), []))
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", server], env=environment)
    await wait_until(told.exists, "it has begun")
    numbers = [int(word) for word in told.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    await wait_until(lambda: not any(lives(number) for number in numbers), "none is left")


# --- any bytes ------------------------------------------------------------------------------------

SEEDS = {
    "image/png": PNG,
    "image/jpeg": encoded(corners(64, 48), "JPEG"),
    "image/gif": encoded(corners(64, 48), "GIF"),
    "image/webp": encoded(corners(64, 48), "WEBP"),
    "image/avif": encoded(corners(64, 48), "AVIF"),
    "image/heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "application/pdf": encoded(corners(64, 48), "PDF"),
    "audio/wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\4\0\0\0\1\2\3\4",
    "video/mp4": png(2, 2),
}


@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=4)), max_size=6),
    st.integers(0, 400),
    st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_file_harms_the_parent(media_type: str, changes: list[tuple[int, bytes]], end: int, cut: bool) -> None:
    """Headers damaged in any way, for the decoder of their own type: an answer always, and never an exception."""
    data = bytearray(SEEDS[media_type])
    for at, value in changes:
        data[at : at + len(value)] = value
    whole = bytes(data[:end] if cut else data)
    family = "document" if media_type == "application/pdf" else media_type.partition("/")[0]
    kind = Kind(media_type, family, False)  # type: ignore[arg-type]

    async def play() -> Looked:
        media = Media(MediaLimits(seconds=20, cpu_seconds=10, memory_bytes=512 << 20))
        with held(whole) as fd:
            return await media.look(fd, len(whole), kind, [Preview("small", 64)])

    looked = asyncio.run(play())
    assert looked.problem is None or looked.problem in PROBLEMS


@given(st.binary(max_size=200))
@settings(max_examples=20, deadline=None)
def test_any_bytes_have_a_kind_that_can_be_looked_at(data: bytes) -> None:
    looked = asyncio.run(Look(Media(MediaLimits()))(data))
    assert looked.problem is None or looked.problem in PROBLEMS


async def test_a_child_costs_less_than_a_second() -> None:
    """Generous, as machines are busy: it tells that nothing heavy crept into what every child loads."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, tidings.server.media.child; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.split()
    heavy = {"PIL", "pypdfium2", "structlog", "asyncio", "sqlalchemy", "tidings.wire", "tidings.server.telemetry"}
    assert not heavy & set(loaded)
