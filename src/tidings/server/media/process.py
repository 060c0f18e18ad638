"""Looking into files that strangers have sent: a process of its own for each, which may die of it.

The server's process never decodes anything. It hands a descriptor to a child (child.py), waits as long as the limits
say, and believes of the answer only what it can check. `docs/internals/media.md` tells what the child may do.
"""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from tidings.server.media.facts import (
    EXIT_MEMORY,
    NUMBER_MAX,
    PREVIEW_SIDE_MAX,
    PREVIEW_TYPE,
    THUMBHASH_BYTES_MAX,
    WAVEFORM_SAMPLES_MAX,
    Job,
    Looked,
    MediaLimits,
    Preview,
    PreviewImage,
    Problem,
)
from tidings.server.media.kinds import Kind
from tidings.server.telemetry import get_logger

__all__ = ["Looked", "Media", "MediaLimits", "Preview", "PreviewImage", "Problem"]

log = get_logger(__name__)

# What an answer has besides its pictures: numbers, names, a waveform.
_ANSWER_BYTES_BESIDES: Final = 64 << 10
_CHUNK_BYTES: Final = 256 << 10
_CHILD: Final = ("-m", "tidings.server.media.child")
_PDF: Final = "application/pdf"


class Media:
    """Tells what is in files, `limits.children` of them at a time; more wait for their turn, for which no time counts.

    `program` is what Python is started with, for tests.
    """

    def __init__(self, limits: MediaLimits, *, program: Sequence[str] = _CHILD) -> None:
        self._limits = limits
        self._program = tuple(program)
        self._slots = asyncio.Semaphore(limits.children)

    async def look(self, fd: int, size: int, kind: Kind, wanted: Sequence[Preview]) -> Looked:
        """What the file behind the descriptor `fd` is, `size` bytes long, and the previews that are `wanted` of it.

        `fd` can be sought in (a memfd, a file on a disk); it stays the caller's, and so does its position. However
        hostile the file is, there is an answer: `Looked.problem` says why it is not a full one. Raises OSError where
        this machine can start no process, and ValueError for previews that nobody can want. Cancelled, it kills the
        child.
        """
        _check_wanted(wanted)
        if kind.family not in {"image", "audio", "video"} and kind.media_type != _PDF:
            return Looked(problem="unsupported")
        async with self._slots:
            # Opened anew: for reading only, and with a position of its own.
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                with tempfile.TemporaryDirectory(prefix="tidings-media-") as folder:
                    looked = await self._run(self._job(own, size, kind, wanted), folder)
            finally:
                os.close(own)
        if looked.problem == "crashed":
            log.warning("media.crashed", media_type=kind.media_type, bytes=size)
        return looked

    def _job(self, fd: int, size: int, kind: Kind, wanted: Sequence[Preview]) -> Job:
        return Job(
            fd=fd,
            size=size,
            media_type=kind.media_type,
            family=kind.family,
            wanted=tuple(wanted),
            limits=self._limits,
            parent=os.getpid(),
            # Looked for each time: who installs it need not start the server again.
            ffmpeg=shutil.which("ffmpeg") or "",
            ffprobe=shutil.which("ffprobe") or "",
        )

    async def _run(self, job: Job, folder: str) -> Looked:
        told = os.memfd_create("tidings-media-job")
        try:
            os.write(told, msgspec.json.encode(job))
            os.lseek(told, 0, os.SEEK_SET)
            read_end, write_end = os.pipe()
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-s", "-P", *self._program),
                    stdin=told,
                    stdout=write_end,
                    stderr=asyncio.subprocess.DEVNULL,
                    pass_fds=(job.fd,),
                    # A group of its own, so that one signal ends it with all that it has started.
                    start_new_session=True,
                    cwd=folder,
                    env=_environment(),
                )
            except BaseException:
                os.close(read_end)
                raise
            finally:
                os.close(write_end)
        finally:
            os.close(told)
        try:
            async with asyncio.timeout(self._limits.seconds):
                answer = await _read(read_end, self._limits.output_bytes + _ANSWER_BYTES_BESIDES)
                if answer is None:
                    return Looked(problem="crashed")
                status = await process.wait()
        except TimeoutError:
            return Looked(problem="too_slow")
        finally:
            os.close(read_end)
            _kill(process)
            await process.wait()
        if status != 0:
            return Looked(problem=_why(status))
        return _believed(answer, job.wanted, self._limits)


def _check_wanted(wanted: Sequence[Preview]) -> None:
    if len({preview.name for preview in wanted}) != len(wanted):
        raise ValueError("two previews of the same name")
    if not all(1 <= preview.side <= PREVIEW_SIDE_MAX for preview in wanted):
        raise ValueError(f"a preview's side is 1 to {PREVIEW_SIDE_MAX}")


def _environment() -> dict[str, str]:
    """Nothing of the server's: its environment may hold secrets."""
    return {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        # Each of the allocator's arenas takes address space, which is what is limited.
        "MALLOC_ARENA_MAX": "2",
    }


async def _read(read_end: int, bytes_max: int) -> bytes | None:
    """All that comes until the end; None where it is more than `bytes_max`."""
    loop = asyncio.get_running_loop()
    answer = bytearray()
    done: asyncio.Future[bool] = loop.create_future()

    def read() -> None:
        try:
            chunk = os.read(read_end, _CHUNK_BYTES)
        except BlockingIOError:
            return
        answer.extend(chunk)
        if not done.done() and (not chunk or len(answer) > bytes_max):
            done.set_result(not chunk)

    # (A transport of asyncio, cancelled while it is made, closes the descriptor twice: by then it may be another's.)
    os.set_blocking(read_end, False)
    loop.add_reader(read_end, read)
    try:
        return bytes(answer) if await done else None
    finally:
        loop.remove_reader(read_end)


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has ended, and the loop has not heard of it yet.
        pass


def _why(status: int) -> Problem:
    """What the end of a child without an answer says."""
    if status == -signal.SIGXCPU:
        return "too_slow"
    # Nobody else kills with this signal but the kernel, when the machine has no memory left.
    if status in {EXIT_MEMORY, -signal.SIGKILL}:
        return "too_much_memory"
    return "crashed"


def _believed(answer: bytes, wanted: Sequence[Preview], limits: MediaLimits) -> Looked:
    """The answer, if it is one that an honest child gives: a file may have taken the child over."""
    try:
        looked = msgspec.msgpack.decode(answer, type=Looked)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Looked(problem="crashed")
    numbers = (looked.width, looked.height, looked.duration_ms, looked.pages)
    honest = (
        all(number is None or 0 <= number <= NUMBER_MAX for number in numbers)
        and len(looked.waveform or b"") <= WAVEFORM_SAMPLES_MAX
        and len(looked.thumbhash or b"") <= THUMBHASH_BYTES_MAX
        and [preview.name for preview in looked.previews] in ([], [preview.name for preview in wanted])
        and all(_is_preview(made, asked) for made, asked in zip(looked.previews, wanted, strict=False))
        and sum(len(preview.data) for preview in looked.previews) <= limits.output_bytes
    )
    return looked if honest else Looked(problem="crashed")


def _is_preview(made: PreviewImage, asked: Preview) -> bool:
    return (
        made.media_type == PREVIEW_TYPE
        and made.data[:4] == b"RIFF"
        and made.data[8:12] == b"WEBP"
        and int.from_bytes(made.data[4:8], "little") + 8 == len(made.data)
        and 1 <= made.width <= asked.side
        and 1 <= made.height <= asked.side
    )
