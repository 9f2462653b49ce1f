"""Video file or folder of frames -> uint8 RGB frames, decoding only what the wanted frames need.

    with open_video(path) as video:
        frames = video.read(start, end, 16)         # (16, 3, H, W) uint8

The frames are byte for byte what decoding the whole file gives. How a window of a file is read:

1. seek to the key frame before it and demux its packets (cheap: nothing is decoded),
2. choose the wanted time stamps from the packets',
3. decode only runs of packets that lead from a key frame to a wanted frame; inside a run, let the decoder drop every
   frame that no other refers to, unless it is wanted,
4. if time stamps and decoded frames disagree, decode sequentially from the start of the file instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from itertools import chain, pairwise, takewhile
from math import ceil, pi, tan
from statistics import median
from typing import TYPE_CHECKING, Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from omnivision.data.frames import (
    FrameFolder,
    Seconds,
    VideoInfo,
    check_pixels,
    check_sizes,
    describe_error,
    open_regular_file,
    select_frames,
    stack_frames,
    tick_range,
)
from omnivision.utils.errors import VideoDecodeError

if TYPE_CHECKING:
    import torch

__all__ = ["FrameFolder", "VideoDecodeError", "VideoFile", "VideoInfo", "open_video"]

# Containers that hold their frames themselves. Playlists, concat scripts, image patterns, devices and network descriptions
# are left out on purpose: a file in such a format can name other files.
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,nut,ivf,mxf,rm,dv,wtv,h264,hevc,obu,m4v,mjpeg,yuv4mpegpipe"
)
# Formats whose packets carry time stamps. In others (MPEG program streams) FFmpeg guesses them, wrongly after a seek.
_TIMED_FORMATS = frozenset("mov matroska avi mpegts flv gif nut ivf".split())
# Formats whose header gives the duration of the whole file, and where a seek to that time finds the end.
_SEEKABLE_FORMATS = frozenset("matroska flv asf".split())
_INDEXED_FORMATS = frozenset({"mov", "avi"})  # the index lists every packet, by decoding time
# Codecs in which each packet is one frame, except as in `_shows_a_frame` and `_packet_times_reliable`.
_FRAME_PER_PACKET = frozenset(
    "h264 hevc vp8 vp9 av1 libdav1d mpeg4 mpeg2video mpeg1video mjpeg prores ffv1 gif dnxhd rawvideo png".split()
)
# Codecs whose decoder can drop exactly the frames that no other frame refers to.
_CAN_DROP_UNREFERENCED = frozenset("h264 hevc mpeg4 mpeg2video mpeg1video".split())

# IndexError: what PyAV raises for a damaged transport stream that announces another stream midway.
_FILE_ERRORS = (av.error.FFmpegError, OSError, MemoryError, IndexError)
_FOR_EVER = 2**60  # later than any time stamp
_DEGREE = tan(pi / 180)
# Degrees clockwise by `_orientation`, without mirroring.
_ROTATIONS = {(False, False, False): 0, (True, True, False): 90, (False, True, True): 180, (True, False, True): 270}


@contextmanager
def open_video(
    path: str, *, fps: float = 25.0, max_pixels: int | None = None, frame_pattern: str | None = None
) -> Iterator[VideoFile | FrameFolder]:
    """Open a video file, or a folder whose images (that match `frame_pattern`) are its frames, `fps` per second.

    `max_pixels` bounds width x height; it is checked against the header and again while decoding. Raises VideoDecodeError if
    `path` is not a readable video, ValueError for an `fps` that is not positive and finite.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be positive and finite, got {fps}")
    descriptor, is_folder = open_regular_file(path)
    try:
        if is_folder:
            yield FrameFolder(descriptor, Fraction(fps), max_pixels, frame_pattern)
        else:
            with closing(VideoFile(descriptor, max_pixels)) as video:
                yield video
    finally:
        os.close(descriptor)


class VideoFile:
    """A file that FFmpeg can read. Times are seconds after the stream's first presentation time."""

    def __init__(self, descriptor: int, max_pixels: int | None):
        self._descriptor, self._max_pixels = descriptor, max_pixels
        self._container: InputContainer | None = None
        self._measured: int | None = None  # see _measure
        self._reformatter = VideoReformatter()  # reused: creating one costs half as much as a conversion
        try:
            # The header of ISO files (mp4, mov) is enough; probing decodes some frames and takes up to 20 ms.
            self._open(probe=os.pread(descriptor, 8, 0)[4:] != b"ftyp")
            if self._stream.start_time is None or not self._context.width:
                self._open(probe=True)
        except BaseException:
            self.close()
            raise

    @property
    def duration(self) -> float:
        """Duration (s) of the video stream: by its header or, if that gives only the file's duration, by packets.

        Raises VideoDecodeError.
        """
        if self._promised is not None:
            # Matroska's header counts from 0 to the last frame, even if the first one is later.
            late = max(self._origin, 0) if self._format == "matroska" else 0
            return float((self._promised - late) * self._time_base)
        if self._measured is None:
            with _as_decode_error():
                self._measured = self._measure()
        return float(self._measured * self._time_base)

    def _measure(self) -> int:
        """Return when the last frame ends (ticks), by the packets at the end of the file or, if it has none there, by all.

        Raises VideoDecodeError for a file that ends before its header says so.
        """
        of_file = Fraction(self._input().duration or 0, av.time_base) / self._time_base
        header = self._stream.duration or of_file
        packets: list[Packet] = []
        if header and self._format in _SEEKABLE_FORMATS:
            with suppress(av.error.FFmpegError):
                self._discard_others(Discard.default)
                self._input().seek(int(header), stream=self._stream)
                packets = [p for p in self._input().demux() if p.size and p.pts is not None]
        if not any(p.stream_index == self._stream.index for p in packets):
            self._open(probe=True)
            self._discard_others(Discard.default)
            packets = [p for p in self._input().demux() if p.size and p.pts is not None]
        self._discard_others(Discard.all)
        spans = sorted((_pts(p), p.duration or 0) for p in packets if p.stream_index == self._stream.index)
        if not spans:
            raise VideoDecodeError("its frames have no time stamps")
        ends = [(_pts(p) + (p.duration or 0)) * p.time_base / self._time_base for p in packets if p.time_base]
        if self._format in _SEEKABLE_FORMATS:
            self._require_end(max(ends), min(self._origin, 0) + header)
        last = max(pts + length for pts, length in spans)
        if spans[-1][1] == 0 and len(spans) > 1:  # unknown length: assume the previous frame's
            last += spans[-1][0] - spans[-2][0]
        return last - self._origin

    def _require_end(self, end: int | Fraction, promised: int | Fraction) -> None:
        """Raise VideoDecodeError for a file that ends over half a second (headers are rounded) before its header says so."""
        if end < promised - Fraction(1, 2) / self._time_base:
            raise VideoDecodeError("truncated: it ends before the duration in its header")

    def _discard_others(self, how: Discard) -> None:
        for other in self._input().streams:
            if other.index != self._stream.index:
                other.discard = how

    def read(self, start: Seconds, end: Seconds, num_frames: int) -> torch.Tensor:
        """Decode `num_frames` frames spread over those with start <= t < end: (T, 3, H, W) uint8, channels-last in memory.

        A window without a frame gives the one on screen at `start`. Rotation is applied, pixel aspect is not.
        Raises VideoDecodeError if the frames cannot be decoded, ValueError for an impossible request.
        """
        low, high = (self._origin + tick for tick in tick_range(start, end, 1 / self._time_base))
        _ = self.duration  # rejects truncated files that `_demux` does not detect
        with _as_decode_error():
            packets = self._packets_from_key_frame(low, high)
            if self._packet_times_reliable(packets):
                times = sorted(_pts(p) for p in packets if self._shows_a_frame(p))
                wanted = [times[i] for i in select_frames(times, low, high, num_frames)]
                decoded = self._decode(packets, set(wanted))
                if decoded.keys() == set(wanted):
                    return stack_frames([decoded[t] for t in wanted])
            return self._decode_sequentially(low, high, num_frames)

    @property
    def time_base(self) -> Fraction:
        """Seconds per tick, the unit of `times` and `frames`."""
        return self._time_base

    @property
    def mean_rate(self) -> float | None:
        """Frames per second, by the header; None if unknown."""
        return float(self._stream.average_rate or 0) or None

    def info(self) -> VideoInfo:
        """Return facts about the video: reads all packets, but decodes only the first frame. Raises VideoDecodeError."""
        with _as_decode_error():
            self._open(probe=True)
            packets = [(p.is_keyframe, p.pts) for p in self._demux(_FOR_EVER) if self._shows_a_frame(p)]
            frame = next((frame for frame, _ in self._all_frames(self._origin)), None)
        if frame is None:
            raise VideoDecodeError("no frame could be decoded")
        starts = [0, *(i for i, (is_key, _) in enumerate(packets) if is_key), len(packets)]
        times = sorted(pts for _, pts in packets if pts is not None)
        step = median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0
        rate = float(1 / (Fraction(step) * self._time_base)) if step > 0 else None
        gop = max(b - a for a, b in pairwise(starts))
        transposed, left_right, up_down = _orientation(frame)
        mirrored = (transposed + left_right + up_down) % 2 == 1
        rotation = _ROTATIONS[transposed, left_right ^ mirrored, up_down]
        width, height = (frame.height, frame.width) if transposed else (frame.width, frame.height)
        return VideoInfo(len(packets), width, height, rotation, gop, rate, mirrored)

    def times(self) -> list[int]:
        """Decode the whole video and return when each frame appears (ticks). Raises VideoDecodeError."""
        times, sizes = [], set()
        with _as_decode_error():
            for frame, damaged in self._all_frames(_FOR_EVER):
                self._check_frame(frame, damaged)
                times.append((frame.pts or 0) - self._origin)
                sizes.add((frame.width, frame.height))
        check_sizes(sizes)
        return times

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the tick and the pixels, uint8 (H, W, 3), of each frame. Raises VideoDecodeError."""
        with _as_decode_error():
            for frame, damaged in self._all_frames(_FOR_EVER):
                yield (frame.pts or 0) - self._origin, self._to_rgb(frame, damaged)

    def close(self) -> None:
        """Free FFmpeg's resources; `open_video` closes the descriptor."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def _input(self) -> InputContainer:
        assert self._container is not None, "read after close"
        return self._container

    def _open(self, probe: bool) -> None:
        """Open (again) at the first byte. `probe` lets FFmpeg decode some frames to learn about the stream."""
        self.close()
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        # By descriptor: this is the file that was checked, however FFmpeg would interpret its name.
        options = {"fd": str(self._descriptor), "protocol_whitelist": "fd", "format_whitelist": _FORMATS}
        if not probe:
            options |= {"skip_frame": "all", "probesize": "32"}
        if self._max_pixels is not None:
            options["max_pixels"] = str(2 * self._max_pixels + 65536)  # coded sizes are padded; checked exactly below
        with _as_decode_error():
            container = self._container = av.open("fd:", options=options, metadata_errors="replace")
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            raise VideoDecodeError("no video stream")
        context = stream.codec_context
        if context is None or stream.time_base is None:
            raise VideoDecodeError("no decoder for its codec")
        check_pixels(context.width, context.height, self._max_pixels)
        if self._max_pixels is not None:
            padded = (context.width + 128) * (context.height + 128)
            context.options = {"max_pixels": str(max(self._max_pixels, padded))}
        context.thread_type, context.thread_count = "NONE", 1  # the workers are the parallelism
        self._stream = stream
        self._context = context
        self._time_base = stream.time_base
        self._discard_others(Discard.all)
        self._origin = stream.start_time or 0
        self._format = container.format.name.split(",")[0]
        self._promised = self._header_duration()
        self._may_drop = context.name in _CAN_DROP_UNREFERENCED and _single_layer(context.name, context.extradata)

    def _header_duration(self) -> int | Fraction | None:
        """Return the duration (ticks) that the header gives for the video stream; None if it gives only the whole file's."""
        if (own := self._stream.duration or 0) > 0 and self._format != "asf":
            return own
        alone = all(
            s.index == self._stream.index or s.type == "attachment" or s.disposition & Disposition.attached_pic
            for s in self._input().streams
        )
        if self._format == "matroska" and alone and (microseconds := self._input().duration or 0) > 0:
            return Fraction(microseconds, av.time_base) / self._time_base
        return None

    def _demux(self, high: int) -> Iterator[Packet]:
        """Yield the packets of the stream, in decoding order.

        Raises VideoDecodeError if the file ends before its header says so (or before `high`).
        """
        last = end = -_FOR_EVER  # the latest decoding time, and the latest time that a frame leaves the screen
        for packet in self._input().demux(self._stream):
            if packet.size:
                yield packet
                last = last if packet.dts is None else max(last, packet.dts)
                end = end if packet.pts is None else max(end, packet.pts + (packet.duration or 0))
        index = self._stream.index_entries
        if self._format in _INDEXED_FORMATS and len(index) > 0 and index[-1].timestamp > last:
            raise VideoDecodeError("truncated: its index lists frames after the last one")
        if self._format != "mov" and self._promised and end > -_FOR_EVER:  # mov: edit lists may change the duration
            self._require_end(end, min(min(self._origin, 0) + self._promised, high))

    def _packets_from_key_frame(self, low: int, high: int) -> list[Packet]:
        """Demux packets in decoding order: from a key frame shown at or before `low` to the last one shown before `high`.

        Many containers seek by decoding time and may land on a key frame that is shown later; then seek further back.
        """
        target = min(low, self._origin + (self._stream.duration or _FOR_EVER))
        for seconds_back in (0, 2, 20):
            try:
                back = ceil(seconds_back / self._time_base)
                self._input().seek(max(target - back, -_FOR_EVER), stream=self._stream)
            except av.error.FFmpegError:
                break  # this container cannot seek
            packets = self._demux_until(high)
            key = next((i for i, p in enumerate(packets) if p.is_keyframe), None)
            if key is not None and self._starts_before(packets[key], low):
                return packets[key:]
        self._open(probe=True)
        return self._demux_until(high)

    def _starts_before(self, key: Packet, low: int) -> bool:
        """Return whether no frame from `low` on precedes this key frame."""
        if key.pts is not None and key.pts <= low:
            return True
        index = self._stream.index_entries
        return (
            self._format in _INDEXED_FORMATS
            and key.dts is not None
            and len(index) > 0
            and key.dts <= index[0].timestamp
        )

    def _demux_until(self, high: int) -> list[Packet]:
        """Demux packets until one is decoded at or after `high`."""
        return list(takewhile(lambda packet: packet.dts is None or packet.dts < high, self._demux(high)))

    def _shows_a_frame(self, packet: Packet) -> bool:
        """Return False for packets cut away by an edit list, and for VP8's hidden reference frames (bit 4 of the header)."""
        return not packet.is_discard and (self._context.name != "vp8" or bool(bytes(packet)[0] & 0x10))

    def _packet_times_reliable(self, packets: list[Packet]) -> bool:
        """Return whether the packets' time stamps can be taken for the frames'."""
        codec = self._context.name
        if not packets or self._format not in _TIMED_FORMATS or codec not in _FRAME_PER_PACKET:
            return False
        if self._format == "avi" and codec in ("h264", "hevc") and self._context.has_b_frames:
            return False  # AVI has no presentation times; FFmpeg makes them up, in decoding order
        if codec == "mpeg4" and any(p.size < 10 for p in packets):
            return False  # skipped frames, and placeholders of packed B-frames
        times = [p.pts for p in packets]
        ordered = all(p.pts is None or p.dts is None or p.dts <= p.pts for p in packets)
        return ordered and None not in times and len(set(times)) == len(times)

    def _decode(self, packets: list[Packet], wanted: set[int]) -> dict[int, np.ndarray]:
        """Return time stamp -> RGB of the wanted frames, or of fewer if decoder and packets disagree."""
        decoded: dict[int, np.ndarray] = {}
        for run in _runs(packets, wanted):
            self._context.flush_buffers()
            damaged, entry = False, run[0]
            for packet in chain(run, [None]):  # None: flush the decoder
                keep = packet is None or packet.pts in wanted or not self._may_drop
                self._context.skip_frame = "DEFAULT" if keep else "NONREF"
                for frame in self._context.decode(packet):
                    if entry.is_keyframe and frame.pts == entry.pts and not frame.key_frame:
                        return {}  # the container marks it as a key frame, the decoder does not
                    damaged = frame.is_corrupt or (damaged and not frame.key_frame)  # lasts until the next key frame
                    if frame.pts in wanted:
                        decoded[frame.pts] = self._to_rgb(frame, damaged)
        return decoded

    def _decode_sequentially(self, low: int, high: int, num_frames: int) -> torch.Tensor:
        """Read by the time stamps of decoded frames. Decodes twice, to keep only the wanted frames in memory."""
        times = [frame.pts or 0 for frame, _ in self._all_frames(high)]
        wanted = select_frames(times, low, high, num_frames)
        decoded = {i: self._to_rgb(*pair) for i, pair in enumerate(self._all_frames(high)) if i in set(wanted)}
        return stack_frames([decoded[i] for i in wanted])

    def _all_frames(self, high: int) -> Iterator[tuple[VideoFrame, bool]]:
        """Decode from the first frame to beyond `high`; yield each frame, and whether it is damaged."""
        _ = self.duration  # rejects truncated files
        self._open(probe=True)
        stop = high + ceil(1 / self._time_base)  # a second later, because unreliable time stamps may not ascend
        damaged, is_first = False, True
        for packet in chain(self._demux(high), [None]):  # None: flush the decoder
            for frame in self._context.decode(packet):
                if frame.pts is None:
                    raise VideoDecodeError("its frames have no time stamps")
                if frame.pts >= stop and not is_first:
                    return
                damaged, is_first = frame.is_corrupt or (damaged and not frame.key_frame), False
                yield frame, damaged

    def _to_rgb(self, frame: VideoFrame, damaged: bool) -> np.ndarray:
        """Return (H, W, 3) uint8, upright: a view that keeps FFmpeg's memory alive."""
        self._check_frame(frame, damaged)
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane, shape = rgb.planes[0], (rgb.height, rgb.width, 3)
        pixels: np.ndarray = np.ndarray(shape, np.uint8, buffer=memoryview(plane), strides=(plane.line_size, 3, 1))
        transposed, left_right, up_down = _orientation(frame)
        pixels = pixels.transpose(1, 0, 2) if transposed else pixels
        return pixels[:: -1 if up_down else 1, :: -1 if left_right else 1]

    def _check_frame(self, frame: VideoFrame, damaged: bool) -> None:
        if damaged:
            raise VideoDecodeError("damaged: the decoder marks a frame as corrupt")
        check_pixels(frame.width, frame.height, self._max_pixels)


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Return what makes a frame upright, as in the ffmpeg command: (transpose, then flip left-right, flip up-down).

    Raises VideoDecodeError for a display matrix that shears, or rotates by other than a multiple of 90 degrees (within 1).
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    straight, crossed = (abs(a), abs(d)), (abs(b), abs(c))
    if max(crossed) <= _DEGREE * min(straight):
        return False, a < 0, d < 0
    if max(straight) <= _DEGREE * min(crossed):
        return True, c < 0, b < 0
    raise VideoDecodeError("its display matrix shears it, or rotates it by other than a multiple of 90 degrees")


def _runs(packets: list[Packet], wanted: set[int]) -> list[list[Packet]]:
    """Return the runs of packets to decode for the wanted frames, each starting at a key frame (or the first packet).

    A run ends with its last wanted packet. Frames decoded after a key frame but shown before it may refer to earlier frames: if
    one of them is wanted, the run is joined to the previous one.
    """
    bounds = [0, *(i for i in range(1, len(packets)) if packets[i].is_keyframe), len(packets)]
    runs: list[list[Packet]] = []
    joined: list[Packet] = []
    for begin, end in zip(bounds[-2::-1], bounds[:0:-1], strict=True):
        run = packets[begin:end] + joined
        while run and run[-1].pts not in wanted:
            run.pop()
        leads = begin > 0 and any(_pts(p) < _pts(run[0]) for p in run if p.pts in wanted)
        joined = run if leads else []
        if run and not leads:
            runs.append(run)
    return runs[::-1]


def _pts(packet: Packet) -> int:
    assert packet.pts is not None, "_packet_times_reliable must have checked the packet"
    return packet.pts


def _single_layer(codec: str, extradata: bytes | None) -> bool:
    """Return False for HEVC with several temporal layers, where another layer may refer to an "unreferenced" frame."""
    known = extradata is not None and len(extradata) > 21 and extradata[0] == 1
    return codec != "hevc" or (known and extradata is not None and (extradata[21] >> 3) & 7 == 1)


@contextmanager
def _as_decode_error() -> Iterator[None]:
    """Turn the errors of a damaged or missing file into VideoDecodeError."""
    try:
        yield
    except _FILE_ERRORS as error:
        raise VideoDecodeError(describe_error(error)) from error
