"""Images and depth among the samples: joint steps with clips, the shipped recipes, the depth embedding."""

import unittest
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omnivision.data.batch import collate
from omnivision.data.catalog import Dataset, LabelSets, Split
from omnivision.data.dataset import ClipConfig, ClipDataset
from omnivision.data.encode import write_video
from omnivision.data.loader import LoaderConfig, TrainData
from omnivision.data.masking import RandomMask
from omnivision.data.mixing import MixupCutmix
from omnivision.data.sampling import EpochPlan, Request, SourcePlan
from omnivision.data.views import EvalView, PretrainView
from omnivision.models.classifier import VideoClassifier
from omnivision.models.mae import MaskedAutoencoder
from omnivision.models.vit import VisionTransformer
from omnivision.tasks.classify import Classify
from omnivision.tasks.reconstruct import Reconstruct
from omnivision.utils.errors import UserError
from tests import runs
from tests import stage_runs as stages
from tests.data.test_catalog import Folder

TUBELET = (2, 8, 8)


def trunk(**changes) -> VisionTransformer:
    return VisionTransformer(24, 2, 2, num_frames=4, image_size=32, tubelet=TUBELET, **changes)


class Joint(Folder):
    """Clips and images in one run: a step is of one or the other."""

    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        for number in range(4):
            write_video(self.folder / f"{number}.mp4", rng.integers(0, 256, (8, 48, 64, 3), dtype=np.uint8), fps=8)
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(self.folder / f"{number}.jpg")
            Image.fromarray(rng.integers(0, 5000, (40, 50), dtype=np.uint16)).save(self.folder / f"{number}.png")
        for name, count, ending in (("videos", 4, "mp4"), ("images", 12, "jpg"), ("depth", 12, "png")):
            np.save(
                self.folder / f"{name}.npy", np.array([f"{self.folder}/{number}.{ending}" for number in range(count)])
            )
            np.save(self.folder / f"{name}_labels.npy", np.arange(count) % 3)

    def split(self, name: str, kind: str = "video") -> Split:
        files = {
            "paths": f"{self.folder}/{name}.npy",
            "labels": f"{self.folder}/{name}_labels.npy",
            "depth": f"{self.folder}/depth.npy",
        }
        return Split(Dataset(name=name, kind=kind, num_classes=3, depth_scale=0.001, depth_max=5, train=files), "train")

    def test_steps_of_clips_and_of_images(self):
        view = PretrainView(32, short_side=40)
        configs = {
            "video": ClipConfig(view, views=2, num_frames=4, grid=(2, 4, 4), mask=RandomMask(0.9)),
            "image": ClipConfig(view, views=1, num_frames=1, grid=(1, 4, 4), mask=RandomMask(0.75)),
        }
        dataset = ClipDataset([self.split("videos"), self.split("images", "image")], configs, 0.7, 5, training=True)
        plan = EpochPlan({"videos": SourcePlan(4, 2, views_per_video=2), "images": SourcePlan(12, 6)}, seed=1)
        self.assertEqual(plan.steps, 3)
        model = MaskedAutoencoder(trunk(), {"width": 16, "depth": 1, "heads": 2})
        task = Reconstruct(TUBELET)
        seen = []
        for batch in TrainData(dataset, LoaderConfig(), plan).batches((0, 0), epochs=1):
            seen.append((batch.source, tuple(batch.video.shape), batch.num_masked))
            task.training_step(model, batch).loss.backward()
        self.assertEqual(
            sorted(seen),
            [*[("images", (6, 3, 32, 32), 12)] * 2, ("videos", (4, 3, 4, 32, 32), 28)],
        )

    def test_depth_is_cropped_like_the_pixels(self):
        gradient = np.broadcast_to(np.arange(50, dtype=np.uint16) * 100, (40, 50))
        for number in range(12):
            Image.fromarray(gradient.copy()).save(self.folder / f"{number}.png")
            colours = np.repeat((gradient / 100 * 5).astype(np.uint8)[..., None], 3, axis=2)
            Image.fromarray(colours).save(self.folder / f"{number}.bmp")
        np.save(self.folder / "images.npy", np.array([f"{self.folder}/{number}.bmp" for number in range(12)]))
        split = self.split("images", "rgbd")
        for training, view in ((True, PretrainView(32, short_side=40)), (False, EvalView(32, crops=3))):
            config = ClipConfig(view, views=3, num_frames=1, grid=(1, 4, 4))
            sample = ClipDataset([split], {"rgbd": config}, 1.0, 5, training)[Request(0, 1, 0)]
            self.assertEqual((tuple(sample.video.shape), tuple(sample.depth.shape)), ((3, 3, 32, 32), (3, 1, 32, 32)))
            self.assertGreater(float(sample.depth.max()), 0.3)
            # A byte of grey stands for 0.1 m / 5 of depth 20 units each: both show the same places.
            self.assertLess(float((sample.video[:, :1] / 255 * 51 / 50 - sample.depth).abs().max()), 0.02)

    def test_rgbd_batches_train(self):
        config = ClipConfig(EvalView(32), views=1, num_frames=1, grid=(1, 4, 4))
        dataset = ClipDataset([self.split("images", "rgbd")], {"rgbd": config}, 1.0, 5, training=True)
        batch = collate([dataset[Request(0, i, 0)] for i in range(4)])
        self.assertEqual(tuple(batch.depth.shape), (4, 1, 32, 32))
        model = VideoClassifier(trunk(rgbd=True), [3])
        for mixing in (None, MixupCutmix()):
            model.zero_grad()
            Classify(LabelSets([3], {"images": 0}), mixing).training_step(model, batch).loss.backward()
            self.assertGreater(float(model.trunk.depth_patch_embed.proj[1].weight.grad.abs().sum()), 0)
        with self.assertRaisesRegex(UserError, r"depth: no such file"):
            Split(Dataset(name="images", kind="rgbd", train={"paths": f"{self.folder}/images.npy"}), "train")
        np.save(self.folder / "depth.npy", np.array(["one.png"]))
        with self.assertRaisesRegex(UserError, r"datasets\.images\.train\.depth"):
            self.split("images", "rgbd")


class Recipes(Folder):
    """The shipped recipes with images, from the command line to the last epoch."""

    def setUp(self):
        super().setUp()
        files: dict[str, list[str]] = {"image": [], "depth": []}
        for number in range(8):
            for kind, shape in (("image", (40, 50, 3)), ("depth", (40, 50))):
                files[kind].append(str(self.folder / f"{kind}{number}.png"))
                pixels = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
                Image.fromarray(pixels if kind == "image" else pixels.astype(np.uint16) * 20).save(files[kind][-1])
        self.files = files

    def splits(self, dataset: str, which: tuple[str, ...], depth: bool = False) -> list[str]:
        overrides = []
        for split in which:
            overrides += stages.write_split(self.folder, dataset, split, self.files["image"])
            if depth:
                np.save(self.folder / "depth.npy", np.array(self.files["depth"]))
                overrides.append(f"++datasets.{dataset}.{split}.depth={self.folder}/depth.npy")
        return overrides

    def trained(self, stage: str, dataset: str, *overrides: str) -> Path:
        folder = self.folder / "run"
        result = stages.run_in_process(stages.command(stage, folder, *overrides, dataset=dataset))
        self.assertEqual(result.returncode, 0, result.stderr)
        return folder

    def test_images_and_clips_with_pictures_of_either(self):
        videos = stages.write_split(self.folder, "k150", "train", stages.write_videos(self.folder / "videos", 4))
        images = self.splits("in1k", ("train",))
        folder = self.trained(
            "mae", "in1k_k150", *videos, *images, "epochs=3", "trainer.logging.pictures_every_epochs=1"
        )
        self.assertEqual(len(list((folder / "pictures").glob("*.png"))), 4)
        (last,) = [line for line in runs.read_metrics(folder, "epoch") if line["epoch"] == 2]
        self.assertEqual(set(last["per_source"]), {"in1k", "k150"})

    def test_classifying_images(self):
        data = self.splits("in1k", ("train", "val"))
        folder = self.trained("ft", "in1k", *data, "pretrained_checkpoint_path=null")
        self.assertEqual(runs.read_metrics(folder, "epoch", "val")[0]["videos"], 8)

    def test_classifying_images_with_depth(self):
        data = self.splits("sunrgbd", ("train", "val"), depth=True)
        own = ["trainer.data.image.batch_size=2", "trainer.data.image.accumulation_steps=2"]
        folder = self.trained("ft", "sunrgbd", *data, *own, "pretrained_checkpoint_path=null")
        self.assertEqual(runs.read_metrics(folder, "epoch", "val")[0]["videos"], 8)
        self.assertEqual(len(runs.read_metrics(folder)), 4, "steps of the batch that images have")


class DepthEmbedding(unittest.TestCase):
    def test_rgb_input_is_embedded_as_without_depth(self):
        torch.manual_seed(0)
        plain = VideoClassifier(trunk(), [3]).eval()
        with_depth = VideoClassifier(trunk(rgbd=True), [3]).eval()
        with_depth.load_state_dict(plain.state_dict(), strict=False)
        image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        depth = torch.rand(2, 1, 32, 32)
        self.assertTrue(torch.equal(plain(image), with_depth(image)))
        self.assertFalse(torch.equal(plain(image), with_depth(image, 0, depth)))
        embedded = with_depth.trunk.depth_patch_embed
        self.assertEqual(tuple(embedded.proj[1].weight.shape), (24, 1, *TUBELET))


if __name__ == "__main__":
    unittest.main()
