"""What a push says: the reader's language, and nothing but the names that are allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.server.domain.templates import DEFAULTS, choose, fill, unknown_name
from tidings.wire.notifications import Template


@pytest.mark.parametrize(
    ("text", "content", "wrong"),
    [
        ("({count}) at {app}", False, None),
        ("{sender} in {channel} ({count}) at {app}", True, None),
        ("{sender}", False, "{sender}"),
        ("{channel}", False, "{channel}"),
        ("{text}", False, "{text}"),
        ("{text}", True, None),
        ("{sender.__class__}", True, "{sender.__class__}"),
        ("{0}", True, "{0}"),
        ("{}", True, "{}"),
        ("{sender!r}", True, "{sender!r}"),
        ("a { b", True, "{"),
        ("a } b", True, "}"),
        ("{{sender}}", True, "{"),
        ("no names", False, None),
    ],
)
def test_only_names_of_the_list_may_stand_in_braces(text: str, content: bool, wrong: str | None) -> None:
    assert unknown_name(text, content=content) == wrong


def test_what_is_filled_in_is_not_looked_at_again() -> None:
    assert fill("{sender}: {text}", {"sender": "{text}", "text": "{sender}{0}%s"}) == "{text}: {sender}{0}%s"


@given(st.text(), st.text())
def test_filling_never_fails(text: str, value: str) -> None:
    fill(text, {"sender": value})


def test_the_readers_language_then_its_wider_one_then_the_apps() -> None:
    ours = {"message": {"de": Template(body="de"), "pt-BR": Template(body="br")}, "mention": {"en": Template(body="@")}}
    assert choose(ours, "message", "de-AT").body == "de"  # type: ignore[arg-type]
    assert choose(ours, "message", "PT-br").body == "br"  # type: ignore[arg-type]
    assert choose(ours, "message", "fi").body == "de"  # type: ignore[arg-type]
    assert choose(ours, "mention", "de").body == "@"  # type: ignore[arg-type]
    assert choose(ours, "reply", "de").body == "de"  # type: ignore[arg-type]
    assert choose({}, "message", "de-CH") == DEFAULTS["de"]
    assert choose({}, "message", "xx") == DEFAULTS["en"]
    assert choose({}, "message", None) == DEFAULTS["en"]


def test_what_is_built_in_names_nobody() -> None:
    for template in DEFAULTS.values():
        assert unknown_name(template.title + template.body, content=False) is None
        assert "{sender}" not in template.title + template.body
