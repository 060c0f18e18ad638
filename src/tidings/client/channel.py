"""What can be done in one channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal, overload

from msgspec import UNSET, UnsetType

from ..wire import limits
from ..wire.commands import (
    AddReaction,
    DeleteMessage,
    Done,
    EditMessage,
    History,
    HistoryReply,
    MarkUnread,
    Read,
    ReadReply,
    RemoveReaction,
    Typing,
)
from ..wire.resources import Attachment, Message
from .outbox import Outgoing, Sent
from .subscriptions import QUEUE_MAX, Events

if TYPE_CHECKING:
    from .client import Client

# Readers are shown "typing" for 6 s after each signal: repeating it at half that keeps it alive.
TYPING_SECONDS = 3.0
COMMAND_SECONDS = 10.0


class Channel:
    """A channel by its id. Cheap to make: it holds nothing, and asks nothing until you do.

    Commands raise Refused when the server says no, Timeout when there was no answer (or no connection) within
    `timeout` seconds, OutcomeUnknown when the connection broke and repeating the command could do it twice.
    """

    __slots__ = ("_client", "id")

    def __init__(self, client: Client, id: str) -> None:
        self._client = client
        self.id = id

    # ------------------------------------------------------------ messages

    @overload
    async def send(
        self,
        text: str = "",
        *,
        key: str | None = None,
        reply_to: str | None = None,
        mentions: list[str] | None = None,
        mention_all: bool = False,
        attachments: list[Attachment] | None = None,
        custom: dict[str, Any] | None = None,
        silent: bool = False,
        wait: Literal[True] = True,
        timeout: float | None = None,
    ) -> Sent: ...

    @overload
    async def send(
        self,
        text: str = "",
        *,
        key: str | None = None,
        reply_to: str | None = None,
        mentions: list[str] | None = None,
        mention_all: bool = False,
        attachments: list[Attachment] | None = None,
        custom: dict[str, Any] | None = None,
        silent: bool = False,
        wait: Literal[False],
        timeout: float | None = None,
    ) -> Outgoing: ...

    async def send(
        self,
        text: str = "",
        *,
        key: str | None = None,
        reply_to: str | None = None,
        mentions: list[str] | None = None,
        mention_all: bool = False,
        attachments: list[Attachment] | None = None,
        custom: dict[str, Any] | None = None,
        silent: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Sent | Outgoing:
        """Send a message, once, however often the connection breaks.

        It is stored first (durably, when the client has a store), then sent, in order per channel. With `wait` the
        answer is the server's; without, the `Outgoing` as soon as it is stored. `timeout` (seconds) bounds the waiting,
        not the sending: after Timeout the message stays in the outbox. `key` makes the message recognisable over
        restarts of your own program; one is made up otherwise. Raises Refused, OutboxFull, Timeout, Closed, StoreError.
        """
        outgoing = await self._client._send(
            self.id,
            text=text,
            key=key,
            reply_to=reply_to,
            mentions=mentions or [],
            mention_all=mention_all,
            attachments=attachments or [],
            custom=custom or {},
            silent=silent,
        )
        return await outgoing.sent(timeout) if wait else outgoing

    async def edit(
        self,
        message: str,
        text: str | UnsetType = UNSET,
        *,
        mentions: list[str] | UnsetType = UNSET,
        attachments: list[Attachment] | UnsetType = UNSET,
        custom: dict[str, Any] | UnsetType = UNSET,
        timeout: float = COMMAND_SECONDS,
    ) -> int | None:
        """Change a message by its id; what is left out stays. Answers the seq of the change."""
        command = EditMessage(
            channel=self.id, id=message, text=text, mentions=mentions, attachments=attachments, custom=custom
        )
        return (await self._client._connection.command(command, Done, timeout=timeout, repeatable=False)).seq

    async def delete(self, message: str, *, hard: bool = False, timeout: float = COMMAND_SECONDS) -> int | None:
        """Delete a message by its id. `hard` destroys its content, and needs a permission of its own."""
        command = DeleteMessage(channel=self.id, id=message, hard=hard)
        return (await self._client._connection.command(command, Done, timeout=timeout, repeatable=False)).seq

    async def react(self, message: str, emoji: str, *, timeout: float = COMMAND_SECONDS) -> int | None:
        """Add a reaction. Answers the seq of the change, None when it was there already."""
        command = AddReaction(channel=self.id, id=message, emoji=emoji)
        return (await self._client._connection.command(command, Done, timeout=timeout)).seq

    async def unreact(self, message: str, emoji: str, *, timeout: float = COMMAND_SECONDS) -> int | None:
        """Take a reaction back. Answers the seq of the change, None when there was none."""
        command = RemoveReaction(channel=self.id, id=message, emoji=emoji)
        return (await self._client._connection.command(command, Done, timeout=timeout)).seq

    # ------------------------------------------------------------ reading

    async def page(
        self,
        *,
        before: int | None = None,
        after: int | None = None,
        around: int | None = None,
        limit: int = limits.PAGE_DEFAULT,
        timeout: float = COMMAND_SECONDS,
    ) -> HistoryReply:
        """One page of messages in ascending order: the latest, or those before, after or around a seq.

        The page's `head` and `epoch` tell where the channel stood: events above `head` come through `events()`.
        """
        command = History(channel=self.id, before=before, after=after, around=around, limit=limit)
        reply = await self._client._connection.command(command, HistoryReply, timeout=timeout)
        self._client._following.seen_head(self.id, reply.epoch, reply.head)
        return reply

    async def history(
        self, *, newest_first: bool = True, before: int | None = None, after: int | None = None
    ) -> AsyncIterator[Message]:
        """All messages, page by page as you go: backwards from now (or `before`), or forwards (from `after`)."""
        if newest_first:
            while True:
                page = await self.page(before=before, limit=limits.PAGE_MAX)
                for message in reversed(page.messages):
                    if after is not None and message.seq <= after:
                        return
                    yield message
                if not page.has_before or not page.messages:
                    return
                before = page.messages[0].seq
        else:
            after = after or 0
            while True:
                page = await self.page(after=after, limit=limits.PAGE_MAX)
                for message in page.messages:
                    if before is not None and message.seq >= before:
                        return
                    yield message
                if not page.has_after or not page.messages:
                    return
                after = page.messages[-1].seq

    def events(self, *, queue_size: int = QUEUE_MAX) -> Events:
        """The events of this channel; see Client.events."""
        return self._client.events(self.id, queue_size=queue_size)

    @property
    def position(self) -> int | None:
        """The seq of the last event of this channel that the application has taken; None when it is not followed."""
        return self._client.position(self.id)

    async def read(self, seq: int, *, timeout: float = COMMAND_SECONDS) -> ReadReply:
        """The user has read everything up to `seq`. Answers the counts that remain."""
        return await self._client._connection.command(Read(channel=self.id, seq=seq), ReadReply, timeout=timeout)

    async def mark_unread(self, seq: int, *, timeout: float = COMMAND_SECONDS) -> None:
        """Count everything from the message at `seq` on as unread, until the channel is read again."""
        await self._client._connection.command(MarkUnread(channel=self.id, seq=seq), None, timeout=timeout)

    def typing(self, on: bool = True) -> None:
        """Tell the others that the user is typing, best effort. Call it on every key press: one in 3 s is sent.

        They get a `TypingSignal` with the `user`, or with a `count` in channels of more than 1,000 members.
        """
        self._client._typing(Typing(channel=self.id, on=on))
