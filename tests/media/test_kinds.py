"""A type comes from the bytes, is one type only, and is shown in place only where it cannot run."""

from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.media.making import corners, encoded, kind_of, png
from tidings.server.media.kinds import HEAD_BYTES, INLINE, UNKNOWN, Kind, recognise

SCRIPT = b"<script>alert(document.domain)</script>"
GIF = encoded(corners(8, 8), "GIF")
JPEG = encoded(corners(8, 8), "JPEG")
PNG = encoded(corners(8, 8), "PNG")


def zipped(*names: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            archive.writestr(name, "application/vnd.oasis.opendocument.text" if name == "mimetype" else "x")
    return target.getvalue()


def mp4(brand: bytes, *, handlers: tuple[bytes, ...] = (), others: bytes = b"isom") -> bytes:
    box = b"ftyp" + brand + b"\0\0\0\0" + others
    hdlr = b"".join(b"\0\0\0\x20hdlr" + b"\0" * 8 + handler + b"\0" * 12 for handler in handlers)
    return (len(box) + 4).to_bytes(4) + box + hdlr


def ebml(doctype: bytes, *codecs: bytes) -> bytes:
    head = b"\x42\x82" + bytes([0x80 | len(doctype)]) + doctype
    tracks = b"".join(b"\x86" + bytes([0x80 | len(codec)]) + codec for codec in codecs)
    return b"\x1a\x45\xdf\xa3" + bytes([0x80 | len(head)]) + head + tracks


KNOWN = {
    "image/jpeg": JPEG,
    "image/png": PNG,
    "image/gif": GIF,
    "image/webp": encoded(corners(8, 8), "WEBP"),
    "image/avif": encoded(corners(8, 8), "AVIF"),
    "image/heic": mp4(b"heic"),
    "image/heif": mp4(b"mif1", others=b"miaf"),
    "image/bmp": encoded(corners(8, 8), "BMP"),
    "image/tiff": encoded(corners(8, 8), "TIFF"),
    "video/mp4": mp4(b"isom", handlers=(b"vide", b"soun")),
    "video/quicktime": mp4(b"qt  "),
    "video/webm": ebml(b"webm", b"V_VP8", b"A_OPUS"),
    "video/x-matroska": ebml(b"matroska", b"V_MPEG4/ISO/AVC"),
    "video/ogg": b"OggS\0\2" + b"\0" * 22 + b"\x80theora",
    "video/x-msvideo": b"RIFF\0\0\0\0AVI LIST",
    "audio/webm": ebml(b"webm", b"A_OPUS"),
    "audio/mp4": mp4(b"M4A "),
    "audio/mpeg": b"ID3\4\0\0\0\0\0\x0a" + b"\0" * 40,
    "audio/ogg": b"OggS\0\2" + b"\0" * 22 + b"OpusHead",
    "audio/wav": b"RIFF\x24\0\0\0WAVEfmt ",
    "audio/flac": b"fLaC\0\0\0\x22" + b"\0" * 34,
    "audio/aiff": b"FORM\0\0\0\0AIFFCOMM",
    "audio/amr": b"#!AMR\n" + b"\0" * 8,
    "application/pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "application/rtf": b"{\\rtf1\\ansi hello}",
    "application/postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "application/x-ole-storage": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 40,
    "application/zip": zipped("a.txt"),
    "application/vnd.oasis.opendocument.text": zipped("mimetype", "content.xml"),
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": zipped(
        "[Content_Types].xml", "word/document.xml"
    ),
    "application/x-tar": b"name".ljust(257, b"\0") + b"ustar\x0000",
    "application/gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "image/svg+xml": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "text/html": b"<!DOCTYPE html><html></html>",
    "application/xml": b'<?xml version="1.0"?><feed/>',
    "text/plain": "Guten Tag, 你好 👋\r\n\tund Ende.\n".encode(),
    "application/octet-stream": b"\x7fELF\2\1\1\0" + b"\0" * 20,
}


@pytest.mark.parametrize("media_type", KNOWN)
def test_a_type_is_told_from_the_content(media_type: str) -> None:
    kind = kind_of(KNOWN[media_type])
    assert kind.media_type == media_type
    assert kind.inline == (media_type in INLINE)


def test_what_may_be_shown_in_place_is_a_closed_list() -> None:
    """Written out a second time, so that nobody widens it in passing."""
    pictures = {f"image/{name}" for name in ("jpeg", "png", "gif", "webp", "avif")}
    films = {f"video/{name}" for name in ("mp4", "webm", "quicktime")}
    sounds = {f"audio/{name}" for name in ("mpeg", "mp4", "aac", "ogg", "webm", "flac", "wav")}
    assert pictures | films | sounds == INLINE


PAGES = {
    "a page": b"<html>" + SCRIPT,
    "a page after a byte order mark": b"\xef\xbb\xbf <HTML>" + SCRIPT,
    "a page after a comment": b"<!-- hello --><body>" + SCRIPT,
    "a page after words": b"Hello! " + SCRIPT,
    "a page with a picture further on": b"<html><!-- \n" + b"GIF89a" + b" --></html>",
    "a page with a document further on": b"<html>%PDF-1.7 " + SCRIPT,
    "a page in capitals": b"<SCRIPT\n>alert(1)</SCRIPT>",
    "a drawing": b"<svg onload=alert(1)>",
    "a drawing with a prefix": b'<s:svg xmlns:s="http://www.w3.org/2000/svg"><s:script>alert(1)</s:script></s:svg>',
    "a drawing after a doctype": b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" ""><svg></svg>',
    "a page in XML": b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script/></html>',
    "a feed": b'<?xml version="1.0"?><?xml-stylesheet href="x.xsl"?><rss/>',
    "a script": b"alert(document.domain)",
    "an empty file": b"",
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_that_runs_is_shown_in_place(name: str) -> None:
    kind = kind_of(PAGES[name])
    assert not kind.inline
    assert kind.family in {"text", "other"}


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        # Each begins like a picture; the first thing after the signature is none of its own.
        (b"GIF89a=1;/*" + b"*/alert(1)//", "text/plain"),
        (b"GIF89a" + SCRIPT, "text/html"),
        (b"GIF89a/*\0" + b"*/alert(1)//", UNKNOWN.media_type),
        (b"\x89PNG\r\n\x1a\n" + SCRIPT, UNKNOWN.media_type),
        (b"\xff\xd8\xff" + SCRIPT, UNKNOWN.media_type),
        (b"RIFF\0\0\0\0WEBP" + SCRIPT, UNKNOWN.media_type),
        (png(0, 10), UNKNOWN.media_type),
        (b"\x00\x00\x00\x18ftyp" + SCRIPT, UNKNOWN.media_type),
        # These are what they begin as, whatever follows; nobody else will be told otherwise.
        (JPEG + zipped("a.php"), "image/jpeg"),
        (JPEG[:2] + b"\xff\xfe\x00\x20" + b"<?php __HALT_COMPILER(); ?>   " + JPEG[2:], "image/jpeg"),
        (GIF + SCRIPT, "image/gif"),
        (PNG + SCRIPT, "image/png"),
        (b"%PDF-1.4\n" + b"<html>" + SCRIPT, "application/pdf"),
        (zipped("a") + SCRIPT, "application/zip"),
        # Not at the first byte: not a document, though some reader would find it.
        (b"\n%PDF-1.4\n", "text/plain"),
        (b"\0" * 8 + PNG, UNKNOWN.media_type),
        (b"MZ\x90\0" + b"\0" * 60, UNKNOWN.media_type),
    ],
)
def test_a_polyglot_is_one_thing(data: bytes, media_type: str) -> None:
    kind = kind_of(data)
    assert (kind.media_type, kind.inline) == (media_type, media_type in INLINE)


def test_sound_in_a_container_for_films_is_sound() -> None:
    """What browsers record as a voice message."""
    assert kind_of(mp4(b"iso5", handlers=(b"soun",))).media_type == "audio/mp4"
    assert kind_of(ebml(b"webm", b"A_OPUS")).family == "audio"
    # Where the index is at the end, it is found there.
    head, tail = mp4(b"isom"), b"\0\0\0\x20hdlr" + b"\0" * 8 + b"soun"
    assert recognise(head, tail, 10_000_000).family == "audio"
    assert recognise(head, b"", 10_000_000).family == "video"


@pytest.mark.parametrize("second", [b"\xff\xfb\x90\x00", b"\xff\xf3\x90\x00"])
def test_a_frame_of_mp3_is_followed_by_another(second: bytes) -> None:
    frame = b"\xff\xfb\x90\x00" + b"\0" * 413
    assert kind_of(frame + second + b"\0" * 20).media_type == "audio/mpeg"
    assert kind_of(frame + b"\0" * 20) == UNKNOWN
    # UTF-16 begins like one.
    assert kind_of("\ufeffhello".encode("utf-16-le")) == UNKNOWN


def test_text_may_be_cut_within_a_character() -> None:
    text = ("é" * HEAD_BYTES).encode()
    assert recognise(text[: HEAD_BYTES - 1], text[-3:], len(text)).media_type == "text/plain"
    # The whole of it, cut, is no text.
    assert recognise(b"abc\xc3", b"", 4) == UNKNOWN
    assert recognise(b"caf\xe9 latin", b"", 10) == UNKNOWN
    # What turns into something else later is nothing.
    assert recognise(b"a" * HEAD_BYTES, b"\0\1\2", HEAD_BYTES + 3) == UNKNOWN


@given(st.sampled_from([b"", *[data[:24] for data in KNOWN.values()]]), st.binary(max_size=300), st.binary(max_size=40))
def test_no_bytes_are_too_strange(start: bytes, more: bytes, tail: bytes) -> None:
    kind = recognise(start + more, tail, len(start + more))
    assert isinstance(kind, Kind)
    assert kind.inline == (kind.media_type in INLINE)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_moving_pictures_are_pictures(form: str) -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    assert kind_of(encoded(frames[0], form, save_all=True, append_images=frames[1:])).family == "image"
