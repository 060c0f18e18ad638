"""The server's side of a scenario: a WebSocket server that says what it is told to, and remembers what it heard."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve

CHANNEL, ME = "c1", "@me"
AT = "2026-03-14T09:26:53.589000Z"
LIMITS = {
    "frame_bytes": 131072,
    "text_length": 20000,
    "custom_bytes": 8192,
    "commands_per_second": 50.0,
    "commands_burst": 200,
    "in_flight": 256,
}


class Player:
    """One user, `alice`, in one channel, whose other member is `bob`."""

    def __init__(self) -> None:
        # A quiet one in between, so that there can be three pages.
        self.streams: dict[str, list[dict[str, Any]]] = {ME: [], "c0": [], CHANNEL: []}
        self.epochs = {ME: "mine", "c0": "quiet", CHANNEL: "first"}
        self.heard: list[dict[str, Any]] = []
        self.keys: dict[str, dict[str, Any]] = {}
        self.next_send: dict[str, Any] | None = None
        self.page_size = 1_000
        self.delay = 0.0
        self.port = 0
        self._mark = 1_000
        self._server: Server | None = None
        self._line: ServerConnection | None = None
        # Streams that the line has named since they moved, and so hears live.
        self._out: asyncio.Queue[tuple[ServerConnection, Any]] = asyncio.Queue()

    # ---------------------------------------------------------------- what a scenario asks for

    async def do(self, step: dict[str, Any]) -> None:
        match step["server"]:
            case "append":
                for text in step["texts"]:
                    event = self._message(text, "bob", f"bob-{len(self.streams[CHANNEL])}")
                    if step.get("tell", True):
                        self._say(event)
            case "repeat":
                self._say(self.streams[CHANNEL][step["seq"] - 1])
            case "tell":
                self._say(step["frame"])
            case "cut":
                await self._cut(step.get("code", 1011))
            case "down":
                await self.stop()
            case "up":
                await self.start()
            case "next send":
                self.next_send = step
            case "replace":
                self.epochs[CHANNEL] = step["epoch"]
                self.streams[CHANNEL] = []
                for text in step["texts"]:
                    self._message(text, "bob", text)
            case "remove":
                del self.streams[CHANNEL]
                self._say(self._append(ME, "channel.left", {"channel": CHANNEL, "reason": "removed"}, "bob"))
            case "pages":
                self.page_size = step["size"]
            case "delay":
                self.delay = step["ms"] / 1000
            case other:
                raise ValueError(f"no such step: {other}")

    def of(self, type: str) -> list[dict[str, Any]]:
        return [frame for frame in self.heard if frame["type"] == type]

    def texts(self) -> list[str]:
        return [event["data"]["text"] for event in self.streams[CHANNEL]]

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        self._server = await serve(self._serve, "127.0.0.1", self.port, ping_interval=None)
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close(close_connections=False)
            await self._cut(1011)
            await self._server.wait_closed()
            self._server = None

    async def _cut(self, code: int) -> None:
        line, self._line = self._line, None
        if line is None:
            return
        if code == 1011:
            # As a broken line: without a goodbye.
            line.transport.abort()
        else:
            await line.close(code)

    async def _serve(self, line: ServerConnection) -> None:
        writing = asyncio.create_task(self._write())
        try:
            async for text in line:
                # What is null is left out.
                frame = json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if v is not None})
                self.heard.append(frame)
                self._answer(line, frame)
        except Exception:
            pass
        finally:
            writing.cancel()

    async def _write(self) -> None:
        while True:
            line, frame = await self._out.get()
            await asyncio.sleep(self.delay)  # why: the network of the scenario is slow
            try:
                await line.send(json.dumps(frame))
            except Exception:
                continue

    def _say(self, frame: dict[str, Any]) -> None:
        if self._line is not None:
            self._out.put_nowait((self._line, frame))

    # ---------------------------------------------------------------- the protocol

    def _append(self, stream: str, type: str, data: dict[str, Any], by: str) -> dict[str, Any]:
        log = self.streams[stream]
        seq = len(log) + 1
        event = {"type": type, "stream": stream, "seq": seq, "at": AT, "by": by, "data": data}
        log.append(event)
        return event

    def _message(self, text: str, user: str, key: str) -> dict[str, Any]:
        seq = len(self.streams[CHANNEL]) + 1
        data = {
            "id": f"m_{seq}",
            "channel": CHANNEL,
            "seq": seq,
            "user": user,
            "key": key,
            "created_at": AT,
            "text": text,
        }
        event = self._append(CHANNEL, "message.created", data, user)
        self.keys[key] = event
        return event

    def _heads(self) -> list[dict[str, Any]]:
        return [{"stream": name, "epoch": self.epochs[name], "head": len(log)} for name, log in self.streams.items()]

    def _page(self, start: int) -> dict[str, Any]:
        heads = self._heads()
        page: dict[str, Any] = {"moved": heads[start : start + self.page_size]}
        if start + self.page_size < len(heads):
            page["more"] = str(start + self.page_size)
        return page

    def _answer(self, line: ServerConnection, frame: dict[str, Any]) -> None:
        def reply(**fields: Any) -> None:
            if "ref" in frame or frame["type"] == "connect":
                ref = {"ref": frame["ref"]} if "ref" in frame else {}
                self._out.put_nowait((line, {**ref, **fields}))

        match frame["type"]:
            case "connect":
                self._line = line
                moved = self._page(0) if "since" in frame else {}
                reply(
                    type="connected",
                    session="s_1",
                    user="alice",
                    device=frame["device"]["id"],
                    server_time=AT,
                    mark=str(self._mark),
                    heartbeat_seconds=25,
                    expires_at=None,
                    limits=LIMITS,
                    **moved,
                )
            case "heads":
                reply(type="heads", mark=str(self._mark), **self._page(int(frame.get("cursor", 0))))
            case "sync":
                self._sync(line, frame, reply)
            case "history":
                log = self.streams[CHANNEL]
                reply(
                    type="history",
                    channel=CHANNEL,
                    messages=[event["data"] for event in log],
                    epoch=self.epochs[CHANNEL],
                    head=len(log),
                    has_before=False,
                    has_after=False,
                )
            case "message.send":
                self._send(line, frame, reply)
            case "ping":
                self._mark += 1
                self._out.put_nowait((line, {"type": "pong", "at": AT, "mark": str(self._mark)}))
            case _:
                reply(type="done")

    def _sync(self, line: ServerConnection, frame: dict[str, Any], reply: Any) -> None:
        refused: dict[str, Any] = {}
        events: list[dict[str, Any]] = []
        for stream, position in frame["positions"].items():
            log = self.streams.get(stream)
            if log is None:
                refused[stream] = {"code": "not_found", "detail": "It is not there."}
            elif position.get("epoch", self.epochs[stream]) != self.epochs[stream]:
                epoch = self.epochs[stream]
                refused[stream] = {"code": "epoch_changed", "detail": "Start over.", "epoch": epoch, "head": len(log)}
            else:
                events += log[position["seq"] :]
                events.append({"type": "synced", "stream": stream, "epoch": self.epochs[stream], "seq": len(log)})
        syncing = {"type": "syncing", "streams": [name for name in frame["positions"] if name not in refused]}
        self._out.put_nowait((line, {**syncing, **({"refused": refused} if refused else {})}))
        for event in events:
            self._out.put_nowait((line, event))

    def _send(self, line: ServerConnection, frame: dict[str, Any], reply: Any) -> None:
        step, self.next_send = self.next_send, None
        does = step["does"] if step else "answer"
        if step is not None and does == "refuse":
            refusal = {name: step[name] for name in ("code", "retry", "retry_after_ms") if name in step}
            return reply(type="error", detail="Not now.", **refusal)
        known = self.keys.get(frame["key"])
        event = known or self._message(frame["text"], "alice", frame["key"])
        if does == "store and cut":
            self._line = None
            line.transport.abort()
            return None
        sent = {"type": "message.sent", "channel": CHANNEL, "id": event["data"]["id"], "seq": event["seq"], "at": AT}
        for _ in range(2 if does == "answer twice" else 1):
            reply(**sent, **({"duplicate": True} if known else {}))
        if known is None:
            self._say(event)
        return None


@asynccontextmanager
async def playing() -> AsyncIterator[Player]:
    """A player that listens."""
    player = Player()
    await player.start()
    try:
        yield player
    finally:
        await player.stop()
