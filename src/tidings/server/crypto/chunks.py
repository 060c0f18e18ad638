"""Files at rest: sealed in chunks, so that a range can be read without the rest and nothing can be moved or cut.

A file has a key of its own, random, which is kept sealed under the key of the stream it belongs to (`new_file_key`,
`FileKey.box`): whoever destroys the stream's key, or the rows that hold the sealed one, has destroyed the bytes too.

A file lies in *segments*, runs of at most `SEGMENT_BYTES` that were written at once; which there are and how long
they are the caller keeps (sealed as well, so that a segment cannot be left out). A segment is a row of chunks of
`CHUNK_BYTES`, the last one shorter. Each is `nonce (12) · ciphertext · tag (16)`, AES-256-GCM, bound to the app, the
file, the part of it (the original or one of its previews) and the chunk's place in the file, in bytes from its
beginning: one that was edited, cut short, swapped, or taken from another file or place does not open.

Nonces are random: an upload that is cut off and resumed writes other bytes at the same place, which with a counter
would be one nonce for two texts. NIST SP 800-38D §8.3 allows 2^32 of them per key: a petabyte per file.
"""

import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tidings.server.crypto.base import (
    KEY_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    CryptoError,
    Tampered,
    associated_data,
    fields,
)
from tidings.server.crypto.keyring import StreamCipher

# What is read and opened for one byte of a range. 28 bytes in each are ours: 0.01 %.
CHUNK_BYTES = 256 * 1024
# What a transfer holds in memory at once, and loses at most when its server dies.
SEGMENT_BYTES = 32 * CHUNK_BYTES

CHUNK_OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES
_SEALED_CHUNK_BYTES = CHUNK_BYTES + CHUNK_OVERHEAD_BYTES

_KIND_CHUNK = b"tidings file chunk"
_KIND_KEY = b"file key\x00"


def sealed_bytes(length: int) -> int:
    """How long the blob of a segment of `length` bytes is."""
    return length + -(-length // CHUNK_BYTES) * CHUNK_OVERHEAD_BYTES


class FileKey:
    """Seals and opens the chunks of one file. Get it from `new_file_key` or `open_file_key`."""

    __slots__ = ("_aead", "_app", "_file", "_row", "_secret")

    def __init__(self, app_id: str, file_id: str, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise CryptoError(f"app {app_id}, file {file_id}: a key of {len(secret)} bytes instead of {KEY_BYTES}")
        self._app, self._file, self._secret = app_id, file_id, secret
        self._aead = AESGCM(secret)
        self._row = fields(_KIND_CHUNK, app_id.encode(), file_id.encode())

    def box(self, stream: StreamCipher) -> bytes:
        """The key, sealed under a stream's: what is kept beside whatever of that stream refers to the file."""
        return stream.seal(self._secret, _KIND_KEY + self._file.encode())

    def seal(self, part: str, start: int, data: bytes | memoryview) -> list[bytes]:
        """The chunks of a segment that begins `start` bytes into the file, in order: what `BlobStore.put` takes.

        Raises `ValueError` for a segment longer than `SEGMENT_BYTES`.
        """
        if len(data) > SEGMENT_BYTES:
            raise ValueError(f"a segment of {len(data)} bytes is longer than {SEGMENT_BYTES}")
        view = memoryview(data)
        sealed = []
        for at in range(0, len(view), CHUNK_BYTES):
            nonce = os.urandom(NONCE_BYTES)
            chunk = self._aead.encrypt(nonce, view[at : at + CHUNK_BYTES], self._identity(part, start + at))
            sealed += [nonce, chunk]
        return sealed

    def open(self, part: str, start: int, box: bytes | memoryview) -> list[bytes]:
        """The plain chunks of consecutive sealed ones, of which the first lies `start` bytes into the file.

        All but the last are `CHUNK_BYTES` long. Raises `Tampered` for anything that `seal` did not make for this
        place; that nothing is missing at the end, only the caller can tell, who knows how long the segment is.
        """
        view = memoryview(box)
        plain = []
        for number, at in enumerate(range(0, len(view), _SEALED_CHUNK_BYTES)):
            chunk = view[at : at + _SEALED_CHUNK_BYTES]
            place = start + number * CHUNK_BYTES
            if len(chunk) <= CHUNK_OVERHEAD_BYTES:
                raise self._tampered(part, place)
            try:
                plain.append(self._aead.decrypt(chunk[:NONCE_BYTES], chunk[NONCE_BYTES:], self._identity(part, place)))
            except InvalidTag:
                raise self._tampered(part, place) from None
        return plain

    def _identity(self, part: str, place: int) -> bytes:
        return associated_data(self._row, fields(part.encode(), place.to_bytes(8, "big")))

    def _tampered(self, part: str, place: int) -> Tampered:
        return Tampered(f"app {self._app}, file {self._file}, part {part or 'original'}: the chunk at byte {place} "
                        "does not open")  # fmt: skip


def new_file_key(app_id: str, file_id: str) -> FileKey:
    """A key for a file that is about to be written."""
    return FileKey(app_id, file_id, os.urandom(KEY_BYTES))


def open_file_key(app_id: str, file_id: str, stream: StreamCipher, box: bytes) -> FileKey:
    """What `FileKey.box` sealed under this stream's key for this file; raises `Tampered` for anything else."""
    return FileKey(app_id, file_id, stream.open(box, _KIND_KEY + file_id.encode()))


class Span:
    """Which sealed bytes of a segment's blob hold a range of its plain ones.

    `start`, `length`: what to read of the blob. `first`: where its first chunk begins in the segment. `skip`: how
    many plain bytes of that chunk come before the range.
    """

    __slots__ = ("first", "length", "skip", "start")

    def __init__(self, segment_bytes: int, offset: int, length: int) -> None:
        """Raises `ValueError` for a range that is empty or not within the segment."""
        if not (offset >= 0 and length > 0 and offset + length <= segment_bytes):
            raise ValueError(f"{length} bytes from {offset} are not within a segment of {segment_bytes}")
        number = offset // CHUNK_BYTES
        end = min(segment_bytes, -(-(offset + length) // CHUNK_BYTES) * CHUNK_BYTES)
        self.first = number * CHUNK_BYTES
        self.skip = offset - self.first
        self.start = number * _SEALED_CHUNK_BYTES
        self.length = sealed_bytes(end) - self.start


def cut(chunks: Sequence[bytes], skip: int, length: int) -> list[memoryview]:
    """`length` bytes of opened chunks, beginning `skip` into the first, without copying them."""
    views = []
    for chunk in chunks:
        view = memoryview(chunk)[skip : skip + length]
        skip = max(0, skip - len(chunk))
        if len(view):
            views.append(view)
            length -= len(view)
    return views
