"""Whole films: what is told of them without decoding, and all their frames, against a plain full decode."""

import unittest
from pathlib import Path

import av
import numpy as np
from PIL import Image

from omnivision.data.video import VideoDecodeError, open_video
from tests.runs import real_films
from tests.test_decode import InFolder, Truth, edit_packets, make_film


class WholeFilms(InFolder):
    def films(self) -> list[Path]:
        kinds = [
            ("a.mp4", "libx264"),
            ("b.mkv", "libx264"),
            ("c.avi", "mpeg4"),
            ("d.webm", "libvpx-vp9"),
            ("e.ts", "libx264"),
        ]
        uneven = make_film(self.folder / "f.mkv", frames=8, fps=1000, pts=[0, 40, 80, 200, 210, 333, 1000, 1500])
        return [
            uneven,
            *(make_film(self.folder / name, codec, frames=30) for name, codec in kinds),
            Path(real_films()[1]),
        ]

    def test_times_and_frames_are_those_of_a_full_decode(self) -> None:
        for path in self.films():
            with self.subTest(path.name), open_video(str(path)) as film:
                truth = Truth(path)
                self.assertEqual([tick * film.time_base for tick in film.times()], truth.times)
                found = list(film.frames())
                self.assertEqual([tick * film.time_base for tick, _ in found], truth.times)
                self.assertTrue(np.array_equal(np.stack([picture for _, picture in found]), np.stack(truth.frames)))
                self.assertEqual(
                    film.read(0, 10, 1).shape[2:], truth.frames[0].shape[:2], "it can be read before and after"
                )

    def test_facts(self) -> None:
        for path in self.films():
            with self.subTest(path.name), open_video(str(path)) as film:
                facts, (height, width, _) = film.info(), Truth(path).frames[0].shape
                self.assertEqual((facts.width, facts.height, facts.rotation), (width, height, 0))
                self.assertEqual(facts.frames, len(film.times()))
        for gop in (1, 7, 50):
            path = make_film(self.folder / "gop.mp4", frames=25, options={"g": str(gop), "sc_threshold": "0"})
            with open_video(str(path)) as film:
                self.assertEqual(film.info().gop, min(gop, 25))

    def test_what_is_not_whole_is_refused(self) -> None:
        for name, codec in (("a.mkv", "libx264"), ("b.avi", "mpeg4")):
            path = make_film(self.folder / name, codec)
            with av.open(str(path)) as container:
                places = [packet.pos for packet in container.demux(video=0) if packet.size]
            path.write_bytes(path.read_bytes()[: places[40]])
            self.assert_refused(path, "truncated|Invalid data")
        plain = make_film(self.folder / "plain.mp4", size=(160, 128), options={"g": "250", "bf": "0"})
        path = edit_packets(
            plain, self.folder / "damaged.mp4", {30: lambda data: bytes(data[:9]) + bytes(len(data) - 9)}
        )
        self.assert_refused(path, "damaged|Invalid data")
        small = make_film(self.folder / "small.mp4", frames=3)
        with open_video(str(small), max_pixels=64 * 48) as film:
            self.assertEqual(len(film.times()), 3)

    def assert_refused(self, path: Path, reason: str) -> None:
        for ask in ("times", "frames"):
            with self.subTest(path.name, ask=ask), open_video(str(path)) as film:
                with self.assertRaisesRegex(VideoDecodeError, reason):
                    list(getattr(film, ask)())

    def test_folders_of_frames(self) -> None:
        (self.folder / "clip").mkdir()
        for k in (1, 2, 10):
            Image.new("RGB", (20, 10), (k, 0, 0)).save(self.folder / "clip" / f"{k}.png")
        with open_video(str(self.folder / "clip"), fps=5) as film:
            self.assertEqual([(tick, picture[0, 0, 0]) for tick, picture in film.frames()], [(0, 1), (1, 2), (2, 10)])
            self.assertEqual((film.times(), film.time_base * 5), ([0, 1, 2], 1))
            facts = film.info()
            self.assertEqual((facts.frames, facts.width, facts.height, facts.rotation, facts.gop), (3, 20, 10, 0, 1))
        Image.new("RGB", (10, 20)).save(self.folder / "clip" / "3.png")
        with open_video(str(self.folder / "clip")) as film, self.assertRaisesRegex(VideoDecodeError, "different sizes"):
            film.times()


if __name__ == "__main__":
    unittest.main()
