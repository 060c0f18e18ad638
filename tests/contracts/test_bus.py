"""The buses under their contract, and what only the one over NATS promises."""

from __future__ import annotations

import asyncio
import base64
import binascii
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.tls import make_certificate
from tidings.server.bus import nats as nats_bus
from tidings.server.bus.base import Bus, Lost, Published, Signal
from tidings.server.bus.local import LocalBus
from tidings.server.bus.nats import NatsBus
from tidings.server.bus.nats_link import Credentials, NatsRefused, public_nkey, read_address, read_credentials
from tidings.server.errors import BusUnavailable
from tidings.server.telemetry import Metrics
from tidings.testing.chaos import ChaosProxy
from tidings.testing.nats import NatsProcess, nats_cluster

from .bus_contract import APP, ApartContract, BusContract, BusSite, Ear, through, until


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nodes tell themselves a second after connecting would come into the middle of any case."""
    monkeypatch.setattr(nats_bus, "INTEREST_SECONDS", 3_600.0)


class LocalSite:
    apart = False

    def __init__(self) -> None:
        self._bus = LocalBus()

    async def open(self) -> Bus:
        return self._bus


class NatsSite:
    """Nodes around one NATS server, or several."""

    apart = True

    def __init__(self, *urls: str) -> None:
        self.urls = urls
        self.opened: list[NatsBus] = []

    async def open(self, *urls: str, **options: Any) -> NatsBus:
        bus = NatsBus(
            [read_address(url) for url in urls or self.urls],
            node=f"node{len(self.opened)}",
            metrics=Metrics(),
            **options,
        )
        await bus.open(5)
        self.opened.append(bus)
        return bus

    async def close(self) -> None:
        for bus in self.opened:
            await bus.close()


class TestLocal(BusContract):
    @pytest.fixture
    def site(self) -> BusSite:
        return LocalSite()


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsProcess]:
    async with NatsProcess(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def around(nats: NatsProcess) -> AsyncIterator[NatsSite]:
    site = NatsSite(nats.url)
    yield site
    await site.close()


class TestNats(ApartContract):
    @pytest.fixture
    def site(self, around: NatsSite) -> BusSite:
        return around


class TestNatsClusterOfServers(BusContract):
    """Nodes at different servers. Interest needs a moment to be known at the others: what waits for that moment is
    not in this list, and heads are compared for it."""

    @pytest.fixture
    async def site(self, tmp_path: Path) -> AsyncIterator[BusSite]:
        async with nats_cluster(tmp_path, 2) as servers:

            class Spread(NatsSite):
                async def open(self, *urls: str, **options: Any) -> NatsBus:
                    bus = await super().open(servers[len(self.opened) % 2].url, **options)
                    settle = bus.settle

                    async def settle_everywhere() -> bool:
                        settled = await settle()
                        for one in self.opened:
                            for other in self.opened:
                                if one is not other:
                                    await _interest_is_known(one, other)
                        return settled

                    bus.settle = settle_everywhere  # type: ignore[method-assign]
                    await settle_everywhere()
                    return bus

            site = Spread()
            yield site
            await site.close()


async def _interest_is_known(bus: NatsBus, other: NatsBus) -> None:
    # Interests travel between servers in their order: when the last one is known, all are.
    answers = asyncio.Event()
    number = bus._link.subscribe(b"tidings.probe.%d" % id(answers), lambda *_: answers.set())
    while not answers.is_set():
        other._link.publish(b"tidings.probe.%d" % id(answers), b"")
        try:
            async with asyncio.timeout(0.01):
                await answers.wait()
        except TimeoutError:
            pass
    bus._link.unsubscribe(number)


async def test_interest_is_kept_for_a_while_and_then_given_up(
    around: NatsSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await around.open(), await around.open()
    there = Ear(b)
    b.follow(7)
    b.unfollow(7)
    await b.settle()
    a.publish(Published(7, 1, b"x"))
    await there.hears(Published(7, 1, b"x"))
    # Back in time: the subscription is the same one, and the servers hear nothing of it.
    before = b._streams.numbers[7]
    b.follow(7)
    assert b._streams.numbers[7] == before
    b.unfollow(7)
    monkeypatch.setattr(nats_bus, "UNFOLLOW_SECONDS", 0.0)
    await until(lambda: 7 not in b._streams.numbers)
    await b.settle()
    a.publish(Published(7, 2, b"y"))
    await through(a, there)
    assert there.count(Published(7, 2, b"y")) == 0


async def test_ten_thousand_streams_are_followed_in_one_write(around: NatsSite) -> None:
    a, b = await around.open(), await around.open()
    there = Ear(b)
    wire = b._link._wire
    assert wire is not None
    writes = []
    real = wire.write
    wire.write = lambda data: (writes.append(len(data)), real(data))  # type: ignore[func-returns-value,assignment,method-assign]
    for sid in range(10_000):
        b.follow(sid)
    assert await b.settle()
    assert len([size for size in writes if size > 100]) == 1
    said = [Published(sid, 1, b"x") for sid in (0, 4_999, 9_999)]
    for notice in said:
        a.publish(notice)
    await there.hears(*said)


async def test_what_is_too_large_to_carry_is_told_without_its_bytes(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 2000\n")
    async with NatsProcess(tmp_path / "nats", arguments=("-c", str(config))) as nats:
        site = NatsSite(nats.url)
        a, b = await site.open(), await site.open()
        b.follow(7)
        await b.settle()
        there = Ear(b)
        a.publish(Published(7, 1, b"x" * 3_000))
        a.publish(Signal(APP, b"x" * 3_000, sid=7))
        await through(a, there)
        assert there.heard[0] == Published(7, 1, b"")
        assert len(there.heard) == 2
        await site.close()


async def test_settling_waits_until_the_server_knows(nats: NatsProcess, around: NatsSite) -> None:
    async with ChaosProxy(nats.port) as proxy:
        a = await around.open()
        b = await around.open(f"nats://127.0.0.1:{proxy.port}")
        there = Ear(b)
        proxy.set(latency_s=0.05)
        for sid in range(1, 4):
            b.follow(sid)
            assert await b.settle()
            a.publish(Published(sid, 1, b"x"))
            await there.hears(Published(sid, 1, b"x"))


# ---------------------------------------------------------------- losing NATS and finding it again


async def test_a_node_that_was_cut_off_says_so_and_hears_again(nats: NatsProcess, around: NatsSite) -> None:
    async with ChaosProxy(nats.port) as proxy:
        a = await around.open(f"nats://127.0.0.1:{proxy.port}")
        b = await around.open()
        here, there = Ear(a), Ear(b)
        a.follow(7)
        b.follow(7)
        await a.settle()
        await b.settle()
        await proxy.refuse_connections()
        proxy.cut()
        await until(lambda: not a.connected)
        assert not await a.settle()
        a.publish(Published(7, 1, b"lost"))
        b.publish(Published(7, 2, b"missed"))
        assert a._metrics.bus_dropped.value == 1
        a.follow(8)
        await proxy.accept_connections()
        await until(lambda: a.connected)
        await here.hears(Lost())
        await there.hears(Lost())
        b.publish(Published(7, 3, b"x"))
        b.publish(Published(8, 1, b"y"))
        await here.hears(Published(7, 3, b"x"), Published(8, 1, b"y"))
        a.publish(Published(7, 4, b"z"))
        await there.hears(Published(7, 4, b"z"))
        assert there.count(Published(7, 1, b"lost")) == here.count(Published(7, 2, b"missed")) == 0
        assert a._metrics.bus_reconnects.value == 1


async def test_a_server_that_falls_silent_is_given_up_within_seconds(nats: NatsProcess, around: NatsSite) -> None:
    async with ChaosProxy(nats.port) as proxy:
        a = await around.open(f"nats://127.0.0.1:{proxy.port}")
        proxy.set(stall_up=True, stall_down=True)
        await until(lambda: not a.connected)
        proxy.heal()
        proxy.cut()
        await until(lambda: a.connected)


async def test_who_is_not_read_from_costs_bounded_memory_and_tells_of_the_loss_later(
    nats: NatsProcess, around: NatsSite
) -> None:
    async with ChaosProxy(nats.port) as proxy:
        a = await around.open(f"nats://127.0.0.1:{proxy.port}")
        b = await around.open()
        b.follow(7)
        await b.settle()
        there = Ear(b)
        proxy.set(stall_up=True)
        payload = b"x" * 100_000
        seq = 0
        while not a._metrics.bus_dropped.value:
            seq += 1
            a.publish(Published(7, seq, payload))
            await asyncio.sleep(0)
            assert seq < 1_000
        proxy.heal()
        await there.hears(Lost())
        a.publish(Published(7, seq + 1, b"after"))
        await there.hears(Published(7, seq + 1, b"after"))


async def test_nodes_move_to_another_server_when_theirs_dies(tmp_path: Path) -> None:
    async with nats_cluster(tmp_path, 3) as servers:
        site = NatsSite(*(server.url for server in servers))
        a, b = await site.open(servers[0].url), await site.open(servers[1].url)
        # It was told one server, and has learnt of the others from that.
        b.follow(7)
        await b.settle()
        here, there = Ear(a), Ear(b)
        servers[0].kill9()
        servers[1].kill9()
        await here.hears(Lost())
        await there.hears(Lost())

        async def heard() -> None:
            seq = 0
            while not any(isinstance(notice, Published) for notice in there.heard):
                seq += 1
                a.publish(Published(7, seq, b"x"))
                await asyncio.sleep(0.01)  # why: the servers tell each other of the interest in their own time

        async with asyncio.timeout(10):
            await heard()
        await site.close()


async def test_what_was_said_before_interest_was_known_everywhere_is_made_good(
    around: NatsSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_bus, "INTEREST_SECONDS", 0.01)
    here = Ear(await around.open())
    await here.hears(Lost())


# ---------------------------------------------------------------- getting in


async def test_a_bus_that_cannot_be_reached_says_which_servers_were_tried(around: NatsSite) -> None:
    bus = NatsBus([read_address("nats://127.0.0.1:1")], node="a")
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1: "):
        await bus.open(0.1)
    await bus.close()


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        (("--user", "tidings", "--pass", "s3cret"), "tidings:s3cret\n", "tidings:wrong"),
        (("--auth", "t0ken"), "t0ken\n", "other"),
    ],
    ids=["password", "token"],
)
async def test_credentials_come_from_a_file(tmp_path: Path, options: tuple[str, ...], good: str, bad: str) -> None:
    async with NatsProcess(tmp_path / "nats", arguments=options) as nats:
        path = tmp_path / "bus.creds"
        site = NatsSite(nats.url)
        path.write_text(bad)
        with pytest.raises(NatsRefused, match="Authorization"):
            await site.open(credentials=lambda: read_credentials(path))
        with pytest.raises(NatsRefused):
            await site.open()
        path.write_text(good)
        bus = await site.open(credentials=lambda: read_credentials(path))
        assert await bus.settle()
        await site.close()


def nkey(seed: bytes) -> str:
    """A user's seed as `nsc` and `nk` write it: kinds in two bytes, the seed, a checksum, in base 32."""
    raw = bytes([0x90 | 0xA0 >> 5, (0xA0 & 31) << 3]) + seed
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


async def test_an_nkey_signs_what_the_server_asks(tmp_path: Path) -> None:
    seed = bytes(range(32))
    config, path = tmp_path / "nats.conf", tmp_path / "user.nk"
    config.write_text("authorization: { users: [ { nkey: " + public_nkey(seed) + " } ] }")
    async with NatsProcess(tmp_path / "nats", arguments=("-c", str(config))) as nats:
        site = NatsSite(nats.url)
        path.write_text(nkey(bytes(32)))
        with pytest.raises(NatsRefused):
            await site.open(credentials=lambda: read_credentials(path))
        path.write_text(nkey(seed) + "\n")
        bus = await site.open(credentials=lambda: read_credentials(path))
        assert await bus.settle()
        await site.close()


def test_a_creds_file_holds_a_jwt_and_a_seed(tmp_path: Path) -> None:
    path = tmp_path / "user.creds"
    path.write_text(
        "-----BEGIN NATS USER JWT-----\neyJ0.a.b\n------END NATS USER JWT------\n\n"
        "************************* IMPORTANT *************************\nKeep it safe.\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{nkey(bytes(range(32)))}\n------END USER NKEY SEED------\n"
    )
    assert read_credentials(path) == Credentials(jwt="eyJ0.a.b", seed=bytes(range(32)))
    for wrong in ("", "-----BEGIN NATS USER JWT-----\neyJ0.a.b\n", "-----BEGIN X-----\na\n-----BEGIN Y-----\nb\n"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"user\.creds"):
            read_credentials(path)


async def test_tls_is_spoken_where_the_url_or_the_server_says_so(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    options = ("--tls", "--tlscert", str(cert), "--tlskey", str(key))
    async with NatsProcess(tmp_path / "nats", arguments=options) as nats:
        trusting = ssl.create_default_context(cafile=str(cert))
        site = NatsSite(f"tls://127.0.0.1:{nats.port}", nats.url)
        a = await site.open(f"tls://127.0.0.1:{nats.port}", tls=trusting)
        b = await site.open(nats.url, tls=trusting)
        b.follow(7)
        await b.settle()
        there = Ear(b)
        a.publish(Published(7, 1, b"x" * 100_000))
        await there.hears(Published(7, 1, b"x" * 100_000))
        # Nobody is spoken to whose certificate is not trusted.
        stranger = NatsBus([read_address(f"tls://127.0.0.1:{nats.port}")], node="c")
        with pytest.raises(BusUnavailable, match=r"(?i)certificate"):
            await stranger.open(0.1)
        await stranger.close()
        await site.close()
