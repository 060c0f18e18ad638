"""The one catalogue of refusals: code, HTTP status, close code and whether a client may try again.

REST answers with an RFC 9457 problem document, the socket with an `error` frame, both carry the same `code`.
Clients act on `code` and `retry`; `detail` is for people. Close codes 4000-4499 tell a client to come back
(after `retry`'s advice), 4500-4999 tell it not to (the ranges follow Centrifugo's convention).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec


class Retry(StrEnum):
    """What a client may do with a refusal."""

    NEVER = "never"  # The same request will be refused for ever.
    AUTH = "auth"  # Try again with a fresh token.
    LATER = "later"  # Try the very same request again after a pause (`retry_after_ms` if given).
    RESYNC = "resync"  # Start this stream over: read its head, take history from there.


class Problem(msgspec.Struct, frozen=True):
    """One entry of the catalogue. `close` is the WebSocket close code where the refusal ends the connection."""

    code: str
    status: int
    retry: Retry
    title: str
    close: int | None = None


_ENTRIES: Final = (
    # What was sent is wrong.
    Problem("invalid", 400, Retry.NEVER, "The request does not have the right form", 4500),
    Problem("invalid_field", 422, Retry.NEVER, "A field is missing, of the wrong type or out of bounds"),
    Problem("too_large", 413, Retry.NEVER, "The request is larger than allowed", 4509),
    Problem("unsupported_media", 415, Retry.NEVER, "The content type is not supported"),
    Problem("not_found", 404, Retry.NEVER, "No such thing, or not yours to see"),
    Problem("method_not_allowed", 405, Retry.NEVER, "This method is not allowed here"),
    Problem("already_exists", 409, Retry.NEVER, "Something with this identity exists already"),
    Problem("conflict", 409, Retry.NEVER, "The state of the thing does not allow this"),
    Problem("precondition_failed", 412, Retry.NEVER, "The thing has changed since you read it"),
    Problem("key_reused", 422, Retry.NEVER, "This idempotency key was used with another body"),
    Problem("in_flight", 409, Retry.LATER, "A request with this idempotency key is still being processed"),
    Problem("bound_exceeded", 422, Retry.NEVER, "A bound of this app, channel or message is reached"),
    # Who asks.
    Problem("unauthenticated", 401, Retry.AUTH, "Credentials are missing", 4401),
    Problem("token_malformed", 401, Retry.NEVER, "The token cannot be read", 4501),
    Problem("token_too_large", 401, Retry.NEVER, "The token is larger than 8 KiB", 4501),
    Problem("token_algorithm", 401, Retry.NEVER, "The token's algorithm is not allowed for its key", 4501),
    Problem("token_signature", 401, Retry.NEVER, "The token's signature does not verify", 4501),
    Problem("token_key_unknown", 401, Retry.AUTH, "No key of this app verifies the token", 4401),
    Problem("token_claims", 401, Retry.NEVER, "The token's claims are missing or wrong", 4501),
    Problem("token_not_yet_valid", 401, Retry.LATER, "The token is not valid yet", 4401),
    Problem("token_expired", 401, Retry.AUTH, "The token has expired", 4401),
    Problem("token_revoked", 401, Retry.AUTH, "The token was revoked", 4401),
    Problem("key_invalid", 401, Retry.NEVER, "The API key is unknown, revoked or expired", 4501),
    Problem("user_unknown", 401, Retry.NEVER, "The token's user does not exist in this app", 4502),
    Problem("user_deactivated", 403, Retry.NEVER, "The user is deactivated", 4503),
    Problem("forbidden", 403, Retry.NEVER, "A permission is missing"),
    Problem("frozen", 403, Retry.NEVER, "The channel is frozen"),
    Problem("feature_off", 403, Retry.NEVER, "This channel type has the feature switched off"),
    Problem("message_refused", 403, Retry.NEVER, "The app does not let this message through"),
    # When.
    Problem("hook_unavailable", 503, Retry.LATER, "The app could not be asked about the message"),
    Problem("rate_limited", 429, Retry.LATER, "Too many requests", 4429),
    Problem("too_many_connections", 429, Retry.LATER, "Too many connections", 4430),
    Problem("too_many_in_flight", 429, Retry.LATER, "Too many unanswered commands on this connection", 4431),
    Problem("auth_timeout", 401, Retry.AUTH, "The connection did not authenticate in time", 4402),
    Problem("heartbeat_timeout", 408, Retry.LATER, "Nothing was heard from the client for two heartbeats", 4408),
    Problem("request_timeout", 408, Retry.LATER, "The request did not arrive in time"),
    Problem("replaced", 409, Retry.NEVER, "Another connection of the same device took over", 4505),
    Problem("session_unknown", 404, Retry.RESYNC, "The HTTP session has ended: open a new one", 4404),
    # Streams.
    Problem("epoch_changed", 409, Retry.RESYNC, "The stream's history was replaced: start over"),
    Problem("cursor_expired", 410, Retry.RESYNC, "The position is older than the retention: start over"),
    Problem("cursor_invalid", 422, Retry.NEVER, "The cursor was not given out by this server for this use"),
    Problem("position_ahead", 422, Retry.NEVER, "The position is ahead of what was sent"),
    # Us.
    Problem("going_away", 503, Retry.LATER, "The server is restarting", 4000),
    Problem("unavailable", 503, Retry.LATER, "The store cannot take writes at the moment", 4001),
    Problem("internal", 500, Retry.LATER, "Our mistake; it has been logged", 4002),
)

CATALOGUE: Final[dict[str, Problem]] = {entry.code: entry for entry in _ENTRIES}
assert len(CATALOGUE) == len(_ENTRIES), "a code stands twice in the catalogue"


class ProblemDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """RFC 9457 problem document (`application/problem+json`), and the socket's `error` frame minus `ref`.

    `type` is a stable URI reference; `field` names the offending field as a path such as `attachments[2].url`;
    `bound` tells the limit that was hit, in the unit the detail names.
    """

    type: str
    title: str
    status: int
    code: str
    detail: str
    retry: str
    field: str | None = None
    bound: int | None = None
    retry_after_ms: int | None = None
    instance: str | None = None


def problem_document(
    code: str,
    detail: str,
    *,
    field: str | None = None,
    bound: int | None = None,
    retry_after_ms: int | None = None,
) -> ProblemDocument:
    """Make the document for `code`. Raises KeyError when the code is not in the catalogue (a bug)."""
    entry = CATALOGUE[code]
    return ProblemDocument(
        type=f"https://tidings.dev/problems/{code}",
        title=entry.title,
        status=entry.status,
        code=code,
        detail=detail,
        retry=entry.retry.value,
        field=field,
        bound=bound,
        retry_after_ms=retry_after_ms,
    )
