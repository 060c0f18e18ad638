"""A small server that speaks the protocol truthfully until it is told to misbehave.

Everybody shares every stream, users are whatever their token says (`user:alice`), and nothing is stored. The knobs
are attributes: lost replies, duplicated and skipped events, refusals, silence, restored backups.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import picows

encode = msgspec.json.encode
LIMITS = {
    "frame_bytes": 131072,
    "text_length": 20000,
    "custom_bytes": 8192,
    "commands_per_second": 1000.0,
    "commands_burst": 1000,
    "in_flight": 32,
}


def now() -> str:
    return datetime.now(UTC).isoformat()


class Session:
    """One connection, over whichever transport gave `put` and `end`."""

    def __init__(self, server: FakeServer, put: Callable[[bytes], None], end: Callable[[int, str], None]) -> None:
        self.server = server
        self._put = put
        self.end = end
        self.user = ""
        self.device = ""
        self.connected = False
        self.held: set[str] = set()
        # While the client wants no events: how far each stream had come.
        self.stood_at: dict[str, int] | None = None
        # Events written to the network, by stream.
        self.events_put: Counter[str] = Counter()
        self.commands: list[dict[str, Any]] = []

    def put(self, frame: dict[str, Any]) -> None:
        if "data" in frame:
            self.events_put[frame["stream"]] += 1
        self._put(encode(frame))

    def error(self, ref: int | None, code: str, retry: str, **more: Any) -> None:
        self.put({"type": "error", "ref": ref, "code": code, "detail": code, "retry": retry, **more})

    def on_command(self, command: dict[str, Any]) -> None:
        server = self.server
        self.commands.append(command)
        server.commands.append(command)
        kind, ref = command["type"], command.get("ref")
        if kind == "connect":
            self.on_connect(command)
            return
        refusal = server.refuse(command) if server.refuse else None
        if refusal is not None:
            self.error(ref, refusal[0], refusal[1])
            return
        match kind:
            case "ping":
                if not server.silent:
                    self.put({"type": "pong", "at": now(), "mark": str(server.clock)})
            case "heads":
                self.put({"type": "heads", "ref": ref, "mark": str(server.clock), "moved": server.heads()})
            case "sync":
                self.on_sync(command)
            case "hold":
                self.on_hold(command.get("on", True))
                self.put({"type": "done", "ref": ref})
            case "message.send":
                self.on_send(command)
            case "authenticate":
                if server.refuse_token is not None:
                    self.error(ref, server.refuse_token, "auth")
                else:
                    self.put({"type": "authenticated", "ref": ref, "expires_at": server.expiry()})
            case "history":
                events = [e for e in server.streams.get(command["channel"], []) if e["type"] == "message.created"]
                before, limit = command.get("before") or 2**53, command["limit"]
                page = [e["data"] for e in events if e["seq"] < before][-limit:]
                self.put(
                    {
                        "type": "history",
                        "ref": ref,
                        "channel": command["channel"],
                        "messages": page,
                        "epoch": server.epoch,
                        "head": len(server.streams.get(command["channel"], [])),
                        "has_before": bool(page) and page[0]["seq"] > events[0]["seq"],
                    }
                )
            case "read":
                self.put({"type": "read", "ref": ref, "channel": command["channel"], "read": command["seq"],
                          "unread": 0, "mentions": 0})  # fmt: skip
            case "presence.watch":
                self.put({"type": "presence.list", "ref": ref, "users": []})
            case "ack" | "typing":
                pass
            case _:
                self.put({"type": "done", "ref": ref, "seq": 1})

    def on_connect(self, command: dict[str, Any]) -> None:
        server = self.server
        server.connects.append(command)
        if server.close_next:
            code, reason = server.close_next.pop(0)
            self.end(code, reason)
            return
        token = command.get("token") or ""
        if not token.startswith("user:"):
            self.error(None, "token_signature", "never")
            self.end(4501, "token_signature")
            return
        self.user = token.split(":")[1]
        self.device = command["device"]["id"]
        for other in [s for s in server.sessions if s.device == self.device]:
            other.drop(4505, "replaced")
        since = command.get("since")
        moved = [] if since is None else server.heads(int(since))
        self.held = {head["stream"] for head in moved}
        self.connected = True
        server.sessions.append(self)
        self.put(
            {
                "type": "connected",
                "session": "s1",
                "user": self.user,
                "device": self.device,
                "server_time": now(),
                "mark": str(server.clock),
                "heartbeat_seconds": server.heartbeat,
                "expires_at": server.expiry(),
                "limits": LIMITS,
                "moved": moved,
            }
        )

    def on_sync(self, command: dict[str, Any]) -> None:
        server = self.server
        refused: dict[str, Any] = {}
        for name, position in command["positions"].items():
            head = len(server.streams.get(name, []))
            epoch = position.get("epoch")
            if epoch is not None and epoch != server.epoch:
                refused[name] = {"code": "epoch_changed", "detail": "", "epoch": server.epoch, "head": head}
            elif position["seq"] > head:
                refused[name] = {"code": "position_ahead", "detail": "", "epoch": server.epoch, "head": head}
        names = [name for name in command["positions"] if name not in refused]
        self.put({"type": "syncing", "ref": command.get("ref"), "streams": names, "refused": refused})
        for name in names:
            events = server.streams.get(name, [])
            if self.stood_at is not None:
                self.held.discard(name)
                self.stood_at[name] = command["positions"][name]["seq"]
                continue
            for event in events[command["positions"][name]["seq"] :]:
                if not server.swallow(event):
                    self.put(event)
            self.held.discard(name)
            self.put({"type": "synced", "stream": name, "epoch": server.epoch, "seq": len(events)})

    def on_hold(self, on: bool) -> None:
        streams = self.server.streams
        if on:
            self.stood_at = {name: len(events) for name, events in streams.items()}
            return
        stood_at, self.stood_at = self.stood_at or {}, None
        for name, events in streams.items():
            if name not in self.held and name in stood_at:
                for event in events[stood_at[name] :]:
                    self.put(event)
                self.put({"type": "synced", "stream": name, "epoch": self.server.epoch, "seq": len(events)})

    def on_send(self, command: dict[str, Any]) -> None:
        server = self.server
        identity = (self.user, command["channel"], command["key"])
        known = server.keys.get(identity)
        if known is None:
            event = server.append(
                command["channel"],
                "message.created",
                self.user,
                publish=False,
                key=command["key"],
                text=command["text"],
            )
            known = server.keys[identity] = event
            duplicate = False
        else:
            duplicate = True
        reply = {
            "type": "message.sent",
            "ref": command.get("ref"),
            "channel": command["channel"],
            "id": known["data"]["id"],
            "seq": known["seq"],
            "at": known["at"],
            "duplicate": duplicate,
        }
        if server.lose_replies > 0:
            server.lose_replies -= 1
            if server.lose_by_closing:
                self.drop(4002, "internal")
        else:
            self.put(reply)
        if not duplicate:
            server.publish(known)

    def drop(self, code: int, reason: str = "") -> None:
        if self in self.server.sessions:
            self.server.sessions.remove(self)
        self.end(code, reason)


class _Listener(picows.WSListener):
    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        def end(code: int, reason: str) -> None:
            transport.send(picows.WSMsgType.CLOSE, struct.pack("!H", code) + reason.encode())
            transport.disconnect()

        self.session = Session(self.server, lambda frame: transport.send(picows.WSMsgType.TEXT, frame), end)
        self.session.abort = lambda: transport.disconnect(False)
        self.server.opened += 1

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            transport.send(picows.WSMsgType.CLOSE, frame.get_payload_as_bytes())
            transport.disconnect()
        elif frame.msg_type == picows.WSMsgType.TEXT and not self.server.deaf:
            self.session.on_command(msgspec.json.decode(frame.get_payload_as_bytes()))

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        if self.session in self.server.sessions:
            self.server.sessions.remove(self.session)

    def pause_writing(self) -> None:
        self.server.paused = True

    def resume_writing(self) -> None:
        self.server.paused = False


class FakeServer:
    def __init__(self) -> None:
        self.streams: dict[str, list[dict[str, Any]]] = {"@me": []}
        self.changed: dict[str, int] = {}
        self.epoch = "e1"
        self.clock = 0
        self.keys: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.sessions: list[Session] = []
        self.connects: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.opened = 0
        # The knobs.
        self.heartbeat = 25
        self.expires_in: float | None = None
        self.close_next: list[tuple[int, str]] = []
        self.refuse: Callable[[dict[str, Any]], tuple[str, str] | None] | None = None
        self.refuse_token: str | None = None
        self.lose_replies = 0
        self.lose_by_closing = False
        self.repeat_events = 0
        self.swallow: Callable[[dict[str, Any]], bool] = lambda event: False
        self.silent = False
        self.deaf = False
        self.paused = False
        self.port = 0
        self._server: asyncio.Server | None = None
        self._http: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await picows.ws_create_server(lambda request: _Listener(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def start_http(self) -> None:
        """Listen for HTTP only: an upgrade is answered with 403, as a proxy would."""
        self._server = await asyncio.start_server(self._serve_http, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        for task in list(self._http):
            task.cancel()
        await asyncio.gather(*self._http, return_exceptions=True)

    def cut(self) -> None:
        """Every connection breaks without a word."""
        for session in list(self.sessions):
            self.sessions.remove(session)
            session.abort()

    def expiry(self) -> str | None:
        return None if self.expires_in is None else (datetime.now(UTC) + timedelta(seconds=self.expires_in)).isoformat()

    def heads(self, since: int = -1) -> list[dict[str, Any]]:
        return [
            {"stream": name, "epoch": self.epoch, "head": len(events)}
            for name, events in self.streams.items()
            if self.changed.get(name, 0) > since
        ]

    def append(
        self, stream: str, kind: str = "message.created", by: str = "bob", *, publish: bool = True, **data: Any
    ) -> dict[str, Any]:
        log = self.streams.setdefault(stream, [])
        seq = len(log) + 1
        at = now()
        if kind == "message.created":
            data = {"id": f"m_{stream}_{seq}", "channel": stream, "seq": seq, "user": by, "created_at": at, **data}
        event = {"type": kind, "stream": stream, "seq": seq, "at": at, "by": by, "data": data}
        log.append(event)
        self.clock += 1
        self.changed[stream] = self.clock
        if publish:
            self.publish(event)
        return event

    def publish(self, event: dict[str, Any]) -> None:
        if self.swallow(event):
            return
        for session in list(self.sessions):
            if session.stood_at is None and event["stream"] not in session.held:
                for _ in range(1 + self.repeat_events):
                    session.put(event)

    def texts(self, stream: str) -> list[str]:
        return [event["data"]["text"] for event in self.streams.get(stream, []) if event["type"] == "message.created"]

    # ------------------------------------------------------------ HTTP

    async def _serve_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._http.add(task)
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers: dict[str, str] = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                status, answer = await self.answer(method, path, headers, body)
                content = encode(answer)
                writer.write(
                    b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                    % (status, len(content), content)
                )
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._http.discard(task)
            writer.close()

    async def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        path, _, query = path.partition("?")
        arguments = dict(pair.split("=") for pair in query.split("&") if pair)
        if path == "/v1/ws":
            return 403, {"code": "blocked"}
        if path == "/v1/realtime":
            frames: list[bytes] = []
            box = self._box = {"frames": frames, "wake": asyncio.Event(), "ended": False}

            def put(frame: bytes) -> None:
                frames.append(frame)
                box["wake"].set()

            def end(code: int, reason: str) -> None:
                box["ended"] = True
                box["wake"].set()

            session = self._session = Session(self, put, end)
            session.abort = lambda: end(4404, "")
            session.on_command(msgspec.json.decode(body))
            first = [msgspec.Raw(frames[0])]
            return 200, {"session": "h1", "frames": first}
        if path.endswith("/poll"):
            box, after = self._box, int(arguments["after"])
            # The first frame went out with the opening and is number 0.
            while len(box["frames"]) <= after + 1 and not box["ended"]:
                box["wake"].clear()
                await box["wake"].wait()
            if box["ended"]:
                return 404, {"code": "session_unknown", "detail": "", "retry": "resync"}
            frames = box["frames"]
            return 200, {
                "frames": [{"n": n, "frame": msgspec.Raw(frames[n])} for n in range(after + 1, len(frames))],
                "next": len(frames) - 1,
            }
        if path.endswith("/commands"):
            commands = msgspec.json.decode(body)
            for command in commands if isinstance(commands, list) else [commands]:
                self._session.on_command(command)
            return 202, {}
        return 404, {"code": "not_found", "detail": path, "retry": "never"}
