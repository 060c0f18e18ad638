"""Many seeded runs of nodes, devices, a bus and a database with trouble; a failed one names its seed."""

from __future__ import annotations

import subprocess
import sys

import pytest


def simulate(*words: str) -> str:
    """The runner's words. Fails with them, the failed seeds among them, when anything was wrong."""
    done = subprocess.run([sys.executable, "-m", "tests.sim", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_same_seed_gives_the_same_run() -> None:
    assert simulate("--seed", "7", "--trace") == simulate("--seed", "7", "--trace")


# Two thousand runs take a minute of two cores; a machine that is busy or slow may take several times as long.
@pytest.mark.timeout(900)
def test_nothing_is_lost_doubled_reordered_or_shown_to_the_wrong_person_whatever_happens() -> None:
    said = simulate("--seeds", "2000")
    assert "2000 runs, 0 failed" in said


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nor_in_many_more_runs() -> None:
    assert " 0 failed" in simulate("--first", "100001", "--seeds", "40000")
