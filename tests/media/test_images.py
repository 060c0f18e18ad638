"""Pictures become smaller pictures of their pixels, upright, in sRGB, without a word of where they were taken."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image, ImageCms

from tests.media.heif import heic, needs_heic
from tests.media.making import BLUE, CORNERS, GREEN, RED, SIZES, WHITE, Look, chunk, corners, encoded, png, seen
from tidings.server.media.facts import MediaLimits, Preview
from tidings.server.media.kinds import Kind
from tidings.server.media.process import Media
from tidings.server.media.thumbhash import encode

FORMS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF"]
GPS = 0x8825
SECRETS = (b"Exif", b"EXIF", b"ICCP", b"XMP ", b"xmpmeta", b"Canon", b"52.5200", b"hidden words")


def located(orientation: int) -> Image.Exif:
    """What a camera writes: which one it is, how it was held, and where."""
    exif = Image.Exif()
    exif[0x010F] = "Canon"
    exif[0x0112] = orientation
    exif.get_ifd(GPS).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0), 29: "52.5200"})
    return exif


@pytest.mark.parametrize("form", FORMS)
async def test_previews_are_smaller_and_show_the_same(look: Look, form: str) -> None:
    looked = await look(encoded(corners(1500, 1000), form))
    assert (looked.width, looked.height, looked.problem) == (1500, 1000, None)
    assert [(made.name, made.width, made.height) for made in looked.previews] == [
        ("small", 160, 107),
        ("medium", 480, 320),
        ("large", 1280, 853),
    ]
    for made in looked.previews:
        with Image.open(io.BytesIO(made.data)) as image:
            assert (image.format, image.size) == ("WEBP", (made.width, made.height))
        assert made.media_type == "image/webp"
        assert seen(made.data) == list(CORNERS)
    assert looked.thumbhash is not None
    assert 10 < len(looked.thumbhash) < 30


async def test_nothing_is_enlarged(look: Look) -> None:
    looked = await look(encoded(corners(200, 100), "PNG"))
    assert [(made.width, made.height) for made in looked.previews] == [(160, 80), (200, 100), (200, 100)]


async def test_extreme_sides_keep_a_pixel(look: Look) -> None:
    looked = await look(encoded(Image.new("RGB", (9000, 1), RED), "PNG"))
    assert [(made.width, made.height) for made in looked.previews] == [(160, 1), (480, 1), (1280, 1)]
    assert looked.thumbhash is not None


UPRIGHT = {
    1: (RED, GREEN, BLUE, WHITE),
    2: (GREEN, RED, WHITE, BLUE),
    3: (WHITE, BLUE, GREEN, RED),
    4: (BLUE, WHITE, RED, GREEN),
    5: (RED, BLUE, GREEN, WHITE),
    6: (BLUE, RED, WHITE, GREEN),
    7: (WHITE, GREEN, BLUE, RED),
    8: (GREEN, WHITE, RED, BLUE),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
async def test_pictures_are_upright_and_say_nothing_of_where_they_were_taken(
    look: Look, form: str, orientation: int
) -> None:
    """The meanings of the eight orientations are written out: EXIF 2.32, 4.6.4.A."""
    data = encoded(corners(600, 400), form, exif=located(orientation))
    assert b"Canon" in data
    looked = await look(data)
    sides = (400, 600) if orientation >= 5 else (600, 400)
    assert (looked.width, looked.height) == sides
    for made in looked.previews:
        assert (made.width > made.height) == (sides[0] > sides[1])
        assert seen(made.data) == list(UPRIGHT[orientation])
        assert not any(secret in made.data for secret in SECRETS)


async def test_words_and_profiles_stay_behind(look: Look) -> None:
    """Comments, XMP, text, a profile, and what follows the picture."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">hidden words</x:xmpmeta>'
    jpeg = encoded(corners(), "JPEG", comment=b"hidden words", icc_profile=profile, xmp=xmp, exif=located(1))
    webp = encoded(corners(), "WEBP", icc_profile=profile, xmp=xmp, exif=located(1))
    text = png(300, 200, chunk(b"tEXt", b"Comment\0hidden words"), pixels=(b"\0" + b"\xdc\x14\x14" * 300) * 200)
    for data in (jpeg + b"hidden words", webp, text):
        looked = await look(data)
        assert looked.problem is None
        for made in looked.previews:
            assert not any(secret in made.data for secret in SECRETS)


async def test_colours_are_those_that_the_profile_means(look: Look) -> None:
    """A profile whose red is green: ignored, the picture would be of another colour."""
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(swapped[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(swapped[128:132]), 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    swapped[red : red + 4], swapped[green : green + 4] = swapped[green : green + 4], swapped[red : red + 4]
    for image in (Image.new("RGB", (200, 200), (255, 0, 0)), Image.new("RGBA", (200, 200), (255, 0, 0, 200))):
        looked = await look(encoded(image, "PNG", icc_profile=bytes(swapped)))
        with Image.open(io.BytesIO(looked.previews[0].data)) as shown:
            pixel = shown.convert("RGB").getpixel((50, 50))
        assert isinstance(pixel, tuple)
        assert pixel[1] > 200 > 60 > pixel[0]
    # One that makes no sense is left aside.
    looked = await look(encoded(corners(), "PNG", icc_profile=b"not a profile" * 20))
    assert looked.problem is None
    assert seen(looked.previews[0].data) == list(CORNERS)


async def test_what_is_transparent_stays_so(look: Look) -> None:
    clear = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    clear.paste((*RED, 255), (150, 0, 300, 300))
    palette = clear.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((10, 10))
    files = [encoded(clear, "PNG"), encoded(clear, "WEBP", lossless=True), encoded(clear, "AVIF")]
    files += [encoded(palette, "PNG"), encoded(palette, "GIF"), encoded(clear.convert("LA"), "PNG")]
    for data in files:
        looked = await look(data)
        with Image.open(io.BytesIO(looked.previews[0].data)) as image:
            alpha = image.convert("RGBA").getchannel("A")
        assert (alpha.getpixel((20, 80)), alpha.getpixel((140, 80))) == (0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "CMYK", "LA"])
async def test_every_mode_becomes_colours(look: Look, mode: str) -> None:
    """Black at the left, white at the right; sixteen bits of grey are scaled and not cut."""
    grey = Image.new("L", (400, 400), 0)
    grey.paste(255, (200, 0, 400, 400))
    if mode == "I;16":
        image = Image.frombytes("I;16", (400, 400), struct.pack("<400H", *[0] * 200, *[30_000] * 200) * 400)
    else:
        image = grey.convert("RGB").convert(mode) if mode in {"P", "CMYK"} else grey.convert(mode)
    looked = await look(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    with Image.open(io.BytesIO(looked.previews[0].data)) as shown:
        left, right = (shown.convert("L").getpixel((x, 80)) for x in (20, 140))
    assert isinstance(left, int)
    assert isinstance(right, int)
    assert left < 20
    assert abs(right - (117 if mode == "I;16" else 255)) < 15


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF"])
async def test_of_a_moving_picture_the_first_frame_is_shown(look: Look, form: str) -> None:
    frames = [corners(), *(Image.new("RGB", (600, 400), colour) for colour in (BLUE, GREEN))]
    looked = await look(encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100))
    assert looked.problem is None
    assert seen(looked.previews[-1].data) == list(CORNERS)


@needs_heic
async def test_pictures_of_phones(look: Look) -> None:
    looked = await look(heic(corners(640, 384)))
    assert (looked.width, looked.height, looked.problem) == (640, 384, None)
    assert seen(looked.previews[0].data) == list(CORNERS)
    broken = await look(heic(corners(640, 384))[:-500])
    assert broken.problem == "broken"


# --- hostile --------------------------------------------------------------------------------------


async def test_a_flood_of_pixels_is_refused_before_it_is_made(look: Look) -> None:
    small = png(50_000, 50_000)
    assert len(small) < 1000
    assert (await look(small)).problem == "too_many_pixels"
    # Where the whole is small, and one frame is not.
    gif = bytearray(encoded(Image.new("P", (10, 10)), "GIF"))
    at = gif.index(b"\x2c\0\0\0\0\x0a\0\x0a\0")
    gif[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    assert (await look(bytes(gif))).problem == "too_many_pixels"
    jpeg = bytearray(encoded(corners(64, 64), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    assert (await look(bytes(jpeg))).problem == "too_many_pixels"


async def test_the_bound_of_pixels_is_exact() -> None:
    look = Look(Media(MediaLimits(pixels=600 * 400)))
    assert (await look(encoded(corners(600, 400), "PNG"))).problem is None
    # One row more: Pillow by itself warns from here, and refuses at twice the number.
    assert (await look(encoded(corners(600, 401), "PNG"))).problem == "too_many_pixels"


async def test_the_largest_picture_fits_into_the_memory(look: Look) -> None:
    """64 megapixels with transparency, in 200 kB."""
    row = zlib.compress((b"\0" + b"\x40\x80\xc0\xff" * 8000) * 8000, 1)
    header = struct.pack(">IIBBBBB", 8000, 8000, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    looked = await look(data)
    assert (looked.width, looked.problem) == (8000, None)


async def test_what_takes_too_much_memory_is_given_up() -> None:
    """As the one before, and with less to have."""
    look = Look(Media(MediaLimits(memory_bytes=200 << 20)))
    header = struct.pack(">IIBBBBB", 8000, 8000, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert (await look(data)).problem == "too_much_memory"


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
async def test_words_that_unpack_to_gigabytes_do_no_harm(look: Look, name: bytes) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(200)) + packer.flush()
    between = b"\1\0\0\0" if name == b"iTXt" else b"\0"
    looked = await look(png(100, 100, chunk(name, b"x\0" + between + bomb), pixels=b"\0" * 301 * 100))
    assert looked.problem in {None, "broken", "too_much_memory"}
    assert looked.problem is None or looked.previews == ()


async def test_pixels_that_unpack_to_more_than_there_are_do_no_harm(look: Look) -> None:
    looked = await look(png(10, 10, pixels=b"\0" * (100 << 20)))
    assert looked.problem in {None, "broken"}


@pytest.mark.parametrize("form", FORMS)
async def test_half_a_picture_is_broken_and_still_has_sides(look: Look, form: str) -> None:
    noise = Image.effect_noise((640, 400), 80).convert("RGB")
    data = encoded(noise, form)
    looked = await look(data[: len(data) // 2])
    assert looked.problem == "broken"
    assert looked.previews == ()
    if form in {"JPEG", "PNG", "GIF"}:
        assert (looked.width, looked.height) == (640, 400)


async def test_a_picture_is_read_as_what_it_is_and_as_nothing_else(look: Look) -> None:
    """The decoder is the type's own: the others are not asked what they think of it."""
    looked = await look(encoded(corners(), "PNG"), kind=Kind("image/jpeg", "image", True))
    assert looked.problem == "broken"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (postscript, encoded(corners(), "TIFF"), encoded(corners(), "BMP")):
        assert (await look(data)).problem == "unsupported"
        assert (await look(data, kind=Kind("image/png", "image", True))).problem == "broken"


async def test_previews_that_are_too_large_together_lose_quality() -> None:
    noise = encoded(Image.effect_noise((1200, 1200), 90), "PNG")
    whole = await Look(Media(MediaLimits()))(noise)
    size = sum(len(made.data) for made in whole.previews)
    less = await Look(Media(MediaLimits(output_bytes=size - 1)))(noise)
    assert less.problem is None
    assert sum(len(made.data) for made in less.previews) < size
    assert (await Look(Media(MediaLimits(output_bytes=1000)))(noise)).problem == "unsupported"


async def test_previews_are_asked_for_with_sense(look: Look) -> None:
    data = encoded(corners(), "PNG")
    for wanted in ([Preview("a", 0)], [Preview("a", 100_000)], [Preview("a", 10), Preview("a", 20)]):
        with pytest.raises(ValueError, match="preview"):
            await look(data, wanted=wanted)
    looked = await look(data, wanted=[])
    assert (looked.previews, looked.problem) == ((), None)
    assert looked.thumbhash is not None


# --- thumbhash ------------------------------------------------------------------------------------


def test_a_thumbhash_is_the_one_that_others_make() -> None:
    """Made by the author's own code (npm: thumbhash 0.1.1) from the same pixels."""

    def pixels(width: int, height: int, alpha: bool) -> bytes:
        return bytes(
            value
            for y in range(height)
            for x in range(width)
            for value in (x * 5 % 256, y * 3 % 256, (x * y >> 2) % 256, (x * 9 + y) % 256 if alpha else 255)
        )

    for (width, height, alpha), wanted in VECTORS.items():
        made = encode(width, height, pixels(width, height, alpha)).hex()
        # A factor that is nothing is 7.5 of 15: the last bit of a sum decides which way it is rounded.
        assert made[:10] == wanted[:10]
        assert made[10:].replace("8", "7") == wanted[10:].replace("8", "7")


VECTORS: dict[tuple[int, int, bool], str] = {
    (100, 75, False): "1d180a1d966372687077887688688787b8a04cf787",
    (33, 100, False): "d8b7091a1060711888898479f8aa05d7f8",
    (60, 40, True): "d787860b8627514c80a88658be0fd48865037767787787",
    (64, 64, False): "d9170a1f1413598770888886886888778887b742fb048f08",
    (30, 90, True): "d9a785120c2755803a7969d8963ff897056a4799787877",
    (100, 100, True): "1e28860d080753b1829870a83775a430e5f828076161687887",
}


def test_a_thumbhash_has_bounds() -> None:
    for width, height, rgba in ((0, 1, b""), (101, 1, bytes(404)), (2, 2, bytes(15))):
        with pytest.raises(ValueError, match="100"):
            encode(width, height, rgba)
    assert encode(4, 4, bytes(64)) == encode(4, 4, bytes(64))


async def test_the_thumbhash_is_of_the_upright_picture(look: Look) -> None:
    upright = await look(encoded(corners(80, 60), "PNG"))
    turned = await look(encoded(corners(80, 60).transpose(Image.Transpose.ROTATE_90), "PNG", exif=located(6)))
    assert upright.thumbhash == turned.thumbhash
    assert SIZES[0].side > 100
