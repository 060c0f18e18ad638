"""Root keys in a file: what a machine without a key service uses.

The file is JSON, so that an operator can see which versions it holds:

    {"format": "tidings-root-keys", "version": 1, "current": "rk_5f…",
     "keys": {"rk_5f…": {"key": "<base64 of 32 bytes>", "created": "2026-01-31T09:30:00Z"}}}

`keys` is in the order of their making. Those before `current` are old; one after it is prepared: it opens what was
wrapped by it and wraps nothing, so that it can be brought to every machine before the first one uses it.

Whoever has this file and the database can read everything, and without it nobody can. Back it up apart from the data.
"""

import base64
import binascii
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tidings.server.crypto.base import KEY_BYTES, NONCE_BYTES, TAG_BYTES, CryptoError, RootKeyMissing, Tampered, Wrapped

# One version takes about 120 bytes: this is over 500 rotations, and keeps a wrong path (a database) out of memory.
KEY_FILE_BYTES_MAX = 64 * 1024

# The lock is held for one small write with two fsyncs. A disk that takes longer than this is a fault to report.
LOCK_WAIT_SECONDS_MAX = 10.0
LOCK_RETRY_SECONDS = 0.01


class KeyFileError(CryptoError):
    """The key file is missing, unsafe, malformed or cannot be written. The text says what to do."""


class _Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    created: datetime


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["tidings-root-keys"]
    version: Literal[1]
    current: str
    keys: dict[str, _Version]


class _Loaded(msgspec.Struct, frozen=True):
    """The file as last read. Holds ciphers, not key bytes, so that no repr or log line can show a key."""

    current: str
    prepared: str | None
    ciphers: dict[str, AESGCM]
    stamp: tuple[int, int, int]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class KeyFile:
    """A `RootKeyProvider` over one file, shared by any number of threads and processes on the machine.

    `path` is created on first use with one fresh key, mode 0600, unless `create` is False: pass False when there is
    already data, because a fresh key would open none of it and hide that the real file is missing.

    Wraps use random 96-bit nonces directly under the root key. NIST SP 800-38D §8.3 allows 2^32 of those per key; one
    wrap per app and rotation stays far below.
    """

    def __init__(self, path: Path, *, create: bool = True, now: Callable[[], datetime] = _utc_now) -> None:
        # A symbolic link is followed once, so that rotation replaces the file and not the link.
        self._path = Path(os.path.realpath(path))
        self._now = now
        self._mutex = threading.Lock()
        if create and not os.path.exists(self._path):
            self._create()
        self._loaded = self._read()

    @property
    def path(self) -> Path:
        return self._path

    @property
    def current_kid(self) -> str:
        """The current version's id, re-read if the file has changed: a stale one here would outlive a rotation."""
        return self._refreshed().current

    def kids(self) -> tuple[str, ...]:
        """All versions in the file, oldest first."""
        return tuple(self._refreshed().ciphers)

    def wrap(self, plain: bytes, aad: bytes) -> Wrapped:
        # A key wrapped under a version that another process is about to retire would be lost, hence the fresh look.
        loaded = self._refreshed()
        nonce = os.urandom(NONCE_BYTES)
        return Wrapped(kid=loaded.current, box=nonce + loaded.ciphers[loaded.current].encrypt(nonce, plain, aad))

    def unwrap(self, wrapped: Wrapped, aad: bytes) -> bytes:
        # A known version is used from memory: a running server outlives an accident with the file.
        cipher = self._loaded.ciphers.get(wrapped.kid)
        if cipher is None:
            loaded = self._reread()
            cipher = loaded.ciphers.get(wrapped.kid)
            if cipher is None:
                held = ", ".join(loaded.ciphers)
                raise RootKeyMissing(
                    wrapped.kid,
                    f"root key {wrapped.kid} is not in {self._path} (it holds {held}): "
                    "put back the key file that was in use when this data was written",
                )
        box = wrapped.box
        if len(box) < NONCE_BYTES + TAG_BYTES:
            raise Tampered(f"a key wrapped by root key {wrapped.kid} is cut short")
        try:
            return cipher.decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], aad)
        except InvalidTag:
            raise Tampered(f"a key wrapped by root key {wrapped.kid} does not open") from None

    def prepared_kid(self) -> str | None:
        """The key that `prepare_version` made and nothing wraps with yet, if there is one."""
        return self._refreshed().prepared

    def prepare_version(self) -> str:
        """Add a fresh key without making it current, and return its id once it is safely on disk.

        A key that is prepared already is returned instead: making another would leave two kinds of copies about.
        """
        with self._locked():
            before = self._parse(self._read_bytes()[0])
            kid = _prepared(before)
            if kid is None:
                kid, version = self._fresh_version()
                self._replace(msgspec.structs.replace(before, keys={**before.keys, kid: version}))
        self._reread()
        return kid

    def add_version(self) -> str:
        """Make the prepared key current, or a fresh one if none is, and return its id once that is safely on disk."""
        with self._locked():
            before = self._parse(self._read_bytes()[0])
            kid = _prepared(before)
            if kid is None:
                kid, version = self._fresh_version()
                before = msgspec.structs.replace(before, keys={**before.keys, kid: version})
            self._replace(msgspec.structs.replace(before, current=kid))
        self._reread()
        return kid

    def retire(self, kid: str) -> None:
        """Remove an old version for good. Raises `KeyFileError` for the current one and for one that is not there.

        The caller has made sure that nothing is wrapped by it any more: what still is can never be opened again.
        """
        with self._locked():
            before = self._parse(self._read_bytes()[0])
            if kid == before.current:
                raise KeyFileError(f"{kid} is the current root key: rotate first, then retire it")
            if kid not in before.keys:
                raise KeyFileError(f"there is no root key {kid} in {self._path}: it holds {', '.join(before.keys)}")
            left = {other: version for other, version in before.keys.items() if other != kid}
            self._replace(msgspec.structs.replace(before, keys=left))
        self._reread()

    # Reading

    def _refreshed(self) -> _Loaded:
        try:
            now = self._path.stat()
        except FileNotFoundError:
            raise self._missing() from None
        if _stamp(now) == self._loaded.stamp:
            return self._loaded
        return self._reread()

    def _reread(self) -> _Loaded:
        with self._mutex:
            self._loaded = self._read()
            return self._loaded

    def _read(self) -> _Loaded:
        raw, stamp = self._read_bytes()
        document = self._parse(raw)
        ciphers = {kid: AESGCM(base64.b64decode(version.key)) for kid, version in document.keys.items()}
        return _Loaded(current=document.current, prepared=_prepared(document), ciphers=ciphers, stamp=stamp)

    def _read_bytes(self) -> tuple[bytes, tuple[int, int, int]]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise self._missing() from None
        except OSError as refused:
            raise KeyFileError(f"cannot open the key file {self._path}: {refused.strerror}") from refused
        try:
            # Asked of the open file, not of the path: what is checked is what is read.
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise KeyFileError(f"the key file {self._path} is not a regular file")
            mode = stat.S_IMODE(found.st_mode)
            if mode & 0o077:
                raise KeyFileError(
                    f"the key file {self._path} can be used by other accounts (mode {mode:04o}): "
                    f"run `chmod 600 {self._path}`, and rotate the root key if somebody may have read it"
                )
            with open(fd, "rb", closefd=False) as file:
                raw = file.read(KEY_FILE_BYTES_MAX + 1)
        finally:
            os.close(fd)
        if len(raw) > KEY_FILE_BYTES_MAX:
            raise KeyFileError(
                f"the key file {self._path} is larger than {KEY_FILE_BYTES_MAX} bytes: is it the right one?"
            )
        return raw, _stamp(found)

    def _parse(self, raw: bytes) -> _Document:
        try:
            document = msgspec.json.decode(raw, type=_Document)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            # msgspec names the field and the expected type, and never quotes the value of a text field.
            raise KeyFileError(f"the key file {self._path} is malformed: {wrong}") from None
        for kid, version in document.keys.items():
            try:
                key = base64.b64decode(version.key, validate=True)
            except (binascii.Error, ValueError):
                raise self._malformed(f"keys.{kid}.key", "is not base64") from None
            if len(key) != KEY_BYTES:
                raise self._malformed(f"keys.{kid}.key", f"has {len(key)} bytes instead of {KEY_BYTES}")
        if document.current not in document.keys:
            raise self._malformed("current", f"names {document.current!r}, which is not under `keys`")
        return document

    def _malformed(self, field: str, wrong: str) -> KeyFileError:
        return KeyFileError(f"the key file {self._path} is malformed: `{field}` {wrong}")

    def _missing(self) -> KeyFileError:
        return KeyFileError(
            f"the key file {self._path} does not exist: put back the one that belongs to this data, "
            "without it nothing that is stored can be read"
        )

    # Writing

    def _create(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as refused:
            raise KeyFileError(f"cannot make the directory {self._path.parent}: {refused.strerror}") from refused
        with self._locked():
            # Somebody else may have made it while this process waited: then theirs is the key.
            if not os.path.exists(self._path):
                kid, version = self._fresh_version()
                self._replace(_Document(format="tidings-root-keys", version=1, current=kid, keys={kid: version}))

    def _fresh_version(self) -> tuple[str, _Version]:
        # Keys and their ids come from the operating system and cannot be injected: a seeded key would be no key.
        kid = f"rk_{secrets.token_hex(8)}"
        key = base64.b64encode(os.urandom(KEY_BYTES)).decode("ascii")
        return kid, _Version(key=key, created=self._now().astimezone(UTC).replace(microsecond=0))

    def _replace(self, document: _Document) -> None:
        """Put `document` in place so that after a crash at any moment the old or the new file is there, whole."""
        content = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
        temporary = self._path.with_name(f"{self._path.name}.{secrets.token_hex(8)}.tmp")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(fd, "wb") as file:
                    self._keep_owner(fd)
                    file.write(content)
                    file.flush()
                    os.fsync(fd)
                os.rename(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as refused:
            raise KeyFileError(f"cannot write the key file {self._path}: {refused.strerror}") from refused

    def _keep_owner(self, fd: int) -> None:
        """Give a new file the key file's owner: a rotation run by root must not lock out the server's own account."""
        if os.geteuid() == 0 and os.path.exists(self._path):
            owner = self._path.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, over all processes: without it two first starts, or two rotations, lose a key.

        The lock is a file of its own because the key file is replaced, and a lock on a replaced file guards nothing.
        It ends with the process that holds it.
        """
        lock = self._path.with_name(f"{self._path.name}.lock")
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as refused:
            raise KeyFileError(f"cannot open the lock {lock}: {refused.strerror}") from refused
        try:
            self._keep_owner(fd)
            deadline = time.monotonic() + LOCK_WAIT_SECONDS_MAX
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise KeyFileError(
                            f"another process has held {lock} for {LOCK_WAIT_SECONDS_MAX:.0f} s: is one stopped?"
                        ) from None
                    time.sleep(LOCK_RETRY_SECONDS)
            yield
        finally:
            os.close(fd)


def _prepared(document: _Document) -> str | None:
    """The newest key, if it is not the current one."""
    newest = next(reversed(document.keys))
    return None if newest == document.current else newest


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    """Changes whenever the file is replaced (another inode) or edited in place (time or size)."""
    return found.st_ino, found.st_mtime_ns, found.st_size
