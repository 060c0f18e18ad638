"""One example of everything that is sent or answered, for the OpenAPI document. Typed, so none goes out of date."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, get_args, get_origin

import msgspec

from tidings.wire import notifications, presend, push, replies, requests, resources, trace, webhooks

_AT: Final = datetime(2026, 3, 14, 9, 26, 53, 589_000, UTC)
_LATER: Final = datetime(2026, 3, 14, 10, 0, tzinfo=UTC)
_WEBHOOK: Final = webhooks.Webhook(
    id="wh_7f3k",
    url="https://api.example.com/tidings",
    events=["message.*"],
    status="enabled",
    created_at=_AT,
    updated_at=_AT,
    public_key="whpk_MCowBQYDK2VwAyEA",
)
_DELIVERY: Final = webhooks.WebhookDelivery(
    id="dl_01J9ZQ4T8V6N2R5C7XKDMBWEHY",
    webhook="wh_7f3k",
    message="msg_7f3k",
    type="message.created",
    at=_AT,
    attempt=1,
    outcome="delivered",
    status=204,
    milliseconds=38,
)
_MESSAGE_ID: Final = "m_01J9ZQ4T8V6N2R5C7XKDMBWEHY"
_KEY: Final = "5f0c7c1e-4b1d-4d5e-9f6a-2b8f1d0c9a11"

_ATTACHMENT: Final = resources.Attachment(
    type="image", url="https://files.example.com/scan.png", mime_type="image/png", size=48_213
)
_MESSAGE: Final = resources.Message(
    id=_MESSAGE_ID,
    channel="ch_7f3k",
    seq=7,
    user="alice",
    key=_KEY,
    created_at=_AT,
    text="Good morning, how is the knee today?",
    mentions=["bob"],
    reactions=[resources.Reaction(emoji="👍", count=1, users=["bob"])],
)
_MEMBERSHIP: Final = resources.Membership(role="owner", joined_at=_AT, delivered=7, read=6, unread=1)
_CHANNEL: Final = resources.Channel(
    id="ch_7f3k",
    type="group",
    epoch="e1",
    head=7,
    name="Knee follow-up",
    created_by="alice",
    created_at=_AT,
    updated_at=_AT,
    last_message_at=_AT,
    member_count=2,
    message_count=5,
    membership=_MEMBERSHIP,
)
_UNREAD: Final = resources.Unread(channel="ch_7f3k", unread=1, mentions=0, read=6)

_EXAMPLES: Final[tuple[Any, ...]] = (
    _MESSAGE,
    _CHANNEL,
    _UNREAD,
    resources.UnreadTotal(unread=1, mentions=0, channels=[_UNREAD]),
    resources.MessageVersion(version=1, at=_AT, by="alice", text="Good morning, how is the nee today?"),
    resources.User(
        id="alice", name="Alice Ahmed", role="user", labels={"team": "ortho"}, created_at=_AT, updated_at=_AT
    ),
    resources.Device(id="phone-1", user="alice", platform="ios", created_at=_AT, last_seen_at=_LATER),
    resources.Member(user="bob", role="member", joined_at=_AT, delivered=7, read=7),
    resources.Receipt(user="bob", delivered=7, read=7),
    resources.Head(stream="ch_7f3k", epoch="e1", head=7, read=6, delivered=7, unread=1),
    resources.App(id="app_clinic", name="Clinic", settings=resources.AppSettings(), created_at=_AT),
    resources.ApiKey(id="k7f3m2", name="backend", scopes=["*"], created_at=_AT),
    resources.SigningKeyInfo(kid="s1", algorithm="HS256", status="active", created_at=_AT),
    resources.IdentityProvider(
        id="idp_1", jwks_url="https://id.example.com/.well-known/jwks.json", algorithms=["RS256"], created_at=_AT
    ),
    resources.ReceiptCounts(members=240, delivered=231, read=187, as_of=_AT),
    resources.Role(scope="channel", name="nurse", grants=["channel.read", "message.send"]),
    resources.Relation(kind="panel", user="dr-lee", other="alice"),
    resources.ChannelType(name="consultation", features=resources.ChannelFeatures(reactions=False), members_max=12),
    resources.Token(token="eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl", expires_at=_LATER),  # noqa: S106
    resources.AuditEntry(id="au_1", at=_AT, actor="key:k7f3m2", action="key.created", target="key:k9"),
    resources.Job(
        id="job_42",
        kind="webhook",
        state="dead",
        due_at=_AT,
        attempts=12,
        error="the host name does not resolve",
        created_at=_AT,
        died_at=_LATER,
    ),
    resources.JobsRetried(count=7),
    presend.PresendHook(url="https://api.example.com/moderate", updated_at=_AT),
    presend.PresendHookPut(url="https://api.example.com/moderate", channel_types=["consultation"]),
    presend.PresendTest(text="Call me on 555-0100"),
    presend.PresendTried(outcome="refused", status=200, milliseconds=41, reason="No telephone numbers, please."),
    _WEBHOOK,
    webhooks.WebhookCreate(url="https://api.example.com/tidings", events=["message.*", "member.added"]),
    webhooks.WebhookUpdate(status="enabled"),
    webhooks.WebhookRotate(overlap_hours=24),
    _DELIVERY,
    webhooks.WebhookExchange(
        delivery=_DELIVERY,
        url="https://api.example.com/tidings",
        request_headers={
            "webhook-id": "msg_7f3k",
            "webhook-timestamp": "1773482645",
            "webhook-signature": "v1,K5oZfzN95",
        },
        request_body='{"type":"message.created"}',
        response_headers={"content-length": "0"},
    ),
    webhooks.WebhookReplay(since=_AT),
    webhooks.WebhookReplayed(channels=12),
    notifications.PushToken(user="bob", device="phone-1", provider="apns", created_at=_AT, updated_at=_AT),
    notifications.PushTokenPut(provider="apns", token="740f4707bebcf74f9b7c25d48e335894"),  # noqa: S106
    notifications.NotificationPreferences(
        level="mentions",
        quiet_hours=notifications.QuietHours(start="22:00", end="07:00", timezone="Europe/Berlin"),
        snoozed_until=_LATER,
        language="de-AT",
    ),
    notifications.ChannelNotifications(level="none"),
    notifications.PushProvider(
        id="vapid",
        config=push.WebPushConfig(subject="mailto:ops@example.com", public_key="BNcRdreALRFXTkOOUHK1EtK2wtaz5Ry4YfYCA"),
        status="enabled",
        created_at=_AT,
        updated_at=_AT,
    ),
    notifications.PushProviderPut(config=push.WebPushConfig(subject="mailto:ops@example.com")),
    notifications.PushTest(user="bob", send=True),
    notifications.PushTestResult(
        user="bob",
        devices=[
            notifications.PushTestDevice(
                device="phone-1",
                provider="apns",
                would_wake=False,
                steps=[
                    notifications.PushTestStep(question="Is the user active?", passed=True, answer="yes"),
                    notifications.PushTestStep(question="Have they snoozed?", passed=False, answer="until 12:00"),
                ],
                sent="accepted: ok (200)",
            )
        ],
    ),
    notifications.WebPushKey(provider="vapid", public_key="BNcRdreALRFXTkOOUHK1EtK2wtaz5Ry4YfYCA"),
    trace.MessageTrace(
        message="m_01J9ZQ4T8V6N2R5C7XKDMBWEHY",
        channel="ch_7f3k",
        seq=42,
        sender="alice",
        accepted_at=_AT,
        members=2,
        recipients=[
            trace.TracedRecipient(
                user="bob",
                delivered=False,
                read=False,
                devices=[trace.TracedDevice(id="phone-1", platform="ios", position=41, push_tokens=["apns"])],
                push=[
                    trace.TracedPush(at=_AT, device="phone-1", outcome="accepted", reason="sent", provider="apns"),
                ],
            )
        ],
        webhooks=[
            trace.TracedDelivery(
                webhook="wh_1",
                id="dl_1",
                message="msg_7f3k",
                type="message.created",
                at=_AT,
                attempt=1,
                outcome="delivered",
                status=204,
                milliseconds=38,
            )
        ],
    ),
    requests.JobsRetry(kind="webhook"),
    requests.UserCreate(id="alice", name="Alice Ahmed", labels={"team": "ortho"}),
    requests.UsersUpsert(users=[requests.UserUpsert(id="alice", name="Alice Ahmed"), requests.UserUpsert(id="bob")]),
    requests.UserUpdate(name="Alice A. Ahmed", custom={"pronouns": "she/her"}),
    requests.TokenMint(ttl_seconds=3600),
    requests.TokensRevoke(),
    requests.ChannelCreate(type="group", name="Knee follow-up", members=["bob"]),
    requests.ChannelUpdate(name="Knee follow-up, week 2"),
    requests.MembershipUpdate(muted_until=_LATER),
    requests.MembersAdd(users=["carol"]),
    requests.MemberUpdate(role="moderator"),
    requests.MessageSend(key=_KEY, text="Good morning, how is the knee today?", attachments=[_ATTACHMENT]),
    requests.MessageEdit(text="Good morning, how is the knee?"),
    requests.ReactionAdd(emoji="👍"),
    requests.ReadMark(seq=7),
    requests.AppUpdate(name="Clinic"),
    requests.ApiKeyCreate(name="backend", scopes=["user.act_as", "channel.read", "message.send"]),
    requests.SigningKeyCreate(algorithm="HS256"),
    requests.IdentityProviderCreate(jwks_url="https://id.example.com/.well-known/jwks.json"),
    requests.RolePut(grants=["channel.read", "message.send"]),
    requests.RelationPut(kind="panel", user="dr-lee", other="alice"),
    requests.ChannelTypePut(features=resources.ChannelFeatures(reactions=False), members_max=12),
    replies.SentMessage(id=_MESSAGE_ID, channel="ch_7f3k", seq=7, at=_AT, key=_KEY),
    replies.Changed(seq=8),
    replies.HistoryPage(messages=[_MESSAGE], epoch="e1", head=7, has_before=True, has_after=False),
    replies.EventsPage(
        events=[
            replies.StreamEvent(
                type="message.created",
                stream="ch_7f3k",
                seq=7,
                at=_AT,
                by="alice",
                data=msgspec.to_builtins(_MESSAGE),
            )
        ],
        epoch="e1",
        head=7,
    ),
    replies.SyncPage(
        mark="18f3a2b9c40.6b86b273ff34fce1",
        moved=[resources.Head(stream="ch_7f3k", epoch="e1", head=7, read=6, delivered=7, unread=1)],
    ),
    replies.Health(status="ok"),
)
_BY_TYPE: Final[dict[Any, Any]] = {type(one): one for one in _EXAMPLES}


def example_of(wanted: Any) -> Any:
    """An example of a body, as plain JSON values; a page holds one item. None where the reply is no JSON of ours.

    Raises KeyError for a type without an example.
    """
    if get_origin(wanted) is replies.Page:
        example: Any = replies.Page([_BY_TYPE[get_args(wanted)[0]]])
    elif not isinstance(wanted, type) or not issubclass(wanted, msgspec.Struct):
        return None
    else:
        example = _BY_TYPE[wanted]
    # By way of JSON, which also resolves what is encoded already.
    return msgspec.json.decode(msgspec.json.encode(example))
