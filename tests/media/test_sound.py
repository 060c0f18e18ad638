"""How long sound is, and its shape."""

from __future__ import annotations

import io
import math
import struct
import wave
from array import array
from collections.abc import Callable

import pytest

from tests.media.conftest import needs_ffmpeg
from tests.media.making import Look, kind_of
from tidings.server.media.kinds import Kind
from tidings.server.media.sound import Peaks

# Loud, then half as loud, then nothing: a second each.
LOUDNESS = (1.0, 0.5, 0.0)


def wav(*, width: int = 2, channels: int = 1, rate: int = 8000, seconds: int = 3, loudness: float = 1.0) -> bytes:
    """A tone of 200 Hz in three steps, in the middle of the range at its loudest."""
    target = io.BytesIO()
    with wave.open(target, "wb") as writer:
        writer.setparams((channels, width, rate, 0, "NONE", ""))
        top = (1 << 8 * width - 1) - 1
        for index in range(rate * seconds):
            step = LOUDNESS[index * 3 // (rate * seconds)]
            value = round(top * loudness * step * math.sin(2 * math.pi * 200 * index / rate))
            one = struct.pack("B", value + 128) if width == 1 else value.to_bytes(width, "little", signed=True)
            writer.writeframesraw(one * channels)
    return target.getvalue()


def assert_shape(waveform: bytes | None, slack: int = 20) -> None:
    assert waveform is not None
    assert 50 <= len(waveform) <= 100
    third = len(waveform) // 3
    assert max(waveform) == 255
    assert min(waveform[2 : third - 2]) > 255 - slack - 30
    assert all(abs(value - 128) < slack + 10 for value in waveform[third + 3 : 2 * third - 2])
    assert max(waveform[2 * third + 4 : -3]) <= slack


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
async def test_plain_sound_needs_no_tool(
    look: Look, monkeypatch: pytest.MonkeyPatch, width: int, channels: int
) -> None:
    monkeypatch.setenv("PATH", "")
    looked = await look(wav(width=width, channels=channels))
    assert (looked.duration_ms, looked.problem) == (3000, None)
    assert_shape(looked.waveform)


async def test_a_quiet_recording_has_a_shape_too_and_silence_none(look: Look) -> None:
    assert_shape((await look(wav(loudness=0.1))).waveform)
    silent = await look(wav(loudness=0.0))
    assert silent.waveform == bytes(60)


@pytest.mark.parametrize(
    "data",
    [
        # Promises 4 GB, as a stream does that was written without an end.
        wav()[:4] + b"\xff\xff\xff\xff" + wav()[8:40] + b"\xff\xff\xff\xff" + wav()[44:],
        wav()[:-20_000],
    ],
)
async def test_a_header_that_promises_too_much_is_not_believed(look: Look, data: bytes) -> None:
    looked = await look(data)
    assert looked.problem is None
    assert looked.duration_ms == (len(data) - 44) // 16
    assert looked.waveform


@pytest.mark.parametrize("at", range(16, 36, 2))
async def test_a_damaged_header_is_no_accident(look: Look, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setenv("PATH", "")
    data = bytearray(wav(seconds=1))
    for value in (b"\0\0", b"\xff\xff"):
        data[at : at + 2] = value
        assert (await look(bytes(data))).problem in {None, "broken", "tool_missing"}


TYPES = {
    "sound.mp3": "audio/mpeg",
    "sound.ogg": "audio/ogg",
    "sound.opus": "audio/ogg",
    "sound.m4a": "audio/mp4",
    "sound.flac": "audio/flac",
    "sound.aac": "audio/aac",
    "voice.webm": "audio/webm",
    "voice.mp4": "audio/mp4",
    "float.wav": "audio/wav",
}


@needs_ffmpeg
@pytest.mark.parametrize("name", TYPES)
async def test_what_people_record_has_a_length_and_a_shape(
    look: Look, ffmpeg: Callable[..., bytes], tmp_path: object, name: str
) -> None:
    source = f"{tmp_path}/source.wav"
    with open(source, "wb") as file:
        file.write(wav(rate=48_000))
    codec = {"voice.webm": ["-c:a", "libopus"], "float.wav": ["-c:a", "pcm_f32le"]}.get(name, [])
    data = ffmpeg(name, "-i", source, *codec)
    assert kind_of(data).media_type == TYPES[name]
    looked = await look(data)
    assert looked.problem is None
    assert looked.duration_ms == pytest.approx(3000, abs=80)
    assert_shape(looked.waveform, slack=30)
    assert (looked.width, looked.previews) == (None, ())


@needs_ffmpeg
async def test_without_the_tools_it_says_so(
    look: Look, ffmpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ffmpeg("tone.mp3", "-f", "lavfi", "-i", "sine=duration=1")
    assert (await look(data)).problem is None
    monkeypatch.setenv("PATH", "")
    assert (await look(data)).problem == "tool_missing"


@needs_ffmpeg
async def test_sound_without_an_end_in_its_header_is_measured(look: Look, ffmpeg: Callable[..., bytes]) -> None:
    """As browsers record it: the length is written when nobody can go back."""
    live = ["-c:a", "libopus", "-live", "1", "-f", "webm"]
    data = ffmpeg("live.webm", "-f", "lavfi", "-i", "sine=duration=2", *live)
    looked = await look(data)
    assert looked.duration_ms == pytest.approx(2000, abs=60)


@needs_ffmpeg
async def test_what_is_no_sound_is_broken(look: Look, ffmpeg: Callable[..., bytes]) -> None:
    data = ffmpeg("tone.ogg", "-f", "lavfi", "-i", "sine=duration=1")
    for bad in (
        data[:60],
        b"OggS\0" + b"\xa5" * 400,
        b"ID3\4\0\0\0\0\0\x0a" + b"\0" * 400,
        b"fLaC\0\0\0\x22" + bytes(90),
    ):
        assert (await look(bad)).problem == "broken"
    assert (await look(data, kind=Kind("audio/x-unheard", "audio", False))).problem == "unsupported"


def test_peaks_are_the_loudest_of_their_time() -> None:
    peaks = Peaks(10)
    for part in ([1, -9], [0] * 8, [3] * 10, [0] * 3):
        peaks.add(array("h", part))
    assert peaks.waveform() == bytes([255, 85, 0])
    assert Peaks(10).waveform() == b""
    long = Peaks(1)
    long.add(array("h", range(12_345)))
    assert len(long.waveform()) == 100
    assert list(long.waveform()) == sorted(long.waveform())
    lowest = Peaks(1)
    lowest.add(array("h", [-32768, 16384]))
    assert lowest.waveform() == bytes([255, 127])
