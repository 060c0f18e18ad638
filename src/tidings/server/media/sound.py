"""Sound, in the child: how long it is and its shape. WAV by the standard library, everything else by ffmpeg."""

import sys
import wave
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import BinaryIO, Final

from tidings.server.media.facts import WAVEFORM_SAMPLES_MAX, Looked, Trouble
from tidings.server.media.tools import Source, Tools

__all__ = ["Peaks", "look_at_sound", "look_at_wav"]

# A voice message has minutes. Of a concert nobody looks at the shape, and decoding it takes as long as the limit.
WAVEFORM_SECONDS_MAX: Final = 1800
# What ffmpeg is asked for: as much as a shape needs.
_RATE: Final = 8_000
# Of one read, whatever a frame's size.
_CHUNK_BYTES: Final = 1 << 18
# Peaks are kept this long apart until the end is known: 36,000 of them for half an hour.
_PEAK_SECONDS: Final = 0.05


class Peaks:
    """Collects the loudest sample of each 1/20 second, and draws them in as many steps as a waveform has.

    `per_peak` is the number of samples in that time, all channels together.
    """

    def __init__(self, per_peak: int) -> None:
        self._per_peak = max(1, per_peak)
        self._peaks: list[int] = []
        self._left = 0
        self._loudest = 0

    def add(self, samples: "array[int]") -> None:
        """More samples, signed."""
        at = 0
        while at < len(samples):
            part = samples[at : at + self._per_peak - self._left]
            self._loudest = max(self._loudest, max(part), -min(part))
            self._left += len(part)
            at += len(part)
            if self._left == self._per_peak:
                self._end()

    def _end(self) -> None:
        self._peaks.append(self._loudest)
        self._left = self._loudest = 0

    def waveform(self) -> bytes:
        """At most 100 samples of 0 to 255, the loudest 255; empty where there was no sample."""
        if self._left:
            self._end()
        count = min(WAVEFORM_SAMPLES_MAX, len(self._peaks))
        ends = [len(self._peaks) * step // count for step in range(count + 1)] if count else []
        steps = [max(self._peaks[begin:end]) for begin, end in pairwise(ends)]
        top = max(steps, default=0)
        return bytes(step * 255 // top if top else 0 for step in steps)


def look_at_wav(file: BinaryIO, size: int) -> Looked:
    """Duration and waveform of plain PCM. Raises `wave.Error` or EOFError where it is something else, or damaged."""
    with wave.open(file) as reader:
        channels, width, rate = reader.getnchannels(), reader.getsampwidth(), reader.getframerate()
        if rate < 1 or channels < 1 or width not in _SAMPLES:
            raise wave.Error("not plain PCM")
        # The header of a stream that was written without end promises more than there is.
        frames = min(reader.getnframes(), size // (channels * width))
        peaks = Peaks(round(rate * _PEAK_SECONDS) * channels)
        seen = 0
        wanted = min(frames, rate * WAVEFORM_SECONDS_MAX)
        while seen < wanted:
            data = reader.readframes(min(max(1, _CHUNK_BYTES // (channels * width)), wanted - seen))
            got = len(data) // (channels * width)
            if not got:
                frames = seen
                break
            peaks.add(_SAMPLES[width](data[: got * channels * width]))
            seen += got
    whole = seen == frames
    return Looked(duration_ms=frames * 1000 // rate, waveform=peaks.waveform() if whole else None)


def look_at_sound(tools: Tools, source: Source) -> Looked:
    """Duration and waveform by ffmpeg. Raises `Trouble`."""
    probed = tools.probe(source)
    if not any(stream.codec_type == "audio" for stream in probed.streams):
        raise Trouble("broken")
    duration_ms = probed.duration_ms()
    if duration_ms is not None and duration_ms > WAVEFORM_SECONDS_MAX * 1000:
        return Looked(duration_ms=duration_ms)
    peaks = Peaks(round(_RATE * _PEAK_SECONDS))
    samples = 0
    # One second more than is drawn, to see whether there is more.
    known = Looked(duration_ms=duration_ms)
    for chunk in tools.samples(source, _RATE, WAVEFORM_SECONDS_MAX + 1, known):
        part = _signed("h", chunk)
        peaks.add(part)
        samples += len(part)
    if samples > WAVEFORM_SECONDS_MAX * _RATE:
        return Looked(duration_ms=duration_ms or tools.duration_ms(source))
    return Looked(duration_ms=samples * 1000 // _RATE, waveform=peaks.waveform())


# --- samples, by their width in bytes -------------------------------------------------------------


def _signed(code: str, data: bytes) -> "array[int]":
    samples = array(code, data)
    if sys.byteorder == "big":
        samples.byteswap()
    return samples


def _unsigned_8(data: bytes) -> "array[int]":
    return array("b", data.translate(_FROM_UNSIGNED))


def _signed_24(data: bytes) -> "array[int]":
    # The two lower bytes of three are nothing that a waveform shows.
    return array("b", data[2::3])


_FROM_UNSIGNED: Final = bytes((value - 128) & 0xFF for value in range(256))
_SAMPLES: Final[dict[int, Callable[[bytes], "array[int]"]]] = {
    1: _unsigned_8,
    2: lambda data: _signed("h", data),
    3: _signed_24,
    4: lambda data: _signed("i", data),
}
