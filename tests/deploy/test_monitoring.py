"""The dashboard and the alerts ask for metrics that exist, by labels that they have."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.deploy.files import DEPLOY, ROOT, load, text
from tidings.server.telemetry import Metrics

DECLARED = {metric.name: metric for metric in Metrics().declared}
# Of every program, by prometheus_client; `up` is Prometheus' own.
PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds"}
# What a scrape adds, and what a histogram has.
LABELS = {"job", "node", "le"}


def panels() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(text("grafana/tidings.json"))["panels"]
    return found


def rules() -> list[dict[str, object]]:
    return [rule for group in load("prometheus/alerts.yml")["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel.get("targets", []):  # type: ignore[attr-defined]
            yield f"panel {panel['title']}", target["expr"]
    for rule in rules():
        yield f"alert {rule['alert']}", str(rule["expr"])


def base(name: str) -> str:
    """The metric that a sample belongs to."""
    found = re.fullmatch(r"(.+)_(bucket|sum|count)", name)
    return found[1] if found and DECLARED.get(found[1]) and DECLARED[found[1]].kind == "histogram" else name


@pytest.mark.parametrize(("where", "expression"), [*expressions()], ids=[where for where, _ in expressions()])
def test_an_expression_asks_for_what_there_is(where: str, expression: str) -> None:
    names = set(re.findall(r"\b((?:tidings|process)_\w+)", expression))
    assert names or re.search(r"\bup\b", expression)
    known = [base(name) for name in names]
    there = set(DECLARED) | PROCESS
    assert set(known) <= there, f"no such metric: {set(known) - there}"
    for name in names:
        metric = DECLARED.get(base(name))
        if metric is not None:
            assert (metric.kind == "histogram") == (base(name) != name), f"{name} is a {metric.kind}"
            if metric.kind != "gauge":
                assert re.search(rf"rate\({name}\b", expression), f"{name} only rises: take its rate"
    labels = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
    labels |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|=|!=|!~)\"", expression))
    theirs = {label for name in known if name in DECLARED for label in DECLARED[name].labels}
    assert labels <= theirs | LABELS, f"no such labels: {labels - theirs - LABELS}"
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_is_what_its_program_writes() -> None:
    made = runpy.run_path(str(DEPLOY / "grafana/make.py"))["text"]()
    assert text("grafana/tidings.json") == made, "run: python deploy/grafana/make.py"


def test_every_metric_is_on_the_dashboard_or_in_an_alert() -> None:
    asked = {base(name) for _, expression in expressions() for name in re.findall(r"\btidings_\w+", expression)}
    assert set(DECLARED) - asked == set()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        where: dict[str, int] = panel["gridPos"]  # type: ignore[assignment]
        cells = {(where["x"] + x, where["y"] + y) for x in range(where["w"]) for y in range(where["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert where["x"] + where["w"] <= 24


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs/operate/alerts.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    alerts = [str(rule["alert"]) for rule in rules()]
    assert sorted(headings) == sorted(alerts)
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/operate/alerts.md#{str(rule['alert']).lower()}"  # type: ignore[index]
        assert rule["labels"]["severity"] in {"page", "ticket"}  # type: ignore[index]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_understands_the_rules() -> None:
    command = ["promtool", "check", "config", str(DEPLOY / "prometheus/prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
