"""The session: bytes and time in, what to do out. No loop, no socket, no clock."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tidings.server.errors import Refusal
from tidings.server.gateway.session import (
    CONTROL_FRAMES_BURST,
    CONTROL_FRAMES_PER_SECOND,
    GARBAGE_MAX,
    SILENT_HEARTBEATS_MAX,
    Answer,
    Close,
    Run,
    Session,
    SessionLimits,
    State,
    refusal_of,
)
from tidings.wire.codec import decode_command
from tidings.wire.commands import Connect, Ping, SendMessage, Typing
from tidings.wire.problems import CATALOGUE

LIMITS = SessionLimits(
    auth_timeout_seconds=5,
    heartbeat_seconds=25,
    commands_per_second=10,
    commands_burst=20,
    in_flight_max=8,
    frame_bytes_max=2_000,
)

CONNECT = b'{"type":"connect","ref":1,"device":{"id":"d"},"token":"t"}'
PING = b'{"type":"ping","ref":2}'
SEND = b'{"type":"message.send","ref":3,"channel":"c","key":"k","text":"hi"}'
ILL_TYPED = b'{"type":"message.send","ref":4,"channel":"c","key":"k","text":5}'
UNKNOWN_TYPE = b'{"type":"message.sned","ref":5}'
NOT_JSON = b"{"
NOT_UTF8 = b'{"type":"ping","ref":\xff}'
NOT_AN_OBJECT = b"[1]"
NO_TYPE = b'{"ref":6}'
HUGE = b'{"type":"ping","ref":7' + b" " * 2_000 + b"}"


def session_in(state: State, now: float = 0.0) -> Session:
    session = Session(LIMITS, now)
    if state is State.WAITING:
        return session
    assert isinstance(session.receive(CONNECT, now), Run)
    if state is State.CONNECTING:
        return session
    session.answered()
    session.connected(now, expires_at=None, issued_at_ms=None, jti=None)
    if state is State.CLOSED:
        session.closed()
    return session


def said(action: object) -> tuple[str, ...]:
    """An action as words."""
    match action:
        case None:
            return ("nothing",)
        case Run(command):
            return ("run", type(command).__name__)
        case Answer(refusal, ref):
            return ("answer", refusal.code, str(ref))
        case Close(refusal, ref):
            return ("close", refusal.code, str(ref))
    raise AssertionError(action)


W, C, O, X = State.WAITING, State.CONNECTING, State.OPEN, State.CLOSED  # noqa: E741

TABLE: list[tuple[str, State, bytes, tuple[str, ...], State]] = [
    ("the first frame connects", W, CONNECT, ("run", "Connect"), C),
    ("anything else first ends it", W, PING, ("close", "unauthenticated", "2"), X),
    ("a send first ends it", W, SEND, ("close", "unauthenticated", "3"), X),
    ("an ill-typed first frame ends it", W, ILL_TYPED, ("close", "invalid", "4"), X),
    ("a first frame that is not JSON ends it", W, NOT_JSON, ("close", "invalid", "None"), X),
    ("a huge first frame ends it", W, HUGE, ("close", "too_large", "None"), X),
    ("what is sent before `connected` waits its turn", C, SEND, ("run", "SendMessage"), C),
    ("connecting twice is answered", C, CONNECT, ("answer", "conflict", "1"), C),
    ("ill-typed before `connected` ends it", C, ILL_TYPED, ("close", "invalid", "4"), X),
    ("not JSON before `connected` ends it", C, NOT_JSON, ("close", "invalid", "None"), X),
    ("a huge frame before `connected` ends it", C, HUGE, ("close", "too_large", "None"), X),
    ("a command runs", O, SEND, ("run", "SendMessage"), O),
    ("a ping runs", O, PING, ("run", "Ping"), O),
    ("connecting again is answered", O, CONNECT, ("answer", "conflict", "1"), O),
    ("an ill-typed command is answered by its ref", O, ILL_TYPED, ("answer", "invalid_field", "4"), O),
    ("an unknown type is answered by its ref", O, UNKNOWN_TYPE, ("answer", "invalid_field", "5"), O),
    ("a missing type is answered by its ref", O, NO_TYPE, ("answer", "invalid_field", "6"), O),
    ("not an object is answered", O, NOT_AN_OBJECT, ("answer", "invalid_field", "None"), O),
    ("not JSON is answered", O, NOT_JSON, ("answer", "invalid", "None"), O),
    ("not UTF-8 is answered", O, NOT_UTF8, ("answer", "invalid", "None"), O),
    ("a huge frame ends it", O, HUGE, ("close", "too_large", "None"), X),
    *[
        (f"nothing is done after the end ({data[:20]!r})", X, data, ("nothing",), X)
        for data in (CONNECT, PING, SEND, ILL_TYPED, NOT_JSON, HUGE)
    ],
]


@pytest.mark.parametrize(("_", "state", "data", "action", "after"), TABLE, ids=[row[0] for row in TABLE])
def test_every_frame_in_every_state(_: str, state: State, data: bytes, action: tuple[str, ...], after: State) -> None:
    session = session_in(state)
    assert said(session.receive(data, 0.0)) == action
    assert session.state is after


# ------------------------------------------------------------ time


def test_who_does_not_connect_in_time_is_shown_out() -> None:
    for state in (State.WAITING, State.CONNECTING):
        session = session_in(state)
        assert session.next_tick() == LIMITS.auth_timeout_seconds
        assert session.tick(4.99) is None
        close = session.tick(5.0)
        assert said(close) == ("close", "auth_timeout", "None")
        assert close is not None
        assert close.code == 4402


def test_talking_without_connecting_buys_no_time() -> None:
    session = session_in(State.CONNECTING)
    session.receive(SEND, 4.9)
    assert said(session.tick(5.0))[1] == "auth_timeout"


def test_two_silent_heartbeats_end_it_and_one_does_not() -> None:
    session = session_in(State.OPEN)
    assert session.tick(LIMITS.heartbeat_seconds * SILENT_HEARTBEATS_MAX - 0.01) is None
    assert session.next_tick() == LIMITS.heartbeat_seconds * SILENT_HEARTBEATS_MAX
    close = session.tick(LIMITS.heartbeat_seconds * SILENT_HEARTBEATS_MAX)
    assert close is not None
    assert (close.refusal.code, close.code) == ("heartbeat_timeout", 4408)


@pytest.mark.parametrize("data", [PING, SEND, ILL_TYPED, NOT_JSON, None])
def test_whatever_is_heard_is_a_sign_of_life(data: bytes | None) -> None:
    session = session_in(State.OPEN)
    if data is None:
        session.control(40)
    else:
        session.receive(data, 40)
    assert session.tick(89.9) is None
    assert said(session.tick(90)) == ("close", "heartbeat_timeout", "None")


def test_a_token_ends_its_session_and_a_fresh_one_prolongs_it() -> None:
    session = session_in(State.OPEN)
    session.authorised(expires_at=30, issued_at_ms=1, jti="a")
    assert session.next_tick() == 30
    session.receive(PING, 29)
    assert session.tick(29.9) is None
    session.authorised(expires_at=60, issued_at_ms=2, jti="b")
    assert session.tick(30) is None
    session.receive(PING, 59)
    close = session.tick(60)
    assert close is not None
    assert (close.refusal.code, close.code) == ("token_expired", 4401)


def test_time_says_nothing_after_the_end() -> None:
    assert session_in(State.CLOSED).tick(1e9) is None


# ------------------------------------------------------------ bounds


def test_commands_beyond_the_burst_are_refused_with_a_time_to_wait() -> None:
    session = session_in(State.OPEN)
    for _ in range(20):
        assert isinstance(session.receive(PING, 1.0), Run)
        session.answered()
    refused = session.receive(PING, 1.0)
    assert isinstance(refused, Answer)
    assert (refused.refusal.code, refused.ref) == ("rate_limited", 2)
    assert refused.refusal.retry_after_ms is not None
    later = 1.0 + refused.refusal.retry_after_ms / 1000
    assert isinstance(session.receive(PING, later), Run)


def test_commands_that_wait_for_replies_are_bounded_and_a_ping_goes_through() -> None:
    session = session_in(State.OPEN)
    for _ in range(8):
        assert isinstance(session.receive(SEND, 0.0), Run)
    refused = session.receive(SEND, 0.0)
    assert isinstance(refused, Answer)
    assert (refused.refusal.code, refused.refusal.bound) == ("too_many_in_flight", 8)
    assert said(session.receive(PING, 0.0)) == ("run", "Ping")
    session.answered()
    session.answered()
    assert isinstance(session.receive(SEND, 0.0), Run)


def test_too_much_before_connected_ends_it() -> None:
    session = session_in(State.CONNECTING)
    actions = [session.receive(SEND, 0.0) for _ in range(8)]
    assert [type(action) for action in actions] == [Run] * 7 + [Close]
    assert said(actions[-1]) == ("close", "too_many_in_flight", "3")


def test_a_flood_that_cannot_be_read_ends_it_and_a_readable_frame_forgives() -> None:
    session = session_in(State.OPEN)
    for _ in range(GARBAGE_MAX - 1):
        assert isinstance(session.receive(NOT_JSON, 0.0), Answer)
    session.receive(PING, 0.0)
    for _ in range(GARBAGE_MAX - 1):
        assert isinstance(session.receive(NOT_JSON, 0.0), Answer)
    assert said(session.receive(NOT_JSON, 0.0)) == ("close", "invalid", "None")


def test_ill_typed_commands_count_against_the_rate_like_any_other() -> None:
    session = session_in(State.OPEN)
    answers = [said(session.receive(ILL_TYPED, 0.0))[1] for _ in range(30)]
    assert answers == ["invalid_field"] * 20 + ["rate_limited"] * 10


def test_control_frames_are_bounded() -> None:
    session = session_in(State.OPEN)
    for _ in range(int(CONTROL_FRAMES_BURST)):
        assert session.control(0.0) is None
    assert session.control(1 / CONTROL_FRAMES_PER_SECOND) is None
    close = session.control(1 / CONTROL_FRAMES_PER_SECOND)
    assert close is not None
    assert (close.refusal.code, close.code) == ("rate_limited", 4429)


def test_deep_nesting_is_refused_and_not_followed() -> None:
    deep = b'{"type":"message.send","ref":1,"channel":"c","key":"k","custom":{"a":' + b"[" * 900 + b"]" * 900 + b"}}"
    session = session_in(State.OPEN)
    action = session.receive(deep, 0.0)
    assert isinstance(action, Run | Answer)


# ------------------------------------------------------------ errors name their field


@pytest.mark.parametrize(
    ("document", "field", "bound"),
    [
        ({"type": "message.send", "channel": "c", "key": "k", "text": 5}, "text", None),
        ({"type": "message.send", "channel": "c", "key": "k", "text": "x" * 20_001}, "text", 20_000),
        ({"type": "message.send", "channel": "c"}, "key", None),
        ({"type": "message.send", "channel": "c", "key": "k", "colour": 1}, "colour", None),
        ({"type": "message.send", "channel": "no spaces", "key": "k"}, "channel", None),
        ({"type": "message.send", "channel": "c", "key": "k", "mentions": ["a"] * 51}, "mentions", 50),
        ({"type": "message.send", "channel": "c", "key": "k", "mentions": ["a", 5]}, "mentions[1]", None),
        (
            {"type": "message.send", "channel": "c", "key": "k", "attachments": [{"type": "file", "url": 5}]},
            "attachments[0].url",
            None,
        ),
        (
            {"type": "message.send", "channel": "c", "key": "k", "attachments": [{"type": "file", "uri": "x"}]},
            "attachments[0].uri",
            None,
        ),
        ({"type": "connect", "device": {}}, "device.id", None),
        ({"type": "connect", "device": {"id": "d", "os": "x"}}, "device.os", None),
        ({"type": "connect"}, "device", None),
        ({"type": "sync", "positions": {"c": {"seq": -1}}}, "positions[...].seq", 0),
        ({"type": "history", "channel": "c", "limit": 0}, "limit", 1),
        ({"type": "history", "channel": "c", "limit": 201}, "limit", 200),
        ({"type": "nonsense"}, "type", None),
    ],
)
def test_a_refusal_names_the_field_and_its_bound(document: dict[str, Any], field: str, bound: int | None) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        decode_command(json.dumps(document).encode())
    refusal = refusal_of(raised.value)
    assert (refusal.code, refusal.field, refusal.bound) == ("invalid_field", field, bound)


def test_what_is_not_json_is_said_to_be_that() -> None:
    for data in (b"", b"{", b"\xff", b"nope"):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)) as raised:
            decode_command(data)
        refusal = refusal_of(raised.value)
        assert (refusal.code, refusal.field) == ("invalid", None)


# ------------------------------------------------------------ everything at once


class SessionMachine(RuleBasedStateMachine):
    """Any inputs in any order."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.session = Session(LIMITS, 0.0)
        self.running = 0
        self.connecting = False
        self.ended = False
        self.taken: list[float] = []

    def act(self, action: object) -> None:
        assert not (self.ended and action is not None), "something was said after the end"
        if isinstance(action, Run):
            if isinstance(action.command, Connect):
                assert not self.connecting
                self.connecting = True
            elif self.session.state is State.OPEN:
                self.taken.append(self.now)
            self.running += 1
        elif isinstance(action, Close):
            assert CATALOGUE[action.refusal.code].close == action.code
            assert 4000 <= action.code < 5000
            assert self.session.state is State.CLOSED
            self.ended = True
        elif isinstance(action, Answer):
            assert action.refusal.code in CATALOGUE

    @rule(data=st.sampled_from([CONNECT, PING, SEND, ILL_TYPED, UNKNOWN_TYPE, NOT_JSON, NOT_UTF8, NO_TYPE, HUGE]))
    def receive(self, data: bytes) -> None:
        self.act(self.session.receive(data, self.now))

    @rule(data=st.binary(max_size=60))
    def receive_anything(self, data: bytes) -> None:
        self.act(self.session.receive(data, self.now))

    @rule()
    def control(self) -> None:
        self.act(None if self.ended else self.session.control(self.now))

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.1, 1.0, 6.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.act(self.session.tick(self.now))

    @precondition(lambda self: self.running > 0)
    @rule()
    def answer(self) -> None:
        self.running -= 1
        self.session.answered()

    @precondition(lambda self: self.session.state is State.CONNECTING)
    @rule(life=st.none() | st.floats(0.1, 60))
    def connected(self, life: float | None) -> None:
        expires_at = None if life is None else self.now + life
        self.session.connected(self.now, expires_at=expires_at, issued_at_ms=None, jti=None)

    @rule()
    def close(self) -> None:
        self.session.closed()
        self.ended = True

    @invariant()
    def what_runs_is_counted(self) -> None:
        assert self.session.in_flight == self.running
        assert self.session.in_flight >= 0
        # A ping goes through when nothing else does.
        pings = LIMITS.commands_burst + LIMITS.commands_per_second * self.now
        assert self.session.in_flight <= LIMITS.in_flight_max + pings

    @invariant()
    def the_rate_is_never_exceeded(self) -> None:
        for start in range(len(self.taken)):
            count = len(self.taken) - start
            allowed = LIMITS.commands_burst + LIMITS.commands_per_second * (self.taken[-1] - self.taken[start])
            assert count <= allowed + 1e-6

    @invariant()
    def the_end_stays_the_end(self) -> None:
        assert (self.session.state is State.CLOSED) == self.ended


SessionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSessionMachine = SessionMachine.TestCase


def test_commands_arrive_as_their_types() -> None:
    assert isinstance(decode_command(PING), Ping)
    assert isinstance(decode_command(SEND), SendMessage)
    assert isinstance(decode_command(b'{"type":"typing","channel":"c"}'), Typing)
    assert isinstance(refusal_of(ValueError()), Refusal)
