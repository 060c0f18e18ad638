"""What traces tell: the way of a message from the socket to the sockets; and that they cost nothing when off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.ops.conftest import Place, furnish, send
from tidings.client import Client, MessageCreated
from tidings.server import tracing
from tidings.server.app import Server, open_core
from tidings.server.bus.base import Notice, Published
from tidings.server.bus.local import LocalBus
from tidings.server.config import Config
from tidings.server.errors import StoreUnavailable
from tidings.server.gateway.hub import Hub
from tidings.server.services.founding import NewApp
from tidings.server.store.base import Store, Tx
from tidings.server.tracing import HeardBus, TracedBus, TracedStore, Tracing
from tidings.testing.process import ServerProcess

from .world import Node, RecordingPeer, backend_actor

CANARY = "canary-b41c"


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def made(memory: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return Tracing(provider.get_tracer("tidings"))


@pytest.fixture
async def node(tmp_path: Path, made: Tracing, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """A whole node with tracing on: Alice and Bob in `c`."""
    monkeypatch.setattr(tracing, "start_tracing", lambda node: made)
    config = Config(data_dir=tmp_path / "data", port=0, tracing=True)
    async with open_core(config) as core:
        new = await core.services.admin.create_app("Test", "app_test")
        server = Server(config, core)
        app = await core.services.apps.get("app_test")
        clock: Any = core.services.clock
        node = Node(core, server.gateway, clock, config, backend_actor(app, "k1"), "app_test", new.api_key)
        await node.users("alice", "bob")
        await node.channel("c", "alice", "bob")
        yield node
        await server.gateway.drain(0)


def named(memory: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [span for span in memory.get_finished_spans() if span.name == name]
    return found


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


async def test_the_way_of_a_message_is_one_trace(node: Node, memory: InMemorySpanExporter) -> None:
    alice, bob = await node.connect("alice"), await node.connect("bob")
    # The first send loads what has to be known.
    await alice.ask("message.send", channel="c", key="k0", text="first")
    memory.clear()
    await alice.ask("message.send", channel="c", key="k1", text=CANARY)
    await bob.got("c", await node.head("c"))
    names = ["socket message.send", "store append", "bus publish", "hub deliver"]
    chain = [named(memory, name) for name in names]
    assert [parent(span) for span in chain[1:]] == [span.context.span_id for span in chain[:-1] if span.context]
    assert len({span.context.trace_id for span in chain if span.context}) == 1
    about = dict(chain[0].attributes or {})
    assert (about["tidings.user"], about["tidings.channel"]) == ("alice", "c")
    assert dict(chain[3].attributes or {})["tidings.seq"] == await node.head("c")
    assert CANARY not in "".join(span.to_json() for span in memory.get_finished_spans())


async def test_a_command_that_waits_and_a_catch_up_have_spans(node: Node, memory: InMemorySpanExporter) -> None:
    alice: RecordingPeer = await node.connect("alice")
    await alice.ask("history", channel="c")
    await alice.ask("sync", positions={"c": {"seq": 0}})
    await alice.until(lambda: alice.of("synced"))
    await alice.until(lambda: any(span.name == "socket catch-up" for span in memory.get_finished_spans()))
    assert named(memory, "socket connect").attributes
    history = named(memory, "socket history")
    reads = [span for span in memory.get_finished_spans() if span.name == "store read"]
    assert history.context
    assert history.context.span_id in {parent(span) for span in reads}


async def test_a_refusal_is_no_failure_and_a_failure_does_not_quote(
    made: Tracing, memory: InMemorySpanExporter
) -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        async def read(self, unit: object) -> None:
            raise self.error

    async def unit(tx: Tx) -> None:
        return None

    for error in (StoreUnavailable("away"), ValueError(CANARY)):
        broken: Any = Broken(error)
        store: Store = TracedStore(broken, made.tracer)  # type: ignore[assignment]
        with pytest.raises(type(error)):
            await store.read(unit)
    refused, failed = memory.get_finished_spans()
    assert dict(refused.attributes or {})["tidings.refused"] == "unavailable"
    assert (refused.status.status_code, failed.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert dict(failed.attributes or {})["error.type"] == "ValueError"
    assert CANARY not in failed.to_json()


async def test_a_trace_goes_on_on_another_node(made: Tracing, memory: InMemorySpanExporter) -> None:
    here, there = LocalBus(), LocalBus()
    carried: list[Notice] = []
    here.listen(carried.append)
    TracedBus(here, made.tracer).publish(Published(7, 3, b"{}"))
    hub = Hub(asyncio.get_running_loop())
    HeardBus(there, made.tracer).listen(hub.notice)
    # As it comes over a network.
    there.publish(msgspec.msgpack.decode(msgspec.msgpack.encode(carried[0]), type=Notice))
    assert hub.recent_head(7) == 3
    publish, deliver = named(memory, "bus publish"), named(memory, "hub deliver")
    assert publish.context
    assert parent(deliver) == publish.context.span_id


class Collector(BaseHTTPRequestHandler):
    """An OpenTelemetry collector that keeps what it is sent."""

    received: list[bytes]

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    received: list[bytes] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Kept", (Collector,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def test_a_real_server_hands_its_traces_to_a_collector_without_content(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with open_core(Config(data_dir=data)) as core:
        new: NewApp = await core.services.admin.create_app("Clinic", "app_clinic")
    with collector() as (address, received):
        environment = {"TIDINGS_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": address}
        async with ServerProcess(data, environment=environment) as server:
            place = Place(data, new, server)
            await furnish(place)
            async with place.rest() as rest:
                token = (await rest.users.token("bob")).token
            async with Client(server.url, token=token, device="d", start="all") as chat, place.rest("alice") as rest:
                await send(rest, CANARY, "k1")
                await chat.channel("c1").send(CANARY)
                seen = 0
                async with asyncio.timeout(30):
                    async for event in chat.events("c1"):
                        seen += isinstance(event, MessageCreated)
                        if seen == 2:
                            break
            # What has collected is handed over at the end.
            assert await server.terminate() == 0
            assert "error" not in server.stderr_path.read_text().partition('{"at"')[2]
    whole = b"".join(received)
    for secret in (CANARY, token, new.api_key):
        assert secret.encode() not in whole
    spans = {}
    for body in received:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            assert any(pair.key == "service.name" for pair in resource.resource.attributes)
            spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert {"socket message.send", "store append", "bus publish", "hub deliver", "socket connect"} <= set(spans)
    assert "POST /v1/channels/{channel}/messages" in spans


def test_switched_off_it_is_not_even_loaded() -> None:
    code = (
        "import sys, tidings.server.app, tidings.server.commands.serve;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry') or name.endswith('tracing')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_its_libraries_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None;"
        f"sys.argv = ['tidings', 'serve', '--port', '0', '--data-dir', {str(tmp_path / 'data')!r}];"
        "from tidings.server.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"TIDINGS_TRACING": "true"}
    )
    assert (done.returncode, "pip install 'tidings[otel]'" in done.stderr) == (1, True), done.stderr
