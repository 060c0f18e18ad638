"""`Client` and `Rest` without `await`, for scripts and backends that are not asynchronous.

A thread of its own runs the event loop. Every method is made from the asynchronous one by `_wait` or `_iterate`, which
keep its arguments and its answer's type, so that there is nothing to keep in step but the list of names (and a test
keeps that).
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from . import rest as rest_module
from . import rest_notifying as notifying
from .channel import Channel
from .client import Client
from .errors import Closed, Timeout
from .events import Event
from .outbox import Outgoing, Sent
from .rest import Rest
from .subscriptions import QUEUE_MAX, Events

P = ParamSpec("P")
T = TypeVar("T")
N = TypeVar("N")


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tidings-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it. An interrupted wait cancels it."""
        if not self._thread.is_alive():
            work.close()
            raise Closed("this was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], T]) -> T:
        """Call a plain function on the loop's thread."""

        async def work() -> T:
            return function()

        return self.run(work())

    def post(self, function: Callable[[], object]) -> None:
        """Call a plain function on the loop's thread, some time soon."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # Closed: there is nothing left to be told.

    def stop(self) -> None:
        """End the loop and its thread; harmless when it has ended."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class Blocking(Generic[N]):
    """Something asynchronous and the thread it lives in."""

    def __init__(self, wrapped: N, thread: LoopThread) -> None:
        self._wrapped = wrapped
        self._thread = thread


def _wait(
    method: Callable[Concatenate[N, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], T]:
    """The method that waits for its answer."""

    def blocking(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        answer: T = self._thread.run(method(self._wrapped, *args, **kwargs))
        return answer

    functools.update_wrapper(blocking, method)
    return blocking


def _iterate(
    method: Callable[Concatenate[N, P], AsyncIterator[T]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """The method that gives a plain iterator."""

    def blocking(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = method(self._wrapped, *args, **kwargs)
        end = object()

        async def following() -> Any:
            return await anext(items, end)

        while (item := self._thread.run(following())) is not end:
            yield item

    functools.update_wrapper(blocking, method)
    return blocking


# ---------------------------------------------------------------- Rest


class SyncApp(Blocking[rest_module.AppRest]):
    get = _wait(rest_module.AppRest.get)
    update = _wait(rest_module.AppRest.update)
    keys = _iterate(rest_module.AppRest.keys)
    create_key = _wait(rest_module.AppRest.create_key)
    revoke_key = _wait(rest_module.AppRest.revoke_key)
    signing_keys = _iterate(rest_module.AppRest.signing_keys)
    create_signing_key = _wait(rest_module.AppRest.create_signing_key)
    delete_signing_key = _wait(rest_module.AppRest.delete_signing_key)
    identity_providers = _iterate(rest_module.AppRest.identity_providers)
    create_identity_provider = _wait(rest_module.AppRest.create_identity_provider)
    delete_identity_provider = _wait(rest_module.AppRest.delete_identity_provider)
    roles = _iterate(rest_module.AppRest.roles)
    put_role = _wait(rest_module.AppRest.put_role)
    delete_role = _wait(rest_module.AppRest.delete_role)
    channel_types = _iterate(rest_module.AppRest.channel_types)
    channel_type = _wait(rest_module.AppRest.channel_type)
    put_channel_type = _wait(rest_module.AppRest.put_channel_type)
    delete_channel_type = _wait(rest_module.AppRest.delete_channel_type)
    relations = _iterate(rest_module.AppRest.relations)
    put_relation = _wait(rest_module.AppRest.put_relation)
    delete_relation = _wait(rest_module.AppRest.delete_relation)
    audit = _iterate(rest_module.AppRest.audit)
    jobs = _iterate(rest_module.AppRest.jobs)
    retry_jobs = _wait(rest_module.AppRest.retry_jobs)
    retry_job = _wait(rest_module.AppRest.retry_job)
    drop_job = _wait(rest_module.AppRest.drop_job)


class SyncUsers(Blocking[rest_module.UsersRest]):
    create = _wait(rest_module.UsersRest.create)
    upsert = _wait(rest_module.UsersRest.upsert)
    query = _iterate(rest_module.UsersRest.query)
    get = _wait(rest_module.UsersRest.get)
    update = _wait(rest_module.UsersRest.update)
    delete = _wait(rest_module.UsersRest.delete)
    deactivate = _wait(rest_module.UsersRest.deactivate)
    reactivate = _wait(rest_module.UsersRest.reactivate)
    token = _wait(rest_module.UsersRest.token)
    revoke_tokens = _wait(rest_module.UsersRest.revoke_tokens)
    devices = _iterate(rest_module.UsersRest.devices)
    delete_device = _wait(rest_module.UsersRest.delete_device)


class SyncMe(Blocking[rest_module.MeRest]):
    get = _wait(rest_module.MeRest.get)
    update = _wait(rest_module.MeRest.update)


class SyncChannels(Blocking[rest_module.ChannelsRest]):
    create = _wait(rest_module.ChannelsRest.create)
    query = _iterate(rest_module.ChannelsRest.query)
    get = _wait(rest_module.ChannelsRest.get)
    update = _wait(rest_module.ChannelsRest.update)
    delete = _wait(rest_module.ChannelsRest.delete)
    set_membership = _wait(rest_module.ChannelsRest.set_membership)
    join = _wait(rest_module.ChannelsRest.join)
    leave = _wait(rest_module.ChannelsRest.leave)


class SyncMembers(Blocking[rest_module.MembersRest]):
    all = _iterate(rest_module.MembersRest.all)
    add = _wait(rest_module.MembersRest.add)
    update = _wait(rest_module.MembersRest.update)
    remove = _wait(rest_module.MembersRest.remove)


class SyncMessages(Blocking[rest_module.MessagesRest]):
    send = _wait(rest_module.MessagesRest.send)
    page = _wait(rest_module.MessagesRest.page)
    history = _iterate(rest_module.MessagesRest.history)
    replies = _iterate(rest_module.MessagesRest.replies)
    get = _wait(rest_module.MessagesRest.get)
    edit = _wait(rest_module.MessagesRest.edit)
    delete = _wait(rest_module.MessagesRest.delete)
    versions = _iterate(rest_module.MessagesRest.versions)
    trace = _wait(rest_module.MessagesRest.trace)
    react = _wait(rest_module.MessagesRest.react)
    unreact = _wait(rest_module.MessagesRest.unreact)


class SyncReceipts(Blocking[rest_module.ReceiptsRest]):
    read = _wait(rest_module.ReceiptsRest.read)
    mark_unread = _wait(rest_module.ReceiptsRest.mark_unread)
    all = _iterate(rest_module.ReceiptsRest.all)
    of_message = _wait(rest_module.ReceiptsRest.of_message)
    unread = _wait(rest_module.ReceiptsRest.unread)


class SyncStreams(Blocking[rest_module.StreamsRest]):
    moved = _wait(rest_module.StreamsRest.moved)
    events = _wait(rest_module.StreamsRest.events)
    own_events = _wait(rest_module.StreamsRest.own_events)


class SyncNotifications(Blocking[notifying.NotificationsRest]):
    tokens = _iterate(notifying.NotificationsRest.tokens)
    put_token = _wait(notifying.NotificationsRest.put_token)
    remove_token = _wait(notifying.NotificationsRest.remove_token)
    get = _wait(notifying.NotificationsRest.get)
    put = _wait(notifying.NotificationsRest.put)
    get_channel = _wait(notifying.NotificationsRest.get_channel)
    put_channel = _wait(notifying.NotificationsRest.put_channel)


class SyncPush(Blocking[notifying.PushRest]):
    providers = _iterate(notifying.PushRest.providers)
    put_provider = _wait(notifying.PushRest.put_provider)
    delete_provider = _wait(notifying.PushRest.delete_provider)
    webpush_key = _wait(notifying.PushRest.webpush_key)
    test = _wait(notifying.PushRest.test)


class SyncWebhooks(Blocking[notifying.WebhooksRest]):
    all = _iterate(notifying.WebhooksRest.all)
    get = _wait(notifying.WebhooksRest.get)
    create = _wait(notifying.WebhooksRest.create)
    update = _wait(notifying.WebhooksRest.update)
    delete = _wait(notifying.WebhooksRest.delete)
    rotate = _wait(notifying.WebhooksRest.rotate)
    test = _wait(notifying.WebhooksRest.test)
    deliveries = _iterate(notifying.WebhooksRest.deliveries)
    delivery = _wait(notifying.WebhooksRest.delivery)
    replay = _wait(notifying.WebhooksRest.replay)


class SyncRest:
    """`Rest` without `await`; give it what Rest takes."""

    def __init__(self, url: str, **options: Any) -> None:
        self._set_up(Rest(url, **options), LoopThread())

    def _set_up(self, wrapped: Rest, thread: LoopThread) -> None:
        self._wrapped = wrapped
        self._thread = thread
        self.app = SyncApp(wrapped.app, thread)
        self.users = SyncUsers(wrapped.users, thread)
        self.me = SyncMe(wrapped.me, thread)
        self.channels = SyncChannels(wrapped.channels, thread)
        self.members = SyncMembers(wrapped.members, thread)
        self.messages = SyncMessages(wrapped.messages, thread)
        self.receipts = SyncReceipts(wrapped.receipts, thread)
        self.streams = SyncStreams(wrapped.streams, thread)
        self.notifications = SyncNotifications(wrapped.notifications, thread)
        self.push = SyncPush(wrapped.push, thread)
        self.webhooks = SyncWebhooks(wrapped.webhooks, thread)

    request = _wait(Rest.request)

    def as_user(self, user: str) -> SyncRest:
        """The same connection, acting for this user (needs an API key)."""
        other = object.__new__(SyncRest)
        other._set_up(self._wrapped.as_user(user), self._thread)
        return other

    def close(self) -> None:
        """Give the connections back and end the thread."""
        self._thread.run(self._wrapped.close())
        self._thread.stop()

    def __enter__(self) -> SyncRest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------- Client


class SyncChannel(Blocking[Channel]):
    """`Channel` without `await`."""

    @property
    def id(self) -> str:
        """The channel's id."""
        return self._wrapped.id

    def send(self, text: str = "", **options: Any) -> Sent:
        """See Channel.send; waits for the server's answer."""
        return self._thread.run(self._wrapped.send(text, **options, wait=True))

    def put(self, text: str = "", **options: Any) -> Outgoing:
        """Put a message into the outbox without waiting for the server."""
        return self._thread.run(self._wrapped.send(text, **options, wait=False))

    edit = _wait(Channel.edit)
    delete = _wait(Channel.delete)
    react = _wait(Channel.react)
    unreact = _wait(Channel.unreact)
    page = _wait(Channel.page)
    history = _iterate(Channel.history)
    read = _wait(Channel.read)
    mark_unread = _wait(Channel.mark_unread)

    def typing(self, on: bool = True) -> None:
        """See Channel.typing."""
        self._thread.call(lambda: self._wrapped.typing(on))

    def events(self, *, queue_size: int = QUEUE_MAX, timeout: float | None = None) -> SyncEvents:
        """The events of this channel; see SyncClient.events."""
        return SyncEvents(self._thread.call(lambda: self._wrapped.events(queue_size=queue_size)), self._thread, timeout)


class SyncEvents:
    """`Events` without `await`: same promises. With `timeout` it ends when nothing came for that many seconds."""

    def __init__(self, events: Events, thread: LoopThread, timeout: float | None) -> None:
        self._events = events
        self._thread = thread
        self._timeout = timeout

    def __iter__(self) -> SyncEvents:
        return self

    def __next__(self) -> Event:
        try:
            event = self._thread.run(self._following(self._timeout))
        except TimeoutError:
            raise StopIteration from None
        if event is None:
            raise StopIteration
        return event

    async def _following(self, timeout: float | None) -> Event | None:
        async with asyncio.timeout(timeout):
            return await anext(self._events, None)

    def next(self, timeout: float | None = None) -> Event:
        """The next event. Raises Timeout after `timeout` seconds, Closed when there will be none."""
        try:
            event = self._thread.run(self._following(timeout))
        except TimeoutError:
            raise Timeout(f"no event within {timeout} s") from None
        if event is None:
            raise Closed("the client was closed")
        return event

    def taken(self) -> None:
        """Acknowledge the event that was given last."""
        self._thread.call(self._events.taken)

    def close(self) -> None:
        """Stop. What was not acknowledged goes to the next iterator."""
        self._thread.run(self._events.aclose())

    def __del__(self) -> None:
        # Let go on the loop's thread: the client's state is only touched there.
        events = self._events
        self._thread.post(events.leave)


class SyncClient:
    """`Client` without `await`; give it what Client takes. A token provider may be a plain function here."""

    def __init__(self, url: str, **options: Any) -> None:
        provider = options.get("token_provider")
        if provider is not None and not asyncio.iscoroutinefunction(provider):

            async def provide() -> str:
                token: str = await asyncio.to_thread(provider)
                return token

            options["token_provider"] = provide
        self._thread = LoopThread()
        try:
            self._wrapped = self._thread.call(lambda: Client(url, **options))
        except BaseException:
            self._thread.stop()
            raise

    wait_connected = _wait(Client.wait_connected)
    flush = _wait(Client.flush)
    heads = _wait(Client.heads)
    watch_presence = _wait(Client.watch_presence)
    set_presence = _wait(Client.set_presence)

    @property
    def state(self) -> str:
        """A word of `State`: connecting, connected, waiting or closed."""
        return self._wrapped.state.value

    @property
    def user(self) -> str | None:
        """The user's id, known from the first connection on."""
        return self._wrapped.user

    @property
    def outbox(self) -> list[Outgoing]:
        """The messages that wait to be sent."""
        return self._thread.call(lambda: list(self._wrapped.outbox))

    def channel(self, id: str) -> SyncChannel:
        """A channel by its id; nothing is asked."""
        return SyncChannel(self._wrapped.channel(id), self._thread)

    def events(self, *channels: str, queue_size: int = QUEUE_MAX, timeout: float | None = None) -> SyncEvents:
        """See Client.events. With `timeout` the iterator ends when nothing came for that many seconds."""
        events = self._thread.call(lambda: self._wrapped.events(*channels, queue_size=queue_size))
        return SyncEvents(events, self._thread, timeout)

    def on(self, kind: type[T], callback: Callable[[T], Any]) -> None:
        """See Client.on. Callbacks run on the loop's thread: they must not call this client."""
        self._thread.call(lambda: self._wrapped.on(kind, callback))

    def position(self, stream: str) -> int | None:
        """See Client.position."""
        return self._thread.call(lambda: self._wrapped.position(stream))

    def open(self) -> SyncClient:
        """See Client.open; `with` does it."""
        self._thread.run(self._wrapped.open())
        return self

    def close(self) -> None:
        """See Client.close; `with` does it."""
        self._thread.run(self._wrapped.close())
        self._thread.stop()

    def __enter__(self) -> SyncClient:
        try:
            return self.open()
        except BaseException:
            self._thread.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
