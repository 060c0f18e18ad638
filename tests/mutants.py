"""Deliberate breaks of the product, each of which must turn its tests red. Run: `make mutants`, `… ARGS="-k D3"`.

A check that no break can turn red proves nothing. Each mutant is applied to a copy of `src`, and the tests that claim
to notice run against the copy. A mutant whose text is no longer in the source exactly once is stale and counts as a
failure: move it along with the code.

To add one: find the line that makes the promise true, write the smallest plausible mistake, name the tests.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]

# Longest that one mutant's tests may take, in seconds: a break that makes a test hang is noticed too.
SECONDS_MAX = 300


@dataclass(frozen=True, slots=True)
class Mutant:
    """Replace `old` by `new` in `file` (from the root; `old` occurs exactly once), and `tests` must fail.

    `check` names the promise or check that `tests` show; `tests` are pytest's arguments: files, node ids, `-k` words.
    """

    check: str
    file: str
    old: str
    new: str
    tests: Sequence[str]
    why: str = ""


MUTANTS: list[Mutant] = [
    Mutant(
        check="S4",
        why="the key's algorithm does not bind the token",
        file="src/tidings/server/services/tokens.py",
        old="if key.algorithm != header.algorithm:",
        new="if key.algorithm != header.algorithm and False:",
        tests=["tests/auth/test_tokens.py", "-k", "every_attack"],
    ),
    Mutant(
        check="S4",
        why="a token that was verified once outlives its key",
        file="src/tidings/server/services/tokens.py",
        old="if known.keyring is not keyring:",
        new="if known.keyring.app.app_id != keyring.app.app_id:",
        tests=["tests/auth/test_tokens.py", "-k", "ends_with_its_key"],
    ),
    Mutant(
        check="S5",
        why="every unknown kid fetches",
        file="src/tidings/server/services/jwks.py",
        old="return state.attempted_at is None or self._monotonic() - state.attempted_at >= self._interval_seconds",
        new="return True",
        tests=["tests/auth/test_jwks.py", "-k", "flood"],
    ),
    Mutant(
        check="S12",
        why="judge the address, then connect by name",
        file="src/tidings/server/outbound.py",
        old="            judged.append(str(address))",
        new="            judged.append(name)",
        tests=["tests/auth/test_outbound.py", "-k", "rebinding_name"],
    ),
    Mutant(
        check="D3",
        why="an unsafe store is accepted without being asked for by name",
        file="src/tidings/server/config.py",
        old='if config.store_synchronous != "full" and not config.allow_unsafe_store:',
        new='if config.store_synchronous == "off" and not config.allow_unsafe_store:',
        tests=["tests/config/test_config.py", "-k", "unsafe_store"],
    ),
    Mutant(
        check="TLS",
        why="beyond loopback without a certificate",
        file="src/tidings/server/config.py",
        old="if not config.tls and not config.behind_proxy:",
        new="if not config.tls and not config.behind_proxy and not config.public_url and config.port == 443:",
        tests=["tests/config/test_config.py", "-k", "beyond_loopback"],
    ),
    Mutant(
        check="H12",
        why="content in logs: only the outermost fields are looked at",
        file="src/tidings/server/telemetry.py",
        old="return {str(key): _clean_field(str(key), item, depth + 1) for key, item in value.items()}",
        new="return {str(key): _clean(item, depth + 1) for key, item in value.items()}",
        tests=["tests/config/test_telemetry.py", "-k", "holds_content"],
    ),
    Mutant(
        check="H12",
        why="content in logs: exceptions quote what they failed on",
        file="src/tidings/server/telemetry.py",
        old="        if self._messages:\n",
        new="        if True:\n",
        tests=["tests/config/test_telemetry.py", "-k", "exception"],
    ),
    Mutant(
        check="H12",
        why="content in logs: libraries' arguments",
        file="src/tidings/server/telemetry.py",
        old="str(record.msg).splitlines()",
        new="record.getMessage().splitlines()",
        tests=["tests/config/test_telemetry.py", "-k", "libraries"],
    ),
    Mutant(
        check="S8",
        why="tokens in logs, under a harmless name",
        file="src/tidings/server/telemetry.py",
        old="return _TOKEN.sub(WITHHELD, text)",
        new="return text",
        tests=["tests/config/test_telemetry.py", "-k", "looks_like_a_token"],
    ),
    Mutant(
        check="ids",
        why="a millisecond that is full starts again",
        file="src/tidings/server/clock.py",
        old="max(ms, self._ms + 1)",
        new="ms",
        tests=["tests/config/test_clock.py"],
    ),
    Mutant(
        check="ids",
        why="ids of one millisecond repeat",
        file="src/tidings/server/clock.py",
        old="counter = self._counter + 1",
        new="counter = self._counter",
        tests=["tests/config/test_clock.py"],
    ),
    Mutant(
        check="S1",
        why="a key with narrow scopes lists every channel",
        file="src/tidings/server/services/channels.py",
        old="or (actor.user is None and actor.may(P.CHANNEL_READ))",
        new="or actor.user is None",
        tests=["tests/api/test_access_matrix.py", "-k", "channels.list"],
    ),
    Mutant(
        check="S1",
        why="who may read a channel may do anything in it",
        file="src/tidings/server/services/access.py",
        old="            if self.grants & _READ:\n                raise Forbidden(need.value)",
        new="            if self.grants & _READ:\n                return",
        tests=["tests/api/test_access_matrix.py", "-k", "who_gets_in"],
    ),
    Mutant(
        check="S3",
        why="unknown fields of a request are dropped in silence",
        file="src/tidings/wire/requests.py",
        old="kw_only=True, forbid_unknown_fields=True):",
        new="kw_only=True):",
        tests=["tests/api/test_door.py", "-k", "only_the_server_writes"],
    ),
    Mutant(
        check="S17",
        why="whoever is refused is let in again at once",
        file="src/tidings/server/domain/limits.py",
        old="if full_at < now:",
        new="if full_at > now:",
        tests=["tests/domain/test_limits.py", "tests/api/test_door.py", "-k", "burst or too_often"],
    ),
    Mutant(
        check="D7",
        why="copies of a send that run at once do not know of each other",
        file="src/tidings/server/rest/messages.py",
        old="        self._keys.add(one)\n",
        new="        self._keys.add((0, None, '', ''))\n",
        tests=["tests/api/test_messages.py", "-k", "copies"],
    ),
    Mutant(
        check="H12",
        why="an internal error quotes what it failed on",
        file="src/tidings/server/rest/problems.py",
        old='f"This is our mistake. It is logged as {request_id}."',
        new='f"This is our mistake. It is logged as {request_id}: {error}"',
        tests=["tests/api/test_door.py", "-k", "our_mistakes"],
    ),
    Mutant(
        check="poll",
        why="a long poll takes its own last answer for news and spins",
        file="src/tidings/server/rest/sync.py",
        old='page.mark.partition(".")[2] != told',
        new='page.mark.partition(".")[2] != ""',
        tests=["tests/api/test_door.py", "-k", "own_answer"],
    ),
    Mutant(
        check="bounds",
        why="a body without a length is read to its end before it is refused",
        file="src/tidings/server/rest/factory.py",
        old=" and size <= bound:",
        new=":",
        tests=["tests/api/test_door.py", "-k", "without_a_length"],
    ),
    Mutant(
        check="metrics",
        why="metrics for everybody behind a proxy",
        file="src/tidings/server/rest/system.py",
        old="if client is None or any(name in _FORWARDED",
        new="if client is None or any(name in ()",
        tests=["tests/api/test_door.py", "-k", "neighbourhood"],
    ),
    Mutant(
        check="S19",
        why="an answer that the document does not know",
        file="src/tidings/server/rest/channels.py",
        old='    body=MembershipUpdate,\n    problems=("conflict",),',
        new="    body=MembershipUpdate,",
        tests=["tests/api/test_fuzz.py", "-k", "membership"],
    ),
    Mutant(
        check="D12",
        why="after a restore the epochs are the old ones",
        file="src/tidings/server/commands/backup.py",
        old='"UPDATE streams SET epoch=?, moved_at=? WHERE sid=?",',
        new='"UPDATE streams SET epoch=coalesce(epoch,?), moved_at=? WHERE sid=?",',
        tests=["tests/ops/test_backup.py", "-k", "another_epoch or starts_over"],
    ),
    Mutant(
        check="D12",
        why="clients that come back with a mark are not told of the new epoch",
        file="src/tidings/server/commands/backup.py",
        old='"UPDATE streams SET epoch=?, moved_at=? WHERE sid=?",',
        new='"UPDATE streams SET epoch=?, moved_at=coalesce(moved_at,?) WHERE sid=?",',
        tests=["tests/ops/test_backup.py", "-k", "starts_over"],
    ),
    Mutant(
        check="H3",
        why="an app's old key is removed while something still stands under it",
        file="src/tidings/server/services/rotation.py",
        old="            if used is not None:\n",
        new="            if False:\n",
        tests=["tests/ops/test_keys.py", "-k", "hour_later"],
    ),
    Mutant(
        check="H3",
        why="an app's old key is removed while a server may be about to use it",
        file="src/tidings/server/services/rotation.py",
        old="if not old or not (alone or now - since >= RETIRE_AFTER_MS):",
        new="if not old:",
        tests=["tests/ops/test_keys.py", "-k", "old_key_stays"],
    ),
    Mutant(
        check="H3",
        why="a rotation that was killed begins anew instead of going on",
        file="src/tidings/server/services/rotation.py",
        old="            if begun is not None:\n                return int(begun[0]), True\n",
        new="",
        tests=["tests/ops/test_keys.py", "-k", "killed_rotation"],
    ),
    Mutant(
        check="H3",
        why="an app is stored under a root key that has just been retired",
        file="src/tidings/server/crypto/keyring.py",
        old="if kid not in self._root.kids():",
        new="if False:",
        tests=["tests/ops/test_keys.py", "-k", "refused_rather_than_lost"],
    ),
]

Verdict = Literal["caught", "SURVIVED", "STALE", "BROKEN"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutant, and how long its tests took."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    note: str = ""


def run_tests(source: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and last line, with `tidings` imported from the directory `source`."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]
    # PYTHONPATH comes before the installed package, for the tests and for every server that they start.
    environ = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS_MAX)
    except subprocess.TimeoutExpired:
        # The tests' own servers are in their process group, which is ours to end.
        os.killpg(process.pid, 9)
        process.communicate()
        return 1, "hung"
    return process.returncode, (output.strip().splitlines() or [""])[-1]


def try_mutant(mutant: Mutant) -> Outcome:
    """Apply one mutant to a copy of the source and see whether its tests notice."""
    begun = time.monotonic()

    def outcome(verdict: Verdict, note: str = "") -> Outcome:
        return Outcome(mutant, verdict, time.monotonic() - begun, note)

    with tempfile.TemporaryDirectory(prefix="tidings-mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        target = Path(folder) / mutant.file
        text = target.read_text(encoding="utf-8") if target.is_file() else ""
        if (times := text.count(mutant.old)) != 1:
            return outcome("STALE", f"its text occurs {times} times in {mutant.file}")
        target.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        code, note = run_tests(source, mutant.tests)
    # pytest: 0 all passed, 1 some failed, 2 interrupted (an import failed), 4 wrong usage, 5 nothing collected.
    verdicts: dict[int, Verdict] = {0: "SURVIVED", 1: "caught", 2: "caught"}
    return outcome(verdicts.get(code, "BROKEN"), note)


def chosen(words: str) -> Iterator[Mutant]:
    """The mutants whose check is `words`, or whose check, file or reason contains it."""
    exact = [mutant for mutant in MUTANTS if mutant.check.lower() == words.lower()]
    yield from exact or (m for m in MUTANTS if words.lower() in f"{m.check} {m.file} {m.why}".lower())


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants, print a table; 0 when all were caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-k", default="", metavar="WORDS", help="only these: a check such as D3, or part of a reason")
    parser.add_argument("-l", "--list", action="store_true", help="list them and try none")
    options = parser.parse_args(arguments)
    mutants = list(chosen(options.k))
    if not mutants:
        print(f"no mutant matches {options.k!r}")
        return 1
    if options.list:
        for mutant in mutants:
            print(f"{mutant.check:<6} {mutant.file}: {mutant.why}")
        return 0
    # A test that is red without any mutant would catch them all.
    for tests in sorted({tuple(mutant.tests) for mutant in mutants}):
        code, note = run_tests(ROOT / "src", tests)
        if code != 0:
            print(f"not green to begin with: {' '.join(tests)}: {note}")
            return 1
    bad = 0
    for number, mutant in enumerate(mutants, 1):
        outcome = try_mutant(mutant)
        bad += outcome.verdict != "caught"
        print(
            f"{number:>3}/{len(mutants)} {outcome.verdict:<8} {outcome.seconds:5.1f} s  {mutant.check:<6} "
            f"{mutant.why or mutant.file}" + (f"  [{outcome.note}]" if outcome.verdict != "caught" else ""),
            flush=True,
        )
    print(f"{len(mutants) - bad} of {len(mutants)} mutants caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
