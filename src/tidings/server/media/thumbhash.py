"""A blurred picture in about 25 bytes, to be shown until the real one has come.

After Evan Wallace's ThumbHash (https://evanw.github.io/thumbhash/, MIT licence): the lowest frequencies of luminance,
of two differences of colour and of transparency. The sums are separable here, rows first, which gives the same
numbers (but for the rounding of a factor that is nothing: 7.5 of 15, one way or the other).
"""

import math
from collections.abc import Sequence
from typing import Final

# The algorithm's own bound: more pixels do not show.
SIDE_MAX: Final = 100


def encode(width: int, height: int, rgba: bytes) -> bytes:
    """The thumbhash of `width` × `height` pixels, four bytes each, alpha not multiplied in.

    Raises ValueError for sides beyond 1 to 100, or another number of bytes.
    """
    if not (1 <= width <= SIDE_MAX and 1 <= height <= SIDE_MAX and len(rgba) == 4 * width * height):
        raise ValueError("not a picture of at most 100 × 100 pixels")
    alphas = [value / 255 for value in rgba[3::4]]
    total = sum(alphas)
    channels: list[list[float]] = []
    for offset in range(3):
        seen = [alpha / 255 * value for alpha, value in zip(alphas, rgba[offset::4], strict=True)]
        average = sum(seen) / total if total else 0.0
        channels.append([average * (1 - alpha) + value for alpha, value in zip(alphas, seen, strict=True)])
    red, green, blue = channels
    has_alpha = total < width * height

    longest = max(width, height)
    # Transparency takes its share of the bytes from luminance.
    most = 5 if has_alpha else 7
    across, down = max(1, _round(most * width / longest)), max(1, _round(most * height / longest))
    luminance = [(r + g + b) / 3 for r, g, b in zip(red, green, blue, strict=True)]
    yellow_blue = [(r + g) / 2 - b for r, g, b in zip(red, green, blue, strict=True)]
    red_green = [r - g for r, g in zip(red, green, strict=True)]
    l_dc, l_ac, l_scale = _frequencies(luminance, width, height, max(3, across), max(3, down))
    p_dc, p_ac, p_scale = _frequencies(yellow_blue, width, height, 3, 3)
    q_dc, q_ac, q_scale = _frequencies(red_green, width, height, 3, 3)

    landscape = width > height
    first = _round(63 * l_dc) | _round(31.5 + 31.5 * p_dc) << 6 | _round(31.5 + 31.5 * q_dc) << 12
    first |= _round(31 * l_scale) << 18 | has_alpha << 23
    second = (down if landscape else across) | _round(63 * p_scale) << 3 | _round(63 * q_scale) << 9 | landscape << 15
    head = first.to_bytes(3, "little") + second.to_bytes(2, "little")
    factors = l_ac + p_ac + q_ac
    if has_alpha:
        a_dc, a_ac, a_scale = _frequencies(alphas, width, height, 5, 5)
        head += bytes([_round(15 * a_dc) | _round(15 * a_scale) << 4])
        factors += a_ac
    nibbles = [_round(15 * factor) for factor in factors]
    nibbles += [0] * (len(nibbles) % 2)
    return head + bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))


def _frequencies(
    channel: Sequence[float], width: int, height: int, across: int, down: int
) -> tuple[float, list[float], float]:
    """The constant term, the varying ones from 0 to 1 (0.5 is none), and what they were divided by."""
    cosines_x = [[math.cos(math.pi / width * n * (x + 0.5)) for x in range(width)] for n in range(across)]
    cosines_y = [[math.cos(math.pi / height * n * (y + 0.5)) for y in range(height)] for n in range(down)]
    rows = [channel[y * width : (y + 1) * width] for y in range(height)]
    columns = [[sum(map(float.__mul__, row, cosines)) for row in rows] for cosines in cosines_x]
    constant, varying = 0.0, []
    for cy in range(down):
        cx = 0
        while cx * down < across * (down - cy):
            value = sum(map(float.__mul__, columns[cx], cosines_y[cy])) / (width * height)
            if cx or cy:
                varying.append(value)
            else:
                constant = value
            cx += 1
    scale = max(map(abs, varying), default=0.0)
    if scale:
        varying = [0.5 + 0.5 / scale * value for value in varying]
    return constant, varying, scale


def _round(value: float) -> int:
    """Halves go up, as in the original."""
    return math.floor(value + 0.5)
