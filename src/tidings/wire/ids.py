"""Types that every struct of the wire shares: identifiers, bounded text, times, custom data."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any

from msgspec import Meta

from . import limits

_ID = Meta(
    min_length=1,
    max_length=limits.ID_LENGTH_MAX,
    pattern=limits.ID_PATTERN,
    description="1-128 characters of A-Z a-z 0-9 _ . : @ + -",
)

# An id in what the server tells: documented like the others, but not held against the pattern again by who reads it,
# which would be two thirds of the cost of decoding a message.
ToldId = Annotated[
    str,
    Meta(
        description=_ID.description,
        extra_json_schema={"minLength": 1, "maxLength": limits.ID_LENGTH_MAX, "pattern": limits.ID_PATTERN},
    ),
]

AppId = Annotated[str, _ID]
UserId = Annotated[str, _ID]
ChannelId = Annotated[str, _ID]
MessageId = Annotated[str, _ID]
DeviceId = Annotated[str, _ID]
RoleName = Annotated[str, _ID]
TypeName = Annotated[str, _ID]
# A stream's public name: a channel id, or `@me` for the user's own stream.
StreamName = Annotated[str, Meta(min_length=1, max_length=limits.ID_LENGTH_MAX, examples=["ch_7f3k", "@me"])]

ClientKey = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=limits.KEY_LENGTH_MAX,
        pattern=r"^[\x21-\x7e]{1,128}$",
        description="Chosen by the sender, unique per sender and channel for ever: a retry stores nothing new",
    ),
]
Text = Annotated[str, Meta(max_length=limits.TEXT_LENGTH_MAX)]
Name = Annotated[str, Meta(max_length=limits.NAME_LENGTH_MAX)]
Description = Annotated[str, Meta(max_length=limits.DESCRIPTION_LENGTH_MAX)]
Url = Annotated[str, Meta(max_length=limits.URL_LENGTH_MAX, pattern=r"^[a-zA-Z][a-zA-Z0-9+.\-]*:[^\s]*$")]
Emoji = Annotated[str, Meta(min_length=1, max_length=limits.EMOJI_LENGTH_MAX, pattern=r"^[^\s\x00-\x1f\x7f]+$")]
Seq = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Limit = Annotated[int, Meta(ge=1, le=limits.PAGE_MAX)]
LabelName = Annotated[str, Meta(min_length=1, max_length=limits.LABEL_NAME_LENGTH_MAX, pattern=r"^[a-z0-9_.\-]+$")]
LabelValue = Annotated[str, Meta(max_length=limits.LABEL_VALUE_LENGTH_MAX)]
Labels = Annotated[
    dict[LabelName, LabelValue],
    Meta(
        max_length=limits.LABELS_MAX,
        description="Searchable and NOT encrypted at rest: references and states, never personal data",
    ),
]
Custom = Annotated[
    dict[str, Any],
    Meta(description=f"Any JSON object up to {limits.CUSTOM_BYTES_MAX} bytes encoded; encrypted at rest"),
]
# Client references are echoed in the reply.
Ref = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Time = Annotated[datetime, Meta(tz=True)]


# Everyone who is told of an event is told its time: the same few milliseconds again and again.
@lru_cache(maxsize=256)
def time_of(ms: int) -> datetime:
    """The UTC time of `ms` milliseconds since 1970-01-01T00:00Z."""
    return datetime.fromtimestamp(ms / 1000, UTC)


def ms_of(time: datetime) -> int:
    """Milliseconds since 1970-01-01T00:00Z of an aware time, rounded to the nearest."""
    return round(time.timestamp() * 1000)
