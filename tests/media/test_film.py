"""Films and documents: their sides, their length, the picture that stands for them, and nothing of other files."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image

from tests.media.conftest import needs_ffmpeg
from tests.media.making import BLUE, CORNERS, GREEN, RED, WHITE, Look, corners, encoded, kind_of, seen
from tidings.server.media.facts import MediaLimits
from tidings.server.media.kinds import Kind
from tidings.server.media.process import Media
from tidings.server.media.tools import DEMUXERS, Source, input_options

Film = Callable[..., bytes]


@pytest.fixture
def film(ffmpeg: Callable[..., bytes], tmp_path: Path) -> Film:
    """A film of `corners`: `film("a.mp4", seconds=2, options=[…])`."""

    def make(
        name: str, *, seconds: float = 2, options: tuple[str, ...] = (), picture: Image.Image | None = None
    ) -> bytes:
        source = tmp_path / f"{name}.png"
        (picture or corners(320, 240)).save(source)
        shown = ["-loop", "1", "-framerate", "10", "-i", str(source), "-t", str(seconds)]
        return ffmpeg(name, *shown, "-pix_fmt", "yuv420p", *options)

    return make


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a.mp4", "video/mp4"),
        ("a.mov", "video/quicktime"),
        ("a.webm", "video/webm"),
        ("a.mkv", "video/x-matroska"),
        ("a.avi", "video/x-msvideo"),
    ],
)
async def test_a_film_has_sides_a_length_and_a_picture(look: Look, film: Film, name: str, media_type: str) -> None:
    data = film(name)
    assert kind_of(data).media_type == media_type
    looked = await look(data)
    assert (looked.width, looked.height, looked.problem) == (320, 240, None)
    assert looked.duration_ms == pytest.approx(2000, abs=110)
    assert [(made.name, made.width, made.height) for made in looked.previews] == [
        ("small", 160, 120),
        ("medium", 320, 240),
        ("large", 320, 240),
    ]
    assert all(seen(made.data) == list(CORNERS) for made in looked.previews)
    assert looked.thumbhash


# ISO/IEC 14496-12, 8.3.2: the first two columns of the matrix with which a track is shown, as 16.16.
TURNED = {
    "to the right": ((0, 1, -1, 0), (BLUE, RED, WHITE, GREEN)),
    "to the left": ((0, -1, 1, 0), (GREEN, WHITE, RED, BLUE)),
    "upside down": ((-1, 0, 0, -1), (WHITE, BLUE, GREEN, RED)),
}


@needs_ffmpeg
@pytest.mark.parametrize("how", TURNED)
async def test_a_film_is_shown_as_it_was_taken(look: Look, film: Film, how: str) -> None:
    (a, b, c, d), shown = TURNED[how]
    data = bytearray(film("flat.mp4"))
    matrix = data.index(b"tkhd") + 44
    assert data[matrix : matrix + 4] == b"\0\1\0\0"
    data[matrix : matrix + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    looked = await look(bytes(data))
    sides = (320, 240) if how == "upside down" else (240, 320)
    assert (looked.width, looked.height) == sides
    assert (looked.previews[-1].width, looked.previews[-1].height) == sides
    assert seen(looked.previews[0].data) == list(shown)


@needs_ffmpeg
async def test_the_picture_is_of_the_first_second_where_there_is_one(
    look: Look, ffmpeg: Callable[..., bytes], film: Film
) -> None:
    begins_black = [
        *("-f", "lavfi", "-i", "color=black:size=320x240:rate=10:duration=0.8"),
        *("-f", "lavfi", "-i", "color=0x14c814:size=320x240:rate=10:duration=2"),
        *("-filter_complex", "[0][1]concat=n=2", "-pix_fmt", "yuv420p"),
    ]
    looked = await look(ffmpeg("black.mp4", *begins_black))
    assert seen(looked.previews[0].data) == [GREEN] * 4
    short = await look(film("short.mp4", seconds=0.4))
    assert seen(short.previews[0].data) == list(CORNERS)


@needs_ffmpeg
async def test_an_index_at_the_end_is_found(look: Look, film: Film) -> None:
    """As cameras write it; ffmpeg's own order is the same."""
    data = film("end.mp4")
    assert data.index(b"moov") > data.index(b"mdat")
    assert (await look(data)).problem is None
    first = film("start.mp4", options=("-movflags", "+faststart"))
    assert first.index(b"moov") < first.index(b"mdat")
    assert (await look(first)).problem is None


@needs_ffmpeg
async def test_a_film_without_an_end_in_its_header_is_measured(look: Look, film: Film) -> None:
    looked = await look(film("live.webm", options=("-live", "1", "-f", "webm")))
    assert looked.duration_ms == pytest.approx(2000, abs=110)


@needs_ffmpeg
async def test_a_file_on_a_disk_is_read_as_well(media: Media, film: Film, tmp_path: Path) -> None:
    data = film("a.mp4")
    with open(tmp_path / "a.mp4", "rb") as file:
        file.seek(100)
        looked = await media.look(file.fileno(), len(data), kind_of(data), [])
        assert file.tell() == 100
    assert (looked.width, looked.problem) == (320, None)


@needs_ffmpeg
async def test_too_many_pixels_are_not_decoded(film: Film) -> None:
    data = film("a.mp4")
    looked = await Look(Media(MediaLimits(pixels=320 * 240 - 1)))(data)
    assert (looked.problem, looked.previews) == ("too_many_pixels", ())
    assert (await Look(Media(MediaLimits(pixels=320 * 240)))(data)).problem is None


@needs_ffmpeg
async def test_half_a_film_is_no_accident(look: Look, film: Film) -> None:
    data = film("a.mp4")
    assert (await look(data[: len(data) // 2])).problem == "broken"
    webm = film("a.webm")
    assert (await look(webm[: len(webm) // 2])).problem in {None, "broken"}
    damaged = bytearray(data)
    damaged[200:600] = b"\xff" * 400
    assert (await look(bytes(damaged))).problem in {None, "broken"}


@needs_ffmpeg
async def test_a_codec_that_nobody_records_in_is_not_decoded(look: Look, film: Film) -> None:
    """A format of 1991, which ffmpeg knows: its decoder is not on the list."""
    data = film("old.avi", options=("-c:v", "cinepak", "-pix_fmt", "rgb24"))
    assert (await look(data)).problem == "unsupported"


# --- other files ----------------------------------------------------------------------------------


def lists(folder: Path) -> dict[str, str]:
    """Files that name another file, each in a way that ffmpeg follows."""
    film = folder / "secret.mp4"
    return {
        "a playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile:{film}\n#EXT-X-ENDLIST\n",
        "a playlist of plain paths": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n",
        "a list": f"ffconcat version 1.0\nfile '{film}'\n",
        "a manifest": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            f'mediaPresentationDuration="PT2S"><Period><AdaptationSet><Representation id="1" bandwidth="1">'
            f"<BaseURL>file:{film}</BaseURL></Representation></AdaptationSet></Period></MPD>"
        ),
        "a far file": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n",
    }


@needs_ffmpeg
@pytest.mark.parametrize("media_type", ["video/mp4", "video/webm", "video/x-msvideo", "audio/mpeg", "audio/ogg"])
async def test_a_list_of_files_is_no_film(look: Look, film: Film, tmp_path: Path, media_type: str) -> None:
    film("secret.mp4", picture=Image.new("RGB", (320, 240), RED))
    for text in lists(tmp_path).values():
        data = text.encode()
        assert kind_of(data).family == "text"
        looked = await look(data, kind=Kind(media_type, "audio" if "audio" in media_type else "video", True))
        assert looked.problem in {"broken", "unsupported"}
        assert (looked.width, looked.previews, looked.duration_ms) == (None, (), None)


@needs_ffmpeg
def test_ffmpeg_by_itself_would_follow_a_list(film: Film, ffmpeg: Callable[..., bytes], tmp_path: Path) -> None:
    """What the one before protects from; and the options alone, without the child's other doors shut, refuse it."""
    film("secret.mp4", picture=Image.new("RGB", (320, 240), RED))
    playlist = tmp_path / "a.m3u8"
    playlist.write_text(lists(tmp_path)["a playlist"])
    probe = shutil.which("ffprobe") or ""

    def width(*options: str) -> str:
        done = subprocess.run(
            [probe, "-v", "error", "-show_entries", "stream=width", "-of", "csv=p=0", *options],
            capture_output=True,
            text=True,
            pass_fds=(fd,),
        )
        return done.stdout.strip()

    fd = os.open(playlist, os.O_RDONLY)
    try:
        assert width("-i", str(playlist)).startswith("320")
        assert all(not width(*input_options(Source(fd, media_type))) for media_type in DEMUXERS)
    finally:
        os.close(fd)


@pytest.mark.parametrize("media_type", DEMUXERS)
def test_ffmpeg_guesses_nothing(media_type: str) -> None:
    options = input_options(Source(7, media_type))
    said = dict(zip(options[::2], options[1::2], strict=True))
    assert said["-protocol_whitelist"] == "file"
    assert said["-f"] == said["-format_whitelist"] == DEMUXERS[media_type]
    assert said["-i"] == "file:/proc/self/fd/7"
    assert not {"hls", "concat", "dash", "image2", "tee", "lavfi"} & set(DEMUXERS.values())


# --- documents ------------------------------------------------------------------------------------


def pdf(*pages: Image.Image) -> bytes:
    return encoded(pages[0], "PDF", save_all=True, append_images=pages[1:])


async def test_a_document_has_pages_and_shows_the_first(look: Look) -> None:
    looked = await look(pdf(corners(612, 792), corners(100, 100)))
    assert (looked.pages, looked.width, looked.height, looked.problem) == (2, 612, 792, None)
    assert [(made.width, made.height) for made in looked.previews] == [(124, 160), (371, 480), (990, 1280)]
    for made in looked.previews:
        assert seen(made.data) == list(CORNERS)
    assert looked.thumbhash


@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.7\n",
        b"%PDF-1.7\n" + b"\xff" * 2000,
        # A tree of pages that contains itself.
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[2 0 R 2 0 R]/Count 99999999>>endobj\ntrailer<</Root 1 0 R>>\n",
    ],
)
async def test_a_broken_document_is_no_accident(look: Look, data: bytes) -> None:
    looked = await look(data)
    assert looked.problem in {"broken", "crashed", "unsupported"}
    assert looked.previews == ()


@pytest.mark.parametrize(("side", "problem"), [(14_400, None), (14_401, "unsupported"), (10_000_000, "unsupported")])
async def test_a_page_has_bounds(look: Look, side: int, problem: str | None) -> None:
    document = pypdfium2.PdfDocument.new()
    document.new_page(side, 72)
    target = io.BytesIO()
    document.save(target)
    looked = await look(target.getvalue())
    assert (looked.pages, looked.problem) == (1, problem)


async def test_a_document_with_a_password_stays_shut(look: Look) -> None:
    """Standard security handler, revision 2, keyed for nobody."""
    data = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 10 10]>>endobj\n"
        b"4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<" + b"11" * 32 + b">/U<" + b"22" * 32 + b">>>endobj\n"
        b"trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>\n%%EOF\n"
    )
    assert (await look(data)).problem == "unsupported"
