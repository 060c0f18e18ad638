"""Cursors: a place in a list, given out to be handed back.

A cursor names the list it belongs to (its filters and order), so that it cannot be used for another, and carries a
keyed digest, so that only what was given out here is taken back.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any, Final, TypeVar

import msgspec

from tidings.server.errors import Refusal

from .apps import AppContext

T = TypeVar("T")

# A guess passes once in 2**96 tries; the cursor stays short.
_MAC_BYTES: Final = 12


def _mac(app: AppContext, listing: Any, place: bytes) -> bytes:
    return app.cipher.fingerprint(b"cursor:" + msgspec.json.encode(listing) + b":" + place)[:_MAC_BYTES]


def make_cursor(app: AppContext, listing: Any, place: list[Any]) -> str:
    """The cursor for a place (the sort key of the last item shown) in a listing (its name, filters and order)."""
    encoded = msgspec.json.encode(place)
    return base64.urlsafe_b64encode(_mac(app, listing, encoded) + encoded).decode().rstrip("=")


def read_cursor(app: AppContext, listing: Any, cursor: str, type: type[T]) -> T:
    """The place that a cursor names. Raises Refusal `cursor_invalid` if it was not given out for this listing."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        place = raw[_MAC_BYTES:]
        if hmac.compare_digest(raw[:_MAC_BYTES], _mac(app, listing, place)):
            return msgspec.json.decode(place, type=type)
    except (binascii.Error, ValueError, msgspec.MsgspecError):
        pass
    raise Refusal("cursor_invalid", "This cursor was not given out here for this list.", field="cursor")
