"""How an app's push providers are set up: the JSON of `PUT /v1/push/providers/{id}`.

Secrets are write-only: what is shown has them left out (`without_secrets`), and a change that leaves them out keeps
the ones that are stored (`with_secrets_of`).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from .ids import Url

# A PEM of a 4096-bit RSA key has 3,300 characters.
PEM_CHARS_MAX = 8192
SECRETS_MAX = 2

_Pem = Annotated[str, Meta(max_length=PEM_CHARS_MAX, description="PEM; write-only")]
_Word = Annotated[str, Meta(min_length=1, max_length=256)]
_AppleId = Annotated[str, Meta(pattern=r"^[A-Z0-9]{10}$", examples=["DEF123GHIJ"], description="ten characters")]


class ServiceAccount(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The file that Google's console makes for a service account, as it is. What is not listed here is not kept."""

    project_id: _Word
    client_email: _Word
    private_key: _Pem = ""
    private_key_id: Annotated[str, Meta(max_length=256)] = ""
    token_uri: Url = "https://oauth2.googleapis.com/token"  # noqa: S105  (an address)


class FcmConfig(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    kw_only=True,
    tag_field="kind",
    tag="fcm",
    forbid_unknown_fields=True,
):
    """Firebase Cloud Messaging, HTTP v1: Android, and iOS and browsers through Firebase.

    `endpoint` is for a relay or a test server in place of https://fcm.googleapis.com.
    """

    service_account: ServiceAccount
    endpoint: Url | None = None


class ApnsConfig(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    kw_only=True,
    tag_field="kind",
    tag="apns",
    forbid_unknown_fields=True,
):
    """Apple Push Notification service with a signing key (`.p8`). `topic` is the app's bundle id.

    `endpoint` is for a relay or a test server in place of Apple's, which `environment` chooses.
    """

    team_id: _AppleId
    key_id: _AppleId
    private_key: _Pem = ""
    topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9.\-]{1,255}$", examples=["com.example.clinic"])]
    environment: Literal["production", "sandbox"] = "production"
    endpoint: Url | None = None


class WebPushConfig(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    kw_only=True,
    tag_field="kind",
    tag="webpush",
    forbid_unknown_fields=True,
):
    """Web Push with a VAPID key. `subject` is where a push service can reach the operator: `mailto:` or `https:`.

    `private_key` is the VAPID key, as base64url of its 32 bytes (what most tools print) or PEM. `public_key`
    (`applicationServerKey` in a browser) is worked out from it and may be left out.
    """

    subject: Annotated[str, Meta(pattern=r"^(mailto:[^\s@]+@[^\s@]+|https://\S+)$", max_length=256)]
    private_key: _Pem = ""
    public_key: Annotated[str, Meta(max_length=128)] = ""


class HttpConfig(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    kw_only=True,
    tag_field="kind",
    tag="http",
    forbid_unknown_fields=True,
):
    """Any other way to reach somebody: your own endpoint, which hands on to e-mail, text messages or another service.

    `secrets`: `whsec_` and base64 of 24 to 64 bytes, as in Standard Webhooks; two while one replaces the other.
    """

    url: Url
    secrets: Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=SECRETS_MAX)] = []


PushConfig: TypeAlias = FcmConfig | ApnsConfig | WebPushConfig | HttpConfig


class PushSubscriptionKeys(msgspec.Struct, frozen=True):
    """A browser's public key and shared secret, base64url."""

    p256dh: Annotated[str, Meta(max_length=128)]
    auth: Annotated[str, Meta(max_length=64)]


class PushSubscription(msgspec.Struct, frozen=True, omit_defaults=True):
    """What `JSON.stringify(await registration.pushManager.subscribe(…))` gives: the token of a `webpush` provider."""

    endpoint: Url
    keys: PushSubscriptionKeys


def without_secrets(config: PushConfig) -> PushConfig:
    """The configuration as it may be shown."""
    match config:
        case FcmConfig():
            account = msgspec.structs.replace(config.service_account, private_key="")
            return msgspec.structs.replace(config, service_account=account)
        case ApnsConfig() | WebPushConfig():
            return msgspec.structs.replace(config, private_key="")
        case HttpConfig():
            return msgspec.structs.replace(config, secrets=[])


def with_secrets_of(config: PushConfig, stored: PushConfig) -> PushConfig:
    """`config` with the secrets it leaves out taken from `stored`, where they are of one kind."""
    match config, stored:
        case FcmConfig(), FcmConfig() if not config.service_account.private_key:
            account = msgspec.structs.replace(config.service_account, private_key=stored.service_account.private_key)
            return msgspec.structs.replace(config, service_account=account)
        case ApnsConfig(), ApnsConfig() if not config.private_key:
            return msgspec.structs.replace(config, private_key=stored.private_key)
        case WebPushConfig(), WebPushConfig() if not config.private_key:
            return msgspec.structs.replace(config, private_key=stored.private_key)
        case HttpConfig(), HttpConfig() if not config.secrets:
            return msgspec.structs.replace(config, secrets=stored.secrets)
    return config
