"""The checker is silent on good histories and names each planted defect, and only that."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import process_time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.testing.simulated import CHANNEL, EPOCH, MILLISECOND, World, good_history
from tidings.testing.checker import FINDINGS_PER_KIND_MAX, KINDS, check, check_files
from tidings.testing.history import (
    BadHistory,
    DeviceFinal,
    DeviceStart,
    Entry,
    Fail,
    Fetch,
    FinalLog,
    Info,
    Invoke,
    LogEvent,
    Mark,
    Observe,
    Ok,
    Receipt,
    Remove,
    Send,
    body_digest,
    read_entries,
    write_entries,
)

SECOND = 1000 * MILLISECOND
Plant = Callable[[list[Entry], random.Random], None]

seeds = st.integers(0, 10**6)
quickly = settings(max_examples=25, deadline=None)


def replace(entry: Entry, **changes: object) -> Entry:
    return msgspec.structs.replace(entry, **changes)


def places(entries: list[Entry], test: Callable[[Entry], bool]) -> list[int]:
    return [place for place, entry in enumerate(entries) if test(entry)]


def final_log(entries: list[Entry]) -> list[LogEvent]:
    return [event for entry in entries if isinstance(entry, FinalLog) for event in entry.events]


def set_final_log(entries: list[Entry], events: list[LogEvent]) -> None:
    entries[:] = [entry for entry in entries if not isinstance(entry, FinalLog)]
    entries.append(FinalLog(CHANNEL, EPOCH, tuple(events)))


def without_states(entries: list[Entry]) -> None:
    """Take the final states away, for defects that would change them, too."""
    entries[:] = [replace(entry, state="") if isinstance(entry, DeviceFinal) else entry for entry in entries]


def move_heads(entries: list[Entry], by: int) -> None:
    """Let devices end at the (changed) head of the log."""
    head = max(entry.position for entry in entries if isinstance(entry, DeviceFinal))
    entries[:] = [
        replace(entry, position=head + by) if isinstance(entry, DeviceFinal) and entry.position == head else entry
        for entry in entries
    ]


def is_streamed(entry: Entry, user: str = "u0") -> bool:
    return isinstance(entry, Observe) and entry.source != "history" and entry.user == user


def acknowledged_sends(entries: list[Entry]) -> dict[int, Ok]:
    sends = {entry.id for entry in entries if isinstance(entry, Invoke) and isinstance(entry.call, Send)}
    return {entry.seq: entry for entry in entries if isinstance(entry, Ok) and entry.id in sends}


def lose_the_last_from_the_log(entries: list[Entry], draw: random.Random) -> None:
    events = final_log(entries)
    lost = events.pop()
    assert lost.seq in acknowledged_sends(entries)
    set_final_log(entries, events)
    entries[:] = [entry for entry in entries if not (isinstance(entry, Observe) and entry.seq == lost.seq)]
    without_states(entries)
    move_heads(entries, -1)


def lose_the_last_on_a_device(entries: list[Entry], draw: random.Random) -> None:
    last = final_log(entries)[-1].seq
    device = draw.choice(["u0.d0", "u0.d1", "u2.d0"])
    entries[:] = [
        entry for entry in entries if not (isinstance(entry, Observe) and entry.device == device and entry.seq == last)
    ]


def append_to_the_log(entries: list[Entry], event: LogEvent) -> None:
    events = final_log(entries)
    event = msgspec.structs.replace(event, seq=len(events) + 1)
    for device in ("u0.d0", "u0.d1", "u2.d0", "u2.d1"):
        shown = Observe(
            10**12,
            device,
            device[:2],
            CHANNEL,
            EPOCH,
            event.seq,
            event.type,
            event.message_id,
            event.key,
            event.sender,
            event.digest,
        )
        entries.append(shown)
    without_states(entries)
    move_heads(entries, 1)
    set_final_log(entries, [*events, event])


def store_a_message_twice(entries: list[Entry], draw: random.Random) -> None:
    created = [event for event in final_log(entries) if event.type == "message.created"]
    append_to_the_log(entries, msgspec.structs.replace(draw.choice(created), message_id="m_again"))


def store_a_timed_out_message_twice(entries: list[Entry], draw: random.Random) -> None:
    seq, ok = draw.choice(sorted(acknowledged_sends(entries).items()))
    event = final_log(entries)[seq - 1]
    # Whoever sent it never heard of it: every attempt timed out.
    entries[:] = [
        Info(entry.id, entry.at, "timed out") if isinstance(entry, Ok) and entry.id == ok.id else entry
        for entry in entries
    ]
    append_to_the_log(entries, msgspec.structs.replace(event, message_id="m_again"))


def answer_a_retry_with_another_id(entries: list[Entry], draw: random.Random) -> None:
    seq, ok = draw.choice(sorted(acknowledged_sends(entries).items()))
    invoked = next(entry for entry in entries if isinstance(entry, Invoke) and entry.id == ok.id)
    entries.append(Invoke("again", 10**12, "again", invoked.call))
    entries.append(Ok("again", 10**12 + 1, "m_again", seq + 1))


def show_twice(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, is_streamed))
    entries.insert(place + draw.randint(1, 20), replace(entries[place]))


def show_twice_under_another_seq(entries: list[Entry], draw: random.Random) -> None:
    """The device is shown, before the next event and under its seq, something it has seen already."""
    mine = places(entries, lambda entry: is_streamed(entry) and entry.device == "u0.d0")
    created = [place for place in mine[:-1] if entries[place].event_type == "message.created"]
    place = draw.choice(created)
    after = draw.choice([later for later in mine if later > place])
    entries.insert(after, replace(entries[place], seq=entries[after].seq, at=entries[after].at))


def swap_on_a_device(entries: list[Entry], draw: random.Random) -> None:
    mine = places(entries, lambda entry: is_streamed(entry) and entry.device == "u0.d0")
    number = draw.randrange(1, len(mine) - 1)
    first, second = mine[number], mine[number + 1]
    entries[first], entries[second] = entries[second], entries[first]


def swap_for_one_device(entries: list[Entry], draw: random.Random) -> None:
    """One device is told another order, its seqs going up as they should."""
    mine = places(
        entries,
        lambda entry: is_streamed(entry) and entry.device == "u0.d0" and entry.event_type == "message.created",
    )
    first, second = sorted(draw.sample(mine, 2))
    one, other = entries[first], entries[second]
    entries[first] = replace(other, seq=one.seq, at=one.at)
    entries[second] = replace(one, seq=other.seq, at=other.at)


def acknowledge_against_the_clock(entries: list[Entry], draw: random.Random) -> None:
    """An early message turns out to have been invoked after a late one was acknowledged."""
    attempts = Counter(
        entry.call.key for entry in entries if isinstance(entry, Invoke) and isinstance(entry.call, Send)
    )
    events = final_log(entries)
    # A retry would be no proof: its first attempt was invoked in time.
    oks = {seq: ok for seq, ok in acknowledged_sends(entries).items() if attempts[events[seq - 1].key] == 1}
    early, late = oks[min(oks)], oks[max(oks)]
    for place, entry in enumerate(entries):
        if isinstance(entry, Invoke | Ok) and entry.id == early.id:
            entries[place] = replace(entry, at=late.at + (1 if isinstance(entry, Invoke) else 2))


def acknowledge_at_another_place(entries: list[Entry], draw: random.Random) -> None:
    seq = draw.choice(sorted(acknowledged_sends(entries)))
    changed = acknowledged_sends(entries)[seq]
    place = entries.index(changed)
    entries[place] = replace(changed, seq=seq + 1)


def skip_on_a_device(entries: list[Entry], draw: random.Random) -> None:
    mine = places(entries, lambda entry: is_streamed(entry) and entry.device == "u0.d0")
    del entries[draw.choice(mine[1:-1])]


def skip_the_first_on_a_device(entries: list[Entry], draw: random.Random) -> None:
    """Only because the device said where it started can this be known (its own joining, event 1, is its to skip)."""
    mine = places(entries, lambda entry: is_streamed(entry) and entry.device == "u0.d0")
    del entries[mine[1]], entries[mine[0]]


def skip_in_the_log(entries: list[Entry], draw: random.Random) -> None:
    """A number is burnt: everything after it moves up by one, for everybody."""
    events = final_log(entries)
    burnt = max(acknowledged_sends(entries))

    def moved(seq: int) -> int:
        return seq + (seq >= burnt)

    for place, entry in enumerate(entries):
        if isinstance(entry, Observe):
            entries[place] = replace(entry, seq=moved(entry.seq))
        elif isinstance(entry, Ok):
            entries[place] = replace(entry, seq=moved(entry.seq), shown=tuple(map(moved, entry.shown)))
    without_states(entries)
    move_heads(entries, 1)
    set_final_log(entries, [msgspec.structs.replace(event, seq=moved(event.seq)) for event in events])


def store_what_nobody_sent(entries: list[Entry], draw: random.Random) -> None:
    append_to_the_log(entries, LogEvent(0, "message.created", "m_ghost", "k_ghost", "u0", "ff"))


def store_what_was_refused(entries: list[Entry], draw: random.Random) -> None:
    entries.append(Invoke("no", 10**11, "u0", Send(CHANNEL, "u0", "k_no", "ff")))
    entries.append(Fail("no", 10**11 + 1, "forbidden"))
    append_to_the_log(entries, LogEvent(0, "message.created", "m_no", "k_no", "u0", "ff"))


def store_an_edit_that_nobody_made(entries: list[Entry], draw: random.Random) -> None:
    created = [event for event in final_log(entries) if event.type == "message.created"]
    target = draw.choice(created).message_id
    append_to_the_log(entries, LogEvent(0, "message.updated", target, "", "u9", "ff"))


def show_what_nobody_sent(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, is_streamed))
    entries[place] = replace(
        entries[place], event_type="message.created", message_id="m_ghost", key="k_ghost", sender="u2", digest="ff"
    )


def last_removal(entries: list[Entry]) -> tuple[LogEvent, Ok]:
    event = [event for event in final_log(entries) if event.type == "member.removed" and event.user == "u1"][-1]
    return event, next(entry for entry in entries if isinstance(entry, Ok) and entry.seq == event.seq)


def leak_live(entries: list[Entry], draw: random.Random) -> None:
    removal, ok = last_removal(entries)
    event = final_log(entries)[removal.seq]
    entries.append(
        Observe(
            ok.at + 1,
            "u1.d0",
            "u1",
            CHANNEL,
            EPOCH,
            event.seq,
            event.type,
            event.message_id,
            event.key,
            event.sender,
            event.digest,
        )
    )


def leak_history(entries: list[Entry], draw: random.Random) -> None:
    removal, ok = last_removal(entries)
    created = [event for event in final_log(entries) if event.type == "message.created" and event.seq < removal.seq]
    event = draw.choice(created)
    entries.append(
        Observe(
            ok.at + 60 * SECOND,
            "u1.d0",
            "u1",
            CHANNEL,
            EPOCH,
            event.seq,
            event.type,
            event.message_id,
            event.key,
            event.sender,
            event.digest,
            "history",
        )
    )


def leak_to_a_read(entries: list[Entry], draw: random.Random) -> None:
    _, ok = last_removal(entries)
    seq = min(event.seq for event in final_log(entries) if event.type == "message.created")
    entries.append(Invoke("peek", ok.at + 1, "u1", Fetch(CHANNEL, "u1")))
    entries.append(Ok("peek", ok.at + 2, first=seq, last=seq, shown=(seq,)))


def leak_to_a_stranger(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, is_streamed))
    entries.append(replace(entries[place], device="spy", user="spy"))


def turn_a_receipt_back(entries: list[Entry], draw: random.Random) -> None:
    entries.append(Receipt(10**12, "u0.d0", CHANNEL, "u2", "read", 10**6))
    entries.append(Receipt(10**12 + 1, "u0.d0", CHANNEL, "u2", "read", 10**6 - 1))


def turn_a_mark_back(entries: list[Entry], draw: random.Random) -> None:
    for number, position in enumerate((10**6, 10**6 - 1)):
        at = 10**12 + number * 10
        entries.append(Invoke(f"mark{number}", at, "u0", Mark(CHANNEL, "u0", "delivered", position)))
        entries.append(Ok(f"mark{number}", at + 1, seq=position))


def end_behind(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, lambda entry: isinstance(entry, DeviceFinal) and entry.user != "u1"))
    entries[place] = replace(entries[place], position=entries[place].position - 1)


def end_in_another_state(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, lambda entry: isinstance(entry, DeviceFinal) and entry.user != "u1"))
    entries[place] = replace(entries[place], state="another")


def show_another_body(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, lambda entry: is_streamed(entry) and entry.event_type == "message.created"))
    entries[place] = replace(entries[place], digest="ff")


def show_another_sender(entries: list[Entry], draw: random.Random) -> None:
    place = draw.choice(places(entries, lambda entry: is_streamed(entry) and entry.event_type == "message.created"))
    entries[place] = replace(entries[place], sender="somebody")


def store_another_body(entries: list[Entry], draw: random.Random) -> None:
    seq = max(acknowledged_sends(entries))
    events = final_log(entries)
    events[seq - 1] = msgspec.structs.replace(events[seq - 1], digest="ff")
    entries[:] = [
        replace(entry, digest="ff") if isinstance(entry, Observe) and entry.seq == seq else entry for entry in entries
    ]
    without_states(entries)
    set_final_log(entries, events)


def read_before_the_write(entries: list[Entry], draw: random.Random) -> None:
    newest = max(acknowledged_sends(entries))
    kept = {event.message_id for event in final_log(entries) if event.type == "message.deleted"}
    shown = tuple(
        event.seq
        for event in final_log(entries)
        if event.type == "message.created" and event.seq < newest and event.message_id not in kept
    )
    entries.append(Invoke("stale", 10**12, "u0", Fetch(CHANNEL, "u0")))
    entries.append(Ok("stale", 10**12 + 1, first=1, last=None, shown=shown))


PLANTS: list[tuple[str, Plant]] = [
    ("lost", lose_the_last_from_the_log),
    ("lost", lose_the_last_on_a_device),
    ("doubled", store_a_message_twice),
    ("doubled", store_a_timed_out_message_twice),
    ("doubled", answer_a_retry_with_another_id),
    ("doubled", show_twice),
    ("doubled", show_twice_under_another_seq),
    ("reordered", swap_on_a_device),
    ("reordered", swap_for_one_device),
    ("reordered", acknowledge_against_the_clock),
    ("reordered", acknowledge_at_another_place),
    ("gap", skip_on_a_device),
    ("gap", skip_the_first_on_a_device),
    ("gap", skip_in_the_log),
    ("phantom", store_what_nobody_sent),
    ("phantom", store_what_was_refused),
    ("phantom", store_an_edit_that_nobody_made),
    ("phantom", show_what_nobody_sent),
    ("leaked", leak_live),
    ("leaked", leak_history),
    ("leaked", leak_to_a_read),
    ("leaked", leak_to_a_stranger),
    ("receipt_back", turn_a_receipt_back),
    ("receipt_back", turn_a_mark_back),
    ("diverged", end_behind),
    ("diverged", end_in_another_state),
    ("altered", show_another_body),
    ("altered", show_another_sender),
    ("altered", store_another_body),
    ("own_writes", read_before_the_write),
]


@quickly
@given(seed=seeds, steps=st.integers(0, 80))
def test_a_good_history_is_not_blamed(seed: int, steps: int) -> None:
    entries = good_history(seed, steps=steps)
    verdict = check(entries)
    assert verdict.ok, verdict.render()
    assert verdict.seen["entries"] == len(entries)


@pytest.mark.parametrize(("kind", "plant"), PLANTS, ids=[plant.__name__ for _, plant in PLANTS])
def test_a_planted_defect_is_named_and_nothing_else(kind: str, plant: Plant) -> None:
    @quickly
    @given(seed=seeds)
    def planted(seed: int) -> None:
        entries = good_history(seed, steps=25)
        plant(entries, random.Random(seed))
        verdict = check(entries)
        assert verdict.broken == (kind,), verdict.render()
        assert all(finding.entries for finding in verdict.findings)
        assert kind in verdict.render()

    planted()


def test_every_kind_has_a_plant() -> None:
    assert {kind for kind, _ in PLANTS} == set(KINDS)


@pytest.mark.parametrize(("seqs", "kind"), [((1, 3), "gap"), ((2,), "gap"), ((1, 1), "reordered"), ((1, 3, 2), "gap")])
def test_a_log_that_is_not_numbered_from_one_is_found_without_any_device(seqs: tuple[int, ...], kind: str) -> None:
    verdict = check([FinalLog(CHANNEL, EPOCH, tuple(LogEvent(seq, "channel.updated") for seq in seqs))])
    assert kind in verdict.broken


def test_a_write_of_a_rolled_back_epoch_is_not_lost() -> None:
    world = World(1)
    world.send("u0")
    entries = world.entries
    entries.append(FinalLog(CHANNEL, "restored", tuple(world.log[:-1])))
    assert check(entries).ok
    entries[-1] = FinalLog(CHANNEL, EPOCH, tuple(world.log[:-1]))
    assert check(entries).broken == ("lost",)


def test_a_device_that_changes_epoch_starts_over() -> None:
    old = Observe(1, "d", "u", CHANNEL, "old", 7, "message.created", "m7", "k7", "u", "aa")
    new = Observe(2, "d", "u", CHANNEL, "new", 1, "message.created", "m1", "k1", "u", "bb")
    sent = [
        Invoke(f"{number}", 0, "u", Send(CHANNEL, "u", f"k{number}", digest))
        for number, digest in ((7, "aa"), (1, "bb"))
    ]
    log = FinalLog(CHANNEL, "new", (LogEvent(1, "message.created", "m1", "k1", "u", "bb"),))
    assert check([*sent, old, new, log]).ok
    stuck = [*sent, old, DeviceFinal(3, "d", "u", CHANNEL, 1), log]
    assert check(stuck).broken == ("diverged",)


def test_bytes_in_flight_at_a_removal_are_allowed_for_a_moment_only() -> None:
    events = (
        LogEvent(1, "member.added", sender="u0", user="u1"),
        LogEvent(2, "message.created", "m", "k", "u0", "aa"),
        LogEvent(3, "member.removed", sender="u0", user="u1"),
    )
    base = [
        Invoke("s", 1, "u0", Send(CHANNEL, "u0", "k", "aa")),
        Ok("s", 2, "m", 2),
        Invoke("r", 3, "u0", Remove(CHANNEL, "u1")),
        Ok("r", 4, seq=3),
        FinalLog(CHANNEL, EPOCH, events),
    ]

    def shown(at: int) -> Observe:
        return Observe(at, "d", "u1", CHANNEL, EPOCH, 2, "message.created", "m", "k", "u0", "aa")

    assert check([*base, shown(5)]).ok
    assert check([*base, shown(5)], in_flight_s=0).broken == ("leaked",)
    assert check([*base, shown(3 * SECOND)]).broken == ("leaked",)
    assert check([*base, shown(3 * SECOND)], public=[CHANNEL]).ok


def test_an_application_that_starts_over_may_be_shown_things_again() -> None:
    entries = good_history(3)
    last = [entry for entry in entries if is_streamed(entry) and entry.device == "u0.d0"][-3:]
    again = [DeviceStart(10**12, "u0.d0", "u0", CHANNEL, last[0].seq - 1), *last]
    assert check(entries + again).ok
    assert check(entries + again[1:]).broken == ("doubled",)


def test_without_a_final_log_devices_are_compared_with_each_other() -> None:
    sent = [Invoke(f"{n}", 0, "u", Send(CHANNEL, "u", f"k{n}", "aa")) for n in (1, 2)]
    one = Observe(1, "d1", "u", CHANNEL, EPOCH, 1, "message.created", "m1", "k1", "u", "aa")
    other = Observe(1, "d2", "u", CHANNEL, EPOCH, 1, "message.created", "m2", "k2", "u", "aa")
    verdict = check([*sent, one, other])
    assert verdict.broken == ("reordered",)
    assert any("no final log" in note for note in verdict.notes)


@pytest.mark.parametrize(
    "entries",
    [
        [Ok("x", 1)],
        [Invoke("x", 1, "p", Send(CHANNEL, "u", "k", "d"))] * 2,
        [Invoke("x", 1, "p", Send(CHANNEL, "u", "k", "d")), Ok("x", 2), Fail("x", 3)],
        [FinalLog(CHANNEL, "a", ()), FinalLog(CHANNEL, "b", ())],
    ],
)
def test_a_log_that_makes_no_sense_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(BadHistory):
        check(entries)


def test_a_log_survives_the_way_through_files(tmp_path: Path) -> None:
    entries = good_history(5)
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_entries(one, entries[: len(entries) // 2])
    write_entries(other, entries[len(entries) // 2 :])
    assert [*read_entries(one), *read_entries(other)] == entries
    assert check_files([one, other]) == check(entries)


def test_a_torn_last_line_is_left_out_and_a_torn_line_within_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_entries(path, good_history(5)[:3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(list(read_entries(path))) == 2
    path.write_bytes(whole[:-9] + b"\n" + whole)
    with pytest.raises(BadHistory, match="line 3"):
        list(read_entries(path))


def test_counts_stay_exact_where_examples_are_cut() -> None:
    wanted = FINDINGS_PER_KIND_MAX + 7
    events = tuple(LogEvent(seq, "message.created", f"m{seq}", f"k{seq}", "u", "aa") for seq in range(1, wanted + 1))
    verdict = check([FinalLog(CHANNEL, EPOCH, events)])
    assert verdict.counts["phantom"] == wanted
    assert len(verdict.findings) == FINDINGS_PER_KIND_MAX
    assert f"and {wanted - 5} more phantom" in verdict.render()


def test_the_work_grows_with_the_log_and_not_faster() -> None:
    def spent(messages: int) -> float:
        digest = body_digest("x")
        entries: list[Entry] = []
        events = []
        for seq in range(1, messages + 1):
            at = seq * 10
            entries.append(Invoke(str(seq), at, "p", Send(CHANNEL, "u", f"k{seq}", digest)))
            entries.append(Ok(str(seq), at + 5, f"m{seq}", seq))
            events.append(LogEvent(seq, "message.created", f"m{seq}", f"k{seq}", "u", digest))
            for device in ("a", "b", "c"):
                entries.append(
                    Observe(at + 6, device, device, CHANNEL, EPOCH, seq, "message.created", f"m{seq}", "", "u", digest)
                )
        for number in range(messages // 20):
            entries.append(Invoke(f"f{number}", 1, "p", Fetch(CHANNEL, "u")))
            entries.append(Ok(f"f{number}", 2, first=0, last=None, shown=()))
        entries.append(FinalLog(CHANNEL, EPOCH, tuple(events)))
        began = process_time()
        assert check(entries).ok
        return process_time() - began

    small = min(spent(1000) for _ in range(3))
    assert min(spent(8000) for _ in range(2)) < 8 * 4 * small
