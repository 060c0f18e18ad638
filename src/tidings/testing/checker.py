"""The history checker: reads an operation log (`tidings.testing.history`) and says which promise was broken.

| kind | what it means |
|---|---|
| `lost` | acknowledged but not in the final log, or never shown to a member's device that finished at the head |
| `doubled` | a (sender, channel, key) twice in the log, two results for one key, an event twice on one device |
| `reordered` | seq went down on a device; a device or an acknowledgement disagrees with the log on the order; a write
  that was invoked after another was acknowledged has the lower seq |
| `gap` | seq is not 1..n in the log, or a device skipped one while its user was a member |
| `phantom` | in the log or shown, but never invoked, or invoked and refused |
| `leaked` | a device of a user was shown an event while the user was not a member |
| `receipt_back` | a delivered or read position went down |
| `diverged` | a device that finished does not hold what the log holds |
| `altered` | the body, sender or id differs from what was sent or acknowledged |
| `own_writes` | a read that was invoked after an acknowledgement and covers the write did not show it |

What the checker takes for granted, so that it raises no false alarm:

- Membership is what `member.added` and `member.removed` in the final log say; a channel without any such event, and the
  channels named `public`, are open to all. Members may read what was said before they joined.
- Bytes that left before a removal was acknowledged may be handled by the application a little later: events from before
  the removal are allowed for `IN_FLIGHT_S` after it. An event with a seq above the removal's is a leak at once.
- An epoch other than the final log's is history that was rolled back: it is checked for order within itself only.
- A message that was deleted may have an empty digest anywhere.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import assert_never

import msgspec

from tidings.testing.history import (
    MEMBER_ADDED,
    MEMBER_REMOVED,
    MESSAGE_CREATED,
    MESSAGE_DELETED,
    MESSAGE_UPDATED,
    REACTION_ADDED,
    REACTION_REMOVED,
    BadHistory,
    Call,
    Delete,
    DeviceFinal,
    DeviceStart,
    Edit,
    Entry,
    Fail,
    Fetch,
    FinalLog,
    Info,
    Invoke,
    Join,
    Leave,
    LogEvent,
    Mark,
    Observe,
    Ok,
    React,
    Receipt,
    Remove,
    Send,
    StateFold,
    body_digest,
    read_entries,
)
from tidings.testing.spans import without
from tidings.testing.verdict import KINDS, Finding, Kind, Verdict

# A loopback socket's buffer plus a busy test program: two seconds is far more than either needs, and far less
# than it takes to notice a subscription that survived its member.
IN_FLIGHT_S = 2.0

# One broken thing tends to break everything behind it; the counts stay exact, the examples stay readable.
FINDINGS_PER_KIND_MAX = 50

_NEVER = float("inf")
_ALWAYS = float("-inf")


def check(
    entries: Iterable[Entry] | Callable[[], Iterable[Entry]],
    *,
    public: Iterable[str] = (),
    in_flight_s: float = IN_FLIGHT_S,
) -> Verdict:
    """Judge a history.

    `entries` is read twice: give a list, or a function that opens the log anew (then only operations and final logs
    are held in memory). `public` names channels that need no membership. Raises `BadHistory` where the log itself makes
    no sense (an outcome without an operation, two outcomes, two final epochs).
    """
    if not callable(entries):
        held = entries if isinstance(entries, list | tuple) else list(entries)
        return check(lambda: held, public=public, in_flight_s=in_flight_s)
    checker = _Checker(frozenset(public), round(in_flight_s * 1e9))
    checker.index(entries())
    checker.check_logs()
    checker.check_operations()
    checker.watch_devices(entries())
    return checker.verdict()


def check_files(paths: Iterable[Path], *, public: Iterable[str] = (), in_flight_s: float = IN_FLIGHT_S) -> Verdict:
    """`check` over JSONL files, one recorder each; their clocks must be the same machine's."""
    files = tuple(paths)
    return check(lambda: chain.from_iterable(map(read_entries, files)), public=public, in_flight_s=in_flight_s)


class _Operation:
    __slots__ = ("invoke", "result")

    def __init__(self, invoke: Invoke) -> None:
        self.invoke = invoke
        self.result: Ok | Fail | Info | None = None

    @property
    def failed(self) -> bool:
        return isinstance(self.result, Fail)

    @property
    def ok_at(self) -> float:
        return self.result.at if isinstance(self.result, Ok) else _NEVER

    def lines(self) -> tuple[Entry, ...]:
        return (self.invoke,) if self.result is None else (self.invoke, self.result)


class _Stay(msgspec.Struct, frozen=True):
    """One stay of a user in a channel: the longest that acknowledgements and the log allow (times in ns)."""

    first_seq: int
    last_seq: float
    since: float
    until: float


class _Log:
    """The final log of one channel, indexed."""

    def __init__(self, channel: str, epoch: str) -> None:
        self.channel = channel
        self.epoch = epoch
        self.events: list[LogEvent] = []
        self.by_seq: dict[int, LogEvent] = {}
        self.created: dict[str, LogEvent] = {}
        self.by_key: dict[tuple[str, str], LogEvent] = {}
        self.places: dict[tuple[str, str], LogEvent] = {}
        self.deleted: set[str] = set()
        self.versions: dict[str, set[str]] = defaultdict(set)
        self.membership: dict[str, list[LogEvent]] = defaultdict(list)
        self.head = 0

    def index(self) -> None:
        for event in self.events:
            self.by_seq.setdefault(event.seq, event)
            self.head = max(self.head, event.seq)
            kind = event.type
            if kind == MESSAGE_CREATED:
                self.created.setdefault(event.message_id, event)
                if event.key:
                    self.by_key.setdefault((event.sender, event.key), event)
            elif kind == MESSAGE_UPDATED:
                self.versions[event.message_id].add(event.digest)
            elif kind == MESSAGE_DELETED:
                self.deleted.add(event.message_id)
            elif kind in (MEMBER_ADDED, MEMBER_REMOVED):
                self.membership[event.user].append(event)
            if kind != MESSAGE_CREATED and event.message_id:
                self.places.setdefault((kind, event.message_id), event)

    def same_body(self, event: LogEvent, digest: str) -> bool:
        return event.digest == digest or (event.message_id in self.deleted and not (event.digest and digest))

    def away(self, user: str) -> list[tuple[float, float]]:
        """The seq ranges, ends included, that `user` need not have seen: before and between stays, and after the last.

        The events of coming and going themselves are in them: whether one sees oneself leave is the product's choice.
        """
        events = self.membership.get(user)
        if not events:
            return []
        ranges: list[tuple[float, float]] = []
        left: float | None = 0
        for event in events:
            if event.type == MEMBER_ADDED and left is not None:
                ranges.append((left, event.seq))
                left = None
            elif event.type == MEMBER_REMOVED and left is None:
                left = event.seq
        if left is not None:
            ranges.append((left, _NEVER))
        return ranges


class _View:
    """What one device saw of one channel since its last start, as far as judging the next event needs it."""

    __slots__ = ("base", "bogus", "channel", "device", "epoch", "holes", "last", "last_entry", "user")

    def __init__(self, device: str, channel: str, user: str) -> None:
        self.device = device
        self.channel = channel
        self.user = user
        self.restart("", None)

    def restart(self, epoch: str, position: int | None) -> None:
        self.epoch = epoch
        self.base = position
        self.last = position
        self.last_entry: Observe | None = None
        # (first, last, entry before, entry after) of seqs jumped over and not seen since.
        self.holes: list[tuple[int, int, Observe | None, Observe]] = []
        # Seqs under which something was shown that the log has not there: the real event may still come.
        self.bogus: set[int] = set()

    def fill(self, seq: int) -> bool:
        """Take `seq` out of the holes; whether it was in one."""
        for number, (first, last, before, after) in enumerate(self.holes):
            if first <= seq <= last:
                parts = [(first, seq - 1, before, after), (seq + 1, last, before, after)]
                self.holes[number : number + 1] = [part for part in parts if part[0] <= part[1]]
                return True
        return False


class _Checker:
    def __init__(self, public: frozenset[str], in_flight_ns: int) -> None:
        self._public = public
        self._in_flight_ns = in_flight_ns
        self._operations: dict[str, _Operation] = {}
        self._logs: dict[str, _Log] = {}
        self._sends: dict[tuple[str, str, str], list[_Operation]] = defaultdict(list)
        # Everything else that makes an event: (channel, event type, message id, who, digest) → who asked for it.
        self._causes: dict[tuple[str, ...], list[_Operation]] = defaultdict(list)
        self._comings: dict[tuple[str, str], list[_Operation]] = defaultdict(list)
        self._stays: dict[tuple[str, str], list[_Stay] | None] = {}
        self._acknowledged: dict[tuple[str, int], _Operation] = {}
        self._counts: Counter[Kind] = Counter()
        self._findings: list[Finding] = []
        self._seen: Counter[str] = Counter()
        self._notes: list[str] = []

    def _find(self, kind: Kind, channel: str, what: str, *entries: Entry | LogEvent) -> None:
        self._counts[kind] += 1
        if self._counts[kind] <= FINDINGS_PER_KIND_MAX:
            self._findings.append(Finding(kind, channel, what, entries))

    def verdict(self) -> Verdict:
        counts: dict[Kind, int] = {kind: self._counts[kind] for kind in KINDS}
        return Verdict(counts, tuple(self._findings), dict(self._seen), tuple(self._notes))

    # First reading: what was asked for, and what the truth is.

    def index(self, entries: Iterable[Entry]) -> None:
        total = 0
        for entry in entries:
            total += 1
            match entry:
                case Observe() | Receipt() | DeviceStart() | DeviceFinal():
                    pass
                case Invoke():
                    if entry.id in self._operations:
                        raise BadHistory(f"operation {entry.id} is invoked twice")
                    self._operations[entry.id] = _Operation(entry)
                case Ok() | Fail() | Info():
                    operation = self._operations.get(entry.id)
                    if operation is None:
                        raise BadHistory(f"an outcome for {entry.id}, which was not invoked before")
                    if operation.result is not None:
                        raise BadHistory(f"operation {entry.id} has two outcomes")
                    operation.result = entry
                case FinalLog():
                    log = self._logs.setdefault(entry.channel, _Log(entry.channel, entry.epoch))
                    if log.epoch != entry.epoch:
                        raise BadHistory(f"channel {entry.channel} has two final epochs")
                    log.events.extend(entry.events)
                case _:
                    assert_never(entry)
        for log in self._logs.values():
            log.index()
        for operation in self._operations.values():
            self._index_operation(operation)
        results = Counter(type(operation.result).__name__.lower() for operation in self._operations.values())
        self._seen["entries"] = total
        self._seen["operations"] = len(self._operations)
        self._seen["acknowledged"] = results["ok"]
        self._seen["refused"] = results["fail"]
        self._seen["unknown"] = results["info"] + results["nonetype"]
        self._seen["channels"] = len(self._logs)
        self._seen["events"] = sum(len(log.events) for log in self._logs.values())
        without = {operation.invoke.call.channel for operation in self._operations.values()} - self._logs.keys()
        if without:
            self._notes.append(
                f"{len(without)} channels have no final log, so nothing can be lost there: {min(without)} …"
            )

    def _index_operation(self, operation: _Operation) -> None:
        call = operation.invoke.call
        channel = call.channel
        match call:
            case Send():
                self._sends[channel, call.sender, call.key].append(operation)
            case Join() | Leave() | Remove():
                self._comings[channel, call.user].append(operation)
            case Edit() | Delete() | React():
                self._causes[channel, *_signature(call)].append(operation)
            case Mark() | Fetch():
                pass
            case _:
                assert_never(call)

    def _counts_here(self, result: Ok, log: _Log) -> bool:
        """Whether this acknowledgement is about the history that the final log tells (not one rolled back since)."""
        return result.epoch in ("", log.epoch)

    # The log by itself, and against what was asked for.

    def check_logs(self) -> None:
        for log in self._logs.values():
            self._check_sequence(log)
            self._check_contents(log)

    def _check_sequence(self, log: _Log) -> None:
        expected = 1
        for event in log.events:
            if event.seq > expected:
                self._find("gap", log.channel, f"the log goes from {expected - 1} to {event.seq}", event)
            elif event.seq < expected:
                self._find("reordered", log.channel, f"the log has {event.seq} after {expected - 1}", event)
            expected = max(expected, event.seq + 1)

    def _check_contents(self, log: _Log) -> None:
        caused: Counter[tuple[str, ...]] = Counter()
        for event in log.events:
            if event.type == MESSAGE_CREATED:
                self._check_created(log, event)
            elif event.type in (MESSAGE_UPDATED, MESSAGE_DELETED, REACTION_ADDED, REACTION_REMOVED):
                self._check_caused(log, event, caused)

    def _check_created(self, log: _Log, event: LogEvent) -> None:
        first = log.created[event.message_id]
        if first is not event:
            self._find("doubled", log.channel, f"message {event.message_id} is in the log twice", first, event)
            return
        if not event.key:
            # The server's own messages have neither; a person's without a key is known by what was acknowledged.
            if event.sender and not self._acknowledged_id(log.channel, event.message_id):
                self._find("phantom", log.channel, f"{event.message_id} was never sent", event)
            return
        first = log.by_key[event.sender, event.key]
        if first is not event:
            self._find("doubled", log.channel, f"key {event.key} of {event.sender} made two messages", first, event)
            return
        attempts = self._sends.get((log.channel, event.sender, event.key), [])
        possible = [operation for operation in attempts if not operation.failed]
        if not possible:
            said = "was refused" if attempts else "was never sent"
            self._find("phantom", log.channel, f"{event.message_id} {said}", event, *_lines(attempts))
        elif not any(log.same_body(event, _sent_digest(operation)) for operation in possible):
            self._find("altered", log.channel, f"{event.message_id} is not what was sent", event, *_lines(possible))

    def _acknowledged_id(self, channel: str, message_id: str) -> bool:
        # Asked for messages without a key only, which is rare: a search is cheaper than one more index.
        return any(
            isinstance(operation.result, Ok) and operation.result.message_id == message_id
            for (where, _, _), attempts in self._sends.items()
            if where == channel
            for operation in attempts
        )

    def _check_caused(self, log: _Log, event: LogEvent, caused: Counter[tuple[str, ...]]) -> None:
        digest = "" if event.type == MESSAGE_DELETED else event.digest
        signature = (log.channel, event.type, event.message_id, event.sender, digest)
        caused[signature] += 1
        attempts = self._causes.get(signature, [])
        possible = sum(not operation.failed for operation in attempts)
        if caused[signature] <= possible:
            return
        if possible:
            self._find("doubled", log.channel, f"{event.type} happened more often than asked", event, *_lines(attempts))
            return
        if event.message_id in log.deleted and not event.digest:
            return
        if event.type == MESSAGE_UPDATED and (others := self._edits(log.channel, event)):
            self._find(
                "altered", log.channel, f"an edit of {event.message_id} has another body", event, *_lines(others)
            )
            return
        said = "was refused" if attempts else "was never asked for"
        self._find("phantom", log.channel, f"{event.type} of {event.message_id} {said}", event, *_lines(attempts))

    def _edits(self, channel: str, event: LogEvent) -> list[_Operation]:
        wanted = (channel, MESSAGE_UPDATED, event.message_id, event.sender)
        return [
            operation
            for signature, attempts in self._causes.items()
            if signature[:4] == wanted
            for operation in attempts
            if not operation.failed
        ]

    # What was acknowledged, against the log and against time.

    def check_operations(self) -> None:
        happened: dict[str, dict[int, tuple[float, float, _Operation]]] = defaultdict(dict)
        for (channel, sender, key), attempts in self._sends.items():
            self._check_send(channel, sender, key, attempts, happened[channel])
        for operation in self._operations.values():
            if not isinstance(operation.invoke.call, Send | Mark | Fetch):
                self._check_change(operation, happened[operation.invoke.call.channel])
        for channel, events in happened.items():
            spans = [(seq, invoked, done, operation) for seq, (invoked, done, operation) in events.items()]
            for earlier, later in _real_time_violations(spans):
                what = "a write that was invoked after another's acknowledgement has the lower seq"
                self._find("reordered", channel, what, *earlier.lines(), *later.lines())
        self._check_marks()
        self._check_fetches(happened)

    def _check_send(
        self,
        channel: str,
        sender: str,
        key: str,
        attempts: list[_Operation],
        happened: dict[int, tuple[float, float, _Operation]],
    ) -> None:
        log = self._logs.get(channel)
        oks = [(operation, operation.result) for operation in attempts if isinstance(operation.result, Ok)]
        if log is not None:
            oks = [(operation, result) for operation, result in oks if self._counts_here(result, log)]
        if len({(result.message_id, result.seq) for _, result in oks}) > 1:
            operations = [operation for operation, _ in oks]
            self._find("doubled", channel, f"key {key} of {sender} has two results", *_lines(operations))
            return
        event = None
        if log is not None:
            event = log.by_key.get((sender, key))
            if event is None and oks:
                event = log.created.get(oks[0][1].message_id)
        for operation, result in oks:
            if log is None:
                continue
            if event is None:
                self._find(
                    "lost", channel, f"{result.message_id} was acknowledged, but is not in the log", *operation.lines()
                )
                break
            if event.message_id != result.message_id:
                what = f"acknowledged as {result.message_id}, but {event.message_id} in the log"
                self._find("altered", channel, what, event, *operation.lines())
            elif event.seq != result.seq:
                self._find(
                    "reordered",
                    channel,
                    f"acknowledged at {result.seq}, but at {event.seq} in the log",
                    event,
                    *operation.lines(),
                )
            elif not log.same_body(event, _sent_digest(operation)):
                self._find(
                    "altered", channel, f"{event.message_id} is not what was acknowledged", event, *operation.lines()
                )
        seq = event.seq if event is not None else oks[0][1].seq if oks else 0
        if not seq:
            return
        for operation in attempts:
            _widen(happened, seq, operation, counts=log is None or operation in [known for known, _ in oks])
        if oks:
            self._acknowledged.setdefault((channel, seq), oks[0][0])

    def _check_change(self, operation: _Operation, happened: dict[int, tuple[float, float, _Operation]]) -> None:
        result, call = operation.result, operation.invoke.call
        if not isinstance(result, Ok) or not result.seq:
            return
        log = self._logs.get(call.channel)
        if log is not None:
            if not self._counts_here(result, log):
                return
            event = log.by_seq.get(result.seq)
            if event is None or not _is_effect(call, event, log):
                what = f"acknowledged as event {result.seq}, which is not that in the log"
                entries = operation.lines() if event is None else (event, *operation.lines())
                self._find("lost", call.channel, what, *entries)
                return
        _widen(happened, result.seq, operation, counts=True)

    def _check_marks(self) -> None:
        spans: dict[tuple[str, str, str], list[tuple[int, float, float, _Operation]]] = defaultdict(list)
        for operation in self._operations.values():
            call, result = operation.invoke.call, operation.result
            if isinstance(call, Mark) and isinstance(result, Ok):
                if result.seq < call.position:
                    what = f"{call.user} marked {call.position}, and the position became {result.seq}"
                    self._find("receipt_back", call.channel, what, *operation.lines())
                spans[call.channel, call.user, call.which].append(
                    (result.seq, operation.invoke.at, result.at, operation)
                )
        for (channel, user, which), found in spans.items():
            for earlier, later in _real_time_violations(found):
                what = f"the {which} position of {user} went down"
                self._find("receipt_back", channel, what, *earlier.lines(), *later.lines())

    def _check_fetches(self, happened: dict[str, dict[int, tuple[float, float, _Operation]]]) -> None:
        # Per channel: created seqs ascending, when each was acknowledged, and the earliest acknowledgement from there
        # on, so that a read "up to now" does not walk everything that was written after it.
        tables: dict[str, tuple[list[int], list[float], list[float]]] = {}
        for operation in self._operations.values():
            call, result = operation.invoke.call, operation.result
            if not isinstance(call, Fetch) or not isinstance(result, Ok):
                continue
            log = self._logs.get(call.channel)
            if log is None or not self._counts_here(result, log):
                continue
            self._seen["fetched"] += 1
            self._check_fetch_access(log, operation, result, call)
            if call.channel not in tables:
                times = happened[call.channel]
                seqs = sorted(event.seq for event in log.created.values() if event.message_id not in log.deleted)
                done = [times[seq][1] if seq in times else _NEVER for seq in seqs]
                earliest = list(done)
                for place in range(len(earliest) - 2, -1, -1):
                    earliest[place] = min(earliest[place], earliest[place + 1])
                tables[call.channel] = (seqs, done, earliest)
            seqs, done, earliest = tables[call.channel]
            shown = set(result.shown)
            end = len(seqs) if result.last is None else bisect_right(seqs, result.last)
            for place in range(bisect_left(seqs, result.first), end):
                if earliest[place] >= operation.invoke.at:
                    break
                if done[place] < operation.invoke.at and seqs[place] not in shown:
                    written = self._acknowledged.get((call.channel, seqs[place]))
                    what = f"a read did not show {seqs[place]}, which had been acknowledged before it"
                    self._find(
                        "own_writes", call.channel, what, *(written.lines() if written else ()), *operation.lines()
                    )

    def _check_fetch_access(self, log: _Log, operation: _Operation, result: Ok, call: Fetch) -> None:
        for seq in result.shown:
            event = log.by_seq.get(seq)
            if event is None or event.type != MESSAGE_CREATED:
                self._find("phantom", log.channel, f"a read showed {seq}, which is no message", *operation.lines())
        stays = self._stays_of(log, call.user)
        if stays is None or not result.shown:
            return
        newest = max(result.shown)
        if not any(
            stay.since <= result.at and operation.invoke.at <= stay.until and newest <= stay.last_seq for stay in stays
        ):
            what = f"{call.user} read the channel while not a member"
            self._find("leaked", log.channel, what, *operation.lines(), *log.membership.get(call.user, []))

    def _stays_of(self, log: _Log, user: str) -> list[_Stay] | None:
        """When `user` may have been a member; None where everybody may read."""
        key = (log.channel, user)
        if key in self._stays:
            return self._stays[key]
        stays: list[_Stay] | None = None
        if log.membership and log.channel not in self._public:
            stays = self._make_stays(log, user)
        self._stays[key] = stays
        return stays

    def _make_stays(self, log: _Log, user: str) -> list[_Stay]:
        asked = self._comings.get((log.channel, user), [])
        stays: list[_Stay] = []
        open_since: tuple[int, float] | None = None
        earliest = _ALWAYS
        for event in log.membership.get(user, []):
            causes = [
                operation
                for operation in asked
                if isinstance(operation.result, Ok)
                and operation.result.seq == event.seq
                and isinstance(operation.invoke.call, Join) == (event.type == MEMBER_ADDED)
            ]
            # What nobody recorded, or whose outcome nobody knows, may have happened at any time since the last change.
            invoked = max(min((operation.invoke.at for operation in causes), default=_ALWAYS), earliest)
            if event.type == MEMBER_ADDED and open_since is None:
                open_since = (event.seq, invoked)
            elif event.type == MEMBER_REMOVED and open_since is not None:
                until = min((operation.ok_at for operation in causes), default=_NEVER)
                stays.append(_Stay(open_since[0], event.seq, open_since[1], until))
                open_since = None
            earliest = invoked
        if open_since is not None:
            stays.append(_Stay(open_since[0], _NEVER, open_since[1], _NEVER))
        return stays

    # Second reading: what each device was shown, as it came.

    def watch_devices(self, entries: Iterable[Entry]) -> None:
        views: dict[tuple[str, str], _View] = {}
        positions: dict[tuple[str, str, str, str], Receipt] = {}
        finals: list[DeviceFinal] = []
        told: dict[tuple[str, str], dict[int, LogEvent]] = defaultdict(dict)
        for entry in entries:
            kind = type(entry)
            if kind is Observe:
                assert isinstance(entry, Observe)
                self._watch_event(entry, views, told)
            elif isinstance(entry, Receipt):
                self._seen["receipts"] += 1
                which = (entry.device, entry.channel, entry.user, entry.which)
                before = positions.get(which)
                if before is not None and entry.position < before.position:
                    what = f"{entry.device} saw the {entry.which} position of {entry.user} go down"
                    self._find("receipt_back", entry.channel, what, before, entry)
                positions[which] = entry
            elif isinstance(entry, DeviceStart):
                view = self._view(entry, views)
                self._close_holes(view)
                view.restart("", entry.position)
            elif isinstance(entry, DeviceFinal):
                finals.append(entry)
        for view in views.values():
            self._close_holes(view)
        folds: dict[str, str] = {}
        for final in finals:
            self._check_final(final, views.get((final.device, final.channel)), folds)
        self._seen["devices"] = len({device for device, _ in views})
        self._seen["finished"] = len(finals)

    def _view(self, entry: Observe | DeviceStart, views: dict[tuple[str, str], _View]) -> _View:
        key = (entry.device, entry.channel)
        view = views.get(key)
        if view is None:
            view = views[key] = _View(entry.device, entry.channel, entry.user)
        return view

    def _watch_event(
        self,
        entry: Observe,
        views: dict[tuple[str, str], _View],
        told: dict[tuple[str, str], dict[int, LogEvent]],
    ) -> None:
        self._seen["observed"] += 1
        view = views.get((entry.device, entry.channel)) or self._view(entry, views)
        log = self._logs.get(entry.channel)
        if log is not None and log.epoch == entry.epoch:
            stays = self._stays_of(log, entry.user)
            if stays is not None:
                self._check_access(log, entry, stays)
            true = self._check_truth(log, entry, view)
        else:
            true = self._check_told(entry, told[entry.channel, entry.epoch])
        if entry.source != "history":
            self._check_place(entry, view, true)

    def _check_access(self, log: _Log, entry: Observe, stays: list[_Stay]) -> None:
        at, seq = entry.at, entry.seq
        for stay in stays:
            if stay.since <= at <= stay.until + self._in_flight_ns and seq <= stay.last_seq:
                return
        what = f"{entry.device} of {entry.user} was shown event {seq} while {entry.user} was not a member"
        self._find("leaked", log.channel, what, entry, *log.membership.get(entry.user, []))

    def _check_truth(self, log: _Log, entry: Observe, view: _View) -> bool:
        """Compare with the log; whether this is the event that belongs under its seq."""
        event = log.by_seq.get(entry.seq)
        if event is not None and event.message_id == entry.message_id and event.type == entry.event_type:
            same = (
                (event.digest == entry.digest or self._known_version(log, event, entry))
                and (event.sender == entry.sender or not entry.sender)
                and (event.key == entry.key or not entry.key)
            )
            if not same:
                self._find("altered", log.channel, f"{entry.device} was shown another body or sender", event, entry)
            return True
        if entry.event_type == MESSAGE_CREATED:
            elsewhere = log.created.get(entry.message_id)
        else:
            elsewhere = log.places.get((entry.event_type, entry.message_id))
        if elsewhere is not None:
            seen = view.last is not None and view.base is not None and view.base < elsewhere.seq <= view.last
            missed = elsewhere.seq in view.bogus or any(low <= elsewhere.seq <= high for low, high, _, _ in view.holes)
            if seen and not missed:
                self._find(
                    "doubled", log.channel, f"{entry.device} was shown {entry.message_id} twice", elsewhere, entry
                )
            else:
                what = f"{entry.device} saw at {entry.seq} what the log has at {elsewhere.seq}"
                self._find("reordered", log.channel, what, elsewhere, entry)
            return False
        self._find_unlogged(log, entry)
        return False

    def _known_version(self, log: _Log, event: LogEvent, entry: Observe) -> bool:
        if log.same_body(event, entry.digest):
            return True
        # Scrolling back shows a message as it is now, under the seq at which it was created.
        return entry.source == "history" and entry.digest in log.versions.get(event.message_id, ())

    def _find_unlogged(self, log: _Log, entry: Observe) -> None:
        """Something was shown that the log does not hold: was it ever asked for, and what was said about it?"""
        attempts: list[_Operation] = []
        if entry.event_type == MESSAGE_CREATED:
            attempts = self._sends.get((log.channel, entry.sender, entry.key), [])
        elif entry.message_id:
            digest = "" if entry.event_type == MESSAGE_DELETED else entry.digest
            attempts = self._causes.get((log.channel, entry.event_type, entry.message_id, entry.sender, digest), [])
        what = f"{entry.device} was shown event {entry.seq}, which is not in the log"
        kind: Kind = "diverged"
        if any(isinstance(operation.result, Ok) for operation in attempts):
            kind = "lost"
        elif (entry.message_id or entry.event_type == MESSAGE_CREATED) and all(item.failed for item in attempts):
            kind = "phantom"
        self._find(kind, log.channel, what, entry, *_lines(attempts))

    def _check_told(self, entry: Observe, told: dict[int, LogEvent]) -> bool:
        """Without a log to compare with: everybody must be shown the same."""
        first = told.get(entry.seq)
        if first is None:
            told[entry.seq] = LogEvent(
                entry.seq, entry.event_type, entry.message_id, entry.key, entry.sender, entry.digest, entry.user
            )
            attempts = self._sends.get((entry.channel, entry.sender, entry.key), [])
            if entry.event_type == MESSAGE_CREATED and entry.key and entry.sender and all(op.failed for op in attempts):
                what = f"{entry.device} was shown a message that nobody sent"
                self._find("phantom", entry.channel, what, entry, *_lines(attempts))
            return True
        if (first.message_id, first.type) != (entry.message_id, entry.event_type):
            self._find("reordered", entry.channel, f"two devices disagree on event {entry.seq}", first, entry)
            return False
        if first.digest != entry.digest and first.digest and entry.digest and entry.source != "history":
            self._find(
                "altered", entry.channel, f"two devices were shown different bodies at {entry.seq}", first, entry
            )
        return True

    def _check_place(self, entry: Observe, view: _View, true: bool) -> None:
        seq = entry.seq
        if view.epoch != entry.epoch:
            if view.epoch:
                self._close_holes(view)
                view.restart(entry.epoch, None)
            view.epoch = entry.epoch
        if not true:
            view.bogus.add(seq)
        if view.last is None or view.base is None:
            view.base = seq - 1
            view.last = seq
        elif seq == view.last + 1:
            view.last = seq
        elif seq > view.last:
            view.holes.append((view.last + 1, seq - 1, view.last_entry, entry))
            view.last = seq
        elif true and seq in view.bogus:
            view.bogus.discard(seq)
        elif view.fill(seq) or seq <= view.base:
            self._find(
                "reordered",
                entry.channel,
                f"{entry.device} saw {seq} after {view.last}",
                *_known(view.last_entry),
                entry,
            )
        elif true:
            self._find(
                "doubled", entry.channel, f"{entry.device} was shown event {seq} twice", *_known(view.last_entry), entry
            )
        view.last_entry = entry

    def _close_holes(self, view: _View) -> None:
        log = self._logs.get(view.channel)
        away = log.away(view.user) if log is not None and view.epoch in ("", log.epoch) else []
        for first, last, before, after in view.holes:
            for start, end in without(first, last, away):
                what = f"{view.device} of {view.user} was never shown {_range(start, end)}"
                self._find("gap", view.channel, what, *_known(before), after)
        view.holes = []

    def _check_final(self, final: DeviceFinal, view: _View | None, folds: dict[str, str]) -> None:
        log = self._logs.get(final.channel)
        if log is None:
            return
        away = log.away(final.user)
        member = not (away and away[-1][1] == _NEVER)
        if log.membership and final.user not in log.membership:
            member = final.channel in self._public
        if view is not None and view.epoch not in ("", log.epoch):
            self._find(
                "diverged", final.channel, f"{final.device} ended in another epoch", *_known(view.last_entry), final
            )
            return
        if member and final.position != log.head:
            self._find("diverged", final.channel, f"{final.device} ended at {final.position} of {log.head}", final)
            return
        if view is not None and view.last is not None and view.last < final.position:
            for start, end in without(view.last + 1, final.position, away):
                self._find_unseen(final, view, start, end)
        if member and final.state:
            if final.channel not in folds:
                fold = StateFold()
                for event in log.events:
                    fold.apply(event)
                folds[final.channel] = fold.digest()
            if final.state != folds[final.channel]:
                self._find("diverged", final.channel, f"{final.device} holds another state than the log", final)

    def _find_unseen(self, final: DeviceFinal, view: _View, start: int, end: int) -> None:
        what = f"{final.device} of {final.user} ended at {final.position} without being shown {_range(start, end)}"
        for seq in range(start, end + 1):
            written = self._acknowledged.get((final.channel, seq))
            if written is not None:
                self._find("lost", final.channel, what, *written.lines(), *_known(view.last_entry), final)
                return
        self._find("gap", final.channel, what, *_known(view.last_entry), final)


def _signature(call: Edit | Delete | React) -> tuple[str, str, str, str]:
    """(event type, message id, who, digest) of the event that `call` makes."""
    match call:
        case Edit():
            return MESSAGE_UPDATED, call.message_id, call.sender, call.digest
        case Delete():
            return MESSAGE_DELETED, call.message_id, call.sender, ""
        case React():
            kind = REACTION_ADDED if call.added else REACTION_REMOVED
            return kind, call.message_id, call.sender, body_digest(call.reaction)
        case _:
            assert_never(call)


def _is_effect(call: Call, event: LogEvent, log: _Log) -> bool:
    match call:
        case Edit() | Delete() | React():
            kind, message_id, _, digest = _signature(call)
            same = kind == MESSAGE_DELETED or log.same_body(event, digest)
            return event.type == kind and event.message_id == message_id and same
        case Join():
            return event.type == MEMBER_ADDED and event.user == call.user
        case Leave() | Remove():
            return event.type == MEMBER_REMOVED and event.user == call.user
        case Send() | Mark() | Fetch():
            return False
        case _:
            assert_never(call)


def _sent_digest(operation: _Operation) -> str:
    call = operation.invoke.call
    return call.digest if isinstance(call, Send) else ""


def _lines(operations: Iterable[_Operation]) -> tuple[Entry, ...]:
    return tuple(line for operation in operations for line in operation.lines())


def _known(entry: Observe | None) -> tuple[Observe, ...]:
    return () if entry is None else (entry,)


def _range(start: int, end: int) -> str:
    return f"event {start}" if start == end else f"events {start} to {end}"


def _widen(
    happened: dict[int, tuple[float, float, _Operation]], seq: int, operation: _Operation, *, counts: bool
) -> None:
    """Several attempts at one event are one: it may have begun with the first, and was known with the first ok."""
    done = operation.ok_at if counts else _NEVER
    known = happened.get(seq)
    if known is None:
        happened[seq] = (operation.invoke.at, done, operation)
    else:
        invoked, before, first = known
        happened[seq] = (min(invoked, operation.invoke.at), min(before, done), first if before <= done else operation)


def _real_time_violations(
    spans: list[tuple[int, float, float, _Operation]],
) -> Iterator[tuple[_Operation, _Operation]]:
    """Pairs where the second was invoked after the first was acknowledged, and yet has the lower value.

    `spans`: (value, invoked at, acknowledged at or infinity, operation). Equal times count as concurrent.
    """
    pending: list[tuple[float, int, int]] = []
    highest = -1
    leader: _Operation | None = None
    for place in sorted(range(len(spans)), key=lambda number: spans[number][1]):
        value, invoked, done, operation = spans[place]
        while pending and pending[0][0] < invoked:
            _, number, other = heapq.heappop(pending)
            if number > highest:
                highest, leader = number, spans[other][3]
        if leader is not None and value < highest:
            yield leader, operation
        if done != _NEVER:
            heapq.heappush(pending, (done, value, place))
