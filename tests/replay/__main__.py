"""`python -m tests.replay`: play the sample, or with `--full` all 1,201 visits and six days; print the verdict."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.replay.conversations import everything, sample
from tests.replay.play import Plan, Result, replay
from tidings.testing.datasets import available, read_clinic_dialogues, read_irc_days, skip_reason


async def play(seed: int, *, full: bool, folder: Path, show: bool = True) -> Result:
    """The whole data or a sample of it, under the trouble that belongs to its size."""
    rng = random.Random(seed)
    dialogues, days = read_clinic_dialogues(), read_irc_days()
    if full:
        scripts = everything(dialogues, days, rng)
        plan = Plan(seed=seed, kills=12, cut_mean_s=40.0, restarts=200, visits_at_once=16, rooms_at_once=1)
    else:
        scripts = sample(dialogues, days, rng, visits=60, lines=90)
        plan = Plan(seed=seed, kills=4, cut_mean_s=4.0, restarts=24, rooms_at_once=3)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(
            f"{len(scripts)} conversations, seed {seed}", total=sum(len(script.steps) for script in scripts)
        )
        return await replay(scripts, plan, folder, step_done=lambda: progress.advance(task))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", description=__doc__)
    parser.add_argument("--full", action="store_true", help="everything: takes many minutes")
    parser.add_argument("--seed", type=int, default=None, help="play this again; a random one otherwise")
    options = parser.parse_args()
    if not available():
        print(skip_reason())
        return 2
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    with tempfile.TemporaryDirectory(prefix="tidings-replay-") as folder:
        result = asyncio.run(play(seed, full=options.full, folder=Path(folder)))
    print(result.render())
    return 0 if result.verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
