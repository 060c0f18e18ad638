"""Real conversations between clients of three nodes, while everything breaks that can: nothing is lost, doubled,
reordered or leaked, and half a minute after it is mended everybody has everything."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.checks.house import House
from tests.cluster.site import open_site
from tests.cluster.trouble import Troubles
from tests.replay.conversations import Script, Step, clinic_script, irc_script
from tests.replay.play import Plan, Play, Result, replay
from tidings.testing.datasets import available, read_clinic_dialogues, read_irc_days

DRAIN_SECONDS = 2


def conversations(rng: random.Random, visits: int, rooms: int) -> list[Script]:
    """Real ones where they are at hand; more than will be played, for they begin as long as there is trouble."""
    if not available():
        return [made_up(number, rng) for number in range(visits)]
    scripts = [clinic_script(dialogue, rng) for dialogue in rng.sample(list(read_clinic_dialogues()), visits)]
    days = read_irc_days()
    for number in range(rooms):
        day = days[number % len(days)]
        first = rng.randrange(len(day.lines) - 60)
        scripts.insert(number * 4, irc_script(day, first, first + 60))
    return scripts


def made_up(number: int, rng: random.Random) -> Script:
    people = (f"doctor.{rng.randrange(20)}", f"patient.{number}")
    steps = tuple(Step(people[place % 2], "say", f"{number}, turn {place}") for place in range(20))
    return Script(f"visit.{number}", "direct", people, steps)


async def play_with_trouble(
    seed: int, folder: Path, *, rounds: int, visits: int, rooms: int
) -> tuple[Result, Troubles]:
    rng = random.Random(seed)
    troubles: list[Troubles] = []

    @asynccontextmanager
    async def open_at(_: Path) -> AsyncIterator[House]:
        async with open_site(TIDINGS_DRAIN_SECONDS=str(DRAIN_SECONDS)) as site:
            troubles.append(Troubles(site, seed, rounds))
            yield site.house

    async def make_trouble(play: Play, steps: int) -> None:
        await troubles[0](play, steps)

    plan = Plan(
        seed=seed,
        kills=0,
        cut_mean_s=15.0,
        restarts=0,
        visits_at_once=10,
        rooms_at_once=1,
        pause_s=0.5,
        for_trouble=True,
    )
    scripts = conversations(rng, visits, rooms)
    result = await replay(scripts, plan, folder, open_at=open_at, make_trouble=make_trouble)
    return result, troubles[0]


@pytest.mark.timeout(240)
async def test_nothing_is_lost_while_nodes_database_and_bus_fail(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    result, troubles = await play_with_trouble(seed, tmp_path, rounds=1, visits=300, rooms=6)
    print(result.render(), troubles.converged)
    assert result.verdict.ok, result.render()
    assert len(troubles.converged) == 6
    assert result.verdict.seen["acknowledged"] >= 100, result.render()
    assert result.caught_up >= 20, result.render()


@pytest.mark.soak
async def test_nothing_is_lost_while_everything_fails_again_and_again(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    result, troubles = await play_with_trouble(seed, tmp_path, rounds=20, visits=1_200, rooms=60)
    print(result.render(), troubles.converged)
    assert result.verdict.ok, result.render()
    assert all(len(took) == 20 for took in troubles.converged.values())
    assert result.verdict.seen["acknowledged"] >= 5_000, result.render()
