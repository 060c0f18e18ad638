"""The port for what is too large for the store: named, immutable runs of bytes.

A blob is written once, whole, under a name that is never used again, and is read in parts. What it holds is sealed
before it comes here (`crypto/chunks.py`): an adapter sees neither content nor keys.
"""

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Protocol

import msgspec

from tidings.server.errors import TidingsError

# Also the longest that is read or written in one call: a bound of the memory that a transfer takes.
BLOB_BYTES_MAX = 16 * 1024 * 1024
# So many are deleted with one call; S3's DeleteObjects takes no more.
DELETE_MAX = 1000

# Letters, digits, `_` and `-` between slashes: the same name on every file system and in every bucket, and no way out.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}(?:/[A-Za-z0-9_-]{1,128}){0,7}")


class BlobError(TidingsError):
    """Everything this room raises, but for `ValueError` where the caller is wrong."""


class BlobMissing(BlobError):
    """There is no blob of this name, or it is shorter than what was asked for."""


class BlobUnavailable(BlobError):
    """The store does not answer, refuses, or has no room. Trying again later may help."""


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """What a listing tells."""

    name: str
    bytes: int
    modified_at: datetime


class SignedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request that whoever holds it may make of the bucket, without credentials, until `expires_at`."""

    method: str
    url: str
    headers: Mapping[str, str]
    expires_at: datetime


class BlobStore(Protocol):
    """Every call raises `BlobUnavailable` where the store is in trouble, and `ValueError` for a name that is none."""

    @property
    def signs(self) -> bool:
        """Whether `sign_put` works: buckets do, the disk does not."""
        ...

    async def put(self, name: str, parts: Sequence[bytes]) -> None:
        """Write the parts, one after the other, as one blob. On return it survives a power cut.

        Nobody ever sees half of it under its name. Raises `ValueError` beyond `BLOB_BYTES_MAX`.
        """
        ...

    async def get(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, exactly. Raises `BlobMissing`."""
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Delete up to `DELETE_MAX`; those that are gone already are no error."""
        ...

    def listing(self, prefix: str = "") -> AsyncIterator[Sequence[Blob]]:
        """Pages of what there is below the folder `prefix`, in no order."""
        ...

    async def sign_put(self, name: str, keep: timedelta) -> SignedRequest:
        """A request that puts one blob straight into the bucket. Raises `BlobError` where `signs` is false."""
        ...

    async def check(self) -> None:
        """Write, read and delete a blob: for `tidings doctor`. Raises `BlobUnavailable` with what failed."""
        ...


def check_name(name: str) -> str:
    """The name; raises `ValueError` where it is none."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no name of a blob: up to 8 parts of 1 to 128 letters, digits, _ or -")
    return name
