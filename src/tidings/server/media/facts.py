"""What is asked about a file, what is told, and the bounds: shared by the server's side and the child's."""

from typing import Final, Literal, get_args

import msgspec

__all__ = [
    "EXIT_MEMORY",
    "NUMBER_MAX",
    "PREVIEW_SIDE_MAX",
    "PREVIEW_TYPE",
    "PROBLEMS",
    "THUMBHASH_BYTES_MAX",
    "WAVEFORM_SAMPLES_MAX",
    "Job",
    "Looked",
    "MediaLimits",
    "Preview",
    "PreviewImage",
    "Problem",
    "Trouble",
]

# What a message's bubble can show on a small screen: a bar of two points and a gap of one.
WAVEFORM_SAMPLES_MAX: Final = 100
# More than any screen shows of a picture in a conversation; WebP itself ends at 16,383.
PREVIEW_SIDE_MAX: Final = 4096
# Every browser of the last five years shows it, it keeps transparency, and it is a third smaller than JPEG.
PREVIEW_TYPE: Final = "image/webp"
# A side, a number of pages, a duration: what is larger is a header's lie.
NUMBER_MAX: Final = 2**40
# A thumbhash has 5 bytes of constants, 1 of alpha and at most 19 of factors; the format has no larger ones.
THUMBHASH_BYTES_MAX: Final = 32

# How a child ends that has not even memory for an answer. (EX_OSERR of sysexits.h.)
EXIT_MEMORY: Final = 71

# Why there is less than was asked for.
#   too_many_pixels   the picture claims more than `MediaLimits.pixels`
#   too_slow          over `MediaLimits.seconds` or `cpu_seconds`
#   too_much_memory   over `MediaLimits.memory_bytes`, or the machine had none left
#   broken            not what its type promises: truncated, damaged, or never was
#   unsupported       nothing here reads it: another codec, a password, no such previews of this type
#   tool_missing      ffmpeg and ffprobe would read it, and are not installed
#   crashed           the child died of the file, or answered what no child answers
Problem = Literal["too_many_pixels", "too_slow", "too_much_memory", "broken", "unsupported", "tool_missing", "crashed"]
PROBLEMS: Final[frozenset[str]] = frozenset(get_args(Problem))


class Trouble(Exception):
    """In the child: why there is no more to tell, and what was found out before."""

    def __init__(self, problem: Problem, known: "Looked | None" = None) -> None:
        super().__init__(problem)
        self.problem: Problem = problem
        self.known = known or Looked()


class MediaLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one look at one file, and of how many are looked at together."""

    # Time on the clock, from the start of the child to its last byte.
    seconds: float = 30.0
    # Time on a processor, of the child and of each tool that it starts.
    cpu_seconds: int = 20
    # Address space. A picture of 64 megapixels with transparency takes 256 MB, and is held twice while it shrinks.
    memory_bytes: int = 1 << 30
    # What phones take today is 50 megapixels; a screenshot of a whole page has about 20.
    pixels: int = 64_000_000
    # All previews together. Three WebP pictures of up to 1,280 pixels rarely reach one megabyte.
    output_bytes: int = 8 << 20
    # Each may take `memory_bytes` and a processor.
    children: int = 2


class Preview(msgspec.Struct, frozen=True):
    """A picture that is wanted: no side longer than `side` pixels, and never larger than the original."""

    name: str
    side: int


class PreviewImage(msgspec.Struct, frozen=True):
    """A picture that was made. It has no metadata, and no byte of the original."""

    name: str
    media_type: str
    width: int
    height: int
    data: bytes


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file. With a `problem`, whatever could be found out all the same.

    `width` and `height` are pixels as it is shown, after rotation; of a document, points (1/72 inch) of its first page.
    `waveform` has at most 100 samples of 0 to 255, the loudest of them 255 (of silence: all 0).
    """

    width: int | None = None
    height: int | None = None
    duration_ms: int | None = None
    waveform: bytes | None = None
    thumbhash: bytes | None = None
    pages: int | None = None
    previews: tuple[PreviewImage, ...] = ()
    problem: Problem | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is told: which descriptor to read, as what, and within which bounds."""

    fd: int
    size: int
    media_type: str
    family: str
    wanted: tuple[Preview, ...]
    limits: MediaLimits
    # The process whose end is the child's.
    parent: int
    ffmpeg: str = ""
    ffprobe: str = ""
