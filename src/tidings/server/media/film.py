"""Film, in the child: its sides, how long it is, and the picture that stands for it. By ffmpeg."""

from collections.abc import Sequence
from typing import Final

import msgspec

from tidings.server.media.facts import Looked, MediaLimits, Preview, Trouble
from tidings.server.media.images import previews_of
from tidings.server.media.thumbhash import SIDE_MAX
from tidings.server.media.tools import Source, Tools

__all__ = ["look_at_film"]

# Films begin black.
_POSTER_SECOND: Final = 1


def look_at_film(tools: Tools, source: Source, limits: MediaLimits, wanted: Sequence[Preview]) -> Looked:
    """Sides after rotation, duration, thumbhash and previews of the picture after a second. Raises `Trouble`."""
    probed = tools.probe(source)
    pictures = [stream for stream in probed.streams if stream.codec_type == "video"]
    films = [stream for stream in pictures if not stream.disposition.attached_pic]
    if not films:
        # Sound in a container for films: it has a length and no picture.
        if any(stream.codec_type == "audio" for stream in probed.streams):
            return Looked(duration_ms=probed.duration_ms() or tools.duration_ms(source))
        raise Trouble("broken")
    film = films[0]
    if film.width < 1 or film.height < 1:
        raise Trouble("broken")
    if film.width * film.height > limits.pixels:
        raise Trouble("too_many_pixels")
    width, height = (film.height, film.width) if film.turned else (film.width, film.height)
    known = Looked(width=width, height=height, duration_ms=probed.duration_ms())
    if known.duration_ms is None:
        known = msgspec.structs.replace(known, duration_ms=tools.duration_ms(source))
    side = max([SIDE_MAX, *(preview.side for preview in wanted)])
    poster = None
    if known.duration_ms is None or known.duration_ms > _POSTER_SECOND * 1000:
        poster = tools.frame(source, _POSTER_SECOND, side, known)
    if poster is None:
        poster = tools.frame(source, 0, side, known)
    if poster is None:
        raise Trouble("broken", known)
    return previews_of(poster, known, limits, wanted)
