"""The port for root keys, and what can go wrong in this room.

A root key never leaves its provider: the keyring hands over an app key and gets back a wrapped one. That is all a key
service (AWS KMS, Google Cloud KMS, Vault transit) offers too, so an adapter for one is these six members. Calls are
plain, not async: they happen when an app is created, loaded or rotated, never per message. A provider that waits
for a network is called from a thread.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

# AES-256 throughout: every key at every level is this many random bytes.
KEY_BYTES = 32
# The size for which GCM takes the nonce as it is (NIST SP 800-38D §8.2).
NONCE_BYTES = 12
TAG_BYTES = 16


class CryptoError(Exception):
    """Everything this room raises. None of it is the caller's fault: answered as `internal`, logged with its text.

    The texts name identifiers (app, stream, item, key id, path), never content and never key material.
    """


class Tampered(CryptoError):
    """A box did not open: changed, cut short, moved from another row, or sealed under another key."""


class KeyUnavailable(CryptoError):
    """The box may be sound, but a key that it needs is not here."""


class RootKeyMissing(KeyUnavailable):
    """The provider does not hold the root key `kid`: lost, retired too early, or the wrong key file."""

    def __init__(self, kid: str, detail: str) -> None:
        super().__init__(detail)
        self.kid = kid


class AppKeyNotLoaded(KeyUnavailable):
    """The app key is not in memory: load it with `Keyring.load_app_key` and try again.

    Expected, once, when another process has rotated the app's key. `version` is None where any version would do.
    """

    def __init__(self, app_id: str, purpose: str, version: int | None) -> None:
        which = "no version" if version is None else f"not version {version}"
        super().__init__(f"app {app_id}: {which} of its {purpose} key is loaded")
        self.app_id = app_id
        self.purpose = purpose
        self.version = version


class Wrapped(msgspec.Struct, frozen=True, kw_only=True):
    """A key sealed by the root key `kid`. Safe to store beside the data; useless without the provider."""

    kid: str
    box: bytes


class RootKeyProvider(Protocol):
    """Holds root keys and seals app keys with them. Implementations are safe to call from several threads."""

    @property
    def current_kid(self) -> str:
        """The id of the version that `wrap` uses now, also when another process has just added it."""
        ...

    def kids(self) -> Sequence[str]:
        """The ids of all versions that `unwrap` accepts, oldest first."""
        ...

    def wrap(self, plain: bytes, aad: bytes) -> Wrapped:
        """Seal `plain` under the current version; `aad` must be given again, byte for byte, to `unwrap`.

        In key services `aad` is the encryption context or the additional authenticated data.
        """
        ...

    def unwrap(self, wrapped: Wrapped, aad: bytes) -> bytes:
        """Open what `wrap` sealed.

        Raises `RootKeyMissing` when the version is not held, `Tampered` when box or `aad` differ.
        """
        ...

    def add_version(self) -> str:
        """Make a new version current and return its id; earlier versions keep opening what they sealed."""
        ...


def fields(*parts: bytes) -> bytes:
    """Join with length prefixes, so that no two different lists give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def associated_data(row: bytes, item: bytes) -> bytes:
    """The identity that a box is bound to: every seal and every wrap in this room takes it from here.

    `row` is `fields(kind, app, stream, key version …)`, made once per cipher; `item` is the caller's own part.
    """
    return row + len(item).to_bytes(4, "big") + item
