"""The x-ray: what each change does, whether its verdict is right about models that look at one thing, its errors."""

import json
import unittest
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from omnivision.data.batch import Batch
from omnivision.probing import xray as probing
from omnivision.probing.xray import CHANGES, INTACT, Measured, Xray
from omnivision.tools.main import main
from tests import stage_runs as stages
from tests import tiny_models as tiny

CLIP = (3, 8, 24, 24)


def clip(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, *CLIP), dtype=np.uint8))


def labelled_clips(count: int = 60) -> list[Batch]:
    """Videos of two classes: class 1 has a brighter background, and its square moves; class 0 has it at rest."""
    batches = []
    for number in range(count):
        label = number % 2
        video = torch.full((1, *CLIP), 60 + 60 * label, dtype=torch.uint8)
        for time in range(CLIP[1]):
            left = 2 * time if label else 4 + number % 8
            video[:, :, time, 8:14, left : left + 6] = 250
        one = torch.tensor([number])
        batches.append(Batch(video, torch.tensor([label]), one, "set", [str(number)]))
    return batches


class Looks(nn.Module):
    """A classifier of these videos that looks at one thing."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, video: Tensor, head: int) -> Tensor:
        pixels = video.float()
        score = {
            "motion": pixels.diff(dim=2).abs().mean((1, 2, 3, 4)) - 1,
            "place": pixels.flatten(1).median(1).values - 90,
            "nothing": pixels.new_ones(len(video)),
        }[self.what]
        return torch.stack([-score, score], 1)


def examine(what: str) -> Xray:
    return probing.xray(
        Looks(what), labelled_clips(), 0, "logits", ["rest", "move"], torch.device("cpu"), lambda: nullcontext()
    )


class Changes(unittest.TestCase):
    def changed(self, name: str, video: Tensor) -> Tensor:
        return CHANGES[name](video, torch.tensor([3, 1, 0, 7, 5, 2, 6, 4]))

    def test_each_keeps_shape_and_type(self) -> None:
        for name in CHANGES:
            result = self.changed(name, clip())
            self.assertEqual((result.shape, result.dtype), ((1, *CLIP), torch.uint8), name)

    def test_time(self) -> None:
        video = clip()
        self.assertTrue(torch.equal(self.changed("reversed", video)[:, :, 0], video[:, :, -1]))
        self.assertTrue(torch.equal(self.changed("shuffled", video)[:, :, 0], video[:, :, 3]))
        for name, frame in {"first frame": 0, "middle frame": 4}.items():
            self.assertTrue(torch.equal(self.changed(name, video), video[:, :, [frame] * 8]), name)
        self.assertTrue(torch.equal(self.changed("half rate", video), video[:, :, [0, 0, 2, 2, 4, 4, 6, 6]]))

    def test_color_and_blur(self) -> None:
        grey = self.changed("grey", clip())
        self.assertTrue(torch.equal(grey[:, 0], grey[:, 2]))
        self.assertLess(self.changed("blurred", clip()).float().std(), 0.5 * clip().float().std())

    def test_background(self) -> None:
        video = labelled_clips()[1].video  # a moving square
        self.assertTrue((self.changed("background", video)[:, :, :, 0:8] == 120).all())
        without = self.changed("no background", video)
        self.assertTrue((without[:, :, :, 0:8] == 128).all())
        self.assertTrue((without.flatten(3).amax(3) > 200).all())


class Verdict(unittest.TestCase):
    def test_models_that_look_at_one_thing(self) -> None:
        for what in ("motion", "place", "nothing"):
            result = examine(what)
            with self.subTest(what):
                self.assertEqual(probing.overall_verdict(result), what)
                self.assertEqual([probing.class_verdict(result, label) for label in (0, 1)], [what] * 2)

    def test_always_guessing_a_class_is_not_recognizing_it(self) -> None:
        result = examine("nothing")
        self.assertEqual(result.accuracy(INTACT).value, 0.5)
        self.assertEqual(result.informedness(INTACT, 1).value, 0)

    def test_errors_are_paired(self) -> None:
        labels = np.zeros(100, np.int64)
        intact = (np.arange(100) % 2).astype(np.int64)
        changed = intact.copy()
        changed[0] = 1
        lost = Xray(labels, {INTACT: intact, "grey": changed}, ["a", "b"]).loss("grey")
        self.assertEqual(lost.value, 0.01)
        self.assertAlmostEqual(lost.error, 0.01)  # unpaired, it would be 0.07
        self.assertEqual(Measured.of_mean(np.ones(50)), Measured(1.0, 1 / 50))


class Command(tiny.WeightsCase):
    def test_a_run_is_examined_on_its_own_data(self) -> None:
        paths = stages.write_videos(self.folder / "videos", 9)
        run = self.folder / "run"
        data = stages.write_split(self.folder, "ucf101", "train", paths) + stages.write_split(
            self.folder, "ucf101", "val", paths
        )
        result = stages.run_in_process(stages.command("ft", run, *data, "pretrained_checkpoint_path=null"))
        self.assertEqual(result.returncode, 0, result.stderr)
        common = "--workers", "0", "--clips", "1", "--crops", "1"
        self.assertEqual(main(["xray", str(run), *common]), 0)
        found = json.loads((run / "xray" / "xray.json").read_text())["datasets"]["ucf101"]
        self.assertEqual(found["videos"], 9)
        self.assertEqual(set(found["top1"]), set(CHANGES))
        self.assertEqual(len(list((run / "xray").glob("ucf101_*.gif"))), 2)
        self.assertEqual(found["views"], "1 clip x 1 crop")
        catalog = self.folder / "catalog.yaml"
        entry = f"val: {{paths: {self.folder}/ucf101_val_paths.npy, labels: {self.folder}/ucf101_val_labels.npy}}"
        catalog.write_text(f"datasets:\n  other: {{num_classes: {stages.CLASSES}, {entry}}}\n")
        self.assertEqual(main(["xray", str(run), "--data", "other", "--catalog", str(catalog), *common]), 0)
        both = json.loads((run / "xray" / "xray.json").read_text())["datasets"]
        self.assertEqual((set(both), both["ucf101"]), ({"ucf101", "other"}, found), "both are kept")
        self.assertEqual(main(["xray", str(run), "--data", "hmdb51", *common]), 1)  # other classes
        self.assertEqual(main(["xray", str(self.save_run(tiny.classifier(3))), *common]), 1)  # no run: --data
        self.assertEqual(main(["xray", str(self.save_run(tiny.autoencoder())), *common]), 1)


if __name__ == "__main__":
    unittest.main()
