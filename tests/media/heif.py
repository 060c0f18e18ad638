"""A HEIC picture as phones make them: one frame of HEVC by ffmpeg, in a container by hand (ISO/IEC 23008-12)."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from PIL import Image


def _encodes() -> bool:
    if shutil.which("ffmpeg") is None:
        return False
    said = subprocess.run(["ffmpeg", "-v", "error", "-encoders"], capture_output=True, text=True).stdout
    return "libx265" in said


needs_heic = pytest.mark.skipif(not _encodes(), reason="ffmpeg with libx265 was not found: sudo apt-get install ffmpeg")


def box(name: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", len(data) + 8) + name + data


def _frame(image: Image.Image) -> tuple[bytes, bytes]:
    """The decoder's configuration, and the frame with its length before each unit."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.png", Path(folder) / "out.mp4"
        image.save(source)
        options = ["-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p", "-frames:v", "1"]
        command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(source), *options, "-tag:v", "hvc1", str(target)]
        subprocess.run(command, check=True, capture_output=True)
        data = target.read_bytes()
    at = data.index(b"hvcC") - 4
    configuration = data[at : at + int.from_bytes(data[at : at + 4])]
    at = data.index(b"mdat") - 4
    return configuration, data[at + 8 : at + int.from_bytes(data[at : at + 4])]


def heic(image: Image.Image) -> bytes:
    configuration, frame = _frame(image)
    ftyp = box(b"ftyp", b"heic", b"\0\0\0\0", b"mif1heic")
    full = b"\0\0\0\0"

    def meta(offset: int) -> bytes:
        handler = box(b"hdlr", full, b"\0\0\0\0pict", b"\0" * 13)
        primary = box(b"pitm", full, struct.pack(">H", 1))
        place = struct.pack(">BBHHHHII", 0x44, 0, 1, 1, 0, 1, offset, len(frame))
        info = box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), b"hvc1", b"\0")
        sides = box(b"ispe", full, struct.pack(">II", *image.size))
        properties = box(b"ipco", configuration, sides)
        uses = box(b"ipma", full, struct.pack(">IHBBB", 1, 1, 2, 0x81, 2))
        return box(
            b"meta",
            full,
            *(handler, primary, box(b"iloc", full, place), box(b"iinf", full, struct.pack(">H", 1), info)),
            box(b"iprp", properties, uses),
        )

    return ftyp + meta(len(ftyp) + len(meta(0)) + 8) + box(b"mdat", frame)
