"""Rates: what is promised to a caller, from any history of asking."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidings.server.domain.limits import Limiter, Rate

RATE = Rate(per_second=10.0, burst=5)


def test_a_burst_then_the_rate() -> None:
    limiter = Limiter(RATE)
    verdicts = [limiter.take("a", 0.0) for _ in range(6)]
    assert [verdict.allowed for verdict in verdicts] == [True] * 5 + [False]
    assert [verdict.remaining for verdict in verdicts] == [4, 3, 2, 1, 0, 0]
    assert verdicts[-1].retry_after_ms == 100
    assert not limiter.take("a", 0.099).allowed
    assert limiter.take("a", 0.1).allowed


def test_buckets_know_nothing_of_each_other() -> None:
    limiter = Limiter(RATE)
    for _ in range(5):
        limiter.take("a", 0.0)
    assert limiter.take("b", 0.0).remaining == 4


def test_what_was_refused_costs_nothing() -> None:
    limiter = Limiter(RATE)
    for _ in range(50):
        limiter.take("a", 0.0)
    assert limiter.take("a", 0.1).allowed


def test_a_bucket_that_rested_is_full_and_not_fuller() -> None:
    limiter = Limiter(RATE)
    limiter.take("a", 0.0)
    assert [limiter.take("a", 1_000.0).allowed for _ in range(6)] == [True] * 5 + [False]


@given(st.lists(st.floats(min_value=0, max_value=0.5), max_size=200))
def test_never_more_than_the_burst_and_the_rate_together(pauses: list[float]) -> None:
    limiter, now, taken = Limiter(RATE), 1000.0, 0
    for pause in pauses:
        now += pause
        verdict = limiter.take("a", now)
        taken += verdict.allowed
        assert taken <= RATE.burst + (now - 1000.0) * RATE.per_second + 1e-3
        if not verdict.allowed:
            # Coming back when told is coming back in time.
            assert Limiter.take(limiter, "a", now + verdict.retry_after_ms / 1000).allowed
            taken += 1
            now += verdict.retry_after_ms / 1000


def test_memory_is_bounded_and_the_busy_are_remembered() -> None:
    limiter = Limiter(RATE, buckets_max=100)
    for _ in range(5):
        limiter.take("busy", 0.0)
    for number in range(10_000):
        limiter.take(number, 0.0)
        limiter.take("busy", 0.0)
        assert len(limiter) <= 101
    assert not limiter.take("busy", 0.0).allowed


def test_rested_buckets_go_first() -> None:
    limiter = Limiter(RATE, buckets_max=100)
    for number in range(100):
        limiter.take(number, 0.0)
    for _ in range(5):
        limiter.take("late", 10.0)
    assert len(limiter) < 100
    assert not limiter.take("late", 10.0).allowed
