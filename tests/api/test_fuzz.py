"""S19: whatever is sent, no answer is our fault, and every answer is as the document says."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
import uvicorn
from schemathesis.checks import CHECKS

from tidings.server.config import Config
from tidings.server.rest.factory import all_operations
from tidings.server.rest.openapi import make_openapi
from tidings.server.telemetry import Metrics, setup_logging

from .world import World, open_world

DOCUMENT = make_openapi(all_operations(Config(), Metrics()), url="http://127.0.0.1", body_max=131_072)
schema = schemathesis.openapi.from_dict(DOCUMENT)
NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
CHOSEN = CHECKS.get_by_names(NAMES)
# What would pull the rug: the key that the test itself uses, and the signing key.
KEPT = {"app.revoke_key", "app.retire_signing_key"}
# Some of these are needed in the answers of others.
turn = itertools.count()


class Served:
    """The server on a port of its own, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.server: uvicorn.Server
        self.world: World
        self.url = ""
        self.real: dict[str, str] = {}
        self.failed: BaseException | None = None

    async def _serve(self) -> None:
        try:
            async with open_world(self._path) as world:
                self.world = world
                await world.user("alice")
                await world.user("bob")
                channel = await world.channel("alice", "bob")
                sent = await world.send("alice", channel)
                await world.ok("backend", "PUT", "/v1/app/channel-types/own", {})
                self.real = {
                    "channel": channel,
                    "message": sent["id"],
                    "user": "bob",
                    "type": "own",
                    "level": "channel",
                }
                self.server = uvicorn.Server(
                    uvicorn.Config(world.rest, port=0, lifespan="off", log_config=None, access_log=False, ws="none")
                )
                serving = asyncio.create_task(self.server.serve())
                while not self.server.started and not serving.done():
                    # why: uvicorn has no event for having started; this is the condition's poll
                    await asyncio.sleep(0.01)
                port = self.server.servers[0].sockets[0].getsockname()[1]
                self.url = f"http://127.0.0.1:{port}"
                self._ready.set()
                await serving
        except BaseException as error:
            self.failed = error
            raise
        finally:
            self._ready.set()

    def __enter__(self) -> Served:
        self._thread.start()
        self._ready.wait(30)
        assert self.failed is None
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    setup_logging()
    with Served(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


@schema.parametrize()
@hypothesis.settings(
    # A minute for all operations together on a busy machine.
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_no_answer_is_our_fault_and_every_answer_is_true(case: schemathesis.Case, served: Served) -> None:
    op = case.operation.definition.raw["operationId"]
    number = next(turn)
    # Three in four at what exists: what does not is refused before it is looked at closely.
    if number % 4 and op not in KEPT and isinstance(case.path_parameters, dict):
        case.path_parameters |= {k: v for k, v in served.real.items() if k in case.path_parameters}
        if op in ("users.delete", "users.deactivate", "channels.delete", "messages.delete"):
            case.path_parameters |= {k: "gone" for k in case.path_parameters}
    who: Any = served.world.as_("backend" if number % 2 else "alice")
    headers = {**(dict(case.headers or {}))}
    if number % 3:
        headers.pop("Tidings-User", None)
        headers.pop("tidings-user", None)
    case.headers = headers
    if isinstance(case.query, dict):
        # Waiting is tried elsewhere.
        case.query.pop("wait", None)
    reply = case.call(base_url=served.url, headers=who, timeout=20)
    case.validate_response(reply, checks=CHOSEN)
