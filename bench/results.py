"""The last results of each scenario, kept beside the code that they were measured with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("results.json")


def load(path: Path = PATH) -> dict[str, dict[str, Any]]:
    """Each scenario's last results by its name; empty when nothing was kept."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(results: list[dict[str, Any]], path: Path = PATH) -> None:
    """Keep these, and what is there of other scenarios."""
    kept = load(path)
    for result in results:
        kept[result["name"]] = {key: value for key, value in result.items() if key != "name"}
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def median(results: dict[str, dict[str, Any]], scenario: str, measure: str) -> float | None:
    """A measure's median, None when it was not measured."""
    for found in results.get(scenario, {}).get("measures", []):
        if found["name"] == measure:
            return float(found["median"])
    return None
