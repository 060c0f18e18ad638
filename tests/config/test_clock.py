"""Clocks and identifiers."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.server.clock import Ids, ManualClock, SystemClock, message_id_time_ms


def seeded(clock: ManualClock, seed: int = 1) -> Ids:
    return Ids(clock, random.Random(seed).randbytes)


def test_a_message_id_tells_its_time() -> None:
    clock = ManualClock(1_234_567_890_123)
    new = seeded(clock).new_message_id()
    assert re.fullmatch(r"m_[0-9A-HJKMNP-TV-Z]{26}", new)
    assert message_id_time_ms(new) == 1_234_567_890_123


@given(st.lists(st.sampled_from([-5000, -1, 0, 0, 0, 1, 7]), max_size=60), st.integers())
def test_message_ids_rise_whatever_the_clock_does(steps: list[int], seed: int) -> None:
    clock = ManualClock()
    ids = seeded(clock, seed)
    made = []
    for step in steps:
        clock.set_wall(clock.now_ms() + step)
        made.append(ids.new_message_id())
    assert all(a < b for a, b in itertools.pairwise(made))


def test_a_millisecond_that_is_full_borrows_the_next() -> None:
    clock = ManualClock()
    ids = Ids(clock, lambda count: b"\xff" * count)
    first = ids.new_message_id()
    ids._counter = Ids._COUNTER_END - 2
    last, borrowed = ids.new_message_id(), ids.new_message_id()
    assert first < last < borrowed
    assert message_id_time_ms(last) == clock.now_ms()
    assert message_id_time_ms(borrowed) == clock.now_ms() + 1


def test_two_processes_make_different_ids_in_the_same_millisecond() -> None:
    clock = ManualClock()
    a, b = seeded(clock, 1), seeded(clock, 2)
    assert not {a.new_message_id() for _ in range(1000)} & {b.new_message_id() for _ in range(1000)}


def test_ids_and_secrets_have_their_shape_and_do_not_repeat() -> None:
    ids = Ids(SystemClock())
    assert re.fullmatch(r"ch_[a-z2-7]{26}", ids.new_id("ch_"))
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", ids.new_secret())
    assert len({ids.new_id("x") for _ in range(100)} | {ids.new_secret() for _ in range(100)}) == 200


@pytest.mark.parametrize("text", ["", "m_", "m_" + "U" * 26, "my-own-id", "m_" + "0" * 25, "x_" + "0" * 26])
def test_an_id_that_the_server_did_not_make_has_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="not a message id"):
        message_id_time_ms(text)


def test_a_manual_clock_moves_only_when_told_and_never_back() -> None:
    clock = ManualClock(1000)
    clock.advance(1.5)
    assert (clock.now_ms(), clock.monotonic()) == (2500, 1.5)
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)
