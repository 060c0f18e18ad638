"""Each fault of the chaos proxy, seen from real sockets on both sides."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from tidings.testing.chaos import LOOPBACK, ChaosProxy

PATIENCE_S = 5.0


class Echo:
    """Answers every chunk with the same bytes, and remembers what came."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.ends: list[str] = []
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(1 << 16):
                self.received.append(chunk)
                writer.write(chunk)
                await writer.drain()
            self.ends.append("end")
            writer.write(b"goodbye")
            await writer.drain()
        except ConnectionError:
            self.ends.append("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    server = await asyncio.start_server(echo, LOOPBACK, 0)
    echo.port = server.sockets[0].getsockname()[1]
    yield echo
    server.close()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[ChaosProxy]:
    async with ChaosProxy(echo.port, seed=1) as proxy:
        yield proxy


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), PATIENCE_S)


async def connect(proxy: ChaosProxy) -> Client:
    client = Client(*await asyncio.open_connection(LOOPBACK, proxy.port))
    assert await client.ask(b"hello") == b"hello"
    return client


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)  # why: polls a condition


async def is_silent(client: Client, seconds: float = 0.1) -> bool:
    """Nothing comes and nothing ends for a while (that nothing happens can only be seen by waiting)."""
    try:
        await asyncio.wait_for(client.reader.read(1), seconds)
    except TimeoutError:
        return True
    return False


async def test_without_faults_bytes_pass_both_ways_and_are_counted(proxy: ChaosProxy, echo: Echo) -> None:
    client = await connect(proxy)
    data = bytes(range(256)) * 4096
    assert await client.ask(data) == data
    assert proxy.stats.bytes_up == proxy.stats.bytes_down == len(data) + 5
    client.writer.write_eof()
    assert await client.reader.read() == b"goodbye"
    await wait_until(lambda: proxy.open_connections == 0)
    assert echo.ends == ["end"]


async def test_latency_delays_each_way(proxy: ChaosProxy) -> None:
    client = await connect(proxy)
    proxy.set(latency_s=0.1, jitter_s=0.02)
    began = time.monotonic()
    await client.ask(b"slow")
    assert time.monotonic() - began >= 0.2


async def test_latency_does_not_cost_throughput_or_order(proxy: ChaosProxy) -> None:
    client = await connect(proxy)
    proxy.set(latency_s=0.1, jitter_s=0.1)
    sent = b""
    began = time.monotonic()
    for number in range(30):
        part = b"%03d" % number
        client.writer.write(part)
        await client.writer.drain()
        await asyncio.sleep(0.001)  # why: polls a condition
        sent += part
    assert await asyncio.wait_for(client.reader.readexactly(len(sent)), PATIENCE_S) == sent
    assert time.monotonic() - began < 30 * 0.2


async def test_a_cap_slows_a_large_answer(proxy: ChaosProxy) -> None:
    client = await connect(proxy)
    proxy.set(bytes_per_s=100_000)
    began = time.monotonic()
    await client.ask(bytes(20_000))
    assert time.monotonic() - began >= 0.2


async def test_a_cut_resets_both_sides(proxy: ChaosProxy, echo: Echo) -> None:
    clients = [await connect(proxy) for _ in range(3)]
    assert proxy.cut(1) == 1
    await wait_until(lambda: echo.ends == ["reset"])
    assert proxy.cut() == 2
    for client in clients:
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(client.reader.read(1), PATIENCE_S)
    await wait_until(lambda: echo.ends == ["reset"] * 3)
    assert proxy.stats.cuts == 3
    await connect(proxy)


async def test_random_cuts_come_by_themselves_until_healed(proxy: ChaosProxy) -> None:
    client = await connect(proxy)
    proxy.set(cut_mean_s=0.02)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(client.reader.read(1), PATIENCE_S)
    assert proxy.stats.random_cuts == 1
    proxy.heal()
    assert await is_silent(await connect(proxy), 0.2)


async def test_a_black_hole_up_holds_what_is_sent_until_healed(proxy: ChaosProxy, echo: Echo) -> None:
    client = await connect(proxy)
    proxy.set(stall_up=True)
    client.writer.write(b"into the dark")
    assert await is_silent(client)
    assert echo.received == [b"hello"]
    proxy.heal()
    assert await asyncio.wait_for(client.reader.readexactly(13), PATIENCE_S) == b"into the dark"


async def test_a_black_hole_down_holds_the_answer_and_the_end(proxy: ChaosProxy, echo: Echo) -> None:
    client = await connect(proxy)
    proxy.set(stall_down=True)
    client.writer.write(b"heard")
    client.writer.write_eof()
    await wait_until(lambda: echo.ends == ["end"])
    assert await is_silent(client)
    proxy.set(stall_down=False)
    assert await asyncio.wait_for(client.reader.read(), PATIENCE_S) == b"heardgoodbye"


async def test_the_nth_reply_is_dropped_after_its_request_arrived(proxy: ChaosProxy, echo: Echo) -> None:
    client = await connect(proxy)
    proxy.drop_reply(2, matching=lambda chunk: chunk.startswith(b"write"))
    assert await client.ask(b"write 1") == b"write 1"
    assert await client.ask(b"read 1") == b"read 1"
    client.writer.write(b"write 2")
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(client.reader.read(1), PATIENCE_S)
    assert echo.received == [b"hello", b"write 1", b"read 1", b"write 2"]
    assert proxy.stats.replies_dropped == 1
    again = await connect(proxy)
    assert await again.ask(b"write 2") == b"write 2"


async def test_a_share_of_the_replies_is_dropped(proxy: ChaosProxy, echo: Echo) -> None:
    proxy.set(drop_reply_share=0.5)
    lost = 0
    for number in range(30):
        reader, writer = await asyncio.open_connection(LOOPBACK, proxy.port)
        writer.write(b"%d" % number)
        try:
            assert await asyncio.wait_for(reader.read(10), PATIENCE_S) == b"%d" % number
        except ConnectionResetError:
            lost += 1
        writer.close()
    assert len(echo.received) == 30
    assert lost == proxy.stats.replies_dropped
    assert 5 < lost < 25


async def test_new_connections_are_refused_and_then_taken_on_the_same_port(proxy: ChaosProxy) -> None:
    client = await connect(proxy)
    await proxy.refuse_connections()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(LOOPBACK, proxy.port)
    assert await client.ask(b"still here") == b"still here"
    await proxy.accept_connections()
    await connect(proxy)


async def test_half_closing_up_ends_the_targets_input_only(proxy: ChaosProxy, echo: Echo) -> None:
    client = await connect(proxy)
    assert proxy.half_close("up") == 1
    assert await asyncio.wait_for(client.reader.readexactly(7), PATIENCE_S) == b"goodbye"
    assert echo.ends == ["end"]


async def test_half_closing_down_ends_the_clients_input_only(proxy: ChaosProxy, echo: Echo) -> None:
    client = await connect(proxy)
    proxy.half_close("down")
    assert await asyncio.wait_for(client.reader.read(), PATIENCE_S) == b""
    client.writer.write(b"still going up")
    await wait_until(lambda: b"still going up" in echo.received)


async def test_a_target_that_is_away_shows_as_a_reset(proxy: ChaosProxy) -> None:
    # The proxy's own reserved port of another proxy refuses: nobody listens there.
    async with ChaosProxy(proxy.target_port) as other:
        await other.refuse_connections()
        proxy.target_port = other.port
        reader, _ = await asyncio.open_connection(LOOPBACK, proxy.port)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), PATIENCE_S)
    assert proxy.stats.unreachable == 1


async def test_connections_are_spread_over_the_targets_that_are_there(echo: Echo) -> None:
    another = Echo()
    server = await asyncio.start_server(another, LOOPBACK, 0)
    another.port = server.sockets[0].getsockname()[1]
    async with ChaosProxy(echo.port, another.port, seed=1) as proxy:
        for _ in range(20):
            await (await connect(proxy)).ask(b"hello")
        assert echo.received
        assert another.received
        server.close()
        there = len(another.received)
        for _ in range(10):
            await (await connect(proxy)).ask(b"hello again")
        assert len(another.received) == there
        assert proxy.stats.unreachable == 0


async def test_an_unknown_fault_is_refused(proxy: ChaosProxy) -> None:
    with pytest.raises(TypeError):
        proxy.set(gremlins=True)
    with pytest.raises(ValueError, match="counts from 1"):
        proxy.drop_reply(0)
