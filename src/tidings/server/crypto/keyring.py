"""App keys and stream keys in memory, and the ciphers that seal rows with them.

    root key (provider) ─wraps→ app key ─wraps→ stream key ─seals→ event bodies, names, custom data of one stream
                        │               └─seals→ app-level rows: profiles, signing secrets, settings
                        └─wraps→ index key ─keys→ fingerprints (request digests)

Every box is bound to its row: `associated_data` goes into each seal, so a box that was edited, cut, moved to another
row, stream or app, or relabelled with another key version raises `Tampered`. Deleting a stream's wrapped key shreds
the stream, in backups made later too.

Everything here is plain computing: no I/O except the root provider's when app keys are made, loaded or rewrapped, no
waiting, safe from several threads. Python cannot wipe memory: unwrapped keys live until they are collected.
"""

import hmac
import os
import struct
import threading
from enum import StrEnum

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tidings.server.crypto.base import (
    KEY_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    AppKeyNotLoaded,
    CryptoError,
    RootKeyMissing,
    RootKeyProvider,
    Tampered,
    Wrapped,
    associated_data,
    fields,
)

# A cached cipher takes about 3 KB (2.5 KB of it OpenSSL's key schedule), so this is 60 MB. A miss costs one unwrap of
# about 8 µs and no I/O, so a larger cache would buy little.
STREAM_CIPHERS_MAX = 20_000

# Every box begins with the format (one byte) and the version of the key that sealed it (two bytes, big-endian).
_HEADER = struct.Struct(">BH")
# Then, directly under the stream key: 12-byte nonce, ciphertext and tag.
_FORMAT_STREAM = 1
# Then, under a key derived from app key and salt: 12-byte salt, 12-byte nonce, ciphertext and tag.
_FORMAT_DERIVED = 2

# Two bytes in every header; a rotation every day would take 179 years to get here.
KEY_VERSION_MAX = 0xFFFF

_SALT_BYTES = 12
_STREAM_NONCE_END = _HEADER.size + NONCE_BYTES
_SALT_END = _HEADER.size + _SALT_BYTES
_DERIVED_NONCE_END = _SALT_END + NONCE_BYTES

# What a stored box exceeds its plaintext by: for those who bound columns and pages.
STREAM_BOX_OVERHEAD_BYTES = _STREAM_NONCE_END + TAG_BYTES
APP_BOX_OVERHEAD_BYTES = _DERIVED_NONCE_END + TAG_BYTES

# First word of the associated data: what kind of thing is sealed, so that no kind passes for another.
_KIND_APP_KEY = b"tidings app key"
_KIND_STREAM_KEY = b"tidings stream key"
_KIND_STREAM_ITEM = b"tidings stream item"
_KIND_APP_ITEM = b"tidings app item"

# NIST SP 800-108 in counter mode with HMAC-SHA256, one block: counter, label, zero, context (the salt), length in bits.
_DERIVE_BOX_KEY = b"\0\0\0\1" + b"tidings box key v1" + b"\0"
_DERIVE_BOX_KEY_END = (8 * KEY_BYTES).to_bytes(4, "big")
_DERIVE_FINGERPRINT_KEY = b"tidings fingerprint key v1"


class KeyPurpose(StrEnum):
    """What an app's key is for. The value is stored and bound into the wrap: it never changes."""

    DATA = "data"  # wraps stream keys and seals app-level rows; rotates
    INDEX = "index"  # keys fingerprints; never rotates, since rows written under it are looked up by value


class WrappedKey(msgspec.Struct, frozen=True, kw_only=True):
    """An app's key as stored, sealed by the root key `root_kid`. One row per (app, purpose, version), unique."""

    purpose: KeyPurpose
    version: int  # 1, 2, 3 … per app and purpose
    root_kid: str
    wrapped: bytes


class WrappedStreamKey(msgspec.Struct, frozen=True, kw_only=True):
    """A stream's key as stored, sealed by version `app_key_version` of its app's data key.

    `version` numbers the stream's own keys. It survives rewrapping, and it is what boxes are bound to.
    """

    version: int
    app_key_version: int
    wrapped: bytes


def _number(version: int) -> bytes:
    return version.to_bytes(4, "big")


def _check_version(version: int) -> None:
    if not 1 <= version <= KEY_VERSION_MAX:
        raise CryptoError(f"key version {version} is outside 1 to {KEY_VERSION_MAX}")


class StreamCipher:
    """Seals and opens the rows of one stream under one version of its key. Get it from `Keyring.cipher`.

    Nonces are random, 96 bits, under the stream key itself. NIST SP 800-38D §8.3 allows 2^32 seals per key that way
    (then two nonces are equal with probability 2^-32): at ten seals a second that is 13 years. Deriving a key per box
    would lift the bound at twice the cost; instead, a stream that comes near it (its `seq` tells) gets a key with the
    next `version`, and every box says which version sealed it.
    """

    __slots__ = ("_aead", "_header", "_name", "_row", "wrapped")

    def __init__(self, app_id: str, stream_ref: str, wrapped: WrappedStreamKey, secret: bytes) -> None:
        self.wrapped = wrapped
        self._aead = AESGCM(secret)
        self._header = _HEADER.pack(_FORMAT_STREAM, wrapped.version)
        self._row = fields(_KIND_STREAM_ITEM, app_id.encode(), stream_ref.encode(), _number(wrapped.version))
        self._name = (app_id, stream_ref)

    def seal(self, plain: bytes, item: bytes) -> bytes:
        """Encrypt `plain` for the row `item`, which names it within the stream (kind and id, for instance).

        The box is `STREAM_BOX_OVERHEAD_BYTES` longer than `plain`.
        """
        nonce = os.urandom(NONCE_BYTES)
        return self._header + nonce + self._aead.encrypt(nonce, plain, associated_data(self._row, item))

    def open(self, box: bytes, item: bytes) -> bytes:
        """Give back what was sealed for `item`; raises `Tampered` for anything else."""
        if box[: _HEADER.size] == self._header and len(box) >= STREAM_BOX_OVERHEAD_BYTES:
            try:
                return self._aead.decrypt(
                    box[_HEADER.size : _STREAM_NONCE_END],
                    box[_STREAM_NONCE_END:],
                    associated_data(self._row, item),
                )
            except InvalidTag:
                pass
        app_id, stream_ref = self._name
        raise Tampered(
            f"app {app_id}, stream {stream_ref}, item {item!r}: does not open under stream key {self.wrapped.version}"
        )


class _DataKey:
    """One version of an app's data key. Used only to derive: no two boxes share an AES key, see `seal`."""

    __slots__ = ("app_id", "header", "item_row", "secret", "stream_key_row", "version")

    def __init__(self, app_id: str, version: int, secret: bytes) -> None:
        self.app_id = app_id
        self.version = version
        self.secret = secret
        self.header = _HEADER.pack(_FORMAT_DERIVED, version)
        self.item_row = fields(_KIND_APP_ITEM, app_id.encode(), _number(version))
        self.stream_key_row = fields(_KIND_STREAM_KEY, app_id.encode(), _number(version))

    def seal(self, plain: bytes, row: bytes, item: bytes) -> bytes:
        """Encrypt under a key of its own, derived from 12 random bytes, with a nonce of 12 more.

        An app key serves all users and streams of an app for years, so 2^32 boxes with random nonces are within
        reach. With 192 random bits per box the bound is 2^80. The construction is that of XAES-256-GCM (C2SP), with
        HMAC instead of CMAC in the derivation because Python has it in one call.
        """
        random = os.urandom(_SALT_BYTES + NONCE_BYTES)
        sealed = self._derived(random[:_SALT_BYTES]).encrypt(random[_SALT_BYTES:], plain, associated_data(row, item))
        return self.header + random + sealed

    def open(self, box: bytes, row: bytes, item: bytes) -> bytes:
        if box[: _HEADER.size] == self.header and len(box) >= APP_BOX_OVERHEAD_BYTES:
            try:
                return self._derived(box[_HEADER.size : _SALT_END]).decrypt(
                    box[_SALT_END:_DERIVED_NONCE_END], box[_DERIVED_NONCE_END:], associated_data(row, item)
                )
            except InvalidTag:
                pass
        raise Tampered(f"app {self.app_id}, item {item!r}: does not open under app key {self.version}")

    def _derived(self, salt: bytes) -> AESGCM:
        return AESGCM(hmac.digest(self.secret, _DERIVE_BOX_KEY + salt + _DERIVE_BOX_KEY_END, "sha256"))


class AppCipher:
    """Seals an app's own rows (profiles, signing secrets, settings) and computes its fingerprints.

    One per app for as long as the app is loaded; it follows rotations, and after `Keyring.forget_app` it refuses.
    """

    __slots__ = ("_app_id", "_current", "_fingerprint_key", "_index_secret", "_keys")

    def __init__(self, app_id: str) -> None:
        self._app_id = app_id
        # Replaced whole and never changed in place: readers in other threads take no lock.
        self._keys: dict[int, _DataKey] = {}
        self._current: _DataKey | None = None
        self._index_secret: bytes | None = None
        self._fingerprint_key: bytes | None = None

    @property
    def key_version(self) -> int:
        """The app key version that `seal` uses. Raises `AppKeyNotLoaded`."""
        return self._current_key().version

    def seal(self, plain: bytes, item: bytes) -> bytes:
        """Encrypt `plain` for the row `item`, which names it within the app (kind and id, for instance).

        Uses the newest loaded app key. The box is `APP_BOX_OVERHEAD_BYTES` longer than `plain`.
        """
        key = self._current_key()
        return key.seal(plain, key.item_row, item)

    def open(self, box: bytes, item: bytes) -> bytes:
        """Give back what was sealed for `item`, under whichever app key version the box names.

        Raises `Tampered`, or `AppKeyNotLoaded` when the box names a version that is not loaded.
        """
        key = self._key_of(box, item)
        return key.open(box, key.item_row, item)

    def reseal(self, box: bytes, item: bytes) -> bytes:
        """Move a box to the newest app key; gives back the same object if it is there already."""
        key = self._key_of(box, item)
        if key is self._current_key():
            return box
        return self.seal(key.open(box, key.item_row, item), item)

    def fingerprint(self, value: bytes) -> bytes:
        """A keyed digest of 32 bytes: equal values give equal digests, and without the key no guess can be checked.

        For digests at rest of what may be short, such as the request body behind a client key. The same for the
        whole life of the app. HMAC-SHA256: keyed BLAKE2b would save 0.8 µs, but is on no list that a regulated
        team's auditor accepts (FIPS 198-1 is). Raises `AppKeyNotLoaded`.
        """
        if self._fingerprint_key is None:
            raise AppKeyNotLoaded(self._app_id, KeyPurpose.INDEX, None)
        return hmac.digest(self._fingerprint_key, value, "sha256")

    # For the keyring

    def _load(self, purpose: KeyPurpose, version: int, secret: bytes) -> None:
        """Called under the keyring's lock."""
        held = self._secret(purpose, version)
        if held is not None:
            if not hmac.compare_digest(held, secret):
                raise CryptoError(f"app {self._app_id} already has another {purpose} key with version {version}")
            return
        if purpose is KeyPurpose.INDEX:
            self._index_secret = secret
            derive = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=_DERIVE_FINGERPRINT_KEY)
            self._fingerprint_key = derive.derive(secret)
        else:
            self._keys = {**self._keys, version: _DataKey(self._app_id, version, secret)}
            self._current = self._keys[max(self._keys)]

    def _secret(self, purpose: KeyPurpose, version: int) -> bytes | None:
        if purpose is KeyPurpose.INDEX:
            return self._index_secret
        key = self._keys.get(version)
        return None if key is None else key.secret

    def _forget(self) -> None:
        self._current = None
        self._keys = {}
        self._fingerprint_key = None
        self._index_secret = None

    def _current_key(self) -> _DataKey:
        key = self._current
        if key is None:
            raise AppKeyNotLoaded(self._app_id, KeyPurpose.DATA, None)
        return key

    def _key(self, version: int) -> _DataKey:
        key = self._keys.get(version)
        if key is None:
            raise AppKeyNotLoaded(self._app_id, KeyPurpose.DATA, version)
        return key

    def _key_of(self, box: bytes, item: bytes) -> _DataKey:
        if len(box) < APP_BOX_OVERHEAD_BYTES:
            raise Tampered(f"app {self._app_id}, item {item!r}: the box is cut short")
        form, version = _HEADER.unpack_from(box)
        if form != _FORMAT_DERIVED:
            raise Tampered(f"app {self._app_id}, item {item!r}: unknown box format {form}")
        return self._key(version)


class Keyring:
    """All unwrapped keys of one server process."""

    def __init__(self, root: RootKeyProvider, *, stream_ciphers_max: int = STREAM_CIPHERS_MAX) -> None:
        """`stream_ciphers_max` bounds the stream ciphers kept in memory, in entries, at least 2."""
        if stream_ciphers_max < 2:
            raise ValueError("stream_ciphers_max must be at least 2")
        self._root = root
        self._apps: dict[str, AppCipher] = {}
        # Least recently used, by generations: hits come from the young one without a lock or a write; when it is
        # full it becomes the old one, and whatever the old one held that nobody asked for since is dropped at once.
        self._young: dict[tuple[str, str], StreamCipher] = {}
        self._old: dict[tuple[str, str], StreamCipher] = {}
        self._generation_max = stream_ciphers_max // 2
        self._lock = threading.Lock()  # guards every write to the four above and to the app ciphers; no I/O under it

    # App keys

    def new_app_key(self, app_id: str) -> WrappedKey:
        """Make the app's next data key: version 1 for a new app, else one above the highest that is loaded.

        It is not used before `load_app_key`: store it first, so that nothing is sealed by a key that was never saved.
        The store's uniqueness of (app, purpose, version) settles who wins when two processes rotate at once.
        """
        app = self._apps.get(app_id)
        highest = 0 if app is None else max(app._keys, default=0)
        return self._new_key(app_id, KeyPurpose.DATA, highest + 1)

    def new_index_key(self, app_id: str) -> WrappedKey:
        """Make the app's index key, once, together with the app. Store it, then `load_app_key`.

        Raises `CryptoError` if the app has one: another would change every fingerprint.
        """
        app = self._apps.get(app_id)
        if app is not None and app._index_secret is not None:
            raise CryptoError(f"app {app_id} has an index key, and it must stay the same")
        return self._new_key(app_id, KeyPurpose.INDEX, 1)

    def load_app_key(self, app_id: str, wrapped: WrappedKey) -> None:
        """Unwrap and keep one of the app's keys; the highest data version becomes the one that seals.

        Loading it again changes nothing. Raises `RootKeyMissing`, `Tampered`, or `CryptoError` when another key is
        loaded under the same version.
        """
        secret = self._unwrap_app_key(app_id, wrapped)
        with self._lock:
            app = self._apps.get(app_id) or AppCipher(app_id)
            app._load(wrapped.purpose, wrapped.version, secret)
            self._apps[app_id] = app

    def rewrap_app_key(self, app_id: str, wrapped: WrappedKey) -> WrappedKey:
        """The same key under the current root key; gives back the same object if it is there already."""
        if wrapped.root_kid == self._root.current_kid:
            return wrapped
        return self._wrap_app_key(app_id, wrapped.purpose, wrapped.version, self._unwrap_app_key(app_id, wrapped))

    def check_root_key(self, kid: str) -> None:
        """Refuse to store what was wrapped by a root key that has been retired meanwhile. Raises `RootKeyMissing`.

        Called in the transaction that stores an app's key: retiring happens under the same lock.
        """
        if kid not in self._root.kids():
            raise RootKeyMissing(kid, f"root key {kid} was retired at this moment: try again")

    def forget_app(self, app_id: str) -> None:
        """Drop all keys of an app from memory. Its `AppCipher` refuses from now on."""
        with self._lock:
            app = self._apps.pop(app_id, None)
            if app is not None:
                app._forget()
            self._young = {name: cipher for name, cipher in self._young.items() if name[0] != app_id}
            self._old = {name: cipher for name, cipher in self._old.items() if name[0] != app_id}

    def app_cipher(self, app_id: str) -> AppCipher:
        """The app's own cipher. Raises `AppKeyNotLoaded`."""
        app = self._apps.get(app_id)
        if app is None:
            raise AppKeyNotLoaded(app_id, KeyPurpose.DATA, None)
        return app

    # Stream keys

    def new_stream_key(self, app_id: str, stream_ref: str, *, version: int = 1) -> WrappedStreamKey:
        """Make a key for a stream under the newest app key. Raises `AppKeyNotLoaded`.

        `stream_ref` names the stream for ever, for example its row id as text: it is bound into every box.
        """
        _check_version(version)
        key = self.app_cipher(app_id)._current_key()
        return _wrap_stream_key(key, stream_ref, version, os.urandom(KEY_BYTES))

    def cipher(self, app_id: str, stream_ref: str, wrapped: WrappedStreamKey) -> StreamCipher:
        """The cipher for a stream's stored key, from memory if it was used lately.

        Raises `AppKeyNotLoaded` (its `version` says which to load) or `Tampered`.
        """
        name = (app_id, stream_ref)
        cipher = self._young.get(name)
        # Compared with the stored key, not only by name: a stream that was deleted and made again has another one,
        # and sealing with the old would write rows that nobody can open.
        if cipher is not None and cipher.wrapped == wrapped:
            return cipher
        return self._cipher_of_old_or_unwrapped(name, wrapped)

    def forget_stream(self, app_id: str, stream_ref: str) -> None:
        """Drop a stream's key from memory: the last step of shredding it, after its stored key is deleted."""
        with self._lock:
            self._young.pop((app_id, stream_ref), None)
            self._old.pop((app_id, stream_ref), None)

    def rewrap_stream_key(self, app_id: str, stream_ref: str, wrapped: WrappedStreamKey) -> WrappedStreamKey:
        """The same key under the newest app key; gives back the same object if it is there already."""
        app = self.app_cipher(app_id)
        current = app._current_key()
        if wrapped.app_key_version == current.version:
            return wrapped
        return _wrap_stream_key(current, stream_ref, wrapped.version, _unwrap_stream_key(app, stream_ref, wrapped))

    # Inside

    def _cipher_of_old_or_unwrapped(self, name: tuple[str, str], wrapped: WrappedStreamKey) -> StreamCipher:
        app_id, stream_ref = name
        with self._lock:
            cipher = self._old.pop(name, None)
            if cipher is None or cipher.wrapped != wrapped:
                secret = _unwrap_stream_key(self.app_cipher(app_id), stream_ref, wrapped)
                cipher = StreamCipher(app_id, stream_ref, wrapped, secret)
            if len(self._young) >= self._generation_max:
                self._old = self._young
                self._young = {}
            self._young[name] = cipher
            return cipher

    def _new_key(self, app_id: str, purpose: KeyPurpose, version: int) -> WrappedKey:
        _check_version(version)
        return self._wrap_app_key(app_id, purpose, version, os.urandom(KEY_BYTES))

    def _wrap_app_key(self, app_id: str, purpose: KeyPurpose, version: int, secret: bytes) -> WrappedKey:
        sealed = self._root.wrap(secret, _app_key_identity(app_id, purpose, version))
        return WrappedKey(purpose=purpose, version=version, root_kid=sealed.kid, wrapped=sealed.box)

    def _unwrap_app_key(self, app_id: str, wrapped: WrappedKey) -> bytes:
        _check_version(wrapped.version)
        sealed = Wrapped(kid=wrapped.root_kid, box=wrapped.wrapped)
        return self._root.unwrap(sealed, _app_key_identity(app_id, wrapped.purpose, wrapped.version))


def _app_key_identity(app_id: str, purpose: KeyPurpose, version: int) -> bytes:
    return associated_data(fields(_KIND_APP_KEY, app_id.encode(), purpose.encode()), _number(version))


def _wrap_stream_key(key: _DataKey, stream_ref: str, version: int, secret: bytes) -> WrappedStreamKey:
    box = key.seal(secret, key.stream_key_row, fields(stream_ref.encode(), _number(version)))
    return WrappedStreamKey(version=version, app_key_version=key.version, wrapped=box)


def _unwrap_stream_key(app: AppCipher, stream_ref: str, wrapped: WrappedStreamKey) -> bytes:
    _check_version(wrapped.version)
    key = app._key(wrapped.app_key_version)
    return key.open(wrapped.wrapped, key.stream_key_row, fields(stream_ref.encode(), _number(wrapped.version)))
