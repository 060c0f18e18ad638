"""The order in which commits are told, where several are under way at once.

Each connection's answers arrive on a socket of its own, so what was committed first is not always heard first. Whoever
announces needs the order of commits all the same, at least among what touches the same rows: an event after the one
before it, a read position after the earlier one. Two facts give it, without asking the database:

* A unit holds its locks from the statement that took them until its COMMIT. So of two units that touch the same row,
  the one that committed first had *sent* its COMMIT first: units are told in the order in which they sent it.
* A batch of appends takes its locks and commits in one statement, so the moment it was sent says nothing. But it
  brings back the numbers it took, and a unit knows its own before it sends COMMIT. On a stream that both appended to,
  the lower number is told first; a batch that is still in the air and may have a lower number is waited for.

Nothing here waits for the database's locks: all of it has been committed, or has failed, when its turn is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Flight:
    """A batch of appends on its way. `sids`: the streams it appends to; none of them is in another flight."""

    __slots__ = ("firsts", "landed", "over", "sids", "tell")

    def __init__(self, sids: frozenset[int]) -> None:
        self.sids = sids
        # The first number it took of each stream where it stored something, once it is back.
        self.firsts: dict[int, int] = {}
        self.landed = False
        self.over = False
        self.tell: Callable[[], None] | None = None


class Ticket:
    """A unit on its way: the first number it took of each stream it appended to."""

    __slots__ = ("behind", "finished", "taken", "tell")

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}
        # Flights that were in the air over one of its streams when it took a number there.
        self.behind: list[Flight] = []
        self.finished = False
        self.tell: Callable[[], None] | None = None


class CommitOrder:
    """Tells what has been committed, in order. Everything happens on the event loop; `tell` must not raise."""

    def __init__(self) -> None:
        self._committing: deque[Ticket] = deque()
        self._landed: list[Flight] = []
        self._taken: dict[int, list[Ticket]] = {}
        self._flying: dict[int, Flight] = {}
        self._telling = False

    # ------------------------------------------------------------ batches

    def started(self, flight: Flight) -> None:
        """A batch is about to be sent."""
        for sid in flight.sids:
            self._flying[sid] = flight

    def landed(self, flight: Flight, firsts: dict[int, int], tell: Callable[[], None]) -> None:
        """The batch is committed, or has failed (`firsts` is empty then): `tell` is called when it is its turn."""
        flight.firsts = firsts
        flight.tell = tell
        flight.landed = True
        self._landed.append(flight)
        self._tell()

    # ------------------------------------------------------------ units

    def took(self, ticket: Ticket, sid: int, seq: int) -> None:
        """A unit has appended event `seq`; the stream is its own until it ends."""
        if sid in ticket.taken:
            return
        ticket.taken[sid] = seq
        self._taken.setdefault(sid, []).append(ticket)
        flight = self._flying.get(sid)
        if flight is not None:
            ticket.behind.append(flight)

    def committing(self, ticket: Ticket) -> None:
        """The unit's COMMIT is about to be sent."""
        self._committing.append(ticket)

    def finished(self, ticket: Ticket, tell: Callable[[], None] | None) -> None:
        """The unit is committed: `tell` is called when it is its turn. None: it came to nothing, at whatever stage."""
        ticket.finished = True
        ticket.tell = tell
        if tell is None:
            self._forget(ticket)
        self._tell()

    # ------------------------------------------------------------ turns

    def _tell(self) -> None:
        # Whoever is told may bring about the next end; it is told after this one, not inside it.
        if self._telling:
            return
        self._telling = True
        try:
            while self._tell_unit() or self._tell_flight():
                pass
        finally:
            self._telling = False

    def _tell_unit(self) -> bool:
        if not self._committing:
            return False
        ticket = self._committing[0]
        if not ticket.finished or any(self._precedes(flight, ticket) for flight in ticket.behind):
            return False
        self._committing.popleft()
        if ticket.tell is not None:
            self._forget(ticket)
            ticket.tell()
        return True

    def _tell_flight(self) -> bool:
        for flight in self._landed:
            if not any(
                ticket.taken[sid] < first for sid, first in flight.firsts.items() for ticket in self._taken.get(sid, ())
            ):
                self._landed.remove(flight)
                flight.over = True
                for sid in flight.sids:
                    del self._flying[sid]
                assert flight.tell is not None
                flight.tell()
                return True
        return False

    @staticmethod
    def _precedes(flight: Flight, ticket: Ticket) -> bool:
        """Whether the flight is, or may be, before the unit on a stream that both appended to."""
        if flight.over:
            return False
        if not flight.landed:
            return True
        return any(first < ticket.taken.get(sid, 0) for sid, first in flight.firsts.items())

    def _forget(self, ticket: Ticket) -> None:
        for sid in ticket.taken:
            tickets = self._taken[sid]
            tickets.remove(ticket)
            if not tickets:
                del self._taken[sid]
