"""What a socket takes from strangers: broken frames, floods, silence, and every command with anything in its fields."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.checks.house import SOCKET_PATH, House, Wire, open_house
from tidings.testing.rawsocket import (
    BINARY,
    CONTINUATION,
    PING,
    TEXT,
    HandshakeRefused,
    RawSocket,
    encode_frame,
)
from tidings.wire.codec import decode_command
from tidings.wire.commands import AnyCommand, AnyReply, AnySignal
from tidings.wire.events import Event
from tidings.wire.problems import CATALOGUE

pytestmark = pytest.mark.asyncio(loop_scope="module")

FRAME_BYTES_MAX = 131_072


async def connected(house: House, user: str, **options: Any) -> RawSocket:
    raw = await RawSocket.open(house.server.port, **options)
    await raw.handshake(SOCKET_PATH)
    await raw.send_json({"type": "connect", "token": house.token(user), "device": {"id": "d"}})
    frame = msgspec.json.decode((await raw.read_frame()).payload)
    assert frame["type"] == "connected"
    return raw


@pytest.mark.parametrize(
    ("what", "frames"),
    [
        ("a frame beyond the bound", [encode_frame(TEXT, b"x" * (FRAME_BYTES_MAX + 1))]),
        ("a length that promises eight exabytes", [encode_frame(TEXT, b"x", declared_length=2**62, length_bytes=8)]),
        ("fragments beyond the bound", [encode_frame(TEXT, b"x" * 60_000, fin=False)]
         + [encode_frame(CONTINUATION, b"x" * 60_000, fin=False)] * 3),
        ("a thousand fragments of nothing", [encode_frame(TEXT, b"", fin=False)]
         + [encode_frame(CONTINUATION, b"", fin=False)] * 1000),
        ("a continuation of nothing", [encode_frame(CONTINUATION, b"{}")]),
        ("a message within a message", [encode_frame(TEXT, b"{", fin=False), encode_frame(TEXT, b"}")]),
        ("an unmasked frame", [encode_frame(TEXT, b'{"type":"ping"}', mask=None)]),
        ("reserved bits", [encode_frame(TEXT, b'{"type":"ping"}', rsv=4)]),
        ("an unknown opcode", [encode_frame(0x3, b"")]),
        ("a binary frame", [encode_frame(BINARY, b'{"type":"ping"}')]),
        ("a ping in pieces", [encode_frame(PING, b"x", fin=False)]),
        ("a ping of 126 bytes", [encode_frame(PING, b"x" * 126)]),
        ("garbage without end", [encode_frame(TEXT, b"\xff\xfe{]")] * 40),
        ("a flood of pings", [encode_frame(PING, b"x")] * 500),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_s10_what_no_client_sends_ends_the_connection_and_nothing_else(
    house: House, what: str, frames: list[bytes]
) -> None:
    await house.users("ann", "bob")
    bystander = await house.wire("bob")
    async with await connected(house, "ann") as raw:
        try:
            for frame in frames:
                await raw.send_bytes(frame)
        except ConnectionError:
            pass
        closed = await raw.read_close()
    assert closed.code is None or 1002 <= closed.code <= 1009 or closed.code >= 4400, f"{what}: {closed}"
    assert (await bystander.ask("ping"))["type"] == "pong"


async def test_s10_bad_text_is_refused_and_the_connection_stays(house: House) -> None:
    await house.users("ann")
    wire = await house.wire("ann")
    for bad in (
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"type":"nonsense"}',
        b"[" * 10_000,
        b'{"type":"ping","x":1}',
    ):
        before = len(wire.frames)
        await wire.raw.send_frame(TEXT, bad)
        await wire.until(lambda n=before: len(wire.frames) > n, f"{bad[:20]!r} was answered")
        assert wire.frames[-1]["type"] == "error"
        assert wire.frames[-1]["code"] in ("invalid", "invalid_field")
        assert (await wire.ask("ping"))["type"] == "pong"


async def test_s10_floods_cost_bounded_memory(house: House) -> None:
    await house.users("ann")
    before = house.server.memory().private
    for _ in range(4):
        async with await connected(house, "ann") as raw:
            try:
                await raw.send_frame(TEXT, b"x" * 100_000, fin=False)
                for _ in range(300):
                    await raw.send_frame(CONTINUATION, b"x" * 100_000, fin=False)
            except ConnectionError:
                pass
    # 120 megabytes were sent.
    assert house.server.memory().private - before < 16_000_000


async def test_s9_a_socket_that_says_nothing_is_dropped_within_its_time(tmp_path: Path) -> None:
    settings = {"TIDINGS_AUTH_TIMEOUT_SECONDS": "1", "TIDINGS_CONNECTIONS_PER_ADDRESS": "5"}
    async with open_house(tmp_path, **settings) as house:
        await house.users("ann")
        silent, chatty, half = [await Wire.open(house.server.port) for _ in range(3)]
        begun = time.monotonic()
        await half.raw.send_bytes(encode_frame(TEXT, b'{"type":"connect"', declared_length=500))
        await chatty.raw.send_frame(PING, b"still here")
        for wire in (silent, chatty, half):
            closed = await wire.until_closed(5)
            assert closed.code in (None, 4402), closed
        assert time.monotonic() - begun < 1 + 0.5 + 3
        # One that goes through the motions of HTTP and never finishes is not kept either, nor counted for ever.
        wires = [await house.wire("ann", device=f"d{number}") for number in range(5)]
        with pytest.raises(HandshakeRefused) as refused:
            await Wire.open(house.server.port)
        assert refused.value.status == 429
        await wires[0].close()
        async with asyncio.timeout(10):
            while await house.metric("tidings_connections") > 4:
                await asyncio.sleep(0.02)  # why: the pace of a loop that looks at a condition
        assert (await house.wire("ann", device="again")).closed is None
        # Who was first is still there.
        assert (await wires[1].ask("ping"))["type"] == "pong"


class Anything:
    """Makes frames of the protocol's own schemas: mostly right, a little wrong."""

    def __init__(self, rng: random.Random, known: dict[str, list[Any]]) -> None:
        self._schemas = msgspec.json.schema_components([AnyCommand])[1]
        self._rng = rng
        self._known = known

    def command(self) -> dict[str, Any]:
        rng = self._rng
        names = [name for name, schema in self._schemas.items() if "type" in schema.get("properties", {})
                 and "const" in _kind(schema)]  # fmt: skip
        schema = self._schemas[rng.choice(names)]
        made: dict[str, Any] = {
            "type": _kind(schema)["const"] if "const" in _kind(schema) else _kind(schema)["enum"][0]
        }
        for name, field in schema["properties"].items():
            if name != "type" and (name in schema.get("required", ()) or rng.random() < 0.5):
                made[name] = self.value(field, name)
        if rng.random() < 0.1:
            made[rng.choice(["x", "type", "ref", "channel"])] = self.junk()
        return made

    def junk(self) -> Any:
        return self._rng.choice(
            [None, True, -1, 2**63, 2**200, 1.5, "", "\u0000", "\U0001f600" * 50, [], {}, [[]], {"": {}}, "x" * 5000]
        )

    def value(self, schema: dict[str, Any], name: str = "", depth: int = 0) -> Any:
        rng = self._rng
        if rng.random() < 0.05 or depth > 5:
            return self.junk()
        if name in self._known and rng.random() < 0.7:
            return rng.choice(self._known[name])
        if "$ref" in schema:
            return self.value(self._schemas[schema["$ref"].rpartition("/")[2]], name, depth + 1)
        if "anyOf" in schema:
            return self.value(rng.choice(schema["anyOf"]), name, depth + 1)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        match schema.get("type"):
            case "string":
                low, high = schema.get("minLength", 0), schema.get("maxLength", 40)
                return "".join(rng.choices("abcXYZ019_. \u00e9\u4e2d\u202e\u0000", k=rng.choice([low, high % 300, 8])))
            case "integer":
                return rng.choice([schema.get("minimum", 0), schema.get("maximum", 2**53), rng.randrange(1000), -1])
            case "number":
                return rng.choice([0, -1.5, 1e300])
            case "boolean":
                return rng.random() < 0.5
            case "array":
                return [self.value(schema.get("items", {}), name, depth + 1) for _ in range(rng.randrange(4))]
            case "object":
                if "properties" in schema:
                    return {
                        key: self.value(field, key, depth + 1)
                        for key, field in schema["properties"].items()
                        if key in schema.get("required", ()) or rng.random() < 0.5
                    }
                inner = schema.get("additionalProperties")
                inner = inner if isinstance(inner, dict) else {}
                keys = [*self._known.get("channel", []), "@me", "k\u00e9y", "a"]
                return {rng.choice(keys): self.value(inner, "", depth + 1) for _ in range(rng.randrange(4))}
            case _:
                return self.junk()


def _kind(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema["properties"]["type"]
    return {"const": kind["enum"][0]} if "enum" in kind else kind


@pytest.mark.timeout(120)
async def test_s19_frames_made_from_the_schemas_get_only_replies_of_the_schemas_and_nothing_internal(
    house: House,
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    await house.users("fuzz", "other")
    channels = [await house.channel("fuzz", "other"), await house.channel("fuzz"), await house.channel("other")]
    hurt = await house.channel("fuzz", "other")
    wire = await house.wire("fuzz")
    ids = [(await wire.send(channels[0], "x", key=f"s{n}"))["id"] for n in range(3)]
    known: dict[str, list[Any]] = {
        "channel": [*channels, hurt, "nowhere"],
        "id": ids,
        "reply_to": ids,
        "users": ["fuzz", "other", "nobody"],
        "mentions": ["other", "nobody"],
        "seq": [0, 1, 2, 3, 5, 10**6],
        "emoji": ["👍"],
        "ref": [1, 2, 3],
        "since": [wire.frames[0]["mark"], "zz"],
        "token": [house.token("fuzz"), "x.y.z"],
    }
    anything = Anything(rng, known)
    answers: dict[str, int] = {}
    frame_type = msgspec.json.Decoder(AnyReply | AnySignal)
    event_type = msgspec.json.Decoder(Event)
    understood = 0
    for number in range(1500):
        if wire.closed is not None:
            assert wire.closed.code is not None
            assert wire.closed.code >= 4400, wire.closed
            wire = await house.wire("fuzz", device=f"d{number}")
        command = anything.command()
        data = msgspec.json.encode(command)
        try:
            decode_command(data)
            understood += 1
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
        try:
            await wire.raw.send_frame(TEXT, data)
            if number % 10 == 9:
                await wire.ask("ping")
        except ConnectionError:
            continue
        if number % 10 == 9:
            for frame in wire.frames:
                answers[frame["type"]] = answers.get(frame["type"], 0) + 1
                encoded = msgspec.json.encode(frame)
                (event_type if "stream" in frame and "at" in frame else frame_type).decode(encoded)
                if frame["type"] == "error":
                    assert frame["code"] in CATALOGUE, frame
                    assert frame["code"] not in ("internal", "unavailable"), f"{frame}\n{house.server.tail()}"
            wire.frames.clear()
    assert understood >= 300, f"only {understood} of the frames were commands"
    assert answers.get("error", 0) >= 200
    assert len(answers) >= 8, answers
    said = house.server.stderr_path.read_text() + house.server.stdout_path.read_text()
    assert "Traceback" not in said
    assert "command_failed" not in said
