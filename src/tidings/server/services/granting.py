"""Giving words away: what is a word, who may grant it, and how many rules there may be.

Nobody gives away what they do not hold: whoever makes a key, a role or a relation, or gives somebody a role, must hold
every word that this adds.
"""

from __future__ import annotations

import difflib
from typing import Any, Final

import msgspec

from tidings.server.domain.permissions import BUILT_IN, CHANNEL_WORDS, Grants, Permission, grants_of, words_of
from tidings.server.errors import Refusal
from tidings.server.store.base import Row, Tx

from .access import Actor

_WORDS: Final = tuple(word.value for word in Permission)


def check_words(words: list[str], field: str, *, channel_only: bool = False) -> Grants:
    """The mask of permission words. Raises Refusal naming the place of the first that is unknown or out of place."""
    for place, word in enumerate(words):
        where = f"{field}[{place}]"
        if word == "*" and not channel_only:
            continue
        if word not in _WORDS:
            near = difflib.get_close_matches(word, _WORDS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise Refusal("invalid_field", f"There is no such permission word.{hint}", field=where)
        if channel_only and word not in CHANNEL_WORDS:
            raise Refusal(
                "invalid_field", f"{word} concerns the app; here only words of channels have a meaning.", field=where
            )
    return grants_of(words)


def check_held(actor: Actor, given: Grants, field: str) -> None:
    """Refuse to let someone give away what they do not hold. Raises Refusal `forbidden` naming the first word."""
    beyond = words_of(Grants(given & ~actor.grants))
    if beyond:
        raise Refusal("forbidden", f"You cannot grant {beyond[0]}: you do not hold it yourself.", field=field)


def words_in_order(words: frozenset[Permission]) -> list[str]:
    """A built-in role's words, in the order of the list."""
    return words_of(grants_of({word.value for word in words}))


def role_mask(row: Row | None, scope: str, name: str) -> Grants:
    """What a role grants: its row's words, else the built-in role's, else nothing."""
    if row is not None:
        return grants_of(msgspec.json.decode(row[0], type=list[str]))
    return grants_of({word.value for word in BUILT_IN[scope].get(name, ())})


async def lock_rules(tx: Tx, app: int) -> None:
    """One change at a time to an app's roles and types: each is judged by what the others hold at that moment."""
    await tx.one("SELECT app FROM apps WHERE app=?" + tx.for_update, app)


async def check_room(tx: Tx, count: str, *values: Any, bound: int, what: str) -> None:
    """Refuse what would be more than `bound` of something. Raises Refusal `bound_exceeded`."""
    row = await tx.one(count, *values)
    if row is not None and row[0] >= bound:
        raise Refusal("bound_exceeded", f"There are {bound} {what} already.", bound=bound)
