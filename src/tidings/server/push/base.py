"""The port to push providers: what is to be shown, and what became of it.

An adapter speaks one provider's protocol and obeys its error table. It knows neither devices nor preferences, keeps
nothing but short-lived credentials, and never raises: a push is one of many, and its end must not be another's.

Loading this module loads no HTTP client: who decides about pushes need not pay for sending them.
"""

import base64
import hashlib
import unicodedata
from collections.abc import Callable
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from tidings.server.errors import Refusal
from tidings.wire.push import PushConfig

# FCM's registration tokens have about 170 characters, a browser's subscription about 600.
TOKEN_CHARS_MAX: Final = 4096
# FCM keeps a notification for four weeks at the most, and the others do not keep it longer.
TTL_SECONDS_MAX: Final = 28 * 86_400
# Of `apns-collapse-id`, the narrowest but for the Topic of Web Push, which is always a fingerprint.
COLLAPSE_BYTES_MAX: Final = 64
ELLIPSIS: Final = "…"

Kind: TypeAlias = Literal["accepted", "token_dead", "retry", "rejected", "misconfigured", "too_large"]


class Notification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One push to one device. `title` and `body` are ready to be shown; `data` is for the app: identifiers.

    `id`: the same for every attempt, so that a receiver can drop a repetition. `collapse_key`: a later one with the
    same key takes this one's place. `badge`: the number on the app's icon. `link`: what a click opens. `category`: the
    set of buttons (iOS), the channel (Android). `thread`: what the device groups by. `silent`: shows nothing.
    """

    id: str
    title: str = ""
    body: str = ""
    data: dict[str, str] = {}
    badge: int | None = None
    sound: str | None = None
    collapse_key: str | None = None
    priority: Literal["high", "normal"] = "high"
    ttl_seconds: int = 86_400
    silent: bool = False
    link: str | None = None
    category: str | None = None
    thread: str | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the provider made of it.

    - `accepted`: it has taken it; `provider_id` is its name for it. Whether the device shows it, nobody says.
    - `token_dead`: this token will never work again: forget it.
    - `retry`: not now; after `retry_after` seconds if that is said.
    - `rejected`: this notification will not be taken; the token may be well.
    - `misconfigured`: the app's set-up does not fit. No token is to be blamed. `only_token`: as far as this token
      shows; others may work (it was made for another key, project or app).
    - `too_large`: it does not fit, though everything that may be cut was cut.

    `reason` is one word: the provider's own where it has one.
    """

    kind: Kind
    reason: str
    status: int | None = None
    retry_after: float | None = None
    provider_id: str | None = None
    only_token: bool = False


class Provider(Protocol):
    """A provider that an app has set up."""

    async def send(self, token: str, notification: Notification) -> Outcome:
        """Send to one device. Never raises; trouble on the way is a `retry`. Takes a dozen seconds at the most."""
        ...

    async def close(self) -> None:
        """Give up what is held. The HTTP clients are the caller's."""
        ...


class Providers(Protocol):
    """Makes providers from what apps have set up; the one of `push/factory.py`, chosen by app.py."""

    def complete(self, config: PushConfig) -> PushConfig:
        """The configuration with a key made for it where it has none and needs no other's: a VAPID key."""
        ...

    def check(self, config: PushConfig) -> PushConfig:
        """The configuration as it is to be kept. Raises Refusal(invalid_field) that names the field."""
        ...

    def check_token(self, config: PushConfig, token: str) -> None:
        """Raises Refusal(invalid_field) for what cannot be a token of this provider."""
        ...

    def open(self, config: PushConfig) -> Provider:
        """The provider of a configuration that was checked. Holds no connection until it sends.

        Keep it for as long as the configuration stands: it holds access tokens, which providers give out sparingly.
        """
        ...


def refuse_field(field: str, why: str) -> Refusal:
    """The refusal of one field of a configuration. `why` is a sentence, and never shows a secret."""
    return Refusal("invalid_field", why, field=field)


def refuse_token(why: str) -> Refusal:
    """The refusal of a device's token, which is never shown."""
    return Refusal("invalid_field", why, field="token")


def ttl_of(notification: Notification) -> int:
    """Seconds, within what providers take."""
    return min(max(notification.ttl_seconds, 0), TTL_SECONDS_MAX)


def collapse_id(key: str) -> str:
    """`key` as APNs takes it: itself if it fits and may stand in a header, otherwise its fingerprint."""
    if len(key.encode()) <= COLLAPSE_BYTES_MAX and key.isascii() and key.isprintable():
        return key
    return base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


# --- cutting to size ------------------------------------------------------------------------------

_JOINER: Final = "\u200d"
_TRAILERS: Final = frozenset("\u200d\ufe0e\ufe0f\u20e3")


def cut(text: str, characters: int) -> str:
    """The beginning of `text`, at most `characters` code points and an ellipsis, cut where a reader sees a border.

    Not inside a family emoji, between a letter and its accent, or inside a flag: an approximation of UAX #29 that errs
    towards cutting more.
    """
    if len(text) <= characters:
        return text
    end = characters
    while end > 0 and _sticks(text, end):
        end -= 1
    kept = text[:end].rstrip()
    return kept + ELLIPSIS if kept else ""


def _sticks(text: str, at: int) -> bool:
    """Whether the characters before and at `at` are seen as one."""
    before, after = text[at - 1], text[at]
    if after in _TRAILERS or before == _JOINER or unicodedata.combining(after):
        return True
    if unicodedata.category(after) in ("Mn", "Me", "Mc") or 0x1F3FB <= ord(after) <= 0x1F3FF:
        return True
    if 0xE0020 <= ord(after) <= 0xE007F:
        return True
    if _flag_half(before) and _flag_half(after):
        start = at
        while start > 0 and _flag_half(text[start - 1]):
            start -= 1
        return (at - start) % 2 == 1
    return False


def _flag_half(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def fit(notification: Notification, render: Callable[[Notification], bytes], bytes_max: int) -> bytes | None:
    """What `render` makes of it, with as much of the body, then of the title, as fits. None when nothing does.

    `data`, which the app needs, is never cut.
    """
    rendered = render(notification)
    if len(rendered) <= bytes_max:
        return rendered
    for field in ("body", "title"):
        text = getattr(notification, field)
        bare = msgspec.structs.replace(notification, **{field: ""})
        best = render(bare)
        if len(best) > bytes_max:
            notification = bare
            continue
        # Lengths grow with the text, so the longest that fits is found by halving.
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            tried = render(msgspec.structs.replace(notification, **{field: cut(text, middle)}))
            if len(tried) <= bytes_max:
                low, best = middle, tried
            else:
                high = middle - 1
        return best
    return None


def encode_notification(notification: Notification) -> bytes:
    """The notification as JSON: what a service worker and an HTTP provider's endpoint get. Defaults are left out."""
    return msgspec.json.encode(notification)
