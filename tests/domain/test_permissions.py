"""The truth table of permissions: every built-in role against every word, written out.

It is literal on purpose. Whoever changes what a role may do changes it here, too, and sees the whole line.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.server.domain.permissions import (
    BUILT_IN,
    CHANNEL_WORDS,
    EVERYTHING,
    NONE,
    PUBLIC_GRANTS,
    Grants,
    Permission,
    bit,
    grants_of,
    has,
    words_of,
)

# Columns: app guest, user, moderator, admin | channel reader, member, moderator, owner | relation panel | public type.
ROLES = (
    ("app", "guest"),
    ("app", "user"),
    ("app", "moderator"),
    ("app", "admin"),
    ("channel", "reader"),
    ("channel", "member"),
    ("channel", "moderator"),
    ("channel", "owner"),
    ("relation", "panel"),
    ("type", "public"),
)

TABLE = """
                        gues user mode admi  read memb mode owne  pane  publ
channel.read              .    .    x    .     x    x    x    x     x     x
channel.join              .    .    .    .     .    .    .    .     .     x
channel.leave             .    .    x    .     x    x    x    x     x     .
channel.update            .    .    x    .     .    .    x    x     .     .
channel.freeze            .    .    x    .     .    .    x    x     .     .
channel.delete            .    .    .    .     .    .    .    x     .     .
member.read               .    .    x    x     x    x    x    x     x     x
member.add                .    .    x    .     .    .    x    x     .     .
member.remove             .    .    x    .     .    .    x    x     .     .
member.update             .    .    .    .     .    .    .    x     .     .
message.send              .    .    x    .     .    x    x    x     x     .
message.send_frozen       .    .    x    .     .    .    x    x     .     .
message.system            .    .    .    .     .    .    .    .     .     .
message.silent            .    .    x    .     .    x    x    x     x     .
message.mention_all       .    .    x    .     .    .    x    x     .     .
message.edit_own          .    .    x    .     .    x    x    x     x     .
message.edit_any          .    .    .    .     .    .    .    .     .     .
message.delete_own        .    .    x    .     .    x    x    x     x     .
message.delete_any        .    .    x    .     .    .    x    x     .     .
message.delete_hard       .    .    .    .     .    .    .    .     .     .
message.versions          .    .    x    .     .    .    x    x     .     .
reaction.add              .    .    x    .     .    x    x    x     x     .
receipt.send              .    .    x    .     x    x    x    x     x     .
typing.send               .    .    x    .     .    x    x    x     x     .
channel.create            .    x    x    x     .    .    .    .     .     .
channel.create_direct     .    x    x    x     .    .    .    .     .     .
channel.list_any          .    .    x    x     .    .    .    .     .     .
user.read                 x    x    x    x     .    .    .    .     .     .
user.create               .    .    .    x     .    .    .    .     .     .
user.update_own           x    x    x    x     .    .    .    .     .     .
user.update_any           .    .    .    x     .    .    .    .     .     .
user.deactivate           .    .    x    x     .    .    .    .     .     .
user.delete               .    .    .    x     .    .    .    .     .     .
user.act_as               .    .    .    .     .    .    .    .     .     .
token.mint                .    .    .    .     .    .    .    .     .     .
token.revoke              .    .    .    x     .    .    .    .     .     .
device.manage_any         .    .    .    x     .    .    .    .     .     .
app.read                  .    .    .    x     .    .    .    .     .     .
app.update                .    .    .    x     .    .    .    .     .     .
role.manage               .    .    .    x     .    .    .    .     .     .
key.manage                .    .    .    .     .    .    .    .     .     .
audit.read                .    .    .    x     .    .    .    .     .     .
job.manage                .    .    .    x     .    .    .    .     .     .
trace.read                .    .    .    x     .    .    .    .     .     .
push.manage               .    .    .    x     .    .    .    .     .     .
webhook.manage            .    .    .    x     .    .    .    .     .     .
hook.manage               .    .    .    x     .    .    .    .     .     .
"""

LINES = {cells[0]: cells[1:] for cells in (line.split() for line in TABLE.splitlines()[2:])}

# Every word that shows or changes what people say.
CONVERSATION = [word for word in Permission if word.value.startswith(("message.", "reaction.", "channel.read"))]


def granted(scope: str, role: str) -> frozenset[Permission]:
    return PUBLIC_GRANTS if scope == "type" else BUILT_IN[scope][role]


def test_the_table_has_a_line_for_every_word_and_a_column_for_every_role() -> None:
    assert list(LINES) == [word.value for word in Permission]
    assert {len(cells) for cells in LINES.values()} == {len(ROLES)}
    built_in = [(scope, role) for scope, roles in BUILT_IN.items() for role in roles]
    assert sorted(built_in) == sorted(role for role in ROLES if role[0] != "type")


@pytest.mark.parametrize("column", range(len(ROLES)), ids=[" ".join(role) for role in ROLES])
def test_a_role_holds_exactly_the_words_of_its_column(column: int) -> None:
    expected = {word for word, cells in LINES.items() if cells[column] == "x"}
    words = granted(*ROLES[column])
    assert {word.value for word in words} == expected
    mask = grants_of(words)
    for word in Permission:
        assert has(mask, word) == (LINES[word.value][column] == "x")


def test_an_administrator_reads_the_audit_trail_and_no_message() -> None:
    admin = grants_of(BUILT_IN["app"]["admin"])
    assert has(admin, Permission.AUDIT_READ)
    for word in CONVERSATION:
        assert not has(admin, word), word


def test_nobody_but_a_backend_acts_for_others_or_writes_in_the_systems_name() -> None:
    for scope, role in ROLES:
        words = granted(scope, role)
        for word in (
            Permission.USER_ACT_AS,
            Permission.TOKEN_MINT,
            Permission.KEY_MANAGE,
            Permission.MESSAGE_SYSTEM,
            Permission.MESSAGE_EDIT_ANY,
            Permission.MESSAGE_DELETE_HARD,
        ):
            assert word not in words, (scope, role, word)


def test_roles_of_a_scope_grow_with_their_rank() -> None:
    for scope, ranks in {"channel": ["reader", "member", "moderator", "owner"], "app": ["guest", "user"]}.items():
        for lower, higher in itertools.pairwise(ranks):
            assert BUILT_IN[scope][lower] < BUILT_IN[scope][higher]


def test_channel_and_relation_roles_hold_words_of_channels_alone() -> None:
    for scope in ("channel", "relation"):
        for role, words in BUILT_IN[scope].items():
            assert words <= CHANNEL_WORDS, role
    assert PUBLIC_GRANTS <= CHANNEL_WORDS


def test_words_of_channels_are_the_first_half_of_the_list() -> None:
    own = ("channel.create", "channel.create_direct", "channel.list_any")
    nouns = ("channel", "member", "message", "reaction", "receipt", "typing")
    for word in Permission:
        assert (word in CHANNEL_WORDS) == (word.value.split(".")[0] in nouns and word.value not in own), word


def test_every_word_has_a_bit_of_its_own() -> None:
    bits = [bit(word) for word in Permission]
    assert all(value.bit_count() == 1 for value in bits)
    assert len(set(bits)) == len(bits)
    assert sum(bits) == EVERYTHING


def test_a_star_is_everything_and_nothing_is_nothing() -> None:
    assert grants_of(["*"]) == EVERYTHING
    assert words_of(EVERYTHING) == [word.value for word in Permission]
    assert grants_of([]) == NONE
    assert words_of(NONE) == []
    for word in Permission:
        assert has(EVERYTHING, word)
        assert not has(NONE, word)


@pytest.mark.parametrize("word", ["message.sned", "", "MESSAGE.SEND", "message", "message.*", "**", " message.send"])
def test_an_unknown_word_is_an_error_that_names_it(word: str) -> None:
    with pytest.raises(KeyError) as raised:
        grants_of(["message.send", word])
    assert raised.value.args == (word,)


words = st.sets(st.sampled_from([word.value for word in Permission]))


@given(words)
def test_words_survive_the_way_there_and_back(chosen: set[str]) -> None:
    back = words_of(grants_of(chosen))
    assert set(back) == chosen
    assert back == [word.value for word in Permission if word.value in chosen]


@given(words, words)
def test_grants_only_add_up(some: set[str], more: set[str]) -> None:
    together = Grants(grants_of(some) | grants_of(more))
    assert together == grants_of(some | more)
    for word in Permission:
        assert has(together, word) == (has(grants_of(some), word) or has(grants_of(more), word))
