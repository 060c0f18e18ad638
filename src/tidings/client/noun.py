"""What the groups of REST methods have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from .rest import Rest


class Noun:
    """Methods of one noun over a `Rest`."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest


def path_of(*parts: str) -> str:
    """An address below /v1, each part of it escaped."""
    return "/v1/" + "/".join(quote(part, safe="@:+") for part in parts)


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
