"""The order in which commits are told, with nothing but the facts that decide it."""

from __future__ import annotations

import random

from tidings.server.store.commits import CommitOrder, Flight, Ticket


class Telling:
    """An order, and what it has told."""

    def __init__(self) -> None:
        self.order = CommitOrder()
        self.told: list[str] = []

    def flight(self, *sids: int) -> Flight:
        flight = Flight(frozenset(sids))
        self.order.started(flight)
        return flight

    def land(self, flight: Flight, name: str, **firsts: int) -> None:
        taken = {int(sid.removeprefix("s")): seq for sid, seq in firsts.items()}
        self.order.landed(flight, taken, lambda: self.told.append(name))

    def unit(self, **taken: int) -> Ticket:
        ticket = Ticket()
        for sid, seq in taken.items():
            self.order.took(ticket, int(sid.removeprefix("s")), seq)
        return ticket

    def finish(self, ticket: Ticket, name: str) -> None:
        self.order.finished(ticket, lambda: self.told.append(name))


def test_units_are_told_in_the_order_in_which_they_sent_their_commits() -> None:
    telling = Telling()
    first, second, third = telling.unit(), telling.unit(), telling.unit()
    for ticket in (first, second, third):
        telling.order.committing(ticket)
    telling.finish(third, "third")
    telling.finish(second, "second")
    assert telling.told == []
    telling.finish(first, "first")
    assert telling.told == ["first", "second", "third"]


def test_a_unit_whose_commit_failed_holds_nobody_up() -> None:
    telling = Telling()
    first, second = telling.unit(s1=1), telling.unit(s2=1)
    telling.order.committing(first)
    telling.order.committing(second)
    telling.finish(second, "second")
    telling.order.finished(first, None)
    assert telling.told == ["second"]


def test_a_batch_waits_for_the_unit_with_the_lower_number() -> None:
    telling = Telling()
    unit = telling.unit(s1=4)
    flight = telling.flight(1, 2)
    telling.order.committing(unit)
    telling.land(flight, "batch", s1=5, s2=1)
    assert telling.told == []
    telling.finish(unit, "unit")
    assert telling.told == ["unit", "batch"]


def test_a_unit_waits_for_a_batch_in_the_air_that_may_have_the_lower_number() -> None:
    for first, expected in ((4, ["batch", "unit"]), (6, ["unit", "batch"])):
        telling = Telling()
        flight = telling.flight(1)
        unit = telling.unit(s1=5)
        telling.order.committing(unit)
        telling.finish(unit, "unit")
        assert telling.told == []
        telling.land(flight, "batch", s1=first)
        assert telling.told == expected


def test_a_batch_that_left_after_the_unit_had_its_number_is_not_waited_for() -> None:
    telling = Telling()
    unit = telling.unit(s1=5)
    telling.flight(1)
    telling.order.committing(unit)
    telling.finish(unit, "unit")
    assert telling.told == ["unit"]


def test_a_unit_that_is_rolled_back_lets_the_batch_behind_it_go() -> None:
    telling = Telling()
    unit = telling.unit(s1=5)
    flight = telling.flight(1)
    telling.land(flight, "batch", s1=6)
    assert telling.told == []
    telling.order.finished(unit, None)
    assert telling.told == ["batch"]


def test_streams_have_nothing_to_do_with_one_another() -> None:
    telling = Telling()
    slow = telling.unit(s1=5)
    flight = telling.flight(2)
    telling.land(flight, "batch", s2=1)
    assert telling.told == ["batch"]
    telling.order.finished(slow, None)


def test_whatever_comes_back_first_numbers_are_told_in_order() -> None:
    for seed in range(300):
        _play(random.Random(seed))


def _play(rng: random.Random) -> None:
    """A database of three streams with row locks, whose answers come back in any order."""
    order = CommitOrder()
    heads = dict.fromkeys(range(3), 0)
    locked: dict[int, Ticket] = {}
    told: dict[int, list[int]] = {sid: [] for sid in heads}
    working: list[tuple[Ticket, dict[int, int]]] = []
    waiting: list[Flight] = []
    answers: list[object] = []
    busy: set[int] = set()
    left = 60

    def say(numbers: dict[int, int], free: frozenset[int] = frozenset()) -> None:
        for sid, seq in numbers.items():
            told[sid].append(seq)
        busy.difference_update(free)

    while left or working or waiting or answers:
        moves = ["answer"] * bool(answers) + ["commit"] * bool(working) + ["fly"] * bool(waiting)
        moves += ["unit", "batch"] * bool(left)
        move = rng.choice(moves)
        if move == "unit":
            left -= 1
            free = [sid for sid in heads if sid not in locked]
            ticket, numbers = Ticket(), {}
            for sid in rng.sample(free, min(len(free), rng.randint(1, 2))):
                locked[sid] = ticket
                heads[sid] += 1
                numbers[sid] = heads[sid]
                order.took(ticket, sid, heads[sid])
            working.append((ticket, numbers))
        elif move == "batch":
            left -= 1
            free = [sid for sid in heads if sid not in busy]
            if free:
                flight = Flight(frozenset(rng.sample(free, rng.randint(1, len(free)))))
                busy.update(flight.sids)
                order.started(flight)
                waiting.append(flight)
        elif move == "commit":
            ticket, numbers = working.pop(rng.randrange(len(working)))
            order.committing(ticket)
            for sid in [sid for sid, owner in locked.items() if owner is ticket]:
                del locked[sid]
            answers.append((ticket, numbers))
        elif move == "fly":
            ready = [flight for flight in waiting if not flight.sids & locked.keys()]
            if ready:
                flight = rng.choice(ready)
                waiting.remove(flight)
                numbers = {}
                for sid in flight.sids:
                    heads[sid] += 1
                    numbers[sid] = heads[sid]
                answers.append((flight, numbers))
        else:
            done, numbers = answers.pop(rng.randrange(len(answers)))  # type: ignore[misc]
            if isinstance(done, Ticket):
                order.finished(done, lambda numbers=numbers: say(numbers))  # type: ignore[misc]
            else:
                order.landed(done, numbers, lambda n=numbers, f=done.sids: say(n, f))  # type: ignore[misc]
    assert told == {sid: list(range(1, head + 1)) for sid, head in heads.items()}
