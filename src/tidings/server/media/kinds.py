"""What a file is, told from its bytes. Its name and what the sender says of it play no part. No I/O.

A type is what a strict reader of that type would accept at the file's first byte, as far as its first structures go. So
a polyglot is one thing here, the one that begins at its first byte, and is served as nothing else: a picture that is
also a script is a picture, a page with a picture's signature further on is a page. What cannot be told is
`application/octet-stream`.

`inline` is said of the types in `INLINE` only: those that a browser shows and cannot run. It is not the only
protection: whoever serves a file says `nosniff` too, so that a browser believes the type.
"""

import re
from collections.abc import Callable
from typing import Final, Literal

import msgspec

__all__ = ["HEAD_BYTES", "INLINE", "TAIL_BYTES", "UNKNOWN", "Kind", "recognise"]

Family = Literal["image", "video", "audio", "document", "text", "archive", "other"]

# How much of a file `recognise` wants to see. The tracks of a Matroska file and the boxes of a short MP4 are among the
# first kilobytes; the index of an MP4 or of a ZIP archive is at the end.
HEAD_BYTES: Final = 64 << 10
TAIL_BYTES: Final = 64 << 10

# What browsers show and cannot run. Not in it, on purpose: SVG, HTML and XML, which hold scripts; text, which old
# browsers take for HTML; PDF, which has scripts, forms and links, and would stand under the server's own address.
# (docs/internals/media.md)
INLINE: Final[frozenset[str]] = frozenset(
    {
        "image/jpeg",
        "image/png",
        "image/gif",
        "image/webp",
        "image/avif",
        "audio/mpeg",
        "audio/mp4",
        "audio/aac",
        "audio/ogg",
        "audio/webm",
        "audio/flac",
        "audio/wav",
        "video/mp4",
        "video/webm",
        "video/quicktime",
    }
)


class Kind(msgspec.Struct, frozen=True):
    """A type of file. `inline`: whether it may be shown in place; everything else is offered for download only."""

    media_type: str
    family: Family
    inline: bool


def _kind(media_type: str, family: Family) -> Kind:
    return Kind(media_type, family, media_type in INLINE)


UNKNOWN: Final = _kind("application/octet-stream", "other")


def recognise(head: bytes, tail: bytes = b"", size: int | None = None) -> Kind:
    """The kind of a file that begins with `head` (`HEAD_BYTES`, or all of it) and ends with `tail`.

    `size` is the length of the whole file, where known: containers that promise more than a file can hold are not
    believed. Never raises, whatever the bytes.
    """
    head, tail = head[:HEAD_BYTES], tail[-TAIL_BYTES:]
    for look in _LOOKS:
        found = look(head, tail, size)
        if found is not None:
            return found
    return UNKNOWN


# --- pictures -------------------------------------------------------------------------------------

# After the start of a JPEG: an application's segment, a comment, tables or a frame.
_JPEG_FIRST: Final = frozenset({*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xC0, 0xC1, 0xC2, 0xDD})

_BMP_HEADERS: Final = frozenset({12, 40, 52, 56, 64, 108, 124})


def _picture(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    if head[:3] == b"\xff\xd8\xff":
        # A segment's length counts itself.
        if len(head) >= 6 and head[3] in _JPEG_FIRST and _big(head, 4, 2) >= 2:
            return _kind("image/jpeg", "image")
    elif head[:8] == b"\x89PNG\r\n\x1a\n":
        if head[8:16] == b"\x00\x00\x00\rIHDR" and _big(head, 16, 4) and _big(head, 20, 4):
            return _kind("image/png", "image")
    elif head[:6] in {b"GIF87a", b"GIF89a"}:
        if _is_gif(head):
            return _kind("image/gif", "image")
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        if head[12:16] in {b"VP8 ", b"VP8L", b"VP8X"}:
            return _kind("image/webp", "image")
    # The header's size is one of seven, and its two reserved words are nothing.
    elif head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and _little(head, 14, 4) in _BMP_HEADERS:
        return _kind("image/bmp", "image")
    return None


def _is_gif(head: bytes) -> bool:
    """Whether a block of GIF follows the screen and its colours: of a script that begins as one, it does not."""
    if len(head) < 13 or not (_little(head, 6, 2) and _little(head, 8, 2)):
        return False
    colours = 3 << (head[10] & 7) + 1 if head[10] & 0x80 else 0
    return head[13 + colours : 14 + colours] in {b"!", b","}


# --- sound and film -------------------------------------------------------------------------------

_STILL_BRANDS: Final = {
    b"avif": "image/avif",
    b"avis": "image/avif",
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"heim": "image/heic",
    b"heis": "image/heic",
    b"hevc": "image/heic",
    b"hevx": "image/heic",
    b"mif1": "image/heif",
    b"msf1": "image/heif",
}
# Words of MP4, of which one is among the brands of every file that players take for one.
_BRAND: Final = re.compile(
    rb"iso[\da-m]|mp4[12]|avc1|hvc1|hev1|av01|dash|cmf[\w]|M4[ABPV] |3g[p2][\w]|MSNV|mmp4|f4v |XAVC|qt  ", re.ASCII
)
_AUDIO_BRANDS: Final = frozenset({b"M4A ", b"M4B ", b"M4P "})


def _iso_media(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    """The family of MP4: what it is, is its first box's word."""
    if head[4:8] in {b"moov", b"mdat", b"wide", b"free", b"skip"}:
        # QuickTime of before the word. A second box must follow the first where it ends, or the first is the last.
        length = _big(head, 0, 4)
        within = 8 <= length < len(head) and re.fullmatch(rb"[a-z]{4}", head[length + 4 : length + 8])
        return _kind("video/quicktime", "video") if within else None
    if head[4:8] != b"ftyp":
        return None
    length = _big(head, 0, 4)
    if not 16 <= length <= min(len(head), 4096) or length % 4:
        return None
    major = head[8:12]
    brands = [major, *(head[at : at + 4] for at in range(16, length, 4))]
    if major in _STILL_BRANDS:
        # mif1 says only that there are pictures; another of its words says of which kind.
        said = [_STILL_BRANDS[brand] for brand in brands if brand in _STILL_BRANDS]
        exact = [name for name in said if name != "image/heif"]
        return _kind((exact or said)[0], "image")
    if not any(_BRAND.fullmatch(brand) for brand in brands):
        return None
    if major == b"qt  ":
        return _kind("video/quicktime", "video")
    if major in _AUDIO_BRANDS:
        return _kind("audio/mp4", "audio")
    handlers = {match[1] for match in re.finditer(rb"hdlr.{8}(vide|soun)", head + tail, re.DOTALL)}
    return _kind("audio/mp4", "audio") if handlers == {b"soun"} else _kind("video/mp4", "video")


def _matroska(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    kind = re.search(rb"\x42\x82[\x84\x88](webm|matroska)", head[:128])
    if kind is None:
        return None
    codecs = set(re.findall(rb"\x86.(?:[\x00-\xff])?([AVS])_[A-Z]", head, re.DOTALL))
    sound_only = codecs == {b"A"}
    if kind[1] == b"webm":
        return _kind("audio/webm", "audio") if sound_only else _kind("video/webm", "video")
    return _kind("audio/x-matroska", "audio") if sound_only else _kind("video/x-matroska", "video")


def _sound(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    if head[:5] == b"OggS\0":
        if b"\x80theora" in head[:4096]:
            return _kind("video/ogg", "video")
        # Where its codec is not one that browsers play, it is sound nevertheless.
        return _kind("audio/ogg", "audio")
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _kind("audio/wav", "audio")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _kind("video/x-msvideo", "video")
    if head[:4] == b"FORM" and head[8:12] in {b"AIFF", b"AIFC"}:
        return _kind("audio/aiff", "audio")
    if head[:3] == b"ID3" and len(head) > 10 and head[3] in {2, 3, 4} and all(byte < 0x80 for byte in head[6:10]):
        return _kind("audio/mpeg", "audio")
    for frame, name in ((_mp3_frame, "audio/mpeg"), (_adts_frame, "audio/aac")):
        # Eleven bits are no signature: the next frame has to be where this one ends.
        length = frame(head)
        if length and (frame(head[length:]) or size == length):
            return _kind(name, "audio")
    return None


_MP3_KBITS: Final = {
    (3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (2, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES: Final = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


def _mp3_frame(data: bytes) -> int:
    """The length of the frame of MPEG audio, layer II or III, at the start of `data`; 0 where there is none."""
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return 0
    version, layer = data[1] >> 3 & 3, data[1] >> 1 & 3
    bitrate, rate, padding = data[2] >> 4, data[2] >> 2 & 3, data[2] >> 1 & 1
    if version == 1 or layer not in {1, 2} or bitrate in {0, 15} or rate == 3:
        return 0
    table = _MP3_KBITS[(3, layer)] if version == 3 else _MP3_KBITS[(2, 1)]
    samples = 72 if version != 3 and layer == 1 else 144
    return samples * table[bitrate - 1] * 1000 // _MP3_RATES[version][rate] + padding


def _adts_frame(data: bytes) -> int:
    """The length of the frame of AAC at the start of `data`; 0 where there is none."""
    if len(data) < 7 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0 or data[2] >> 2 & 15 > 12:
        return 0
    length = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    return length if length >= 7 else 0


# --- documents and archives -----------------------------------------------------------------------

_OFFICE: Final = {
    b"word/": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    b"xl/": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    b"ppt/": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
}
_SAYS_ITSELF: Final = re.compile(
    rb"application/(epub\+zip|vnd\.oasis\.opendocument\.(text|spreadsheet|presentation|graphics))"
)


def _pdf(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    # Readers look for it within the first kilobyte; a strict one at the first byte.
    if re.match(rb"%PDF-[12]\.\d", head):
        return _kind("application/pdf", "document")
    return None


def _archive(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    if head[:4] == b"PK\x03\x04":
        # OpenDocument and EPUB have their type, not compressed, as their first entry.
        if head[30:38] == b"mimetype" and (said := _SAYS_ITSELF.match(head, 38)):
            return _kind(said[0].decode(), "document")
        if b"[Content_Types].xml" in head or b"[Content_Types].xml" in tail:
            for folder, name in _OFFICE.items():
                if folder in head or folder in tail:
                    return _kind(name, "document")
        return _kind("application/zip", "archive")
    if head[:4] == b"PK\x05\x06" and size in {None, 22}:
        return _kind("application/zip", "archive")
    if head[257:262] == b"ustar":
        return _kind("application/x-tar", "archive")
    return None


# --- what a signature is enough for ----------------------------------------------------------------

_SIGNATURES: Final[dict[bytes, Kind]] = {
    b"II*\0": _kind("image/tiff", "image"),
    b"MM\0*": _kind("image/tiff", "image"),
    b"\0\0\0\x0cJXL \r\n\x87\n": _kind("image/jxl", "image"),
    b"\0\0\0\x0cjP  \r\n\x87\n": _kind("image/jp2", "image"),
    b"8BPS": _kind("image/vnd.adobe.photoshop", "image"),
    b"fLaC\0\0\0\x22": _kind("audio/flac", "audio"),
    b"fLaC\x80\0\0\x22": _kind("audio/flac", "audio"),
    b"#!AMR\n": _kind("audio/amr", "audio"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": _kind("application/x-ole-storage", "document"),
    b"{\\rtf1": _kind("application/rtf", "document"),
    b"%!PS": _kind("application/postscript", "document"),
    b"\x1f\x8b\x08": _kind("application/gzip", "archive"),
    b"BZh": _kind("application/x-bzip2", "archive"),
    b"\xfd7zXZ\0": _kind("application/x-xz", "archive"),
    b"\x28\xb5\x2f\xfd": _kind("application/zstd", "archive"),
    b"7z\xbc\xaf\x27\x1c": _kind("application/x-7z-compressed", "archive"),
    b"Rar!\x1a\x07": _kind("application/vnd.rar", "archive"),
}


def _signature(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    return next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)


# --- text -----------------------------------------------------------------------------------------

# Line ends, tabulators, form feeds, and the escape of coloured logs.
_NOT_TEXT: Final = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
# What a browser that guesses takes for a page:
# https://mimesniff.spec.whatwg.org/#identifying-a-resource-with-an-unknown-mime-type
_HTML: Final = re.compile(
    rb"<(!doctype\s+html|!--|/?(html|head|body|script|iframe|h1|div|font|table|a|style|title|b|br|p|img|meta|link|form|"
    rb"object|embed|base|template|video|audio|input|span|center)(?=[\s>/]))",
    re.IGNORECASE,
)
_SVG: Final = re.compile(rb"<([a-z]+:)?svg[\s>/]", re.IGNORECASE)
_XML: Final = re.compile(rb"<\?xml[\s?]|<!doctype\s|<[a-z_][\w.:-]*[\s>/]", re.IGNORECASE)


def _text(head: bytes, tail: bytes, size: int | None) -> Kind | None:
    if not head or _NOT_TEXT.search(head) or _NOT_TEXT.search(tail):
        return None
    # The last character of the head and the first of the tail may be cut in two.
    whole = len(head) < HEAD_BYTES and (size is None or size <= len(head))
    if not (_is_utf8(head, cut_end=not whole) and _is_utf8(tail, cut_start=True)):
        return None
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] == b"<":
        # A page may hold pictures, and a picture pages: the one that is first is what it is.
        svg, html = _SVG.search(start), _HTML.search(start)
        if svg and not (html and html.start() < svg.start() and not html[0].startswith(b"<!--")):
            return _kind("image/svg+xml", "text")
        if html:
            return _kind("text/html", "text")
        if _XML.match(start):
            return _kind("application/xml", "text")
    elif _HTML.search(start[:1024]):
        # Text before the first tag is no obstacle to a browser.
        return _kind("text/html", "text")
    return _kind("text/plain", "text")


def _is_utf8(data: bytes, *, cut_start: bool = False, cut_end: bool = False) -> bool:
    begin = 0
    while cut_start and begin < min(3, len(data)) and data[begin] & 0xC0 == 0x80:
        begin += 1
    try:
        data[begin:].decode()
    except UnicodeDecodeError as error:
        return cut_end and error.reason == "unexpected end of data"
    return True


def _big(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length])


def _little(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")


_Look = Callable[[bytes, bytes, int | None], Kind | None]
# Signatures are of different beginnings, so that the order matters little; text comes last, as it has none.
_LOOKS: Final[tuple[_Look, ...]] = (*(_picture, _iso_media, _matroska, _sound, _pdf, _archive, _signature, _text),)
