"""ffmpeg and ffprobe, in the child: as one demuxer, with the decoders of a list, and with no way to another file.

A film's file can name others (playlists, references), and ffmpeg would open them. Therefore it is told what the file
is (it guesses nothing), may use that demuxer only, and knows one protocol. What confine.py has taken away, it does
not have either.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from PIL import Image

from tidings.server.media import confine
from tidings.server.media.facts import Looked, MediaLimits, Trouble

__all__ = ["DEMUXERS", "Probed", "Source", "Stream", "Tools", "input_options"]

# By type: the one demuxer that may read it.
DEMUXERS: Final = {
    "video/mp4": "mov",
    "video/quicktime": "mov",
    "video/webm": "matroska",
    "video/x-matroska": "matroska",
    "video/ogg": "ogg",
    "video/x-msvideo": "avi",
    "audio/mp4": "mov",
    "audio/mpeg": "mp3",
    "audio/aac": "aac",
    "audio/ogg": "ogg",
    "audio/webm": "matroska",
    "audio/x-matroska": "matroska",
    "audio/flac": "flac",
    "audio/wav": "wav",
    "audio/aiff": "aiff",
    "audio/amr": "amr",
}
# What phones and browsers record. ffmpeg has five hundred decoders, most of them for games of 1995.
_DECODERS: Final = (
    "h264,hevc,vp8,vp9,libvpx,libvpx-vp9,av1,libdav1d,libaom-av1,mpeg4,mjpeg,theora,h263,mpeg1video,mpeg2video,"
    "aac,aac_fixed,mp3,mp3float,mp2,mp2float,opus,libopus,vorbis,libvorbis,flac,alac,speex,libspeex,amrnb,amrwb,"
    "libopencore_amrnb,libopencore_amrwb,pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,"
    "pcm_f32be,pcm_f64le,pcm_u8,pcm_s8,pcm_alaw,pcm_mulaw,adpcm_ima_wav,adpcm_ms"
)
# ffprobe's answer about the streams of a film: some hundred bytes each.
_PROBE_BYTES_MAX: Final = 1 << 20
_COMPLAINTS_BYTES_MAX: Final = 1 << 16
_CHUNK_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Source:
    """The file, as an inherited descriptor, and what it is."""

    fd: int
    media_type: str


class Disposition(msgspec.Struct):
    attached_pic: int = 0


class SideData(msgspec.Struct):
    rotation: float = 0


class Stream(msgspec.Struct):
    """What ffprobe says of one stream."""

    codec_type: str = ""
    width: int = 0
    height: int = 0
    duration: str = ""
    disposition: Disposition = msgspec.field(default_factory=Disposition)
    side_data_list: list[SideData] = msgspec.field(default_factory=list)

    @property
    def turned(self) -> bool:
        """Whether it is shown on its side."""
        return any(round(data.rotation) % 180 == 90 for data in self.side_data_list)


class Format(msgspec.Struct):
    duration: str = ""


class Probed(msgspec.Struct):
    """What ffprobe says."""

    streams: list[Stream] = msgspec.field(default_factory=list)
    format: Format = msgspec.field(default_factory=Format)

    def duration_ms(self) -> int | None:
        """The duration of the whole, or of its longest stream, where the file tells one."""
        said = [_milliseconds(self.format.duration)] + [_milliseconds(stream.duration) for stream in self.streams]
        return said[0] or max((value for value in said[1:] if value), default=None)


def _milliseconds(seconds: str) -> int | None:
    try:
        value = float(seconds)
    except ValueError:
        return None
    return round(value * 1000) if 0 < value < 1e9 else None


def input_options(source: Source) -> list[str]:
    """What goes before and with the file's name, for both programs."""
    demuxer = DEMUXERS[source.media_type]
    return [
        *("-protocol_whitelist", "file"),
        *("-format_whitelist", demuxer),
        *("-codec_whitelist", _DECODERS),
        *("-f", demuxer),
        # Opened anew, so that it can be read from any place; `fd:` is younger than what Debian 12 has.
        *("-i", f"file:/proc/self/fd/{source.fd}"),
    ]


class Tools:
    """The two programs, by their paths. Raises `Trouble` with `tool_missing` where one is not there."""

    def __init__(self, ffmpeg: str, ffprobe: str, limits: MediaLimits) -> None:
        if not (ffmpeg and ffprobe):
            raise Trouble("tool_missing")
        self._ffmpeg = ffmpeg
        self._ffprobe = ffprobe
        self._limits = limits

    def probe(self, source: Source) -> Probed:
        """What the file says of itself."""
        shown = "format=duration:stream=codec_type,width,height,duration:stream_disposition=attached_pic"
        shown += ":stream_side_data=rotation"
        arguments = ["-v", "error", "-show_entries", shown, "-of", "json", *input_options(source)]
        answer = b"".join(self._run(self._ffprobe, arguments, source, _PROBE_BYTES_MAX, Looked()))
        try:
            return msgspec.json.decode(answer, type=Probed)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Trouble("broken") from None

    def samples(self, source: Source, rate: int, seconds: int, known: Looked) -> Iterator[bytes]:
        """The first `seconds` of sound: one channel, 16 bits, little endian, in pieces of whole samples."""
        arguments = [
            *("-nostdin", "-v", "error", "-threads", "1", *input_options(source)),
            *("-map", "0:a:0", "-vn", "-sn", "-dn", "-t", str(seconds), "-ac", "1", "-ar", str(rate)),
            *("-c:a", "pcm_s16le", "-f", "s16le", "pipe:1"),
        ]
        odd = b""
        for chunk in self._run(self._ffmpeg, arguments, source, (seconds + 1) * rate * 2, known):
            whole = odd + chunk
            cut = len(whole) & ~1
            odd = whole[cut:]
            if cut:
                yield whole[:cut]

    def frame(self, source: Source, second: int, side: int, known: Looked) -> Image.Image | None:
        """The picture at `second`, upright, no side longer than `side`; None where the film is over by then."""
        fit = f"scale=w='min({side},iw)':h='min({side},ih)':force_original_aspect_ratio=decrease"
        arguments = [
            *("-nostdin", "-v", "error", "-threads", "1", "-filter_threads", "1"),
            *("-max_pixels", str(self._limits.pixels), "-ss", str(second), *input_options(source)),
            *("-map", "0:V:0", "-an", "-sn", "-dn", "-frames:v", "1", "-vf", fit),
            *("-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe", "pipe:1"),
        ]
        written = b"".join(self._run(self._ffmpeg, arguments, source, 3 * side * side + 64, known))
        return _from_ppm(written, side) if written else None

    def duration_ms(self, source: Source) -> int | None:
        """By reading all of it, for files that do not tell, such as what browsers record."""
        arguments = [
            *("-nostdin", "-v", "error", *input_options(source), "-map", "0", "-c", "copy"),
            *("-progress", "pipe:1", "-f", "null", "-"),
        ]
        said = b"".join(self._run(self._ffmpeg, arguments, source, _PROBE_BYTES_MAX, Looked()))
        times = [line.partition(b"=")[2] for line in said.splitlines() if line.startswith(b"out_time_us=")]
        return int(times[-1]) // 1000 if times and times[-1].isdigit() else None

    def _run(
        self, program: str, arguments: Sequence[str], source: Source, bytes_max: int, known: Looked
    ) -> Iterator[bytes]:
        """What it writes, up to `bytes_max`. Raises `Trouble`, with what is `known`, where it fails."""
        me = os.getpid()
        complaints, write_end = os.pipe()
        # Nobody reads them before the end: what does not fit is lost, and the program goes on.
        os.set_blocking(write_end, False)
        # (subprocess's own DEVNULL would open it for writing, too, which is not allowed here.)
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            process = subprocess.Popen(
                [program, *arguments],
                stdin=nothing,
                stdout=subprocess.PIPE,
                stderr=write_end,
                pass_fds=(source.fd,),
                # This process has one thread, so that Python may run between fork and exec.
                preexec_fn=lambda: confine.die_with(me),
            )
        except OSError:
            os.close(complaints)
            raise Trouble("tool_missing", known) from None
        finally:
            os.close(write_end)
            os.close(nothing)
        try:
            assert process.stdout is not None
            left = bytes_max
            while left > 0 and (chunk := process.stdout.read(min(_CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk
            if left <= 0:
                process.kill()
                process.wait()
                raise Trouble("broken", known)
            status = process.wait()
            with os.fdopen(os.dup(complaints), "rb") as reader:
                said = reader.read(_COMPLAINTS_BYTES_MAX)
            _judge(status, said, known)
        finally:
            process.kill()
            process.wait()
            os.close(complaints)


def _judge(status: int, complaints: bytes, known: Looked) -> None:
    if status == 0:
        return
    if status == -signal.SIGXCPU:
        raise Trouble("too_slow", known)
    if status == -signal.SIGKILL or b"Cannot allocate memory" in complaints:
        raise Trouble("too_much_memory", known)
    if status < 0:
        raise Trouble("crashed", known)
    refused = (b"whitelist", b"Decoder not found", b"no decoder found")
    raise Trouble("unsupported" if any(word in complaints for word in refused) else "broken", known)


def _from_ppm(data: bytes, side: int) -> Image.Image:
    """The picture that ffmpeg has written, if it is one of the size that was asked for."""
    words = data[:32].split(maxsplit=4)
    if len(words) < 4 or words[0] != b"P6" or words[3] != b"255" or not (words[1] + words[2]).isdigit():
        raise Trouble("broken")
    width, height = int(words[1]), int(words[2])
    pixels = data[len(b" ".join(words[:4])) + 1 :]
    if not (1 <= width <= side and 1 <= height <= side and len(pixels) == 3 * width * height):
        raise Trouble("broken")
    return Image.frombytes("RGB", (width, height), pixels)
