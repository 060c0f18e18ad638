"""The page on capacity is what its command prints, and the command's numbers follow from what it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.capacity import BEGIN, END, PAGE, Assumed, Costs, main, measured, need, report
from bench.results import load, median, save

COSTS = Costs(connect=1000, send=200, delivery=20, store=150, memory=15, base=80)


def test_the_page_is_what_the_command_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    costs, sources = measured(load(), {})
    assert shown == report(costs, sources, Assumed()).strip(), "run: python -m bench.capacity --write"


def test_more_people_need_more_of_everything_and_a_spare_node() -> None:
    found = [need(users, COSTS, Assumed()) for users in (1_000, 10_000, 1_000_000, 100_000_000)]
    assert [one.nodes for one in found] == sorted(one.nodes for one in found)
    assert found[0].nodes == 2
    assert found[0].databases == found[1].databases == 1
    assert found[-1].databases > 1
    for one in found:
        assert one.node_load <= Assumed().load
        assert one.node_memory <= Assumed().node_memory
        assert one.connections / one.nodes <= Assumed().connections


@pytest.mark.parametrize(
    ("costs", "assumed", "bound"),
    [
        (COSTS, Assumed(sends_per_hour=600), "processor"),
        (COSTS, Assumed(connections=1_000), "connections_max"),
        (COSTS, Assumed(node_memory=256), "memory"),
    ],
)
def test_what_is_scarce_decides(costs: Costs, assumed: Assumed, bound: str) -> None:
    one = need(1_000_000, costs, assumed)
    assert one.bound_by == bound
    assert one.nodes > need(1_000_000, costs, Assumed()).nodes


def test_what_was_neither_measured_nor_given_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    assert main(["--results", str(results)]) == 1
    assert 'make bench ARGS="--save connects"' in capsys.readouterr().err
    given = ["--connect", "1", "--send", "2", "--delivery", "3", "--memory", "4", "--base", "5", "--users", "77"]
    assert main(["--results", str(results), *given]) == 0
    said = capsys.readouterr().out
    assert "| connected users | 77 |" in said
    assert "estimated, not measured" in said


def test_results_of_one_scenario_leave_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save([{"name": "a", "measures": [{"name": "m", "median": 1.0}]}, {"name": "b", "measures": []}], path)
    save([{"name": "a", "measures": [{"name": "m", "median": 2.0}]}], path)
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert median(load(path), "a", "m") == 2.0
    assert median(load(path), "b", "m") is None
