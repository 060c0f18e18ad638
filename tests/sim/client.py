"""A device as docs/protocol/catching-up.md describes it, on a line that delays, stalls and breaks.

It applies what the rules say, and complains about what a good server never does: a gap, a repetition, or a step back
on a stream that is live; anything of a channel after its removal was acknowledged.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import msgspec

from tidings.server.gateway.connection import Connection
from tidings.server.gateway.gateway import Gateway

if TYPE_CHECKING:
    from .world import SimNode, World

Frame = dict[str, Any]

# One way between a device and its node, seconds at most.
LINE_SECONDS_MAX = 0.03
# Bytes on their way to a device before its node sees that it is slow.
LINE_BYTES_MAX = 6_000
# How long a command is waited for before the line counts as broken, seconds.
ANSWER_SECONDS_MAX = 8.0
# Between two tries to connect, seconds at most: full jitter.
BACKOFF_SECONDS_MAX = 1.0

decode = msgspec.json.Decoder().decode
encode = msgspec.json.Encoder().encode
_numbers = itertools.count()


class Line(Connection):
    """The server's end of a line."""

    __slots__ = ("_number", "carried", "client", "cut_off", "free_at", "said_at", "stalled")

    framed = False

    def __init__(self, gateway: Gateway, client: SimClient) -> None:
        super().__init__(gateway, "192.0.2.1", None)
        self._number = next(_numbers)
        self.client = client
        self.cut_off = False
        self.stalled: deque[bytes] | None = None
        self.carried = 0
        self.free_at = 0.0
        self.said_at = 0.0

    # Sets of connections are walked in the same order in every run.
    def __hash__(self) -> int:
        return self._number

    def write_one(self, payload: bytes) -> None:
        client = self.client
        client.world.written(client, payload)
        if self.stalled is not None:
            self.stalled.append(payload)
        else:
            self._carry(payload)
        self.carried += len(payload)
        if self.carried > LINE_BYTES_MAX and not self.transport_paused:
            self.pause()

    def _carry(self, payload: bytes) -> None:
        loop = self.client.world.loop
        self.free_at = max(self.free_at + 1e-9, loop.time() + self.client.world.rng.random() * LINE_SECONDS_MAX)
        loop.call_at(self.free_at, self._arrive, payload)

    def _arrive(self, payload: bytes) -> None:
        if self.cut_off:
            return
        self.carried -= len(payload)
        if self.transport_paused and self.carried < LINE_BYTES_MAX // 4 and not self.ended:
            self.resume()
        self.client.hear(self, decode(payload))

    def stall(self) -> None:
        """The device stops reading."""
        if self.stalled is None:
            self.stalled = deque()

    def unstall(self) -> None:
        """The device reads on."""
        waiting, self.stalled = self.stalled, None
        for payload in waiting or ():
            self._carry(payload)

    def end(self, code: int, reason: str) -> None:
        loop = self.client.world.loop
        loop.call_at(max(self.free_at, loop.time()) + LINE_SECONDS_MAX, self.client.lost, self)

    def say(self, frame: Frame) -> None:
        """The device says something."""
        world = self.client.world
        self.said_at = max(self.said_at + 1e-9, world.loop.time() + world.rng.random() * LINE_SECONDS_MAX)
        world.loop.call_at(self.said_at, self._said, encode(frame))

    def _said(self, data: bytes) -> None:
        if not self.cut_off and not self.ended:
            self.receive(data)

    def cut(self) -> None:
        """The line breaks; both ends notice, each in its time."""
        if self.cut_off:
            return
        self.cut_off = True
        world = self.client.world
        world.loop.call_later(world.rng.random() * 2, self._noticed)
        world.loop.call_later(world.rng.random() * 0.5, self.client.lost, self)

    def _noticed(self) -> None:
        if not self.ended and not self.client.world.is_dead(self.gateway):
            self.gone()


class SimClient:
    """One device of one user, with what it keeps on its disk."""

    def __init__(self, world: World, user: str, device: str) -> None:
        self.world = world
        self.user = user
        self.device = device
        self.line: Line | None = None
        # On disk.
        self.pos: dict[str, tuple[int, str | None]] = {}
        self.mark: str | None = None
        self.outbox: dict[str, tuple[str, str]] = {}
        # What it shows: per channel, what was applied. Starting over begins a new list after a seq.
        self.shown: dict[str, dict[int, str]] = {}
        self.since: dict[str, int] = {}
        self.wanted = True
        self.connected = False
        self._refs = itertools.count(1)
        self._waiting: dict[int, tuple[str, Any]] = {}
        self._gaps: set[str] = set()
        self._moved: list[Frame] = []
        self._later: list[str] = []
        # How often each stream was asked for again without an answer yet.
        self._asked: Counter[str] = Counter()
        # Streams that begin at an earlier place than the server knows, until it has answered that it does.
        self._rewound: set[str] = set()
        # Streams on which nothing must be missing or come twice now: the server says they are live.
        self._live: dict[str, int] = {}
        self._acked: dict[str, int] = {}

    # ------------------------------------------------------------ the line

    def start(self) -> None:
        self._reconnect()

    def _reconnect(self) -> None:
        self.world.loop.call_later(self.world.rng.random() * BACKOFF_SECONDS_MAX, self._connect)

    def _connect(self) -> None:
        if self.line is not None or not self.wanted:
            return
        node = self.world.any_node()
        if node is None or node.gateway.admit("192.0.2.1") is not None:
            self._reconnect()
            return
        self._open(node)

    def _open(self, node: SimNode) -> None:
        self.line = Line(node.gateway, self)
        node.gateway.opened(self.line)
        self._waiting.clear()
        self._gaps.clear()
        self._moved = []
        self._later = []
        self._asked.clear()
        self._rewound.clear()
        self._live = {}
        self._acked = {}
        fields: Frame = {"token": self.world.tokens[self.user], "device": {"id": self.device}}
        if self.mark is not None:
            fields["since"] = self.mark
        else:
            # The first connection broke before everything was known: it begins anew.
            for stream in list(self.pos):
                self._forget(stream)
        self._say("connect", **fields)
        self._watch(self.line)

    def _watch(self, line: Line) -> None:
        self.world.loop.call_later(ANSWER_SECONDS_MAX, self._check, line, set(self._waiting))

    def _check(self, line: Line, before: set[int]) -> None:
        """Whoever is not answered hangs up."""
        if self.line is not line:
            return
        if before & set(self._waiting):
            line.cut()
            return
        self._watch(line)

    def lost(self, line: Line) -> None:
        """The line is gone."""
        line.cut_off = True
        if self.line is line:
            self.line = None
            self.connected = False
            self._reconnect()

    def cut(self) -> None:
        if self.line is not None:
            self.line.cut()

    def _say(self, type: str, then: Any = None, **fields: Any) -> int:
        ref = next(self._refs)
        if self.line is not None:
            self._waiting[ref] = (type, then)
            self.line.say({"type": type, "ref": ref, **fields})
        return ref

    # ------------------------------------------------------------ what the rules say

    def hear(self, line: Line, frame: Frame) -> None:
        if line is not self.line:
            return
        kind = frame["type"]
        self.world.trace("hear", self.device, frame)
        if "data" in frame and "seq" in frame:
            self._event(frame)
            return
        ref = frame.get("ref")
        _, then = self._waiting.pop(ref, ("", None)) if ref is not None else ("", None)
        if kind == "connected":
            self._connected(frame)
        elif kind == "syncing":
            for stream in [*frame["streams"], *frame.get("refused", {})]:
                self._asked[stream] -= 1
                if not self._asked[stream]:
                    self._rewound.discard(stream)
            for stream, refusal in frame.get("refused", {}).items():
                self._refused(stream, refusal)
        elif kind == "synced":
            self._synced(frame)
        elif kind == "pong":
            if self.mark is not None:
                self.mark = frame["mark"]
        elif kind == "going_away":
            line.cut()
        elif then is not None:
            then(frame)

    def _connected(self, frame: Frame) -> None:
        self._learn(frame, frame["mark"])
        self.world.loop.call_later(1.0, self._beat, self.line)

    def _learn(self, page: Frame, mark: str) -> None:
        self._moved += page.get("moved", [])
        if page.get("more"):
            self._say("heads", lambda next_page: self._learn(next_page, mark), since=self.mark, cursor=page["more"])
            return
        fresh = self.mark is None
        for head in self._moved:
            self._begin(head["stream"], head["head"], head["epoch"])
        # The own stream first: it tells which channels were left and joined meanwhile.
        later = [head["stream"] for head in self._moved if head["stream"] != "@me"]
        if len(later) < len(self._moved):
            self._later = later
            self._sync("@me")
        else:
            for stream in later:
                self._sync(stream)
        # With something on the own stream, a position may be of a membership that has ended: nothing is strict yet.
        self._live = dict(self._positions()) if not self._moved else {}
        self.connected = True
        if fresh:
            self._say("heads", lambda heads: self._all_heads(heads, mark))
        else:
            self.mark = mark
        for key in list(self.outbox):
            self._transmit(key)

    def _all_heads(self, page: Frame, mark: str) -> None:
        if page["type"] == "error":
            self.cut()
            return
        self._moved += page.get("moved", [])
        if page.get("more"):
            self._say("heads", lambda heads: self._all_heads(heads, mark), cursor=page["more"])
            return
        # From the places in the list on, so that nothing falls between.
        for head in self._moved:
            self._begin(head["stream"], head["head"], head["epoch"])
        self._later = [head["stream"] for head in self._moved if head["stream"] != "@me"]
        self._sync("@me")
        # Only now is every stream known whose changes the mark would tell of.
        self.mark = mark

    def _begin(self, stream: str, seq: int, epoch: str | None) -> None:
        """A stream that is new here starts at a position."""
        if stream not in self.pos:
            self.pos[stream] = (seq, epoch)
            self.since[stream] = seq
            self.shown[stream] = {}

    def _positions(self) -> list[tuple[str, int]]:
        return [(stream, seq) for stream, (seq, _) in self.pos.items()]

    def _sync(self, stream: str) -> None:
        self._gaps.add(stream)
        self._live.pop(stream, None)
        seq, epoch = self.pos[stream]
        self._asked[stream] += 1
        line = self.line

        def refused(reply: Frame) -> None:
            # Could not be decided just now: again, later.
            self._asked[stream] -= 1
            self.world.loop.call_later(0.5, self._sync_again, line, stream)

        self._say("sync", refused, positions={stream: {"seq": seq, **({"epoch": epoch} if epoch else {})}})

    def _event(self, frame: Frame) -> None:
        if self.mark is None:
            # It is not known yet where we are: it comes again.
            return
        stream, seq = frame["stream"], frame["seq"]
        live = self._live.get(stream)
        if live is not None:
            if seq <= live:
                # At least once on the wire: a removal that another node told late is taken back by reading it again.
                self.world.counts["repeated"] += 1
            elif seq > live + 1 and not any(live < gone < seq for gone in self.world.removals(self.user, stream)):
                # Who was removed and has joined again may not have heard of either yet.
                self.world.wrong(f"{self.device}: {stream} went from {live} to {seq} while it was live")
            self._live[stream] = max(seq, live)
        if stream not in self.pos:
            self._begin(stream, seq - 1, None)
        position, epoch = self.pos[stream]
        if seq <= position:
            return
        if seq > position + 1:
            if stream not in self._gaps:
                self._sync(stream)
            return
        self.pos[stream] = (seq, epoch)
        self.shown[stream][seq] = f"{frame['type']} {frame['data'].get('key') or ''}"
        if frame["type"] == "channel.joined":
            # A position that is further came from the channel itself, which may be ahead of what tells of it.
            data = frame["data"]
            if self.pos.get(data["channel"], (0, None))[0] < data["head"]:
                self._forget(data["channel"])
                self._begin(data["channel"], data["head"], data["epoch"])
            # It may tell of the past: what came of the channel meanwhile did not count.
            self._rewound.add(data["channel"])
            self._sync(data["channel"])
        elif frame["type"] == "channel.left":
            self._forget(frame["data"]["channel"])

    def _forget(self, stream: str) -> None:
        for kept in (self.pos, self.shown, self.since, self._live):
            kept.pop(stream, None)  # type: ignore[attr-defined]
        self._gaps.discard(stream)

    def _synced(self, frame: Frame) -> None:
        stream = frame["stream"]
        if self._asked[stream] or stream in self._rewound:
            # The answer to an earlier question: another one is under way.
            return
        self._gaps.discard(stream)
        if stream in self.pos:
            seq, _ = self.pos[stream]
            self.pos[stream] = (seq, frame["epoch"])
            if frame["seq"] > seq:
                self.world.wrong(f"{self.device}: {stream} is synced at {frame['seq']}, and {seq} was had of it")
            self._live[stream] = frame["seq"]
        if stream == "@me":
            # What only an event told of, and the server never confirmed, may be the end of a membership.
            self._live |= {
                name: seq for name, (seq, epoch) in self.pos.items() if epoch is not None and name not in self._gaps
            }
            later, self._later = self._later, []
            for waiting in later:
                if waiting in self.pos:
                    self._sync(waiting)
                self._live.pop(waiting, None)

    def _refused(self, stream: str, refusal: Frame) -> None:
        if refusal["code"] == "unavailable":
            self.world.loop.call_later(0.5, self._sync_again, self.line, stream)
            return
        self._forget(stream)
        if refusal["code"] == "not_found":
            return
        if stream == "@me" or refusal["code"] != "cursor_expired":
            self.world.wrong(f"{self.device}: {stream} was refused: {refusal}")
            return
        self._gaps.add(stream)
        self._say("history", lambda page: self._start_over(stream, page), channel=stream)

    def _sync_again(self, line: Line | None, stream: str) -> None:
        if self.line is line and stream in self.pos:
            self._sync(stream)

    def _start_over(self, stream: str, page: Frame) -> None:
        if page["type"] == "error":
            return
        self._forget(stream)
        self._begin(stream, page["head"], page["epoch"])
        self._sync(stream)

    def _beat(self, line: Line | None) -> None:
        if line is None or line is not self.line or not self.connected:
            return
        self._say("ping")
        moved = {
            stream: seq
            for stream, (seq, _) in self.pos.items()
            if stream in self._live and seq and self._acked.get(stream) != seq
        }
        if moved:
            self._acked.update(moved)
            self._say("ack", lambda reply: self._acknowledged(reply), positions=moved)
        self.world.loop.call_later(1.0, self._beat, line)

    def _acknowledged(self, reply: Frame) -> None:
        if reply["type"] == "error" and reply["retry"] != "later":
            self.world.wrong(f"{self.device}: an acknowledgement of what was received is refused: {reply}")

    # ------------------------------------------------------------ sending

    def send(self, channel: str, key: str) -> None:
        """Say something; it stays in the outbox until it is answered."""
        self.outbox[key] = (channel, f"text of {key}")
        self.world.invoked(self, channel, key)
        if self.connected:
            self._transmit(key)

    def _transmit(self, key: str) -> None:
        channel, text = self.outbox[key]
        self._say("message.send", lambda reply: self._sent(key, reply), channel=channel, key=key, text=text)

    def _sent(self, key: str, reply: Frame) -> None:
        if key not in self.outbox:
            return
        if reply["type"] == "message.sent":
            self.world.sent(self, key, reply["seq"], reply["id"])
            del self.outbox[key]
        elif reply["type"] == "error":
            if reply["retry"] == "later":
                self.world.loop.call_later(0.3, self._again, self.line, key)
            else:
                self.world.refused(self, key, reply["code"])
                del self.outbox[key]

    def _again(self, line: Line | None, key: str) -> None:
        if key in self.outbox and self.line is line and self.connected:
            self._transmit(key)
