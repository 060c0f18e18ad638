"""What a scenario found out: numbers over several runs, their median and spread, and the goal beside them."""

from __future__ import annotations

import statistics
from typing import Literal

import msgspec


class Goal(msgspec.Struct, frozen=True):
    """`at_most` or `at_least` this value, in the unit of the measure."""

    kind: Literal["at_most", "at_least"]
    value: float

    def met(self, value: float) -> bool:
        return value <= self.value if self.kind == "at_most" else value >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.kind == 'at_most' else '≥'} {number(self.value)}"


def at_most(value: float) -> Goal:
    return Goal("at_most", value)


def at_least(value: float) -> Goal:
    return Goal("at_least", value)


class Measure(msgspec.Struct):
    """One line of the report. Without a goal it only explains the lines that have one."""

    name: str
    unit: str
    goal: Goal | None = None
    runs: list[float] = []

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def met(self) -> bool | None:
        """None without a goal."""
        return None if self.goal is None else self.goal.met(self.median)


class Findings:
    """Collects the measures of one scenario in the order in which they first appear."""

    def __init__(self) -> None:
        self.measures: dict[str, Measure] = {}
        self.notes: list[str] = []

    def add(self, name: str, value: float, unit: str, goal: Goal | None = None) -> None:
        """Add one run's value of a measure."""
        measure = self.measures.get(name)
        if measure is None:
            measure = self.measures[name] = Measure(name, unit, goal, [])
        measure.runs.append(value)

    def note(self, text: str) -> None:
        """A sentence under the table; said once."""
        if text not in self.notes:
            self.notes.append(text)


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share (0 to 1) of `values` does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]
