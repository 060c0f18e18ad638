"""What the tests of media share: looking at bytes, and making pictures whose pixels tell."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from tidings.server.media.facts import PROBLEMS, Looked, Preview
from tidings.server.media.kinds import HEAD_BYTES, TAIL_BYTES, Kind, recognise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tidings.server.media.process import Media

SIZES = (Preview("small", 160), Preview("medium", 480), Preview("large", 1280))
RED, GREEN, BLUE, WHITE = (220, 20, 20), (20, 200, 20), (20, 20, 220), (250, 250, 250)
CORNERS = (RED, GREEN, BLUE, WHITE)


@contextmanager
def held(data: bytes) -> Iterator[int]:
    """A descriptor behind which `data` is."""
    fd = os.memfd_create("test")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def kind_of(data: bytes) -> Kind:
    return recognise(data[:HEAD_BYTES], data[-TAIL_BYTES:], len(data))


class Look:
    """Looks at bytes: as what they are recognised as, or as another kind."""

    def __init__(self, media: Media) -> None:
        self._media = media

    async def __call__(self, data: bytes, *, kind: Kind | None = None, wanted: Sequence[Preview] = SIZES) -> Looked:
        with held(data) as fd:
            looked = await self._media.look(fd, len(data), kind or kind_of(data), wanted)
        assert looked.problem is None or looked.problem in PROBLEMS
        return looked


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def corners(width: int = 600, height: int = 400) -> Image.Image:
    """Red at the top left, green at the top right, blue and white below."""
    image = Image.new("RGB", (width, height))
    for number, colour in enumerate(CORNERS):
        x, y = number % 2 * width // 2, number // 2 * height // 2
        image.paste(colour, (x, y, x + width - width // 2, y + height - height // 2))
    return image


def seen(data: bytes) -> list[tuple[int, int, int]]:
    """The colours of the corners, each as the nearest of `CORNERS`: top left, top right, bottom left, bottom right."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    width, height = rgb.size
    found = []
    for x, y in ((1, 1), (3, 1), (1, 3), (3, 3)):
        pixel = rgb.getpixel((width * x // 4, height * y // 4))
        assert isinstance(pixel, tuple)
        found.append(min(CORNERS, key=lambda colour: sum(abs(a - b) for a, b in zip(colour, pixel, strict=False))))
    return found


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of RGB by hand, that claims to be as large as it is told."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels or b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")
