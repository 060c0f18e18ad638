"""Readers for the real conversations that tests, benchmarks and demonstrations run on.

The data is not part of the repository. It is looked for in the folder that the environment
variable `TIDINGS_SHARED_DATA` names, else in `../shared/data` beside the repository:

- `clinic-dialogues/mts-dialog-train.csv`: MTS-Dialog (Ben Abacha, Yim, Fan, Lin, EACL 2023), CC BY 4.0.
- `ubuntu-irc/*.raw.txt` with `*.annotation.txt`: IRC disentanglement (Kummerfeld et al., ACL 2019), CC BY 4.0.

Ask `available()` (or show `skip_reason()`) before reading; the readers raise `DatasetMissing` otherwise.
"""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

DATA_VARIABLE = "TIDINGS_SHARED_DATA"
CLINIC_FILE = "clinic-dialogues/mts-dialog-train.csv"
IRC_FOLDER = "ubuntu-irc"

# The annotators read, but did not annotate, the first thousand lines of a day: they are context,
# and a link that touches them is not a real one (the data's own README).
IRC_FIRST_ANNOTATED_LINE = 1000

_REPOSITORY = Path(__file__).resolve().parents[3]

# Longest first: `guest_family` must not be cut short to `guest`. The keys are what is in the file, in lower case.
_MISSPELT_SPEAKERS = {
    "docotr": "doctor",
    "gest_family": "guest_family",
    "guest_clinican": "guest_clinician",
}
_SPEAKER_LINE = re.compile(r"^\s*([A-Za-z][A-Za-z_]*?)_?(\d*)\s*:\s*(.*)$")

_MESSAGE = re.compile(r"^\[(\d\d:\d\d)\] <([^>]*)> ?(.*)$")
_ACTION = re.compile(r"^\[(\d\d:\d\d)\]\s+\* (\S+) ?(.*)$")
# The corpus puts a blank behind a "]" inside some nicks ("[B] obby"); it is taken out again.
_JOIN_OR_LEAVE = re.compile(r"^=== (\S+(?:\] ?\S+)?) +\[\S+@\S+\]\s+has (joined|left) (.*)$")
_KICK = re.compile(r"^=== (\S+) was kicked off (.*)$")
_NICK = re.compile(r"^=== (\S+) is now known as (\S+)\s*$")
_CHANNEL_CHANGE = re.compile(r"^=== ((?:mode/|\.\.\[topic/)\S+) (.*)$", re.IGNORECASE)
# Before 2007 an action is written like a notice, but without the double blank and the bracketed host.
_NOTICE_ACTION = re.compile(r"^=== (\S+) (.*)$")

LineKind = Literal["message", "action", "join", "leave", "nick", "notice"]


class DatasetMissing(Exception):
    """The folder with the real conversations is not on this machine; `str()` says where it was looked for."""


class Turn(msgspec.Struct, frozen=True):
    """One person's turn. `speaker`: `doctor`, `patient`, `guest_family`, `guest_clinician`, `doctor_2` …"""

    speaker: str
    text: str


class Dialogue(msgspec.Struct, frozen=True):
    """One conversation in a clinic. `speakers` in the order of their first turn, each once."""

    id: str
    turns: tuple[Turn, ...]
    speakers: tuple[str, ...]


class Line(msgspec.Struct, frozen=True):
    """One line of a day. `index` counts from 0, as the annotations do.

    `kind` is `leave` for a kick, too, and `notice` for changes of mode or topic and what is left over.
    `time` is "HH:MM" or "" (joins, leaves and nick changes carry none). `text` is the new nick for `nick`.
    `reply_to` holds indexes of the lines that this one answers, ascending; `starts` says that
    the annotators marked it as the beginning of a conversation.
    """

    index: int
    kind: LineKind
    nick: str
    text: str
    time: str = ""
    reply_to: tuple[int, ...] = ()
    starts: bool = False


class IrcDay(msgspec.Struct, frozen=True):
    """One day of a public support channel. `speakers`: nicks that said something, in order of their first message."""

    name: str
    lines: tuple[Line, ...]
    speakers: tuple[str, ...]


def data_folder() -> Path:
    """Where the data is expected; it need not exist."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named else _REPOSITORY.parent / "shared" / "data"


def available() -> bool:
    """Whether both collections can be read here."""
    return (data_folder() / CLINIC_FILE).is_file() and (data_folder() / IRC_FOLDER).is_dir()


def skip_reason() -> str:
    """What a skipped test should say."""
    return f"the real conversations are not in {data_folder()} (set {DATA_VARIABLE} to their folder)"


def read_clinic_dialogues() -> list[Dialogue]:
    """All conversations, in the order of the file. Raises `DatasetMissing`."""
    path = data_folder() / CLINIC_FILE
    if not path.is_file():
        raise DatasetMissing(skip_reason())
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [parse_dialogue(row["ID"], row["dialogue"]) for row in csv.DictReader(file)]


def parse_dialogue(dialogue_id: str, text: str) -> Dialogue:
    """Read `Speaker: text` lines; a line without a speaker goes on with the turn before it."""
    turns: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = _SPEAKER_LINE.match(line)
        if match and (speaker := _normalise_speaker(match[1], match[2])):
            turns.append((speaker, [match[3].strip()]))
        elif line.strip() and turns:
            turns[-1][1].append(line.strip())
        elif line.strip():
            raise ValueError(f"dialogue {dialogue_id} begins with a line that names no speaker")
    made = tuple(Turn(speaker, "\n".join(part for part in parts if part)) for speaker, parts in turns)
    return Dialogue(dialogue_id, made, tuple(dict.fromkeys(turn.speaker for turn in made)))


def _normalise_speaker(name: str, number: str) -> str:
    """The speaker's name as all dialogues write it, or "" if these words are not a speaker."""
    name = _MISSPELT_SPEAKERS.get(name.lower(), name.lower())
    if name not in ("doctor", "patient", "guest_family", "guest_clinician"):
        return ""
    return f"{name}_{number}" if number else name


def read_irc_days() -> list[IrcDay]:
    """The six days, oldest first. Raises `DatasetMissing`."""
    folder = data_folder() / IRC_FOLDER
    if not folder.is_dir():
        raise DatasetMissing(skip_reason())
    days = []
    for raw in sorted(folder.glob("*.raw.txt")):
        name = raw.name.removesuffix(".raw.txt")
        annotation = raw.with_name(f"{name}.annotation.txt").read_text(encoding="utf-8")
        days.append(parse_irc_day(name, raw.read_text(encoding="utf-8"), annotation))
    return days


def parse_irc_day(
    name: str, raw: str, annotation: str, *, first_annotated_line: int = IRC_FIRST_ANNOTATED_LINE
) -> IrcDay:
    """Read one day and its links (`earlier later -` per line; a line linked to itself starts a conversation).

    Links that touch a line before `first_annotated_line` are dropped. Raises `ValueError` for a link to a line
    that does not exist or that runs backwards.
    """
    # Not splitlines(): people paste form feeds and other characters that it takes for line ends.
    texts = raw.split("\n")
    if texts and not texts[-1]:
        texts.pop()
    replies: dict[int, set[int]] = {}
    starts: set[int] = set()
    for link in annotation.split("\n"):
        if not link.strip():
            continue
        earlier, later = (int(part) for part in link.split()[:2])
        if not 0 <= earlier <= later < len(texts):
            raise ValueError(f"{name}: the link {earlier} → {later} does not fit {len(texts)} lines")
        if earlier < first_annotated_line:
            continue
        if earlier == later:
            starts.add(later)
        else:
            replies.setdefault(later, set()).add(earlier)
    lines = tuple(
        _parse_line(index, text, tuple(sorted(replies.get(index, ()))), index in starts)
        for index, text in enumerate(texts)
    )
    return IrcDay(name, lines, _speakers(lines))


def _parse_line(index: int, text: str, reply_to: tuple[int, ...], starts: bool) -> Line:
    kind: LineKind = "notice"
    time = nick = ""
    said = text.removeprefix("=== ")
    if match := _MESSAGE.match(text):
        kind, time, nick, said = "message", match[1], match[2], match[3]
    elif match := _ACTION.match(text):
        kind, time, nick, said = "action", match[1], match[2], match[3]
    elif match := _JOIN_OR_LEAVE.match(text):
        kind, nick, said = ("join" if match[2] == "joined" else "leave"), match[1].replace(" ", ""), match[3]
    elif match := _KICK.match(text):
        kind, nick, said = "leave", match[1], match[2]
    elif match := _NICK.match(text):
        kind, nick, said = "nick", match[1], match[2]
    elif match := _CHANNEL_CHANGE.match(text):
        kind, nick, said = "notice", "", f"{match[1]} {match[2]}"
    elif match := _NOTICE_ACTION.match(text):
        kind, nick, said = "action", match[1], match[2]
    return Line(index, kind, nick, said.strip(), time, reply_to, starts)


def _speakers(lines: Sequence[Line]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.nick for line in lines if line.kind == "message"))
