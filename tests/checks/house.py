"""A real server process with an app, its users and their devices: what the checks are told through.

async with open_house(tmp_path) as house:
    await house.users("ann", "bob")
    channel = await house.channel("ann", "bob")
    ann = await house.wire("ann")                  # a bare WebSocket that speaks the protocol and no more
    reply = await ann.send(channel, "Good morning")
"""

from __future__ import annotations

import asyncio
import inspect
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jwt
import msgspec

from tests import postgres
from tidings.client import Rest
from tidings.testing.history import LogEvent, body_digest
from tidings.testing.process import SERVE_COMMAND, ServerProcess
from tidings.testing.rawsocket import TEXT, Closed, RawSocket

SOCKET_PATH = "/v1/ws"
# A bound that a check meets only when it wants to.
PLENTY = 1_000_000
ROOMY: Mapping[str, str] = {
    "TIDINGS_REST_RATE_PER_SECOND": str(PLENTY),
    "TIDINGS_REST_BURST": str(PLENTY),
    "TIDINGS_SESSION_RATE_PER_SECOND": str(PLENTY),
    "TIDINGS_SESSION_BURST": str(PLENTY),
    "TIDINGS_CONNECTIONS_PER_ADDRESS": "20000",
}
# What a condition may take on a busy two-core machine before it is called unmet, seconds.
PATIENCE_S = 20.0

_FIRST_APP = re.compile(
    r"^\s*app +(app_\S+)$.*^\s*api key +(tk_\S+)$.*^\s*signing secret +(\S+)$", re.MULTILINE | re.IGNORECASE | re.DOTALL
)


async def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Look again and again until `condition()`, which may have to be awaited, is true. Raises `AssertionError` saying
    what did not come about."""
    deadline = time.monotonic() + timeout_s
    while not (await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline, f"within {timeout_s} s it did not come about that {what}"
        await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition


class Wire:
    """One device on a bare socket: replies by `ref`, events as they come, nothing repeated, nothing sorted out."""

    def __init__(self, raw: RawSocket) -> None:
        self.raw = raw
        self.events: list[dict[str, Any]] = []
        self.frames: list[dict[str, Any]] = []
        self.closed: Closed | None = None
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ref = 0
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, port: int, *, headers: Mapping[str, str | None] | None = None) -> Wire:
        """An upgraded connection that has said nothing yet."""
        raw = await RawSocket.open(port)
        try:
            await raw.handshake(SOCKET_PATH, headers=headers)
        except BaseException:
            raw.abort()
            raise
        wire = cls(raw)
        wire._reader = asyncio.create_task(wire._read(), name="wire")
        return wire

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up without a goodbye."""
        self.raw.abort()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                frame = await self.raw.read_frame(timeout_s=3600)
                if frame.opcode == 0x8:
                    code = int.from_bytes(frame.payload[:2], "big") if len(frame.payload) >= 2 else 1005
                    self.closed = Closed(code, frame.payload[2:].decode())
                    return
                if frame.opcode == TEXT:
                    self._take(msgspec.json.decode(frame.payload))
        except (asyncio.IncompleteReadError, ConnectionError, OSError) as error:
            self.closed = Closed(None, reset=isinstance(error, ConnectionResetError))
        finally:
            if self.closed is None:
                self.closed = Closed(None)
            for future in self._replies.values():
                if not future.done():
                    future.set_exception(ConnectionError(f"closed: {self.closed}"))
                    future.exception()
            self._changed.set()

    def _take(self, frame: dict[str, Any]) -> None:
        self.frames.append(frame)
        if "stream" in frame and "at" in frame:
            self.events.append(frame)
        future = self._replies.pop(frame.get("ref") or -1, None)
        if future is not None and not future.done():
            future.set_result(frame)
        self._changed.set()

    async def post(self, type: str, **fields: Any) -> asyncio.Future[dict[str, Any]]:
        """Send a command; its reply as a future, which fails with ConnectionError when the line is cut first.

        Raises ConnectionError when it was cut before: nobody would read the reply.
        """
        if self.closed is not None:
            raise ConnectionError(f"closed: {self.closed}")
        self._ref += 1
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[self._ref] = future
        await self.raw.send_json({"type": type, "ref": self._ref, **fields})
        return future

    async def ask(self, type: str, **fields: Any) -> dict[str, Any]:
        """Send a command and wait for its reply, be it an `error`."""
        return await asyncio.wait_for(await self.post(type, **fields), PATIENCE_S)

    async def send(self, channel: str, text: str, *, key: str, **fields: Any) -> dict[str, Any]:
        return await self.ask("message.send", channel=channel, text=text, key=key, **fields)

    async def until(self, condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait, frame by frame, until `condition()` is true."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"within {timeout_s} s it did not come about that {what}") from None

    async def until_closed(self, timeout_s: float = PATIENCE_S) -> Closed:
        await self.until(lambda: self.closed is not None, "the server closed the connection", timeout_s)
        assert self.closed is not None
        return self.closed

    def seqs(self, stream: str) -> list[int]:
        """The seqs that came on a stream, in the order in which they came."""
        return [event["seq"] for event in self.events if event["stream"] == stream]

    async def until_seq(self, stream: str, seq: int, timeout_s: float = PATIENCE_S) -> None:
        await self.until(lambda: (self.seqs(stream) or [0])[-1] >= seq, f"{stream} came to {seq}", timeout_s)


class House:
    """One server with its first app. `rest` has the app's key; `rest.as_user(name)` acts for somebody."""

    def __init__(
        self, server: ServerProcess, app: str, api_key: str, secret: str, store_url: str = "", url: str = ""
    ) -> None:
        self.server = server
        # Where clients' connections may go.
        self.ports = [server.port]
        # Of its database, when that is not the file in its folder.
        self.store_url = store_url
        self.app = app
        self.api_key = api_key
        self.secret = secret
        # `url`: when that is not the server's own.
        self.rest = Rest(url or server.url, api_key=api_key)
        self._wires: list[Wire] = []
        self._channels = 0

    @property
    def database(self) -> Path:
        return self.server.data / "tidings.db"

    def token(self, user: str, *, seconds: int = 3600, **claims: Any) -> str:
        """A user's token as the application's own identity system would make it."""
        now = int(time.time())
        said = {"sub": user, "app": self.app, "iat": now, "exp": now + seconds, **claims}
        return jwt.encode({name: value for name, value in said.items() if value is not None}, self.secret, "HS256")

    async def users(self, *names: str) -> None:
        await self.rest.users.upsert([{"id": name} for name in names])

    async def channel(self, *members: str, id: str | None = None, type: str = "group", **fields: Any) -> str:
        """A channel with these members, any number."""
        made = await self.rest.channels.create(id, type=type, members=list(members[:100]), **fields)
        if members[100:]:
            await self.rest.members.add(made.id, list(members[100:]))
        return made.id

    async def wire(
        self,
        user: str,
        *,
        device: str = "d1",
        port: int | None = None,
        token: str | None = None,
        connect: Mapping[str, Any] | None = None,
    ) -> Wire:
        """A connected device; `port` that of a proxy. `connected` is its first frame. Closed with the house."""
        wire = await Wire.open(port or self.server.port)
        self._wires.append(wire)
        fields = {"token": token or self.token(user), "device": {"id": device}, **(connect or {})}
        reply = await wire.ask("connect", **fields)
        assert reply["type"] == "connected", reply
        return wire

    async def hang_up(self) -> None:
        """Close every bare connection that was opened here."""
        wires, self._wires = self._wires, []
        await asyncio.gather(*(wire.close() for wire in wires))

    async def log(self, channel: str) -> tuple[str, list[LogEvent]]:
        """Epoch and events of a channel, all of them, read over REST as the backend."""
        events: list[LogEvent] = []
        after = 0
        while True:
            data = await self.rest.request("GET", f"/v1/channels/{channel}/events?after={after}&limit=200")
            page = msgspec.json.decode(data)
            events += [log_event(event) for event in page["events"]]
            if not page["events"]:
                return page["epoch"], events
            after = page["events"][-1]["seq"]

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask the database directly."""
        if self.store_url:
            return postgres.query(self.store_url, statement, *values)
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(statement, values).fetchall()

    def sid(self, channel: str) -> int:
        """The internal number of a channel's stream."""
        return int(self.sql("SELECT sid FROM streams WHERE kind='channel' AND ref=?", channel)[0][0])

    async def metric(self, name: str) -> float:
        """A metric's value, summed over its labels."""
        text = (await self.rest.request("GET", "/metrics")).decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in found)

    async def close(self) -> None:
        await self.hang_up()
        await self.rest.close()


def log_event(event: Mapping[str, Any]) -> LogEvent:
    """An event as the history checker wants it; `event` as it is on the wire."""
    kind, data = event["type"], event.get("data", {})
    if kind in ("message.created", "message.updated"):
        gone = "deleted_at" in data
        return LogEvent(
            event["seq"],
            kind,
            data["id"],
            data.get("key") or "" if kind == "message.created" else "",
            (data.get("user") or "") if kind == "message.created" else event.get("by") or "",
            "" if gone else body_digest(data.get("text", "")),
        )
    if kind == "message.deleted":
        return LogEvent(event["seq"], kind, data["id"], sender=event.get("by") or "")
    if kind in ("reaction.added", "reaction.removed"):
        return LogEvent(event["seq"], kind, data["message_id"], sender=data["user"], digest=body_digest(data["emoji"]))
    if kind in ("member.added", "member.removed"):
        return LogEvent(event["seq"], kind, user=data["user"])
    return LogEvent(event["seq"], kind)


def assert_gapless(seqs: Sequence[int], first: int, last: int, what: str = "the stream") -> None:
    """These are exactly first..last, each once, in order."""
    expected = list(range(first, last + 1))
    if list(seqs) != expected:
        place = next((n for n, (a, b) in enumerate(zip(seqs, expected, strict=False)) if a != b), min(len(seqs), last))
        raise AssertionError(
            f"{what}: {len(seqs)} events instead of {len(expected)}; differs from place {place} on: "
            f"{list(seqs)[max(0, place - 2) : place + 5]}"
        )


async def gather_all(work: Iterable[Any]) -> list[Any]:
    return list(await asyncio.gather(*work))


async def first_app(server: ServerProcess) -> tuple[str, str, str]:
    """The id, API key and signing secret that a server shows at its first start."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := _FIRST_APP.search(server.stderr_path.read_text())):
        assert time.monotonic() < deadline, f"the server did not introduce its first app\n{server.tail()}"
        await asyncio.sleep(0.01)  # why: the pace of a loop that looks at a condition
    return found[1], found[2], found[3]


@asynccontextmanager
async def open_house(folder: Path, *, command: Sequence[str] = SERVE_COMMAND, **settings: str) -> AsyncIterator[House]:
    """Start a server on a fresh data folder; `settings` are environment variables added to `ROOMY`."""
    store = await postgres.server_environment()
    environment = {**ROOMY, "TIDINGS_LOG_FORMAT": "json", **store, **settings}
    async with ServerProcess(folder / "data", command=command, environment=environment) as server:
        found = await first_app(server)
        house = House(server, *found, store_url=store.get("TIDINGS_STORE", ""))
        try:
            yield house
        finally:
            await house.close()
