"""Decoding: the same bytes as a full decode, for many codecs; and files that are damaged, odd or hostile."""

import base64
import gc
import io
import os
import shutil
import socket
import struct
import tempfile
import unittest
from collections.abc import Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import av
import av.codec
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder tells its settings otherwise

from omnivision.data import video as decode
from omnivision.data.frames import subsample_indices
from omnivision.data.sampling import clip_window
from omnivision.data.video import VideoDecodeError, VideoFile, open_video
from omnivision.tools.prepare.transcode import TranscodeConfig, TranscodeJob, transcode
from tests.runs import real_videos


def make_video(
    path: Path | str,
    codec: str = "libx264",
    frames: int = 75,
    fps: Fraction | int = 25,
    size: tuple[int, int] = (64, 48),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    metadata: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """A moving pattern with noise: no two frames alike. `pts` are in units of 1/fps."""
    rng = np.random.default_rng(0)
    width, height = size
    with av.open(str(path), "w", container_options=muxer) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt  # type: ignore[attr-defined]
        stream.codec_context.thread_count = 1
        ramp = np.arange(width)[None, :, None] + np.arange(height)[:, None, None] * np.array([1, 2, 3])
        for k in range(frames):
            noise = rng.integers(0, 16, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
            pixels = (ramp * 2 + 5 * k) % 200 + noise[:height, :width]
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), "rgb24")
            frame.pts, frame.time_base = (k if pts is None else pts[k]), 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if codec == "libsvtav1":
        # Run by root, SVT-AV1 leaves its caller with real-time priority, and so all that it starts: others starve.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return Path(path)


class Truth:
    """The whole video by a plain full decode."""

    def __init__(self, path: Path | str):
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            assert stream.time_base is not None
            origin = stream.start_time or 0
            decoded = [(f.pts, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
            self.times = [(pts - origin) * stream.time_base for pts, _ in decoded]
            self.frames = [pixels for _, pixels in decoded]

    def indices(self, start: Fraction, end: Fraction, num: int) -> list[int]:
        inside = [i for i, t in enumerate(self.times) if start <= t < end]
        if not inside:
            inside = [i for i, t in enumerate(self.times) if t <= start][-1:] or [0]
        return [inside[i] for i in subsample_indices(len(inside), num)]

    def read(self, start: Fraction, end: Fraction, num: int) -> np.ndarray:
        return np.stack([self.frames[i] for i in self.indices(start, end, num)])


def pixels(frames: torch.Tensor) -> np.ndarray:
    """(T, C, H, W) -> (T, H, W, C)."""
    return frames.permute(0, 2, 3, 1).numpy()


def edit_packets(source: Path, target: Path, edits: dict[int, Any]) -> Path:
    """Copy a video, passing the bytes of some packets (by number) through a function."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for k, packet in enumerate(p for p in old.demux(old.streams.video[0]) if p.size):
            copy = av.Packet(edits[k](bytearray(bytes(packet))) if k in edits else bytes(packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.duration, copy.is_keyframe, copy.stream = packet.duration, packet.is_keyframe, stream
            new.mux(copy)
    return target


@contextmanager
def counted(name: str) -> Any:
    """Let a method of VideoFile work as before, and count its calls."""
    with mock.patch.object(VideoFile, name, autospec=True, side_effect=getattr(VideoFile, name)) as spy:
        yield spy


class InFolder(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def make(self, name: str, codec: str = "libx264", params: str | None = None, **settings: Any) -> Path:
        """A video; `params` are those of x264 or x265."""
        options = dict(settings.pop("options", {}))
        if codec == "libx265":
            params = "log-level=none:" + (params or "")
        if params is not None:
            options[codec.replace("lib", "") + "-params"] = params
        return make_video(self.folder / name, codec, options=options, **settings)

    def write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def assert_exact(
        self, path: Path | str, windows: Sequence[tuple[float, float, int]], sequential: bool = False
    ) -> None:
        """Every window (start, length, frames) is byte-identical to the full decode, by the expected way."""
        truth = Truth(path)
        with counted("_decode_sequentially") as spy, open_video(str(path)) as video:
            for start, length, num in windows:
                a, b = clip_window(start, length)
                got = pixels(video.read(a, b, num))
                self.assertTrue(np.array_equal(got, truth.read(a, b, num)), f"{path}: {start} + {length}, {num} frames")
            self.assertEqual(spy.call_count, len(windows) if sequential else 0, f"{path}: full decodes")

    def assert_bad(self, path: Path | str, reason: str, read: bool = False, **settings: Any) -> None:
        with self.assertRaisesRegex(VideoDecodeError, reason) as caught:
            with open_video(str(path), **settings) as video:
                if read:
                    video.read(0.0, 2.7, 16)
        message = str(caught.exception)
        self.assertNotIn(str(self.folder), message)
        self.assertNotIn("\n", message)


WINDOWS = [(0.0, 2.7, 16), (1.3, 0.7, 16), (0.48, 1.0, 5), (2.9, 2.7, 4), (9.0, 1.0, 2), (0.11, 0.01, 2), (0.5, 2.7, 1)]
OPEN_GOP = "open-gop=1:bframes=3:scenecut=0"
LAYERS = "temporal-layers=3:bframes=7:b-adapt=0"
VPX = {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}


class Exactness(InFolder):
    def test_real_videos(self) -> None:
        for path in real_videos():
            self.assert_exact(path, [(0.0, 2.7, 16), (1.234, 2.7, 16), (2.0, 0.5, 3), (50.0, 2.7, 2)])

    def test_codecs_and_containers(self) -> None:
        for name, codec, settings in [
            ("gop250.mp4", "libx264", {"options": {"g": "250"}}),
            ("gop12.mov", "libx264", {"options": {"g": "12"}}),
            ("gop1.mp4", "libx264", {"options": {"g": "1"}}),
            *(
                (f"open.{kind}", "libx264", {"options": {"g": "12"}, "params": OPEN_GOP})
                for kind in ("mp4", "mkv", "ts")
            ),
            ("pyramid.mkv", "libx264", {"params": "bframes=8:b-pyramid=normal:b-adapt=0"}),
            ("video.flv", "libx264", {"options": {"g": "25"}}),
            ("444.mp4", "libx264", {"pix_fmt": "yuv444p"}),
            ("hevc.mp4", "libx265", {"params": "keyint=12"}),
            ("layers.mp4", "libx265", {"params": "keyint=12:" + LAYERS}),
            ("vp9.webm", "libvpx-vp9", {"options": VPX | {"g": "30"}}),
            ("vp8.webm", "libvpx", {"options": VPX | {"g": "60"}}),
            ("av1.mp4", "libsvtav1", {"options": {"preset": "12", "g": "25"}}),
            ("b.avi", "mpeg4", {"options": {"g": "25", "bf": "2"}}),
            ("mpeg2.ts", "mpeg2video", {"options": {"g": "12", "bf": "2"}}),
            ("motion.avi", "mjpeg", {"pix_fmt": "yuvj420p"}),
            ("prores.mov", "prores_ks", {"pix_fmt": "yuv422p10le"}),
            ("small.gif", "gif", {"pix_fmt": "rgb8"}),
            *((f"{count}_frames.mp4", "libx264", {"frames": count}) for count in (1, 2, 3)),
            ("2x2.mkv", "ffv1", {"size": (2, 2)}),
            ("odd.mkv", "libx264", {"size": (63, 47), "pix_fmt": "yuv444p"}),
            ("10_bit.mp4", "libx264", {"pix_fmt": "yuv420p10le"}),
            ("10_bit_hevc.mp4", "libx265", {"pix_fmt": "yuv420p10le"}),
            ("grey.mp4", "libx264", {"pix_fmt": "gray"}),
            ("alpha.mov", "prores_ks", {"pix_fmt": "yuva444p10le"}),
            ("alpha.webm", "libvpx-vp9", {"pix_fmt": "yuva420p", "options": {"cpu-used": "8"}}),
            ("lossless_alpha.mov", "png", {"pix_fmt": "rgba"}),
            ("1_fps.mp4", "libx264", {"fps": 1, "frames": 5}),
            ("120_fps.mp4", "libx264", {"fps": 120, "frames": 200}),
            ("variable.mkv", "libx264", {"frames": 30, "pts": [k * k for k in range(30)]}),
        ]:
            self.assertIn(codec, av.codec.codecs_available)
            with self.subTest(name):
                self.assert_exact(self.make(name, codec, **settings), WINDOWS)

    def test_unreliable_packets_are_decoded_in_full(self) -> None:
        for name, codec, options in [
            ("h264.avi", "libx264", {"bf": "2"}),  # no presentation times
            ("program.mpg", "mpeg2video", {"g": "12", "bf": "2"}),  # time stamps wrong after a seek
            ("other.avi", "msmpeg4", {}),  # a codec not known to give a frame for each packet
        ]:
            with self.subTest(name):
                self.assert_exact(self.make(name, codec, options=options), WINDOWS[:3], sequential=True)
        # Matroska counts milliseconds, this video has two frames in each.
        fast = self.make("fast.mkv", fps=2000, options={"bf": "0"})
        self.assert_exact(fast, [(0.0, 0.03, 16), (0.01, 0.02, 5)], sequential=True)

    def test_frames_that_are_not_coded_or_hidden(self) -> None:
        """MPEG-4 writes "as before" as a packet of six bytes, and the decoder gives no frame for it; VP8 hides frames."""
        plain = self.make("plain.avi", "mpeg4", options={"bf": "0"})
        edits = {k: lambda data: data[:5] + bytes([data[5] & ~0x20]) for k in (5, 9, 16)}
        edited = edit_packets(plain, self.folder / "edited.avi", edits)
        self.assertEqual(len(Truth(edited).frames), 72)
        self.assert_exact(edited, WINDOWS[:1], sequential=True)
        plain = self.make("plain.webm", "libvpx", options={"cpu-used": "8", "deadline": "realtime"})
        edits = {k: lambda data: bytes([data[0] & ~0x10]) + data[1:] for k in (7, 12, 13, 30)}
        edited = edit_packets(plain, self.folder / "edited.webm", edits)
        self.assertEqual(len(Truth(edited).frames), 71)
        self.assert_exact(edited, WINDOWS)

    def test_edit_list_that_cuts_the_end(self) -> None:
        path = self.make("cut.mp4", options={"g": "250"})
        data = bytearray(path.read_bytes())
        place = data.index(b"elst") + 12  # after version, flags and count: the duration in ms
        self.assertEqual(struct.unpack(">I", data[place : place + 4]), (3000,))
        data[place : place + 4] = struct.pack(">I", 1000)
        path.write_bytes(data)
        self.assertLess(len(Truth(path).frames), 32)
        self.assert_exact(path, [(0.0, 2.7, 16), (0.5, 2.7, 7)])

    def test_layers_of_hevc(self) -> None:
        """A frame that its own temporal layer does not need may serve another: nothing may be dropped then."""
        for params, expected in [("bframes=3", True), (LAYERS, False)]:
            with open_video(str(self.make("hevc.mp4", "libx265", params, frames=20))) as video:
                self.assertEqual(video._may_drop, expected, params)  # type: ignore[union-attr]

    def test_only_needed_packets_are_decoded(self) -> None:
        for name, codec in [("b.avi", "mpeg4"), ("b.mp4", "libx264"), ("b.mkv", "libx264")]:
            path = self.make(name, codec, options={"bf": "2"})
            with counted("_open") as spy, open_video(str(path)) as video:
                for start in (0.0, 1.0, 2.0):
                    video.read(start, start + 1, 4)
            self.assertEqual(spy.call_count, 1, name)
        # All key frames: 4 wanted frames are 4 conversions and 4 runs of one packet.
        path = self.make("intra.mp4", options={"g": "1"})
        with counted("_to_rgb") as spy, mock.patch.object(decode, "_runs", side_effect=decode._runs) as runs:
            with open_video(str(path)) as video:
                packets = video._packets_from_key_frame(0, 10**6)  # type: ignore[union-attr]
                video.read(0.0, 2.7, 4)
        self.assertEqual(spy.call_count, 4)
        self.assertEqual([len(run) for run in decode._runs(packets, runs.call_args.args[1])], [1, 1, 1, 1])

    def test_index_that_marks_every_frame_as_key_frame(self) -> None:
        """As mp4 means when the list of key frames (stss) is missing: a seek lands anywhere."""
        path = self.make("lie.mp4", "mpeg4", options={"bf": "0", "g": "250"})
        data = path.read_bytes()
        self.assertEqual(data.count(b"stss"), 1)
        path.write_bytes(data.replace(b"stss", b"free"))
        with av.open(str(path)) as container:
            container.seek(12800 * 2, stream=container.streams.video[0])
            self.assertGreater(next(container.demux(video=0)).dts, 12800)
        self.assert_exact(path, [(1.0, 1.0, 4), (2.0, 0.5, 4)], sequential=True)

    def test_gradual_refresh(self) -> None:
        """The container marks key frames from which decoding cannot start cleanly."""
        path = self.make("refresh.mkv", params="intra-refresh=1:bframes=0", options={"g": "25"}, size=(320, 64))
        truth = Truth(path)
        with counted("_decode_sequentially") as spy, open_video(str(path)) as video:
            for start in (0.0, 1.04, 1.2, 2.2):
                a, b = clip_window(start, 0.6)
                self.assertTrue(np.array_equal(pixels(video.read(a, b, 8)), truth.read(a, b, 8)))
            self.assertGreater(spy.call_count, 0)

    def test_windows_of_the_reference(self) -> None:
        """Exact times: 2.7 is a little above 27/10, so a 30 fps clip that starts on a frame holds 82 frames."""
        tables: dict[Fraction, list[tuple[float, int, int]]] = {
            Fraction(25): [(0.0, 0, 67), (1.0, 25, 92), (3.65, 92, 158), (0.5, 13, 80), (7.3, 183, 249)],
            Fraction(30): [(0.0, 0, 81), (1.0, 30, 111), (3.65, 110, 190), (0.5, 15, 96), (7.3, 219, 299)],
            Fraction(30000, 1001): [(0.0, 0, 80), (1.0, 30, 110), (3.65, 110, 190), (0.5, 15, 95), (7.3, 219, 299)],
        }
        for fps, rows in tables.items():
            path = self.make("video.mp4", frames=250 if fps == 25 else 300, fps=fps, size=(32, 16))
            truth = Truth(path)
            with open_video(str(path)) as video:
                self.assertAlmostEqual(video.duration, 10.01 if fps.denominator > 1 else 10.0)
                for start, first, last in rows:
                    want = [first + i for i in subsample_indices(last - first + 1, 16)]
                    got = pixels(video.read(start, start + 2.7, 16))
                    self.assertTrue(np.array_equal(got, np.stack([truth.frames[i] for i in want])), f"{fps}, {start}")

    def test_times_count_from_the_first_frame(self) -> None:
        for name, shift in [("l.ts", 10**6), ("l.mkv", 250), ("l.mp4", 250), ("e.mp4", -50), ("e.mkv", -5)]:
            with self.subTest(name, shift=shift):
                path = self.make(name, pts=range(shift, shift + 75), options={"g": "12"})
                self.assert_exact(path, WINDOWS)
                with open_video(str(path)) as video:
                    self.assertAlmostEqual(video.duration, float(Truth(path).times[-1]) + 0.04, delta=0.05)

    def test_variable_rate_and_gaps(self) -> None:
        """Four frames a second, a hole of three seconds, then normal: a window in the hole shows what was on screen."""
        pts = [*range(0, 100, 6), *range(175, 250)]
        path = self.make("vfr.mkv", pts=pts, frames=len(pts), options={"g": "20"})
        windows = [(0.0, 2.7, 16), (4.5, 1.0, 4), (5.0, 2.7, 16), (3.3, 0.05, 2), (7.0, 2.7, 8), (99.0, 1.0, 2)]
        self.assert_exact(path, windows)
        with open_video(str(path)) as video:
            got = pixels(video.read(4.5, 5.5, 2))
        self.assertTrue(np.array_equal(got, np.stack([Truth(path).frames[16]] * 2)))

    def test_layout_repeats_and_impossible_requests(self) -> None:
        path = self.make("short.mp4", frames=4)
        with open_video(str(path)) as video:
            frames = video.read(0.0, 2.7, 16)
            for start, end, num in [(1.0, 1.0, 4), (2.0, 1.0, 4), (float("nan"), 1.0, 4), (0.0, 1.0, 0)]:
                self.assertRaises(ValueError, video.read, start, end, num)
            self.assertEqual(tuple(video.read(1e30, 2e30, 2).shape), (2, 3, 48, 64))
        self.assertEqual((tuple(frames.shape), frames.dtype), ((16, 3, 48, 64), torch.uint8))
        self.assertTrue(frames.permute(0, 2, 3, 1).is_contiguous())
        self.assertTrue(np.array_equal(pixels(frames), Truth(path).read(Fraction(0), Fraction(3), 16)))
        for fps in (0.0, -1.0, float("nan"), float("inf")):
            with self.assertRaisesRegex(ValueError, "fps"), open_video(str(path), fps=fps):
                pass


class WholeVideos(InFolder):
    def test_times_frames_and_facts(self) -> None:
        for path in (
            self.make("uneven.mkv", frames=8, fps=1000, pts=[0, 40, 80, 200, 210, 333, 1000, 1500]),
            *(self.make(f"a.{suffix}", frames=30) for suffix in ("mp4", "mkv", "ts")),
            self.make("c.avi", "mpeg4", frames=30),
            self.make("d.webm", "libvpx-vp9", frames=30),
            Path(real_videos()[1]),
        ):
            with self.subTest(path.name), open_video(str(path)) as video:
                truth = Truth(path)
                self.assertEqual([tick * video.time_base for tick in video.times()], truth.times)
                frames = list(video.frames())
                self.assertEqual([tick * video.time_base for tick, _ in frames], truth.times)
                self.assertTrue(np.array_equal(np.stack([image for _, image in frames]), np.stack(truth.frames)))
                facts, size = video.info(), truth.frames[0].shape[:2]
                self.assertEqual((facts.height, facts.width, facts.rotation), (*size, 0))
                self.assertEqual(facts.frames, len(truth.times))
                self.assertEqual(video.read(0, 10, 1).shape[2:], size, "after all that")
        for gop in (1, 7, 50):
            path = self.make("gop.mp4", frames=25, options={"g": str(gop), "sc_threshold": "0"})
            with open_video(str(path)) as video:
                self.assertEqual(video.info().gop, min(gop, 25))

    def test_display_matrix(self) -> None:
        """Phones store the sensor's frame and a matrix in the track header, here written by hand.

        Front cameras and editors mirror by it, too. The expected frames were compared with those of FFmpeg's own tool.
        """
        path = self.make("a.mp4", frames=10)
        plain, data, one = Truth(path), path.read_bytes(), 1 << 16
        place = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of fields precede the matrix
        self.assertEqual(struct.unpack(">9i", data[place : place + 36]), (one, 0, 0, 0, one, 0, 0, 0, 1 << 30))

        def turned(a: float, b: float, c: float, d: float) -> Path:
            values = (int(a * one), int(b * one), 0, int(c * one), int(d * one), 0, 0, 0, 1 << 30)
            return self.write("turned.mp4", data[:place] + struct.pack(">9i", *values) + data[place + 36 :])

        for clockwise, mirrored, matrix in (
            (0, False, (2, 0, 0, 2)),  # the scale is that of a screen
            (90, False, (0, 1, -1, 0)),
            (180, False, (-1, 0, 0, -1)),
            (270, False, (0, -1, 1, 0)),
            (0, True, (-1, 0, 0, 1)),
            (90, True, (0, 1, 1, 0)),
            (180, True, (1, 0, 0, -1)),
            (270, True, (0, -1, -1, 0)),
            (90, False, (0.01, 1, -1, 0.01)),
        ):
            expected = np.stack([np.rot90(frame, -clockwise // 90) for frame in plain.frames])
            expected = expected[:, :, ::-1] if mirrored else expected
            with self.subTest(matrix), open_video(str(turned(*matrix))) as video:
                self.assertTrue(np.array_equal(pixels(video.read(0.0, 0.4, 10)), expected))
                self.assertTrue(np.array_equal(np.stack([image for _, image in video.frames()]), expected))
                facts = video.info()
                self.assertEqual((facts.rotation, facts.mirrored), (clockwise, mirrored))
                self.assertEqual((facts.height, facts.width), expected.shape[1:3])
            copy = str(self.folder / "copy.mp4")
            transcode(TranscodeJob(str(self.folder / "turned.mp4"), copy, TranscodeConfig(None, crf=0)))
            with open_video(copy) as video:
                looks = pixels(video.read(0.0, 0.4, 10)).astype(int)
            self.assertLess(float(np.abs(looks - expected).mean()), 3)
        for matrix in ((0.7, 0.7, -0.7, 0.7), (1, 0.5, 0, 1), (1, 1, 1, 1)):
            self.assert_bad(turned(*matrix), "display matrix", read=True)


class Hostile(InFolder):
    good: ClassVar[bytes]

    @classmethod
    def setUpClass(cls) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cls.good = make_video(Path(folder) / "good.mp4", muxer={"movflags": "faststart"}).read_bytes()

    def assert_good(self, path: Path | str) -> None:
        with open_video(str(path), max_pixels=64 * 48) as video:
            self.assertEqual(video.read(0.0, 1.0, 2).shape, (2, 3, 48, 64))

    def test_files_that_are_not_videos_are_refused(self) -> None:
        late = self.make("source.mp4").read_bytes()  # its index is at the end
        index = late.index(b"moov") - 4
        image = io.BytesIO()
        Image.new("RGB", (64, 48)).save(image, "PNG")
        for name, data, reason in (
            ("empty.mp4", b"", "empty"),
            ("text.mp4", b"hello " * 1000, "Invalid data"),
            ("zeros.avi", bytes(10000), "Invalid data"),
            ("bits.yuv", bytes(1000), "Invalid"),
            ("image.mp4", image.getvalue(), "Invalid"),
            ("head.mp4", self.good[:60], "Invalid data|no video stream|End of file"),
            ("no_index.mp4", late[:index], "Invalid data|no video stream"),
            ("cut_index.mp4", late[: index + 200], "Invalid data|no video stream"),
            ("no_header.mp4", bytes(64) + late[64:], "Invalid"),
        ):
            with self.subTest(name):
                self.assert_bad(self.write(name, data), reason)
        self.assert_bad(self.folder / "missing.mp4", "No such file")
        self.assert_bad("with\0null", "null")
        self.assert_bad("half \ud800", "encode")

    def test_special_files_are_refused_without_blocking(self) -> None:
        os.mkfifo(self.folder / "fifo.mp4")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self.folder / "socket.mp4"))
        (self.folder / "loop.mp4").symlink_to(self.folder / "loop.mp4")
        for path in (self.folder / "fifo.mp4", self.folder / "socket.mp4", "/dev/zero"):
            self.assert_bad(path, "not a regular file")
        self.assert_bad(self.folder / "loop.mp4", "symbolic links")

    def test_playlists_open_no_other_file(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)  # FFmpeg looks for relative names here
        target = self.write("target.mp4", self.good)
        playlists = {
            "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
            "safe": "ffconcat version 1.0\nfile target.mp4\n",
            "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\n{target}\n#EXT-X-ENDLIST\n",
            "url": "http://127.0.0.1:1/video.mp4\n",
            # Needs no second file: the video is in the name of its one segment.
            "inside": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\ndata:video/mp2t;base64,"
            + base64.b64encode(self.make("source.ts").read_bytes()).decode()
            + "\n#EXT-X-ENDLIST\n",
            "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        }
        self.write("open.mp4", playlists["safe"].encode())
        with av.open("open.mp4") as container:
            self.assertEqual(container.streams.video[0].width, 64)  # a plain open does follow it
        for name, text in playlists.items():
            for suffix in ("mp4", "m3u8", "ffconcat", "sdp"):
                self.assert_bad(self.write(f"{name}.{suffix}", text.encode()), "Invalid|not permitted|denied")

    def test_odd_names_and_metadata(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        names = [
            "concat:a.mp4|b.mp4",
            "pipe:0",
            "%03d.mp4",
            "-",
            "http:x",
            "wrong.txt",
            "two\nlines.mp4",
            "n" * 200 + ".mp4",
        ]
        for name in [*names, os.fsdecode(b"caf\xe9.mp4")]:
            self.write(name, self.good)
            self.assert_good(name)
        path = make_video(self.folder / "a.mkv", frames=5, metadata={"title": "XXXX"})
        path.write_bytes(path.read_bytes().replace(b"XXXX", b"\xff\xfe\xe9\x80"))
        with self.assertRaises(UnicodeDecodeError), av.open(str(path)):
            pass
        self.assert_good(path)

    def test_file_with_only_sound_is_refused(self) -> None:
        """A cover image does not make it a video."""
        path = self.folder / "sound.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            cover = container.add_stream("mjpeg")
            cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "yuvj420p", Disposition.attached_pic
            container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))  # type: ignore[attr-defined]
            container.mux(stream.encode(None))  # type: ignore[attr-defined]
        self.assert_bad(path, "no video stream")

    def test_truncated_files_are_refused(self) -> None:
        """With its index in front a cut file opens; what is there reads right, the rest is refused."""
        path = self.write("cut.mp4", self.good[: len(self.good) * 2 // 3])
        truth = Truth(self.write("good.mp4", self.good))
        with open_video(str(path)) as video:
            self.assertEqual(video.duration, 3.0)
            got = pixels(video.read(0.0, 0.5, 5))
            self.assertTrue(np.array_equal(got, truth.read(Fraction(0), Fraction(1, 2), 5)))
            for start in (0.0, 2.5, 9.0):
                with self.assertRaisesRegex(VideoDecodeError, "truncated|Invalid data"):
                    video.read(start, start + 2.7, 16)
        with av.open(str(self.folder / "good.mp4")) as container:
            places = sorted(p.pos for p in container.demux(video=0) if p.pos is not None and p.size)
        self.assert_bad(self.write("cut.mp4", self.good[: places[40]]), "truncated: its index", read=True)
        for name, codec in [("a.mkv", "libx264"), ("b.avi", "mpeg4")]:
            data = self.make(name, codec).read_bytes()
            with av.open(str(self.folder / name)) as container:
                places = [packet.pos for packet in container.demux(video=0) if packet.size]
            for end in (len(data) // 2, places[40]):
                path = self.write(f"cut_{name}", data[:end])
                self.assert_bad(path, "truncated|damaged|Invalid", read=True)
                self.assert_bad_whole(path, "truncated|damaged|Invalid")

    def assert_bad_whole(self, path: Path, reason: str) -> None:
        for ask in ("times", "frames"):
            with self.subTest(path.name, ask=ask), open_video(str(path)) as video:
                with self.assertRaisesRegex(VideoDecodeError, reason):
                    list(getattr(video, ask)())

    def test_damaged_frames_are_refused(self) -> None:
        plain = self.make("plain.mp4", size=(160, 128), options={"g": "250", "bf": "0"})

        def damage(data: bytearray) -> bytes:
            data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
            return bytes(data)

        path = edit_packets(plain, self.folder / "damaged.mp4", {30: damage})
        self.assert_bad(path, "damaged: ", read=True)
        self.assert_bad_whole(path, "damaged: ")
        with open_video(str(path)) as video:
            self.assertEqual(video.read(0.0, 1.0, 2).shape, (2, 3, 128, 160))  # before it
            with self.assertRaisesRegex(VideoDecodeError, "damaged: "):
                video.read(2.0, 2.5, 4)  # after it, which builds on it

    def test_a_stream_that_appears_midway(self) -> None:
        """PyAV answers with an IndexError (seen with damaged transport streams)."""
        with open_video(str(self.write("good.mp4", self.good))) as video:
            with mock.patch.object(VideoFile, "_demux", side_effect=IndexError("list index out of range")):
                with self.assertRaisesRegex(VideoDecodeError, "out of range"):
                    video.read(0.0, 1.0, 2)

    def test_random_damage_raises_only_decode_errors(self) -> None:
        rng = np.random.default_rng(1)
        outcomes = set()
        for k in range(60):
            data = bytearray(self.good)
            for place in rng.integers(0, len(data) if k % 2 else 1500, 8):
                data[place] = rng.integers(256)
            path = self.write("x.mp4", bytes(data[: rng.integers(1, len(data))] if k % 5 == 0 else data))
            try:
                with open_video(str(path), max_pixels=10**6) as video:
                    outcomes.add(tuple(video.read(0.3, min(video.duration, 3.0) + 0.4, 3).shape[:2]))
            except VideoDecodeError as error:
                outcomes.add(type(error))
        self.assertEqual(outcomes, {(3, 3), VideoDecodeError})

    def test_frames_above_max_pixels_are_refused(self) -> None:
        path = self.write("good.mp4", self.good)
        self.assert_bad(path, "64x48 is more than max_pixels = 3071", max_pixels=64 * 48 - 1)
        self.assert_good(path)
        large = self.make("8k.mp4", frames=2, size=(7680, 4320), options={"preset": "ultrafast", "crf": "51"})
        self.assert_bad(large, "max_pixels", max_pixels=10**6)
        # The sample description says 16 x 16, the stream itself something else.
        for size, reason in [((640, 480), "Invalid data"), ((96, 64), "96x64 is more than max_pixels = 1000")]:
            path = self.make("big.mp4", frames=3, size=size)
            data = path.read_bytes()
            place = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
            self.assertEqual(struct.unpack(">HH", data[place : place + 4]), size)
            path.write_bytes(data[:place] + struct.pack(">HH", 16, 16) + data[place + 4 :])
            self.assert_bad(path, reason, read=True, max_pixels=1000)

    def test_no_descriptor_stays_open(self) -> None:
        frames = self.folder / "frames"
        frames.mkdir()
        Image.new("RGB", (6, 4)).save(frames / "1.png")
        (frames / "2.png").write_bytes(b"broken")
        paths = [frames, self.folder / "none"]
        contents = {"good.mp4": self.good, "text.mp4": b"x" * 999, "cut.mp4": self.good[: len(self.good) // 2]}
        paths += [self.write(name, data) for name, data in contents.items()]
        gc.collect()  # what earlier tests left behind
        before = len(os.listdir("/proc/self/fd"))
        for k in range(200):
            try:
                with open_video(str(paths[k % 5]), max_pixels=10 if k % 7 == 0 else None) as video:
                    video.read(0.0, 2.7, 2)
            except VideoDecodeError:
                pass
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)


if __name__ == "__main__":
    unittest.main()
