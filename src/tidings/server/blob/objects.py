"""Blobs over obstore: a folder on the disk, or a bucket of S3, Google Cloud Storage or Azure.

The disk is given what object stores do by themselves: what `put` has returned for is on the medium, file and
directories alike. obstore writes beside the name and renames, so half a blob is never seen; but it does not call
`fsync` (object_store's LocalFileSystem leaves that to whoever needs it).
"""

import asyncio
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from tidings.server.blob.base import (
    BLOB_BYTES_MAX,
    DELETE_MAX,
    Blob,
    BlobError,
    BlobMissing,
    BlobStore,
    BlobUnavailable,
    SignedRequest,
    check_name,
)

# A request to a bucket that got no answer is tried again for so long: the uploader's connection waits meanwhile.
RETRY_FOR: Final = timedelta(seconds=20)
TIMEOUT: Final = timedelta(seconds=30)
SCHEMES: Final = ("s3", "gs", "az")
ENDPOINTS: Final = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")


def open_blobs(address: str, folder: Path) -> BlobStore:
    """The store at `address`: empty for `folder` on the disk, else `s3://bucket/prefix`, `gs://bucket/prefix` or
    `az://container/prefix`. Credentials, region and endpoint come from the environment, under the names that each
    provider's own tools use (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL` …,
    `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME` …). Without TLS only where the endpoint says http.

    Raises `ValueError` for another address, `BlobUnavailable` where the folder cannot be made or the configuration
    is not enough. Talks to nobody yet.
    """
    if not address:
        return DiskBlobs(folder)
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in SCHEMES or not rest.strip("/"):
        raise ValueError(f"{address!r} is no blob store: leave it empty for the disk, or s3://bucket, gs://bucket, "
                         "az://container, with /prefix if you like")  # fmt: skip
    plain = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    try:
        store = from_url(
            address,
            client_options={"timeout": TIMEOUT, "connect_timeout": timedelta(seconds=5), "allow_http": plain},
            retry_config={"retry_timeout": RETRY_FOR, "max_retries": 5},
        )
    except BaseError as error:
        raise BlobUnavailable(f"{address}: {error}") from error
    return BucketBlobs(address, store)


class _Blobs(ABC):
    """What disk and buckets have in common."""

    def __init__(self, where: str, store: Any) -> None:
        self._where = where
        self._store = store

    async def get(self, name: str, start: int, length: int) -> bytes:
        """See `BlobStore.get`."""
        if not 0 < length <= BLOB_BYTES_MAX or start < 0:
            raise ValueError(f"{length} bytes from {start}: read 1 to {BLOB_BYTES_MAX} at once")
        try:
            found = bytes(await obstore.get_range_async(self._store, check_name(name), start=start, length=length))
        except (NotFoundError, FileNotFoundError) as error:
            raise BlobMissing(f"{self._where}: there is no blob {name}") from error
        except (BaseError, OSError) as error:
            # A range beyond the end is an error of its own in some stores, a shorter answer in others.
            if await self._bytes(name) < start + length:
                raise BlobMissing(f"{self._where}: blob {name} is shorter than {start + length} bytes") from error
            raise self._trouble("read", name, error) from error
        if len(found) != length:
            raise BlobMissing(f"{self._where}: blob {name} is shorter than {start + length} bytes")
        return found

    async def delete(self, names: Sequence[str]) -> None:
        """See `BlobStore.delete`."""
        if len(names) > DELETE_MAX:
            raise ValueError(f"{len(names)} blobs: delete at most {DELETE_MAX} at once")
        for name in names:
            check_name(name)
        await self._delete(list(names))

    async def _delete(self, names: list[str]) -> None:
        try:
            await obstore.delete_async(self._store, names)
        except (NotFoundError, FileNotFoundError):
            # Which of them was missing is not told, nor which ones are left.
            for name in names:
                with suppress(NotFoundError, FileNotFoundError):
                    await obstore.delete_async(self._store, name)
        except (BaseError, OSError) as error:
            raise self._trouble("delete", names[0], error) from error

    async def listing(self, prefix: str = "") -> AsyncIterator[Sequence[Blob]]:
        """See `BlobStore.listing`."""
        if prefix:
            check_name(prefix)
        try:
            async for page in obstore.list(self._store, prefix or None):
                yield [
                    Blob(name=one["path"], bytes=one["size"], modified_at=one["last_modified"])
                    for one in page
                    # What a write that was killed has left behind bears a name that is none of ours.
                    if _is_name(one["path"])
                ]
        except (BaseError, OSError) as error:
            raise self._trouble("list", prefix, error) from error

    async def check(self) -> None:
        """See `BlobStore.check`."""
        name, content = f"check/{secrets.token_hex(8)}", secrets.token_bytes(32)
        await self.put(name, [content])
        try:
            if await self.get(name, 0, len(content)) != content:
                raise BlobUnavailable(f"{self._where}: what was read is not what was written")
        finally:
            await self.delete([name])

    async def put(self, name: str, parts: Sequence[bytes]) -> None:
        """See `BlobStore.put`."""
        if sum(map(len, parts)) > BLOB_BYTES_MAX:
            raise ValueError(f"blob {name} is longer than {BLOB_BYTES_MAX} bytes")
        await self._put(check_name(name), parts)

    @abstractmethod
    async def _put(self, name: str, parts: Sequence[bytes]) -> None:
        """`put`, once name and length are known to be right."""

    async def _bytes(self, name: str) -> int:
        try:
            return int((await obstore.head_async(self._store, name))["size"])
        except (NotFoundError, FileNotFoundError):
            return 0
        except (BaseError, OSError) as error:
            raise self._trouble("read", name, error) from error

    def _trouble(self, doing: str, name: str, error: Exception) -> BlobUnavailable:
        # obstore's texts go on for pages, with the request and its retries.
        return BlobUnavailable(f"{self._where}: could not {doing} {name}: {str(error).splitlines()[0][:300]}")


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


class BucketBlobs(_Blobs):
    """S3, Google Cloud Storage or Azure."""

    @property
    def signs(self) -> bool:
        """True."""
        return True

    async def _put(self, name: str, parts: Sequence[bytes]) -> None:
        try:
            # In one request: a blob fits into memory, and a multipart upload is three.
            await obstore.put_async(self._store, name, b"".join(parts), use_multipart=False)
        except (BaseError, OSError) as error:
            raise self._trouble("write", name, error) from error

    async def sign_put(self, name: str, keep: timedelta) -> SignedRequest:
        """See `BlobStore.sign_put`."""
        expires_at = datetime.now(UTC) + keep
        try:
            url = await obstore.sign_async(self._store, "PUT", check_name(name), keep)
        except (BaseError, OSError) as error:
            raise self._trouble("sign for", name, error) from error
        # Azure's Put Blob wants to be told which kind of blob; the others need no header.
        azure = {"x-ms-blob-type": "BlockBlob"} if self._where.startswith("az:") else {}
        return SignedRequest(method="PUT", url=url, headers=azure, expires_at=expires_at)


class DiskBlobs(_Blobs):
    """A folder, which nobody but the server's user may enter."""

    def __init__(self, folder: Path) -> None:
        """Raises `BlobUnavailable` where the folder cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise BlobUnavailable(f"{folder}: {error.strerror}") from error
        super().__init__(str(folder), LocalStore(prefix=folder, mkdir=True))
        self._folder = folder
        # Directories whose entry in the one above is known to be on the medium.
        self._durable = {folder}

    @property
    def signs(self) -> bool:
        """False: a disk has no address."""
        return False

    async def _put(self, name: str, parts: Sequence[bytes]) -> None:
        try:
            await asyncio.to_thread(self._write, name, parts)
        except (BaseError, OSError) as error:
            raise self._trouble("write", name, error) from error

    def _write(self, name: str, parts: Sequence[bytes]) -> None:
        obstore.put(self._store, name, b"".join(parts), use_multipart=False)
        path = self._folder / name
        _sync(path, os.fdatasync)
        directory = path.parent
        _sync(directory, os.fsync)
        while directory not in self._durable:
            _sync(directory.parent, os.fsync)
            self._durable.add(directory)
            directory = directory.parent
        if len(self._durable) > 10_000:
            self._durable = {self._folder}

    async def delete(self, names: Sequence[str]) -> None:
        """See `BlobStore.delete`. A directory that has become empty goes, too."""
        await super().delete(names)
        for directory in {(self._folder / name).parent for name in names}:
            await asyncio.to_thread(self._prune, directory)

    def _prune(self, directory: Path) -> None:
        while directory != self._folder:
            self._durable.discard(directory)
            try:
                directory.rmdir()
            except OSError:
                return
            directory = directory.parent

    async def sign_put(self, name: str, keep: timedelta) -> SignedRequest:
        """Raises `BlobError`: see `signs`."""
        raise BlobError(f"{self._where}: there is no direct upload to a disk")


def _sync(path: Path, sync: Callable[[int], None]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
