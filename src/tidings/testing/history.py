"""The operation log that clients under test write and `tidings.testing.checker` reads.

One JSON object per line. `kind` says what the line is; fields with their default value may be left out.

Operations. A process (one client, one thread of control) invokes a call and learns one of three outcomes:

    {"kind":"invoke","id":"p1/7","at":12,"process":"p1","call":{"do":"send","channel":"c","sender":"ann","key":"k7","digest":"9f…"}}
    {"kind":"ok","id":"p1/7","at":15,"message_id":"m_1","seq":4}     it happened
    {"kind":"fail","id":"p1/7","at":15,"code":"forbidden"}           it did not happen and never will
    {"kind":"info","id":"p1/7","at":15,"reason":"timed out"}         nobody knows: it may have happened once

An operation without an outcome counts as `info`. `id` is unique in the whole log; a retry is a new operation with the
same client key. `at` is nanoseconds of one monotonic clock that all processes share (`time.monotonic_ns()`), taken
before the request leaves and after the reply arrived: only then may the checker conclude anything from "later".

| `do` | fields | the outcome `ok` carries |
|---|---|---|
| `send` | channel, sender, key, digest | message_id, seq |
| `edit` | channel, sender, message_id, digest | seq |
| `delete` | channel, sender, message_id | seq |
| `react` | channel, sender, message_id, reaction, added | seq |
| `join`, `leave` | channel, user | seq of the membership event |
| `remove` | channel, user, by | seq of the membership event |
| `mark` | channel, user, which (`read` or `delivered`), position | seq: the position that the server holds now |
| `fetch` | channel, user | first, last, shown |

`seq` 0 in an `ok` means that nothing changed (the reaction was there already). A `fetch` is a read of history: it
claims to show every message whose seq is in first..last; `last` null means "up to now"; `shown` lists the seqs of the
messages that it showed. If a process knows the epoch it puts it in `epoch` of the `ok`.

Observations, in the order in which the application of one device saw them (lines of one device are never reordered):

    {"kind":"device_start","at":1,"device":"d1","user":"ann","channel":"c","position":0}
    {"kind":"observe","at":9,"device":"d1","user":"bob","channel":"c","epoch":"e","seq":4,"event_type":"message.created",
     "message_id":"m_1","key":"k7","sender":"ann","digest":"9f…","source":"live"}
    {"kind":"receipt","at":10,"device":"d1","channel":"c","user":"bob","which":"read","position":4}
    {"kind":"device_final","at":99,"device":"d1","user":"ann","channel":"c","position":8}

`device_start` says "from here on I expect position + 1": write it at the first connection and whenever the application
deliberately starts over (another epoch, `cursor_expired`, a device that came back with an older position). Without
it a device may begin anywhere. `source` is `live`, `catchup` (both make up the device's stream) or `history` (scrolling
back; any order, as often as the user likes). `user` in a receipt is whose position it is; `device` is who saw it.
`device_final` says that the device was given all the time it needed and ended at `position`; `state` may carry its
`StateFold.digest()`.

The truth, read from the server (or its database) when all is quiet; several lines for one channel are joined:

    {"kind":"final_log","channel":"c","epoch":"e","events":[[1,"member.added","","","admin","","ann"],
     [2,"message.created","m_1","k7","ann","9f…",""]]}

An event is `[seq, type, message id, key, sender, digest, user]`, `user` being whom a membership event is about.
`digest` is `body_digest` of the body; of a reaction event, of the reaction. It is "" where the body is gone (deleted).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

Source = Literal["live", "catchup", "history"]
Which = Literal["read", "delivered"]

# Event types as the wire names them; only these mean anything to the checker.
MESSAGE_CREATED = "message.created"
MESSAGE_UPDATED = "message.updated"
MESSAGE_DELETED = "message.deleted"
REACTION_ADDED = "reaction.added"
REACTION_REMOVED = "reaction.removed"
MEMBER_ADDED = "member.added"
MEMBER_REMOVED = "member.removed"

# Eight bytes tell a million bodies apart (collision odds about 10^-7) and keep a log line short.
DIGEST_BYTES = 8


def body_digest(body: str | bytes) -> str:
    """The short fingerprint under which a body appears in a log; logs never hold bodies."""
    data = body.encode() if isinstance(body, str) else body
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


class _Call(msgspec.Struct, frozen=True, tag_field="do", omit_defaults=True):
    channel: str


class Send(_Call, frozen=True, tag="send"):
    sender: str
    key: str
    digest: str


class Edit(_Call, frozen=True, tag="edit"):
    sender: str
    message_id: str
    digest: str


class Delete(_Call, frozen=True, tag="delete"):
    sender: str
    message_id: str


class React(_Call, frozen=True, tag="react"):
    sender: str
    message_id: str
    reaction: str
    added: bool = True


class Join(_Call, frozen=True, tag="join"):
    user: str


class Leave(_Call, frozen=True, tag="leave"):
    user: str


class Remove(_Call, frozen=True, tag="remove"):
    user: str
    by: str = ""


class Mark(_Call, frozen=True, tag="mark"):
    user: str
    which: Which
    position: int


class Fetch(_Call, frozen=True, tag="fetch"):
    user: str


Call = Send | Edit | Delete | React | Join | Leave | Remove | Mark | Fetch


class _Entry(msgspec.Struct, frozen=True, tag_field="kind", omit_defaults=True, gc=False):
    """`gc=False`: no entry can be part of a cycle, and a million tracked objects make the collector crawl."""


class Invoke(_Entry, frozen=True, tag="invoke"):
    id: str
    at: int
    process: str
    call: Call


class Ok(_Entry, frozen=True, tag="ok"):
    id: str
    at: int
    message_id: str = ""
    seq: int = 0
    epoch: str = ""
    first: int = 0
    last: int | None = None
    shown: tuple[int, ...] = ()


class Fail(_Entry, frozen=True, tag="fail"):
    id: str
    at: int
    code: str = ""


class Info(_Entry, frozen=True, tag="info"):
    id: str
    at: int
    reason: str = ""


class DeviceStart(_Entry, frozen=True, tag="device_start"):
    at: int
    device: str
    user: str
    channel: str
    position: int


class Observe(_Entry, frozen=True, tag="observe"):
    at: int
    device: str
    user: str
    channel: str
    epoch: str
    seq: int
    event_type: str
    message_id: str = ""
    key: str = ""
    sender: str = ""
    digest: str = ""
    source: Source = "live"


class Receipt(_Entry, frozen=True, tag="receipt"):
    at: int
    device: str
    channel: str
    user: str
    which: Which
    position: int


class DeviceFinal(_Entry, frozen=True, tag="device_final"):
    at: int
    device: str
    user: str
    channel: str
    position: int
    state: str = ""


class LogEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    seq: int
    type: str
    message_id: str = ""
    key: str = ""
    sender: str = ""
    digest: str = ""
    user: str = ""


class FinalLog(_Entry, frozen=True, tag="final_log"):
    channel: str
    epoch: str
    events: tuple[LogEvent, ...]


Entry = Invoke | Ok | Fail | Info | DeviceStart | Observe | Receipt | DeviceFinal | FinalLog


class BadHistory(Exception):
    """The log itself is wrong (not the system under test): which line or operation, and why."""


class StateFold:
    """Folds the events of one channel, in order, into the state that a device shows at the end.

    The state is: for each message its last digest or that it is deleted, who reacted with what, and who is a
    member. Two folds with equal `digest()` show the same conversation.
    """

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}
        self._reactions: set[tuple[str, str, str]] = set()
        self._members: set[str] = set()

    def apply(self, event: LogEvent) -> None:
        match event.type:
            case "message.created" | "message.updated":
                # An event read back after the deletion has lost its body; what counts is the end.
                self._messages[event.message_id] = event.digest
            case "message.deleted":
                self._messages[event.message_id] = "deleted"
                self._reactions = {item for item in self._reactions if item[0] != event.message_id}
            case "reaction.added":
                self._reactions.add((event.message_id, event.sender, event.digest))
            case "reaction.removed":
                self._reactions.discard((event.message_id, event.sender, event.digest))
            case "member.added":
                self._members.add(event.user)
            case "member.removed":
                self._members.discard(event.user)
            case _:
                pass

    def digest(self) -> str:
        state = (sorted(self._messages.items()), sorted(self._reactions), sorted(self._members))
        return body_digest(msgspec.json.encode(state))


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)


def encode_entry(entry: Entry) -> bytes:
    """One line of a log, with its line end."""
    return _encoder.encode(entry) + b"\n"


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a JSONL file, one at a time. Raises `BadHistory` naming the line that does not fit the format.

    A torn last line (the writer was killed) is left out.
    """
    with path.open("rb") as file:
        yield from _decode_lines(file, path)


def _decode_lines(file: BinaryIO, path: Path) -> Iterator[Entry]:
    decode = _decoder.decode
    for number, line in enumerate(file, 1):
        try:
            yield decode(line)
        except msgspec.DecodeError as error:
            if not line.endswith(b"\n"):
                return
            raise BadHistory(f"{path}, line {number}: {error}") from error


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write a log in one go (`Recorder` writes it while things happen)."""
    with path.open("wb") as file:
        file.writelines(map(encode_entry, entries))


EntrySource = Callable[[], Iterable[Entry]]
