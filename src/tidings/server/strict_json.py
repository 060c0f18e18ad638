"""JSON for documents whose meaning must not depend on who reads them: token headers, claims, key sets.

The usual parsers keep the last of two members with one name, accept NaN, and guess the encoding. An attacker who finds
two readers that differ has found a way past one of them.
"""

import json
import math
from typing import Any, Final


class NotStrictJson(ValueError):
    """The text is not one JSON object that every reader understands alike. Never shows the text."""


def parse_object(text: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8: no duplicate names on any level, no NaN or infinity, no byte-order mark."""
    try:
        value = _DECODER.decode(text.decode("utf-8"))
    except NotStrictJson:
        raise
    except UnicodeDecodeError:
        raise NotStrictJson("not UTF-8") from None
    except (ValueError, RecursionError):
        raise NotStrictJson("not JSON") from None
    if not isinstance(value, dict):
        raise NotStrictJson("not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise NotStrictJson("a name occurs twice in an object")
    return members


def _constant(name: str) -> float:
    raise NotStrictJson("a number is not finite")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotStrictJson("a number is not finite")
    return value


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
