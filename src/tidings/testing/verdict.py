"""What the history checker says: kinds of defects, findings, and the verdict."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from .history import Entry, LogEvent

Kind = Literal[
    "lost",
    "doubled",
    "reordered",
    "gap",
    "phantom",
    "leaked",
    "receipt_back",
    "diverged",
    "altered",
    "own_writes",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Finding(msgspec.Struct, frozen=True):
    """One broken promise, with the lines of the log that show it."""

    kind: Kind
    channel: str
    what: str
    entries: tuple[Entry | LogEvent, ...]


class Verdict(msgspec.Struct, frozen=True):
    """What `check` found. `counts` has every kind; `findings` keeps the first `FINDINGS_PER_KIND_MAX` of each.

    `seen` says how much was looked at (entries, operations, acknowledged, channels, devices …): a verdict over
    nothing is no verdict. `notes` names what could not be checked.
    """

    counts: dict[Kind, int]
    findings: tuple[Finding, ...]
    seen: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not any(self.counts.values())

    @property
    def broken(self) -> tuple[Kind, ...]:
        """The kinds that were found, in the order of `KINDS`."""
        return tuple(kind for kind in KINDS if self.counts[kind])

    def render(self, *, examples: int = 5) -> str:
        """Plain text for a terminal or a test's failure message, with up to `examples` findings of each kind."""
        lines = ["ok: nothing broken" if self.ok else "BROKEN: " + ", ".join(self.broken)]
        lines.append("looked at " + ", ".join(f"{number} {what}" for what, number in self.seen.items()))
        lines.append("  ".join(f"{kind} {self.counts[kind]}" for kind in KINDS))
        lines.extend(f"note: {note}" for note in self.notes)
        for kind in self.broken:
            found = [finding for finding in self.findings if finding.kind == kind]
            for finding in found[:examples]:
                lines.append(f"\n{kind} in {finding.channel or '(no channel)'}: {finding.what}")
                lines.extend(f"    {entry}" for entry in finding.entries)
            if self.counts[kind] > examples:
                lines.append(f"\n… and {self.counts[kind] - min(examples, len(found))} more {kind}")
        return "\n".join(lines)
