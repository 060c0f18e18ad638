"""Scripts for the replay, made from real conversations: who says what, who comes and goes, what answers what."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from tidings.testing.datasets import Dialogue, IrcDay

Action = Literal["say", "join", "leave"]

# A clinic's staff: each doctor has some sixty of the patients.
DOCTORS = 20

_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9_.+\-]")


class Step(msgspec.Struct, frozen=True):
    """One thing that a person does. `reply_to`: the number of the step whose message this one answers."""

    who: str
    action: Action
    text: str = ""
    reply_to: int | None = None


class Script(msgspec.Struct, frozen=True):
    """One conversation. `members`: who is in it from the beginning."""

    id: str
    kind: Literal["direct", "group", "room"]
    members: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def people(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.members, *(step.who for step in self.steps))))


def clinic_script(dialogue: Dialogue, rng: random.Random) -> Script:
    """A visit: a doctor and a patient alone (direct), or with family and colleagues (a group)."""
    doctor = f"doctor.{rng.randrange(DOCTORS)}"
    names = {
        speaker: doctor if speaker == "doctor" else f"{speaker}.{dialogue.id}"
        for speaker in ("doctor", "patient", *dialogue.speakers)
    }
    steps = tuple(Step(names[turn.speaker], "say", turn.text) for turn in dialogue.turns if turn.text)
    members = tuple(dict.fromkeys(names.values()))
    return Script(f"visit.{dialogue.id}", "direct" if len(members) == 2 else "group", members, steps)


def irc_script(day: IrcDay, first: int = 0, last: int | None = None) -> Script:
    """A day in a support channel, or its lines from `first` up to but without `last`. A new nick is the same person."""
    lines = day.lines[first:last]
    persons: dict[str, str] = {}
    taken: set[str] = set()

    def person(nick: str) -> str:
        if nick not in persons:
            name = f"irc.{day.name[:10]}.{_NOT_IN_IDS.sub('_', nick)}"
            while name in taken:
                name += "_"
            taken.add(name)
            persons[nick] = name
        return persons[nick]

    inside: set[str] = set()
    outside: set[str] = set()
    members: dict[str, None] = {}
    steps: list[Step] = []
    step_of: dict[int, int] = {}
    for line in lines:
        if line.kind == "notice" or not line.nick:
            continue
        who = person(line.nick)
        if line.kind == "nick":
            if (old := persons.pop(line.nick, None)) is not None and line.text not in persons:
                persons[line.text] = old
            continue
        if line.kind == "join":
            if who not in inside:
                inside.add(who)
                outside.discard(who)
                steps.append(Step(who, "join"))
            continue
        if who not in inside:
            inside.add(who)
            if who in outside:
                outside.discard(who)
                steps.append(Step(who, "join"))
            else:
                # Was there before the lines begin.
                members[who] = None
        if line.kind == "leave":
            inside.discard(who)
            outside.add(who)
            steps.append(Step(who, "leave"))
        elif line.text:
            answered = next((step_of[index] for index in reversed(line.reply_to) if index in step_of), None)
            step_of[line.index] = len(steps)
            steps.append(Step(who, "say", line.text, answered))
    return Script(f"irc.{day.name[:10]}.{first}", "room", tuple(members), tuple(steps))


def sample(
    dialogues: Sequence[Dialogue], days: Sequence[IrcDay], rng: random.Random, *, visits: int, lines: int
) -> list[Script]:
    """A random part: so many visits, and of each day so many lines on end."""
    scripts = [clinic_script(dialogue, rng) for dialogue in rng.sample(list(dialogues), visits)]
    for day in days:
        first = rng.randrange(max(1, len(day.lines) - lines))
        scripts.append(irc_script(day, first, first + lines))
    return scripts


def everything(dialogues: Sequence[Dialogue], days: Sequence[IrcDay], rng: random.Random) -> list[Script]:
    """All of it."""
    return [*(clinic_script(dialogue, rng) for dialogue in dialogues), *(irc_script(day) for day in days)]
