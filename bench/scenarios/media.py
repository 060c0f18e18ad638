"""Looking into a file: what a child costs to start, and what a phone's picture takes."""

from __future__ import annotations

import io
import os
import resource
import time

from PIL import Image

from bench.measure import Findings
from bench.plan import Plan
from tidings.server.media.kinds import recognise
from tidings.server.media.process import Media, MediaLimits, Preview

# The sizes that a conversation shows.
WANTED = (Preview("small", 160), Preview("medium", 480), Preview("large", 1280))
LOOKS = 20


async def run(plan: Plan, findings: Findings) -> None:
    media = Media(MediaLimits())
    for what, side, count in (("a picture of 8 pixels", (4, 2), LOOKS), ("a JPEG of 12 megapixels", (4000, 3000), 5)):
        data = _jpeg(*side)
        await _look(media, data)
        for _ in range(plan.runs):
            began, cpu = time.perf_counter(), _children()
            for _ in range(plan.size(count, 2)):
                await _look(media, data)
            looks = plan.size(count, 2)
            findings.add(f"{what}: by the clock", (time.perf_counter() - began) / looks * 1e3, "ms")
            findings.add(f"{what}: CPU of the child", (_children() - cpu) / looks * 1e3, "ms")
    findings.note("One file after the other, each in a child of its own; three previews and a thumbhash of each.")


async def _look(media: Media, data: bytes) -> None:
    fd = os.memfd_create("picture")
    try:
        os.write(fd, data)
        looked = await media.look(fd, len(data), recognise(data, data[-100:], len(data)), WANTED)
    finally:
        os.close(fd)
    assert looked.problem is None, looked.problem
    assert len(looked.previews) == len(WANTED)


def _jpeg(width: int, height: int) -> bytes:
    """What compresses as photographs do: colours that change slowly, and some noise."""
    colours = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * n).resize((width, height)) for n in range(3)])
    noise = Image.effect_noise((width, height), 20).convert("RGB")
    target = io.BytesIO()
    Image.blend(colours, noise, 0.2).save(target, "JPEG", quality=90)
    return target.getvalue()


def _children() -> float:
    """Seconds of processor time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
