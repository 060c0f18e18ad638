"""Messages: send, read, edit, delete, react."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from msgspec import Meta

from tidings.server.errors import Refusal
from tidings.server.services.messages import Draft, Edit
from tidings.wire import limits
from tidings.wire.codec import encode
from tidings.wire.ids import Emoji, Seq, UserId, time_of
from tidings.wire.replies import Changed, HistoryPage, Page, SentMessage
from tidings.wire.requests import MessageEdit, MessageSend, ReactionAdd
from tidings.wire.resources import Message, MessageVersion
from tidings.wire.trace import MessageTrace

from .operation import JSON_TYPE, Call, Operation, PageSize, Paging, Query, Reply, json_reply, operation

_KEY: Final = re.compile(rf"^[\x21-\x7e]{{1,{limits.KEY_LENGTH_MAX}}}\Z")
_CHANNEL: Final = "/v1/channels/{channel}/messages"
_MESSAGE: Final = "/v1/channels/{channel}/messages/{message}"


class InFlight:
    """Sends under way, by (app, sender, channel, key). A second one with the same key is told to come back."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: set[tuple[int, str | None, str, str]] = set()

    def enter(self, one: tuple[int, str | None, str, str]) -> None:
        """Raises Refusal `in_flight`."""
        if one in self._keys:
            raise Refusal(
                "in_flight", "A request with this key is still being processed.", field="key", retry_after_ms=100
            )
        self._keys.add(one)

    def leave(self, one: tuple[int, str | None, str, str]) -> None:
        """The send has an outcome."""
        self._keys.discard(one)


def key_of(call: Call[Any, MessageSend]) -> str | None:
    """The sender's key, from the header or the body. Raises Refusal if they differ or the header is not a key."""
    header = call.header(b"idempotency-key")
    in_body = call.body.key
    if header is None:
        return in_body
    # A structured-field string in quotes by the draft (draft-ietf-httpapi-idempotency-key-header), bare in the wild.
    if len(header) >= 2 and header[0] == header[-1] == '"':
        header = header[1:-1]
    if not _KEY.match(header):
        raise Refusal(
            "invalid_field",
            f"A key is 1-{limits.KEY_LENGTH_MAX} printable ASCII characters without spaces.",
            field="Idempotency-Key",
            bound=limits.KEY_LENGTH_MAX,
        )
    if in_body is not None and in_body != header:
        raise Refusal("invalid_field", "`key` and the header Idempotency-Key differ.", field="key")
    return header


def send_operation(in_flight: InFlight) -> Operation:
    """The send, with its own set of sends under way."""

    @operation(
        "messages.send",
        "POST",
        _CHANNEL,
        "Send a message",
        reply=SentMessage,
        status=201,
        also={200: "The key was used before with the same body: the first result again"},
        body=MessageSend,
        problems=("key_reused", "in_flight", "frozen", "feature_off", "bound_exceeded"),
        request_headers={
            "Idempotency-Key": "The sender's key for this message, instead of `key` in the body. Unique per sender and"
            " channel for ever: repeating the request stores nothing new."
        },
        reply_headers={"Idempotency-Replayed": "`true` when this is the first result again"},
    )
    async def send(call: Call[None, MessageSend]) -> Reply:
        """Stored when answered. Give a key, in the header `Idempotency-Key` or as `key`: then the request can be
        repeated after a timeout and the message is stored once. Without one the server makes a key and the request is
        not safe to repeat. `kind: system` is for those with `message.system`."""
        actor, body, channel = call.actor, call.body, call.path["channel"]
        draft = Draft(
            text=body.text,
            mentions=body.mentions,
            mention_all=body.mention_all,
            reply_to=body.reply_to,
            attachments=body.attachments,
            custom=body.custom,
            silent=body.silent,
            kind=body.kind,
        )
        key = key_of(call)
        if key is None:
            key = call.services.ids.new_id("k_")
        one = (actor.app.app, actor.user, channel, key)
        in_flight.enter(one)
        try:
            sent = await call.services.messages.send(actor, channel, draft, key)
        finally:
            in_flight.leave(one)
        reply = SentMessage(
            id=sent.message_id,
            channel=channel,
            seq=sent.seq,
            at=time_of(sent.at),
            key=key,
            duplicate=sent.duplicate,
        )
        if sent.duplicate:
            return json_reply(200, reply, (b"idempotency-replayed", b"true"))
        return json_reply(201, reply)

    return send


class HistoryQuery(Query, frozen=True, kw_only=True):
    before: Annotated[Seq, Meta(description="Messages with a smaller seq")] | None = None
    after: Annotated[Seq, Meta(description="Messages with a larger seq")] | None = None
    around: Annotated[Seq, Meta(description="Messages on both sides of this seq")] | None = None
    limit: PageSize = limits.PAGE_DEFAULT


@operation("messages.list", "GET", _CHANNEL, "Read history", reply=HistoryPage, query=HistoryQuery)
async def history(call: Call[HistoryQuery, None]) -> Reply:
    """Messages in ascending order: the latest ones, or those before, after or around a seq (give one of the three)."""
    return await _history(call)


@operation(
    "messages.replies",
    "GET",
    _MESSAGE + "/replies",
    "Read the replies to a message",
    reply=HistoryPage,
    query=HistoryQuery,
)
async def replies(call: Call[HistoryQuery, None]) -> Reply:
    """A thread, in ascending order: the latest replies, or those before, after or around a seq (give one of the three;
    `after=0` begins with the first). A deleted reply is a tombstone. `head` is the channel's, as in its history."""
    return await _history(call, call.path["message"])


async def _history(call: Call[HistoryQuery, None], replies_to: str | None = None) -> Reply:
    query = call.query
    page = await call.services.messages.history(
        call.actor,
        call.path["channel"],
        before=query.before,
        after=query.after,
        around=query.around,
        limit=query.limit,
        replies_to=replies_to,
    )
    # The messages are encoded already.
    body = b'{"messages":[%b],"epoch":%b,"head":%d,"has_before":%b,"has_after":%b}' % (
        b",".join(page.messages),
        encode(page.epoch),
        page.head,
        encode(page.has_before),
        encode(page.has_after),
    )
    return Reply(200, body)


@operation("messages.get", "GET", _MESSAGE, "Read one message", reply=Message)
async def get(call: Call[None, None]) -> Reply:
    """A deleted message is a tombstone: its place without its content."""
    return Reply(200, await call.services.messages.one(call.actor, call.path["channel"], call.path["message"]))


@operation(
    "messages.edit",
    "PATCH",
    _MESSAGE,
    "Edit a message",
    reply=Message,
    body=MessageEdit,
    problems=("conflict", "frozen", "feature_off", "bound_exceeded"),
)
async def edit(call: Call[None, MessageEdit]) -> Reply:
    """Fields that are left out stay as they are. Earlier versions are kept."""
    body = call.body
    _, message = await call.services.messages.edit(
        call.actor,
        call.path["channel"],
        call.path["message"],
        Edit(text=body.text, mentions=body.mentions, attachments=body.attachments, custom=body.custom),
    )
    return Reply(200, message, [JSON_TYPE])


class DeleteQuery(Query, frozen=True, kw_only=True):
    hard: Annotated[bool, Meta(description="Destroy content and earlier versions; needs `message.delete_hard`")] = False


@operation("messages.delete", "DELETE", _MESSAGE, "Delete a message", reply=Changed, query=DeleteQuery)
async def delete(call: Call[DeleteQuery, None]) -> Changed:
    """Leaves a tombstone. Deleting again changes nothing."""
    seq = await call.services.messages.delete(
        call.actor, call.path["channel"], call.path["message"], hard=call.query.hard
    )
    return Changed(seq=seq)


@operation("messages.versions", "GET", _MESSAGE + "/versions", "Read a message's versions", reply=Page[MessageVersion])
async def versions(call: Call[None, None]) -> Page[MessageVersion]:
    """The original first. For the author until the message is deleted, and for those with `message.versions`."""
    return Page(await call.services.messages.versions(call.actor, call.path["channel"], call.path["message"]))


@operation(
    "messages.react",
    "POST",
    _MESSAGE + "/reactions",
    "Add a reaction",
    reply=Changed,
    body=ReactionAdd,
    problems=("conflict", "feature_off", "bound_exceeded"),
)
async def react(call: Call[None, ReactionAdd]) -> Changed:
    """One per user, message and emoji: adding it again changes nothing."""
    seq = await call.services.messages.react(
        call.actor, call.path["channel"], call.path["message"], call.body.emoji, add=True
    )
    return Changed(seq=seq)


@operation(
    "messages.unreact",
    "DELETE",
    _MESSAGE + "/reactions/{emoji}",
    "Take a reaction back",
    reply=Changed,
    problems=("conflict", "feature_off", "invalid_field"),
)
async def unreact(call: Call[None, None]) -> Changed:
    """The caller's own. The emoji is percent-encoded in the address; one with a slash in it goes into the query of the
    address above instead."""
    seq = await call.services.messages.react(
        call.actor, call.path["channel"], call.path["message"], call.path["emoji"], add=False
    )
    return Changed(seq=seq)


class UnreactQuery(Query, frozen=True, kw_only=True):
    emoji: Emoji


@operation(
    "messages.unreact_any",
    "DELETE",
    _MESSAGE + "/reactions",
    "Take a reaction back, whatever its name",
    reply=Changed,
    query=UnreactQuery,
    problems=("conflict", "feature_off", "invalid_field"),
)
async def unreact_any(call: Call[UnreactQuery, None]) -> Changed:
    """The caller's own. Names with a slash in them cannot stand in an address: proxies and routers take it apart."""
    seq = await call.services.messages.react(
        call.actor, call.path["channel"], call.path["message"], call.query.emoji, add=False
    )
    return Changed(seq=seq)


class TraceQuery(Paging, frozen=True, kw_only=True):
    user: Annotated[UserId, Meta(description="Only this member")] | None = None


@operation("messages.trace", "GET", _MESSAGE + "/trace", "Trace a message", reply=MessageTrace, query=TraceQuery)
async def trace(call: Call[TraceQuery, None]) -> MessageTrace:
    """What became of it: which devices have it, which pushes left or did not and why, what webhooks answered. For those
    with `trace.read`, who need not be able to read it; nothing that was said is shown."""
    query = call.query
    return await call.services.trace.message(
        call.actor, call.path["message"], call.path["channel"], user=query.user, limit=query.limit, cursor=query.cursor
    )


OPERATIONS: Final = (history, get, replies, edit, delete, versions, react, unreact, unreact_any, trace)
