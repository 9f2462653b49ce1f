"""Odd and hostile files as a run meets them: through the dataset, in a data worker. Good ones give what a full decode gives,
bad ones are named with a reason, and none hangs, crashes or opens anything else.
"""

import base64
import io
import os
import time
import unittest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omnivision.data.catalog import Dataset, Split
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.loader import LoaderConfig, ValData
from omnivision.data.sampling import clip_window, uniform_clip_starts
from omnivision.data.video import open_video
from tests.test_catalog import Folder
from tests.test_decode import Truth, make_video

CLIP = 0.5  # seconds
FRAMES = 4


class AsDecoded:
    """A view: the corner that all videos have, as it was decoded."""

    size = 2

    def prepare(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def __call__(self, frames: torch.Tensor, rng: np.random.Generator, number: int) -> torch.Tensor:
        return frames[:, :, :2, :2]


def good_videos(folder: Path) -> list[Path]:
    def video(name: str, *arguments: object, **settings: object) -> Path:
        return make_video(folder / name, *arguments, **settings)

    x265 = {"x265-params": "log-level=none"}
    whole = video("whole.mp4")
    (folder / "wrong.txt").write_bytes(whole.read_bytes())
    long, line = folder / f"{'n' * 200}.mp4", folder / "two\nlines.mp4"
    for copy in (long, line):
        copy.write_bytes(whole.read_bytes())
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")
    Path(odd).write_bytes(whole.read_bytes())
    return [
        *(video(f"{count}_frames.mp4", frames=count) for count in (1, 2, 3)),
        video("2x2.mkv", "ffv1", size=(2, 2)),
        video("odd.mkv", "libx264", size=(63, 47), pix_fmt="yuv444p"),
        video("10_bit.mp4", pix_fmt="yuv420p10le"),
        video("10_bit_hevc.mp4", "libx265", pix_fmt="yuv420p10le", options=x265),
        video("grey.mp4", pix_fmt="gray"),
        video("alpha.mov", "prores_ks", pix_fmt="yuva444p10le"),
        video("alpha.webm", "libvpx-vp9", pix_fmt="yuva420p", options={"cpu-used": "8"}),
        video("lossless_alpha.mov", "png", pix_fmt="rgba"),
        video("1_fps.mp4", fps=1, frames=5),
        video("120_fps.mp4", fps=120, frames=200),
        video("variable.mkv", frames=30, pts=[k * k for k in range(30)]),
        whole, folder / "wrong.txt", long, line, Path(odd),
    ]  # fmt: skip


def bad_files(folder: Path) -> list[Path]:
    whole = make_video(folder / "source.mp4").read_bytes()  # its index is at the end
    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    cut_off = whole.index(b"moov") - 4
    files = {
        "empty.mp4": b"",
        "text.mp4": b"a film, honestly\n" * 100,
        "no_moov.mp4": whole[:cut_off],
        "truncated.mp4": whole[: cut_off + 200],
        "header.mp4": bytes(64) + whole[64:],
        "playlist.mp4": f"#EXTM3U\n#EXTINF:3.0,\n{folder}/source.mp4\n".encode(),
        "list.mp4": f"ffconcat version 1.0\nfile '{folder}/source.mp4'\n".encode(),
        "url.mp4": b"http://127.0.0.1:1/film.mp4\n",
        # Needs no second file: the film is in the name of its one segment.
        "inside.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\ndata:video/mp2t;base64,"
        + base64.b64encode(make_video(folder / "source.ts").read_bytes())
        + b"\n#EXT-X-ENDLIST\n",
        "bits.yuv": bytes(1000),
        "picture.mp4": picture.getvalue(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "nothing").mkdir()
    (folder / "sizes").mkdir()
    for number, size in enumerate(((6, 4), (4, 6))):
        Image.new("RGB", size).save(folder / "sizes" / f"{number}.png")
    large = make_video(folder / "8k.mp4", frames=2, size=(7680, 4320), options={"preset": "ultrafast", "crf": "51"})
    assert large.stat().st_size < 2_000_000
    special = ["pipe.mp4", "loop.mp4", "nothing", "sizes", "8k.mp4", "gone.mp4"]
    return [folder / name for name in (*files, *special)]


class Corpus(Folder):
    def read(self, paths: list[Path]) -> dict[str, np.ndarray | str]:
        """What a data worker makes of each file: its clip (T, 2, 2, 3), or the reason why it has none."""
        np.save(self.folder / "paths.npy", np.array([str(path) for path in paths]))
        dataset = Dataset(name="corpus", num_classes=2, val={"paths": str(self.folder / "paths.npy")})
        config = ClipConfig(AsDecoded(), 1, FRAMES, (1, 1, 1))
        clips = ClipDataset([Split(dataset, "val")], {"video": config}, CLIP, 0, training=False, max_pixels=10**6)
        found: dict[str, np.ndarray | str] = {}
        for batch in ValData(clips, LoaderConfig(1, timeout=60), 1).batches():
            path = batch.bad[0].path if batch.bad else batch.paths[0]
            found[path] = batch.bad[0].reason if batch.bad else batch.video[0].permute(1, 2, 3, 0).numpy()
        return found

    def test_good_ones_are_what_a_full_decode_gives(self) -> None:
        videos = good_videos(self.folder)
        found = self.read(videos)
        self.assertEqual(len(found), len(videos))
        for path in videos:
            got = found[str(path)]
            self.assertIsInstance(got, np.ndarray, f"{path.name}: {got}")
            with open_video(str(path)) as video:
                [start] = uniform_clip_starts(video.duration, CLIP, 1)
            truth = Truth(path).read(*clip_window(start, CLIP), FRAMES)[:, :2, :2]
            self.assertTrue(np.array_equal(got, truth), path.name)

    def test_bad_ones_are_named_with_a_reason_and_none_is_waited_for(self) -> None:
        files, began = bad_files(self.folder), time.monotonic()
        found = self.read(files)
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual(len(found), len(files))
        for path in files:
            reason = found[str(path)]
            self.assertIsInstance(reason, str, path.name)
            self.assertTrue(reason and "\n" not in reason and str(self.folder) not in reason, f"{path.name}: {reason}")
        self.assertIn("max_pixels", found[str(self.folder / "8k.mp4")])


if __name__ == "__main__":
    unittest.main()
