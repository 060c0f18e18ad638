"""`python -m tests.sim`: many seeded runs; a failed one names its seed, and `--seed N --trace` plays it again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from .world import Template, Verdict, make_template, run

# Seeds that a process takes at a time.
CHUNK = 25
# Failures after which no more is played: they have the same few reasons.
FAILED_MAX = 5

_template: Template | None = None


def play(seeds: range, stop_at: float) -> list[Verdict]:
    """Runs of some seeds; those that are due after `stop_at` (time.monotonic) are left out."""
    global _template
    if _template is None:
        _template = make_template()
    return [run(seed, _template) for seed in seeds if time.monotonic() < stop_at]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description="Nodes, devices, a bus and a database with trouble, in virtual time."
    )
    parser.add_argument("--seeds", type=int, default=2_000, help="how many runs (default 2,000)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--seed", type=int, help="play this one alone")
    parser.add_argument("--trace", action="store_true", help="print everything that the devices hear")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="run so many side by side")
    parser.add_argument("--seconds", type=float, default=86_400.0, help="stop after this long (default a day)")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of texts are walked in the order of their hashes: the same in every run.
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]], os.environ | {"PYTHONHASHSEED": "0"}
        )
    if options.seed is not None:
        verdict = run(options.seed, make_template(), tracing=options.trace)
        print("\n".join(verdict.wrongs) or f"seed {options.seed}: nothing wrong", dict(verdict.counts), sep="\n")
        return bool(verdict.wrongs)
    began = time.monotonic()
    counts: Counter[str] = Counter()
    failed: list[Verdict] = []
    done = 0
    last = options.first + options.seeds
    chunks = [range(start, min(start + CHUNK, last)) for start in range(options.first, last, CHUNK)]
    with ProcessPoolExecutor(options.processes) as pool:
        for verdicts in pool.map(play, chunks, [began + options.seconds] * len(chunks)):
            for verdict in verdicts:
                done += 1
                counts += verdict.counts
                if verdict.wrongs:
                    failed.append(verdict)
                    print(f"seed {verdict.seed}: {len(verdict.wrongs)} wrong, first {verdict.wrongs[0]}", flush=True)
            if len(failed) >= FAILED_MAX:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    print(f"{done} runs, {len(failed)} failed, {time.monotonic() - began:.0f} s: {dict(sorted(counts.items()))}")
    if failed:
        print(f"again: python -m tests.sim --seed {failed[0].seed} --trace")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
