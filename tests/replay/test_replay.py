"""Real conversations, real connections, a server that is killed: nothing is lost, doubled, reordered or leaked."""

import random

import pytest

from tests.replay.__main__ import play
from tidings.testing.datasets import available, skip_reason

pytestmark = pytest.mark.skipif(not available(), reason=skip_reason())


@pytest.mark.timeout(180)
async def test_a_sample_of_real_conversations_survives_kills_and_cut_connections(tmp_path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"python -m tests.replay --seed {seed}")
    result = await play(seed, full=False, folder=tmp_path, show=False)
    assert result.verdict.ok, result.render()
    assert result.kills >= 3, result.render()
    assert result.cuts >= 30, result.render()
    assert result.caught_up >= 100, result.render()
    assert result.verdict.seen["acknowledged"] >= 800, result.render()
    print(result.render())


@pytest.mark.soak
async def test_all_real_conversations_survive_kills_and_cut_connections(tmp_path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"python -m tests.replay --full --seed {seed}")
    result = await play(seed, full=True, folder=tmp_path)
    assert result.verdict.ok, result.render()
    assert result.kills >= 10, result.render()
    print(result.render())
