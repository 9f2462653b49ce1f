"""The encoder: what goes in comes out again, byte for byte the same each time, and never half."""

import unittest
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
from numpy.typing import NDArray

from omnivision.data.encode import write_timed_video, write_video
from omnivision.data.video import open_video
from tests.fixtures import Folder


def _frames(count: int = 20, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A smooth coloured wave that moves to the right."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    wave = [128 + 100 * np.sin(0.15 * (x - 2 * t) + 0.1 * y + shift) for shift in (0, 1, 2)]
    return np.stack(wave, axis=-1).astype(np.uint8)


def _decode(path: Path) -> tuple[NDArray[np.uint8], list[int], Fraction]:
    """Frames, positions of the key frames, frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        rate = Fraction(stream.average_rate or 0)
    pixels = np.stack([frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False) for frame in frames])
    return pixels, [t for t, frame in enumerate(frames) if frame.key_frame], rate


class WriteVideo(Folder):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.folder / "video.mp4"

    def test_decoded_frames_are_close_to_the_originals(self) -> None:
        frames = _frames()
        size = write_video(self.path, frames, fps=25, crf=12)
        decoded, _, rate = _decode(self.path)
        self.assertEqual((decoded.shape, rate, size), (frames.shape, 25, self.path.stat().st_size))
        error = np.abs(decoded.astype(float) - frames).mean()
        self.assertLess(error, 4.0)  # grey levels; half the colour resolution is lost in 4:2:0
        # Frames out of order or repeated would be further from their originals than from neighbours.
        self.assertGreater(np.abs(decoded[1:].astype(float) - frames[:-1]).mean(), 2 * error)

    def test_encoding_is_deterministic(self) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
        contents = set()
        for _ in range(5):
            write_video(self.path, frames, fps=24, gop=12, crf=28)
            contents.add(self.path.read_bytes())
        self.assertEqual(len(contents), 1)
        rate = Fraction(30000, 1001)
        write_video(self.path, _frames(), fps=rate)
        write_timed_video(self.folder / "timed.mp4", enumerate(_frames()), 1 / rate, fps=rate, end=20)
        self.assertEqual((self.folder / "timed.mp4").read_bytes(), self.path.read_bytes())

    def test_key_frames_rates_and_quality(self) -> None:
        for gop in (1, 6, 48):
            write_video(self.path, _frames(), fps=30, gop=gop)
            self.assertEqual(_decode(self.path)[1], list(range(0, 20, gop)))
        rate = Fraction(30000, 1001)
        sizes = [write_video(self.path, _frames(), fps=rate, crf=crf) for crf in (10, 30, 45)]
        self.assertEqual((_decode(self.path)[2], sizes), (rate, sorted(sizes, reverse=True)))
        self.assertGreater(sizes[0], 2 * sizes[2])

    def test_failure_keeps_the_old_video(self) -> None:
        write_video(self.path, _frames(), fps=25)
        before = self.path.read_bytes()

        def fails_at_the_fifth() -> object:
            for tick, frame in enumerate(_frames()[::-1]):
                if tick == 4:
                    raise RuntimeError("stop")
                yield tick, frame

        with self.assertRaisesRegex(RuntimeError, "stop"):
            write_timed_video(self.path, fails_at_the_fifth(), Fraction(1, 25), fps=25)
        with mock.patch.object(av.VideoFrame, "from_ndarray", side_effect=RuntimeError("stop")):
            with self.assertRaisesRegex(RuntimeError, "stop"):
                write_video(self.path, _frames()[::-1], fps=25)
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["video.mp4"])

    def test_time_stamps_are_kept_to_the_tick(self) -> None:
        time_base, random = Fraction(1, 1000), np.random.default_rng(0)
        uneven = [0, 40, 80, 200, 210, 333, 1000, 1033, 1066]
        cases = [[*uneven[:count], 1500] for count in (9, 7, 2, 1)]
        cases += [[0, *np.cumsum(random.choice([10, 40, 40, 40, 100, 700], n)).tolist()] for n in range(1, 16)]
        for *ticks, end in cases:
            frames = zip(ticks, _frames(len(ticks)), strict=True)
            write_timed_video(self.path, frames, time_base, fps=9, end=end)
            with self.subTest(ticks), open_video(str(self.path)) as video:
                self.assertEqual([tick * video.time_base for tick in video.times()], [t * time_base for t in ticks])
                self.assertAlmostEqual(video.duration, end / 1000)

    def test_most_frames_of_a_quick_video_can_be_dropped(self) -> None:
        counts = {}
        for quick in (True, False):
            write_timed_video(self.path, enumerate(_frames(48)), Fraction(1, 25), fps=25, gop=12, quick_to_read=quick)
            with av.open(str(self.path)) as container:
                container.streams.video[0].codec_context.skip_frame = "NONREF"
                counts[quick] = len(list(container.decode(video=0)))
            self.assertEqual(_decode(self.path)[1], list(range(0, 48, 12)))
        self.assertLess(counts[True], 20)
        self.assertLess(counts[True], counts[False])

    def test_invalid_frames_are_refused(self) -> None:
        good = _frames(2)
        for name, frames in {
            "float": [(0, good[0].astype(np.float32))],
            "grey": [(0, good[0, ..., 0])],
            "odd": [(0, good[0, :47])],
            "size": [(0, good[0]), (1, good[0, :24])],
            "time": [(1, good[0]), (1, good[1])],
            "none": [],
        }.items():
            with self.subTest(name), self.assertRaises(ValueError):
                write_timed_video(self.path, frames, Fraction(1, 25), fps=25)
        for settings in ({"gop": 0}, {"crf": 60}):
            with self.subTest(settings), self.assertRaises(ValueError):
                write_video(self.path, good, fps=25, **settings)
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
