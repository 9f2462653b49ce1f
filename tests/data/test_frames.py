"""Images, depth and folders of frames: which files are read, in which order, and what is refused."""

import os
import unittest
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from omnivision.data.catalog import Dataset, Split
from omnivision.data.frames import (
    SeveralSeriesError,
    group_series,
    natural_sort_key,
    read_depth,
    read_image,
    sort_times,
    subsample_indices,
)
from omnivision.data.video import VideoDecodeError, open_video
from omnivision.tools.report.figures import animate
from omnivision.training import preflight
from omnivision.utils.errors import UserError
from tests.checkpoint.test_checkpoint import Canary
from tests.data import test_catalog as catalog
from tests.tools.test_check_data import run as check_data


class Folder(catalog.Folder):
    def assert_bad(self, reason: str, **settings: Any) -> None:
        with self.assertRaisesRegex(VideoDecodeError, reason), open_video(str(self.folder), **settings) as video:
            video.read(0.0, 2.7, 16)


class Images(Folder):
    def test_image_pixels_are_exact(self) -> None:
        pixels = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
        image, path = Image.fromarray(pixels), str(self.folder / "a.png")
        image.save(path)
        got = read_image(path)
        self.assertEqual((tuple(got.shape), got.dtype), ((1, 3, 48, 64), torch.uint8))
        self.assertTrue(np.array_equal(got[0].permute(1, 2, 0).numpy(), pixels))
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned clockwise by 90 degrees
        image.save(self.folder / "turned.png", exif=exif)
        upright = read_image(str(self.folder / "turned.png"))[0].permute(1, 2, 0).numpy()
        self.assertTrue(np.array_equal(upright, np.rot90(pixels, -1)))
        with self.assertRaisesRegex(VideoDecodeError, "max_pixels"):
            read_image(path, max_pixels=48 * 64 - 1)

    def test_modes_become_rgb(self) -> None:
        grey = np.full((20, 30), 200, np.uint8)
        for name, image in {
            "cmyk.jpg": Image.fromarray(grey).convert("RGB").convert("CMYK"),
            "deep.png": Image.fromarray(grey.astype(np.uint16) << 8),
            "palette.png": Image.fromarray(grey).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
            "grey.png": Image.fromarray(grey),
            "grey.gif": Image.fromarray(grey),
            "bits.png": Image.fromarray(grey).convert("1", dither=Image.Dither.NONE),
            "alpha.png": Image.fromarray(np.dstack([grey] * 3 + [grey // 2]), "RGBA"),
        }.items():
            image.save(self.folder / name)
            got = read_image(str(self.folder / name))
            self.assertEqual(tuple(got.shape), (1, 3, 20, 30), name)
            self.assertLessEqual((got.int() - (255 if name == "bits.png" else 200)).abs().max(), 2, name)
        frames = [Image.new("RGB", (30, 20), (shade,) * 3) for shade in (10, 90, 250)]
        frames[0].save(self.folder / "moving.gif", save_all=True, append_images=frames[1:])
        self.assertLessEqual((read_image(str(self.folder / "moving.gif")).int() - 10).abs().max(), 2, "its first frame")
        wide = np.array([[0, 128], [40_000, 65_535]], np.uint16)
        (self.folder / "wide.pgm").write_bytes(b"P5 2 2 65535\n" + wide.astype(">u2").tobytes())
        self.assertEqual(read_image(str(self.folder / "wide.pgm"))[0, 0].tolist(), [[0, 0], [156, 255]])
        for name, dtype in (("whole.tif", np.int32), ("share.tif", np.float32)):
            Image.fromarray(wide.astype(dtype)).save(self.folder / name)
            with self.assertRaisesRegex(VideoDecodeError, "32 bits"):
                read_image(str(self.folder / name))

    def test_bad_images_are_refused(self) -> None:
        Image.effect_noise((30, 20), 50).save(self.folder / "good.png")
        good = (self.folder / "good.png").read_bytes()
        (self.folder / "cut.png").write_bytes(good[: len(good) // 2])
        (self.folder / "flipped.png").write_bytes(good[:40] + bytes([good[40] ^ 255]) + good[41:])
        (self.folder / "text.png").write_text("no image")
        (self.folder / "folder.png").mkdir()
        for name in ("cut.png", "flipped.png", "text.png", "folder.png", "none.png"):
            with self.assertRaises(VideoDecodeError, msg=name):
                read_image(str(self.folder / name))


class Depth(Folder):
    def test_depth_file_formats(self) -> None:
        depth = (np.arange(48 * 64) * 20).reshape(48, 64).astype(np.uint16)
        Image.fromarray(depth).save(self.folder / "d.png")
        np.save(self.folder / "d.npy", depth.astype(np.float64))
        torch.save(torch.nn.Parameter(torch.from_numpy(depth.astype(np.float32))[None]), self.folder / "d.pt")
        for name in ("d.png", "d.npy", "d.pt"):
            got = read_depth(str(self.folder / name))
            self.assertEqual((tuple(got.shape), got.dtype), ((1, 1, 48, 64), torch.float32), name)
            self.assertTrue(np.array_equal(got[0, 0].numpy(), depth), name)
            self.assertFalse(got.requires_grad)

    def test_refused(self) -> None:
        """What a small file may claim is refused before it takes room, and nothing is unpickled."""
        canary = self.folder / "canary"
        for name, content in {
            "huge": torch.zeros(1, dtype=torch.float16).expand(300_000, 300_000),
            "sparse": torch.ones(4, 4).to_sparse(),
            "nested": torch.nested.nested_tensor([torch.ones(2, 2)]),
            "complex": torch.ones(4, 4, dtype=torch.complex64),
            "meta": torch.ones(4, 4, device="meta"),
            "nan": torch.full((4, 4), float("nan")),
            "empty": torch.ones(0, 4),
            "list": [1, 2],
            "evil": Canary(str(canary)),
        }.items():
            torch.save(content, self.folder / f"{name}.pt")
        for name, array in {
            "days": np.zeros((4, 4), "datetime64[D]"),
            "objects": np.array([{}], dtype=object),
            "flat": np.zeros(7),
        }.items():
            np.save(self.folder / f"{name}.npy", array)
        for path in [*self.folder.iterdir(), self.folder / "none.npy"]:
            with self.assertRaises(VideoDecodeError, msg=path.name):
                read_depth(str(path), max_pixels=10**6)
        self.assertFalse(canary.exists())


class Folders(Folder):
    def make(self, count: int) -> None:
        for k in range(count):
            Image.new("RGB", (6, 4), (k, 2 * k % 256, 7)).save(self.folder / f"{k + 1}.png")

    def numbers(self, start: float, end: float, num: int, **settings: Any) -> list[int]:
        with open_video(str(self.folder), **settings) as video:
            return [int(v) for v in video.read(start, end, num)[:, 0, 0, 0]]

    def test_windows(self) -> None:
        """75 files at 25 fps. A start beyond the end gives the last frame, where the reference failed."""
        self.make(75)
        for start, first, last in [(0.0, 0, 67), (1.0, 25, 74), (0.5, 13, 74), (3.65, 74, 74)]:
            want = [first + i for i in subsample_indices(last - first + 1, 16)]
            self.assertEqual(self.numbers(start, start + 2.7, 16), want)
        self.assertEqual(self.numbers(1.0, 2.0, 3, fps=10.0), [10, 14, 19])
        self.assertEqual(self.numbers(1.25, 1.26, 2, fps=10.0), [12, 12])
        self.assertEqual(self.numbers(-3.0, -2.0, 1, fps=10.0), [0])

    def test_facts(self) -> None:
        self.make(12)
        with open_video(str(self.folder), fps=5) as video:
            facts = video.info()
            self.assertEqual((facts.frames, facts.width, facts.height, facts.rotation, facts.gop), (12, 6, 4, 0, 1))
            self.assertEqual((video.duration, video.times(), video.time_base * 5), (2.4, list(range(12)), 1))
            self.assertEqual([(tick, image[0, 0, 0]) for tick, image in video.frames()], [(k, k) for k in range(12)])

    def test_only_wanted_images_in_natural_order(self) -> None:
        self.make(12)
        for name in (".0.png", "0.txt", "Thumbs.db", "7.png"):
            (self.folder / name).write_bytes(b"not a frame")
        os.mkfifo(self.folder / "0.pipe")
        self.assertEqual(self.numbers(0.0, 0.24, 6), list(range(6)))
        self.assert_bad("7.png.*not an image")

    def test_refused(self) -> None:
        self.assert_bad("no images")
        self.make(3)
        wrong = self.folder / "2.png"
        for make, reason, settings in (
            (lambda: Image.new("RGB", (4, 6)).save(wrong), "different sizes: 4x6, 6x4", {}),
            (lambda: os.mkfifo(wrong), "2.png.*not a regular file", {}),
            (lambda: wrong.mkdir(), "2.png.*not a regular file", {}),
            (
                lambda: Image.effect_noise((64, 64), 50).save(wrong),
                "64x64 is more than max_pixels",
                {"max_pixels": 100},
            ),
            (lambda: wrong.write_bytes(b"\x89PNG"), "2.png", {}),
        ):
            os.remove(wrong) if not wrong.is_dir() else wrong.rmdir()
            make()
            self.assert_bad(reason, **settings)
        wrong.unlink()
        Image.new("RGB", (4, 6)).save(wrong)
        with open_video(str(self.folder)) as video, self.assertRaisesRegex(VideoDecodeError, "different sizes"):
            video.times()


def numbered(text: str, count: int = 12) -> list[str]:
    return [text.format(number) for number in range(1, count + 1)]


class Names(unittest.TestCase):
    def test_names_of_one_series(self):
        for pattern, names in {
            "img_*.jpg": numbered("img_{:05d}.jpg"),
            "frame*.jpg": numbered("frame{}.jpg"),
            "*.png": ["1.png", "2.png", "77.png", "1403636579763555584.png"],
            "v_Biking_g01_c01_*.jpg": numbered("v_Biking_g01_c01_{:04d}.jpg"),
            "frame_*_pts_*.jpg": [f"frame_{i:03d}_pts_{512 * i}.jpg" for i in range(9)],
            "*.webp": [f"{i / 25:.2f}.webp" for i in range(60)],
            "2021-03-04_*.jpg": [f"2021-03-04_12-30-{i // 20:02d}.{i % 20:03d}.jpg" for i in range(60)],
            "shot*_*.jpg": [f"shot{i // 5}_{i}.jpg" for i in range(20)],
            "*.bmp": ["begin.bmp", "middle.bmp", "end.bmp"],
            "only_*.jpg": ["only_1.jpg"],
            "shot_*.*": ["shot_1.jpg", "shot_2.JPG", "shot_3.png"],
        }.items():
            self.assertEqual(group_series(names), {pattern: names})

    def test_names_of_several_series(self):
        for patterns, names in {
            ("img_*.jpg", "flow_x_*.jpg"): numbered("img_{}.jpg") + numbered("flow_x_{}.jpg"),
            ("*.png", "*_depth.png"): numbered("{:04d}.png") + numbered("{:04d}_depth.png"),
            ("*.jpg", "*.png"): numbered("{}.jpg") + numbered("{}.png"),
            ("cam1_*.jpg", "cam2_*.jpg"): numbered("cam1_{:04d}.jpg") + numbered("cam2_{:04d}.jpg"),
            ("a1.*.jpg", "a2.*.jpg"): numbered("a1.{:04d}.jpg") + numbered("a2.{:04d}.jpg"),
            ("cam1_*.jpg", "cam2_*.jpg", "cam3_*.jpg"): [
                f"cam{camera}_{40 * i + 7 * camera}.jpg" for camera in (1, 2, 3) for i in range(12)
            ],  # by time, which no two cameras share
            ("*.jpg", "thumb.jpg"): [*numbered("{}.jpg"), "thumb.jpg"],
            ("clip.jpg", "clip*.jpg"): ["clip.jpg", "clip1.jpg", "clip2.jpg"],
            ("*.jpg", "1 (*).jpg"): ["1.jpg", "2.jpg", "1 (1).jpg"],
        }.items():
            series = group_series(names)
            self.assertEqual(tuple(series), patterns)
            self.assertEqual([name for own in series.values() for name in own], names)

    def test_times_are_in_order(self):
        for names in (
            [f"{i / 25}.jpg" for i in range(60)],
            [f"frame_{i / 8}.png" for i in range(30)],
            [f"{i / 2:g}.jpg" for i in range(30)],
            [f"{i / 25:.2f}.jpg" for i in range(60)],
            [f"1.{i}.jpg" for i in range(1, 30)],
            [f"take{i // 20}.{i % 20}.jpg" for i in range(60)],
            [f"{i}.jpg" for i in range(30)],
        ):
            self.assertEqual(sort_times(sorted(names, key=natural_sort_key)), names)


class Series(Folder):
    """A folder with three series, of which one is chosen or none."""

    def setUp(self):
        super().setUp()
        (self.folder / "clip").mkdir()
        for name, grey in (("img", 10), ("flow_x", 100), ("img_flow", 200)):
            for number in range(1, 6):
                Image.new("RGB", (32, 24), (grey,) * 3).save(self.folder / "clip" / f"{name}_{number:05d}.png")
        np.save(self.folder / "paths.npy", np.array(["clip", "nowhere"]))
        np.save(self.folder / "one.npy", np.array(["clip"]))

    def dataset(self, paths: str, **entry: object) -> Dataset:
        return Dataset(name="d", prefix=f"{self.folder}/", train={"paths": str(self.folder / paths)}, **entry)

    def test_several_series_need_a_frame_pattern(self):
        path = str(self.folder / "clip")
        with self.assertRaisesRegex(SeveralSeriesError, r"flow_x_\*\.png, img_\*\.png, img_flow_\*\.png"):
            open_video(path).__enter__()
        # A pattern is one of the series, though as a shell pattern it would match more, or else what it matches.
        for pattern, frames, grey in (
            ("img_*.png", 5, {10}),
            ("flow_*", 5, {100}),
            ("*_00002.png", 3, None),
            ("*", 15, None),
        ):
            with open_video(path, frame_pattern=pattern) as video:
                self.assertEqual(video.info().frames, frames)
                self.assertIn(set(video.read(0.0, 1.0, 16).flatten().tolist()), [grey, {10, 100, 200}])
        with self.assertRaises(VideoDecodeError), open_video(path, frame_pattern="rgb_*"):
            pass
        self.assertTrue(animate(path, 25.0, "img_*.png"))
        self.assertFalse(animate(path, 25.0))

    def test_check_data_reports_several_series(self):
        arguments = (self.folder / "one.npy", "--prefix", f"{self.folder}/")
        code, out = check_data(*arguments)
        self.assertEqual((code, "img_flow_*.png" in out), (1, True))
        self.assertEqual(check_data(*arguments, "--frame-pattern", "img_*.png")[0], 0)

    def test_preflight_refuses_several_series(self):
        data = SimpleNamespace(max_pixels=None, clip_duration=1.0, num_frames=1, bad_sample_budget=0.01)
        checkpoint = SimpleNamespace(save_dir=f"{self.folder}/checkpoints")
        trainer = SimpleNamespace(data=data, checkpoint=checkpoint)
        settings = SimpleNamespace(trainer=trainer, submitit=SimpleNamespace(use_cluster=False))
        with self.assertRaisesRegex(UserError, r"datasets\.d\.frame_pattern"):
            preflight.probe_samples(settings, Split(self.dataset("paths.npy"), "train"))
        chosen = self.dataset("paths.npy", frame_pattern="img_*.png")
        preflight.probe_samples(settings, Split(chosen, "train"))

    def test_assumed_frame_rate_is_shown(self):
        self.assertRegex(preflight.describe_split(Split(self.dataset("one.npy", fps=12.5), "train")), r"12\.5.*d\.fps")
        (self.folder / "clip.mp4").touch()
        np.save(self.folder / "one.npy", np.array(["clip.mp4"]))
        self.assertNotIn("fps", preflight.describe_split(Split(self.dataset("one.npy", fps=12.5), "train")))


if __name__ == "__main__":
    unittest.main()
