"""One contract, two kinds of store: the disk, and a bucket behind a real server that speaks S3."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tidings.server.blob.base import BLOB_BYTES_MAX, BlobError, BlobMissing, BlobStore, BlobUnavailable
from tidings.server.blob.objects import DiskBlobs, open_blobs
from tidings.testing.s3 import S3Process

BUCKET = "files"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def s3(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[S3Process]:
    async with S3Process(tmp_path_factory.mktemp("s3")) as server:
        await server.make_bucket(BUCKET)
        yield server


@pytest.fixture(params=["disk", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    if request.param == "disk":
        return open_blobs("", tmp_path / "blobs")
    s3: S3Process = request.getfixturevalue("s3")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return open_blobs(f"s3://{BUCKET}/{tmp_path.name.replace('[', '').replace(']', '')}", tmp_path)


async def names(blobs: BlobStore, prefix: str = "") -> dict[str, int]:
    return {one.name: one.bytes async for page in blobs.listing(prefix) for one in page}


async def test_what_was_put_is_read_in_parts(blobs: BlobStore) -> None:
    await blobs.put("app/file/0", [b"one ", b"two ", b"three"])
    assert await blobs.get("app/file/0", 0, 13) == b"one two three"
    assert await blobs.get("app/file/0", 4, 3) == b"two"
    assert await blobs.get("app/file/0", 12, 1) == b"e"


@pytest.mark.parametrize(("start", "length"), [(0, 14), (12, 2), (13, 1), (500, 1)])
async def test_a_blob_that_is_shorter_than_what_is_asked_for_is_an_error(
    blobs: BlobStore, start: int, length: int
) -> None:
    await blobs.put("app/file/0", [b"one two three"])
    with pytest.raises(BlobMissing):
        await blobs.get("app/file/0", start, length)


async def test_a_blob_that_is_not_there_is_an_error(blobs: BlobStore) -> None:
    with pytest.raises(BlobMissing, match="app/file/0"):
        await blobs.get("app/file/0", 0, 1)


async def test_deleting_is_for_those_that_are_gone_too(blobs: BlobStore) -> None:
    for number in range(5):
        await blobs.put(f"app/file/{number}", [b"x"])
    await blobs.delete([f"app/file/{number}" for number in (7, 1, 9, 3)])
    assert await names(blobs) == {"app/file/0": 1, "app/file/2": 1, "app/file/4": 1}
    await blobs.delete(["app/file/0", "app/file/2", "app/file/4"])
    assert await names(blobs) == {}


async def test_a_listing_keeps_to_its_folder(blobs: BlobStore) -> None:
    for name in ("one/a/0", "one/b/0", "onetwo/a/0"):
        await blobs.put(name, [b"xyz"])
    assert await names(blobs, "one") == {"one/a/0": 3, "one/b/0": 3}
    assert len(await names(blobs)) == 3


async def test_many_at_once(blobs: BlobStore) -> None:
    content = {f"app/f{number}/0": os.urandom(1000 + number) for number in range(40)}
    await asyncio.gather(*(blobs.put(name, [data]) for name, data in content.items()))
    read = await asyncio.gather(*(blobs.get(name, 0, len(data)) for name, data in content.items()))
    assert list(read) == list(content.values())


@pytest.mark.parametrize("name", ["", "/", "../x", "a/../b", "a//b", "/a", "a/", "a b", "a.b", "ü", "a\x00", "a/" * 9])
async def test_a_name_is_letters_and_slashes(blobs: BlobStore, name: str) -> None:
    for call in (blobs.put(name, [b"x"]), blobs.get(name, 0, 1), blobs.delete([name])):
        with pytest.raises(ValueError, match="no name of a blob"):
            await call


async def test_bounds(blobs: BlobStore) -> None:
    with pytest.raises(ValueError, match="longer than"):
        await blobs.put("app/file/0", [b"x", b"y" * BLOB_BYTES_MAX])
    assert await names(blobs) == {}
    await blobs.put("app/file/0", [b"x" * BLOB_BYTES_MAX])
    assert len(await blobs.get("app/file/0", 0, BLOB_BYTES_MAX)) == BLOB_BYTES_MAX
    with pytest.raises(ValueError, match="at once"):
        await blobs.get("app/file/0", 0, BLOB_BYTES_MAX + 1)
    with pytest.raises(ValueError, match="at most"):
        await blobs.delete(["a"] * 1001)


async def test_the_check_leaves_nothing(blobs: BlobStore) -> None:
    await blobs.check()
    assert await names(blobs) == {}


async def test_a_signed_request_puts_into_a_bucket_and_there_is_none_for_a_disk(blobs: BlobStore) -> None:
    if not blobs.signs:
        with pytest.raises(BlobError, match="no direct upload"):
            await blobs.sign_put("app/direct/0", timedelta(minutes=5))
        return
    signed = await blobs.sign_put("app/direct/0", timedelta(minutes=5))
    async with httpx.AsyncClient(trust_env=False) as client:
        headers = {**signed.headers, "content-type": "application/octet-stream"}
        assert (await client.request(signed.method, signed.url, content=b"straight", headers=headers)).is_success
    assert await blobs.get("app/direct/0", 0, 8) == b"straight"


async def test_a_bucket_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with S3Process(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        blobs = open_blobs(f"s3://{BUCKET}", tmp_path)
        with pytest.raises(BlobUnavailable, match="check/"):
            await blobs.check()
        server.kill9()
        with pytest.raises(BlobUnavailable, match="app/file/0") as caught:
            await blobs.put("app/file/0", [b"x"])
        assert server.environment["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


@pytest.mark.parametrize("address", ["s3://", "ftp://x/y", "/var/lib", "http://bucket", "memory:///", "file:///tmp"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no blob store"):
        open_blobs(address, tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BlobUnavailable, match="file"):
        open_blobs("", tmp_path / "file" / "blobs")


async def test_the_folder_is_for_its_owner_and_empty_directories_go(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    blobs = open_blobs("", folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    await blobs.put("app/one/0", [b"x"])
    await blobs.put("app/two/0", [b"x"])
    await blobs.delete(["app/one/0"])
    assert [one.name for one in (folder / "app").iterdir()] == ["two"]
    await blobs.delete(["app/two/0"])
    assert list(folder.iterdir()) == []
    await blobs.put("app/one/1", [b"y"])
    assert await blobs.get("app/one/1", 0, 1) == b"y"


async def test_what_a_killed_write_left_is_not_listed_as_a_blob(tmp_path: Path) -> None:
    blobs = open_blobs("", tmp_path)
    await blobs.put("app/file/0", [b"x"])
    (tmp_path / "app" / "file" / "1#1").write_bytes(b"half")
    assert await names(blobs) == {"app/file/0": 1}


async def test_file_and_directories_are_on_the_medium_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    paths = {}
    real_open, real_fsync, real_fdatasync = os.open, os.fsync, os.fdatasync

    def opened(path: str | Path, *arguments: int) -> int:
        descriptor = real_open(path, *arguments)
        paths[descriptor] = Path(path).relative_to(tmp_path).as_posix()
        return descriptor

    def fsync(descriptor: int) -> None:
        synced.append(paths[descriptor])
        real_fsync(descriptor)

    def fdatasync(descriptor: int) -> None:
        synced.append(paths[descriptor])
        real_fdatasync(descriptor)

    blobs = DiskBlobs(tmp_path)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await blobs.put("app/file/0", [b"x"])
    assert synced == ["app/file/0", "app/file", "app", "."]
    synced.clear()
    await blobs.put("app/file/1", [b"x"])
    assert synced == ["app/file/1", "app/file"]


async def test_a_killed_writer_leaves_whole_blobs_only(tmp_path: Path) -> None:
    """The name is there with everything, or not at all."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tidings.server.blob.objects import open_blobs\n"
        "async def main():\n"
        "    blobs = open_blobs('', Path(sys.argv[1]))\n"
        "    for number in range(10000):\n"
        "        await blobs.put(f'app/file/{number}', [bytes([number % 251]) * 3_000_000])\n"
        "        print(number, flush=True)\n"
        "asyncio.run(main())\n"
    )
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(folder), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        last = -1
        while last < 3 + attempt:
            last = int(await process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = max([last, *(int(line) for line in (await process.stdout.read()).split())])
        await process.wait()
        blobs = open_blobs("", folder)
        found = await names(blobs)
        assert set(found.values()) == {3_000_000}
        assert {f"app/file/{number}" for number in range(last + 1)} <= found.keys()
        for number in range(last + 1):
            assert await blobs.get(f"app/file/{number}", 2_999_999, 1) == bytes([number % 251])
