"""The JavaScript reference names everything that the SDK has, and theming every property."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "sdk/js/src"
# A method, an accessor or a field of a class that is not private.
MEMBER = re.compile(r"^  (?:async |get |set )?([a-z]\w*)(?: ?=|\(|;)", re.MULTILINE)
FIELD = re.compile(r"^    this\.([a-z]\w*) = ", re.MULTILINE)
WORDS = {"constructor", "return", "if", "for", "while", "switch", "do"}


@pytest.mark.parametrize("module", ["client", "channel", "thread"])
def test_every_member_is_on_the_page(module: str) -> None:
    page = (ROOT / "docs/reference/javascript.md").read_text()
    source = (CLIENT / f"{module}.js").read_text()
    members = {*MEMBER.findall(source), *FIELD.findall(source)} - WORDS
    assert len(members) >= 9
    assert [name for name in sorted(members) if not re.search(rf"`{name}\b", page)] == []


def test_every_export_is_on_the_page() -> None:
    page = (ROOT / "docs/reference/javascript.md").read_text()
    exported = re.findall(r"export \{ (\w+) \}", (CLIENT / "index.js").read_text())
    assert len(exported) == 5
    assert [name for name in exported if name not in page] == []


def test_every_function_of_push_is_on_the_page() -> None:
    page = (ROOT / "docs/reference/javascript.md").read_text()
    for module in ("push", "push-worker"):
        exported = re.findall(r"^export (?:async )?function (\w+)", (CLIENT / f"{module}.js").read_text(), re.MULTILINE)
        assert exported
        assert [name for name in exported if f"`{name}(" not in page] == []


def test_every_property_and_part_is_in_the_guide() -> None:
    page = (ROOT / "docs/guides/theming.md").read_text()
    source = "".join(path.read_text() for path in sorted((ROOT / "sdk/components/src").glob("*.js")))
    properties = set(re.findall(r"var\((--tidings-[\w-]+)", source))
    parts = {word for found in re.findall(r'part: "([\w -]+)"', source) for word in found.split()}
    assert len(properties) > 10
    assert [name for name in sorted(properties) if f"`{name}`" not in page] == []
    assert [name for name in sorted(parts) if f"`{name}`" not in page] == []


def test_every_hook_is_in_the_guide() -> None:
    page = (ROOT / "docs/start/web.md").read_text()
    hooks = re.findall(r"export (?:function|const) (\w+)", (ROOT / "sdk/react/src/index.js").read_text())
    assert len(hooks) > 10
    assert [name for name in hooks if not re.search(rf"\b{name}\b", page)] == []
