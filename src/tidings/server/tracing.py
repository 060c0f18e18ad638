"""OpenTelemetry spans, put around the ports when the setting `tracing` is on: gateway, append, bus, hub.

With the setting off nothing of this is loaded, and no code on a message's way knows of it. With it on, the store, the
bus and the gateway are wrapped here: a message's trace has

    socket message.send        from the decision to the answer (over REST: the request)
      store append             queue, commit, fsync
        bus publish            telling everyone
          hub deliver          on each node that hears of it, this one included

and every command that has to be waited for, every catch-up, every unit of the store has a span too. On other nodes
`hub deliver` belongs to the same trace where the bus carries `Published.trace`.

Spans carry identifiers, as logs do, never content: exceptions are told by their type.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Final, TypeVar, cast

import msgspec

from tidings.server.bus.base import Bus, Notice, Published
from tidings.server.errors import Refusal, TidingsError
from tidings.server.gateway.connection import Connection
from tidings.server.gateway.gateway import Gateway
from tidings.server.services import Services
from tidings.server.services.access import Actor
from tidings.server.services.messages import Draft, Messages
from tidings.server.store.base import Append, Appended, Store, Unit
from tidings.wire.commands import AnyCommand, Connect

try:
    from opentelemetry import trace
    from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as missing:
    raise TidingsError("tracing needs its libraries: pip install 'tidings[otel]'") from missing

T = TypeVar("T")
ASGI = Callable[[Any, Any, Any], Awaitable[None]]

# What is not with the collector by then, at the end of a server, is lost; milliseconds.
FLUSH_MS: Final = 2_000

_traceparent: Final = TraceContextTextMapPropagator()


class Tracing:
    """The tracer of this process and what it is put around."""

    def __init__(self, tracer: Tracer, flush: Callable[[int], bool] | None = None) -> None:
        self.tracer = tracer
        self._flush = flush

    def store(self, store: Store) -> Store:
        """The store with a span around each append and unit."""
        # The adapter's own methods, beyond the port, are still there.
        return cast(Store, TracedStore(store, self.tracer))

    def bus(self, bus: Bus) -> Bus:
        """The bus with a span around each event that is published."""
        return cast(Bus, TracedBus(bus, self.tracer))

    def gateway(self, services: Services, bus: Bus, *arguments: Any) -> Gateway:
        """A gateway with a span around each command. The arguments are those of `Gateway`."""
        return TracedGateway(self.tracer, services, bus, *arguments)

    def rest(self, app: ASGI) -> ASGI:
        """The REST application with a span around each request."""
        return TracedRest(app, self.tracer)

    async def close(self) -> None:
        """Hand over what has collected."""
        if self._flush is not None:
            await asyncio.to_thread(self._flush, FLUSH_MS)


def start_tracing(node: str = "") -> Tracing:
    """Use the provider that the process has installed, or install one that exports over OTLP.

    Where to, and how many, say the variables that OpenTelemetry defines: `OTEL_EXPORTER_OTLP_ENDPOINT`,
    `OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`. Raises TidingsError when there is no SDK.
    """
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as missing:
            raise TidingsError("tracing needs its libraries: pip install 'tidings[otel]'") from missing
        about: dict[str, str] = {"service.version": version("tidings")}
        if "OTEL_SERVICE_NAME" not in os.environ:
            about["service.name"] = "tidings"
        if node:
            about["service.instance.id"] = node
        # Not at the interpreter's exit: a collector that is away would hold it up for as long as its time-out.
        made = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(made)
        provider = made
    return Tracing(provider.get_tracer("tidings"), getattr(provider, "force_flush", None))


@contextmanager
def _span(tracer: Tracer, name: str, kind: SpanKind = SpanKind.INTERNAL, **about: str | int) -> Iterator[Span]:
    """A span around the block, the current one in it. What is raised marks it, without its text."""
    with tracer.start_as_current_span(
        name, kind=kind, attributes=_named(about), record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except Exception as error:
            _fail(span, error)
            raise


def _named(about: dict[str, str | int]) -> dict[str, str | int]:
    return {f"tidings.{name}": value for name, value in about.items()}


@contextmanager
def _under(span: Span) -> Iterator[None]:
    """The span is the current one in the block, and goes on after it."""
    with trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        yield


def _fail(span: Span, error: Exception) -> None:
    if isinstance(error, Refusal):
        # An answer like any other: the server has not failed.
        span.set_attribute("tidings.refused", error.code)
    else:
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR)


class TracedStore:
    """The `Store` port around another one. What lies beyond the port is the other's."""

    def __init__(self, store: Store, tracer: Tracer) -> None:
        self._store = store
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, item: Append) -> None:
        span = self._tracer.start_span(
            "store append", attributes={"tidings.stream": item.sid, "tidings.message": item.message_id}
        )
        done = item.done

        def told(outcome: Appended | Exception) -> None:
            if isinstance(outcome, Exception):
                _fail(span, outcome)
            else:
                span.set_attribute("tidings.seq", outcome.seq)
            # The append is over; what follows from it is under it all the same.
            span.end()
            with _under(span):
                done(outcome)

        item.done = told
        self._store.append(item)

    async def run(self, unit: Unit[T], then: Callable[[T], None] | None = None) -> T:
        with _span(self._tracer, "store run", unit=unit.__qualname__) as span:

            def announced(result: T) -> None:
                assert then is not None
                with _under(span):
                    then(result)

            return await self._store.run(unit, announced if then is not None else None)

    async def read(self, unit: Unit[T]) -> T:
        with _span(self._tracer, "store read", unit=unit.__qualname__):
            return await self._store.read(unit)


class TracedBus:
    """The `Bus` port around another one: events of streams that are published have spans, hints do not."""

    def __init__(self, bus: Bus, tracer: Tracer) -> None:
        self._bus = bus
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def publish(self, notice: Notice) -> None:
        if type(notice) is not Published:
            self._bus.publish(notice)
            return
        with _span(self._tracer, "bus publish", SpanKind.PRODUCER, stream=notice.sid, seq=notice.seq):
            carrier: dict[str, str] = {}
            _traceparent.inject(carrier)
            self._bus.publish(msgspec.structs.replace(notice, trace=carrier.get("traceparent", "")))

    def listen(self, listener: Callable[[Any], None], *kinds: type[Notice]) -> None:
        self._bus.listen(listener, *kinds)


class HeardBus:
    """The `Bus` port as the hub hears it: with a span around each event."""

    def __init__(self, bus: Bus, tracer: Tracer) -> None:
        self._bus = bus
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def publish(self, notice: Notice) -> None:
        self._bus.publish(notice)

    def listen(self, listener: Callable[[Any], None], *kinds: type[Notice]) -> None:
        if kinds and Published not in kinds:
            self._bus.listen(listener, *kinds)
            return

        def heard(notice: Notice) -> None:
            if type(notice) is not Published:
                listener(notice)
                return
            # From another node: this node was not in the middle of anything that it belongs to.
            parent = None
            if notice.trace and not trace.get_current_span().get_span_context().is_valid:
                parent = _traceparent.extract({"traceparent": notice.trace})
            span = self._tracer.start_span(
                "hub deliver",
                parent,
                SpanKind.CONSUMER,
                attributes={"tidings.stream": notice.sid, "tidings.seq": notice.seq},
            )
            try:
                with _under(span):
                    listener(notice)
            finally:
                span.end()

        self._bus.listen(heard, *kinds)


class TracedMessages:
    """`Messages` for sockets, whose sends are decided from memory and answered later."""

    def __init__(self, messages: Messages, tracer: Tracer) -> None:
        self._messages = messages
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._messages, name)

    def send_now(
        self,
        actor: Actor,
        channel_id: str,
        draft: Draft,
        key: str,
        done: Callable[[Appended | Exception], None],
        version: int = 0,
    ) -> int:
        span = self._tracer.start_span(
            "socket message.send",
            kind=SpanKind.SERVER,
            attributes={"tidings.app": actor.app.id, "tidings.user": actor.user or "", "tidings.channel": channel_id},
        )

        def answered(outcome: Appended | Exception) -> None:
            if isinstance(outcome, Exception):
                _fail(span, outcome)
            done(outcome)
            span.end()

        decided = 0
        try:
            with _under(span):
                decided = self._messages.send_now(actor, channel_id, draft, key, answered, version)
        finally:
            if not decided:
                span.set_attribute("tidings.decided", "later")
                span.end()
        return decided


class TracedGateway(Gateway):
    """The gateway with a span around each command and each catch-up."""

    def __init__(self, tracer: Tracer, services: Services, bus: Bus, *arguments: Any) -> None:
        super().__init__(services, cast(Bus, HeardBus(bus, tracer)), *arguments)
        self._tracer = tracer
        self.messages = cast(Messages, TracedMessages(self.messages, tracer))

    async def connect(self, connection: Connection, command: Connect) -> None:
        with _span(self._tracer, "socket connect", SpanKind.SERVER, session=connection.id) as span:
            await super().connect(connection, command)
            span.set_attribute("tidings.user", connection.user)

    async def dispatch(self, connection: Connection, actor: Actor, command: AnyCommand) -> bytes | None:
        with _span(
            self._tracer,
            f"socket {command.__struct_config__.tag}",
            SpanKind.SERVER,
            session=connection.id,
            app=actor.app.id,
            user=actor.user or "",
        ):
            return await super().dispatch(connection, actor, command)

    async def catch_up(self, connection: Connection) -> None:
        with _span(self._tracer, "socket catch-up", session=connection.id, streams=len(connection.behind)):
            await super().catch_up(connection)


class TracedRest:
    """An ASGI application around another one. The caller's own trace is linked, not continued: otherwise whoever asks
    would decide what this server records."""

    def __init__(self, app: ASGI, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        links = []
        for name, value in scope["headers"]:
            if name == b"traceparent":
                theirs = trace.get_current_span(_traceparent.extract({"traceparent": value.decode("latin-1")}))
                links = [Link(theirs.get_span_context())]
        method: str = scope["method"]
        with self._tracer.start_as_current_span(
            method, kind=SpanKind.SERVER, links=links, record_exception=False, set_status_on_exception=False
        ) as span:

            async def reply(message: Any) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, reply)
            finally:
                # Known once the router has looked; never the path itself, which holds identifiers without end.
                route = scope.get("path_template")
                span.set_attribute("http.request.method", method)
                if route:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
