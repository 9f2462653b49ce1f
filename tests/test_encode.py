"""The encoder: what goes in comes out again, byte for byte the same each time, and never half."""

import tempfile
import unittest
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
from numpy.typing import NDArray

from omnivision.data.encode import write_timed_video, write_video
from omnivision.data.video import open_video


def _frames(count: int = 20, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A smooth coloured wave that moves to the right."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    wave = [128 + 100 * np.sin(0.15 * (x - 2 * t) + 0.1 * y + shift) for shift in (0, 1, 2)]
    return np.stack(wave, axis=-1).astype(np.uint8)


def _decode(path: Path) -> tuple[NDArray[np.uint8], list[bool], Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        rate = stream.average_rate
    assert rate is not None
    pictures = np.stack([frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False) for frame in frames])
    return pictures, [bool(frame.key_frame) for frame in frames], Fraction(rate)


class WriteFilm(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "film.mp4"

    def test_comes_back_nearly_as_it_was(self) -> None:
        frames = _frames()
        size = write_video(self.path, frames, fps=25, crf=12)
        decoded, _, rate = _decode(self.path)
        self.assertEqual(decoded.shape, frames.shape)
        self.assertEqual(rate, 25)
        self.assertEqual(size, self.path.stat().st_size)
        error = np.abs(decoded.astype(float) - frames).mean()
        self.assertLess(error, 4.0)  # grey levels; half the colour resolution is lost in 4:2:0
        # Frames out of order or repeated would be further from their originals than from neighbours.
        self.assertGreater(np.abs(decoded[1:].astype(float) - frames[:-1]).mean(), 2 * error)

    def test_same_bytes_every_time(self) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
        contents = set()
        for _ in range(5):
            write_video(self.path, frames, fps=24, gop=12, crf=28)
            contents.add(self.path.read_bytes())
        self.assertEqual(len(contents), 1)

    def test_key_frames_are_as_far_apart_as_asked(self) -> None:
        for gop in (1, 6, 48):
            write_video(self.path, _frames(), fps=30, gop=gop)
            _, key, _ = _decode(self.path)
            self.assertEqual([t for t, is_key in enumerate(key) if is_key], list(range(0, 20, gop)))

    def test_fractional_rates_and_quality(self) -> None:
        rate = Fraction(30000, 1001)
        sizes = [write_video(self.path, _frames(), fps=rate, crf=crf) for crf in (10, 30, 45)]
        self.assertEqual(_decode(self.path)[2], rate)
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertGreater(sizes[0], 2 * sizes[2])

    def test_a_failure_leaves_the_old_film_and_nothing_else(self) -> None:
        write_video(self.path, _frames(), fps=25)
        before = self.path.read_bytes()
        whole = av.VideoFrame.from_ndarray
        made = []

        def fails_at_the_fifth(*args: object, **kwargs: object) -> object:
            made.append(1)
            if len(made) == 5:
                raise RuntimeError("stop")
            return whole(*args, **kwargs)  # type: ignore[arg-type]

        with mock.patch.object(av, "VideoFrame") as stand_in:
            stand_in.from_ndarray = fails_at_the_fifth
            with self.assertRaisesRegex(RuntimeError, "stop"):
                write_video(self.path, _frames()[::-1], fps=25)
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["film.mp4"])

    def test_time_stamps_are_kept_to_the_tick(self) -> None:
        ticks, time_base = [0, 40, 80, 200, 210, 333, 1000, 1033, 1066], Fraction(1, 1000)
        for count in (9, 7, 2, 1):
            with self.subTest(count):
                frames = zip(ticks[:count], _frames(count), strict=True)
                write_timed_video(self.path, frames, time_base, fps=9, end=1500)
                with open_video(str(self.path)) as film:
                    times = [tick * film.time_base for tick in film.times()]
                    self.assertEqual(times, [tick * time_base for tick in ticks[:count]])
                    self.assertEqual(film.duration, 1.5)
        random = np.random.default_rng(0)
        for count in range(1, 16):
            steps = random.choice([10, 40, 40, 40, 100, 700], count)
            ticks = [0, *np.cumsum(steps).tolist()]
            write_timed_video(self.path, zip(ticks[:-1], _frames(count), strict=True), time_base, fps=9, end=ticks[-1])
            with self.subTest(ticks), open_video(str(self.path)) as film:
                self.assertEqual([tick * film.time_base for tick in film.times()], [t * time_base for t in ticks[:-1]])
                self.assertAlmostEqual(film.duration, ticks[-1] / 1000)

    def test_evenly_timed_frames_make_the_same_film_either_way(self) -> None:
        rate = Fraction(30000, 1001)
        write_video(self.path, _frames(), fps=rate)
        other = self.folder / "other.mp4"
        write_timed_video(other, enumerate(_frames()), 1 / rate, fps=rate, end=20)
        self.assertEqual(other.read_bytes(), self.path.read_bytes())

    def test_what_is_quick_to_read_can_mostly_be_dropped(self) -> None:
        counts = {}
        for quick in (True, False):
            write_timed_video(self.path, enumerate(_frames(48)), Fraction(1, 25), fps=25, gop=12, quick_to_read=quick)
            with av.open(str(self.path)) as container:
                container.streams.video[0].codec_context.skip_frame = "NONREF"
                counts[quick] = len(list(container.decode(video=0)))
            self.assertEqual([t for t, is_key in enumerate(_decode(self.path)[1]) if is_key], list(range(0, 48, 12)))
        self.assertLess(counts[True], 20)
        self.assertLess(counts[True], counts[False])

    def test_refuses_frames_that_do_not_belong_together(self) -> None:
        frame = _frames(1)[0]
        for name, frames in {
            "size": [(0, frame), (1, frame[:24])],
            "time": [(1, frame), (1, frame)],
            "none": [],
        }.items():
            with self.subTest(name), self.assertRaisesRegex(ValueError, "expected"):
                write_timed_video(self.path, frames, Fraction(1, 25), fps=25)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_refuses_what_it_cannot_encode(self) -> None:
        good = _frames(2)
        bad = {
            "float": good.astype(np.float32),
            "grey": good[..., 0],
            "odd": good[:, :47],
            "empty": good[:0],
        }
        for name, frames in bad.items():
            with self.subTest(name), self.assertRaisesRegex(ValueError, "expected"):
                write_video(self.path, frames, fps=25)  # type: ignore[arg-type]
        for fps, gop, crf in ((0, 12, 23), (25, 0, 23), (25, 12, 60)):
            with (
                self.subTest(fps=fps, gop=gop, crf=crf),
                self.assertRaisesRegex(ValueError, "expected (fps > 0|gop >= 1 and crf)"),
            ):
                write_video(self.path, good, fps=fps, gop=gop, crf=crf)
        self.assertEqual(list(self.folder.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
