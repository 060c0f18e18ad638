"""The guides give configurations that are taken, and the tables that the adapters have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from tidings.server.push import apns, fcm, http, webpush
from tidings.wire.push import PushConfig

GUIDES = Path(__file__).parents[2] / "docs/guides"
TABLES: dict[str, Mapping[str, str]] = {
    "push-fcm.md": {reason: kind for reason, (_, kind) in fcm.ERRORS.items()},
    "push-apns.md": {reason: kind for reason, (_, kind) in apns.ERRORS.items()},
    "push-web.md": {str(status): kind for status, kind in webpush.ERRORS.items()},
    "push-http.md": {str(status): kind for status, kind in http.ERRORS.items()},
}


@pytest.mark.parametrize("guide", TABLES)
def test_the_configuration_of_a_guide_is_taken(guide: str) -> None:
    text = (GUIDES / guide).read_text(encoding="utf-8")
    [example] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    msgspec.json.decode(example, type=PushConfig)


@pytest.mark.parametrize("guide", TABLES)
def test_a_guide_has_the_whole_table(guide: str) -> None:
    told = {}
    for line in (GUIDES / guide).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        outcome = re.search(r"\| `(accepted|token_dead|retry|rejected|misconfigured|too_large)` \|", line)
        if outcome:
            told |= {reason: outcome[1] for reason in re.findall(r"`([A-Za-z0-9_]+)`", cells[0])}
    told.pop("name", None)
    told.pop("apns", None)
    assert told == TABLES[guide]
