"""Public keys of identity providers, fetched from their JWKS URLs and kept.

A token with an unknown key id is the only thing that makes us fetch, and anybody can send one. So a source is asked at
most once per interval, whatever arrives; everybody who waits for it waits for the same fetch; and what we had stays in
use while the provider is down, up to a bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tidings.server.services.signing import (
    ALGORITHM_BY_HEADER,
    ASYMMETRIC_ALGORITHMS,
    JwksSource,
    VerificationKey,
    key_from_jwk,
)
from tidings.server.strict_json import NotStrictJson, parse_object

# A provider that rotates publishes the new key well before it signs with it; half a minute is soon enough for one
# that does not, and 2,880 requests a day offend nobody.
FETCH_INTERVAL_SECONDS: Final = 30.0
FETCH_TOTAL_SECONDS: Final = 5.0
# A day of outage at the identity provider should not end every conversation; longer, and a withdrawn key would live on.
STALE_SECONDS_MAX: Final = 86_400.0
# Large providers publish fewer than ten keys, about 2 KiB each with certificate chains.
BODY_BYTES_MAX: Final = 256 * 1024
KEYS_MAX: Final = 64
KID_CHARS_MAX: Final = 128
# One entry per configured URL; the least recently asked is forgotten (and fetched again when needed).
SOURCES_MAX: Final = 1024


class SourceStatus(msgspec.Struct, frozen=True):
    """How a source is doing, for `tidings doctor` and metrics. Ages are in seconds; None means never."""

    keys: int
    fetched_ago: float | None
    attempted_ago: float | None
    last_error: str | None


class _Source:
    __slots__ = ("attempted_at", "documents", "error", "fetched_at", "keys", "task")

    def __init__(self) -> None:
        self.keys: dict[tuple[str, str], VerificationKey] = {}
        self.documents: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.fetched_at: float | None = None
        self.attempted_at: float | None = None
        self.error: str | None = None
        self.task: asyncio.Task[None] | None = None


if TYPE_CHECKING:
    from tidings.server.outbound import GuardedClient


def _load_client() -> tuple[Any, Any]:
    import httpx

    from tidings.server import outbound

    return outbound, httpx


class JwksCache:
    """Keys by (source, kid). `find` never waits; `refresh` may.

    `client` may be given as a function that makes it at the first fetch: most apps have no provider, and an HTTP client
    is a third of a second of imports that a start can do without.

    Owns its fetches: `aclose` ends them. `monotonic` gives seconds. Belongs to one event loop.
    """

    def __init__(
        self,
        client: GuardedClient | Callable[[], GuardedClient],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        interval_seconds: float = FETCH_INTERVAL_SECONDS,
        stale_seconds_max: float = STALE_SECONDS_MAX,
    ) -> None:
        self._client = client
        self._monotonic = monotonic
        self._interval_seconds = interval_seconds
        self._stale_seconds_max = stale_seconds_max
        # By URL and not by source: two apps with the same provider share its keys and its interval.
        self._sources: dict[str, _Source] = {}

    def find(self, source: JwksSource, kid: str, algorithm: str) -> VerificationKey | None:
        """The key, if the source has it and vouches for that algorithm. A set past its age is renewed in passing."""
        state = self._sources.get(source.url)
        if state is None or state.fetched_at is None or algorithm not in source.algorithms:
            return None
        age = self._monotonic() - state.fetched_at
        if age > self._stale_seconds_max:
            return None
        if age > source.cache_seconds:
            self._renew(source, state)
        return state.keys.get((kid, algorithm))

    def may_refresh(self, source: JwksSource) -> bool:
        """Whether waiting for `refresh` could bring news: a fetch is running, or the interval has passed."""
        state = self._sources.get(source.url)
        return state is None or state.task is not None or self._rested(state)

    async def refresh(self, source: JwksSource) -> None:
        """Wait for the running fetch, or start one if the interval allows. Never raises for a failing provider.

        A caller that is cancelled leaves the fetch to the others.
        """
        state = self._state(source)
        if state.task is None and self._rested(state):
            self._start(source, state)
        if state.task is not None:
            await asyncio.shield(state.task)

    def status(self, source: JwksSource) -> SourceStatus:
        """How the source is doing, without asking it."""
        state = self._sources.get(source.url)
        if state is None:
            return SourceStatus(0, None, None, None)
        now = self._monotonic()
        return SourceStatus(
            len(state.keys),
            None if state.fetched_at is None else now - state.fetched_at,
            None if state.attempted_at is None else now - state.attempted_at,
            state.error,
        )

    async def aclose(self) -> None:
        """End the running fetches and wait until they have ended. The client is the caller's to close."""
        tasks = [state.task for state in self._sources.values() if state.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _state(self, source: JwksSource) -> _Source:
        state = self._sources.pop(source.url, None)
        if state is None:
            state = _Source()
            while len(self._sources) >= SOURCES_MAX:
                idle = next((url for url, other in self._sources.items() if other.task is None), None)
                if idle is None:
                    break
                del self._sources[idle]
        self._sources[source.url] = state
        return state

    def _rested(self, state: _Source) -> bool:
        return state.attempted_at is None or self._monotonic() - state.attempted_at >= self._interval_seconds

    def _renew(self, source: JwksSource, state: _Source) -> None:
        if state.task is not None or not self._rested(state):
            return
        try:
            self._start(source, state)
        except RuntimeError:  # no running loop (a script that verifies synchronously): what we have must do
            return

    def _start(self, source: JwksSource, state: _Source) -> None:
        loop = asyncio.get_running_loop()
        # Counted from the start and again from the end, so that a fetch that hangs is not followed by another at once.
        state.attempted_at = self._monotonic()
        state.task = loop.create_task(self._fetch(source.url, state), name="jwks-fetch")  # owned by the cache: aclose
        state.task.add_done_callback(lambda task: self._heard(task, state))

    def _heard(self, task: asyncio.Task[None], state: _Source) -> None:
        """A fetch that dies of something else than its provider is a bug: show it where the status is read."""
        if not task.cancelled() and (error := task.exception()) is not None:
            state.error = f"internal: {type(error).__name__}"

    async def _fetch(self, url: str, state: _Source) -> None:
        # Off the loop: the first time, this loads the HTTP client.
        outbound, httpx = await asyncio.to_thread(_load_client)
        if callable(self._client):
            self._client = self._client()
        try:
            reply = await self._client.request(
                "GET",
                url,
                body_bytes_max=BODY_BYTES_MAX,
                headers={"accept": "application/jwk-set+json, application/json"},
                total_seconds=FETCH_TOTAL_SECONDS,
            )
            if reply.status != 200:
                raise ValueError(f"answered with status {reply.status}")
            documents = read_key_set(reply.body)
        except (outbound.OutboundRefused, httpx.HTTPError, OSError, ValueError) as error:
            state.error = str(error) or type(error).__name__
        else:
            keys: dict[tuple[str, str], VerificationKey] = {}
            for name, document in documents.items():
                known = state.keys.get(name)
                # The same object for the same key, so that tokens verified with it need not be verified again.
                if known is not None and state.documents.get(name) == document:
                    keys[name] = known
                else:
                    keys[name] = key_from_jwk(document, kid=name[0], algorithm=name[1])
            state.keys, state.documents = keys, documents
            state.fetched_at = self._monotonic()
            state.error = None
        finally:
            state.attempted_at = self._monotonic()
            state.task = None


def read_key_set(body: bytes) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The usable keys of a JWK set (RFC 7517 5), by kid and algorithm.

    Keys that we cannot use (no kid, symmetric, for encryption, another curve, too short) are left out, as the RFC asks.
    Raises ValueError when the document is no key set, or has more than `KEYS_MAX` keys.
    """
    try:
        members = parse_object(body).get("keys")
    except NotStrictJson as error:
        raise ValueError(f"the key set is not valid: {error}") from None
    if not isinstance(members, list):
        raise ValueError("the key set has no list of keys")
    if len(members) > KEYS_MAX:
        raise ValueError(f"the key set has more than {KEYS_MAX} keys")
    documents: dict[tuple[str, str], Mapping[str, Any]] = {}
    doubled: set[tuple[str, str]] = set()
    for jwk in members:
        if not isinstance(jwk, dict):
            continue
        kid = jwk.get("kid")
        algorithm = _algorithm_of(jwk)
        if not isinstance(kid, str) or not 0 < len(kid) <= KID_CHARS_MAX or algorithm is None:
            continue
        try:
            key_from_jwk(jwk, kid=kid, algorithm=algorithm)
        except ValueError:
            continue
        name = (kid, algorithm)
        if name in documents:
            doubled.add(name)
        documents[name] = jwk
    for name in doubled:  # which of two is meant is not for us to guess
        del documents[name]
    return documents


def _algorithm_of(jwk: Mapping[str, Any]) -> str | None:
    stated = jwk.get("alg")
    if stated is not None:
        algorithm = ALGORITHM_BY_HEADER.get(stated) if isinstance(stated, str) else None
        return algorithm if algorithm in ASYMMETRIC_ALGORITHMS else None
    match jwk.get("kty"):
        case "RSA":
            return "RS256"
        case "EC":
            return "ES256"
        case "OKP":
            return "EdDSA"
        case _:
            return None
