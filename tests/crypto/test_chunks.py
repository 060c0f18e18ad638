"""Files at rest: every range reads back, and nothing that was edited, cut, swapped or moved opens."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.server.crypto.base import CryptoError, Tampered
from tidings.server.crypto.chunks import (
    CHUNK_BYTES,
    CHUNK_OVERHEAD_BYTES,
    SEGMENT_BYTES,
    FileKey,
    Span,
    cut,
    new_file_key,
    open_file_key,
    sealed_bytes,
)
from tidings.server.crypto.keyfile import KeyFile
from tidings.server.crypto.keyring import Keyring, StreamCipher

SECRET = bytes(range(32))
KEY = FileKey("app_a", "file_1", SECRET)
SEALED_CHUNK = CHUNK_BYTES + CHUNK_OVERHEAD_BYTES
START = 3 * SEGMENT_BYTES
DATA = random.Random(1).randbytes(3 * CHUNK_BYTES + 1000)
BOX = b"".join(KEY.seal("", START, DATA))


def read(key: FileKey, box: bytes, start: int, length: int, offset: int, count: int) -> bytes:
    """A range of a segment, as a download reads it."""
    span = Span(length, offset, count)
    part = box[span.start : span.start + span.length]
    assert len(part) == span.length
    return b"".join(cut(key.open("", start + span.first, part), span.skip, count))


@pytest.mark.parametrize("length", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, SEGMENT_BYTES])
def test_a_segment_reads_back_and_is_as_long_as_foretold(length: int) -> None:
    data = os.urandom(length)
    box = b"".join(KEY.seal("", 0, data))
    assert len(box) == sealed_bytes(length)
    assert b"".join(KEY.open("", 0, box)) == data
    assert data[:64] not in box or length < 16


def test_nothing_is_no_chunk() -> None:
    assert KEY.seal("", 0, b"") == []
    assert sealed_bytes(0) == 0


@given(offset=st.integers(0, len(DATA) - 1), data=st.data())
def test_any_range_reads_back(offset: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(DATA) - offset))
    assert read(KEY, BOX, START, len(DATA), offset, count) == DATA[offset : offset + count]


@pytest.mark.parametrize("edge", [CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES])
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("after", [0, 1])
def test_ranges_at_the_edges_of_chunks(edge: int, before: int, after: int) -> None:
    for offset, count in ((edge - before, before + after), (0, edge + after), (edge - before, len(DATA) - edge)):
        if count:
            assert read(KEY, BOX, START, len(DATA), offset, count) == DATA[offset : offset + count]


def test_a_range_reads_no_more_than_the_chunks_it_touches() -> None:
    assert Span(len(DATA), CHUNK_BYTES, 1).length == SEALED_CHUNK
    assert Span(len(DATA), CHUNK_BYTES - 1, 2).length == 2 * SEALED_CHUNK
    assert Span(len(DATA), len(DATA) - 1, 1).length == 1000 + CHUNK_OVERHEAD_BYTES


@pytest.mark.parametrize(("offset", "count"), [(-1, 2), (0, 0), (0, 11), (10, 1), (5, 6), (11, 1)])
def test_a_range_outside_is_the_callers_mistake(offset: int, count: int) -> None:
    with pytest.raises(ValueError, match="not within"):
        Span(10, offset, count)


def test_a_segment_has_a_bound() -> None:
    with pytest.raises(ValueError, match="longer than"):
        KEY.seal("", 0, bytes(SEGMENT_BYTES + 1))


def chunk(number: int, box: bytes = BOX) -> bytes:
    return box[number * SEALED_CHUNK : (number + 1) * SEALED_CHUNK]


EDITS = {
    "a bit of the first chunk": BOX[:100] + bytes([BOX[100] ^ 1]) + BOX[101:],
    "the first nonce": bytes([BOX[0] ^ 1]) + BOX[1:],
    "the last tag": BOX[:-1] + bytes([BOX[-1] ^ 0x80]),
    "the last byte gone": BOX[:-1],
    "cut within a chunk": BOX[: SEALED_CHUNK + 500],
    "cut to a nonce": BOX[: SEALED_CHUNK + 12],
    "cut to an empty chunk": BOX[: SEALED_CHUNK + 28],
    "bytes added": BOX + b"more",
    "two chunks swapped": chunk(1) + chunk(0) + BOX[2 * SEALED_CHUNK :],
    "a chunk left out": chunk(0) + BOX[2 * SEALED_CHUNK :],
    "a chunk twice": chunk(0) + chunk(0) + BOX[2 * SEALED_CHUNK :],
    "the first one missing": BOX[SEALED_CHUNK:],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_what_was_edited_cut_or_swapped_does_not_open(edit: bytes) -> None:
    assert edit != BOX
    with pytest.raises(Tampered, match=r"app app_a, file file_1, part original: the chunk at byte \d+"):
        KEY.open("", START, edit)


def test_a_whole_chunk_cut_off_shows_in_the_length() -> None:
    """Every chunk that is left is sound: the caller knows how long the segment is, and reads exactly that much."""
    short = BOX[: 3 * SEALED_CHUNK]
    assert len(b"".join(KEY.open("", START, short))) == 3 * CHUNK_BYTES
    assert len(short) < sealed_bytes(len(DATA))


def test_a_chunk_stays_in_its_place_part_file_and_app() -> None:
    for key, part, start in (
        (KEY, "", START + CHUNK_BYTES),
        (KEY, "", 0),
        (KEY, "small", START),
        (FileKey("app_a", "file_2", SECRET), "", START),
        (FileKey("app_b", "file_1", SECRET), "", START),
        # The fields do not run into one another.
        (FileKey("app_af", "ile_1", SECRET), "", START),
        (FileKey("app_a", "file_1", bytes(32)), "", START),
    ):
        with pytest.raises(Tampered):
            key.open(part, start, BOX)


def test_the_same_bytes_twice_are_sealed_differently() -> None:
    once, twice = (b"".join(KEY.seal("", 0, b"the same")) for _ in range(2))
    assert once[:12] != twice[:12]
    assert once != twice


def ciphers(tmp_path: Path, *streams: str) -> list[StreamCipher]:
    ring = Keyring(KeyFile(tmp_path / "root.key"))
    ring.load_app_key("app_a", ring.new_app_key("app_a"))
    return [ring.cipher("app_a", one, ring.new_stream_key("app_a", one)) for one in streams]


def test_a_files_key_opens_under_its_stream_and_for_its_file_only(tmp_path: Path) -> None:
    one, two = ciphers(tmp_path, "channel:1", "channel:2")
    key = new_file_key("app_a", "file_1")
    box = key.box(one)
    again = open_file_key("app_a", "file_1", one, box)
    assert b"".join(again.open("", 0, b"".join(key.seal("", 0, b"hello")))) == b"hello"
    for stream, file in ((two, "file_1"), (one, "file_2")):
        with pytest.raises(Tampered):
            open_file_key("app_a", file, stream, box)
    with pytest.raises(Tampered):
        open_file_key("app_a", "file_1", one, box[:-1] + bytes([box[-1] ^ 1]))


def test_each_file_has_a_key_of_its_own(tmp_path: Path) -> None:
    (stream,) = ciphers(tmp_path, "channel:1")
    one, two = new_file_key("app_a", "file_1"), new_file_key("app_a", "file_1")
    with pytest.raises(Tampered):
        two.open("", 0, b"".join(one.seal("", 0, b"hello")))
    assert one.box(stream) != one.box(stream)


def test_a_key_of_another_length_is_none() -> None:
    with pytest.raises(CryptoError, match="16 bytes"):
        FileKey("app_a", "file_1", bytes(16))
