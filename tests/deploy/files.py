"""The deployment files, read as data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def load(path: str) -> Any:
    """The one document of a YAML file under `deploy`."""
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def text(path: str) -> str:
    """A file under `deploy` as text."""
    return (DEPLOY / path).read_text(encoding="utf-8")


def manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every document of every Kubernetes file."""
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path, document


def manifest(kind: str) -> dict[str, Any]:
    """The only document of this kind."""
    (found,) = [document for _, document in manifests() if document["kind"] == kind]
    return found


def seconds(value: object) -> float:
    """`90`, `90s`, `10m` or `1h` as seconds."""
    found = re.fullmatch(r"(\d+)([smh]?)", str(value))
    assert found, f"{value} is no duration"
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def directive(name: str, file: str = "nginx.conf") -> str:
    """The value of nginx's directive that occurs once."""
    (found,) = set(re.findall(rf"^\s*{name}\s+([^;]+);", text(file), re.MULTILINE))
    return found
