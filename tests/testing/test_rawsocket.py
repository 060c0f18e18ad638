"""The raw client against a real WebSocket server (the `websockets` library), well-behaved and abusive."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve

from tidings.testing.rawsocket import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Closed,
    Frame,
    HandshakeRefused,
    RawSocket,
    encode_close,
    encode_frame,
)


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        if message == "stop":
            await connection.close(4001, "as you wish")
            return
        await connection.send(message)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serve(echo, "127.0.0.1", 0, max_size=1 << 20, compression=None, ping_interval=None) as server:
        yield server


@pytest.fixture
async def raw(server: Server) -> AsyncIterator[RawSocket]:
    async with await RawSocket.open(port_of(server)) as raw:
        await raw.handshake("/")
        yield raw


def port_of(server: Server) -> int:
    return next(iter(server.sockets)).getsockname()[1]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000])
async def test_payloads_of_every_length_form_come_back(raw: RawSocket, size: int) -> None:
    payload = bytes(number % 251 for number in range(size))
    sending = asyncio.create_task(raw.send_frame(BINARY, payload))
    assert await raw.read_frame() == Frame(BINARY, payload)
    await sending


async def test_json_goes_as_one_text_frame(raw: RawSocket) -> None:
    await raw.send_json({"type": "hello"})
    assert await raw.read_frame() == Frame(TEXT, b'{"type":"hello"}')


async def test_fragments_with_a_ping_between_are_joined_by_the_server(raw: RawSocket) -> None:
    await raw.send_frame(TEXT, b"one ", fin=False)
    await raw.send_frame(PING, b"?")
    await raw.send_frame(CONTINUATION, b"two")
    assert await raw.read_frame() == Frame(PONG, b"?")
    assert await raw.read_frame() == Frame(TEXT, b"one two")


@pytest.mark.parametrize(
    "bad",
    [
        encode_frame(TEXT, b"bare", mask=None),
        encode_frame(0x3, b"reserved opcode"),
        encode_frame(TEXT, b"x", rsv=4),
        encode_frame(CONTINUATION, b"of nothing"),
        encode_frame(PING, b"x", fin=False),
        encode_frame(PING, bytes(126)),
    ],
)
async def test_frames_against_the_rules_arrive_as_such(raw: RawSocket, bad: bytes) -> None:
    await raw.send_bytes(bad)
    assert (await raw.read_close()).code == 1002


async def test_a_length_that_lies_is_sent_as_told(raw: RawSocket) -> None:
    await raw.send_frame(TEXT, b"", declared_length=1 << 40)
    assert (await raw.read_close()).code == 1009


async def test_a_length_can_be_written_in_a_longer_form() -> None:
    assert encode_frame(TEXT, b"abc", mask=None, length_bytes=2) == b"\x81\x7e\x00\x03abc"
    assert encode_frame(TEXT, b"abc", mask=None, length_bytes=8) == b"\x81\x7f" + bytes(7) + b"\x03abc"
    assert encode_frame(TEXT, b"Hi", mask=b"\x01\x02\x03\x04") == b"\x81\x82\x01\x02\x03\x04Ik"
    with pytest.raises(ValueError, match="1, 2 or 8"):
        encode_frame(TEXT, b"", length_bytes=4)


async def test_the_servers_goodbye_is_read_with_code_and_reason(raw: RawSocket) -> None:
    await raw.send_frame(TEXT, b"stop")
    assert await raw.read_close() == Closed(4001, "as you wish")


async def test_our_own_close_is_answered(raw: RawSocket) -> None:
    await raw.send_frame(CLOSE, encode_close(1000, "bye"))
    assert (await raw.read_close()).code == 1000


async def test_a_refused_handshake_shows_the_answer(server: Server) -> None:
    async with await RawSocket.open(port_of(server)) as raw:
        with pytest.raises(HandshakeRefused) as refused:
            await raw.handshake("/", headers={"Sec-WebSocket-Version": "7"})
        assert refused.value.status in (400, 426)
    async with await RawSocket.open(port_of(server)) as raw:
        with pytest.raises(HandshakeRefused):
            await raw.handshake("/", headers={"Upgrade": None})


async def test_a_hang_up_without_goodbye_has_no_code() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with await RawSocket.open(server.sockets[0].getsockname()[1]) as raw:
        await raw.send_bytes(b"x")
        assert await raw.read_close() == Closed(None)
    server.close()


async def test_a_paused_reader_backs_the_server_up(server: Server) -> None:
    async with await RawSocket.open(port_of(server), receive_buffer=4096) as raw:
        await raw.handshake("/")
        raw.pause_reading()
        frame = encode_frame(BINARY, bytes(500_000))
        sent = 0
        try:
            async with asyncio.timeout(0.5):
                while sent < 100:
                    await raw.send_bytes(frame)
                    sent += 1
        except TimeoutError:
            pass
        assert sent < 100
        raw.resume_reading()
        assert (await raw.read_frame()).payload == bytes(500_000)
