"""Coming back: exactly what was missed from any cursor, or an explicit no; each device for itself alone."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checks.house import House, Wire, assert_gapless, wait_until
from tidings.client.errors import Refused
from tidings.testing.rawsocket import TEXT, encode_frame

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Messages under way while a channel is filled: below the server's bound of commands in flight.
FILL_WINDOW = 200


async def fill(wire: Wire, channel: str, count: int, prefix: str) -> int:
    """Send `count` messages as fast as they are taken; the head after them."""
    seq = 0
    for start in range(0, count, FILL_WINDOW):
        size = min(FILL_WINDOW, count - start)
        frames = [
            {"type": "message.send", "channel": channel, "key": f"{prefix}{start + n}", "text": f"{start + n}"}
            for n in range(size - 1)
        ]
        await wire.raw.send_bytes(b"".join(encode_frame(TEXT, msgspec.json.encode(frame)) for frame in frames))
        reply = await wire.send(channel, f"{start + size - 1}", key=f"{prefix}{start + size - 1}")
        assert reply["type"] == "message.sent", reply
        seq = reply["seq"]
    return seq


async def resumed(house: House, user: str, positions: dict[str, Any], *, device: str = "d1") -> Wire:
    return await house.wire(user, device=device, connect={"positions": positions})


async def missed_from_any_cursor(house: House, count: int) -> None:
    await house.users("far", "writer")
    channel = await house.channel("far", "writer")
    writer = await house.wire("writer")
    head = await fill(writer, channel, count, "m")
    await writer.close()
    epoch, log = await house.log(channel) if count <= 1000 else (await _epoch(house, channel), [])
    rng = random.Random(count)
    for cursor in (0, head, head - 1, *(rng.randrange(head) for _ in range(3))):
        reader = await resumed(house, "far", {channel: {"seq": cursor, "epoch": epoch}})
        await reader.until(
            lambda reader=reader: any(f["type"] == "synced" and f["stream"] == channel for f in reader.frames),
            f"{channel} was caught up on from {cursor}",
            120,
        )
        assert_gapless(reader.seqs(channel), cursor + 1, head, f"resumed from {cursor}")
        texts = [event["data"]["text"] for event in reader.events if event["type"] == "message.created"]
        assert texts == [str(number) for number in range(max(0, cursor - 3), count)]
        await reader.close()
    assert not log or len(log) == head


async def _epoch(house: House, channel: str) -> str:
    return (await house.rest.streams.events(channel, 0, limit=1)).epoch


@pytest.mark.timeout(180)
async def test_d10_ten_thousand_missed_messages_come_from_any_cursor(house: House) -> None:
    await missed_from_any_cursor(house, 10_000)


@pytest.mark.soak
async def test_d10_a_hundred_thousand_missed_messages_come_from_any_cursor(house: House) -> None:
    await missed_from_any_cursor(house, 100_000)


async def test_d11_a_cursor_that_cannot_be_resumed_from_is_an_explicit_error(house: House) -> None:
    await house.rest.app.put_channel_type("fresh", history="since_join")
    await house.users("eve", "fay")
    mine = await house.channel("eve", "fay")
    foreign = await house.channel("fay")
    epoch = await _epoch(house, mine)
    recent = await house.channel("fay", type="fresh")
    fay = await house.wire("fay")
    for number in range(5):
        await fay.send(recent, "before eve", key=f"b{number}")
    await house.rest.members.add(recent, ["eve"])
    recent_epoch = await _epoch(house, recent)

    wire = await resumed(
        house,
        "eve",
        {
            mine: {"seq": 1, "epoch": "another"},
            foreign: {"seq": 0},
            "no-such-channel": {"seq": 0},
            recent: {"seq": 1, "epoch": recent_epoch},
        },
    )
    await wire.until(lambda: any(f["type"] == "syncing" for f in wire.frames), "refusals were told")
    (syncing,) = [frame for frame in wire.frames if frame["type"] == "syncing"]
    codes = {name: refused["code"] for name, refused in syncing["refused"].items()}
    assert codes == {
        mine: "epoch_changed",
        foreign: "not_found",
        "no-such-channel": "not_found",
        recent: "cursor_expired",
    }
    ahead = await wire.ask("sync", positions={mine: {"seq": 999, "epoch": epoch}})
    assert ahead["refused"][mine]["code"] == "position_ahead"
    assert ahead["refused"][mine]["head"] == 3

    for since in ("nonsense", "-1", "zz", "0" * 60):
        refused = await (await Wire.open(house.server.port)).ask(
            "connect", token=house.token("eve"), device={"id": "d2"}, since=since
        )
        assert (refused["type"], refused["code"]) == ("error", "cursor_invalid"), since
    eve = house.rest.as_user("eve")
    for channel, after, wanted, code in (
        (mine, 1, "another", "epoch_changed"),
        (mine, 999, epoch, "position_ahead"),
        (recent, 1, recent_epoch, "cursor_expired"),
        (foreign, 0, None, "not_found"),
    ):
        with pytest.raises(Refused) as error:
            await eve.streams.events(channel, after, epoch=wanted)
        assert error.value.code == code


@pytest_asyncio.fixture(loop_scope="module")
async def flood(house: House) -> AsyncIterator[str]:
    """A channel in which somebody never stops talking. `gus` and `hal` are in it."""
    await house.users("gus", "hal")
    channel = await house.channel("gus", "hal")
    wire = await house.wire("hal")

    async def talk() -> None:
        number = 0
        while True:
            await asyncio.gather(*(wire.send(channel, "x", key=f"f{number + n}") for n in range(4)))
            number += 4

    talking = asyncio.create_task(talk())
    try:
        yield channel
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)


@pytest.mark.timeout(180)
async def test_d13_nothing_falls_between_history_and_live_in_a_thousand_connections(house: House, flood: str) -> None:
    epoch = await _epoch(house, flood)

    async def lane(number: int) -> None:
        position, mark = 0, None
        device = f"lane{number}"
        for round in range(100):
            match round % 3:
                case 0:
                    # Says what it has.
                    seq = max(0, position - 5)
                    wire = await resumed(house, "gus", {flood: {"seq": seq, "epoch": epoch}}, device=device)
                    first = seq + 1
                case 1:
                    # Says since when, and then what it has.
                    wire = await house.wire("gus", device=device, connect={"since": mark})
                    moved = wire.frames[0].get("moved", [])
                    assert flood in [head["stream"] for head in moved]
                    assert not wire.seqs(flood), "a held stream is not sent"
                    await wire.ask("sync", positions={flood: {"seq": position, "epoch": epoch}})
                    first = position + 1
                case _:
                    # Says nothing, and takes the latest page.
                    wire = await house.wire("gus", device=device)
                    page = await wire.ask("history", channel=flood, limit=1)
                    first = page["head"] + 1
            mark = wire.frames[0]["mark"]
            await wire.until(
                lambda wire=wire, first=first: (wire.seqs(flood) or [0])[-1] >= first + 1, "something live came"
            )
            seqs = wire.seqs(flood)
            await wire.close()
            if round % 3 == 2:
                # Live from some point before the page on: the page and what is live must overlap or touch.
                assert seqs[0] <= first, f"lane {number}: {first} fell between the page and live ({seqs[:3]})"
            else:
                assert seqs[0] == first, f"lane {number}, round {round}: {seqs[:3]} instead of {first}"
            assert_gapless(seqs, seqs[0], seqs[-1], f"lane {number}, round {round}")
            position = seqs[-1]

    await asyncio.gather(*(lane(number) for number in range(10)))


async def test_d14_each_device_has_its_own_position(house: House) -> None:
    await house.users("ian", "jo")
    channel = await house.channel("ian", "jo")
    epoch = await _epoch(house, channel)
    devices = [await house.wire("ian", device=f"d{number}") for number in range(3)]
    marks = [wire.frames[0]["mark"] for wire in devices]
    for wire in devices[1:]:
        await wire.close()
    jo = await house.wire("jo")
    for number in range(10):
        await jo.send(channel, f"{number}", key=f"k{number}")
    await devices[0].until_seq(channel, 13)
    reply = await devices[0].ask("ack", positions={channel: 13})
    assert reply["type"] == "done"
    await devices[0].ask("read", channel=channel, seq=13)

    def rows() -> list[tuple[Any, ...]]:
        return house.sql("SELECT device, seq FROM device_positions WHERE sid=? ORDER BY device", house.sid(channel))

    async with asyncio.timeout(10):
        while not rows():
            await asyncio.sleep(0.02)  # why: the pace of a loop that looks at a condition
    assert rows() == [("d0", 13)], "one device's acknowledgement was written for another"
    # The second says since when, the third what it has; the first has read everything meanwhile.
    second = await house.wire("ian", device="d1", connect={"since": marks[1]})
    assert channel in [head["stream"] for head in second.frames[0]["moved"]]
    await second.ask("sync", positions={channel: {"seq": 3, "epoch": epoch}})
    third = await resumed(house, "ian", {channel: {"seq": 5, "epoch": epoch}}, device="d2")
    await second.until_seq(channel, 13)
    await third.until_seq(channel, 13)
    assert_gapless(second.seqs(channel), 4, 13, "the second device")
    assert_gapless(third.seqs(channel), 6, 13, "the third device")
    await jo.send(channel, "to all three", key="last")
    for wire in (devices[0], second, third):
        await wire.until_seq(channel, 14)


async def test_d15_acknowledging_more_than_was_sent_is_refused_as_a_whole(house: House) -> None:
    await house.users("kim")
    first, second = await house.channel("kim"), await house.channel("kim")
    wire = await house.wire("kim")
    reply = await wire.ask("ack", positions={first: 2, second: 3})
    assert (reply["type"], reply.get("code"), reply.get("bound")) == ("error", "position_ahead", 2)
    assert second in reply["field"]
    read = await wire.ask("read", channel=first, seq=3)
    assert (read["type"], read.get("code")) == ("error", "position_ahead")
    assert (await wire.ask("read", channel=first, seq=2))["read"] == 2
    assert house.sql("SELECT seq FROM device_positions WHERE sid=?", house.sid(second)) == []


async def test_d15_the_slower_of_two_devices_takes_nobody_back(house: House) -> None:
    await house.users("lea", "max")
    channel = await house.channel("lea", "max")
    max_ = await house.wire("max")
    for number in range(6):
        await max_.send(channel, f"{number}", key=f"k{number}")
    fast, slow = [await house.wire("lea", device=name) for name in ("fast", "slow")]

    def told() -> list[tuple[int, int]]:
        return [
            (receipt.get("delivered", 0), receipt.get("read", 0))
            for frame in max_.frames
            if frame["type"] == "receipts" and frame["channel"] == channel
            for receipt in frame["receipts"]
            if receipt["user"] == "lea"
        ]

    await fast.ask("ack", positions={channel: 8})
    await max_.until(lambda: told() and told()[-1][0] == 8, "the delivery was told")
    await fast.ask("read", channel=channel, seq=5)
    await max_.until(lambda: told()[-1] == (8, 5), "the reading was told")
    await slow.ask("ack", positions={channel: 6})
    written = "SELECT seq FROM device_positions WHERE sid=? AND device='slow'"
    await wait_until(lambda: house.sql(written, house.sid(channel)) == [(6,)], "the slow one's position was written")
    await fast.ask("ack", positions={channel: 9})
    await max_.until(lambda: told()[-1][0] == 9, "the next delivery was told")
    assert told() == sorted(told()), f"a position that was told went down: {told()}"


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_d15_shuffled_receipts_only_ever_move_positions_forward(house: House, data: st.DataObject) -> None:
    head = 12
    name = f"nia{data.draw(st.integers(0, 10**12))}"
    await house.users(name, "ole")
    channel = await house.channel(name, "ole")
    ole = await house.wire("ole", device=name)
    await fill(ole, channel, head - 3, "k")
    devices = [await house.wire(name, device=f"d{number}") for number in range(3)]
    steps = data.draw(
        st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from(["ack", "read"]), st.permutations(range(1, head + 4))),
            min_size=1,
            max_size=4,
        )
    )
    read = 0
    for device, kind, seqs in steps:
        for seq in seqs:
            if kind == "ack":
                reply = await devices[device].ask("ack", positions={channel: seq})
            else:
                reply = await devices[device].ask("read", channel=channel, seq=seq)
            if seq > head:
                assert reply.get("code") == "position_ahead"
            elif kind == "read":
                read = max(read, seq)
                assert reply["read"] == read
            else:
                assert reply["type"] == "done"
    told = [
        (receipt.get("delivered", 0), receipt.get("read", 0))
        for frame in ole.frames
        if frame["type"] == "receipts" and frame["channel"] == channel
        for receipt in frame["receipts"]
        if receipt["user"] == name
    ]
    for before, after in itertools.pairwise(told):
        assert after[0] >= before[0], told
        assert after[1] >= before[1], told
    for wire in (*devices, ole):
        await wire.close()


async def test_d16_resuming_needs_a_token_and_gives_nobody_elses_stream(house: House) -> None:
    await house.users("pia", "mallory")
    secret = await house.channel("pia")
    pia = await house.wire("pia")
    await pia.send(secret, "between us", key="k")

    stranger = await Wire.open(house.server.port)
    await stranger.post("sync", positions={secret: {"seq": 0}, "@me": {"seq": 0}})
    closed = await stranger.until_closed()
    assert closed.code == 4401
    assert not stranger.events

    mallory = await resumed(house, "mallory", {secret: {"seq": 0}, "@me": {"seq": 0}})
    reply = await mallory.ask("sync", positions={secret: {"seq": 0}, "@me": {"seq": 0}})
    assert reply["refused"][secret]["code"] == "not_found"
    await pia.send(secret, "still between us", key="k2")
    await mallory.ask("ping")
    assert not mallory.seqs(secret)
    assert all(event["stream"] == "@me" for event in mallory.events)
    assert not any(event.get("data", {}).get("channel") == secret for event in mallory.events)
    # The own streams of two people are two streams.
    assert house.sql("SELECT count(DISTINCT sid) FROM users WHERE id IN ('pia','mallory')") == [(2,)]
    # A mark is a point in time, not a key: somebody else's shows nothing of theirs.
    other = await house.wire("mallory", device="d2", connect={"since": pia.frames[0]["mark"]})
    assert secret not in [head["stream"] for head in other.frames[0].get("moved", [])]
    with pytest.raises(Refused) as refused:
        await house.rest.as_user("mallory").streams.events(secret, 0)
    assert refused.value.code == "not_found"
