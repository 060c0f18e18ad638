"""Pictures, in the child: what they are, and smaller ones made from their pixels alone."""

import io
import warnings
from collections.abc import Sequence
from typing import BinaryIO, Final

import msgspec
from PIL import (
    AvifImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from tidings.server.media import thumbhash
from tidings.server.media.facts import PREVIEW_TYPE, Looked, MediaLimits, Preview, PreviewImage, Trouble

__all__ = ["look_at_image", "prepare", "previews_of", "takes_threads"]

# Where 80 looks like the original; the others, where the previews together would be too large.
_QUALITIES: Final = (80, 50, 20)
# Profiles of cameras and screens have some kilobytes, those of printers up to two megabytes.
ICC_BYTES_MAX: Final = 4 << 20
# Few enough that nobody sees a difference, enough that the hash is the original's.
_HASH_SIDE: Final = thumbhash.SIDE_MAX

# The only decoders that are ever asked, each by its own type's name. All of Pillow's others stay unused, and
# what starts programs or reads other files (EPS, fonts, WMF) is among them.
_FORMATS: Final = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/gif": "GIF",
    "image/webp": "WEBP",
    "image/avif": "AVIF",
    "image/heic": "HEIF",
    "image/heif": "HEIF",
}
# Importing a plugin is what makes it known to Pillow; it knows no others, as nobody calls `Image.init`.
_PLUGINS: Final = (AvifImagePlugin, GifImagePlugin, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin)

# EXIF's word for how the camera was held, and what undoes it.
_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def takes_threads(media_type: str) -> bool:
    """Whether its decoder starts a thread, whatever it is told: libde265 does."""
    return _FORMATS.get(media_type) == "HEIF"


def prepare(media_type: str, limits: MediaLimits) -> None:
    """Load and set what is needed for a type, before the first byte is read."""
    # From Pillow's warning on: it is an error only at twice the number.
    Image.MAX_IMAGE_PIXELS = limits.pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    # One file, one thread: the others have their own work to do.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if takes_threads(media_type):
        import pi_heif

        pi_heif.options.DECODE_THREADS = 1
        pi_heif.options.THUMBNAILS = False
        pi_heif.options.DEPTH_IMAGES = False
        pi_heif.options.AUX_IMAGES = False
        pi_heif.register_heif_opener()


def look_at_image(file: BinaryIO, media_type: str, limits: MediaLimits, wanted: Sequence[Preview]) -> Looked:
    """Sides, thumbhash and previews of the picture in `file`. Raises `Trouble`, or whatever a decoder raises."""
    if media_type not in _FORMATS:
        raise Trouble("unsupported")
    try:
        image = Image.open(file, formats=[_FORMATS[media_type]])
        if image.width * image.height > limits.pixels:
            raise Trouble("too_many_pixels")
        orientation = _orientation(image)
        turned = orientation in {5, 6, 7, 8}
        width, height = (image.height, image.width) if turned else image.size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Trouble("too_many_pixels") from None
    known = Looked(width=width, height=height)
    try:
        small = _shrunk(image, max([_HASH_SIDE, *(preview.side for preview in wanted)]))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Trouble("too_many_pixels") from None
    except MemoryError:
        raise Trouble("too_much_memory", known) from None
    except Exception:
        # The decoders raise whatever their authors thought of, SyntaxError included.
        raise Trouble("broken", known) from None
    if orientation in _UPRIGHT:
        small = small.transpose(_UPRIGHT[orientation])
    return previews_of(small, known, limits, wanted)


def previews_of(image: Image.Image, known: Looked, limits: MediaLimits, wanted: Sequence[Preview]) -> Looked:
    """`known`, with the thumbhash of `image` and the previews. `image` is RGB or RGBA, in sRGB, and upright."""
    image.info.clear()
    tiny = _at_most(image, _HASH_SIDE).convert("RGBA")
    pixels = tiny.tobytes()
    hashed = thumbhash.encode(tiny.width, tiny.height, pixels)
    previews: list[PreviewImage] = []
    for quality in _QUALITIES:
        previews = [_encoded(_at_most(image, preview.side), preview.name, quality) for preview in wanted]
        if sum(len(preview.data) for preview in previews) <= limits.output_bytes:
            break
    else:
        raise Trouble("unsupported", known)
    return msgspec.structs.replace(known, thumbhash=hashed, previews=tuple(previews))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        # The picture does not depend on what a camera wrote beside it.
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    """The first frame in RGB or RGBA and sRGB, no side longer than `side`: as little as possible at full size."""
    profile = image.info.get("icc_profile")
    # JPEG decodes to an eighth, a quarter or a half at no cost; for other types this does nothing.
    image.draft(None, (side * 2, side * 2))
    image.load()
    mode = image.mode
    if mode.startswith("I;16") or mode in {"I", "F"}:
        # Sixteen bits of grey: Pillow's own conversion cuts them off instead of scaling them.
        image = image.convert("F").point(lambda value: value / 257 + 0.0).convert("L")
        profile = None
    elif mode in {"1", "LA", "La", "PA", "RGBa"} or mode == "P" or "transparency" in image.info:
        transparent = mode in {"LA", "La", "PA", "RGBa"} or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "L" if mode == "1" else "RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return _in_srgb(image, profile)


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if image.mode == "RGBA" else image
    if isinstance(profile, bytes) and 0 < len(profile) <= ICC_BYTES_MAX:
        colours = _by_profile(colours, profile)
    colours = colours.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        # A profile that is of no use, or of another kind of picture: the colours are shown as they are.
        return image
    return image if converted is None else converted


def _at_most(image: Image.Image, side: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _encoded(image: Image.Image, name: str, quality: int) -> PreviewImage:
    target = io.BytesIO()
    image.save(target, "WEBP", quality=quality, method=4, exif=b"", icc_profile=b"", xmp=b"")
    return PreviewImage(name, PREVIEW_TYPE, image.width, image.height, target.getvalue())
