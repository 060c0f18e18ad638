"""What the stubs have in common: a script of answers, a record of what arrived, and a small HTTP/1.1 server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

# For every token that has no answer of its own.
EVERY = "*"


@dataclass(frozen=True)
class Answer:
    """`body`: sent as JSON. `cut`: the connection ends without an answer. `seconds`: thinks about it first.

    `hold`: waits until the stub's `gate` is set.
    """

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    hold: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Received:
    """One push that was well-formed: for whom, what, and with which headers (lower-case names)."""

    token: str
    payload: Any
    headers: Mapping[str, str]
    at: float


class PushStub:
    """A provider on loopback, as an async context manager.

    `record`: a file that gets a line of JSON for each push. `script`: a file `{token or "*": {"status": …, …}}` that is
    read at each push, for a stub in another process. `now`: the time that signatures are judged by.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        now: Callable[[], float] = time.time,
        record: Path | None = None,
        script: Path | None = None,
    ) -> None:
        self.port = port
        self.now = now
        self.received: list[Received] = []
        # What was refused before an answer was looked up: the protocol was not kept.
        self.faults: list[str] = []
        self.connections = 0
        self.gate = asyncio.Event()
        self._answers: dict[str, Answer] = {}
        self._next: dict[str, deque[Answer]] = defaultdict(deque)
        self._record = record
        self._script = script
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """Where the provider's API begins, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, token: str, answer: Answer | None) -> None:
        """From now on `token` gets this answer; None: a good one again."""
        if answer is None:
            self._answers.pop(token, None)
        else:
            self._answers[token] = answer

    def answer_next(self, token: str, *answers: Answer) -> None:
        """The next pushes to `token` get these, one each; then as before."""
        self._next[token].extend(answers)

    def tokens(self) -> list[str]:
        """The tokens that were sent to, in order."""
        return [one.token for one in self.received]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port after a stop."""
        self._server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut every connection and listen no longer."""
        self.gate.set()
        if self._server is not None:
            self._server.close()
            self.cut_all()
            await self._server.wait_closed()

    def cut_all(self) -> None:
        """End every connection, in the middle of whatever it does."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of HTTP/1.1, kept alive."""
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while True:
                line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {}
                for text in fields:
                    name, colon, value = text.partition(":")
                    if colon:
                        headers[name.strip().lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, path, _ = line.split(" ")
                answer = await self.handle(method, path, headers, body)
                if answer.cut:
                    break
                content = b"" if answer.body is None else json.dumps(answer.body).encode()
                head = [f"HTTP/1.1 {answer.status} Status", f"content-length: {len(content)}"]
                head += [f"{name}: {value}" for name, value in answer.headers.items()]
                writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + content)
                await writer.drain()
        self._writers.discard(writer)
        writer.transport.abort()

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """The answer to one request. The provider's own part."""
        raise NotImplementedError  # why: each stub has its own

    def fault(self, why: str, answer: Answer) -> Answer:
        """`answer`, with a note of why."""
        self.faults.append(why)
        return answer

    async def accept(self, token: str, payload: Any, headers: Mapping[str, str], good: Answer) -> Answer:
        """Keep a well-formed push, and give the answer that is due: `good` unless a test said otherwise."""
        received = Received(token, payload, dict(headers), self.now())
        self.received.append(received)
        if self._record is not None:
            with self._record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"token": token, "payload": payload, "headers": dict(headers)}) + "\n")
        answer = self._due(token) or good
        if answer.hold:
            await self.gate.wait()
        if answer.seconds:
            await asyncio.sleep(answer.seconds)
        return answer

    def _due(self, token: str) -> Answer | None:
        for key in (token, EVERY):
            if self._next[key]:
                return self._next[key].popleft()
        script: dict[str, Any] = {}
        if self._script is not None and self._script.exists():
            script = json.loads(self._script.read_text(encoding="utf-8"))
        for key in (token, EVERY):
            if key in self._answers:
                return self._answers[key]
            if key in script:
                return Answer(**script[key])
        return None
