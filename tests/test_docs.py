"""The documents are true where a program can tell: links lead somewhere, generated pages are current."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs.generate import DOCS, PAGES

from tidings.server.domain.notify import Reason
from tidings.server.domain.permissions import Permission
from tidings.server.domain.standard_webhooks import SCHEDULE
from tidings.server.rest.asyncapi import command_types, tag_of
from tidings.wire.events import EventType
from tidings.wire.problems import CATALOGUE

ROOT = Path(__file__).parents[1]
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
# A path of this repository that prose names in code type.
PATH = re.compile(
    r"`((?:src/tidings|tests|docs|server|wire|client|store|services|gateway|rest)/[\w./-]+\.(?:py|md|mjs))(?::\w+)?`"
)
# Prose names modules from here when it does not begin at the root.
BASES = (ROOT, ROOT / "src/tidings", ROOT / "src/tidings/server")


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> Iterator[tuple[Path, str]]:
    for page in TEXTS:
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in LINK.findall(CODE.sub("", prose)):
            if not re.match(r"[a-z]+:", target):
                yield page, target


@pytest.mark.parametrize(
    ("page", "target"), [*links()], ids=[f"{page.relative_to(ROOT)}->{target}" for page, target in links()]
)
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    assert found.exists(), f"{page.relative_to(ROOT)} links to {target}"
    assert not anchor or anchor in anchors(found), f"{target} has no such heading"


@pytest.mark.parametrize("path", PAGES)
def test_a_generated_page_is_current(path: str) -> None:
    assert (DOCS / path).read_text(encoding="utf-8") == PAGES[path](), "run `make docs`"


@pytest.mark.parametrize("page", TEXTS, ids=[str(page.relative_to(ROOT)) for page in TEXTS])
def test_files_that_are_named_exist(page: Path) -> None:
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert any((base / path).exists() for base in BASES), f"{page.name} names {path}"


def text_of(*pages: str) -> str:
    return "\n".join((DOCS / page).read_text(encoding="utf-8") for page in pages)


def test_every_word_of_the_interface_is_documented() -> None:
    for words, page in (
        ({problem for problem in CATALOGUE}, "reference/problems.md"),
        ({word.value for word in Permission}, "reference/permissions.md"),
    ):
        missing = {word for word in words if f"`{word}`" not in text_of(page)}
        assert not missing, f"{page} does not know {missing}"
    for words, page in (
        ({event.value for event in EventType}, "protocol/events.md"),
        ({tag_of(command) for command in command_types()}, "protocol/frames.md"),
    ):
        missing = {word for word in words if f"### {word}\n" not in text_of(page)}
        assert not missing, f"{page} has no heading for {missing}"


def test_every_code_in_the_protocol_pages_is_in_the_catalogue() -> None:
    """A code that was renamed does not live on in prose."""
    prose = text_of("protocol/frames.md", "protocol/catching-up.md", "protocol/errors.md", "protocol/polling.md")
    named = set(re.findall(r"[Rr]efused with (.+?)(?:\.|:|\n\n|;)", prose, re.DOTALL))
    codes = {code for sentence in named for code in re.findall(r"`([a-z_]+[a-z])`", sentence)}
    assert len(codes) > 10
    assert codes - {"mention_all"} <= set(CATALOGUE)


def test_every_reason_of_a_push_is_explained_and_the_schedule_is_the_published_one() -> None:
    for reason in Reason:
        assert f"| `{reason.value}` |" in text_of("guides/trace.md")
    waits = ["5 s", "5 min", "30 min", "2 h", "5 h", "10 h", "10 h"]
    assert f"| after the one before | {' | '.join(waits)} |" in text_of("guides/webhooks.md")
    units = {"s": 1, "min": 60, "h": 3_600}
    assert (0, *(int(wait.split()[0]) * units[wait.split()[1]] for wait in waits)) == SCHEDULE


def test_every_decision_is_listed_and_short() -> None:
    index = text_of("decisions/README.md")
    for page in (DOCS / "decisions").glob("0*.md"):
        assert page.name in index
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 40, f"{page.name}: a record is a page"
