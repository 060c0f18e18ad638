"""House rules that no linter knows, and the linters themselves.

Each rule is a function from a source file to what is wrong in it, and is tried on a sample that breaks it: a rule that
cannot fail is no rule. An exception is written at its line, with its reason: the rule's message says how.
"""

import ast
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("src", "tests", "bench", "docs", "deploy", "sdk")
PROSE = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "pyproject.toml")
TEXT = frozenset(
    [".py", ".md", ".toml", ".js", ".mjs", ".ts", ".json", ".yaml", ".yml", ".sh", ".html", ".css", ".sql", ".service"]
)
SKIPPED = {"node_modules", "__pycache__", "dist"}

# Beyond this a module has several subjects; the middle of a message's flow is where files grow.
LINES_MAX = 900


@dataclass(frozen=True)
class Source:
    """A file of the repository: its path from the root, and its text."""

    path: PurePosixPath
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def excused(self, number: int, phrase: str) -> bool:
        """Whether the line, or the comment line above it, gives its reason with `phrase`."""
        above = self.lines[number - 2].strip() if number > 1 else ""
        return phrase in self.lines[number - 1] or (above.startswith("#") and phrase in above)

    def within(self, *folders: str) -> bool:
        return any(self.path.is_relative_to(folder) for folder in folders)


Rule = Callable[[Source], Iterator[tuple[int, str]]]


@cache
def repository() -> tuple[Source, ...]:
    paths = [
        path for folder in SHIPPED for path in (ROOT / folder).rglob("*") if path.suffix in TEXT and path.is_file()
    ]
    paths += [ROOT / name for name in PROSE if (ROOT / name).exists()]
    relative = sorted(path.relative_to(ROOT) for path in paths)
    return tuple(
        Source(PurePosixPath(path), (ROOT / path).read_text(encoding="utf-8"))
        for path in relative
        if not SKIPPED & set(path.parts)
    )


def calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


# --- the rules ------------------------------------------------------------------------------------


def tasks_have_owners(source: Source) -> Iterator[tuple[int, str]]:
    if not source.within("src"):
        return
    for call, name in calls(source):
        last = name.rpartition(".")[2]
        in_group = re.search(r"(^|[._])(tg|group|tasks?_?group)\.create_task$", name)
        if last not in {"create_task", "ensure_future"} or in_group:
            continue
        if not source.excused(call.lineno, "# owned by "):
            yield (
                call.lineno,
                "a task without an owner dies unheard: keep it, hear its end, and say `# owned by <whom>`",
            )


def nothing_prints(source: Source) -> Iterator[tuple[int, str]]:
    if (
        not source.within("src")
        or source.path.name in {"cli.py", "demo.py"}
        or source.within("src/tidings/server/commands")
    ):
        return
    for call, name in calls(source):
        if name == "print":
            yield call.lineno, "log an event (telemetry.get_logger), or let the command line print it"


def names_say_what_is_inside(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.suffix == ".py" and re.fullmatch(r"_?(utils?|helpers?|misc|common)", source.path.stem):
        yield 1, "a name that fits everything: name the module for what it does"
    folder = source.path.parent.name
    if source.path.suffix == ".py" and folder in {"utils", "util", "helpers", "misc", "common"}:
        yield 1, "a folder name that fits everything: name it for what it does"


UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b|raise NotImplemented" r"Error\b")


def nothing_is_left_for_later(source: Source) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.lines, 1):
        if UNFINISHED.search(line) and not source.excused(number, "# why:"):
            yield number, "finish it, or say in the docs what is missing; later does not come"


def waits_are_for_conditions(source: Source) -> Iterator[tuple[int, str]]:
    if not source.within("tests", "src/tidings/testing"):
        return
    for call, name in calls(source):
        fixed = bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value != 0
        if (name == "time.sleep" or (name in {"asyncio.sleep", "sleep"} and fixed)) and not source.excused(
            call.lineno, "# why:"
        ):
            yield call.lineno, "a fixed wait is too long here and too short there: wait for the condition, or `# why:`"


CONTRACTS = ("src/tidings/wire", "src/tidings/server/services", "src/tidings/client")
CONTRACT_FILES = {"src/tidings/server/store/base.py", "src/tidings/server/bus/base.py"}


def contracts_are_written_down(source: Source) -> Iterator[tuple[int, str]]:
    if source.path.suffix != ".py" or not (source.within(*CONTRACTS) or str(source.path) in CONTRACT_FILES):
        return
    scopes: list[ast.Module | ast.ClassDef] = [source.tree]
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                scopes.append(node)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            plain = not any("overload" in ast.unparse(d) or d == "override" for d in node.decorator_list)
            if plain and ast.get_docstring(node) is None and not source.excused(node.lineno, "# contract: "):
                yield node.lineno, f"{node.name}() needs a docstring: what it promises, units, errors"


# Written in two parts, so that this file does not break its own rule.
MACHINE = re.compile(r"(?<![\w.~-])/(work|t" r"mp|root|home/\w+)/")


def no_path_of_one_machine(source: Source) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.lines, 1):
        if MACHINE.search(line) and not source.excused(number, "# why:"):
            yield number, "exists on one machine only: take it from a setting, or use a temporary directory (tmp_path)"


MAKING = re.compile(
    r"\b(cla"
    r"ude|anth"
    r"ropic|open"
    r"ai|chat"
    r"gpt|copi"
    r"lot|ll"
    r"m|language mod"
    r"el|AI-gen\w+|as an A"
    r"I"
    r"|sub"
    r"agents?|issue \d+|issue #\d+)\b",
    re.IGNORECASE,
)


def nothing_tells_how_it_was_made(source: Source) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.lines, 1):
        if MAKING.search(line) and not source.excused(number, "# why:"):
            yield number, "says how it was made; say what it does"


def files_have_one_subject(source: Source) -> Iterator[tuple[int, str]]:
    if source.within("src") and len(source.lines) > LINES_MAX:
        yield LINES_MAX, f"{len(source.lines)} lines: split it where its subjects meet"


ADAPTERS = re.compile(
    r"tidings\.server\.(store\.(sqlite|postgres)|bus\.(?!base\b)\w+|blob\.(?!base\b)\w+|push\.(?!base\b)\w+)"
)


def only_the_composition_root_names_adapters(source: Source) -> Iterator[tuple[int, str]]:
    server = PurePosixPath("src/tidings/server")
    if source.path.suffix != ".py" or not source.within(str(server)):
        return
    inside = source.path.relative_to(server)
    # app wires them; the command line works on a store offline (migrate, backup); an adapter may have several files.
    if inside.parts[0] in {"app.py", "cli.py", "commands", "doctor.py", "demo.py"}:
        return
    for node in ast.walk(source.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            found = ADAPTERS.match(name)
            if found and f"tidings.server.{inside.parts[0]}." not in name:
                yield node.lineno, f"names the adapter {found[0]}: take the port in the constructor; app.py chooses"
                break


# rule: a file and a text that it must refuse, and a text that it must let pass.
RULES: dict[Rule, tuple[str, str, str]] = {
    tasks_have_owners: (
        "src/x.py",
        "asyncio.create_task(f())",
        "asyncio.create_task(f())  # owned by the session\nasync with x as group:\n    group.create_task(f())",
    ),
    nothing_prints: ("src/x.py", "print(1)", "log.info('x')"),
    names_say_what_is_inside: ("src/utils.py", "", ""),
    nothing_is_left_for_later: ("src/x.py", "x = 1  # TO" + "DO", "x = 1  # done"),
    waits_are_for_conditions: (
        "tests/x.py",
        "asyncio.sleep(0.1)",
        "asyncio.sleep(0)\nasyncio.sleep(1)  # why: the subject",
    ),
    contracts_are_written_down: (
        "src/tidings/wire/x.py",
        "class A:\n    def f(self): ...",
        "class A:\n    def f(self):\n        'F.'\n    def _g(self): ...\nclass _B:\n    def h(self): ...",
    ),
    no_path_of_one_machine: ("docs/x.md", "see /wo" + "rk/here", "see /var/lib/tidings, tests/tmp/x and ./work/"),
    nothing_tells_how_it_was_made: ("docs/x.md", "made by Cla" + "ude", "an openair e-mail to all; issues are welcome"),
    files_have_one_subject: ("src/x.py", "\n" * (LINES_MAX + 1), "\n" * LINES_MAX),
    only_the_composition_root_names_adapters: (
        "src/tidings/server/services/x.py",
        "from tidings.server.bus import local",
        "from tidings.server.bus import base\nfrom tidings.server.store.base import Store",
    ),
}
PYTHON_ONLY = {tasks_have_owners, nothing_prints, waits_are_for_conditions}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_rules_hold(rule: Rule) -> None:
    found = [
        f"{source.path}:{number}: {message}"
        for source in repository()
        if source.path.suffix == ".py" or rule not in PYTHON_ONLY
        for number, message in rule(source)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_house_rule_can_be_broken_and_kept(rule: Rule) -> None:
    path, broken, kept = RULES[rule]
    assert list(rule(Source(PurePosixPath(path), broken)))
    kept_path = path.replace("utils", "frames")
    assert not list(rule(Source(PurePosixPath(kept_path), kept)))


# --- the linters ----------------------------------------------------------------------------------

SCRIPTS = Path(sysconfig.get_path("scripts"))
LINTERS = {
    "ruff check": [sys.executable, "-m", "ruff", "check", "."],
    "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "mypy": [sys.executable, "-m", "mypy", "--strict"],
    "imports": [str(SCRIPTS / "lint-imports")],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("linter", LINTERS)
def test_the_linters_have_nothing_to_say(linter: str) -> None:
    done = subprocess.run(LINTERS[linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"`make check` shows it alone; `make format` mends the form\n{done.stdout}{done.stderr}"
    )
