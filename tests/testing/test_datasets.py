"""The readers understand invented samples of both formats; the real collections have the sizes they state."""

import pytest

from tidings.testing import datasets

needs_data = pytest.mark.skipif(not datasets.available(), reason=datasets.skip_reason())

CLINIC_SAMPLE = (
    "Doctor: How is the knee?\r\nPatient: Better.\r\nIt still clicks.\r\n\r\n"
    "Gest_family: He limps: badly.\nDocotr_2: I see."
)
IRC_SAMPLE = """\
[09:00] <ann> who knows about printers?
=== ben [~ben@host.example]  has joined #help
[09:01] <ben> ann: which one?
=== ann waves a cable
[09:02]  * ben nods
=== ann is now known as anna
=== mode/#help [+o anna]  by keeper
=== ben was kicked off #help by anna (spam)
=== anna [~ann@host.example]  has left #help ["bye"]
=== [c] cc [n=cc@host.example]  has joined #help
=== ..[topic/#help:ben] : be kind
"""


def test_a_dialogue_is_read_turn_by_turn() -> None:
    dialogue = datasets.parse_dialogue("7", CLINIC_SAMPLE)
    assert [(turn.speaker, turn.text) for turn in dialogue.turns] == [
        ("doctor", "How is the knee?"),
        ("patient", "Better.\nIt still clicks."),
        ("guest_family", "He limps: badly."),
        ("doctor_2", "I see."),
    ]
    assert dialogue.speakers == ("doctor", "patient", "guest_family", "doctor_2")


def test_words_before_a_colon_are_not_taken_for_a_speaker() -> None:
    dialogue = datasets.parse_dialogue("8", "Doctor: Take these.\nWarning: not with milk.")
    assert [turn.text for turn in dialogue.turns] == ["Take these.\nWarning: not with milk."]


def test_a_dialogue_that_begins_with_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="names no speaker"):
        datasets.parse_dialogue("9", "hello\nDoctor: hi")


def test_each_kind_of_irc_line_is_told_apart() -> None:
    day = datasets.parse_irc_day("day", IRC_SAMPLE, "0 0 -\n0 2 -\n", first_annotated_line=0)
    assert [(line.kind, line.nick) for line in day.lines] == [
        ("message", "ann"),
        ("join", "ben"),
        ("message", "ben"),
        ("action", "ann"),
        ("action", "ben"),
        ("nick", "ann"),
        ("notice", ""),
        ("leave", "ben"),
        ("leave", "anna"),
        ("join", "[c]cc"),
        ("notice", ""),
    ]
    assert [line.text for line in day.lines[2:6]] == ["ann: which one?", "waves a cable", "nods", "anna"]
    assert [line.index for line in day.lines] == list(range(11))
    assert day.lines[0].starts
    assert day.lines[0].reply_to == ()
    assert day.lines[2].reply_to == (0,)
    assert not day.lines[2].starts
    assert day.speakers == ("ann", "ben")


def test_links_into_the_unannotated_beginning_are_dropped() -> None:
    day = datasets.parse_irc_day("day", IRC_SAMPLE, "0 2 -\n1 2 -\n2 4 - \n", first_annotated_line=1)
    assert day.lines[2].reply_to == (1,)
    assert day.lines[4].reply_to == (2,)


@pytest.mark.parametrize("link", ["0 11 -", "3 2 -"])
def test_a_link_that_fits_no_line_is_refused(link: str) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        datasets.parse_irc_day("day", IRC_SAMPLE, link)


def test_a_missing_folder_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path / "nowhere"))
    assert not datasets.available()
    assert "nowhere" in datasets.skip_reason()
    with pytest.raises(datasets.DatasetMissing, match="nowhere"):
        datasets.read_clinic_dialogues()
    with pytest.raises(datasets.DatasetMissing, match="nowhere"):
        datasets.read_irc_days()


@needs_data
def test_the_clinic_collection_has_its_stated_size() -> None:
    dialogues = datasets.read_clinic_dialogues()
    assert len(dialogues) == 1201
    assert len({dialogue.id for dialogue in dialogues}) == 1201
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    # The README's 11,382 counts the speakers without a number; second doctors and family members take 70 more turns.
    assert sum(not turn.speaker[-1].isdigit() for turn in turns) == 11_382
    assert len(turns) == 11_452
    assert {turn.speaker for turn in turns} == {
        "doctor",
        "patient",
        "guest_family",
        "guest_clinician",
        "doctor_2",
        "guest_family_1",
        "guest_family_2",
    }
    assert all(turn.text for turn in turns)
    assert all(len(dialogue.speakers) >= 1 for dialogue in dialogues)


@needs_data
def test_the_irc_days_have_their_stated_sizes() -> None:
    days = datasets.read_irc_days()
    assert [len(day.lines) for day in days] == [1500, 1246, 2165, 1910, 1650, 1979]
    assert max(len(day.speakers) for day in days) == 223
    for day in days:
        links = [(index, line.index) for line in day.lines for index in line.reply_to]
        assert links
        assert all(1000 <= earlier < later < len(day.lines) for earlier, later in links)
        assert any(line.starts for line in day.lines)
        assert {line.nick for line in day.lines if line.kind == "nick"} - {""}
    joins = sum(line.kind == "join" for day in days for line in day.lines)
    leaves = sum(line.kind == "leave" for day in days for line in day.lines)
    assert (joins, leaves) == (1266, 230)
