"""A process for one file: `python -m tidings.server.media.child`, started by `process.Media` and by nobody else.

It reads a `Job` (JSON) from its standard input, gives away what it does not need (confine.py), reads the file from
the descriptor that the job names, and writes a `Looked` (MessagePack) to its standard output. Whatever is wrong with
the file is a word in the answer; what goes so wrong that there is no answer, the parent tells from how this process
ended.
"""

import os
import sys
from typing import BinaryIO

import msgspec

from tidings.server.media import confine
from tidings.server.media.facts import EXIT_MEMORY, Job, Looked, Trouble

__all__ = ["main"]


def main() -> None:
    """Answer one job."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    confine.die_with(job.parent)
    limits = job.limits
    confine.bounds(cpu_seconds=limits.cpu_seconds, memory_bytes=limits.memory_bytes)
    try:
        looked = _look(job)
    except MemoryError:
        os._exit(EXIT_MEMORY)
    sys.stdout.buffer.write(msgspec.msgpack.encode(looked))
    sys.stdout.buffer.flush()
    # Libraries that have read a hostile file need not tidy up after it.
    os._exit(0)


def _look(job: Job) -> Looked:
    try:
        return _by_family(job)
    except Trouble as trouble:
        return msgspec.structs.replace(trouble.known, problem=trouble.problem)
    except MemoryError:
        return Looked(problem="too_much_memory")
    except Exception:
        # A decoder's exception says what it stumbled over, in its own words: for us the file is broken.
        return Looked(problem="broken")


def _by_family(job: Job) -> Looked:
    """What is needed is loaded first; then the doors are closed; then the file is opened."""
    if job.family in {"audio", "video"}:
        return _by_tools(job)
    if job.family == "image":
        from tidings.server.media import images

        images.prepare(job.media_type, job.limits)
        confine.isolate(threads=images.takes_threads(job.media_type))
        with _opened(job) as file:
            return images.look_at_image(file, job.media_type, job.limits, job.wanted)
    if job.media_type == "application/pdf":
        from tidings.server.media import pdf

        confine.isolate()
        with _opened(job) as file:
            return pdf.look_at_pdf(file, job.limits, job.wanted)
    return Looked(problem="unsupported")


def _by_tools(job: Job) -> Looked:
    import wave

    from tidings.server.media import film, sound
    from tidings.server.media.tools import DEMUXERS, Source, Tools

    # ffmpeg opens the file by itself, which takes a rule where it is one on a disk.
    confine.isolate([job.ffmpeg, job.ffprobe, f"/proc/self/fd/{job.fd}"], tools=True)
    if job.media_type not in DEMUXERS:
        return Looked(problem="unsupported")
    source = Source(job.fd, job.media_type)
    if job.media_type == "audio/wav":
        with _opened(job) as file:
            try:
                return sound.look_at_wav(file, job.size)
            except (wave.Error, EOFError):
                # Another codec in the same container, or a damaged one: ffmpeg tells which.
                pass
    tools = Tools(job.ffmpeg, job.ffprobe, job.limits)
    if job.family == "audio":
        return sound.look_at_sound(tools, source)
    return film.look_at_film(tools, source, job.limits, job.wanted)


def _opened(job: Job) -> BinaryIO:
    os.lseek(job.fd, 0, os.SEEK_SET)
    return os.fdopen(os.dup(job.fd), "rb")


if __name__ == "__main__":
    main()
